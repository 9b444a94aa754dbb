"""Cross-entropy of logits and class numbers, with label smoothing and the z-loss, in one op.

With m = max x, lse = m + log(sum_j exp(x_j - m)), p = exp(x - lse), smoothing e, z-loss factor z:

    loss = lse - (1 - e) x_target - e mean(x) + z lse^2
    dx_c = g ((1 + 2 z lse) p_c - (1 - e) [c == target] - e / V)

Memory contract: forward reads the logits once and writes a loss and two statistics (m, log of the
sum) per row; it saves the logits themselves, the targets and the statistics, and no probabilities.
Backward reads the logits once and writes dlogits once. Work for M rows of V columns: 4MV FLOPs and
MV elements of traffic forward, 5MV FLOPs and 2MV elements backward. Memory bound on a GPU.

The in_place functions serve linear_cross_entropy: losses and gradient at once, the gradient in the
place of the logits.

Shapes: logits, dlogits [..., V]; target, losses [...]; statistics [..., 2]; g: the upstream
gradient, [] or [...]. Native: C++ on CPU (csrc/cross_entropy.*).
Source: Szegedy et al. 2016, section 7 (smoothing); Chowdhery et al. 2022, section 5 (z-loss).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import cross_entropy_triton, lazy_triton, native
from .checks import (
    fail,
    has_shape,
    is_float_tensor,
    is_number,
    is_probability,
    is_whole,
    same_device,
)
from .launch import refuses
from .op import Cost, Implementation, Op, accumulator, autocast_dtype

REDUCTIONS = ("mean", "sum", "none")
Pair = tuple[Tensor, Tensor]

# -- reduction -----------------------------------------------------------------------------------


def counted(target: Tensor, ignored: int) -> Tensor:
    """How many targets count, at least 1: int64 []."""
    return (target != ignored).sum().clamp(min=1)


def reduced(losses: Tensor, target: Tensor, ignored: int, reduction: str) -> Tensor:
    """The losses [...], their sum [] or their mean [] over the rows that are not ignored."""
    if reduction == "none":
        return losses
    total = losses.sum()
    return total if reduction == "sum" else total / counted(target, ignored)


# -- reference -----------------------------------------------------------------------------------


def _out_of_range(target: Tensor, V: int, ignored: int) -> Tensor:
    return (target != ignored) & ((target < 0) | (target >= V))


def check_range(op: str, target: Tensor, V: int, ignored: int) -> None:
    """Raise on a CPU for a target out of range; a GPU would have to wait for the answer."""
    if not target.is_cpu:
        return
    wrong = _out_of_range(target, V, ignored)
    if bool(wrong.any()):
        takes = f"it takes 0 to {V - 1} or the ignore_index {ignored}"
        raise fail(op, "target", f"{target[wrong][0].item()} in a row", takes)


def reference_losses(
    logits: Tensor, target: Tensor, ignored: int, smoothing: float, z: float
) -> Pair:
    """losses [...] and statistics [..., 2] by the formula at the top of this file."""
    x = logits.to(accumulator(logits.dtype))
    check_range("cross_entropy", target, x.shape[-1], ignored)
    skipped, wrong = target == ignored, _out_of_range(target, x.shape[-1], ignored)
    at = torch.where(skipped | wrong, 0, target)[..., None]
    top = x.amax(-1, keepdim=True)
    top = torch.where(top == -torch.inf, 0.0, top)
    below = x - top
    log_sum = below.exp().sum(-1).log()
    losses = log_sum - (1 - smoothing) * below.gather(-1, at)[..., 0]
    if smoothing:
        losses = losses - smoothing * below.mean(-1)
    if z:
        losses = losses + z * (top[..., 0] + log_sum).square()
    losses = losses.masked_fill(wrong, torch.nan).masked_fill(skipped, 0)
    return losses, torch.stack([top[..., 0], log_sum], -1)


def reference_dlogits(
    weight: Tensor,
    logits: Tensor,
    target: Tensor,
    statistics: Tensor,
    ignored: int,
    smoothing: float,
    z: float,
) -> Tensor:
    """dlogits by the formula at the top of this file; weight is g."""
    x = logits.to(statistics.dtype)
    skipped, wrong = target == ignored, _out_of_range(target, x.shape[-1], ignored)
    at = torch.where(skipped | wrong, 0, target)[..., None]
    top, log_sum = statistics[..., :1], statistics[..., 1:]
    slope = (x - top - log_sum).exp() * (1 + 2 * z * (top + log_sum)) - smoothing / x.shape[-1]
    slope = slope.scatter(-1, at, slope.gather(-1, at) - (1 - smoothing)) * weight[..., None]
    slope = slope.masked_fill(wrong[..., None], torch.nan)
    return slope.masked_fill(skipped[..., None], 0).to(logits.dtype)


def reference_in_place(
    logits: Tensor, target: Tensor, weight: Tensor, ignored: int, smoothing: float, z: float
) -> Tensor:
    """The losses [M] of logits [M, V], whose place dlogits take."""
    losses, statistics = reference_losses(logits, target, ignored, smoothing, z)
    logits.copy_(reference_dlogits(weight, logits, target, statistics, ignored, smoothing, z))
    return losses


# -- native --------------------------------------------------------------------------------------


def _native_forward(*args: Any) -> Pair:
    loss, statistics = native.op("cross_entropy_forward")(*args)
    return loss, statistics


def _native_backward(*args: Any) -> tuple[Tensor]:
    *inner, needs = args
    return (native.op("cross_entropy_backward")(*inner),)


def native_losses(*args: Any) -> Tensor:
    """Losses [...] of logits [..., V], target [...] and ignored, smoothing, z."""
    losses: Tensor = native.op("cross_entropy_forward")(*args, "none")[0]
    return losses


def native_in_place(*args: Any) -> Tensor:
    """Losses [M]; logits [M, V] become their gradient times weight, [] or [M]."""
    losses: Tensor = native.op("cross_entropy_in_place")(*args)
    return losses


# -- the op --------------------------------------------------------------------------------------


def _forward(losses_of: Callable[..., Pair]) -> Callable[..., Pair]:
    def forward(
        logits: Tensor, target: Tensor, ignored: int, smoothing: float, z: float, reduction: str
    ) -> Pair:
        losses, statistics = losses_of(logits, target, ignored, smoothing, z)
        return reduced(losses, target, ignored, reduction), statistics

    return forward


def _backward(dlogits_of: Callable[..., Tensor]) -> Callable[..., tuple[Tensor]]:
    def backward(
        grad: Tensor,
        logits: Tensor,
        target: Tensor,
        statistics: Tensor,
        ignored: int,
        smoothing: float,
        z: float,
        reduction: str,
        needs: list[bool],
    ) -> tuple[Tensor]:
        weight = grad / counted(target, ignored) if reduction == "mean" else grad
        return (dlogits_of(weight, logits, target, statistics, ignored, smoothing, z),)

    return backward


def cost(logits: Tensor, *_: object) -> Cost:
    """4 FLOPs and one element move forward, 5 FLOPs and two moves backward, per logit."""
    n, moved = logits.numel(), logits.numel() * logits.element_size()
    rows = 20 * (n // logits.shape[-1])  # an int64 target, a loss and two statistics in float32
    return Cost(4 * n, moved + rows, 5 * n, 2 * moved + rows)


def _fake(logits: Tensor, target: Tensor, *rest: Any) -> Pair:
    wide = accumulator(logits.dtype)
    shape = target.shape if rest[-1] == "none" else ()
    return logits.new_empty(shape, dtype=wide), logits.new_empty((*target.shape, 2), dtype=wide)


OP = Op(
    "cross_entropy",
    schema=(
        "(Tensor logits, Tensor target, int ignored, float smoothing, float z, str reduction)"
        " -> (Tensor loss, Tensor statistics)"
    ),
    backward_schema=(
        "(Tensor grad, Tensor logits, Tensor target, Tensor statistics, int ignored,"
        " float smoothing, float z, str reduction) -> Tensor"
    ),
    implementations=[
        Implementation(
            "triton",
            _forward(cross_entropy_triton.losses),
            _backward(cross_entropy_triton.dlogits),
            devices=("cuda",),
            missing=lazy_triton.missing,
            refuses=lambda logits, *_: refuses(logits),
            refuses_backward=lambda grad, logits, *_: refuses(logits),
        ),
        Implementation(
            "native",
            _native_forward,
            _native_backward,
            devices=("cpu",),
            missing=native.missing,
        ),
        Implementation("reference", _forward(reference_losses), _backward(reference_dlogits)),
    ],
    fake=_fake,
    fake_backward=lambda grad, logits, *_: (logits.new_empty(logits.shape),),
    save=lambda args, outputs: ((args[0], args[1], outputs[1]), args[2:]),
    inputs_with_grad=(0,),
    cost=cost,
)


def check_options(
    op: str, ignore_index: object, label_smoothing: object, z_loss: Any, reduction: object
) -> None:
    """Raise unless the options that both losses share are what they take."""
    if not is_whole(ignore_index):
        raise fail(op, "ignore_index", repr(ignore_index), "pass a whole number")
    if not -(2**63) <= ignore_index < 2**63:  # type: ignore[operator]
        raise fail(op, "ignore_index", "past int64", "pass a number that a target can hold")
    is_probability(op, "label_smoothing", label_smoothing)
    is_number(op, "z_loss", z_loss)
    if z_loss < 0:
        raise fail(op, "z_loss", z_loss, "pass 0 or more")
    if reduction not in REDUCTIONS:
        raise fail(op, "reduction", repr(reduction), "pass 'mean', 'sum' or 'none'")


def check_target(op: str, target: object, name: str, like: Tensor) -> None:
    """Raise unless target is int64, where `like` is, of its shape without the last dim."""
    if not isinstance(target, Tensor):
        raise fail(op, "target", type(target).__name__, "pass a torch.Tensor of int64")
    if target.dtype != torch.int64:
        raise fail(op, "target", target.dtype, "pass int64 class numbers (target.long())")
    if target.layout is not torch.strided or target.is_nested:
        raise fail(op, "target", "sparse or nested", "pass a dense tensor")
    same_device(op, "target", target, name, like)
    has_shape(op, "target", target, like.shape[:-1], f"{name} without its last dim")


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """Cross-entropy [nats] between softmax(logits) over the last dim and the classes in target.

    logits: [..., V] float32, float16, bfloat16 or float64, any strides, V 1 or more; the classes
    are the last dim (torch's cross_entropy has them second). target: [...] int64, 0 to V - 1 or
    ignore_index, which may be any number. label_smoothing: share of the target spread evenly over
    all classes, 0 to 1. z_loss: factor of the squared log-sum-exp added to each loss, 0 or more.
    reduction: "mean" over the targets that are not ignored, "sum", or "none" for losses [...].

    Returns float32 (float64 for float64); sums are kept in that dtype. Where no target counts the
    mean is 0, with gradient 0, and not torch's NaN, which would spoil a training step for one empty
    batch. Under autocast it computes in float32. Raises ArgumentError for anything else, and on a
    CPU ValueError for a target out of range; on a GPU, where the host does not see the targets,
    such a row has loss and gradient NaN.
    """
    op = "cross_entropy"
    is_float_tensor(op, "logits", logits, min_dims=1)
    if logits.shape[-1] == 0:
        raise fail(op, "logits", f"of shape {list(logits.shape)}", "its last dim needs a class")
    check_target(op, target, "logits", logits)
    check_options(op, ignore_index, label_smoothing, z_loss, reduction)
    if autocast_dtype(logits.device) is not None and logits.dtype != torch.float64:
        logits = logits.float()
    loss, _ = OP(logits, target, ignore_index, float(label_smoothing), float(z_loss), reduction)
    return loss
