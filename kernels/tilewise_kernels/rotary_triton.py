"""Rotary position embedding in Triton: queries and keys in one launch.

Shapes: q [B, Hq, S, D]; k [B, Hkv, S, D]; cos, sin [B or 1, S, R/2]; the first R columns turn.

A program takes TOKENS consecutive tokens of one sequence and up to HEADS heads of q or of k: it
reads their cosines and sines once and turns head after head.

The functions here launch kernels and nothing else: `rotary.py` validates and chooses.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .configs import rotary_config
from .launch import Compilation, Launch, strides
from .lazy_triton import jit, load

tl: Any = None  # triton.language once load() has run


@jit
def turn_head(
    x_ptr, y_ptr, stride_xs, stride_ys, cos, sin, tokens, S, D, half,
    INTERLEAVED: tl.constexpr, BLOCK: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """Turn the rows `tokens` of one head; x_ptr and y_ptr point to its row 0."""
    js = tl.arange(0, BLOCK)
    x_ptrs = x_ptr + tokens.to(tl.int64)[:, None] * stride_xs
    y_ptrs = y_ptr + tokens.to(tl.int64)[:, None] * stride_ys
    inside = (tokens[:, None] < S) & (js[None, :] < half)
    if INTERLEAVED:
        places = (2 * js[:, None] + tl.arange(0, 2)[None, :])[None, :, :]
        both = tl.load(x_ptrs[:, :, None] + places, mask=inside[:, :, None], other=0.0)
        a, b = tl.split(both.to(tl.float32))
        turned = tl.join(a * cos - b * sin, b * cos + a * sin)
        turned = turned.to(y_ptr.dtype.element_ty)
        tl.store(y_ptrs[:, :, None] + places, turned, mask=inside[:, :, None])
    else:
        a = tl.load(x_ptrs + js[None, :], mask=inside, other=0.0).to(tl.float32)
        b = tl.load(x_ptrs + half + js[None, :], mask=inside, other=0.0).to(tl.float32)
        out = y_ptr.dtype.element_ty
        tl.store(y_ptrs + js[None, :], (a * cos - b * sin).to(out), mask=inside)
        tl.store(y_ptrs + half + js[None, :], (b * cos + a * sin).to(out), mask=inside)
    if REST > 0:
        columns = 2 * half + tl.arange(0, REST)
        inside = (tokens[:, None] < S) & (columns[None, :] < D)
        rest = tl.load(x_ptrs + columns[None, :], mask=inside)
        tl.store(y_ptrs + columns[None, :], rest, mask=inside)


@jit
def rotary_kernel(
    q_ptr, k_ptr, cos_ptr, sin_ptr, yq_ptr, yk_ptr, S, D, half, q_heads, k_heads,
    stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_ks,
    stride_yqb, stride_yqh, stride_yqs, stride_ykb, stride_ykh, stride_yks,
    stride_cb, stride_cs, stride_cj, stride_sb, stride_ss, stride_sj,
    INVERSE: tl.constexpr, INTERLEAVED: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr,
    BLOCK: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """One program: TOKENS tokens by HEADS heads, of q first and then of k."""
    q_groups = tl.cdiv(q_heads, HEADS)
    groups = q_groups + tl.cdiv(k_heads, HEADS)
    group = tl.program_id(0) % groups
    place = tl.program_id(0) // groups
    batch = (place // tl.cdiv(S, TOKENS)).to(tl.int64)
    tokens = place % tl.cdiv(S, TOKENS) * TOKENS + tl.arange(0, TOKENS)
    js = tl.arange(0, BLOCK)
    inside = (tokens[:, None] < S) & (js[None, :] < half)
    rows, columns = tokens.to(tl.int64)[:, None], js.to(tl.int64)[None, :]
    cos_ptrs = cos_ptr + batch * stride_cb + rows * stride_cs + columns * stride_cj
    sin_ptrs = sin_ptr + batch * stride_sb + rows * stride_ss + columns * stride_sj
    cos = tl.load(cos_ptrs, mask=inside, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptrs, mask=inside, other=0.0).to(tl.float32)
    if INVERSE:
        sin = -sin
    if group < q_groups:
        first = group * HEADS
        x_ptr = q_ptr + batch * stride_qb + first.to(tl.int64) * stride_qh
        y_ptr = yq_ptr + batch * stride_yqb + first.to(tl.int64) * stride_yqh
        for _ in range(tl.minimum(HEADS, q_heads - first)):
            turn_head(
                x_ptr, y_ptr, stride_qs, stride_yqs, cos, sin, tokens, S, D, half,
                INTERLEAVED, BLOCK, REST,
            )  # fmt: skip
            x_ptr += stride_qh
            y_ptr += stride_yqh
    else:
        first = (group - q_groups) * HEADS
        x_ptr = k_ptr + batch * stride_kb + first.to(tl.int64) * stride_kh
        y_ptr = yk_ptr + batch * stride_ykb + first.to(tl.int64) * stride_ykh
        for _ in range(tl.minimum(HEADS, k_heads - first)):
            turn_head(
                x_ptr, y_ptr, stride_ks, stride_yks, cos, sin, tokens, S, D, half,
                INTERLEAVED, BLOCK, REST,
            )  # fmt: skip
            x_ptr += stride_kh
            y_ptr += stride_ykh


def _padded(columns: int) -> int:
    return 1 << (columns - 1).bit_length() if columns > 0 else 0


def rotary_launch(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool,
    inverse: bool,
    outputs: tuple[Tensor, Tensor],
) -> Launch:
    """Launch that fills `outputs`; q, k and outputs have column stride 1, cos and sin 3 dims."""
    (B, q_heads, S, D), half = q.shape, cos.shape[-1]
    block, rest = max(_padded(half), 1), _padded(D - 2 * half)
    config = rotary_config(S, 2 * block + rest, interleaved)
    cos, sin = cos.expand(B, -1, -1), sin.expand(B, -1, -1)
    arguments = {
        "q_ptr": q, "k_ptr": k, "cos_ptr": cos, "sin_ptr": sin,
        "yq_ptr": outputs[0], "yk_ptr": outputs[1],
        "S": S, "D": D, "half": half, "q_heads": q_heads, "k_heads": k.shape[1],
        **strides("q", "bhs", q), **strides("k", "bhs", k),
        **strides("yq", "bhs", outputs[0]), **strides("yk", "bhs", outputs[1]),
        **strides("c", "bsj", cos), **strides("s", "bsj", sin),
        "INVERSE": inverse, "INTERLEAVED": interleaved, "TOKENS": config.tokens,
        "HEADS": config.heads, "BLOCK": block, "REST": rest,
    }  # fmt: skip
    groups = -(-q_heads // config.heads) + -(-k.shape[1] // config.heads)
    options = {"num_warps": config.num_warps, "enable_fp_fusion": True}
    return Launch(rotary_kernel, (B * -(-S // config.tokens) * groups,), arguments, options)


def _unit_column_stride(x: Tensor) -> Tensor:
    return x if x.shape[-1] <= 1 or x.stride(-1) == 1 else x.contiguous()


def _empty_like(x: Tensor) -> Tensor:
    """Of x's layout, if that has columns of stride 1."""
    y = torch.empty_like(x)
    return y if y.stride(-1) == 1 else torch.empty_like(x, memory_format=torch.contiguous_format)


def _run(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool
) -> tuple[Tensor, Tensor]:
    load(globals())
    q, k = _unit_column_stride(q), _unit_column_stride(k)
    outputs = _empty_like(q), _empty_like(k)
    if outputs[0].numel() > 0 or outputs[1].numel() > 0:
        cos, sin = (t if t.dim() == 3 else t[None] for t in (cos, sin))
        rotary_launch(q, k, cos, sin, interleaved, inverse, outputs).run(q.device)
    return outputs


def turn(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool
) -> tuple[Tensor, Tensor]:
    """q and k turned; the arguments are the op's."""
    return _run(q, k, cos, sin, interleaved, False)


def turn_back(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool
) -> tuple[Tensor, Tensor]:
    """q and k turned by the opposite angles."""
    return _run(q, k, cos, sin, interleaved, True)


def compilations(arch: int) -> Iterator[Compilation]:
    """The launches worth compiling for `arch` where there is no GPU: pairs, widths, directions."""
    load(globals())
    for interleaved in (False, True):
        for S, D, R in ((2048, 64, 64), (2048, 128, 128), (1, 128, 128), (2048, 80, 20)):
            for dtype in (torch.bfloat16, torch.float32):
                yield _compilation(dtype, S, D, R, interleaved)


def _compilation(dtype: torch.dtype, S: int, D: int, R: int, interleaved: bool) -> Compilation:
    q, k = (torch.empty(2, S, h, D, dtype=dtype, device="meta").transpose(1, 2) for h in (32, 8))
    cos = torch.empty(1, S, R // 2, device="meta")
    launch = rotary_launch(q, k, cos, cos, interleaved, False, (q, k))
    a, o = launch.arguments, launch.options
    tile = f"{a['TOKENS']}x{a['BLOCK']} w{o['num_warps']}"
    pairs = "interleaved" if interleaved else "halves"
    kind = f"{str(dtype)[6:]} S{S} D{D} R{R} {pairs} {tile}"
    quick = S > 1 and D == 128 and dtype == torch.bfloat16
    return Compilation("rotary", kind, launch, False, True, quick)
