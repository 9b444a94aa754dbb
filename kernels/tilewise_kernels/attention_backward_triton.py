"""Flash attention in Triton, backward: dq, dk, dv and dbias from out, lse and grad_out.

    P  = exp(score - lse)           kept: P with dropped elements 0 and the others over 1 - p
    dV = kept^T G                   dP = G V^T, dropped as P was
    dS = P (dP - delta)             delta = rowsum(out G)
    dbias = dS summed over the dims the bias was broadcast on
    dZ = dS (1 - tanh^2) with a softcap, else dS;   dQ = scale dZ K,   dK = scale dZ^T Q

Shapes and cost as in attention_triton.py. P is made again from lse: by one kernel that walks over
keys for dq, one that walks over queries (and the query heads that share a key head) for dk and dv,
and one that owns a tile of the bias and walks over all it was broadcast to. Every sum has one owner
and one order: no atomics, the same bits on every run.
"""

# mypy: allow-untyped-defs
# (Triton kernels have no Python types)

from __future__ import annotations  # tl.constexpr below is not evaluated at import

from typing import Any

import torch
from torch import Tensor

from .attention_tiles_triton import (
    Call,
    bend,
    blocks_of,
    common_arguments,
    count_keys,
    drop,
    dropout_rows,
    first_row,
    hide,
    key_range,
    lean,
    load_tile,
    locate,
    query_range,
    store_tile,
    tile_lists,
)
from .launch import Launch, architecture, strides
from .lazy_triton import jit, load

tl: Any = None  # triton.language once load() has run


@jit
def log2_lse(lse):
    """lse in log2 units, +inf for rows without gradient, so that their probabilities come out 0.

    Those rows are the ones with no key at all (-inf) and the ones whose every key carries a finite
    mask so large (finfo.min) that float32 cannot tell lse from the mask.
    """
    return tl.where(lse < -1e30, float("inf"), lse * 1.4426950408889634)


@jit
def differentiate(
    products, dp, lse, delta, mask_ptr, bias_ptr, slope, mixed, queries, keys, Sq, key_end, shift,
    left, right, mask_matters, scale_log2, softcap_log2, threshold, dropout_scale,
    stride_mask_q, stride_mask_k, stride_bias_q, stride_bias_k,
    MASK: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """(kept, dS, dZ) of a tile from q k^T and G V^T; `kept` lacks the factor 1 / (1 - p).

    queries, lse, delta, mixed and keys lie along the dims of the tile, which may be transposed.
    """
    bent = bend(products, scale_log2, softcap_log2)
    scores = lean(bent, slope, queries, keys, shift)
    if EDGE:
        scores = hide(
            scores, mask_ptr, bias_ptr, queries, keys, Sq, key_end, shift, left, right,
            mask_matters, stride_mask_q, stride_mask_k, stride_bias_q, stride_bias_k, MASK,
        )  # fmt: skip
    p = tl.exp2(scores - lse)
    if mixed is not None:
        dp = drop(dp * dropout_scale, mixed, keys, threshold)
    ds = p * (dp - delta)
    dz = ds
    if softcap_log2 is not None:
        tanh = bent * (1.0 / softcap_log2)
        dz = ds * (1.0 - tanh * tanh)
    return drop(p, mixed, keys, threshold), ds, dz


@jit
def gather_dq(
    dq, q, grad, lse, delta, k_ptr, v_ptr, mask_ptr, bias_ptr, tiles_ptr, slope, mixed, queries,
    first, last, jump_at, jump, Sq, key_end, shift, left, right, scale_log2, softcap_log2,
    threshold, dropout_scale, stride_kn, stride_kd, stride_vn, stride_vd,
    stride_mask_q, stride_mask_k, stride_bias_q, stride_bias_k,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr, STEP: tl.constexpr, MASK: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Add the part of dq (short of the factor scale) that comes through a run of key tiles.

    The run and EDGE are as in attention_triton.attend.
    """
    for step in range(first, last, STEP):
        start = step
        if tiles_ptr is not None:
            start = tl.multiple_of(tl.load(tiles_ptr + step), BLOCK_N)
        elif EDGE and left is not None:
            start = step + tl.where(step < jump_at, 0, jump)
        keys = start + tl.arange(0, BLOCK_N)
        k = load_tile(k_ptr, keys, key_end, stride_kn, stride_kd, D, BLOCK_D, EDGE)
        products = tl.dot(q, tl.trans(k), input_precision="tf32x3")
        v = load_tile(v_ptr, keys, key_end, stride_vn, stride_vd, DV, BLOCK_DV, EDGE)
        dp = tl.dot(grad, tl.trans(v), input_precision="tf32x3")
        _, _, dz = differentiate(
            products, dp, lse[:, None], delta[:, None], mask_ptr, bias_ptr, slope, mixed,
            queries[:, None], keys[None, :], Sq, key_end, shift, left, right, True, scale_log2,
            softcap_log2, threshold, dropout_scale, stride_mask_q, stride_mask_k,
            stride_bias_q, stride_bias_k, MASK, EDGE,
        )  # fmt: skip
        dq = tl.dot(dz.to(k.dtype), k, dq, input_precision="tf32x3")
    return dq


@jit
def backward_dq_kernel(
    grad_ptr, q_ptr, k_ptr, v_ptr, mask_ptr, bias_ptr, lengths_ptr, slopes_ptr, seed_ptr,
    cu_q_ptr, cu_k_ptr, tiles_ptr, out_ptr, lse_ptr, delta_ptr, dq_ptr, sequences, left, right,
    scale, scale_log2, softcap_log2, threshold, dropout_scale, Hq, group, Sq, Sk,
    stride_gb, stride_gh, stride_gm, stride_gd, stride_ob, stride_oh, stride_om, stride_od,
    stride_qb, stride_qh, stride_qm, stride_qd, stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd,
    stride_mask_b, stride_mask_h, stride_mask_q, stride_mask_k,
    stride_bias_b, stride_bias_h, stride_bias_q, stride_bias_k,
    stride_tiles_b, stride_tiles_h, stride_tiles_m, stride_lengths, stride_slopes,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MASK: tl.constexpr, SEQUENCES: tl.constexpr,
):  # fmt: skip
    """dq, and delta for the other kernels. Grid as in forward_kernel."""
    PACKED: tl.constexpr = cu_q_ptr is not None
    PLAIN: tl.constexpr = MASK != "float" and bias_ptr is None
    total_q = Sq
    block, blocks, head, batch, q_start, Sq, k_start, Sk = locate(
        cu_q_ptr, cu_k_ptr, sequences, Hq, Sq, Sk, BLOCK_M, False, SEQUENCES
    )
    if right is not None:
        block = blocks - 1 - block
    queries = block * BLOCK_M + tl.arange(0, BLOCK_M)
    grad_ptr += batch * stride_gb + head * stride_gh + q_start * stride_gm
    out_ptr += batch * stride_ob + head * stride_oh + q_start * stride_om
    q_ptr += batch * stride_qb + head * stride_qh + q_start * stride_qm
    k_ptr += batch * stride_kb + head // group * stride_kh + k_start * stride_kn
    v_ptr += batch * stride_vb + head // group * stride_vh + k_start * stride_vn
    if MASK != "none":
        mask_ptr += batch * stride_mask_b + head * stride_mask_h
    if bias_ptr is not None:
        bias_ptr += batch * stride_bias_b + head * stride_bias_h
    slope = None
    if slopes_ptr is not None:
        slope = tl.load(slopes_ptr + head * stride_slopes).to(tl.float32) * 1.4426950408889634
    row = first_row(batch, head, Hq, q_start, Sq, total_q, PACKED)
    mixed = None
    if seed_ptr is not None:
        mixed = dropout_rows(seed_ptr, batch, head, Hq, Sq, queries, PACKED)[:, None]

    grad = load_tile(grad_ptr, queries, Sq, stride_gm, stride_gd, DV, BLOCK_DV, True)
    out = load_tile(out_ptr, queries, Sq, stride_om, stride_od, DV, BLOCK_DV, True)
    delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
    tl.store(delta_ptr + row + queries, delta, mask=queries < Sq)
    lse = log2_lse(tl.load(lse_ptr + row + queries, mask=queries < Sq, other=float("-inf")))
    q = load_tile(q_ptr, queries, Sq, stride_qm, stride_qd, D, BLOCK_D, True)

    key_end = count_keys(lengths_ptr, batch, stride_lengths, Sk)
    shift = Sk - Sq
    STEP: tl.constexpr = 1 if MASK == "bool" else BLOCK_N
    if MASK == "bool":
        tiles_ptr += batch * stride_tiles_b + head * stride_tiles_h + block * stride_tiles_m
        first = 0
        plain_start = 0
        plain_end = tl.load(tiles_ptr)
        end = tl.load(tiles_ptr + 1)
        tiles_ptr += 2
    else:
        first, plain_start, plain_end, end = key_range(
            block * BLOCK_M, key_end, shift, left, right, BLOCK_M, BLOCK_N, PLAIN
        )
    dq = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    if PLAIN:
        dq = gather_dq(
            dq, q, grad, lse, delta, k_ptr, v_ptr, mask_ptr, bias_ptr, tiles_ptr, slope, mixed,
            queries, plain_start, plain_end, 0, 0, Sq, key_end, shift, left, right, scale_log2,
            softcap_log2, threshold, dropout_scale, stride_kn, stride_kd, stride_vn, stride_vd,
            stride_mask_q, stride_mask_k, stride_bias_q, stride_bias_k,
            D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, STEP, MASK, False,
        )  # fmt: skip
    jump = 0
    if MASK == "bool" or left is None:
        first = plain_end
    else:
        jump = plain_end - plain_start
    dq = gather_dq(
        dq, q, grad, lse, delta, k_ptr, v_ptr, mask_ptr, bias_ptr, tiles_ptr, slope, mixed,
        queries, first, end - jump, plain_start, jump, Sq, key_end, shift, left, right, scale_log2,
        softcap_log2, threshold, dropout_scale, stride_kn, stride_kd, stride_vn, stride_vd,
        stride_mask_q, stride_mask_k, stride_bias_q, stride_bias_k,
        D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, STEP, MASK, True,
    )  # fmt: skip
    store_tile(dq_ptr, dq * scale, queries, Sq, batch, head, Hq, q_start, D, BLOCK_D, PACKED)


@jit
def backward_dkv_kernel(
    grad_ptr, q_ptr, k_ptr, v_ptr, mask_ptr, bias_ptr, lengths_ptr, slopes_ptr, seed_ptr,
    cu_q_ptr, cu_k_ptr, tiles_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, sequences, left, right,
    scale, scale_log2, softcap_log2, threshold, dropout_scale, Hq, group, Sq, Sk,
    stride_gb, stride_gh, stride_gm, stride_gd,
    stride_qb, stride_qh, stride_qm, stride_qd, stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd,
    stride_mask_b, stride_mask_h, stride_mask_q, stride_mask_k,
    stride_bias_b, stride_bias_h, stride_bias_q, stride_bias_k,
    stride_tiles_b, stride_tiles_h, stride_tiles_m, stride_lengths, stride_slopes,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MASK: tl.constexpr, SEQUENCES: tl.constexpr,
):  # fmt: skip
    """dk and dv of BLOCK_N keys of one key head. Grid: key blocks (fastest) x Hkv x B.

    Score tiles are transposed, [keys, queries]. Queries past Sq load as zeros with lse +inf and add
    nothing. All tiles that are not plain by nature are compared with the edges: a second loop
    without the comparison made the compiler spill the accumulators, which costs more than one
    compare a score. Tiles that the mask's list calls full read no mask.
    """
    PACKED: tl.constexpr = cu_q_ptr is not None
    EDGE: tl.constexpr = (
        MASK != "none" or bias_ptr is not None or left is not None or right is not None
    )
    total_q = Sq
    kv_heads = Hq // group
    block, blocks, kv_head, batch, q_start, Sq, k_start, Sk = locate(
        cu_q_ptr, cu_k_ptr, sequences, kv_heads, Sq, Sk, BLOCK_N, True, SEQUENCES
    )  # under causality the first keys have the most queries
    keys = block * BLOCK_N + tl.arange(0, BLOCK_N)
    k_ptr += batch * stride_kb + kv_head * stride_kh + k_start * stride_kn
    v_ptr += batch * stride_vb + kv_head * stride_vh + k_start * stride_vn
    key_end = count_keys(lengths_ptr, batch, stride_lengths, Sk)
    shift = Sk - Sq
    k = load_tile(k_ptr, keys, key_end, stride_kn, stride_kd, D, BLOCK_D, True)
    v = load_tile(v_ptr, keys, key_end, stride_vn, stride_vd, DV, BLOCK_DV, True)
    STEP: tl.constexpr = 1 if MASK == "bool" else BLOCK_M
    full = 0
    first, last = query_range(block * BLOCK_N, Sq, key_end, shift, left, right, BLOCK_M, BLOCK_N)
    dk = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], dtype=tl.float32)
    for member in range(0, group):
        head = kv_head * group + member
        head_grad_ptr = grad_ptr + batch * stride_gb + head * stride_gh + q_start * stride_gm
        head_q_ptr = q_ptr + batch * stride_qb + head * stride_qh + q_start * stride_qm
        head_mask_ptr = mask_ptr
        head_bias_ptr = bias_ptr
        head_tiles_ptr = tiles_ptr
        if MASK != "none":
            head_mask_ptr = mask_ptr + batch * stride_mask_b + head * stride_mask_h
        if bias_ptr is not None:
            head_bias_ptr = bias_ptr + batch * stride_bias_b + head * stride_bias_h
        if MASK == "bool":
            head_tiles_ptr = tiles_ptr + batch * stride_tiles_b + head * stride_tiles_h
            head_tiles_ptr += block * stride_tiles_m
            first = 0
            full = tl.load(head_tiles_ptr)
            last = tl.load(head_tiles_ptr + 1)
        slope = None
        if slopes_ptr is not None:
            slope = tl.load(slopes_ptr + head * stride_slopes).to(tl.float32) * 1.4426950408889634
        row = first_row(batch, head, Hq, q_start, Sq, total_q, PACKED)
        for step in range(first, last, STEP):
            start = step
            if MASK == "bool":
                start = tl.multiple_of(tl.load(head_tiles_ptr + 2 + step), BLOCK_M)
            queries = start + tl.arange(0, BLOCK_M)
            inside = queries < Sq
            q = load_tile(head_q_ptr, queries, Sq, stride_qm, stride_qd, D, BLOCK_D, True)
            products = tl.dot(k, tl.trans(q), input_precision="tf32x3")
            lse = log2_lse(tl.load(lse_ptr + row + queries, mask=inside, other=float("-inf")))
            delta = tl.load(delta_ptr + row + queries, mask=inside, other=0.0)
            grad = load_tile(head_grad_ptr, queries, Sq, stride_gm, stride_gd, DV, BLOCK_DV, True)
            dp = tl.dot(v, tl.trans(grad), input_precision="tf32x3")
            mixed = None
            if seed_ptr is not None:
                mixed = dropout_rows(seed_ptr, batch, head, Hq, Sq, queries, PACKED)[None, :]
            kept, _, dz = differentiate(
                products, dp, lse[None, :], delta[None, :], head_mask_ptr, head_bias_ptr, slope,
                mixed, queries[None, :], keys[:, None], Sq, key_end, shift, left, right,
                step >= full, scale_log2, softcap_log2, threshold, dropout_scale,
                stride_mask_q, stride_mask_k, stride_bias_q, stride_bias_k, MASK, EDGE,
            )  # fmt: skip
            dv = tl.dot(kept.to(grad.dtype), grad, dv, input_precision="tf32x3")
            dk = tl.dot(dz.to(q.dtype), q, dk, input_precision="tf32x3")

    # keys past key_end loaded as zeros, which is not probability 0: their gradient is set here
    exists = keys[:, None] < key_end
    if seed_ptr is not None:
        dv = dv * dropout_scale
    dk = tl.where(exists, dk * scale, 0.0)
    dv = tl.where(exists, dv, 0.0)
    store_tile(dk_ptr, dk, keys, Sk, batch, kv_head, kv_heads, k_start, D, BLOCK_D, PACKED)
    store_tile(dv_ptr, dv, keys, Sk, batch, kv_head, kv_heads, k_start, DV, BLOCK_DV, PACKED)


@jit
def backward_dbias_kernel(
    grad_ptr, q_ptr, k_ptr, v_ptr, mask_ptr, bias_ptr, lengths_ptr, slopes_ptr, seed_ptr,
    lse_ptr, delta_ptr, dbias_ptr, left, right,
    scale_log2, softcap_log2, threshold, dropout_scale, B, Hq, group, Sq, Sk,
    bias_b, bias_h, bias_q, bias_k,
    stride_gb, stride_gh, stride_gm, stride_gd,
    stride_qb, stride_qh, stride_qm, stride_qd, stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd,
    stride_mask_b, stride_mask_h, stride_mask_q, stride_mask_k,
    stride_bias_b, stride_bias_h, stride_bias_q, stride_bias_k, stride_lengths, stride_slopes,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MASK: tl.constexpr,
    ONE_QUERY: tl.constexpr, ONE_KEY: tl.constexpr,
):  # fmt: skip
    """dbias of one tile of the bias's own shape, [bias_b, bias_h, bias_q, bias_k].

    Grid: tiles along the keys (fastest), along the queries, heads, batch. The program walks over
    the batch items, heads, and with ONE_QUERY or ONE_KEY query or key tiles that share its tile.
    """
    q_tiles = tl.cdiv(Sq, BLOCK_M)
    k_tiles = tl.cdiv(Sk, BLOCK_N)
    own_q = 1 if ONE_QUERY else q_tiles  # tiles of the bias, and those that share each
    own_k = 1 if ONE_KEY else k_tiles
    walk_q = q_tiles if ONE_QUERY else 1
    walk_k = k_tiles if ONE_KEY else 1
    walk_h = Hq // bias_h
    program = tl.program_id(0)
    own_key = program % own_k
    own_query = program // own_k % own_q
    own_head = program // own_k // own_q % bias_h
    own_batch = program // own_k // own_q // bias_h

    shift = Sk - Sq
    walk = B // bias_b * walk_h * walk_q * walk_k
    if not ONE_QUERY and not ONE_KEY:  # a tile that the diagonals rule out is 0
        if right is not None:
            seen = own_key * BLOCK_N < own_query * BLOCK_M + BLOCK_M + shift + right
            walk = tl.where(seen, walk, 0)
        if left is not None:
            seen = own_key * BLOCK_N + BLOCK_N > own_query * BLOCK_M + shift - left
            walk = tl.where(seen, walk, 0)
    total = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for step in range(0, walk):
        keys = (own_key + step % walk_k) * BLOCK_N + tl.arange(0, BLOCK_N)
        queries = (own_query + step // walk_k % walk_q) * BLOCK_M + tl.arange(0, BLOCK_M)
        head = (own_head + step // walk_k // walk_q % walk_h).to(tl.int64)
        batch = (own_batch + step // walk_k // walk_q // walk_h).to(tl.int64)
        key_end = count_keys(lengths_ptr, batch, stride_lengths, Sk)
        tile_mask_ptr = mask_ptr
        if MASK != "none":
            tile_mask_ptr = mask_ptr + batch * stride_mask_b + head * stride_mask_h
        slope = None
        if slopes_ptr is not None:
            slope = tl.load(slopes_ptr + head * stride_slopes).to(tl.float32) * 1.4426950408889634
        row = (batch * Hq + head) * Sq
        mixed = None
        if seed_ptr is not None:
            mixed = dropout_rows(seed_ptr, batch, head, Hq, Sq, queries, False)[:, None]
        at_q = q_ptr + batch * stride_qb + head * stride_qh
        at_k = k_ptr + batch * stride_kb + head // group * stride_kh
        at_v = v_ptr + batch * stride_vb + head // group * stride_vh
        at_grad = grad_ptr + batch * stride_gb + head * stride_gh
        q = load_tile(at_q, queries, Sq, stride_qm, stride_qd, D, BLOCK_D, True)
        k = load_tile(at_k, keys, key_end, stride_kn, stride_kd, D, BLOCK_D, True)
        products = tl.dot(q, tl.trans(k), input_precision="tf32x3")
        v = load_tile(at_v, keys, key_end, stride_vn, stride_vd, DV, BLOCK_DV, True)
        grad = load_tile(at_grad, queries, Sq, stride_gm, stride_gd, DV, BLOCK_DV, True)
        dp = tl.dot(grad, tl.trans(v), input_precision="tf32x3")
        inside = queries < Sq
        lse = log2_lse(tl.load(lse_ptr + row + queries, mask=inside, other=float("-inf")))
        delta = tl.load(delta_ptr + row + queries, mask=inside, other=0.0)
        _, ds, _ = differentiate(
            products, dp, lse[:, None], delta[:, None], tile_mask_ptr,
            bias_ptr + batch * stride_bias_b + head * stride_bias_h, slope, mixed,
            queries[:, None], keys[None, :], Sq, key_end, shift, left, right, True,
            scale_log2, softcap_log2, threshold, dropout_scale,
            stride_mask_q, stride_mask_k, stride_bias_q, stride_bias_k, MASK, True,
        )  # fmt: skip
        total += ds

    rows = (own_query * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    columns = (own_key * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    if ONE_QUERY:
        total = tl.sum(total, 0)[None, :]
        rows = tl.arange(0, 1)[:, None]
    if ONE_KEY:
        total = tl.sum(total, 1)[:, None]
        columns = tl.arange(0, 1)[None, :]
    row = (own_batch.to(tl.int64) * bias_h + own_head) * bias_q + rows
    keep = (rows < bias_q) & (columns < bias_k)
    tl.store(dbias_ptr + row * bias_k + columns, total.to(dbias_ptr.dtype.element_ty), mask=keep)


# ---- launchers ---------------------------------------------------------------------------------


def backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    key_lengths: Tensor | None,
    alibi_slopes: Tensor | None,
    seed: Tensor | None,
    causal: bool,
    left: int,
    right: int,
    softcap: float,
    scale: float,
    dropout_p: float,
    needs: list[bool],
    cu_q: Tensor | None = None,
    cu_k: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """dq, dk, dv, dbias (contiguous, dtypes and shapes of q, k, v, bias) from what `forward` took
    and returned; None for those that `needs` does not want.

    grad_out [B, Hq, Sq, DV] in the dtype of q, any strides, 0 included. Packed: grad_out and out
    are [total_q, Hq, DV], and so are laid out dq, dk, dv. Deterministic. Rows without keys and keys
    past key_lengths get exactly 0; so do rows whose every key is masked by a finite value below
    about -1e30, where float32 cannot hold the normalisation.
    Raises ModuleNotFoundError without triton; arguments are not checked here.
    """
    if cu_q is not None:
        grad_out, out = (x.transpose(0, 1)[None] for x in (grad_out, out))
    sign = -1.0 if scale < 0 else 1.0
    call = Call(
        architecture(q.device), q if sign > 0 else -q, k, v, mask, bias, key_lengths,
        alibi_slopes, seed, causal, left, right, softcap, sign * scale, dropout_p, cu_q, cu_k,
    )  # fmt: skip

    def like(x: Tensor | None, wanted: bool) -> Tensor | None:
        if x is None or not wanted:
            return None
        shape = x.shape if cu_q is None else x[0].transpose(0, 1).shape
        return torch.empty(shape, dtype=x.dtype, device=x.device)

    gradients = [like(x, want) for x, want in zip((q, k, v, bias), needs, strict=True)]
    empty = lse.numel() == 0 or k.shape[2] == 0
    if empty or cu_q is not None:
        gradients = [None if x is None else x.zero_() for x in gradients]
    if not empty:
        for launch in backward_launches(call, grad_out, out, lse, gradients):
            launch.run(q.device)
    dq, dk, dv, dbias = gradients
    return dq if dq is None or sign > 0 else dq.neg_(), dk, dv, dbias


def backward_launches(
    call: Call, grad_out: Tensor, out: Tensor, lse: Tensor, gradients: list[Tensor | None]
) -> list[Launch]:
    """Launches that fill those of dq, dk, dv, dbias that are not None, in that order."""
    load(globals())
    dq, dk, dv, dbias = gradients
    launches = []
    if dq is not None:
        delta = torch.empty(lse.shape, dtype=torch.float32, device=lse.device)
        launches += dq_launches(call, grad_out, out, lse, delta, dq)
    else:  # the dq kernel would have made it
        delta = (out.float() * grad_out.float()).sum(-1).contiguous()
    if dk is not None or dv is not None:
        dk = torch.empty_like(call.k) if dk is None else dk  # the kernel makes both
        dv = torch.empty_like(call.v) if dv is None else dv
        launches += dkv_launches(call, grad_out, lse, delta, dk, dv)
    if dbias is not None:
        launches.append(dbias_launch(call, grad_out, lse, delta, dbias))
    return launches


def dq_launches(
    call: Call, grad_out: Tensor, out: Tensor, lse: Tensor, delta: Tensor, dq: Tensor
) -> list[Launch]:
    """Launches that fill dq and delta; the dq kernel is the last."""
    arguments, options = common_arguments("backward_dq", call)
    arguments |= {"grad_ptr": grad_out, "out_ptr": out, "lse_ptr": lse, "delta_ptr": delta}
    arguments |= {"dq_ptr": dq, "scale": call.scale}
    arguments |= strides("g", "bhmd", grad_out) | strides("o", "bhmd", out)
    lists = tile_lists(call, arguments, by_keys=False)
    B, Hq, Sq, _ = call.q.shape
    grid = (blocks_of(arguments, Sq, arguments["BLOCK_M"], B) * Hq,)
    return [*lists, Launch(backward_dq_kernel, grid, arguments, options)]


def dkv_launches(
    call: Call, grad_out: Tensor, lse: Tensor, delta: Tensor, dk: Tensor, dv: Tensor
) -> list[Launch]:
    """Launches that fill dk and dv, the kernel last; delta must be there."""
    arguments, options = common_arguments("backward_dkv", call)
    arguments |= {"grad_ptr": grad_out, "lse_ptr": lse, "delta_ptr": delta}
    arguments |= {"dk_ptr": dk, "dv_ptr": dv, "scale": call.scale}
    arguments |= strides("g", "bhmd", grad_out)
    lists = tile_lists(call, arguments, by_keys=True)
    B, Hkv, Sk, _ = call.k.shape
    grid = (blocks_of(arguments, Sk, arguments["BLOCK_N"], B) * Hkv,)
    return [*lists, Launch(backward_dkv_kernel, grid, arguments, options)]


def dbias_launch(call: Call, grad_out: Tensor, lse: Tensor, delta: Tensor, dbias: Tensor) -> Launch:
    """Launch that fills dbias; delta must be there."""
    arguments, options = common_arguments("backward_dbias", call)
    for name in ("cu_q_ptr", "cu_k_ptr", "sequences", "SEQUENCES"):
        del arguments[name]
    arguments |= {"grad_ptr": grad_out, "lse_ptr": lse, "delta_ptr": delta, "dbias_ptr": dbias}
    arguments |= strides("g", "bhmd", grad_out) | {"B": call.q.shape[0]}
    arguments |= {f"bias_{axis}": size for axis, size in zip("bhqk", dbias.shape, strict=True)}
    one_query, one_key = dbias.shape[2] == 1, dbias.shape[3] == 1
    arguments |= {"ONE_QUERY": one_query, "ONE_KEY": one_key}
    q_tiles = 1 if one_query else -(-arguments["Sq"] // arguments["BLOCK_M"])
    k_tiles = 1 if one_key else -(-arguments["Sk"] // arguments["BLOCK_N"])
    grid = (dbias.shape[0] * dbias.shape[1] * q_tiles * k_tiles,)
    return Launch(backward_dbias_kernel, grid, arguments, options)
