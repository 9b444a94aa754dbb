"""Attention of the newest tokens against a cache that is written once and never moved.

Row r's last Sq tokens are its queries; its cache holds lengths[r] positions, theirs included. With
`beam_index` the key of position t is read from cache row beam_index[r, t], so a beam that switches
to another hypothesis changes a small table of integers and copies no key or value. With
`block_table` the cache is paged: position t lies in page block_table[r, t // P] at t % P.

Work: 4 R Hq Sq T D FLOPs; bytes: the T cached keys and values read once. Memory bound.

Shapes: q [R, Hq, Sq, D]; k_cache, v_cache [C, Hkv, T, D] (C = R without beam_index;
[pages, Hkv, P, D] with block_table); lengths [R]; beam_index [R, T] int32; block_table
[R, pages per row] int32; alibi_slopes [Hq]; bias broadcasts to [R, Hq, Sq, T]; out [R, Hq, Sq, D].

Ways: triton (decode_attention_triton.py) on CUDA and native (csrc/decode_attention.*) on CPU read
the cache in place; torch, where the extension is not built: the CPU flash kernel inside torch over
a gathered cache; reference: everything else, and the backward of all.
"""

from typing import Any

import torch
from torch import Tensor

from . import lazy_triton, native
from .attention import bounds, check_bias, check_slopes, triton_refuses
from .attention_cpu import flash_cpu, runs
from .checks import (
    fail,
    has_shape,
    is_float_tensor,
    is_index_tensor,
    is_number,
    matches,
    same_device,
)
from .errors import ArgumentError
from .op import Cost, Implementation, Op, accumulator, autocast_dtype

MAX_SHARED = 64  # queries that may share a key head in the native kernel: kMaxShared of csrc


def _within(name: str, indices: Tensor, last: int) -> None:
    """Raise unless every index is within 0..last. A GPU's values are not read: that would stall."""
    if indices.is_cpu and indices.numel():
        low, high = (int(n) for n in torch.aminmax(indices))
        if low < 0 or high > last:
            raise fail("decode_attention", name, f"{low}..{high}", f"keep it within 0..{last}")


def _check_values(
    k_cache: Tensor, lengths: Tensor, beam_index: Tensor | None, block_table: Tensor | None
) -> None:
    """Raise unless the rows, pages and lengths exist. The native way checks as it reads them."""
    rows, capacity = k_cache.shape[0], k_cache.shape[2]
    if beam_index is not None:
        _within("beam_index", beam_index, rows - 1)
        capacity = beam_index.shape[1]
    elif block_table is not None:
        _within("block_table", block_table, rows - 1)
        capacity *= block_table.shape[1]
    _within("lengths", lengths, capacity)


def _cached(cache: Tensor, beam_index: Tensor | None, block_table: Tensor | None) -> Tensor:
    """The keys or values of every row: [R, Hkv, T, D]."""
    if block_table is not None:
        pages = cache[block_table.long()]  # [R, pages, Hkv, P, D]
        return pages.transpose(1, 2).flatten(2, 3)
    if beam_index is None:
        return cache
    positions = torch.arange(beam_index.shape[1], device=cache.device)
    by_position = cache.transpose(1, 2)  # [C, T, Hkv, D]
    if not by_position.is_contiguous():
        return by_position[beam_index.long(), positions].transpose(1, 2)
    at = beam_index.long() * cache.shape[2] + positions  # then a key is one run of memory
    found = by_position.flatten(2).flatten(0, 1).index_select(0, at.flatten())
    return found.view(*beam_index.shape, *by_position.shape[2:]).transpose(1, 2)


def _uncached(
    grad: Tensor, cache: Tensor, beam_index: Tensor | None, block_table: Tensor | None
) -> Tensor:
    """The transpose of _cached: gradients [R, Hkv, T, D] added up where each position was read.

    Each sum has one order. On a GPU index_put_ sorts what it accumulates; on a CPU its threads
    race, so rows, which name a position once each, come one by one, and index_add_ is serial.
    """
    total = torch.zeros(cache.shape, dtype=grad.dtype, device=grad.device)
    if block_table is not None:
        pages = block_table.long().flatten()
        paged = grad.unflatten(2, (-1, cache.shape[2])).transpose(1, 2).flatten(0, 1)
        if grad.is_cpu:
            total.index_add_(0, pages, paged)
        else:
            total.index_put_((pages,), paged, accumulate=True)
    elif beam_index is not None:
        positions = torch.arange(beam_index.shape[1], device=grad.device)
        into, found = total.transpose(1, 2), grad.transpose(1, 2)
        if grad.is_cpu:
            for row, at in enumerate(beam_index.long()):
                into.index_put_((at, positions), found[row], accumulate=True)
        else:
            into.index_put_((beam_index.long(), positions), found, accumulate=True)
    else:
        total = grad
    return total.to(cache.dtype)


def _probabilities(
    q: Tensor,
    k: Tensor,
    lengths: Tensor,
    scale: float,
    alibi_slopes: Tensor | None,
    left: int,
    bias: Tensor | None,
) -> Tensor:
    """Attention weights [R, Hkv, G, Sq, T] in k's dtype; rows with nothing to see are 0."""
    (r, hq, sq, _), (hkv, t) = q.shape, k.shape[1:3]
    positions = torch.arange(t, device=q.device)
    query_at = lengths[:, None] - sq + torch.arange(sq, device=q.device)
    distance = query_at[:, :, None] - positions  # [R, Sq, T], negative where the key lies ahead
    seen = distance >= 0
    if left >= 0:
        seen = seen & (distance <= left)
    scores = q.unflatten(1, (hkv, -1)).to(k.dtype) @ k[:, :, None].transpose(-1, -2) * scale
    if alibi_slopes is not None:
        slopes = alibi_slopes.to(k.dtype).view(1, hkv, -1, 1, 1)
        scores = scores - slopes * distance[:, None, None].to(k.dtype)
    if bias is not None:
        scores = scores + bias.expand(r, hq, sq, t).unflatten(1, (hkv, -1)).to(k.dtype)
    scores = scores.masked_fill(~seen[:, None, None], -torch.inf)
    dead = (scores == -torch.inf).all(-1, keepdim=True)
    return torch.softmax(scores, -1).masked_fill(dead, 0)


def _read(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    beam_index: Tensor | None,
    block_table: Tensor | None,
) -> list[Tensor]:
    """k and v of every row in the accumulator's dtype; stale positions zeroed: no NaN leaks."""
    rows = [_cached(cache, beam_index, block_table) for cache in (k_cache, v_cache)]
    if lengths.is_cpu and lengths.numel() and int(lengths.min()) == rows[0].shape[2]:
        return [t.to(accumulator(q.dtype)) for t in rows]  # nothing is stale
    unread = torch.arange(rows[0].shape[2], device=q.device) >= lengths[:, None]
    return [t.masked_fill(unread[:, None, :, None], 0).to(accumulator(q.dtype)) for t in rows]


def reference(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    beam_index: Tensor | None,
    block_table: Tensor | None,
    scale: float,
    alibi_slopes: Tensor | None,
    left: int,
    bias: Tensor | None,
) -> tuple[Tensor]:
    """The definition in torch; left is -1 where the window has no bound."""
    _check_values(k_cache, lengths, beam_index, block_table)
    k, v = _read(q, k_cache, v_cache, lengths, beam_index, block_table)
    p = _probabilities(q, k, lengths, scale, alibi_slopes, left, bias)
    return ((p @ v[:, :, None]).flatten(1, 2).to(q.dtype).contiguous(),)


def reference_backward(
    grad: Tensor,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    beam_index: Tensor | None,
    block_table: Tensor | None,
    alibi_slopes: Tensor | None,
    bias: Tensor | None,
    scale: float,
    left: int,
    needs: list[bool],
) -> tuple[Tensor | None, ...]:
    """dS = P (g v^T - sum(P g v^T)); dq = scale dS k; dk = scale dS^T q; dv = P^T g; dbias = dS."""
    k, v = _read(q, k_cache, v_cache, lengths, beam_index, block_table)
    p = _probabilities(q, k, lengths, scale, alibi_slopes, left, bias)
    grouped, g = (t.unflatten(1, (k.shape[1], -1)).to(k.dtype) for t in (q, grad))
    dp = g @ v[:, :, None].transpose(-1, -2)
    ds = p * (dp - (p * dp).sum(-1, keepdim=True))
    dq = (scale * (ds @ k[:, :, None])).flatten(1, 2).to(q.dtype)
    dk = _uncached(
        scale * (ds.transpose(-1, -2) @ grouped).sum(2), k_cache, beam_index, block_table
    )
    dv = _uncached((p.transpose(-1, -2) @ g).sum(2), v_cache, beam_index, block_table)
    dbias = None if bias is None else ds.flatten(1, 2).sum_to_size(bias.shape).to(bias.dtype)
    return dq, dk, dv, dbias


def _torch_forward(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    beam_index: Tensor | None,
    block_table: Tensor | None,
    scale: float,
    *rest: object,
) -> tuple[Tensor]:
    """torch's CPU flash kernel over the gathered cache; the heads of a group become its queries."""
    _check_values(k_cache, lengths, beam_index, block_table)
    k, v = (_cached(cache, beam_index, block_table) for cache in (k_cache, v_cache))
    (r, hq, _, d), (hkv, t) = q.shape, k.shape[1:3]
    grouped = q.contiguous().view(r, hkv, hq // hkv, d)  # it reads head dims that lie together
    if int(lengths.min()) == t:
        return (flash_cpu(grouped, k, v, 0.0, False, scale=scale)[0].reshape(q.shape),)
    if beam_index is None and block_table is None:  # read each row's own part in place
        out = torch.zeros_like(grouped)
        for rows, n in runs(lengths.tolist()):
            if n:
                part = (grouped[rows], k[rows, :, :n], v[rows, :, :n])
                out[rows] = flash_cpu(*part, 0.0, False, scale=scale)[0]
        return (out.reshape(q.shape),)
    unread = (torch.arange(t) >= lengths[:, None])[:, None, :, None]
    mask = torch.zeros(r, 1, 1, t, dtype=accumulator(q.dtype))
    mask.masked_fill_(unread.transpose(-1, -2), -torch.inf)
    k, v = k.masked_fill_(unread, 0), v.masked_fill_(unread, 0)  # gathered: ours to write
    return (flash_cpu(grouped, k, v, 0.0, False, attn_mask=mask, scale=scale)[0].reshape(q.shape),)


def _torch_lacks(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    beam_index: Tensor | None,
    block_table: Tensor | None,
    scale: float,
    alibi_slopes: Tensor | None,
    left: int,
    bias: Tensor | None,
) -> str | None:
    """What of a call the kernel has not: the caller could do nothing about it."""
    if q.shape[2] != 1:
        return "its kernel is for one query token"
    if any(t is not None and t.numel() == 0 for t in (q, k_cache, beam_index, block_table)):
        return "its kernel cannot read an empty cache"
    if alibi_slopes is not None or left >= 0 or bias is not None:
        return "its kernel takes no ALiBi, window or bias"
    return None


def _torch_refuses(q: Tensor, k_cache: Tensor, v_cache: Tensor, *rest: Any) -> str | None:
    if lacking := _torch_lacks(q, k_cache, v_cache, *rest):
        return lacking
    scale = rest[3]
    if scale <= 0 or k_cache.stride(-1) != 1 or v_cache.stride(-1) != 1:
        return "its kernel needs a positive scale and head dims that lie together"
    return None


def _native_forward(*args: object) -> tuple[Tensor]:
    try:
        return (native.op("decode_attention")(*args),)
    except ValueError as error:
        raise ArgumentError(str(error)) from None


def _native_refuses(q: Tensor, k_cache: Tensor, v_cache: Tensor, *_: object) -> str | None:
    if q.dtype == torch.float64:
        return "its sums are float32"
    if k_cache.stride(3) != 1 or v_cache.stride(3) != 1:
        return "its kernel needs head dims that lie together"
    if q.shape[1] * q.shape[2] > MAX_SHARED * k_cache.shape[1]:
        return f"its kernel takes {MAX_SHARED} queries (heads of a group x Sq) for a key head"
    return None


def _triton_forward(*args: Any) -> tuple[Tensor]:
    from . import decode_attention_triton

    return (decode_attention_triton.forward(*args),)


def cost(q: Tensor, k_cache: Tensor, *_: object) -> Cost:
    """Each row reads its whole cache: T is the capacity, an upper bound on the lengths."""
    r, hq, sq, d = q.shape
    t = k_cache.shape[2]
    flops = 4 * r * hq * sq * t * d
    moved = 2 * (r * k_cache.shape[1] * t * d + q.numel()) * q.element_size()
    return Cost(flops, moved, flops * 5 // 2, 2 * moved)


OP = Op(
    "decode_attention",
    schema="(Tensor q, Tensor k_cache, Tensor v_cache, Tensor lengths, Tensor? beam_index, "
    "Tensor? block_table, float scale, Tensor? alibi_slopes, int left, Tensor? bias) -> Tensor",
    backward_schema="(Tensor grad, Tensor q, Tensor k_cache, Tensor v_cache, Tensor lengths, "
    "Tensor? beam_index, Tensor? block_table, Tensor? alibi_slopes, Tensor? bias, float scale, "
    "int left) -> (Tensor, Tensor, Tensor, Tensor)",
    implementations=[
        Implementation(
            "triton",
            _triton_forward,
            reference_backward,
            devices=("cuda",),
            missing=lazy_triton.missing,
            refuses=lambda q, *_: triton_refuses(q, q, q),
        ),
        Implementation(
            "native",
            _native_forward,
            reference_backward,
            devices=("cpu",),
            missing=native.missing,
            refuses=_native_refuses,
        ),
        Implementation(
            "torch",
            _torch_forward,
            reference_backward,
            devices=("cpu",),
            refuses=_torch_refuses,
            slower=_torch_lacks,
        ),
        Implementation("reference", reference, reference_backward),
    ],
    fake=lambda q, *_: torch.empty_like(q, memory_format=torch.contiguous_format),
    fake_backward=lambda grad, q, k, v, lengths, beam, table, slopes, bias, *_: tuple(
        grad.new_empty(0) if t is None else grad.new_empty(t.shape, dtype=t.dtype)
        for t in (q, k, v, bias)
    ),
    save=lambda args, outputs: ((*args[:6], args[7], args[9]), (args[6], args[8])),
    inputs_with_grad=(0, 1, 2, 9),
    cost=cost,
)


def _check_table(name: str, table: Tensor, q: Tensor, meaning: str) -> None:
    is_index_tensor("decode_attention", name, table)
    same_device("decode_attention", name, table, "q", q)
    if table.dim() != 2 or table.shape[0] != q.shape[0]:
        raise fail("decode_attention", name, f"of shape {list(table.shape)}", f"pass {meaning}")


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    *,
    beam_index: Tensor | None = None,
    block_table: Tensor | None = None,
    scale: float | None = None,
    alibi_slopes: Tensor | None = None,
    window: tuple[int | None, int | None] | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Causal attention of each row's newest Sq tokens to its lengths[r] cached positions.

    q: [R, Hq, Sq, D]; k_cache, v_cache: [C, Hkv, T, D], the queries' own keys already written,
    C = R unless beam_index or block_table says where to read; one float dtype. lengths: [R] int,
    positions in use. beam_index: [R, T'] int32, T' <= T, the cache row that holds position t of
    row r. block_table: [R, N] int32 into caches of pages [pages, Hkv, P, D]; not together with
    beam_index. Every entry of either must name a row or page that exists, past lengths[r] too (0
    will do). scale: 1 / sqrt(D) when None. alibi_slopes: [Hq], each score loses slope times
    distance. window: (left, right), how far back a query sees; None = unbounded; nothing lies to
    the right. bias: broadcastable to [R, Hq, Sq, T'], added, with gradient.
    Returns [R, Hq, Sq, D]; a row of length 0 gives 0. What lies at or past lengths[r] never leaks
    into the result. Raises ArgumentError. Source: Vaswani et al. 2017; beam indirection as in
    FasterTransformer's decoder; ALiBi: Press et al. 2022; paging: Kwon et al. 2023.
    """
    op = "decode_attention"
    for name, tensor in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache)):
        is_float_tensor(op, name, tensor, min_dims=4)
        if tensor.dim() != 4:
            raise fail(op, name, f"{tensor.dim()}-dimensional", "pass 4 dims")
        matches(op, name, tensor, "q", q)
    (r, hq, _, d), (c, hkv, t, _) = q.shape, k_cache.shape
    has_shape(op, "k_cache", k_cache, (c, hkv, t, d), "rows, its heads, positions, head dim of q")
    has_shape(op, "v_cache", v_cache, k_cache.shape, "the shape of k_cache")
    if hkv == 0 or hq % hkv:
        raise fail(op, "k_cache", f"of {hkv} heads", f"q has {hq}: it must be a multiple of them")
    if beam_index is not None and block_table is not None:
        raise fail(op, "block_table", "given with beam_index", "pass one of the two")
    capacity = t
    if beam_index is not None:
        _check_table("beam_index", beam_index, q, "[rows, positions]")
        capacity = beam_index.shape[1]
        if capacity > t:
            raise fail(op, "beam_index", f"{capacity} wide", f"the cache holds {t} positions")
    elif block_table is not None:
        _check_table("block_table", block_table, q, "[rows, pages per row]")
        capacity = block_table.shape[1] * t
    elif c != r:
        raise fail(op, "k_cache", f"of {c} rows", f"q has {r}; pass beam_index to read other rows")
    _check_lengths(lengths, q)
    if scale is not None:
        is_number(op, "scale", scale)
    check_slopes(op, alibi_slopes, q)
    left, _ = bounds(op, window)
    if bias is not None:
        check_bias(op, bias, q, capacity, "[R, Hq, Sq, T]")
    dtype = autocast_dtype(q.device)
    if dtype is not None and q.dtype != torch.float64:
        q, k_cache, v_cache = q.to(dtype), k_cache.to(dtype), v_cache.to(dtype)
    scale = d**-0.5 if scale is None and d else float(scale or 0.0)
    return OP(
        q, k_cache, v_cache, lengths, beam_index, block_table, scale, alibi_slopes, left, bias
    )


def _check_lengths(lengths: Tensor, q: Tensor) -> None:
    op = "decode_attention"
    is_index_tensor(op, "lengths", lengths)
    same_device(op, "lengths", lengths, "q", q)
    has_shape(op, "lengths", lengths, (q.shape[0],), "[rows of q]")
