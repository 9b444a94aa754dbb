"""Decode attention in Triton: few queries against a long cache, the positions split over programs.

Shapes, the same names throughout:
    q, out            [R, Hq, Sq, D]      lengths        [R]
    k_cache, v_cache  [C, Hkv, T, D]      beam_index     [R, N], the cache row of position t
    part  [R, Hkv, splits, M, D] float32  block_table    [R, N], the page of position t at t // T
    lse   [R, Hkv, splits, M] float32     alibi_slopes   [Hq]; bias [R, Hq, Sq, capacity]
M = Hq / Hkv * Sq: the queries that share a key head are the rows of one tile, padded to the 16 that
a tensor core takes, so that a group of any size reads each key once.

How it works. With one query per row there are too few heads to fill a GPU, so each program takes a
stretch of the positions (a split) and leaves its own normalised output and log-sum-exp (in log2
units, -inf where it saw nothing); a second kernel adds up the splits of a query in order, each
weighed by 2^(lse - largest lse). The number of splits follows from the shapes and the chip alone:
lengths stay on the device, and the result is the same bits on every run. A call that needs one
split writes its output at once.

Keys and values are read where they lie: beam_index and block_table only change addresses. Positions
at or past lengths, or left of every query's window, are never read.

Cost. 4 R Hq Sq T D FLOPs (times 16 / M where M < 16, on tensor cores that would idle); bytes: the
cached keys and values once, and 4 R Hq Sq D splits twice. float32 is three TF32 products.

The functions here launch kernels and nothing else: validation, autograd and the choice between
this and other implementations live in `decode_attention.py`.
"""

# mypy: allow-untyped-defs
# (Triton kernels have no Python types)

from __future__ import annotations  # tl.constexpr below is not evaluated at import

import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .configs import DECODE_COMBINE, decode_config
from .launch import Compilation, Launch, architecture, multiprocessors, padded, strides
from .lazy_triton import jit, load

tl: Any = None  # triton.language once load() has run


@jit
def read_cache(
    ptr, source, at, inside, stride_row, stride_n, stride_d,
    D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Tile [BLOCK_N, BLOCK_D]: position at[n] of cache row or page source[n], 0 where outside."""
    cols = tl.arange(0, BLOCK_D)
    starts = source * stride_row + at.to(tl.int64) * stride_n
    ptrs = ptr + starts[:, None] + cols.to(tl.int64)[None, :] * stride_d
    return tl.load(ptrs, mask=inside[:, None] & (cols[None, :] < D), other=0.0)


@jit
def split_kernel(
    q_ptr, k_ptr, v_ptr, lengths_ptr, table_ptr, slopes_ptr, bias_ptr, out_ptr, part_ptr, lse_ptr,
    scale_log2, C, Hkv, group, Sq, capacity, splits, split_size, left,
    stride_qr, stride_qh, stride_qm, stride_qd, stride_kr, stride_kh, stride_kn, stride_kd,
    stride_vr, stride_vh, stride_vn, stride_vd, stride_lengths, stride_table_r, stride_table_n,
    stride_slopes, stride_bias_r, stride_bias_h, stride_bias_m, stride_bias_n,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    LOOKUP: tl.constexpr, PAGE: tl.constexpr, WINDOW: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M queries of one key head against one split of a row's positions.

    Grid: splits (fastest) x query blocks x Hkv x R. WHOLE: there is one split, out is final.
    """
    M = group * Sq
    blocks = tl.cdiv(M, BLOCK_M)
    split = tl.program_id(0) % splits
    block = tl.program_id(0) // splits % blocks
    pair = (tl.program_id(0) // splits // blocks).to(tl.int64)
    head = pair % Hkv
    row = pair // Hkv
    m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    query = m % Sq
    query_head = head * group + m // Sq

    length = tl.load(lengths_ptr + row * stride_lengths)
    length = tl.minimum(tl.maximum(length, 0), capacity).to(tl.int32)
    last = length - Sq + query  # the position of each query
    begin = split * split_size
    end = tl.minimum(begin + split_size, length)
    if WINDOW:
        begin = tl.maximum(begin, length - Sq - left)

    cols = tl.arange(0, BLOCK_D)
    q_rows = row * stride_qr + query_head * stride_qh + query.to(tl.int64) * stride_qm
    q_ptrs = q_ptr + q_rows[:, None] + cols.to(tl.int64)[None, :] * stride_qd
    q = tl.load(q_ptrs, mask=(m[:, None] < M) & (cols[None, :] < D), other=0.0)
    k_ptr += head * stride_kh
    v_ptr += head * stride_vh
    if slopes_ptr is not None:
        slopes = tl.load(slopes_ptr + query_head * stride_slopes, mask=m < M, other=0.0)
        slopes = slopes.to(tl.float32) * 1.4426950408889634
    if bias_ptr is not None:
        bias_rows = row * stride_bias_r + query_head * stride_bias_h
        bias_rows += query.to(tl.int64) * stride_bias_m

    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    for start in range(begin, end, BLOCK_N):
        t = start + tl.arange(0, BLOCK_N)
        inside = t < end
        at = t
        if LOOKUP == "own":
            source = row + tl.zeros([BLOCK_N], dtype=tl.int64)
        else:
            entry = t
            if LOOKUP == "page":
                entry = t // PAGE
                at = t % PAGE
            entries = table_ptr + row * stride_table_r + entry.to(tl.int64) * stride_table_n
            source = tl.load(entries, mask=inside, other=0)
            source = tl.minimum(tl.maximum(source, 0), C - 1).to(tl.int64)  # never out of the cache
        k = read_cache(k_ptr, source, at, inside, stride_kr, stride_kn, stride_kd, D, BLOCK_D)
        scores = tl.dot(q, tl.trans(k), input_precision="tf32x3") * scale_log2
        distance = last[:, None] - t[None, :]
        keep = inside[None, :] & (distance >= 0)
        if WINDOW:
            keep = keep & (distance <= left)
        if slopes_ptr is not None:
            scores -= slopes[:, None] * distance.to(tl.float32)
        if bias_ptr is not None:
            bias_ptrs = bias_ptr + bias_rows[:, None] + t.to(tl.int64)[None, :] * stride_bias_n
            bias = tl.load(bias_ptrs, mask=keep & (m[:, None] < M), other=0.0).to(tl.float32)
            keep = keep & (bias != float("-inf"))
            scores += tl.maximum(bias, -2.3e38) * 1.4426950408889634  # finfo.min stays finite
        scores = tl.where(keep, scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        origin = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        p = tl.exp2(scores - origin[:, None])
        fade = tl.exp2(peak - origin)
        total = total * fade + tl.sum(p, 1)
        v = read_cache(v_ptr, source, at, inside, stride_vr, stride_vn, stride_vd, D, BLOCK_D)
        acc = tl.dot(p.to(v.dtype), v, acc * fade[:, None], input_precision="tf32x3")
        peak = new_peak

    safe = tl.where(total == 0.0, 1.0, total)
    acc = acc / safe[:, None]
    mask = (m[:, None] < M) & (cols[None, :] < D)
    if WHOLE:
        # query_head * Sq + query, counted over the rows: head * M + m
        rows = pair * M + m
        tl.store(
            out_ptr + rows[:, None] * D + cols[None, :], acc.to(out_ptr.dtype.element_ty), mask
        )
    else:
        rows = (pair * splits + split) * M + m
        tl.store(part_ptr + rows[:, None] * D + cols[None, :], acc, mask)
        tl.store(lse_ptr + rows, peak + tl.log2(safe), m < M)


@jit
def combine_kernel(
    part_ptr, lse_ptr, out_ptr, M, splits,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """One program: one query's output from its splits. Grid: R x Hkv x M."""
    pair = (tl.program_id(0) // M).to(tl.int64)
    m = tl.program_id(0) % M
    cols = tl.arange(0, BLOCK_D)
    top = float("-inf")
    for start in range(0, splits, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        rows = (pair * splits + s) * M + m
        top = tl.maximum(top, tl.max(tl.load(lse_ptr + rows, s < splits, float("-inf")), 0))
    origin = tl.where(top == float("-inf"), 0.0, top)  # no split saw a key: every weight is 0
    acc = tl.zeros([BLOCK_D], dtype=tl.float32)
    total = 0.0
    for start in range(0, splits, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        rows = (pair * splits + s) * M + m
        weight = tl.exp2(tl.load(lse_ptr + rows, s < splits, float("-inf")) - origin)
        mask = (s[:, None] < splits) & (cols[None, :] < D)
        part = tl.load(part_ptr + rows[:, None] * D + cols[None, :], mask, 0.0)
        acc += tl.sum(part * weight[:, None], 0)
        total += tl.sum(weight, 0)
    out = acc / tl.where(total == 0.0, 1.0, total)
    out_ptrs = out_ptr + (pair * M + m) * D + cols
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=cols < D)


# ---- launchers ---------------------------------------------------------------------------------


class Call(NamedTuple):
    """The canonical arguments of decode_attention, and the architecture they run on."""

    arch: int
    processors: int
    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    lengths: Tensor
    beam_index: Tensor | None
    block_table: Tensor | None
    scale: float
    alibi_slopes: Tensor | None
    left: int
    bias: Tensor | None


def forward(
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
) -> Tensor:
    """Attention of each row's newest queries to its cached positions: [R, Hq, Sq, D] in q's dtype.

    Arguments as in `decode_attention`; left is -1 where the window has no bound. Rows without a
    position give 0. Lengths outside the capacity, and rows or pages outside the cache, are brought
    to the nearest that is there. Raises ModuleNotFoundError without triton; nothing is checked.
    """
    load(globals())
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    arch, processors = architecture(q.device), multiprocessors(q.device)
    call = Call(arch, processors, q, k_cache, v_cache, lengths, beam_index, block_table, scale,
                alibi_slopes, left, bias)  # fmt: skip
    if out.numel() == 0 or capacity_of(call) == 0:
        return out.zero_()
    M, splits = q.shape[1] // k_cache.shape[1] * q.shape[2], split_positions(call)[0]
    if splits == 1:
        split_launch(call, out, None, None).run(q.device)
        return out
    pairs = q.shape[0] * k_cache.shape[1]
    part = torch.empty((pairs, splits, M, q.shape[3]), dtype=torch.float32, device=q.device)
    lse = torch.empty((pairs, splits, M), dtype=torch.float32, device=q.device)
    split_launch(call, out, part, lse).run(q.device)
    combine_launch(part, lse, out).run(q.device)
    return out


def split_launch(call: Call, out: Tensor, part: Tensor | None, lse: Tensor | None) -> Launch:
    """Launch that fills part and lse, or out where they are None: then there is one split."""
    q, k, v, table = call.q, call.k_cache, call.v_cache, call.beam_index
    table = call.block_table if table is None else table
    (R, Hq, Sq, D), (C, Hkv, T) = q.shape, k.shape[:3]
    M, capacity = Hq // Hkv * Sq, capacity_of(call)
    bias = None if call.bias is None else call.bias.expand(R, Hq, Sq, capacity)
    splits, split_size = split_positions(call)
    config = decode_config(call.arch, q.dtype, D, M)
    optional = {"table_ptr": table, "slopes_ptr": call.alibi_slopes, "bias_ptr": bias}
    arguments = {
        "q_ptr": q, "k_ptr": k, "v_ptr": v, "lengths_ptr": call.lengths, **optional,
        "out_ptr": out, "part_ptr": part, "lse_ptr": lse,
        "scale_log2": call.scale * math.log2(math.e), "C": C, "Hkv": Hkv, "group": Hq // Hkv,
        "Sq": Sq, "capacity": capacity, "splits": splits, "split_size": split_size,
        "left": min(call.left, capacity), "stride_lengths": call.lengths.stride(0),
        **strides("q", "rhmd", q), **strides("k", "rhnd", k), **strides("v", "rhnd", v),
        **strides("table", ("_r", "_n"), table), **strides("slopes", ("",), call.alibi_slopes),
        **strides("bias", ("_r", "_h", "_m", "_n"), bias),
        "D": D, "BLOCK_D": padded(D), "BLOCK_M": config.block_m, "BLOCK_N": config.block_n,
        "LOOKUP": "beam" if call.beam_index is not None else "own" if table is None else "page",
        "PAGE": 1 if call.block_table is None else T, "WINDOW": call.left >= 0,
        "WHOLE": part is None,
    }  # fmt: skip
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    grid = (splits * -(-M // config.block_m) * Hkv * R,)
    return Launch(split_kernel, grid, arguments, options | {"enable_fp_fusion": True})


def combine_launch(part: Tensor, lse: Tensor, out: Tensor) -> Launch:
    """Launch that fills out from part and lse."""
    pairs, splits, M, D = part.shape
    step, warps = DECODE_COMBINE
    arguments = {
        "part_ptr": part, "lse_ptr": lse, "out_ptr": out, "M": M, "splits": splits,
        "D": D, "BLOCK_D": padded(D), "BLOCK_S": step,
    }  # fmt: skip
    return Launch(combine_kernel, (pairs * M,), arguments, {"num_warps": warps, "num_stages": 1})


def capacity_of(call: Call) -> int:
    """Positions that a row can have: an upper bound on the lengths that is known without them."""
    if call.beam_index is not None:
        return call.beam_index.shape[1]
    pages = 1 if call.block_table is None else call.block_table.shape[1]
    return pages * call.k_cache.shape[2]


def split_positions(call: Call) -> tuple[int, int]:
    """(splits, positions of a split)."""
    Hkv, M = call.k_cache.shape[1], call.q.shape[1] // call.k_cache.shape[1] * call.q.shape[2]
    config = decode_config(call.arch, call.q.dtype, call.q.shape[3], M)
    programs = call.q.shape[0] * Hkv * -(-M // config.block_m)
    slots = call.processors * config.programs
    return divide(capacity_of(call), config.block_n, programs, slots)


@functools.cache
def divide(capacity: int, block_n: int, programs: int, slots: int) -> tuple[int, int]:
    """(splits, positions of a split), for `programs` per split, `slots` of which run at a time.

    The choice that ends first when each wave of programs takes as long as its tiles and one more,
    which stands for the start of a program and for its share of the combination.
    """
    tiles = -(-capacity // block_n)

    def time(splits: int) -> int:
        return -(-programs * splits // slots) * (-(-tiles // splits) + 1)

    wanted = min(range(1, max(1, min(64, tiles // 2)) + 1), key=time)
    size = -(-tiles // wanted) * block_n
    return -(-capacity // size), size


# ---- ahead-of-time compilation -----------------------------------------------------------------


def compilations(arch: int) -> Iterator[Compilation]:
    """The launches worth compiling for `arch` where there is no GPU: every row of the table.

    Each row is compiled plain, and with what makes its code largest: beams, a window, ALiBi and a
    bias. Two more: pages, and a group of 64 queries.
    """
    for dtype in (torch.bfloat16, torch.float32):
        for D in (32, 64, 128, 256):
            for everything in (False, True):
                yield from compile_call(arch, dtype, D, 4, "beam" if everything else "own",
                                        everything)  # fmt: skip
    yield from compile_call(arch, torch.float16, 80, 3, "page", everything=False)
    yield from compile_call(arch, torch.bfloat16, 128, 64, "page", everything=False)


def compile_call(
    arch: int, dtype: torch.dtype, D: int, group: int, lookup: str, everything: bool
) -> Iterator[Compilation]:
    """The two launches of one call on meta tensors: 4 rows, 8 key heads, 8192 positions."""
    load(globals())
    R, Hkv, T = 4, 8, 8192
    q, out = (torch.empty(R, group * Hkv, 1, D, dtype=dtype, device="meta") for _ in range(2))
    cache = torch.empty(R, Hkv, T, D, dtype=dtype, device="meta")
    pages = torch.empty(R * T // 64, Hkv, 64, D, dtype=dtype, device="meta")
    keys = pages if lookup == "page" else cache
    table = torch.empty(R, T, dtype=torch.int32, device="meta")
    slopes = torch.empty(group * Hkv, device="meta") if everything else None
    bias = torch.empty(1, group * Hkv, 1, T, dtype=dtype, device="meta") if everything else None
    lengths = torch.empty(R, dtype=torch.int64, device="meta")
    call = Call(arch, 132, q, keys, keys, lengths, table if lookup == "beam" else None,
                table[:, : T // 64] if lookup == "page" else None, D**-0.5, slopes,
                1000 if everything else -1, bias)  # fmt: skip
    splits = split_positions(call)[0]
    part = torch.empty(R * Hkv, splits, group, D, device="meta")
    lse = torch.empty(R * Hkv, splits, group, device="meta")
    config = decode_config(arch, dtype, D, group)
    tile = f"{config.block_m}x{config.block_n} w{config.num_warps} s{config.num_stages}"
    kind = f"{str(dtype)[6:]} D{D} {lookup}{' window alibi bias' * everything} {tile}"
    strict = dtype != torch.float32 or D <= 64
    quick = dtype == torch.bfloat16 and D == 128 and arch in (80, 90, 100)
    # wgmma and tcgen05 take 64 rows and more; a smaller tile is mma.sync everywhere
    tensor_core = arch < 90 or config.block_m >= 64
    yield Compilation("decode split", kind, split_launch(call, out, part, lse), tensor_core,
                      strict, quick)  # fmt: skip
    if lookup == "own":
        kind = f"{str(dtype)[6:]} D{D} {splits} splits"
        yield Compilation("decode combine", kind, combine_launch(part, lse, out), False, True,
                          quick)  # fmt: skip
