"""Flash attention in Triton: softmax(scale * q k^T + mask) v, forward and backward.

Shapes, the same names throughout:
    q, dq     [B, Hq, Sq, D]        out, grad_out  [B, Hq, Sq, DV]
    k, dk     [B, Hkv, Sk, D]       lse, delta     [B, Hq, Sq] float32
    v, dv     [B, Hkv, Sk, DV]      mask           [B, Hq, Sq, Sk]
Hq is a multiple of Hkv; query head h reads key head h // (Hq / Hkv).

How it works. The forward program of a tile of BLOCK_M queries walks over tiles of BLOCK_N keys with
the online softmax of Milakov and Gimelshein (2018) arranged as in FlashAttention-2 (Dao, 2023): it
holds the running peak, the running total and the unnormalised output in float32 and never stores a
score. Everything is in units of log2, so that each exponential is one exp2 and `scale` costs one
fused multiply-add. The backward pass recomputes the probabilities from lse: one kernel walks over
keys for dq, one over queries (and the query heads that share a key head) for dk and dv. Every sum
has one owner and one order: no atomics, and the gradients are the same bits on every run.

The forward and dq kernels skip all mask arithmetic on tiles where every query attends every key;
only tiles on the causal diagonal, at the end of the keys, or under a mask tensor evaluate it. Tiles
that causality or key_lengths rules out are never visited, keys past key_lengths never read.

Cost. FLOPs: forward 2 B Hq Sq Sk (D + DV), backward 2 B Hq Sq Sk (4 D + 3 DV), of which D + DV are
the second recomputation that determinism costs; half of it under causality with Sq = Sk. Memory:
out and lse saved, one float32 per query (delta) besides in the backward pass.

Precision. float16 and bfloat16 enter the tensor cores as they are, float32 as three TF32 products
(tf32x3, close to float32). The backward pass rebuilds probabilities from a float32 lse, so at
|lse| = 1e4 they carry a relative error of 1e-3, as in every kernel that keeps lse alone.

The functions here launch kernels and nothing else: validation, autograd and the choice between
this and other implementations live in `attention.py`.
"""

# mypy: allow-untyped-defs
# (Triton kernels have no Python types)

from __future__ import annotations  # tl.constexpr below is not evaluated at import

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .configs import attention_config
from .launch import Compilation, Launch, architecture
from .lazy_triton import jit, load

tl: Any = None  # triton.language once load() has run


# ---- device functions --------------------------------------------------------------------------


@jit
def load_tile(
    ptr, rows, row_end, stride_row, stride_col,
    WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr, CHECK_ROWS: tl.constexpr,
):  # fmt: skip
    """Tile [rows, BLOCK_WIDTH]; rows from row_end on (if checked) and columns past WIDTH are 0."""
    cols = tl.arange(0, BLOCK_WIDTH)
    ptrs = ptr + rows.to(tl.int64)[:, None] * stride_row + cols.to(tl.int64)[None, :] * stride_col
    if CHECK_ROWS:
        if WIDTH == BLOCK_WIDTH:
            tile = tl.load(ptrs, mask=rows[:, None] < row_end, other=0.0)
        else:
            keep = (rows[:, None] < row_end) & (cols[None, :] < WIDTH)
            tile = tl.load(ptrs, mask=keep, other=0.0)
    else:
        if WIDTH == BLOCK_WIDTH:
            tile = tl.load(ptrs)
        else:
            tile = tl.load(ptrs, mask=cols[None, :] < WIDTH, other=0.0)
    return tile


@jit
def store_tile(ptr, tile, rows, row_end, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    """Write rows below row_end of a tile into a contiguous [row_end, WIDTH] matrix."""
    cols = tl.arange(0, BLOCK_WIDTH)
    ptrs = ptr + rows.to(tl.int64)[:, None] * WIDTH + cols[None, :]
    keep = (rows[:, None] < row_end) & (cols[None, :] < WIDTH)
    tl.store(ptrs, tile.to(ptr.dtype.element_ty), mask=keep)


@jit
def hide(
    scores, mask_ptr, queries, keys, Sq, key_end, shift, stride_mask_q, stride_mask_k,
    CAUSAL: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Scores (log2 units) plus the mask, and -inf where the query may not attend the key.

    `queries` and `keys` are index tensors that broadcast to the shape of `scores`.
    """
    keep = keys < key_end
    if CAUSAL:
        keep = keep & (keys <= queries + shift)
    if MASK != "none":
        inside = (queries < Sq) & (keys < key_end)
        ptrs = mask_ptr + queries.to(tl.int64) * stride_mask_q + keys.to(tl.int64) * stride_mask_k
        if MASK == "bool":
            keep = keep & tl.load(ptrs, mask=inside, other=0).to(tl.int1)
        else:
            added = tl.load(ptrs, mask=inside, other=0.0).to(tl.float32)
            keep = keep & (added != float("-inf"))
            # finfo.min times log2(e) would overflow to -inf and turn a finite mask into a hard one
            scores += tl.maximum(added, -2.3e38) * 1.4426950408889634
    return tl.where(keep, scores, float("-inf"))


@jit
def key_range(
    first_query, Sq, Sk, key_end, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """(plain_end, end): keys [0, plain_end) need no mask, [plain_end, end) do, later ones hide."""
    end = key_end
    plain_end = key_end
    if CAUSAL:
        end = tl.minimum(key_end, tl.maximum(first_query + BLOCK_M + Sk - Sq, 0))
        plain_end = tl.minimum(key_end, tl.maximum(first_query + Sk - Sq + 1, 0))
    plain_end = plain_end // BLOCK_N * BLOCK_N
    if MASK != "none":
        plain_end = 0
    return plain_end, end


@jit
def count_keys(lengths_ptr, batch, stride_lengths, Sk):
    """Number of keys that exist for this batch item."""
    key_end = Sk
    if lengths_ptr is not None:
        length = tl.load(lengths_ptr + batch * stride_lengths)
        key_end = tl.minimum(tl.maximum(length, 0), Sk).to(tl.int32)
    return key_end


# ---- forward -----------------------------------------------------------------------------------


@jit
def attend(
    acc, total, peak, q, k_ptr, v_ptr, mask_ptr, queries, first, last, Sq, key_end, shift,
    scale_log2, stride_kn, stride_kd, stride_vn, stride_vd, stride_mask_q, stride_mask_k,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, MASK: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Add keys [first, last) to the running softmax of a query tile; EDGE: some may be hidden."""
    for start in range(first, last, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        k = load_tile(k_ptr, keys, key_end, stride_kn, stride_kd, D, BLOCK_D, EDGE)
        scores = tl.dot(q, tl.trans(k), input_precision="tf32x3")
        if EDGE:
            scores = hide(
                scores * scale_log2, mask_ptr, queries[:, None], keys[None, :], Sq, key_end, shift,
                stride_mask_q, stride_mask_k, CAUSAL, MASK,
            )  # fmt: skip
            new_peak = tl.maximum(peak, tl.max(scores, 1))
            # a row that has met no key yet has peak -inf, and -inf - -inf would be NaN
            origin = tl.where(new_peak == float("-inf"), 0.0, new_peak)
            p = tl.exp2(scores - origin[:, None])
        else:
            new_peak = tl.maximum(peak, tl.max(scores, 1) * scale_log2)
            origin = new_peak
            p = tl.exp2(scores * scale_log2 - origin[:, None])
        fade = tl.exp2(peak - origin)
        total = total * fade + tl.sum(p, 1)
        v = load_tile(v_ptr, keys, key_end, stride_vn, stride_vd, DV, BLOCK_DV, EDGE)
        acc = acc * fade[:, None]
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision="tf32x3")
        peak = new_peak
    return acc, total, peak


@jit
def forward_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, lengths_ptr, out_ptr, lse_ptr, scale_log2, Hq, group, Sq, Sk,
    stride_qb, stride_qh, stride_qm, stride_qd, stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd,
    stride_mask_b, stride_mask_h, stride_mask_q, stride_mask_k, stride_lengths,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M queries of one head. Grid: query blocks (fastest) x Hq x B."""
    blocks = tl.cdiv(Sq, BLOCK_M)
    block = tl.program_id(0) % blocks
    if CAUSAL:
        block = blocks - 1 - block  # the longest rows first, so that no long one starts last
    head = (tl.program_id(0) // blocks % Hq).to(tl.int64)
    batch = (tl.program_id(0) // blocks // Hq).to(tl.int64)
    queries = block * BLOCK_M + tl.arange(0, BLOCK_M)
    q_ptr += batch * stride_qb + head * stride_qh
    k_ptr += batch * stride_kb + head // group * stride_kh
    v_ptr += batch * stride_vb + head // group * stride_vh
    if MASK != "none":
        mask_ptr += batch * stride_mask_b + head * stride_mask_h

    key_end = count_keys(lengths_ptr, batch, stride_lengths, Sk)
    plain_end, end = key_range(block * BLOCK_M, Sq, Sk, key_end, BLOCK_M, BLOCK_N, CAUSAL, MASK)
    shift = Sk - Sq
    q = load_tile(q_ptr, queries, Sq, stride_qm, stride_qd, D, BLOCK_D, True)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    if MASK == "none":
        acc, total, peak = attend(
            acc, total, peak, q, k_ptr, v_ptr, mask_ptr, queries, 0, plain_end, Sq, key_end, shift,
            scale_log2, stride_kn, stride_kd, stride_vn, stride_vd, stride_mask_q, stride_mask_k,
            D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, CAUSAL, MASK, False,
        )  # fmt: skip
    acc, total, peak = attend(
        acc, total, peak, q, k_ptr, v_ptr, mask_ptr, queries, plain_end, end, Sq, key_end, shift,
        scale_log2, stride_kn, stride_kd, stride_vn, stride_vd, stride_mask_q, stride_mask_k,
        D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, CAUSAL, MASK, True,
    )  # fmt: skip

    row = (batch * Hq + head) * Sq
    safe = tl.where(total == 0.0, 1.0, total)  # no key at all: out 0, lse -inf
    store_tile(out_ptr + row * DV, acc / safe[:, None], queries, Sq, DV, BLOCK_DV)
    lse = (peak + tl.log2(safe)) * 0.6931471805599453
    tl.store(lse_ptr + row + queries, lse, mask=queries < Sq)


# ---- backward ----------------------------------------------------------------------------------


@jit
def log2_lse(lse):
    """lse in log2 units, +inf for rows without gradient, so that their probabilities come out 0.

    Those rows are the ones with no key at all (-inf) and the ones whose every key carries a finite
    mask so large (finfo.min) that float32 cannot tell lse from the mask.
    """
    return tl.where(lse < -1e30, float("inf"), lse * 1.4426950408889634)


@jit
def gather_dq(
    dq, q, grad, lse, delta, k_ptr, v_ptr, mask_ptr, queries, first, last, Sq, key_end, shift,
    scale_log2, stride_kn, stride_kd, stride_vn, stride_vd, stride_mask_q, stride_mask_k,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, MASK: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Add the part of dq (short of the factor scale) that comes through keys [first, last)."""
    for start in range(first, last, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        k = load_tile(k_ptr, keys, key_end, stride_kn, stride_kd, D, BLOCK_D, EDGE)
        scores = tl.dot(q, tl.trans(k), input_precision="tf32x3") * scale_log2
        if EDGE:
            scores = hide(
                scores, mask_ptr, queries[:, None], keys[None, :], Sq, key_end, shift,
                stride_mask_q, stride_mask_k, CAUSAL, MASK,
            )  # fmt: skip
        p = tl.exp2(scores - lse[:, None])
        v = load_tile(v_ptr, keys, key_end, stride_vn, stride_vd, DV, BLOCK_DV, EDGE)
        dp = tl.dot(grad, tl.trans(v), input_precision="tf32x3")
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="tf32x3")
    return dq


@jit
def backward_dq_kernel(
    grad_ptr, q_ptr, k_ptr, v_ptr, mask_ptr, lengths_ptr, out_ptr, lse_ptr, delta_ptr, dq_ptr,
    scale, scale_log2, Hq, group, Sq, Sk,
    stride_gb, stride_gh, stride_gm, stride_gd, stride_qb, stride_qh, stride_qm, stride_qd,
    stride_kb, stride_kh, stride_kn, stride_kd, stride_vb, stride_vh, stride_vn, stride_vd,
    stride_mask_b, stride_mask_h, stride_mask_q, stride_mask_k, stride_lengths,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """dq, and delta = rowsum(out * grad_out) for the dk, dv kernel. Grid as in forward_kernel."""
    blocks = tl.cdiv(Sq, BLOCK_M)
    block = tl.program_id(0) % blocks
    if CAUSAL:
        block = blocks - 1 - block
    head = (tl.program_id(0) // blocks % Hq).to(tl.int64)
    batch = (tl.program_id(0) // blocks // Hq).to(tl.int64)
    queries = block * BLOCK_M + tl.arange(0, BLOCK_M)
    row = (batch * Hq + head) * Sq
    grad_ptr += batch * stride_gb + head * stride_gh
    q_ptr += batch * stride_qb + head * stride_qh
    k_ptr += batch * stride_kb + head // group * stride_kh
    v_ptr += batch * stride_vb + head // group * stride_vh
    if MASK != "none":
        mask_ptr += batch * stride_mask_b + head * stride_mask_h

    grad = load_tile(grad_ptr, queries, Sq, stride_gm, stride_gd, DV, BLOCK_DV, True)
    out = load_tile(out_ptr + row * DV, queries, Sq, DV, 1, DV, BLOCK_DV, True)
    delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
    tl.store(delta_ptr + row + queries, delta, mask=queries < Sq)
    lse = log2_lse(tl.load(lse_ptr + row + queries, mask=queries < Sq, other=float("-inf")))
    q = load_tile(q_ptr, queries, Sq, stride_qm, stride_qd, D, BLOCK_D, True)

    key_end = count_keys(lengths_ptr, batch, stride_lengths, Sk)
    plain_end, end = key_range(block * BLOCK_M, Sq, Sk, key_end, BLOCK_M, BLOCK_N, CAUSAL, MASK)
    shift = Sk - Sq
    dq = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    if MASK == "none":
        dq = gather_dq(
            dq, q, grad, lse, delta, k_ptr, v_ptr, mask_ptr, queries, 0, plain_end, Sq, key_end,
            shift, scale_log2, stride_kn, stride_kd, stride_vn, stride_vd,
            stride_mask_q, stride_mask_k, D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, CAUSAL, MASK, False,
        )  # fmt: skip
    dq = gather_dq(
        dq, q, grad, lse, delta, k_ptr, v_ptr, mask_ptr, queries, plain_end, end, Sq, key_end,
        shift, scale_log2, stride_kn, stride_kd, stride_vn, stride_vd, stride_mask_q, stride_mask_k,
        D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, CAUSAL, MASK, True,
    )  # fmt: skip
    store_tile(dq_ptr + row * D, dq * scale, queries, Sq, D, BLOCK_D)


@jit
def backward_dkv_kernel(
    grad_ptr, q_ptr, k_ptr, v_ptr, mask_ptr, lengths_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    scale, scale_log2, Hq, group, Sq, Sk,
    stride_gb, stride_gh, stride_gm, stride_gd, stride_qb, stride_qh, stride_qm, stride_qd,
    stride_kb, stride_kh, stride_kn, stride_kd, stride_vb, stride_vh, stride_vn, stride_vd,
    stride_mask_b, stride_mask_h, stride_mask_q, stride_mask_k, stride_lengths,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """dk and dv of BLOCK_N keys of one key head. Grid: key blocks (fastest) x Hkv x B.

    Score tiles are transposed, [keys, queries]. Queries past Sq load as zeros with lse +inf and add
    nothing. Under causality every tile is compared with the diagonal: a second loop without the
    comparison made the compiler spill the accumulators, which costs more than one compare a score.
    """
    blocks = tl.cdiv(Sk, BLOCK_N)
    block = tl.program_id(0) % blocks  # under causality the first keys have the most queries
    kv_heads = Hq // group
    kv_head = (tl.program_id(0) // blocks % kv_heads).to(tl.int64)
    batch = (tl.program_id(0) // blocks // kv_heads).to(tl.int64)
    first_key = block * BLOCK_N
    keys = first_key + tl.arange(0, BLOCK_N)
    k_ptr += batch * stride_kb + kv_head * stride_kh
    v_ptr += batch * stride_vb + kv_head * stride_vh

    key_end = count_keys(lengths_ptr, batch, stride_lengths, Sk)
    k = load_tile(k_ptr, keys, key_end, stride_kn, stride_kd, D, BLOCK_D, True)
    v = load_tile(v_ptr, keys, key_end, stride_vn, stride_vd, DV, BLOCK_DV, True)
    first = 0
    if CAUSAL:  # earlier queries see none of these keys
        first = tl.maximum(first_key + Sq - Sk, 0) // BLOCK_M * BLOCK_M
    last = tl.where(first_key < key_end, Sq, 0)
    dk = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], dtype=tl.float32)
    for member in range(0, group):
        head = kv_head * group + member
        head_grad_ptr = grad_ptr + batch * stride_gb + head * stride_gh
        head_q_ptr = q_ptr + batch * stride_qb + head * stride_qh
        head_mask_ptr = mask_ptr
        if MASK != "none":
            head_mask_ptr = mask_ptr + batch * stride_mask_b + head * stride_mask_h
        row = (batch * Hq + head) * Sq
        for start in range(first, last, BLOCK_M):
            queries = start + tl.arange(0, BLOCK_M)
            inside = queries < Sq
            q = load_tile(head_q_ptr, queries, Sq, stride_qm, stride_qd, D, BLOCK_D, True)
            scores = tl.dot(k, tl.trans(q), input_precision="tf32x3") * scale_log2
            if CAUSAL or MASK != "none":
                scores = hide(
                    scores, head_mask_ptr, queries[None, :], keys[:, None], Sq, key_end, Sk - Sq,
                    stride_mask_q, stride_mask_k, CAUSAL, MASK,
                )  # fmt: skip
            lse = log2_lse(tl.load(lse_ptr + row + queries, mask=inside, other=float("-inf")))
            p = tl.exp2(scores - lse[None, :])
            grad = load_tile(head_grad_ptr, queries, Sq, stride_gm, stride_gd, DV, BLOCK_DV, True)
            dv = tl.dot(p.to(grad.dtype), grad, dv, input_precision="tf32x3")
            delta = tl.load(delta_ptr + row + queries, mask=inside, other=0.0)
            dp = tl.dot(v, tl.trans(grad), input_precision="tf32x3")
            ds = p * (dp - delta[None, :])
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="tf32x3")

    # keys past key_end loaded as zeros, which is not probability 0: their gradient is set here
    exists = keys[:, None] < key_end
    row = (batch * kv_heads + kv_head) * Sk
    store_tile(dk_ptr + row * D, tl.where(exists, dk * scale, 0.0), keys, Sk, D, BLOCK_D)
    store_tile(dv_ptr + row * DV, tl.where(exists, dv, 0.0), keys, Sk, DV, BLOCK_DV)


# ---- launchers ---------------------------------------------------------------------------------

# (architecture, q, k, v, mask, key_lengths, causal, scale): what every kernel needs to know
Call = tuple[int, Tensor, Tensor, Tensor, Tensor | None, Tensor | None, bool, float]


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    key_lengths: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """out [B, Hq, Sq, DV] (dtype of q, contiguous) and lse [B, Hq, Sq] (float32, natural log).

    q, k, v: float16, bfloat16 or float32, one dtype, any strides, D and DV up to 256. mask: bool
    (True = attend) or floating (added, natural-log units), expanded to [B, Hq, Sq, Sk] (stride 0
    costs nothing). key_lengths: int32 or int64 [B]; keys past it are never read. causal: query i
    attends key j where j <= i + Sk - Sq. A row with no key gives out 0 and lse -inf. A row whose
    every key has a finite mask below about -1e30 gives the plain mean of v, as eager softmax does.
    Raises ModuleNotFoundError without triton; arguments are not checked here.
    """
    load(globals())
    if scale < 0:  # the running peak assumes that scaling keeps the order of the scores
        return forward(-q, k, v, mask, key_lengths, causal, -scale)
    out = torch.empty((*q.shape[:3], v.shape[3]), dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    if lse.numel() == 0 or k.shape[2] == 0:
        return out.zero_(), lse.fill_(-math.inf)
    call = (architecture(q.device), q, k, v, mask, key_lengths, causal, scale)
    forward_launch(call, out, lse).run(q.device)
    return out, lse


def backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    key_lengths: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv (contiguous, dtypes of q, k, v) from what `forward` took and returned.

    grad_out [B, Hq, Sq, DV] in the dtype of q, any strides, 0 included. Deterministic. Rows without
    keys and keys past key_lengths get exactly 0; so do rows whose every key is masked by a finite
    value below about -1e30, where float32 cannot hold the normalisation.
    Raises ModuleNotFoundError without triton; arguments are not checked here.
    """
    load(globals())
    if scale < 0:
        dq, dk, dv = backward(grad_out, -q, k, v, out, lse, mask, key_lengths, causal, -scale)
        return dq.neg_(), dk, dv
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    if lse.numel() == 0 or k.shape[2] == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    delta = torch.empty(lse.shape, dtype=torch.float32, device=q.device)
    call = (architecture(q.device), q, k, v, mask, key_lengths, causal, scale)
    backward_dq_launch(call, grad_out, out.contiguous(), lse, delta, dq).run(q.device)
    backward_dkv_launch(call, grad_out, lse, delta, dk, dv).run(q.device)
    return dq, dk, dv


def forward_launch(call: Call, out: Tensor, lse: Tensor) -> Launch:
    """Launch that fills out and lse."""
    arguments, options = common_arguments("forward", call)
    arguments |= {"out_ptr": out, "lse_ptr": lse}
    return Launch(forward_kernel, query_grid(arguments, out), arguments, options)


def backward_dq_launch(
    call: Call, grad_out: Tensor, out: Tensor, lse: Tensor, delta: Tensor, dq: Tensor
) -> Launch:
    """Launch that fills dq and delta."""
    arguments, options = common_arguments("backward_dq", call)
    arguments |= {"grad_ptr": grad_out, "out_ptr": out, "lse_ptr": lse, "delta_ptr": delta}
    arguments |= {"dq_ptr": dq, "scale": call[-1], **strides("g", "bhmd", grad_out)}
    return Launch(backward_dq_kernel, query_grid(arguments, dq), arguments, options)


def backward_dkv_launch(
    call: Call, grad_out: Tensor, lse: Tensor, delta: Tensor, dk: Tensor, dv: Tensor
) -> Launch:
    """Launch that fills dk and dv; delta must be there."""
    arguments, options = common_arguments("backward_dkv", call)
    arguments |= {"grad_ptr": grad_out, "lse_ptr": lse, "delta_ptr": delta}
    arguments |= {"dk_ptr": dk, "dv_ptr": dv, "scale": call[-1], **strides("g", "bhmd", grad_out)}
    B, Hkv, Sk, _ = dk.shape
    grid = (-(-Sk // arguments["BLOCK_N"]) * Hkv * B,)
    return Launch(backward_dkv_kernel, grid, arguments, options)


def query_grid(arguments: dict[str, Any], like: Tensor) -> tuple[int]:
    """One program per query block, head and batch item, in dimension 0: 1 and 2 end at 65535."""
    B, Hq, Sq, _ = like.shape
    return (-(-Sq // arguments["BLOCK_M"]) * Hq * B,)


def strides(name: str, axes: str, tensor: Tensor) -> dict[str, int]:
    """The strides of a tensor as kernel arguments stride_<name><axis>."""
    return {f"stride_{name}{axis}": s for axis, s in zip(axes, tensor.stride(), strict=True)}


def common_arguments(kernel: str, call: Call) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments that the three kernels share, and the launch options."""
    arch, q, k, v, mask, key_lengths, causal, scale = call
    D, DV = q.shape[3], v.shape[3]
    config = attention_config(kernel, arch, q.dtype, max(D, DV), mask is not None)
    mask_strides = (0, 0, 0, 0) if mask is None else mask.stride()
    kind = "none" if mask is None else "bool" if mask.dtype == torch.bool else "float"
    arguments = {
        "q_ptr": q, "k_ptr": k, "v_ptr": v, "mask_ptr": mask, "lengths_ptr": key_lengths,
        "scale_log2": scale * math.log2(math.e), "Hq": q.shape[1],
        "group": q.shape[1] // k.shape[1], "Sq": q.shape[2], "Sk": k.shape[2],
        **strides("q", "bhmd", q), **strides("k", "bhnd", k), **strides("v", "bhnd", v),
        **{f"stride_mask_{axis}": s for axis, s in zip("bhqk", mask_strides, strict=True)},
        "stride_lengths": 0 if key_lengths is None else key_lengths.stride(0),
        "D": D, "DV": DV, "BLOCK_D": padded(D), "BLOCK_DV": padded(DV),
        "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "CAUSAL": causal, "MASK": kind,
    }  # fmt: skip
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return arguments, options | {"enable_fp_fusion": True}


def padded(width: int) -> int:
    """Width of the tile that holds a head: a power of two, at least what a tensor core takes."""
    return max(16, 1 << (width - 1).bit_length())


# ---- ahead-of-time compilation -----------------------------------------------------------------


def compilations(arch: int) -> Iterator[Compilation]:
    """The launches worth compiling for `arch` where there is no GPU: every row of the tables.

    Each row is compiled with what makes its code largest: causality, key lengths, grouped heads,
    and a mask in the dtype of q as well as a bool one. Three more: plain calls and an odd head.
    """
    for dtype in (torch.bfloat16, torch.float32):
        for D in (32, 64, 128, 256):
            for mask_dtype in (None, torch.bool, dtype):
                yield from compile_call(arch, dtype, D, mask_dtype, causal=True)
    yield from compile_call(arch, torch.bfloat16, 64, None, causal=False)
    yield from compile_call(arch, torch.float16, 128, None, causal=False)
    yield from compile_call(arch, torch.float16, 80, torch.float16, causal=True)


def compile_call(
    arch: int, dtype: torch.dtype, D: int, mask_dtype: torch.dtype | None, causal: bool
) -> Iterator[Compilation]:
    """The three launches of one call on meta tensors; without causality also without groups."""
    load(globals())
    Hq, Hkv, S = 8, 4 if causal else 8, 1024
    q, out, grad, dq = (torch.empty(2, Hq, S, D, dtype=dtype, device="meta") for _ in range(4))
    k, v, dk, dv = (torch.empty(2, Hkv, S, D, dtype=dtype, device="meta") for _ in range(4))
    lse, delta = (torch.empty(2, Hq, S, device="meta") for _ in range(2))
    lengths = torch.empty(2, dtype=torch.int64, device="meta") if causal else None
    mask = None
    if mask_dtype is not None:
        mask = torch.empty(2, 1, S, S, dtype=mask_dtype, device="meta").expand(2, Hq, S, S)
    call = (arch, q, k, v, mask, lengths, causal, D**-0.5)
    for name, launch in (
        ("attention forward", forward_launch(call, out, lse)),
        ("attention backward dq", backward_dq_launch(call, grad, out, lse, delta, dq)),
        ("attention backward dkv", backward_dkv_launch(call, grad, lse, delta, dk, dv)),
    ):
        a, o = launch.arguments, launch.options
        kind = f"{str(dtype)[6:]} D{D} {a['MASK']} mask{' causal' * causal}"
        tile = f"{a['BLOCK_M']}x{a['BLOCK_N']} w{o['num_warps']} s{o['num_stages']}"
        # what design promises, less the one row that spills 16 bytes (configs.py)
        strict = dtype != torch.float32 or D <= 64
        strict = strict and not (arch == 100 and D == 256 and mask is not None and "dkv" in name)
        quick = (
            dtype == torch.bfloat16
            and causal
            and (
                (D == 64 and mask is None and arch != 86)
                or (D == 128 and mask_dtype == torch.bfloat16 and arch == 90)
            )
        )
        yield Compilation(name, f"{kind} {tile}", launch, arch != 90 or D <= 128, strict, quick)
