"""Attention as its formula in plain torch, whole or a block of queries at a time; any device.

    S = scale q k^T;  S = softcap tanh(S / softcap);  S = S + bias + mask - slope_h |j - i'|
    P = softmax(S), 0 where hidden;  out = (P M / (1 - p)) v, M = dropout's kept elements

with i' = i + Sk - Sq the key position of query i. Memory: out, lse and a block of BLOCK_ROWS rows
of scores. A block reads only the keys that causality, window and key_lengths leave to its rows.

Shapes as in attention.py; besides, a block of scores is [B, Hq, rows, keys].
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import dropout
from .op import accumulator

BLOCK_ROWS = 128  # rows of scores that are held at a time
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


def part(term: Tensor, rows: slice, keys: slice, batch: slice = slice(None)) -> Tensor:
    """A region of a term that broadcasts to [B, Hq, Sq, Sk]."""
    at = (batch, slice(None), rows, keys)
    return term[tuple(s if n > 1 else slice(None) for s, n in zip(at, term.shape, strict=True))]


def _by_key_head(x: Tensor, hkv: int) -> Tensor:
    """[B, Hq, n, w] as [B, Hkv, G n, w]: the queries that read one key head, in one matrix."""
    return x.unflatten(1, (hkv, -1)).flatten(2, 3)


def _products(q: Tensor, k: Tensor, how: Scoring, rows: slice, keys: slice) -> Tensor:
    """scale q k^T, capped."""
    grouped = _by_key_head(q[:, :, rows].to(k.dtype) * how.scale, k.shape[1])
    scores = grouped @ k[:, :, keys].mT
    scores = scores.view(*q.shape[:2], rows.stop - rows.start, keys.stop - keys.start)
    if how.softcap:
        scores = scores.div_(how.softcap).tanh_().mul_(how.softcap)
    return scores


def _hide(scores: Tensor, how: Scoring, rows: slice, keys: slice, shift: int) -> Tensor:
    """Add bias, float mask and ALiBi to scores, and -inf where a key is hidden, in place."""
    for term in (how.bias, how.mask):
        if term is not None and term.dtype == torch.bool:
            scores.masked_fill_(~part(term, rows, keys), -torch.inf)
        elif term is not None:
            scores += part(term, rows, keys)
    key_at = torch.arange(keys.start, keys.stop, device=scores.device)
    query_at = torch.arange(rows.start, rows.stop, device=scores.device)[:, None] + shift
    if how.alibi_slopes is not None:
        slopes = how.alibi_slopes.to(scores.dtype)[:, None, None]
        scores -= slopes * (key_at - query_at).abs()
    if how.left >= 0:
        scores.masked_fill_(key_at < query_at - how.left, -torch.inf)
    if how.right >= 0:
        scores.masked_fill_(key_at > query_at + how.right, -torch.inf)
    if how.key_lengths is not None:
        past = key_at >= how.key_lengths[:, None]
        scores.masked_fill_(past[:, None, None], -torch.inf)
    return scores


def _kept(how: Scoring, p: Tensor, rows: slice, keys: slice, sq: int) -> Tensor:
    """Dropout's bool mask for a block p of probabilities."""
    assert how.seed is not None
    heads = torch.arange(p.shape[0] * p.shape[1], device=p.device).view(*p.shape[:2], 1, 1)
    row = heads * sq + torch.arange(rows.start, rows.stop, device=p.device)[:, None]
    column = torch.arange(keys.start, keys.stop, device=p.device)
    return dropout.kept(how.seed, row, column, how.dropout_p)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, how: Scoring, rows: slice, keys: slice
) -> tuple[Tensor, Tensor]:
    """(out, lse) of the query rows `rows`, in the accumulator's dtype, which k and v have."""
    if keys.start == keys.stop:
        shape = (*q.shape[:2], rows.stop - rows.start)
        return v.new_zeros(*shape, v.shape[3]), v.new_full(shape, -torch.inf)
    sq, sk = q.shape[2], k.shape[2]
    scores = _hide(_products(q, k, how, rows, keys), how, rows, keys, sk - sq)
    peak = scores.amax(-1)
    # Not exp(scores - lse): float32 rounds an lse of 1e4 to 1e-3, and P with it.
    p = torch.softmax(scores, -1)
    lse = peak - torch.log(p.amax(-1))  # at the peak P is 1 / sum(exp(scores - peak))
    if how.dropout_p:
        p *= _kept(how, p, rows, keys, sq)
    out = (_by_key_head(p, k.shape[1]) @ v[:, :, keys]).view(*p.shape[:3], v.shape[3])
    if how.dropout_p:
        out *= dropout.scale(how.dropout_p)
    dead = peak == -torch.inf
    return out.masked_fill_(dead[..., None], 0), lse.masked_fill_(dead, -torch.inf)


def _wide(k: Tensor, v: Tensor, how: Scoring) -> tuple[Tensor, Tensor]:
    """k and v with their padding zeroed, in the accumulator's dtype."""
    k, v = zero_padding(k, how.key_lengths), zero_padding(v, how.key_lengths)
    return k.to(accumulator(k.dtype)), v.to(accumulator(v.dtype))


def reference(q: Tensor, k: Tensor, v: Tensor, *scoring: Any) -> tuple[Tensor, Tensor]:
    """The definition with the whole score matrix in memory."""
    (sq, sk), how = (q.shape[2], k.shape[2]), Scoring(*scoring)
    k, v = _wide(k, v, how)
    out = empty_output(q, v.shape[3])
    block, lse = _attend(q, k, v, how.settled(sq, sk), slice(0, sq), slice(0, sk))
    out.copy_(block)
    return out, lse


def _blocks(how: Scoring, sq: int, sk: int) -> Iterator[tuple[slice, slice]]:
    """Blocks of query rows, each with the keys that it may see."""
    longest = sk
    if how.key_lengths is not None and how.key_lengths.is_cpu and how.key_lengths.numel():
        longest = min(max(int(how.key_lengths.max()), 0), sk)
    for start in range(0, sq, BLOCK_ROWS):
        rows = slice(start, min(start + BLOCK_ROWS, sq))
        keys = how.span(rows, sq, sk)
        yield rows, slice(min(keys.start, longest), min(keys.stop, longest))


def blocked(q: Tensor, k: Tensor, v: Tensor, *scoring: Any) -> tuple[Tensor, Tensor]:
    """The definition, BLOCK_ROWS rows of scores at a time: memory linear in length."""
    sq, sk = q.shape[2], k.shape[2]
    how = Scoring(*scoring).settled(sq, sk)
    k, v = _wide(k, v, how)
    out = empty_output(q, v.shape[3])
    lse = v.new_empty(q.shape[:3])
    for rows, keys in _blocks(how, sq, sk):
        out[:, :, rows], lse[:, :, rows] = _attend(q, k, v, how, rows, keys)
    return out, lse


def blocked_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *rest: Any
) -> tuple[Tensor | None, ...]:
    """rest: Scoring's fields, then needs, which of dq, dk, dv, dbias to find. Per block of rows

    dv = (P M')^T g, dP = M' g v^T, dS = P (dP - rowsum(P dP)), M' = M / (1 - p); dbias = dS;
    dT = scale dS (1 - (S / softcap)^2) with S before bias and masks; dq = dT k, dk = dT^T q.
    """
    *scoring, needs = rest
    sq, sk, hkv = q.shape[2], k.shape[2], k.shape[1]
    how = Scoring(*scoring).settled(sq, sk)
    k0, v0 = _wide(k, v, how)
    dq = torch.zeros_like(q)
    dk, dv = torch.zeros_like(k0), torch.zeros_like(v0)
    dbias = None if how.bias is None else how.bias.new_zeros(how.bias.shape, dtype=k0.dtype)
    for rows, keys in _blocks(how, sq, sk):
        if keys.start == keys.stop:
            continue
        scores = _products(q, k0, how, rows, keys)
        slope = 1 - (scores / how.softcap).square_() if how.softcap else None
        p = torch.softmax(_hide(scores, how, rows, keys, sk - sq), -1)
        p.masked_fill_((lse[:, :, rows] < NO_GRADIENT)[..., None], 0)
        g = _by_key_head(grad[:, :, rows].to(k0.dtype), hkv)
        ds = (g @ v0[:, :, keys].mT).view(p.shape)
        dropped = p
        if how.dropout_p:
            kept = _kept(how, p, rows, keys, sq) * dropout.scale(how.dropout_p)
            ds *= kept
            dropped = p * kept
        if needs[2]:
            dv[:, :, keys] += _by_key_head(dropped, hkv).mT @ g
        ds -= (p * ds).sum(-1, keepdim=True)  # not from out and grad: exact where one key takes all
        ds *= p
        if dbias is not None and needs[3]:
            region = part(dbias, rows, keys)
            region += ds.sum_to_size(region.shape)
        if slope is not None:
            ds *= slope
        ds = _by_key_head(ds, hkv)
        if needs[0]:
            dq[:, :, rows] = ((ds @ k0[:, :, keys]) * how.scale).view(dq[:, :, rows].shape)
        if needs[1]:
            dk[:, :, keys] += ds.mT @ _by_key_head(q[:, :, rows].to(k0.dtype) * how.scale, hkv)
    if how.bias is not None and dbias is not None:
        dbias = dbias.to(how.bias.dtype)
    return dq, dk.to(k.dtype), dv.to(v.dtype), dbias
