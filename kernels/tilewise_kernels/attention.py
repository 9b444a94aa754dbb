"""Attention that never holds the score matrix: out = softmax(scale * q k^T | masks) v.

Memory contract: forward saves q, k, v, out and the log-sum-exp of each row, all linear in length;
backward recomputes the probabilities P = exp(scale * q k^T - lse) tile by tile. Work:
4 B Hq Sq Sk D FLOPs forward (half when causal), 2.5 times that backward; bytes: q, k, v, out once.
Source: Dao et al. 2022 and Dao 2023 (FlashAttention); Milakov and Gimelshein 2018 (online softmax).

Shapes: q [B, Hq, Sq, D]; k, v [B, Hkv, Sk, D]; Hq = G * Hkv, query head h reads key head h // G;
mask 4-D, broadcasting to [B, Hq, Sq, Sk]; key_lengths [B]; out [B, Hq, Sq, D], laid out in memory
as q by torch's kernel, [B, Hq, Sq, D] by Triton's, [B, Sq, Hq, D] by the others; lse [B, Hq, Sq].
Causal is aligned bottom-right: query i attends to key j when j <= i + Sk - Sq.

Ways: triton (attention_triton.py) on CUDA; torch: the CPU flash kernel inside torch, called on
pieces that it can express; blocked: plain torch over blocks of queries, for everything else.
"""

from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from . import lazy_triton
from .checks import (
    fail,
    has_shape,
    is_flag,
    is_float_tensor,
    is_mask,
    is_number,
    matches,
    same_device,
)
from .launch import architecture
from .op import Cost, Implementation, Op, accumulator, autocast_dtype

QUERY_BLOCK = 128  # rows of scores that the blocked way holds at a time
# Rows with a smaller lse have no gradient: they have no key (-inf), or every key carries a finite
# mask so large (finfo.min) that float32 cannot tell the lse from the mask. The same in every way.
NO_GRADIENT = -1e30

flash_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
flash_cpu_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def _empty_output(q: Tensor, head_dim: int) -> Tensor:
    b, hq, sq, _ = q.shape
    return q.new_empty(b, sq, hq, head_dim).transpose(1, 2)


def _zero_padding(keys: Tensor, key_lengths: Tensor | None) -> Tensor:
    """k or v with the positions past key_lengths zeroed, so that NaN there cannot leak."""
    if key_lengths is None:
        return keys
    past = torch.arange(keys.shape[2], device=keys.device) >= key_lengths[:, None]
    return keys.masked_fill(past[:, None, :, None], 0)


# -- reference and blocked: the definition, whole or a block of queries at a time ----------------


def _scores(
    q: Tensor,
    k: Tensor,
    mask: Tensor | None,
    key_lengths: Tensor | None,
    causal: bool,
    scale: float,
    rows: slice,
) -> Tensor:
    """Masked scores of the query rows `rows`: [B, Hkv, G, rows, Sk], in the accumulator's dtype."""
    wide = accumulator(q.dtype)
    sq, sk, hkv = q.shape[2], k.shape[2], k.shape[1]
    grouped = q[:, :, rows].unflatten(1, (hkv, -1)).to(wide)
    scores = grouped @ k[:, :, None].to(wide).transpose(-1, -2) * scale
    if mask is not None:
        mask = mask.expand(q.shape[0], q.shape[1], sq, sk)[:, :, rows].unflatten(1, (hkv, -1))
        if mask.dtype == torch.bool:
            scores = scores.masked_fill(~mask, -torch.inf)
        else:
            scores = scores + mask
    keys = torch.arange(sk, device=q.device)
    if key_lengths is not None:
        past = keys >= key_lengths[:, None]
        scores = scores.masked_fill(past[:, None, None, None], -torch.inf)
    if causal:
        last = torch.arange(sq, device=q.device)[rows, None] + (sk - sq)
        scores = scores.masked_fill(keys > last, -torch.inf)
    return scores


def _attend_block(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    key_lengths: Tensor | None,
    causal: bool,
    scale: float,
    rows: slice,
) -> tuple[Tensor, Tensor]:
    """(out, lse) of the query rows `rows`; k and v already have their padding zeroed."""
    scores = _scores(q, k, mask, key_lengths, causal, scale, rows)
    nothing = scores.new_full(scores.shape[:-1], -torch.inf)
    lse = torch.logsumexp(scores, -1) if k.shape[2] else nothing
    # Not exp(scores - lse): float32 rounds an lse of 1e4 to 1e-3, and P with it.
    p = torch.softmax(scores, -1).masked_fill_((lse == -torch.inf)[..., None], 0)
    out = p @ v[:, :, None].to(p.dtype)
    return out.flatten(1, 2).to(q.dtype), lse.flatten(1, 2)


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    key_lengths: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The definition with the whole score matrix in memory."""
    k, v = _zero_padding(k, key_lengths), _zero_padding(v, key_lengths)
    out = _empty_output(q, v.shape[3])
    block, lse = _attend_block(q, k, v, mask, key_lengths, causal, scale, slice(0, q.shape[2]))
    out.copy_(block)
    return out, lse


def blocked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    key_lengths: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The definition, QUERY_BLOCK rows of scores at a time: memory linear in length."""
    k, v = _zero_padding(k, key_lengths), _zero_padding(v, key_lengths)
    out = _empty_output(q, v.shape[3])
    lse = q.new_empty(q.shape[:3], dtype=accumulator(q.dtype))
    for start in range(0, q.shape[2], QUERY_BLOCK):
        rows = slice(start, min(start + QUERY_BLOCK, q.shape[2]))
        out[:, :, rows], lse[:, :, rows] = _attend_block(
            q, k, v, mask, key_lengths, causal, scale, rows
        )
    return out, lse


def blocked_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    key_lengths: Tensor | None,
    causal: bool,
    scale: float,
    needs: list[bool],
) -> tuple[Tensor | None, ...]:
    """dv = P^T g, dP = g v^T, dS = P (dP - rowsum(P dP)), dq = dS k, dk = dS^T q, times scale."""
    wide, hkv = accumulator(q.dtype), k.shape[1]
    k0, v0 = _zero_padding(k, key_lengths).to(wide), _zero_padding(v, key_lengths).to(wide)
    dq = torch.empty_like(q)
    dk, dv = torch.zeros_like(k0), torch.zeros_like(v0)
    for start in range(0, q.shape[2], QUERY_BLOCK):
        rows = slice(start, min(start + QUERY_BLOCK, q.shape[2]))
        scores = _scores(q, k0, mask, key_lengths, causal, scale, rows)
        row_lse = lse[:, :, rows].unflatten(1, (hkv, -1))
        p = torch.softmax(scores, -1).masked_fill_((row_lse < NO_GRADIENT)[..., None], 0)
        g = grad[:, :, rows].unflatten(1, (hkv, -1)).to(wide)
        dp = g @ v0[:, :, None].transpose(-1, -2)
        ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * scale  # exact where one key takes all
        dq[:, :, rows] = (ds @ k0[:, :, None]).flatten(1, 2).to(q.dtype)
        dk += (ds.transpose(-1, -2) @ q[:, :, rows].unflatten(1, (hkv, -1)).to(wide)).sum(2)
        dv += (p.transpose(-1, -2) @ g).sum(2)
    return dq, dk.to(k.dtype), dv.to(v.dtype)


# -- torch: the CPU flash kernel, on pieces it can express ---------------------------------------


class _Piece(NamedTuple):
    """A call the CPU flash kernel takes: its causal limit is top-left and its heads are paired."""

    batch: slice
    rows: slice
    keys: slice
    causal: bool


def _pieces(b: int, sq: int, sk: int, causal: bool, lengths: list[int] | None) -> list[_Piece]:
    """Cut a call so that each piece is square-causal from its corner, or not causal at all."""
    offset = sk - sq if causal and sq > 1 else 0
    causal = causal and sq > 1 or (causal and sk < sq)
    spans = [(slice(0, b), sk)] if lengths is None else runs(lengths)
    pieces = []
    for batch, length in spans:
        if not causal:
            pieces.append(_Piece(batch, slice(0, sq), slice(0, length), False))
            continue
        if offset > 0:
            pieces.append(_Piece(batch, slice(0, sq), slice(0, min(offset, length)), False))
        if length > offset:
            rows = slice(max(0, -offset), sq)
            pieces.append(_Piece(batch, rows, slice(max(0, offset), length), True))
    return [p for p in pieces if p.keys.stop > p.keys.start and p.rows.stop > p.rows.start]


def runs(lengths: list[int]) -> list[tuple[slice, int]]:
    """Consecutive batch items of equal length, as (items, length)."""
    runs: list[tuple[slice, int]] = []
    for i, length in enumerate(lengths):
        if runs and runs[-1][1] == length:
            runs[-1] = (slice(runs[-1][0].start, i + 1), length)
        else:
            runs.append((slice(i, i + 1), length))
    return runs


def _flash_operands(
    k: Tensor, v: Tensor, mask: Tensor | None, key_lengths: Tensor | None, q: Tensor
) -> tuple[Tensor, Tensor, Tensor | None, list[int] | None]:
    """k, v, an additive mask, and key lengths as numbers where pieces are to be cut by them.

    Short padded keys become part of the mask: one call for the whole batch. Long ones, and masks
    that differ by query, are cut per batch item instead, which computes no padding at all.
    """
    lengths = None
    key_mask = None
    if mask is not None:
        mask = _stored(mask)
    if key_lengths is not None and (k.shape[2] >= 512 or (mask is not None and mask.shape[2] > 1)):
        lengths = [min(max(int(n), 0), k.shape[2]) for n in key_lengths.tolist()]
    elif key_lengths is not None:
        k, v = _zero_padding(k, key_lengths), _zero_padding(v, key_lengths)
        key_mask = torch.arange(k.shape[2]) < key_lengths[:, None]
        key_mask = key_mask[:, None, None]
    additive = accumulator(q.dtype)
    if mask is not None and mask.dtype == torch.bool:
        both = mask if key_mask is None else mask & key_mask
        mask = torch.zeros(both.shape, dtype=additive).masked_fill_(~both, -torch.inf)
    elif mask is not None:
        mask = mask.to(additive)
        if key_mask is not None:
            mask = mask.masked_fill(~key_mask, -torch.inf)
    elif key_mask is not None:
        mask = torch.zeros(key_mask.shape, dtype=additive).masked_fill_(~key_mask, -torch.inf)
    return _unit_stride(k), _unit_stride(v), mask, lengths


def _stored(mask: Tensor) -> Tensor:
    """The mask as it was before it was expanded: stride-0 dims but the keys become length 1."""
    for dim in range(3):
        if mask.stride(dim) == 0 and mask.shape[dim] > 1:
            mask = mask.narrow(dim, 0, 1)
    return mask


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _part(mask: Tensor | None, piece: _Piece) -> Tensor | None:
    """The mask of one piece."""
    if mask is None:
        return None
    if mask.shape[0] > 1:
        mask = mask[piece.batch]
    if mask.shape[2] > 1:
        mask = mask[:, :, piece.rows]
    return mask[..., piece.keys]


def _flash_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    key_lengths: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    if scale < 0:  # the kernel's running maximum assumes that scaling keeps the order of scores
        return _flash_forward(-q, k, v, mask, key_lengths, causal, -scale)
    (b, hq, sq, _), hkv = q.shape, k.shape[1]
    k, v, mask, lengths = _flash_operands(k, v, mask, key_lengths, q)
    k, v = (_per_query_head(t, hq // hkv) for t in (k, v))
    if _one_call(q, k, causal, lengths):
        return _flash_piece(_unit_stride(q), k, v, causal and sq > 1, mask, scale)
    out = _empty_output(q, v.shape[3]).zero_()
    lse = q.new_full(q.shape[:3], -torch.inf, dtype=accumulator(q.dtype))
    q = _unit_stride(q)
    for piece in _pieces(b, sq, k.shape[2], causal, lengths) if q.numel() else []:
        at = (piece.batch, slice(None), piece.rows)
        keys = (piece.batch, slice(None), piece.keys)
        part = _flash_piece(q[at], k[keys], v[keys], piece.causal, _part(mask, piece), scale)
        _merge(out[at], lse[at], *part)
    return out, lse


def _per_query_head(keys: Tensor, group: int) -> Tensor:
    """k or v once for each query head: the kernel pairs heads."""
    return keys if group == 1 else keys.repeat_interleave(group, 1)


def _one_call(q: Tensor, k: Tensor, causal: bool, lengths: list[int] | None) -> bool:
    """Whether the kernel takes the call as it is: square, or with one query, if causal."""
    sq, sk = q.shape[2], k.shape[2]
    whole = lengths is None and q.numel() > 0 and sk > 0
    return whole and (not causal or sq == sk or sq == 1)


def _flash_piece(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """(out, lse) of one piece. The kernel writes lse 0 for rows with no key; ours is -inf."""
    out, lse = flash_cpu(q, k, v, 0.0, causal, attn_mask=mask, scale=scale)
    if mask is not None:
        attended = mask > -torch.inf
        first = attended.to(torch.uint8).argmax(-1)  # the first attended key, if there is one
        dead = ~attended.any(-1)
        if causal:
            dead = dead | (first > torch.arange(q.shape[2]))
        lse = lse.masked_fill(dead, -torch.inf)
    return out, lse


def _merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Fold a softmax over other keys into (out, lse), in place."""
    both = torch.logaddexp(lse, part_lse)
    live = both.masked_fill(both == -torch.inf, 0)
    old, new = torch.exp(lse - live)[..., None], torch.exp(part_lse - live)[..., None]
    out.copy_(out * old + part * new)
    lse.copy_(both)


def _flash_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    key_lengths: Tensor | None,
    causal: bool,
    scale: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """With the whole row's out and lse each piece gives its exact share of the gradients."""
    if scale < 0:
        dq, dk, dv = _flash_backward(
            grad, -q, k, v, out, lse, mask, key_lengths, causal, -scale, needs
        )
        return -dq, dk, dv
    (b, hq, sq, _), hkv = q.shape, k.shape[1]
    k0, v0, mask, lengths = _flash_operands(k, v, mask, key_lengths, q)
    k0, v0 = (_per_query_head(t, hq // hkv) for t in (k0, v0))
    grad = grad.contiguous() if 0 in grad.stride() or grad.stride(-1) != 1 else grad
    q = _unit_stride(q)
    if mask is not None or causal or lengths is not None:  # some rows may see nothing
        lse = lse.masked_fill(lse < NO_GRADIENT, torch.inf)  # exp(score - inf) = 0
    if _one_call(q, k0, causal, lengths):
        dq, dk, dv = flash_cpu_backward(
            grad, q, k0, v0, out, lse, 0.0, causal and sq > 1, attn_mask=mask, scale=scale
        )
        return dq, _per_key_head(dk, hkv), _per_key_head(dv, hkv)
    dq, dk, dv = (t.new_zeros(t.shape, dtype=accumulator(t.dtype)) for t in (q, k0, v0))
    for piece in _pieces(b, sq, k0.shape[2], causal, lengths) if q.numel() else []:
        at = (piece.batch, slice(None), piece.rows)
        keys = (piece.batch, slice(None), piece.keys)
        shares = flash_cpu_backward(
            grad[at], q[at], k0[keys], v0[keys], out[at], lse[at].contiguous(), 0.0,
            piece.causal, attn_mask=_part(mask, piece), scale=scale,
        )  # fmt: skip
        for total, share in zip((dq[at], dk[keys], dv[keys]), shares, strict=True):
            total += share
    dk, dv = (_per_key_head(t, hkv).to(k.dtype) for t in (dk, dv))
    return dq.to(q.dtype), dk, dv


def _per_key_head(gradient: Tensor, heads: int) -> Tensor:
    """Gradients of repeated keys added up, in float32 or wider."""
    if gradient.shape[1] == heads:
        return gradient
    wide = gradient.to(accumulator(gradient.dtype)).unflatten(1, (heads, -1))
    return wide.sum(2).to(gradient.dtype)


def _flash_refuses(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *_: object) -> str | None:
    if mask is not None and mask.shape[3] != k.shape[2]:
        return "its kernel cannot read a mask that is broadcast over keys"
    return None


# -- triton --------------------------------------------------------------------------------------


def _triton_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    key_lengths: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    from . import attention_triton

    mask = None if mask is None else mask.expand(*q.shape[:3], k.shape[2])
    return attention_triton.forward(q, k, v, mask, key_lengths, causal, scale)


def _triton_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    key_lengths: Tensor | None,
    causal: bool,
    scale: float,
    needs: list[bool],
) -> tuple[Tensor | None, ...]:
    from . import attention_triton

    mask = None if mask is None else mask.expand(*q.shape[:3], k.shape[2])
    return attention_triton.backward(grad, q, k, v, out, lse, mask, key_lengths, causal, scale)


def _triton_refuses(q: Tensor, *_: object) -> str | None:
    if q.dtype == torch.float64:
        return "its matrix products have no float64"
    if not 1 <= q.shape[3] <= 256:
        return f"head dim {q.shape[3]} is outside 1..256"
    if 0 < architecture(q.device) < 80:
        return f"its block sizes are for sm_80 and newer, this is sm_{architecture(q.device)}"
    if not q.is_cuda and q.dtype == torch.bfloat16:
        return "Triton's interpreter multiplies bfloat16 wrongly"
    return None


def cost(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    key_lengths: Tensor | None,
    causal: bool,
    scale: float,
) -> Cost:
    """4 B Hq Sq Sk D FLOPs (the attended share when causal); q, k, v, out read or written once."""
    (b, hq, sq, d), sk = q.shape, k.shape[2]
    pairs = sq * sk
    if causal:
        offset = sk - sq
        pairs = sum(min(max(i + offset + 1, 0), sk) for i in range(sq))
    flops = 4 * b * hq * pairs * d
    moved = (2 * q.numel() + k.numel() + v.numel()) * q.element_size()
    return Cost(flops, moved, flops * 5 // 2, 2 * moved + q.numel() * q.element_size())


def _fake(q: Tensor, k: Tensor, v: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    out = q.new_empty(*q.shape[:3], v.shape[3])
    return out, q.new_empty(q.shape[:3], dtype=accumulator(q.dtype))


OP = Op(
    "attention",
    schema="(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? key_lengths, bool causal, "
    "float scale) -> (Tensor, Tensor)",
    backward_schema="(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    "Tensor? mask, Tensor? key_lengths, bool causal, float scale) -> (Tensor, Tensor, Tensor)",
    implementations=[
        Implementation(
            "triton",
            _triton_forward,
            _triton_backward,
            devices=("cuda",),
            missing=lazy_triton.missing,
            refuses=_triton_refuses,
            refuses_backward=lambda grad, q, *_: _triton_refuses(q),
        ),
        Implementation(
            "torch",
            _flash_forward,
            _flash_backward,
            devices=("cpu",),
            refuses=_flash_refuses,
            refuses_backward=lambda g, q, k, v, out, lse, mask, *_: _flash_refuses(q, k, v, mask),
        ),
        Implementation("blocked", blocked, blocked_backward),
        Implementation("reference", reference, blocked_backward),
    ],
    fake=_fake,
    fake_backward=lambda grad, q, k, v, *_: tuple(
        torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v)
    ),
    save=lambda args, outputs: ((*args[:3], *outputs, args[3], args[4]), args[5:7]),
    inputs_with_grad=(0, 1, 2),
    cost=cost,
)


def check_qkv(op: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise ArgumentError unless q [B, Hq, Sq, D] and k, v [B, Hkv, Sk, D] fit together."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        is_float_tensor(op, name, tensor, min_dims=4)
        if tensor.dim() != 4:
            raise fail(op, name, f"{tensor.dim()}-dimensional", "pass [batch, heads, length, dim]")
    matches(op, "k", k, "q", q)
    matches(op, "v", v, "q", q)
    (b, hq, _, d), (hkv, sk) = q.shape, k.shape[1:3]
    has_shape(op, "k", k, (b, hkv, sk, d), "batch of q, its own heads and length, head dim of q")
    has_shape(op, "v", v, (b, hkv, sk, d), "the shape of k")
    if hkv == 0 or hq % hkv:
        raise fail(op, "k", f"of {hkv} heads", f"q has {hq}: it must be a multiple of k's heads")


def _check_key_lengths(key_lengths: Tensor, q: Tensor, sk: int) -> None:
    if not isinstance(key_lengths, Tensor) or key_lengths.dtype not in (torch.int32, torch.int64):
        got = key_lengths.dtype if isinstance(key_lengths, Tensor) else type(key_lengths).__name__
        raise fail("attention", "key_lengths", got, "pass an int32 or int64 torch.Tensor")
    same_device("attention", "key_lengths", key_lengths, "q", q)
    has_shape("attention", "key_lengths", key_lengths, (q.shape[0],), "[batch]")
    # Reading values would stall a GPU and break a graph; there the kernels clamp instead.
    if key_lengths.is_cpu and not torch.compiler.is_compiling() and key_lengths.numel():
        low, high = (int(n) for n in torch.aminmax(key_lengths))
        if low < 0 or high > sk:
            raise fail("attention", "key_lengths", f"{low}..{high}", f"keep it within 0..{sk}")


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    key_lengths: Tensor | None = None,
    scale: float | None = None,
    return_lse: Literal[False] = False,
) -> Tensor: ...
@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    key_lengths: Tensor | None = None,
    scale: float | None = None,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    key_lengths: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale * q k^T, over the keys that the masks leave) v, without the score matrix.

    q: [B, Hq, Sq, D]; k, v: [B, Hkv, Sk, D], Hq a multiple of Hkv (query head h reads key head
    h // (Hq / Hkv)); one dtype of float32, float16, bfloat16, float64; any strides. mask:
    broadcastable to [B, Hq, Sq, Sk]; bool (True = attend) or float without gradient (added,
    natural-log units). causal: key j is seen by query i when j <= i + Sk - Sq. key_lengths: [B]
    int, the number of real keys; what lies past them is never read into the result, NaN included.
    scale: multiplies q k^T; 1 / sqrt(D) when None.
    Returns out [B, Hq, Sq, D] in q's dtype, and with return_lse also the log-sum-exp of the scores
    [B, Hq, Sq], float32 (float64 for float64), without gradient. A row with nothing to attend to
    gives out 0, gradient 0, lse -inf; one whose every key carries a float mask below -1e30 gives
    the mean of v, as eager softmax does, and gradient 0. Under autocast q, k, v are cast to its
    dtype. Sums are kept in float32 or wider; forward and backward are deterministic. Raises
    ArgumentError for anything else. Source: Vaswani et al. 2017; Dao 2023.
    """
    check_qkv("attention", q, k, v)
    (b, hq, sq, d), sk = q.shape, k.shape[2]
    if mask is not None:
        is_mask("attention", mask, "q", q, (b, hq, sq, sk), "[B, Hq, Sq, Sk]")
        mask = mask[(None,) * (4 - mask.dim())]
        if mask.dtype == torch.float64:
            mask = mask.to(accumulator(q.dtype))
    if key_lengths is not None:
        _check_key_lengths(key_lengths, q, sk)
    is_flag("attention", "causal", causal)
    is_flag("attention", "return_lse", return_lse)
    if scale is not None:
        is_number("attention", "scale", scale)
    dtype = autocast_dtype(q.device)
    if dtype is not None and q.dtype != torch.float64:
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    scale = d**-0.5 if scale is None and d else float(scale or 0.0)
    out, lse = OP(q, k, v, mask, key_lengths, causal, scale)
    return (out, lse) if return_lse else out
