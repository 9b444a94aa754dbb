"""Attention as its formula in plain torch, whole or a block of queries at a time; any device.

    S = scale q k^T;  S = softcap tanh(S / softcap);  S = S + bias + mask - slope_h |j - i'|
    P = softmax(S), 0 where hidden;  out = (P M / (1 - p)) v, M = dropout's kept elements

with i' = i + Sk - Sq the key position of query i. Memory: out, lse and one block of scores: at most
BLOCK_ROWS rows, on a CPU of as few heads as fill its cache. A block reads only the keys that
causality, window and key_lengths leave to its rows. Products and softmax are of float32 (float64).

Shapes as in attention.py; below, [b, h, rows, keys] are the sizes of a block of scores.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import dropout
from .op import accumulator

BLOCK_ROWS = 128  # rows of scores that are held at a time
CPU_BLOCK = 2**20  # bytes of scores (measured: all heads at once take 1.2 times as long)
# Rows with a smaller lse have no gradient: they have no key (-inf), or every key carries a finite
# mask so large (finfo.min) that float32 cannot tell the lse from the mask. The same in every way.
NO_GRADIENT = -1e30


class Scoring(NamedTuple):
    """What happens between q k^T and out: the op's canonical arguments after q, k and v."""

    mask: Tensor | None
    """bool (True = attend) or float (added), 4-D, broadcasting to [B, Hq, Sq, Sk]"""
    bias: Tensor | None
    """float, added, with gradient; 4-D, broadcasting likewise"""
    key_lengths: Tensor | None
    """[B] int"""
    alibi_slopes: Tensor | None
    """[Hq]"""
    seed: Tensor | None
    """of dropout: int64 [1]"""
    causal: bool
    left: int
    """how many keys behind its own position a query sees; -1 = all"""
    right: int
    """how many ahead; causal makes it 0"""
    softcap: float
    """0 = none"""
    scale: float
    dropout_p: float

    def settled(self, sq: int, sk: int) -> "Scoring":
        """The same with causality expressed as right, and bounds that hide no key left out."""
        if not self.causal and self.left < 0 and self.right < 0:
            return self
        right = 0 if self.causal else self.right
        return self._replace(
            causal=False,
            left=self.left if 0 <= self.left < sk - 1 else -1,
            right=right if 0 <= right < sq - 1 else -1,
        )

    def span(self, rows: slice, sq: int, sk: int) -> slice:
        """The keys that causality and window leave to some query of `rows`."""
        shift = sk - sq
        first = 0 if self.left < 0 else min(max(rows.start + shift - self.left, 0), sk)
        last = sk if self.right < 0 else min(rows.stop + shift + self.right, sk)
        return slice(first, max(first, last))


class Block(NamedTuple):
    """A region of the scores."""

    batch: slice
    heads: slice
    """of q"""
    key_heads: slice
    rows: slice
    keys: slice

    @property
    def queries(self) -> tuple[slice, slice, slice]:
        """Where its queries lie in q, out and lse."""
        return self.batch, self.heads, self.rows

    @property
    def context(self) -> tuple[slice, slice, slice]:
        """Where its keys lie in k and v."""
        return self.batch, self.key_heads, self.keys

    def of(self, term: Tensor) -> Tensor:
        """The same region of a term that broadcasts to [B, Hq, Sq, Sk]."""
        at = (self.batch, self.heads, self.rows, self.keys)
        return term[tuple(s if n > 1 else slice(None) for s, n in zip(at, term.shape, strict=True))]


def empty_output(q: Tensor, head_dim: int) -> Tensor:
    """[B, Hq, Sq, head_dim] that merges its heads without a copy."""
    b, hq, sq, _ = q.shape
    return q.new_empty(b, sq, hq, head_dim).transpose(1, 2)


def zero_padding(keys: Tensor, key_lengths: Tensor | None) -> Tensor:
    """k or v with the positions past key_lengths zeroed, so that NaN there cannot leak."""
    if key_lengths is None:
        return keys
    past = torch.arange(keys.shape[2], device=keys.device) >= key_lengths[:, None]
    return keys.masked_fill(past[:, None, :, None], 0)


def _by_key_head(x: Tensor, key_heads: int) -> Tensor:
    """[b, h, n, w] as [b, key heads, G n, w]: the queries that read one key head, in one matrix."""
    return x.unflatten(1, (key_heads, -1)).flatten(2, 3)


def _products(q: Tensor, k: Tensor, how: Scoring) -> Tensor:
    """scale q k^T, capped, of a block's queries and keys."""
    scores = _by_key_head(q * how.scale, k.shape[1]) @ k.mT
    if how.softcap:
        scores = scores.div_(how.softcap).tanh_().mul_(how.softcap)
    return scores.view(*q.shape[:3], k.shape[2])


def _hide(scores: Tensor, how: Scoring, at: Block, shift: int) -> Tensor:
    """Add bias, float mask and ALiBi to scores, and -inf where a key is hidden, in place."""
    for term in (how.bias, how.mask):
        if term is not None and term.dtype == torch.bool:
            scores.masked_fill_(~at.of(term), -torch.inf)
        elif term is not None:
            scores += at.of(term)
    key_at = torch.arange(at.keys.start, at.keys.stop, device=scores.device)
    query_at = torch.arange(at.rows.start, at.rows.stop, device=scores.device)[:, None] + shift
    if how.alibi_slopes is not None:
        slopes = how.alibi_slopes[at.heads].to(scores.dtype)[:, None, None]
        scores -= slopes * (key_at - query_at).abs().to(scores.dtype)
    if how.left >= 0:
        scores.masked_fill_(key_at < query_at - how.left, -torch.inf)
    if how.right >= 0:
        scores.masked_fill_(key_at > query_at + how.right, -torch.inf)
    if how.key_lengths is not None:
        past = key_at >= how.key_lengths[at.batch, None]
        scores.masked_fill_(past[:, None, None], -torch.inf)
    return scores


def _kept(how: Scoring, at: Block, q: Tensor) -> Tensor:
    """Dropout's bool mask for a block: [b, h, rows, keys]."""
    assert how.seed is not None
    (_, hq, sq, _), device = q.shape, q.device
    batch, head, row, key = (
        torch.arange(s.start, s.stop, device=device) for s in (at.batch, at.heads, at.rows, at.keys)
    )
    rows = ((batch[:, None] * hq + head)[..., None] * sq + row)[..., None]
    return dropout.kept(how.seed, rows, key, how.dropout_p)


def _attend(q: Tensor, k: Tensor, v: Tensor, how: Scoring, at: Block) -> tuple[Tensor, Tensor]:
    """(out in the dtype of k and v, lse) of a block."""
    rows, keys = q[at.queries].to(k.dtype), k[at.context]
    if keys.shape[2] == 0:
        lse = rows.new_full(rows.shape[:3], -torch.inf, dtype=accumulator(q.dtype))
        return rows.new_zeros(*lse.shape, v.shape[3]), lse
    scores, shift = _products(rows, keys, how), k.shape[2] - q.shape[2]
    peak = _hide(scores, how, at, shift).amax(-1)
    # Not exp(scores - lse): float32 rounds an lse of 1e4 to 1e-3, and P with it.
    p = torch.softmax(scores, -1)
    lse = peak - torch.log(p.amax(-1))  # at the peak P is 1 / sum(exp(scores - peak))
    if how.dropout_p:
        p *= _kept(how, at, q)
    out = (_by_key_head(p, keys.shape[1]) @ v[at.context]).view(*lse.shape, v.shape[3])
    if how.dropout_p:
        out *= dropout.scale(how.dropout_p)
    dead = peak == -torch.inf
    return out.masked_fill_(dead[..., None], 0), lse.masked_fill_(dead, -torch.inf)


def _operands(k: Tensor, v: Tensor, how: Scoring, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """k and v with their padding zeroed, in the dtype of the products."""
    return zero_padding(k, how.key_lengths).to(dtype), zero_padding(v, how.key_lengths).to(dtype)


def reference(q: Tensor, k: Tensor, v: Tensor, *scoring: Any) -> tuple[Tensor, Tensor]:
    """The definition with the whole score matrix in memory."""
    (b, hq, sq, _), (hkv, sk) = q.shape, k.shape[1:3]
    how = Scoring(*scoring)
    k, v = _operands(k, v, how, accumulator(q.dtype))
    out = empty_output(q, v.shape[3])
    whole = Block(slice(0, b), slice(0, hq), slice(0, hkv), slice(0, sq), slice(0, sk))
    block, lse = _attend(q, k, v, how.settled(sq, sk), whole)
    out.copy_(block)
    return out, lse


def _block_rows(q: Tensor, k: Tensor, how: Scoring) -> int:
    """How many queries a block has: on a CPU, where no block skips keys, what fills a cache."""
    if not q.is_cpu or how.left >= 0 or how.right >= 0:
        return BLOCK_ROWS
    group, sk = q.shape[1] // k.shape[1], k.shape[2]
    return max(BLOCK_ROWS, CPU_BLOCK // max(group * sk * k.element_size(), 1))


def _blocks(q: Tensor, k: Tensor, how: Scoring) -> Iterator[Block]:
    """The scores in blocks, each with the keys that its rows may see."""
    (b, hq, sq, _), (hkv, sk) = q.shape, k.shape[1:3]
    longest, group, size = sk, hq // hkv, _block_rows(q, k, how)
    if q.is_cpu and how.key_lengths is not None and b:
        longest = min(max(int(how.key_lengths.max()), 0), sk)
    for rows in cuts(sq, size):
        keys = how.span(rows, sq, sk)
        keys = slice(min(keys.start, longest), min(keys.stop, longest))
        room = b * hkv
        if q.is_cpu:  # in key heads
            block = group * (rows.stop - rows.start) * (keys.stop - keys.start) * k.element_size()
            room = CPU_BLOCK // max(block, 1)
        for batch in cuts(b, room // hkv):
            for heads in cuts(hkv, room):
                queries = slice(heads.start * group, heads.stop * group)
                yield Block(batch, queries, heads, rows, keys)


def cuts(length: int, size: int) -> Iterator[slice]:
    """0 to length in slices of `size`, or of 1 where that is 0."""
    for start in range(0, length, max(size, 1)):
        yield slice(start, min(start + max(size, 1), length))


def blocked(q: Tensor, k: Tensor, v: Tensor, *scoring: Any) -> tuple[Tensor, Tensor]:
    """The definition, a block of scores at a time: memory linear in length."""
    how = Scoring(*scoring).settled(q.shape[2], k.shape[2])
    k, v = _operands(k, v, how, accumulator(q.dtype))
    out = empty_output(q, v.shape[3])
    lse = v.new_empty(q.shape[:3], dtype=accumulator(q.dtype))
    for at in _blocks(q, k, how):
        out[at.queries], lse[at.queries] = _attend(q, k, v, how, at)
    return out, lse


def blocked_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *rest: Any
) -> tuple[Tensor | None, ...]:
    """rest: Scoring's fields, then needs, which of dq, dk, dv, dbias to find. In each block

    dv = (P M')^T g, dP = M' g v^T, dS = P (dP - rowsum(P dP)), M' = M / (1 - p); dbias = dS;
    dT = scale dS (1 - (S / softcap)^2) with S before bias and masks; dq = dT k, dk = dT^T q.
    """
    *scoring, needs = rest
    sq, sk = q.shape[2], k.shape[2]
    how = Scoring(*scoring).settled(sq, sk)
    k0, v0 = _operands(k, v, how, accumulator(q.dtype))
    wide = accumulator(q.dtype)
    dq, dk, dv = torch.zeros_like(q), *(torch.zeros_like(t, dtype=wide) for t in (k, v))
    dbias = None if how.bias is None else how.bias.new_zeros(how.bias.shape, dtype=wide)
    dead = lse < NO_GRADIENT
    some_dead = not q.is_cpu or bool(dead.any())  # a GPU would have to wait for the answer
    for at in _blocks(q, k0, how):
        rows, keys, values = q[at.queries].to(k0.dtype), k0[at.context], v0[at.context]
        if keys.shape[2] == 0:
            continue
        scores = _products(rows, keys, how)
        slope = 1 - (scores / how.softcap).square_() if how.softcap else None
        p = torch.softmax(_hide(scores, how, at, sk - sq), -1)
        if some_dead:
            p.masked_fill_(dead[at.queries][..., None], 0)
        g = _by_key_head(grad[at.queries].to(k0.dtype), keys.shape[1])
        ds = (g @ values.mT).view(p.shape)
        dropped = p
        if how.dropout_p:
            kept = _kept(how, at, q)
            dropped = p * kept
            g = g * dropout.scale(how.dropout_p)
            ds.mul_(kept).mul_(dropout.scale(how.dropout_p))
        if needs[2]:
            dv[at.context] += _by_key_head(dropped, keys.shape[1]).mT @ g
        # P (dP - rowsum(P dP)); not from out and grad: so it is exact where one key takes all
        ds = torch._softmax_backward_data(ds, p, -1, p.dtype)
        if some_dead:  # 0 times a hidden value that is not finite
            ds.masked_fill_(dead[at.queries][..., None], 0)
        if dbias is not None and needs[3]:
            region = at.of(dbias)
            region += ds.sum_to_size(region.shape)
        if slope is not None:
            ds *= slope
        ds = _by_key_head(ds, keys.shape[1])
        if needs[0]:
            dq[at.queries] = ((ds @ keys) * how.scale).view(rows.shape)
            if some_dead:  # likewise a hidden key
                dq[at.queries].masked_fill_(dead[at.queries][..., None], 0)
        if needs[1]:
            dk[at.context] += ds.mT @ _by_key_head(rows * how.scale, keys.shape[1])
    if how.bias is not None and dbias is not None:
        dbias = dbias.to(how.bias.dtype)
    return dq, dk.to(k.dtype), dv.to(v.dtype), dbias
