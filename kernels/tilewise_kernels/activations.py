"""What stands between two products: a = drop(act(h) * g), in each of its ways.

    forward    a = drop(act(h) * g)
    backward   r = drop(da)    dh = r * g * act'(h)    dg = r * act(h)

The gate g may be missing, and so may dropout, which a seed stands for (dropout.py). Each way is one
`Middle`; backward also finds a again, because nothing but h and g was kept. Memory bound: forward
reads h and g and writes a; backward reads da, h and g and writes dh, dg and a, in their memory
where it may.

Shapes: h, g, a, da, dh, dg [M, F]; a seed is int64 [1].
Source: GELU: Hendrycks and Gimpel 2016; SiLU: Elfwing et al. 2017; gates: Shazeer 2020.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import activation_triton, dropout, native

aten = torch.ops.aten


class Activation(NamedTuple):
    """An activation three times: formulas, torch's kernels, and what backward wants.

    formula(h), slope(h): act and its derivative, spelled out. value(h), overwrite(h): act, the
    latter in h's memory. gradient(grad, h) = grad * act'(h). keeps_h: backward needs h; where it is
    False slope and gradient take act(h) just as well. flops: of one element, transcendentals as 10.
    """

    formula: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]
    value: Callable[[Tensor], Tensor]
    overwrite: Callable[[Tensor], Tensor]
    gradient: Callable[[Tensor, Tensor], Tensor]
    keeps_h: bool
    flops: int


def _normal_cdf(h: Tensor) -> Tensor:
    return 0.5 * (1 + torch.erf(h / math.sqrt(2)))


def _gelu_slope(h: Tensor) -> Tensor:
    return _normal_cdf(h) + h * torch.exp(-0.5 * h * h) / math.sqrt(2 * math.pi)


def _tanh_cdf(h: Tensor) -> Tensor:
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))


def _gelu_tanh_slope(h: Tensor) -> Tensor:
    cdf = _tanh_cdf(h)
    return cdf + 2 * h * cdf * (1 - cdf) * math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * h * h)


def _swish_slope(h: Tensor, beta: float) -> Tensor:
    gate = torch.sigmoid(beta * h)
    return gate + beta * h * gate * (1 - gate)


ACTIVATIONS = {
    "gelu": Activation(
        formula=lambda h: h * _normal_cdf(h),
        slope=_gelu_slope,
        value=F.gelu,
        overwrite=aten.gelu_,
        gradient=aten.gelu_backward,
        keeps_h=True,
        flops=14,
    ),
    "gelu_tanh": Activation(
        formula=lambda h: h * _tanh_cdf(h),
        slope=_gelu_tanh_slope,
        value=lambda h: F.gelu(h, approximate="tanh"),
        overwrite=lambda h: aten.gelu_(h, approximate="tanh"),
        gradient=lambda grad, h: aten.gelu_backward(grad, h, approximate="tanh"),
        keeps_h=True,
        flops=18,
    ),
    "relu": Activation(
        formula=lambda h: h.clamp(min=0),
        slope=lambda y: (~(y <= 0)).to(y.dtype),  # 1 at NaN, as torch's own
        value=torch.relu,
        overwrite=torch.relu_,
        gradient=lambda grad, y: aten.threshold_backward(grad, y, 0),
        keeps_h=False,
        flops=1,
    ),
    "silu": Activation(
        formula=lambda h: h * torch.sigmoid(h),
        slope=lambda h: _swish_slope(h, 1.0),
        value=F.silu,
        overwrite=aten.silu_,
        gradient=aten.silu_backward,
        keeps_h=True,
        flops=12,
    ),
    "quick_gelu": Activation(
        formula=lambda h: h * torch.sigmoid(1.702 * h),
        slope=lambda h: _swish_slope(h, 1.702),
        value=lambda h: torch.sigmoid_(h * 1.702).mul_(h),
        overwrite=lambda h: h.mul_(torch.sigmoid_(h * 1.702)),
        # h sigmoid(1.702 h) is silu(1.702 h) / 1.702, so its derivative is silu'(1.702 h)
        gradient=lambda grad, h: aten.silu_backward(grad, h * 1.702),
        keeps_h=True,
        flops=13,
    ),
    "identity": Activation(
        formula=lambda h: h,
        slope=torch.ones_like,
        value=lambda h: h,
        overwrite=lambda h: h,
        gradient=lambda grad, y: grad,
        keeps_h=False,
        flops=0,
    ),
}


# -- the ways ------------------------------------------------------------------------------------


class Drop(NamedTuple):
    """Dropout with probability p; nothing is dropped without a seed."""

    seed: Tensor | None
    p: float


class Wanted(NamedTuple):
    """What a backward finds beside dh, and the memory it may use.

    a, dg: whether it finds them. over_da: dh may take da's memory; over_kept: a and dg may take
    h's and g's, or dh h's where there is no a.
    """

    a: bool
    dg: bool
    over_da: bool
    over_kept: bool


Backward = tuple[Tensor, Tensor | None, Tensor | None]  # dh, dg, a


class Middle(NamedTuple):
    """One way to compute what stands between the products.

    forward(h, g, drop, activation, overwrite) -> a, in h's memory if overwrite;
    backward(da, h, g, drop, activation, wanted) -> dh, dg, a (None where not wanted).
    """

    forward: Callable[[Tensor, Tensor | None, Drop, str, bool], Tensor]
    backward: Callable[[Tensor, Tensor, Tensor | None, Drop, str, Wanted], Backward]


def dropout_factors(drop: Drop, like: Tensor) -> Tensor | None:
    """What dropout multiplies the elements of `like` [M, F] with, or None."""
    if drop.seed is None:
        return None
    rows, columns = (torch.arange(n, device=like.device) for n in like.shape)
    kept = dropout.kept(drop.seed, rows[:, None], columns, drop.p)
    return kept.to(like.dtype) * dropout.scale(drop.p)


def _product(*factors: Tensor | None) -> Tensor:
    first, *others = (factor for factor in factors if factor is not None)
    for factor in others:
        first = first * factor
    return first


def _by_formula(
    value: Callable[[str, Tensor], Tensor], gradient: Callable[[str, Tensor, Tensor], Tensor]
) -> Middle:
    """Step by step from value(activation, h) and gradient(activation, grad, h)."""

    def forward(h: Tensor, g: Tensor | None, drop: Drop, activation: str, _: bool) -> Tensor:
        return _product(value(activation, h), g, dropout_factors(drop, h))

    def backward(
        da: Tensor, h: Tensor, g: Tensor | None, drop: Drop, activation: str, wanted: Wanted
    ) -> Backward:
        factors = dropout_factors(drop, h)
        r = _product(da, factors)
        act = value(activation, h) if wanted.a or wanted.dg else None
        dg = _product(r, act) if wanted.dg else None
        a = None if act is None else _product(act, g, factors)
        return gradient(activation, _product(r, g), h), dg, a

    return Middle(forward, backward)


REFERENCE = _by_formula(
    lambda activation, h: ACTIVATIONS[activation].formula(h),
    lambda activation, grad, h: grad * ACTIVATIONS[activation].slope(h),
)
TORCH_STEPS = _by_formula(
    lambda activation, h: ACTIVATIONS[activation].value(h),
    lambda activation, grad, h: ACTIVATIONS[activation].gradient(grad, h),
)


def _torch_forward(
    h: Tensor, g: Tensor | None, drop: Drop, activation: str, overwrite: bool
) -> Tensor:
    if overwrite and g is None and drop.seed is None:
        return ACTIVATIONS[activation].overwrite(h)
    return TORCH_STEPS.forward(h, g, drop, activation, overwrite)


TORCH = Middle(_torch_forward, TORCH_STEPS.backward)


def _fused(forward: Callable[..., None], backward: Callable[..., None]) -> Middle:
    """From kernels that write into given memory: forward(h, g, seed, activation, p, a) and
    backward(da, h, g, seed, activation, p, dh, dg, a)."""

    def run_forward(
        h: Tensor, g: Tensor | None, drop: Drop, activation: str, overwrite: bool
    ) -> Tensor:
        a = h if overwrite else torch.empty_like(h)
        forward(h, g, drop.seed, activation, drop.p, a)
        return a

    def run_backward(
        da: Tensor, h: Tensor, g: Tensor | None, drop: Drop, activation: str, wanted: Wanted
    ) -> Backward:
        da = da.contiguous()

        def place(kept: Tensor) -> Tensor:
            return kept if wanted.over_kept else torch.empty_like(kept)

        a = place(h) if wanted.a else None
        dg = place(g) if wanted.dg and g is not None else None
        dh = da if wanted.over_da else torch.empty_like(h) if wanted.a else place(h)
        backward(da, h, g, drop.seed, activation, drop.p, dh, dg, a)
        return dh, dg, a

    return Middle(run_forward, run_backward)


NATIVE = _fused(
    lambda *args: native.op("activation")(*args),
    lambda *args: native.op("activation_backward")(*args),
)
TRITON = _fused(activation_triton.forward, activation_triton.backward)
