"""A linear layer and its activation as one Triton kernel: y = act(x weight^T + bias).

Shapes: x [M, K]; weight [N, K]; bias [N]; y, h [M, N], h being what act is applied to.

A tiled matrix product in float32 (float32 input as three tf32 products, which keeps float32's
accuracy); bias and activation are applied to the finished tile before it leaves the registers, and
h is written beside y only where backward needs it. Programs are ordered in groups of row tiles, so
that those running together share rows of x and weight in L2.

The functions here launch kernels and nothing else: `feed_forward.py` validates and chooses.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .configs import linear_config
from .launch import Compilation, Launch, architecture
from .lazy_triton import jit, load

tl: Any = None  # triton.language once load() has run


@jit
def activate(h, ACTIVATION: tl.constexpr):
    """act(h) in float32."""
    if ACTIVATION == "gelu":
        y = 0.5 * h * (1.0 + tl.erf(h * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":  # 0.5 (1 + tanh(u)) = sigmoid(2 u)
        y = h * tl.sigmoid(1.5957691216057308 * (h + 0.044715 * h * h * h))
    elif ACTIVATION == "relu":
        y = tl.where(h < 0.0, 0.0, h)  # NaN stays NaN
    elif ACTIVATION == "silu":
        y = h * tl.sigmoid(h)
    elif ACTIVATION == "quick_gelu":
        y = h * tl.sigmoid(1.702 * h)
    else:
        y = h
    return y


@jit
def linear_kernel(
    x_ptr, weight_ptr, bias_ptr, y_ptr, h_ptr, M, N, K, stride_xm, stride_xk, stride_wn, stride_wk,
    ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr, EVEN_K: tl.constexpr, EVEN_MN: tl.constexpr,
):  # fmt: skip
    """One program: one tile of y, and of h where h_ptr is given.

    Programs that run together share rows of x and of weight: GROUP_M row tiles by all columns.
    """
    row_tiles = tl.cdiv(M, BLOCK_M)
    group_size = GROUP_M * tl.cdiv(N, BLOCK_N)
    first = tl.program_id(0) // group_size * GROUP_M
    height = tl.minimum(row_tiles - first, GROUP_M)
    place = tl.program_id(0) % group_size
    rows = (first + place % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = place // height * BLOCK_N + tl.arange(0, BLOCK_N)
    ks = tl.arange(0, BLOCK_K)
    # rows and columns past the end read real ones instead of a mask; their results are not stored
    x_ptrs = x_ptr + (rows % M).to(tl.int64)[:, None] * stride_xm
    x_ptrs += ks.to(tl.int64)[None, :] * stride_xk
    w_ptrs = weight_ptr + (cols % N).to(tl.int64)[None, :] * stride_wn
    w_ptrs += ks.to(tl.int64)[:, None] * stride_wk

    h = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_ptrs)
            w = tl.load(w_ptrs)
        else:
            x = tl.load(x_ptrs, mask=ks[None, :] < K - start, other=0.0)
            w = tl.load(w_ptrs, mask=ks[:, None] < K - start, other=0.0)
        h = tl.dot(x, w, h, input_precision="tf32x3")
        x_ptrs += BLOCK_K * stride_xk
        w_ptrs += BLOCK_K * stride_wk

    if bias_ptr is not None:
        h += tl.load(bias_ptr + cols % N).to(tl.float32)[None, :]
    places = rows.to(tl.int64)[:, None] * N + cols[None, :]
    inside = (rows[:, None] < M) & (cols[None, :] < N)
    y = activate(h, ACTIVATION).to(y_ptr.dtype.element_ty)
    if h_ptr is not None:
        if EVEN_MN:
            tl.store(h_ptr + places, h.to(h_ptr.dtype.element_ty))
        else:
            tl.store(h_ptr + places, h.to(h_ptr.dtype.element_ty), mask=inside)
    if EVEN_MN:
        tl.store(y_ptr + places, y)
    else:
        tl.store(y_ptr + places, y, mask=inside)


def linear_launch(
    arch: int,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    y: Tensor,
    h: Tensor | None,
) -> Launch:
    """Launch that fills y and, unless None, h; x is [M, K]."""
    (M, K), N = x.shape, weight.shape[0]
    config = linear_config(arch, x.dtype, K)
    arguments = {
        "x_ptr": x, "weight_ptr": weight, "bias_ptr": bias, "y_ptr": y, "h_ptr": h,
        "M": M, "N": N, "K": K, "stride_xm": x.stride(0), "stride_xk": x.stride(1),
        "stride_wn": weight.stride(0), "stride_wk": weight.stride(1), "ACTIVATION": activation,
        "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k,
        "GROUP_M": config.group_m, "EVEN_K": K % config.block_k == 0,
        "EVEN_MN": M % config.block_m == 0 and N % config.block_n == 0,
    }  # fmt: skip
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    grid = (-(-M // config.block_m) * -(-N // config.block_n),)
    return Launch(linear_kernel, grid, arguments, options | {"enable_fp_fusion": True})


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, y: Tensor, h: Tensor | None
) -> None:
    """Fill y and, unless None, h (both contiguous, any leading dims); x is [M, K].

    float16, bfloat16 or float32, one dtype; x and weight of any strides. activation: a name that
    `activate` knows. Raises ModuleNotFoundError without triton; arguments are not checked here.
    """
    load(globals())
    if y.numel() > 0:
        bias = None if bias is None else bias.contiguous()
        linear_launch(architecture(x.device), x, weight, bias, activation, y, h).run(x.device)


def compilations(arch: int) -> Iterator[Compilation]:
    """The launches worth compiling for `arch` where there is no GPU: activations and dtypes."""
    load(globals())
    for activation in ("gelu", "gelu_tanh", "relu", "silu", "quick_gelu", "identity"):
        yield _compilation(arch, torch.bfloat16, 1024, activation)
    yield _compilation(arch, torch.float16, 1000, "gelu")
    yield _compilation(arch, torch.float32, 1024, "gelu")


def _compilation(arch: int, dtype: torch.dtype, K: int, activation: str) -> Compilation:
    x, weight = (torch.empty(n, K, dtype=dtype, device="meta") for n in (2048, 4096))
    y, h = (torch.empty(2048, 4096, dtype=dtype, device="meta") for _ in range(2))
    launch = linear_launch(arch, x, weight, weight[:, 0], activation, y, h)
    a, o = launch.arguments, launch.options
    tile = f"{a['BLOCK_M']}x{a['BLOCK_N']}x{a['BLOCK_K']} w{o['num_warps']} s{o['num_stages']}"
    kind = f"{str(dtype)[6:]} K{K} {activation} {tile}"
    quick = activation == "gelu" and dtype == torch.bfloat16
    return Compilation("linear_act forward", kind, launch, True, True, quick)
