"""Layer normalisation with the residual add fused in: y = LN(s), s = x + residual.

    LN(s) = (s - mean) * rstd * weight + bias,  rstd = 1 / sqrt(var + eps),  over the last dim

The variance is the mean of the centred squares; E[s^2] - E[s]^2 would cancel for a large mean. The
mean is taken twice, the second time of s - mean, because a sum of large values is itself rounded.
y is computed from s as stored, so that y == layer_norm(s) whichever way runs.

Memory contract: forward reads x (and residual) once, writes y (and s) once; it saves s (x itself
without a residual), weight, and mean and rstd in float32 (float64 for float64). Backward reads
grad_y, s and grad_s once and writes ds once: x and residual share it. With g = grad_y * weight and
n = (s - mean) * rstd:

    ds = rstd * (g - mean(g) - n * mean(g * n)) + grad_s     dweight = sum(grad_y * n)
                                                             dbias   = sum(grad_y)

dweight and dbias: each program adds up its rows in float32 registers and writes one row of a
[programs, N] buffer, which one sum reduces. No locks, no atomics, the same bits on every run.
Work for M rows of N columns: 9MN FLOPs and 2MN elements of traffic forward (10MN and 4MN with a
residual), 13MN FLOPs and 3MN elements backward (one more of each with a residual). Memory bound.

Shapes: x, residual, s, y [..., N], seen as [M, N] inside; weight, bias [N]; mean, rstd [..., 1].
Source: Ba, Kiros and Hinton 2016.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from . import layer_norm_triton, lazy_triton
from .checks import fail, has_shape, is_float_tensor, is_number, is_probability
from .op import Cost, Implementation, Op, accumulator, autocast_dtype, plain_eager

HALF = (torch.float16, torch.bfloat16)

Outputs = tuple[Tensor, Tensor, Tensor, Tensor]  # y, s (empty without a residual), mean, rstd
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]  # ds, dweight, dbias


def _cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """tensor.to(dtype), without the cost of a call that has nothing to do."""
    return tensor if tensor is None or tensor.dtype == dtype else tensor.to(dtype)


# -- reference -----------------------------------------------------------------------------------


def residual_sum(x: Tensor, residual: Tensor | None) -> Tensor:
    """s: x itself, or x + residual, contiguous, in the wider of the two dtypes."""
    if residual is None:
        return x
    return (x + residual).contiguous()


def reference(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Outputs:
    """The definition, in torch."""
    s = residual_sum(x, residual)
    wide = s.to(accumulator(s.dtype))
    mean = wide.mean(-1, keepdim=True)
    mean = mean + (wide - mean).mean(-1, keepdim=True)
    centred = wide - mean
    rstd = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    y = centred * rstd
    y = y if weight is None else y * weight
    y = y if bias is None else y + bias
    kept = x.new_empty(0) if residual is None else s
    return y.to(x.dtype).contiguous(), kept, mean.contiguous(), rstd.contiguous()


def _reference_gradients(
    grad: Tensor,
    grad_s: Tensor | None,
    s: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    needs: tuple[bool, bool, bool],
) -> Gradients:
    rows = s.shape[:-1].numel()
    grad, normal = grad.to(mean.dtype), (s.to(mean.dtype) - mean) * rstd
    g = grad if weight is None else grad * weight
    ds = rstd * (g - g.mean(-1, keepdim=True) - normal * (g * normal).mean(-1, keepdim=True))
    ds = ds if grad_s is None else ds + grad_s
    dweight = (grad * normal).reshape(rows, s.shape[-1]).sum(0)
    return ds.to(s.dtype).contiguous(), dweight, grad.reshape(rows, s.shape[-1]).sum(0)


def _backward(gradients: Callable[..., Gradients]) -> Callable[..., tuple[Tensor | None, ...]]:
    """The op's backward on top of a function that computes ds, dweight and dbias from grad_y."""

    def backward(
        grad: Tensor | None,
        grad_s: Tensor | None,
        s: Tensor,
        weight: Tensor | None,
        mean: Tensor,
        rstd: Tensor,
        x_dtype: torch.dtype,
        weight_dtype: torch.dtype,
        shared: bool,
        needs: list[bool],
    ) -> tuple[Tensor | None, ...]:
        needs_x, needs_residual, needs_weight, needs_bias = needs
        wanted = (needs_x or needs_residual, needs_weight, needs_bias)
        if grad_s is not None and grad_s.shape != s.shape:
            grad_s = None  # belongs to the empty stand-in for an absent sum
        if grad is None:
            assert grad_s is not None, "a backward without any gradient"
            only_s = grad_s.clone(memory_format=torch.contiguous_format)
            zero = mean.new_zeros(s.shape[-1])
            found: Gradients = (only_s, zero, zero.clone())
        else:
            found = gradients(grad, grad_s, s, weight, mean, rstd, wanted)
        ds, dweight, dbias = found
        dx = ds
        if ds is not None and needs_x and needs_residual and not shared:
            dx = ds.clone()
        return (
            _cast(dx, x_dtype) if needs_x else None,
            ds if needs_residual else None,
            _cast(dweight, weight_dtype) if needs_weight else None,
            _cast(dbias, weight_dtype) if needs_bias else None,
        )

    return backward


# -- torch's own kernels -------------------------------------------------------------------------


def _torch_weight(s: Tensor, weight: Tensor | None) -> Tensor | None:
    """weight in the dtype torch needs; on CPU half-precision rows get float32 statistics only
    from float32 parameters, so there a missing weight becomes ones."""
    if weight is None and s.dtype in HALF and not s.is_cuda:
        return s.new_ones(s.shape[-1], dtype=torch.float32)
    return _cast(weight, _torch_dtype(s))


def _torch_dtype(s: Tensor) -> torch.dtype:
    """The dtype of parameters beside rows s."""
    return s.dtype if s.is_cuda else accumulator(s.dtype)


def _torch_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Outputs:
    s = residual_sum(x, residual)
    scale, shift = _torch_weight(s, weight), _cast(bias, _torch_dtype(s))
    y, mean, rstd = torch.native_layer_norm(s, s.shape[-1:], scale, shift, eps)
    y = y if y.dtype == x.dtype else y.to(x.dtype)
    return y, x.new_empty(0) if residual is None else s, mean, rstd


def _torch_gradients(
    grad: Tensor,
    grad_s: Tensor | None,
    s: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    needs: tuple[bool, bool, bool],
) -> Gradients:
    scale = _torch_weight(s, weight)
    shift = None  # torch takes the shape and dtype of dbias from a bias; the values do not matter
    if needs[2]:
        shift = s.new_empty(s.shape[-1], dtype=_torch_dtype(s))
    ds, dweight, dbias = torch.ops.aten.native_layer_norm_backward(
        _cast(grad, s.dtype), s, s.shape[-1:], mean, rstd, scale, shift, needs
    )
    if ds is not None and grad_s is not None:
        ds.add_(grad_s)
    return ds, dweight, dbias


def _torch_refuses(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> str | None:
    s = x if residual is None else residual
    mixed = any(p is not None and p.dtype == torch.float32 for p in (weight, bias))
    if s.is_cuda and s.dtype in HALF and mixed:
        return "on CUDA torch takes float32 parameters for float32 rows only"
    return None


# -- the op --------------------------------------------------------------------------------------


def cost(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Cost:
    """9 FLOPs and two element moves forward, 13 and three backward; a residual adds its own."""
    n, added = x.numel(), residual is not None
    moved = n * x.element_size()
    residual_moved = residual.numel() * residual.element_size() if residual is not None else 0
    moved_back = 3 * moved + residual_moved
    return Cost((9 + added) * n, 2 * moved + 2 * residual_moved, (13 + added) * n, moved_back)


def _fake(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Outputs:
    s = x.new_empty(0) if residual is None else residual.new_empty(residual.shape)
    wide = accumulator(s.dtype)
    mean, rstd = (x.new_empty((*x.shape[:-1], 1), dtype=wide) for _ in range(2))
    return x.new_empty(x.shape), s, mean, rstd


def _fake_backward(
    grad: Tensor | None,
    grad_s: Tensor | None,
    s: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    x_dtype: torch.dtype,
    weight_dtype: torch.dtype,
    shared: bool,
) -> tuple[Tensor, ...]:
    dweight, dbias = (s.new_empty(s.shape[-1:], dtype=weight_dtype) for _ in range(2))
    return s.new_empty(s.shape, dtype=x_dtype), s.new_empty(s.shape), dweight, dbias


def _save(args: Any, outputs: Any) -> tuple[tuple[Tensor | None, ...], tuple[Any, ...]]:
    """The last constant says that dx and dresidual may be one tensor, as the gradients of eager
    x + residual are; a compiler would reuse its memory for one while the other still lives."""
    x, residual, weight, bias, _ = args
    _, s, mean, rstd = outputs
    parameter = x if weight is None and bias is None else bias if weight is None else weight
    constants = (x.dtype, parameter.dtype, plain_eager(args[:1]))
    return (x if residual is None else s, weight, mean, rstd), constants


OP = Op(
    "layer_norm",
    schema=(
        "(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, float eps)"
        " -> (Tensor y, Tensor s, Tensor mean, Tensor rstd)"
    ),
    backward_schema=(
        "(Tensor? grad, Tensor? grad_s, Tensor s, Tensor? weight, Tensor mean, Tensor rstd,"
        " ScalarType x_dtype, ScalarType weight_dtype, bool shared)"
        " -> (Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias)"
    ),
    implementations=[
        Implementation(
            "triton",
            layer_norm_triton.forward,
            _backward(layer_norm_triton.gradients),
            devices=("cuda",),
            missing=lazy_triton.missing,
            refuses=lambda x, *_: layer_norm_triton.refuses(x),
            refuses_backward=lambda grad, grad_s, s, *_: layer_norm_triton.refuses(s),
        ),
        Implementation(
            "torch", _torch_forward, _backward(_torch_gradients), refuses=_torch_refuses
        ),
        Implementation("reference", reference, _backward(_reference_gradients)),
    ],
    fake=_fake,
    fake_backward=_fake_backward,
    save=_save,
    inputs_with_grad=(0, 1, 2, 3),
    outputs_with_grad=2,
    cost=cost,
)


def _check_operand(
    name: str, tensor: Tensor | None, x: Tensor, shape: torch.Size, meaning: str
) -> None:
    """Raise unless an optional operand is a float tensor of this shape, where x is."""
    if tensor is None:
        return
    is_float_tensor("layer_norm", name, tensor)
    has_shape("layer_norm", name, tensor, shape, meaning)
    if tensor.device != x.device:
        raise fail("layer_norm", name, f"on {tensor.device}", f"move it to {x.device}, where x is")


def _check_dtype(name: str, tensor: Tensor | None, x: Tensor) -> None:
    """Raise unless the dtype is x's, or float32 over a half-precision x."""
    if tensor is None or tensor.dtype == x.dtype:
        return
    if tensor.dtype != torch.float32 or x.dtype not in HALF:
        takes = f"x is {x.dtype}: pass {x.dtype}" + " or torch.float32" * (x.dtype in HALF)
        raise fail("layer_norm", name, tensor.dtype, takes)


@overload
def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
    prenorm: Literal[False] = False,
) -> Tensor: ...
@overload
def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
    prenorm: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
    prenorm: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """LN(s) over the last dim of s = dropout(x) + residual; with prenorm=True, (LN(s), s).

    x: [..., N] float32, float16, bfloat16 or float64, any strides. weight, bias: [N], in x's dtype,
    or float32 with a half-precision x; None for 1 and 0. residual: x's shape, in x's dtype, or
    float32 with a half-precision x (a float32 residual stream). dropout_p: probability of zeroing
    an element of x, drawn from torch's generator at every call (pass 0 in evaluation); the mask is
    kept for backward. eps: added to the variance, 0 or more.

    Returns y in x's shape and dtype; the sum has the residual's dtype, and is x itself when there
    is neither residual nor dropout. Statistics are float32 (float64 for float64). Under autocast
    it computes in and returns float32, as torch does. Raises ArgumentError for anything else.
    Source: Ba, Kiros and Hinton 2016.
    """
    is_float_tensor("layer_norm", "x", x)
    is_number("layer_norm", "eps", eps)
    is_probability("layer_norm", "dropout_p", dropout_p)
    if eps < 0:
        raise fail("layer_norm", "eps", eps, "pass 0 or more")
    width = x.shape[-1:]
    _check_operand("residual", residual, x, x.shape, "the shape of x")
    _check_operand("weight", weight, x, width, "the last dim of x")
    _check_operand("bias", bias, x, width, "the last dim of x")
    if autocast_dtype(x.device) is not None and x.dtype != torch.float64:
        x = x.float()
        residual = _cast(residual, torch.float32)
        weight, bias = _cast(weight, torch.float32), _cast(bias, torch.float32)
    _check_dtype("residual", residual, x)
    _check_dtype("weight", weight, x)
    _check_dtype("bias", bias, x)
    if weight is not None and bias is not None and weight.dtype != bias.dtype:
        raise fail("layer_norm", "bias", bias.dtype, f"weight is {weight.dtype}; cast one")
    if dropout_p > 0:
        x = F.dropout(x, dropout_p)
    y, s, _, _ = OP(x, residual, weight, bias, float(eps))
    if not prenorm:
        return y
    return y, x if residual is None else s
