"""RMS normalisation with dropout and the residual add fused in: y = RMS(s).

    s = dropout(x) + residual
    RMS(s) = s * rstd * weight,  rstd = 1 / sqrt(mean(s^2) + eps),  over the last dim

It is layer_norm without the mean and the bias, and shares its kernels, its memory contract and the
way dweight is summed; s * rstd * weight is rounded once, to x's dtype, at the end. With
g = grad_y * weight and n = s * rstd:

    ds = rstd * (g - n * mean(g * n)) + grad_s     dweight = sum(grad_y * n)

Work for M rows of N columns: 4MN FLOPs and 2MN elements of traffic forward (5MN and 4MN with a
residual), 9MN FLOPs and 3MN elements backward (one more of each with a residual). Memory bound.

Shapes: x, residual, s, y [..., N], seen as [M, N] inside; weight [N]; rstd [..., 1].
Source: Zhang and Sennrich 2019.
"""

from __future__ import annotations

from typing import Literal, overload

from torch import Tensor

from .norm import Outputs, norm_op, normalise, outputs, reference_gradients, summed, torch_way
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
    rstd = (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
    y = wide * rstd
    y = y if weight is None else y * weight
    y = y if bias is None else y + bias
    return outputs(x, s, y, None, rstd, keep=keep)


OP = norm_op(
    "rms_norm",
    rms=True,
    flops=(4, 9),
    torch_ways=[torch_way("reference", reference, reference_gradients)],
)


@overload
def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    *,
    eps: float = 1e-6,
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
    prenorm: Literal[False] = False,
) -> Tensor: ...
@overload
def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    *,
    eps: float = 1e-6,
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
    prenorm: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    *,
    eps: float = 1e-6,
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
    prenorm: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """RMS(s) over the last dim of s = dropout(x) + residual; with prenorm=True, (RMS(s), s).

    x: [..., N] float32, float16, bfloat16 or float64, any strides. weight: [N], in x's dtype, or
    float32 with a half-precision x; None for 1. residual: x's shape, in x's dtype, or float32 with
    a half-precision x (a float32 residual stream). dropout_p: probability of zeroing an element of
    x (pass 0 in evaluation); the mask follows from a seed that every call draws from torch's
    generator, and is not kept. eps: added to the mean square, 0 or more.

    Returns y in x's shape and dtype; the sum has the residual's dtype, and is x itself when there
    is neither residual nor dropout. Statistics are float32 (float64 for float64). Under autocast
    it computes in and returns float32. Raises ArgumentError for anything else.
    Source: Zhang and Sennrich 2019.
    """
    return normalise(OP, x, weight, None, eps, residual, dropout_p, prenorm)
