"""What layer_norm and rms_norm share: y is the norm of s = dropout(x) + residual.

Canonical arguments, of both ops and of every way to run them:

    x, residual, weight, bias, seed, eps, dropout_p, wants_sum, wants_statistics

seed is there where dropout_p > 0. wants_sum: s is a result or is kept for backward; without a
residual and without dropout it is x itself and nothing is stored. wants_statistics: a gradient will
be asked for. rms_norm has no bias, and leaves the mean empty: it stands where layer_norm's is.

Shapes: x, residual, s, y [..., N], seen as [M, N] inside; weight, bias [N]; mean, rstd [..., 1];
seed [1].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import lazy_triton, native, norm_triton
from .checks import (
    fail,
    has_shape,
    is_flag,
    is_float_tensor,
    is_number,
    is_probability,
    same_device,
)
from .dropout import draw_seed, kept, scale
from .launch import refuses
from .op import Cost, Implementation, Op, accumulator, autocast_dtype, tracked

HALF = (torch.float16, torch.bfloat16)

Outputs = tuple[Tensor, Tensor, Tensor, Tensor]  # y, s, mean, rstd; what is not wanted is empty
Gradients = tuple[Tensor | None, ...]  # of x, residual, weight and bias; None where not wanted
Needs = Sequence[bool]  # which of them are wanted


def cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """tensor.to(dtype), without the cost of a call that has nothing to do."""
    return tensor if tensor is None or tensor.dtype == dtype else tensor.to(dtype)


# -- in torch, for the ways that are written in it -------------------------------------------------


def _dropped(tensor: Tensor, seed: Tensor, p: float) -> Tensor:
    """What dropout leaves of tensor [..., N], in the dtype that sums are kept in."""
    columns = tensor.shape[-1]
    rows = torch.arange(tensor.shape[:-1].numel(), device=tensor.device)
    keep = kept(seed, rows[:, None], torch.arange(columns, device=tensor.device), p)
    wide = tensor.to(accumulator(tensor.dtype))
    return (wide * scale(p)).where(keep.view(tensor.shape), 0)


def summed(x: Tensor, residual: Tensor | None, seed: Tensor | None, p: float) -> Tensor:
    """s: x itself, or dropout(x) + residual, contiguous, in the wider of their two dtypes."""
    if seed is None:
        return x if residual is None else (x + residual).contiguous()
    s = _dropped(x, seed, p)
    s = s if residual is None else s + residual
    return s.to(x.dtype if residual is None else residual.dtype).contiguous()


def split(ds: Tensor, seed: Tensor | None, p: float, x_dtype: torch.dtype, needs: Needs) -> list:
    """The gradients of x and residual, given that of their sum."""
    ds = ds.contiguous()
    dx = ds if seed is None or not needs[0] else _dropped(ds, seed, p)
    return [cast(dx, x_dtype) if needs[0] else None, ds if needs[1] else None]


def outputs(
    x: Tensor, s: Tensor, y: Tensor, mean: Tensor | None, rstd: Tensor, *, keep: Sequence[bool]
) -> Outputs:
    """The results of a way written in torch; keep: (wants_sum, wants_statistics)."""
    none = [x.new_empty(0) for _ in range(3)]
    return (
        y.to(x.dtype).contiguous(),
        s if keep[0] and s is not x else none[0],
        mean.contiguous() if keep[1] and mean is not None else none[1],
        rstd.contiguous() if keep[1] else none[2],
    )


def reference_gradients(
    grad: Tensor,
    grad_s: Tensor | None,
    s: Tensor,
    weight: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    seed: Tensor | None,
    x_dtype: torch.dtype,
    weight_dtype: torch.dtype,
    dropout_p: float,
    needs: Needs,
) -> Gradients:
    """ds = rstd * (g - mean(g) - n * mean(g * n)) + grad_s; without a mean, no mean(g)."""
    rows, wide = s.shape[:-1].numel(), rstd.dtype
    grad, centred = grad.to(wide), s.to(wide) if mean is None else s.to(wide) - mean
    normal = centred * rstd
    g = grad if weight is None else grad * weight
    ds = g - normal * (g * normal).mean(-1, keepdim=True)
    ds = (ds if mean is None else ds - g.mean(-1, keepdim=True)) * rstd
    ds = (ds if grad_s is None else ds + grad_s).to(s.dtype)
    sums = [
        each.reshape(rows, s.shape[-1]).sum(0).to(weight_dtype) for each in (grad * normal, grad)
    ]
    return *split(ds, seed, dropout_p, x_dtype, needs), *sums


def _backward(gradients: Callable[..., Gradients]) -> Callable[..., Gradients]:
    """The op's backward on top of a function for the case that y has a gradient."""

    def backward(grad: Tensor | None, grad_s: Tensor | None, s: Tensor, *rest: Any) -> Gradients:
        if grad_s is not None and grad_s.shape != s.shape:
            grad_s = None  # belongs to the empty stand-in for an absent sum
        if grad is not None:
            return gradients(grad, grad_s, s, *rest)
        assert grad_s is not None, "a backward without any gradient"
        *_, seed, x_dtype, weight_dtype, dropout_p, needs = rest
        own = grad_s.clone(memory_format=torch.contiguous_format)
        zeros = [s.new_zeros(s.shape[-1], dtype=weight_dtype) for _ in range(2)]
        return *split(own, seed, dropout_p, x_dtype, needs), *zeros

    return backward


# -- the ops ---------------------------------------------------------------------------------------


def torch_way(
    name: str,
    forward: Callable[..., Outputs],
    gradients: Callable[..., Gradients],
    **options: Callable[..., str | None],
) -> Implementation:
    """A way written in torch; options are Implementation's."""
    return Implementation(name, forward, _backward(gradients), **options)  # type: ignore[arg-type]


def _native_way(rms: bool) -> Implementation:
    def forward(
        x: Tensor,
        residual: Any,
        weight: Any,
        bias: Any,
        seed: Any,
        eps: float,
        p: float,
        *keep: bool,
    ) -> Outputs:
        return native.op("norm_forward")(x, residual, weight, bias, seed, eps, p, rms, *keep)

    def gradients(*args: Any) -> Gradients:
        *tensors, _, weight_dtype, dropout_p, needs = args
        return native.op("norm_backward")(*tensors, weight_dtype, dropout_p, needs)

    return Implementation(
        "native", forward, _backward(gradients), devices=("cpu",), missing=native.missing
    )


def _triton_way(rms: bool) -> Implementation:
    return Implementation(
        "triton",
        lambda *args: norm_triton.forward(*args, rms=rms),
        _backward(norm_triton.gradients),
        devices=("cuda",),
        missing=lazy_triton.missing,
        refuses=lambda x, *_: refuses(x),
        refuses_backward=lambda grad, grad_s, s, *_: refuses(s),
    )


def _fake(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    eps: float,
    dropout_p: float,
    wants_sum: bool,
    wants_statistics: bool,
    *,
    rms: bool,
) -> Outputs:
    s, mean, rstd = (x.new_empty(0) for _ in range(3))
    if wants_sum and (residual is not None or seed is not None):
        s = x.new_empty(x.shape, dtype=x.dtype if residual is None else residual.dtype)
    if wants_statistics:
        rstd = x.new_empty((*x.shape[:-1], 1), dtype=accumulator(x.dtype))
        mean = mean if rms else torch.empty_like(rstd)
    return x.new_empty(x.shape), s, mean, rstd


def _fake_backward(grad: Any, grad_s: Any, s: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *_, x_dtype, weight_dtype, _ = rest
    dweight, dbias = (s.new_empty(s.shape[-1:], dtype=weight_dtype) for _ in range(2))
    return s.new_empty(s.shape, dtype=x_dtype), s.new_empty(s.shape), dweight, dbias


def norm_op(name: str, *, rms: bool, flops: tuple[int, int], torch_ways: list) -> Op:
    """The op over its ways; flops: per element, forward and backward."""

    def save(args: Any, results: Any) -> tuple[tuple[Tensor | None, ...], tuple[Any, ...]]:
        x, residual, weight, bias, seed, _, dropout_p, _, wants_statistics = args
        if not wants_statistics:
            raise RuntimeError(f"tilewise::{name}: wants_statistics=False leaves no gradient")
        _, s, mean, rstd = results
        parameter = x if weight is None and bias is None else bias if weight is None else weight
        s = x if residual is None and seed is None else s
        kept_tensors = s, weight, None if rms else mean, rstd, seed
        return kept_tensors, (x.dtype, parameter.dtype, dropout_p)

    def cost(x: Tensor, residual: Tensor | None, *_: object) -> Cost:
        """Two element moves forward and three backward; a residual adds its own."""
        n, added = x.numel(), residual is not None
        moved = n * x.element_size()
        own = 0 if residual is None else n * residual.element_size()
        per_element = [each + added for each in flops]
        return Cost(per_element[0] * n, 2 * (moved + own), per_element[1] * n, 3 * moved + own)

    return Op(
        name,
        schema=(
            "(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor? seed, float eps,"
            " float dropout_p, bool wants_sum, bool wants_statistics)"
            " -> (Tensor y, Tensor s, Tensor mean, Tensor rstd)"
        ),
        backward_schema=(
            "(Tensor? grad, Tensor? grad_s, Tensor s, Tensor? weight, Tensor? mean, Tensor rstd,"
            " Tensor? seed, ScalarType x_dtype, ScalarType weight_dtype, float dropout_p)"
            " -> (Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias)"
        ),
        implementations=[_triton_way(rms), _native_way(rms), *torch_ways],
        fake=lambda *args: _fake(*args, rms=rms),
        fake_backward=_fake_backward,
        save=save,
        inputs_with_grad=(0, 1, 2, 3),
        outputs_with_grad=2,
        cost=cost,
    )


# -- the public functions --------------------------------------------------------------------------


def _is_like(tensor: Tensor | None, x: Tensor, shape: torch.Size) -> bool:
    """Whether an optional operand is the usual one, that needs no further check."""
    return tensor is None or (
        isinstance(tensor, Tensor)
        and tensor.shape == shape
        and tensor.dtype == x.dtype
        and tensor.device == x.device
        and tensor.layout == x.layout
    )


def _check_operand(
    op: str, name: str, tensor: Tensor | None, x: Tensor, shape: torch.Size, meaning: str
) -> None:
    """Raise unless an optional operand is a float tensor of this shape, where x is."""
    if tensor is not None:
        is_float_tensor(op, name, tensor)
        has_shape(op, name, tensor, shape, meaning)
        same_device(op, name, tensor, "x", x)


def _check_dtypes(
    op: str, x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None
) -> None:
    """Raise unless the dtypes are x's, or float32 over a half-precision x."""
    for name, tensor in (("residual", residual), ("weight", weight), ("bias", bias)):
        if tensor is None or tensor.dtype == x.dtype:
            continue
        if tensor.dtype != torch.float32 or x.dtype not in HALF:
            takes = f"x is {x.dtype}: pass {x.dtype}" + " or torch.float32" * (x.dtype in HALF)
            raise fail(op, name, tensor.dtype, takes)
    if weight is not None and bias is not None and weight.dtype != bias.dtype:
        raise fail(op, "bias", bias.dtype, f"weight is {weight.dtype}; cast one")


def normalise(
    op: Op,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
    dropout_p: float,
    prenorm: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """Check what a caller gave, run the op, and return what was asked for."""
    name = op.name
    is_float_tensor(name, "x", x)
    is_number(name, "eps", eps)
    is_probability(name, "dropout_p", dropout_p)
    is_flag(name, "prenorm", prenorm)
    if eps < 0:
        raise fail(name, "eps", eps, "pass 0 or more")
    shape = x.shape
    width = shape[-1:]
    usual = _is_like(residual, x, shape) and _is_like(weight, x, width) and _is_like(bias, x, width)
    if not usual:
        _check_operand(name, "residual", residual, x, shape, "the shape of x")
        _check_operand(name, "weight", weight, x, width, "the last dim of x")
        _check_operand(name, "bias", bias, x, width, "the last dim of x")
    if autocast_dtype(x.device) is not None and x.dtype != torch.float64:
        x = x.float()
        residual = cast(residual, torch.float32)
        weight, bias = cast(weight, torch.float32), cast(bias, torch.float32)
    elif not usual:
        _check_dtypes(name, x, residual, weight, bias)
    seed = draw_seed(x.device) if dropout_p > 0 else None
    trains = tracked((x, residual, weight, bias))
    flags = prenorm or trains, trains
    y, s, _, _ = op(x, residual, weight, bias, seed, float(eps), float(dropout_p), *flags)
    if not prenorm:
        return y
    return y, x if residual is None and seed is None else s
