"""Activation, gate and dropout between two products, in Triton: one elementwise pass each way.

Shapes: h, g, a, da, dh, dg [M, F], contiguous; seed int64 [1].

    forward    a = drop(act(h) * g)
    backward   r = drop(da)    dh = r * g * act'(h)    dg = r * act(h)    a as in forward

Outputs may be the memory of inputs: a program reads all it needs before it writes.
The functions here launch kernels and nothing else: `activations.py` says when.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from . import dropout
from .configs import ACTIVATION
from .dropout import kept_at, mixed_rows
from .launch import Compilation, Launch
from .lazy_triton import jit, load

tl: Any = None  # triton.language once load() has run


@jit
def curve(h, ACTIVATION: tl.constexpr):
    """(act(h), act'(h)) in float32."""
    if ACTIVATION == "gelu":
        cdf = 0.5 * (1.0 + tl.erf(h * 0.7071067811865476))
        value = h * cdf
        slope = cdf + h * 0.3989422804014327 * tl.exp(-0.5 * h * h)
    elif ACTIVATION == "gelu_tanh":  # 0.5 (1 + tanh(u)) = sigmoid(2 u)
        s = tl.sigmoid(1.5957691216057308 * (h + 0.044715 * h * h * h))
        value = h * s
        slope = s + value * (1.0 - s) * (1.5957691216057308 * (1.0 + 3 * 0.044715 * h * h))
    elif ACTIVATION == "relu":
        value = tl.where(h < 0.0, 0.0, h)  # NaN stays NaN
        slope = tl.where(h <= 0.0, 0.0, 1.0)
    elif ACTIVATION == "silu":
        s = tl.sigmoid(h)
        value = h * s
        slope = s + value * (1.0 - s)
    elif ACTIVATION == "quick_gelu":
        s = tl.sigmoid(1.702 * h)
        value = h * s
        slope = s + 1.702 * value * (1.0 - s)
    else:
        value = h
        slope = h * 0.0 + 1.0
    return value, slope


@jit
def dropout_factor(seed_ptr, places, F, threshold, scale):
    """What dropout multiplies the elements at `places` of [M, F] with."""
    keep = kept_at(mixed_rows(tl.load(seed_ptr), places // F), places % F, threshold)
    return tl.where(keep, scale, 0.0)


@jit
def forward_kernel(
    h_ptr, g_ptr, seed_ptr, a_ptr, size, F, threshold, scale,
    ACTIVATION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK elements."""
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = places < size
    value, _ = curve(tl.load(h_ptr + places, mask=inside).to(tl.float32), ACTIVATION)
    if g_ptr is not None:
        value *= tl.load(g_ptr + places, mask=inside).to(tl.float32)
    if seed_ptr is not None:
        value *= dropout_factor(seed_ptr, places, F, threshold, scale)
    tl.store(a_ptr + places, value.to(a_ptr.dtype.element_ty), mask=inside)


@jit
def backward_kernel(
    da_ptr, h_ptr, g_ptr, seed_ptr, dh_ptr, dg_ptr, a_ptr, size, F, threshold, scale,
    ACTIVATION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK elements. dg and a are written where their pointers are given."""
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = places < size
    out = dh_ptr.dtype.element_ty
    value, slope = curve(tl.load(h_ptr + places, mask=inside).to(tl.float32), ACTIVATION)
    grad = tl.load(da_ptr + places, mask=inside).to(tl.float32)
    a = value
    if seed_ptr is not None:
        factor = dropout_factor(seed_ptr, places, F, threshold, scale)
        grad *= factor
        a *= factor
    if g_ptr is not None:
        gate = tl.load(g_ptr + places, mask=inside).to(tl.float32)
        if dg_ptr is not None:
            tl.store(dg_ptr + places, (grad * value).to(out), mask=inside)
        grad *= gate
        a *= gate
    tl.store(dh_ptr + places, (grad * slope).to(out), mask=inside)
    if a_ptr is not None:
        tl.store(a_ptr + places, a.to(out), mask=inside)


def activation_launch(
    pointers, h: Tensor, seed: Tensor | None, activation: str, p: float
) -> Launch:
    """The launch that uses `pointers`, arguments of one of the kernels: backward's has da_ptr."""
    kernel, name = forward_kernel, "forward"
    if "da_ptr" in pointers:
        kernel, name = backward_kernel, "backward"
    block, warps = ACTIVATION[name]
    arguments = pointers | {
        "h_ptr": h, "seed_ptr": seed, "size": h.numel(), "F": h.shape[-1],
        "threshold": dropout.threshold(p), "scale": dropout.scale(p),
        "ACTIVATION": activation, "BLOCK": block,
    }  # fmt: skip
    options = {"num_warps": warps, "enable_fp_fusion": True}
    return Launch(kernel, (-(-h.numel() // block),), arguments, options)


def forward(
    h: Tensor, g: Tensor | None, seed: Tensor | None, activation: str, p: float, a: Tensor
) -> None:
    """Fill a. Raises ModuleNotFoundError without triton; arguments are not checked here."""
    load(globals())
    if h.numel() > 0:
        pointers = {"g_ptr": g, "a_ptr": a}
        activation_launch(pointers, h, seed, activation, p).run(h.device)


def backward(
    da: Tensor,
    h: Tensor,
    g: Tensor | None,
    seed: Tensor | None,
    activation: str,
    p: float,
    dh: Tensor,
    dg: Tensor | None,
    a: Tensor | None,
) -> None:
    """Fill dh, and dg and a unless None."""
    load(globals())
    if h.numel() > 0:
        pointers = {"da_ptr": da, "g_ptr": g, "dh_ptr": dh, "dg_ptr": dg, "a_ptr": a}
        activation_launch(pointers, h, seed, activation, p).run(h.device)


def compilations(arch: int) -> Iterator[Compilation]:
    """The launches worth compiling for `arch` where there is no GPU: activations, gate, dropout."""
    load(globals())
    for activation in ("gelu", "gelu_tanh", "relu", "silu", "quick_gelu", "identity"):
        yield from _compilations(torch.bfloat16, activation, True, False)
    yield from _compilations(torch.bfloat16, "gelu", False, True)
    yield from _compilations(torch.float32, "silu", True, True)


def _compilations(
    dtype: torch.dtype, activation: str, gated: bool, drops: bool
) -> Iterator[Compilation]:
    h = torch.empty(4096, 11008, dtype=dtype, device="meta")
    g = h if gated else None
    seed = torch.empty(1, dtype=torch.int64, device="meta") if drops else None
    there = {"g_ptr": g, "a_ptr": h}
    back = there | {"da_ptr": h, "dh_ptr": h, "dg_ptr": g}
    kind = f"{str(dtype)[6:]} {activation}{' gate' * gated}{' dropout' * drops}"
    for name, pointers in (("forward", there), ("backward", back)):
        launch = activation_launch(pointers, h, seed, activation, 0.1)
        quick = activation == "silu" and dtype == torch.bfloat16
        yield Compilation(f"activation {name}", kind, launch, False, True, quick)
