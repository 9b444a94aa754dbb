"""Attention on the CPU through the flash kernel inside torch, on pieces that it can express.

The kernel takes an additive mask of any strides (the keys' one and 0 apart), and a causal limit
that starts in the top left corner. What else depends on the position of a key relative to its query
(a window, a causal limit elsewhere, ALiBi) is one number per distance: a line of Sq + Sk - 1
numbers. With the queries in reverse order, element (i, j) of such a mask is line[i + j + constant]:
a view of the line with strides (1, 1). Where turning the queries is less work than writing the mask
the kernel reads that view. Calls that a window or causality bounds are cut in blocks of rows, each
with only the keys that it may see; so no [Sq, Sk] tensor is ever written.

Shapes as in attention.py. A term is an additive mask that broadcasts to [B, Hq, Sq, Sk].
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention_blocked import (
    NO_GRADIENT,
    Block,
    Scoring,
    blocked_backward,
    cuts,
    empty_output,
    zero_padding,
)
from .op import accumulator

BLOCK_ROWS = 128  # of queries, where a causal limit or a window bounds the keys they see
SMALLEST_SCALE = torch.finfo(torch.float32).tiny  # the kernel would round a smaller one to 0

flash_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
flash_cpu_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def lacks(q: Tensor, k: Tensor, v: Tensor, *scoring: Any) -> str | None:
    """What of a call's mathematics the kernel has not: the caller could do nothing about it."""
    *_, softcap, _, dropout_p = scoring
    if softcap:
        return "its kernel has no softcap"
    if dropout_p:
        return "its kernel has no dropout that a seed governs"
    return None


def refuses(q: Tensor, k: Tensor, v: Tensor, *scoring: Any) -> str | None:
    """Why the kernel cannot take a call."""
    if lacking := lacks(q, k, v, *scoring):
        return lacking
    how = Scoring(*scoring)
    for name, term in (("mask", how.mask), ("bias", how.bias)):
        if term is not None and term.shape[3] != k.shape[2]:
            return f"its kernel cannot read a {name} that is broadcast over keys"
    if q.shape[3] == 0 and v.shape[3]:
        return "its kernel needs a head dim"
    return None


# -- what the kernel is given --------------------------------------------------------------------


class _Operands(NamedTuple):
    """Keys and values once per query head, all of one width, and what is added to the scores."""

    k: Tensor
    v: Tensor
    terms: list[Tensor]
    line: Tensor | None  # [1 or Hq, Sq + Sk - 1]
    turned: bool  # whether the kernel gets the queries in reverse order
    causal: bool  # left to the kernel
    lengths: list[int] | None  # by which to cut the batch


def _operands(q: Tensor, k: Tensor, v: Tensor, how: Scoring) -> _Operands:
    """Short padded keys become a term: one call for the whole batch. Long ones, and those under
    masks that differ by query, are cut per batch item instead, which computes no padding at all.
    """
    sq, sk, lengths = q.shape[2], k.shape[2], None
    terms = [_additive(_stored(t), q) for t in (how.mask, how.bias) if t is not None]
    relative = sk > 0 and (how.left >= 0 or how.right >= 0 or how.alibi_slopes is not None)
    causal = how.right == 0 and how.left < 0 and sq == sk and how.alibi_slopes is None
    if how.key_lengths is not None:
        if sk >= 512 or (relative and not causal) or any(t.shape[2] > 1 for t in terms):
            lengths = [min(max(int(n), 0), sk) for n in how.key_lengths.tolist()]
        else:
            k, v = zero_padding(k, how.key_lengths), zero_padding(v, how.key_lengths)
            terms.append(_additive((torch.arange(sk) < how.key_lengths[:, None])[:, None, None], q))
    terms, line, turned = _combined(terms), None, False
    if relative and (len(terms) > 1 or not causal):
        line, causal = _line(q, sk, how), False
        turned = not terms and line.shape[0] * sk > 3 * q.shape[0] * q.shape[1] * q.shape[3]
    width, group = max(q.shape[3], v.shape[3]), q.shape[1] // k.shape[1]
    k, v = (_per_query_head(_widened(t, width), group) for t in (k, v))
    return _Operands(k, v, terms, line, turned, causal, lengths)


def _plain(q: Tensor, k: Tensor, v: Tensor, how: Scoring) -> bool:
    """Whether the kernel takes a call as it is: a small one should not be looked at longer."""
    return (
        how.mask is how.bias is how.key_lengths is how.alibi_slopes is None
        and how.left < 0
        and how.right < 0
        and q.shape[:2] == k.shape[:2]
        and q.shape[3] == v.shape[3]
        and (not how.causal or q.shape[2] == k.shape[2])
        and q.numel() > 0
        and k.numel() > 0
        and q.stride(3) == k.stride(3) == v.stride(3) == 1
    )


def _stored(term: Tensor) -> Tensor:
    """The term as it was before it was expanded: stride-0 dims but the keys become length 1."""
    for dim in range(3):
        if term.stride(dim) == 0 and term.shape[dim] > 1:
            term = term.narrow(dim, 0, 1)
    return term


def _additive(term: Tensor, q: Tensor) -> Tensor:
    if term.dtype == q.dtype:
        return term
    dtype = accumulator(q.dtype)
    if term.dtype != torch.bool:
        return term.to(dtype)
    return torch.zeros(term.shape, dtype=dtype).masked_fill_(~term, -torch.inf)


def _combined(terms: list[Tensor]) -> list[Tensor]:
    """One term in place of several where their sum is no larger than the largest of them."""
    if len(terms) < 2:
        return terms
    shape = torch.broadcast_shapes(*(t.shape for t in terms))
    small = shape.numel() <= max(t.numel() for t in terms)
    return [sum(terms[1:], terms[0])] if small else terms


def _line(q: Tensor, sk: int, how: Scoring) -> Tensor:
    """What is added to a score for the key's distance from its query, 1 - Sk to Sq - 1."""
    distance = torch.arange(1 - sk, q.shape[2], dtype=accumulator(q.dtype))
    line = torch.zeros_like(distance)[None]
    if how.alibi_slopes is not None:
        line = -how.alibi_slopes.to(line.dtype)[:, None] * distance.abs()
    if how.left >= 0:
        line.masked_fill_(distance < -how.left, -torch.inf)
    if how.right >= 0:
        line.masked_fill_(distance > how.right, -torch.inf)
    return line


def _widened(x: Tensor, width: int) -> Tensor:
    """x padded with zeros to a head dim of `width`, and its last dim's stride 1."""
    if x.shape[3] < width:
        return F.pad(x, (0, width - x.shape[3]))
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _per_query_head(keys: Tensor, group: int) -> Tensor:
    """k or v once for each query head: the kernel pairs heads."""
    return keys if group == 1 else keys.repeat_interleave(group, 1)


def _per_key_head(gradient: Tensor, heads: int) -> Tensor:
    """Gradients of repeated keys added up, in float32 or wider."""
    if gradient.shape[1] == heads:
        return gradient
    wide = gradient.to(accumulator(gradient.dtype)).unflatten(1, (heads, -1))
    return wide.sum(2).to(gradient.dtype)


# -- pieces --------------------------------------------------------------------------------------


def _whole(q: Tensor, k: Tensor) -> Block:
    b, heads, sq, _ = q.shape
    every = slice(0, heads)
    return Block(slice(0, b), every, every, slice(0, sq), slice(0, k.shape[2]))


def _pieces(q: Tensor, given: _Operands, how: Scoring) -> list[Block]:
    """Calls of the kernel; no row is in two of them."""
    whole, sq, sk = _whole(q, given.k), q.shape[2], given.k.shape[2]
    bounded = given.line is not None and (how.left >= 0 or how.right >= 0)
    summed = len(given.terms) + (given.line is not None) > 1
    size = BLOCK_ROWS if bounded or summed else sq
    if q.numel() == 0 or sk == 0:
        return []
    if given.lengths is None and size == sq and not bounded:
        return [whole]
    pieces = []
    for batch, length in [(whole.batch, sk)] if given.lengths is None else runs(given.lengths):
        for rows in cuts(sq, size):
            keys = whole.keys if given.causal else how.span(rows, sq, sk)
            if keys.start < min(keys.stop, length):
                keys = slice(keys.start, min(keys.stop, length))
                pieces.append(whole._replace(batch=batch, rows=rows, keys=keys))
    return pieces


def runs(lengths: list[int]) -> list[tuple[slice, int]]:
    """Consecutive batch items of equal length, as (items, length)."""
    runs: list[tuple[slice, int]] = []
    for i, length in enumerate(lengths):
        if runs and runs[-1][1] == length:
            runs[-1] = (slice(runs[-1][0].start, i + 1), length)
        else:
            runs.append((slice(i, i + 1), length))
    return runs


def _mask(given: _Operands, piece: Block, sq: int) -> Tensor | None:
    """The additive mask of a piece."""
    terms = [piece.of(term) for term in given.terms]
    if given.line is not None:
        rows, keys = piece.rows.stop - piece.rows.start, piece.keys.stop - piece.keys.start
        heads, length = given.line.shape
        first = sq - piece.rows.stop + piece.keys.start
        turned = given.line.as_strided((1, heads, rows, keys), (0, length, 1, 1), first)
        terms.append(turned if given.turned else turned.flip(2))
    return sum(terms[1:], terms[0]) if terms else None


def _dead(mask: Tensor, rows: int, causal: bool) -> Tensor:
    """Rows without a key, broadcastable to [B, Hq, rows]."""
    if not causal:
        return mask.amax(-1) == -torch.inf
    attended = mask > -torch.inf
    first = attended.to(torch.uint8).argmax(-1)  # the first attended key, if there is one
    return ~attended.any(-1) | (first > torch.arange(rows))


# -- forward and backward ------------------------------------------------------------------------


def forward(q: Tensor, k: Tensor, v: Tensor, *scoring: Any) -> tuple[Tensor, Tensor]:
    """(out, lse) of canonical arguments."""
    how = Scoring(*scoring)
    if how.scale < SMALLEST_SCALE:
        factor, how = _scaled_before(how)
        return forward(q * factor, k, v, *how)
    if _plain(q, k, v, how):
        out, lse = flash_cpu(q, k, v, 0.0, how.causal, scale=how.scale)
        return out, lse
    sq, sk, head_dim = q.shape[2], k.shape[2], v.shape[3]
    how = how.settled(sq, sk)
    given = _operands(q, k, v, how)
    q = _widened(q, given.k.shape[3])
    pieces = _pieces(q, given, how)
    if _one_call(pieces, q, given):
        out, lse = _flash(q, given.k, given.v, given, _mask(given, pieces[0], sq), how.scale)
        return out[..., :head_dim] if out.shape[3] > head_dim else out, lse
    out = empty_output(q, head_dim).zero_()
    lse = q.new_full(q.shape[:3], -torch.inf, dtype=accumulator(q.dtype))
    for piece in pieces:
        at, keys = piece.queries, piece.context
        mask = _mask(given, piece, sq)
        found = _flash(_turned(q[at], given), given.k[keys], given.v[keys], given, mask, how.scale)
        share, lse[at] = (_turned(t, given) for t in found)
        out[at] = share[..., :head_dim]
    return out, lse


def _scaled_before(how: Scoring) -> tuple[float, Scoring]:
    """What to multiply q by, and the rest with a larger scale. The kernel's running maximum assumes
    that scaling keeps the order of scores, and 0 times the -inf of a key that it hides is NaN.
    """
    if how.scale < 0:
        return -1.0, how._replace(scale=-how.scale)
    return how.scale, how._replace(scale=1.0)


def _one_call(pieces: list[Block], q: Tensor, given: _Operands) -> bool:
    return len(pieces) == 1 and not given.turned and pieces[0] == _whole(q, given.k)


def _turned(x: Tensor, given: _Operands) -> Tensor:
    return x.flip(2) if given.turned else x


def _flash(
    q: Tensor, k: Tensor, v: Tensor, given: _Operands, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """One call of the kernel. It writes lse 0 for rows with no key; ours is -inf."""
    out, lse = flash_cpu(q, k, v, 0.0, given.causal, attn_mask=mask, scale=scale)
    if mask is not None and not (lse.abs() > 0).all():  # reading the mask costs more
        dead = _dead(mask, q.shape[2], given.causal)
        lse = lse.masked_fill(dead, -torch.inf)
        out = out.masked_fill(dead[..., None], 0)  # NaN where a value that it hides is
    return out, lse


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *rest: Any
) -> tuple[Tensor | None, ...]:
    """rest: Scoring's fields, then needs. The kernel finds no dbias: the blocked way then finds all
    gradients in one pass (measured 0.75 to 0.85 of the kernel's three and a pass for dbias alone).
    """
    *scoring, needs = rest
    if needs[3]:
        return blocked_backward(grad, q, k, v, out, lse, *rest)
    return *_backward_qkv(grad, q, k, v, out, lse, Scoring(*scoring)), None


def _backward_qkv(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, how: Scoring
) -> tuple[Tensor, Tensor, Tensor]:
    """With the whole row's out and lse each piece gives its exact share of the gradients."""
    if how.scale < SMALLEST_SCALE:
        factor, how = _scaled_before(how)
        dq, dk, dv = _backward_qkv(grad, q * factor, k, v, out, lse, how)
        return dq * factor, dk, dv
    if _plain(q, k, v, how):
        grad = grad if grad.stride(3) == 1 and 0 not in grad.stride() else grad.contiguous()
        plain: tuple[Tensor, Tensor, Tensor] = flash_cpu_backward(
            grad, q, k, v, out, lse, 0.0, how.causal, scale=how.scale
        )
        return plain
    (sq, d), (hkv, sk, head_dim) = q.shape[2:], v.shape[1:]
    how = how.settled(sq, sk)
    given = _operands(q, k, v, how)
    width = given.k.shape[3]
    grad = grad.contiguous() if 0 in grad.stride() else grad
    q, out, grad = (_widened(t, width) for t in (q, out, grad))
    dead = None
    if given.terms or given.line is not None or given.lengths is not None:  # there may be dead rows
        dead = lse < NO_GRADIENT
        lse = lse.masked_fill(dead, torch.inf)  # exp(score - inf) = 0
    pieces = _pieces(q, given, how)
    if _one_call(pieces, q, given):
        mask = _mask(given, pieces[0], sq)
        dq, dk, dv = flash_cpu_backward(
            grad, q, given.k, given.v, out, lse, 0.0, given.causal, attn_mask=mask, scale=how.scale
        )
    else:
        dq, dk, dv = (t.new_zeros(t.shape, dtype=lse.dtype) for t in (q, given.k, given.v))
        for piece in pieces:
            at, keys = piece.queries, piece.context
            g, q_at, out_at, lse_at = (_turned(t[at], given) for t in (grad, q, out, lse))
            share, dk_share, dv_share = flash_cpu_backward(
                g, q_at, given.k[keys], given.v[keys], out_at, lse_at.contiguous(), 0.0,
                given.causal, attn_mask=_mask(given, piece, sq), scale=how.scale,
            )  # fmt: skip
            dq[at] = _turned(share, given)
            dk[keys] += dk_share
            dv[keys] += dv_share
    if dead is not None:  # NaN where a key that it hides is not finite
        dq = dq.masked_fill_(dead[..., None], 0)
    dk, dv = (_per_key_head(t, hkv).to(k.dtype) for t in (dk[..., :d], dv[..., :head_dim]))
    return dq[..., :d].to(q.dtype), dk, dv
