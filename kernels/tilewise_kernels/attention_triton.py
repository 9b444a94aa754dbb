"""Flash attention in Triton: softmax(scale * q k^T + masks) v, forward; the backward is next door.

Shapes, the same names throughout:
    q, dq     [B, Hq, Sq, D]        out, grad_out  [B, Hq, Sq, DV]
    k, dk     [B, Hkv, Sk, D]       lse, delta     [B, Hq, Sq] float32
    v, dv     [B, Hkv, Sk, DV]      mask           [B, Hq, Sq, Sk]
    bias, dbias  [1 | B, 1 | Hq, 1 | Sq, 1 | Sk]
Hq is a multiple of Hkv; query head h reads key head h // (Hq / Hkv). Packed sequences: q, dq, out
[total_q, Hq, ...], k, v, dk, dv [total_k, Hkv, ...], lse, delta [Hq, total_q].

How it works. The forward program of a tile of BLOCK_M queries walks over tiles of BLOCK_N keys with
the online softmax of Milakov and Gimelshein (2018) arranged as in FlashAttention-2 (Dao, 2023): it
holds the running peak, the running total and the unnormalised output in float32 and never stores a
score. Everything is in units of log2, so that each exponential is one exp2 and `scale` costs one
fused multiply-add.

Tiles on which every query attends every key skip all comparisons and all mask loads; only those on
an edge of the causal triangle or window, at the end of the keys, or partly False in the mask
evaluate them. Tiles that nobody attends are never visited, keys past key_lengths never read. Which
is which, and what a score is, lives in attention_tiles_triton.py.

Cost. FLOPs: forward 2 B Hq Sq Sk (D + DV), backward 2 B Hq Sq Sk (4 D + 3 DV), of which D + DV are
the second recomputation that determinism costs, 2 B Hq Sq Sk (D + DV) more for dbias; the visited
share of it under causality, a window or a mask. Memory: out and lse saved, one float32 per query
(delta) besides in the backward pass, under a bool mask 4 bytes for each of its tiles.

Precision. float16 and bfloat16 enter the tensor cores as they are, float32 as three TF32 products
(tf32x3, close to float32). The backward pass rebuilds probabilities from a float32 lse, so at
|lse| = 1e4 they carry a relative error of 1e-3, as in every kernel that keeps lse alone.

The functions here launch kernels and nothing else: validation, autograd and the choice between
this and other implementations live in `attention.py` and `attention_varlen.py`.
"""

# mypy: allow-untyped-defs
# (Triton kernels have no Python types)

from __future__ import annotations  # tl.constexpr below is not evaluated at import

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .attention_backward_triton import backward as backward  # the other half of this module
from .attention_backward_triton import backward_launches
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
    store_tile,
    tile_lists,
)
from .launch import Compilation, Launch, architecture
from .lazy_triton import jit, load

tl: Any = None  # triton.language once load() has run


@jit
def attend(
    acc, total, peak, q, k_ptr, v_ptr, mask_ptr, bias_ptr, tiles_ptr, slope, mixed, queries,
    first, last, jump_at, jump, Sq, key_end, shift, left, right, scale_log2, softcap_log2,
    threshold, stride_kn, stride_kd, stride_vn, stride_vd,
    stride_mask_q, stride_mask_k, stride_bias_q, stride_bias_k,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr, STEP: tl.constexpr, MASK: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Add a run of key tiles to the running softmax of a query tile; EDGE: some may be hidden.

    The run is entries [first, last) of the list in tiles_ptr, or keys [first, last) without one;
    from jump_at on they lie `jump` further.
    """
    for step in range(first, last, STEP):
        start = step
        if tiles_ptr is not None:
            start = tl.multiple_of(tl.load(tiles_ptr + step), BLOCK_N)
        elif EDGE and left is not None:
            start = step + tl.where(step < jump_at, 0, jump)
        keys = start + tl.arange(0, BLOCK_N)
        k = load_tile(k_ptr, keys, key_end, stride_kn, stride_kd, D, BLOCK_D, EDGE)
        scores = tl.dot(q, tl.trans(k), input_precision="tf32x3")
        if EDGE or softcap_log2 is not None or slope is not None:
            scores = bend(scores, scale_log2, softcap_log2)
            scores = lean(scores, slope, queries[:, None], keys[None, :], shift)
            if EDGE:
                scores = hide(
                    scores, mask_ptr, bias_ptr, queries[:, None], keys[None, :], Sq, key_end,
                    shift, left, right, True, stride_mask_q, stride_mask_k,
                    stride_bias_q, stride_bias_k, MASK,
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
        if mixed is not None:
            p = drop(p, mixed, keys[None, :], threshold)
        v = load_tile(v_ptr, keys, key_end, stride_vn, stride_vd, DV, BLOCK_DV, EDGE)
        acc = acc * fade[:, None]
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision="tf32x3")
        peak = new_peak
    return acc, total, peak


@jit
def forward_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, bias_ptr, lengths_ptr, slopes_ptr, seed_ptr, cu_q_ptr, cu_k_ptr,
    tiles_ptr, out_ptr, lse_ptr, sequences, left, right, scale_log2, softcap_log2, threshold,
    dropout_scale, Hq, group, Sq, Sk,
    stride_qb, stride_qh, stride_qm, stride_qd, stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd,
    stride_mask_b, stride_mask_h, stride_mask_q, stride_mask_k,
    stride_bias_b, stride_bias_h, stride_bias_q, stride_bias_k,
    stride_tiles_b, stride_tiles_h, stride_tiles_m, stride_lengths, stride_slopes,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MASK: tl.constexpr, SEQUENCES: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M queries of one head. Grid: query blocks (fastest) x Hq x B."""
    PACKED: tl.constexpr = cu_q_ptr is not None
    PLAIN: tl.constexpr = MASK != "float" and bias_ptr is None  # some tiles evaluate nothing
    total_q = Sq
    block, blocks, head, batch, q_start, Sq, k_start, Sk = locate(
        cu_q_ptr, cu_k_ptr, sequences, Hq, Sq, Sk, BLOCK_M, False, SEQUENCES
    )
    if right is not None:
        block = blocks - 1 - block  # the longest rows first, so that no long one starts last
    queries = block * BLOCK_M + tl.arange(0, BLOCK_M)
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
    q = load_tile(q_ptr, queries, Sq, stride_qm, stride_qd, D, BLOCK_D, True)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    if PLAIN:
        acc, total, peak = attend(
            acc, total, peak, q, k_ptr, v_ptr, mask_ptr, bias_ptr, tiles_ptr, slope, mixed,
            queries, plain_start, plain_end, 0, 0, Sq, key_end, shift, left, right, scale_log2,
            softcap_log2, threshold, stride_kn, stride_kd, stride_vn, stride_vd,
            stride_mask_q, stride_mask_k, stride_bias_q, stride_bias_k,
            D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, STEP, MASK, False,
        )  # fmt: skip
    jump = 0
    if MASK == "bool" or left is None:
        first = plain_end
    else:
        jump = plain_end - plain_start
    acc, total, peak = attend(
        acc, total, peak, q, k_ptr, v_ptr, mask_ptr, bias_ptr, tiles_ptr, slope, mixed, queries,
        first, end - jump, plain_start, jump, Sq, key_end, shift, left, right, scale_log2,
        softcap_log2, threshold, stride_kn, stride_kd, stride_vn, stride_vd,
        stride_mask_q, stride_mask_k, stride_bias_q, stride_bias_k,
        D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, STEP, MASK, True,
    )  # fmt: skip

    safe = tl.where(total == 0.0, 1.0, total)  # no key at all: out 0, lse -inf
    lse = (peak + tl.log2(safe)) * 0.6931471805599453
    tl.store(lse_ptr + row + queries, lse, mask=queries < Sq)
    if seed_ptr is not None:
        acc = acc * dropout_scale
    store_tile(
        out_ptr, acc / safe[:, None], queries, Sq, batch, head, Hq, q_start, DV, BLOCK_DV, PACKED
    )


# ---- launchers ---------------------------------------------------------------------------------


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
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
    cu_q: Tensor | None = None,
    cu_k: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """out [B, Hq, Sq, DV] (dtype of q, contiguous) and lse [B, Hq, Sq] (float32, natural log).

    q, k, v: float16, bfloat16 or float32, one dtype, any strides, D and DV up to 256. mask: bool
    (True = attend) or floating (added, natural-log units), expanded to [B, Hq, Sq, Sk] (stride 0
    costs nothing). bias: floating, added, 4-D in its own shape. key_lengths: int32 or int64 [B];
    keys past it are never read. alibi_slopes: float [Hq]. seed: int64 [1], with which element
    (row (b Hq + h) Sq + i, column j) of the probabilities is dropped with probability dropout_p;
    None: no dropout. causal: query i attends key j where j <= i + Sk - Sq; left, right: how far to
    either side of that diagonal it attends, -1 for all. softcap: 0 for none.

    Packed: with cu_q, cu_k (int32 or int64 [sequences + 1]) q, k, v are [1, heads, total, dim]
    views of [total, heads, dim]; out is [total_q, Hq, DV], lse [Hq, total_q]; mask, bias
    and key_lengths are None. Sequence b drops what it would alone, with seed ^ (b << 32).

    A row with no key gives out 0 and lse -inf. A row whose every key has a finite mask below about
    -1e30 gives the plain mean of v, as eager softmax does.
    Raises ModuleNotFoundError without triton; arguments are not checked here.
    """
    if scale < 0:  # the running peak assumes that scaling keeps the order of the scores
        q, scale = -q, -scale
    call = Call(
        architecture(q.device), q, k, v, mask, bias, key_lengths, alibi_slopes, seed, causal,
        left, right, softcap, scale, dropout_p, cu_q, cu_k,
    )  # fmt: skip
    B, Hq, Sq, _ = q.shape
    shape = (B, Hq, Sq, v.shape[3]) if cu_q is None else (Sq, Hq, v.shape[3])
    out = torch.empty(shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(
        q.shape[:3] if cu_q is None else (Hq, Sq), dtype=torch.float32, device=q.device
    )
    if lse.numel() == 0 or k.shape[2] == 0:
        return out.zero_(), lse.fill_(-math.inf)
    if cu_q is not None:  # rows that cu_seqlens leaves to no sequence
        out.zero_(), lse.fill_(-math.inf)
    for launch in forward_launches(call, out, lse):
        launch.run(q.device)
    return out, lse


def forward_launches(call: Call, out: Tensor, lse: Tensor) -> list[Launch]:
    """Launches that fill out and lse; the forward kernel is the last."""
    load(globals())
    arguments, options = common_arguments("forward", call)
    arguments |= {"out_ptr": out, "lse_ptr": lse}
    B, Hq, Sq, _ = call.q.shape
    lists = tile_lists(call, arguments, by_keys=False)
    grid = (blocks_of(arguments, Sq, arguments["BLOCK_M"], B) * Hq,)
    return [*lists, Launch(forward_kernel, grid, arguments, options)]


# ---- ahead-of-time compilation -----------------------------------------------------------------


def compilations(arch: int) -> Iterator[Compilation]:
    """The launches worth compiling for `arch` where there is no GPU: every row of the tables.

    Each row is compiled with what makes its code largest: causality, key lengths, grouped heads,
    and a mask in the dtype of q as well as a bool one. Then plain calls, an odd head, and every
    other feature, alone and in the company that models give it.
    """
    for dtype in (torch.bfloat16, torch.float32):
        for D in (32, 64, 128, 256):
            for mask in (None, torch.bool, dtype):
                yield from compile_call(arch, dtype, D, mask=mask, right=0, lengths=True)
    yield from compile_call(arch, torch.bfloat16, 64)
    yield from compile_call(arch, torch.float16, 128)
    yield from compile_call(arch, torch.float16, 80, mask=torch.float16, right=0, lengths=True)
    for D in (64, 128):
        for features in FEATURES:
            yield from compile_call(arch, torch.bfloat16, D, **features)


FEATURES: tuple[dict[str, Any], ...] = (
    {"left": 512, "right": 0},
    {"softcap": 50.0, "left": 512, "right": 0},
    {"alibi": True, "right": 0},
    {"dropout_p": 0.1},
    {"dropout_p": 0.1, "mask": torch.bool},
    {"bias": True},
    {"bias": True, "dropout_p": 0.1, "right": 0},
    {"packed": True, "right": 0},
    {"packed": True, "dropout_p": 0.1},
)


def compile_call(
    arch: int, dtype: torch.dtype, D: int, *, mask: torch.dtype | None = None, bias: bool = False,
    lengths: bool = False, alibi: bool = False, packed: bool = False, left: int = -1,
    right: int = -1, softcap: float = 0.0, dropout_p: float = 0.0,
) -> Iterator[Compilation]:  # fmt: skip
    """The launches of one call on meta tensors; grouped heads wherever there is a diagonal."""
    B, S, Hq, Hkv = (1, 2048, 8, 4) if packed else (2, 1024, 8, 8 if right < 0 else 4)

    def meta(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def heads(count: int) -> Tensor:
        return meta(S, count, D).transpose(0, 1)[None] if packed else meta(B, count, S, D)

    cu = meta(9, dtype=torch.int32) if packed else None
    call = Call(
        arch, heads(Hq), heads(Hkv), heads(Hkv),
        None if mask is None else meta(B, 1, S, S, dtype=mask).expand(B, Hq, S, S),
        meta(1, Hq, S, S) if bias else None, meta(B, dtype=torch.int64) if lengths else None,
        meta(Hq, dtype=torch.float32) if alibi else None,
        meta(1, dtype=torch.int64) if dropout_p else None,
        right == 0, left, right, softcap, D**-0.5, dropout_p, cu, cu,
    )  # fmt: skip
    out, lse = heads(Hq), meta(B, Hq, S, dtype=torch.float32)
    gradients: list[Tensor | None] = [heads(Hq), heads(Hkv), heads(Hkv), call.bias]
    features = [
        f"{str(mask)[6:]} mask" * (mask is not None), "bias" * bias, "alibi" * alibi,
        "window" * (left > 0), "causal" * (right == 0), "softcap" * (softcap > 0),
        "dropout" * (dropout_p > 0), "packed" * packed,
    ]  # fmt: skip
    kind = " ".join([str(dtype)[6:], f"D{D}", *filter(None, features)])
    launches = forward_launches(call, out, lse)
    launches += backward_launches(call, heads(Hq), out, lse, gradients)
    for launch in launches:
        a, o = launch.arguments, launch.options
        name = "attention " + launch.kernel.__name__.removesuffix("_kernel").replace("_", " ")
        lists = "classes_ptr" in a
        tile = f"w{o['num_warps']}"
        if not lists:
            tile = f"{a['BLOCK_M']}x{a['BLOCK_N']} {tile} s{o['num_stages']}"
        # what design promises, less the one row that spills a little (configs.py); the small
        # kernels that list tiles keep 8 bytes on the stack in some rows, at 30 registers
        strict = not lists and (dtype != torch.float32 or D <= 64)
        strict = strict and not (arch == 100 and D == 256 and mask is not None and "dkv" in name)
        plain = D == 64 and right == 0 and arch != 86 and not any(features[:4] + features[5:])
        masked = D == 128 and mask == torch.bfloat16 and arch == 90
        quick = dtype == torch.bfloat16 and (plain or masked)
        tensor_core = not lists and (arch != 90 or D <= 128)
        yield Compilation(name, f"{kind} {tile}", launch, tensor_core, strict, quick)
