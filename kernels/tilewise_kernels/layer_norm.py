"""Layer normalisation with dropout and the residual add fused in: y = LN(s).

    s = dropout(x) + residual
    LN(s) = (s - mean) * rstd * weight + bias,  rstd = 1 / sqrt(var + eps),  over the last dim

The variance is the mean of the centred squares; E[s^2] - E[s]^2 would cancel for a large mean. The
mean is taken twice, the second time of s - mean, because a sum of large values is itself rounded.
y is computed from s as stored, so that y == layer_norm(s) whichever way runs.

Memory contract: forward reads x (and residual) once, writes y (and s) once; it saves s (x itself
with neither residual nor dropout), weight, mean and rstd in float32 (float64 for float64), and the
seed of dropout, from which backward finds the mask again. Without gradients it saves nothing, and
stores s only for prenorm. Backward reads grad_y, s and grad_s once and writes ds once: x and
residual share it, unless dropout or a wider residual sets them apart. With g = grad_y * weight and
n = (s - mean) * rstd:

    ds = rstd * (g - mean(g) - n * mean(g * n)) + grad_s     dweight = sum(grad_y * n)
                                                             dbias   = sum(grad_y)

dweight and dbias: blocks of rows add up in float32 and write one row each of a [blocks, N] buffer,
which is summed in order. No locks, no atomics, the same bits on every run.
Work for M rows of N columns: 9MN FLOPs and 2MN elements of traffic forward (10MN and 4MN with a
residual), 13MN FLOPs and 3MN elements backward (one more of each with a residual). Memory bound.

Shapes: x, residual, s, y [..., N], seen as [M, N] inside; weight, bias [N]; mean, rstd [..., 1].
Source: Ba, Kiros and Hinton 2016.
"""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from .norm import (
    HALF,
    Gradients,
    Needs,
    Outputs,
    cast,
    norm_op,
    normalise,
    outputs,
    reference_gradients,
    split,
    summed,
    torch_way,
)
from .op import accumulator


def reference(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    eps: float,
    dropout_p: float,
    *keep: bool,
) -> Outputs:
    """The definition, in torch."""
    s = summed(x, residual, seed, dropout_p)
    wide = s.to(accumulator(s.dtype))
    mean = wide.mean(-1, keepdim=True)
    mean = mean + (wide - mean).mean(-1, keepdim=True)
    centred = wide - mean
    rstd = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    y = centred * rstd
    y = y if weight is None else y * weight
    y = y if bias is None else y + bias
    return outputs(x, s, y, mean, rstd, keep=keep)


# -- torch's own kernels -------------------------------------------------------------------------


def _torch_weight(s: Tensor, weight: Tensor | None) -> Tensor | None:
    """weight in the dtype torch needs; on CPU half-precision rows get float32 statistics only
    from float32 parameters, so there a missing weight becomes ones."""
    if weight is None and s.dtype in HALF and not s.is_cuda:
        return s.new_ones(s.shape[-1], dtype=torch.float32)
    return cast(weight, _torch_dtype(s))


def _torch_dtype(s: Tensor) -> torch.dtype:
    """The dtype of parameters beside rows s."""
    return s.dtype if s.is_cuda else accumulator(s.dtype)


def _torch_forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    eps: float,
    dropout_p: float,
    *keep: bool,
) -> Outputs:
    s = summed(x, residual, seed, dropout_p)
    scale, shift = _torch_weight(s, weight), cast(bias, _torch_dtype(s))
    y, mean, rstd = torch.native_layer_norm(s, s.shape[-1:], scale, shift, eps)
    return outputs(x, s, y, mean, rstd, keep=keep)


def _torch_gradients(
    grad: Tensor,
    grad_s: Tensor | None,
    s: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    seed: Tensor | None,
    x_dtype: torch.dtype,
    weight_dtype: torch.dtype,
    dropout_p: float,
    needs: Needs,
) -> Gradients:
    scale = _torch_weight(s, weight)
    shift = None  # torch takes the shape and dtype of dbias from a bias; the values do not matter
    if needs[3]:
        shift = s.new_empty(s.shape[-1], dtype=_torch_dtype(s))
    wanted = (needs[0] or needs[1], *needs[2:])
    grad_rows = grad if grad.dtype == s.dtype else grad.to(s.dtype)
    ds, dweight, dbias = torch.ops.aten.native_layer_norm_backward(
        grad_rows, s, s.shape[-1:], mean, rstd, scale, shift, wanted
    )
    if ds is not None and grad_s is not None:
        ds.add_(grad_s)
    pair = [None, None] if ds is None else split(ds, seed, dropout_p, x_dtype, needs)
    return *pair, cast(dweight, weight_dtype), cast(dbias, weight_dtype)


def _torch_refuses(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, *_: object
) -> str | None:
    s = x if residual is None else residual
    mixed = any(p is not None and p.dtype == torch.float32 for p in (weight, bias))
    if s.is_cuda and s.dtype in HALF and mixed:
        return "on CUDA torch takes float32 parameters for float32 rows only"
    return None


# -- the op --------------------------------------------------------------------------------------

OP = norm_op(
    "layer_norm",
    rms=False,
    flops=(9, 13),
    torch_ways=[
        torch_way("torch", _torch_forward, _torch_gradients, refuses=_torch_refuses),
        torch_way("reference", reference, reference_gradients),
    ],
)


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
    an element of x (pass 0 in evaluation); the mask follows from a seed that every call draws from
    torch's generator, and is not kept. eps: added to the variance, 0 or more.

    Returns y in x's shape and dtype; the sum has the residual's dtype, and is x itself when there
    is neither residual nor dropout. Statistics are float32 (float64 for float64). Under autocast
    it computes in and returns float32, as torch does. Raises ArgumentError for anything else.
    Source: Ba, Kiros and Hinton 2016.
    """
    return normalise(OP, x, weight, bias, eps, residual, dropout_p, prenorm)
