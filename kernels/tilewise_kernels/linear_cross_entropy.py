"""Cross-entropy of a linear layer's outputs, which are never whole in memory.

    loss = cross_entropy(x @ weight.T + bias, target)

The logits of a language model's last layer are its largest tensor, and eager torch holds three of
that size for the loss: logits, log-probabilities and their gradient. Here the rows are taken in
chunks (`chunk_rows`). With a gradient ahead, one walk does everything: per chunk a product to
logits, which become losses and, in the same place, their gradient, and two products that add to dx
and dweight.
Rows whose target is ignored are left out beforehand (on a CPU; a GPU does not know how many).

Memory contract: besides inputs and gradients one chunk of logits, M V / 4 elements (M V / 2 on a
CPU, where four chunks made float32 10-20% slower) or 256 MiB if that is less. float32 and float64
sums of dweight grow in the gradient itself; bfloat16 ones in it up to 4 chunks (4 roundings), above
that, and float16 ones always, in a float32 [V, K] besides. The
walk saves dx, dweight and dbias for an upstream gradient of 1; backward multiplies by the real one
(without a copy where it is 1, on a CPU, and the graph is not kept). float16 keeps them undivided by
the number of rows, which would take them below its range. reduction="none" saves the inputs
instead, since each row has its own upstream gradient, and backward walks again, with one more
product.

Work for M rows of K features and V classes: 2MVK FLOPs forward and 4MVK backward, and 9MV for the
loss itself; compute bound.

Shapes: x [..., K], seen as [M, K]; weight [V, K]; bias [V]; target [...]; losses [...].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import cross_entropy_triton, lazy_triton, native
from .checks import fail, has_shape, is_float_tensor, matches
from .cross_entropy import (
    check_options,
    check_range,
    check_target,
    counted,
    native_in_place,
    native_losses,
    reduced,
    reference_in_place,
    reference_losses,
)
from .launch import refuses
from .op import Cost, Implementation, Op, accumulator, autocast_dtype, disposable, tracked

FEWEST_ROWS = 64  # of a chunk: fewer make poor matrix products
CHUNKS, CPU_CHUNKS = 4, 2  # a CPU's product packs the whole weight anew for each chunk
CHUNK_BYTES = 256 << 20
ROUNDINGS = 4  # chunks that bfloat16 sums are kept in bfloat16 for
SLAB = 8192  # classes of dweight added in float32 at a time

Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # loss, share, dx, dweight, dbias
Gradients = tuple[Tensor | None, ...]  # dx, dweight, dbias


class Loss(NamedTuple):
    """The cross-entropy of a chunk of logits: losses alone, or with the gradient in their place."""

    losses: Callable[..., Tensor]
    in_place: Callable[..., Tensor]


def chunk_rows(M: int, V: int, itemsize: int, chunks: int) -> int:
    """Rows whose logits are in memory at a time: M / chunks, at least 64, at most 256 MiB."""
    return max(1, min(max(-(-M // chunks), FEWEST_ROWS), CHUNK_BYTES // (V * itemsize)))


def sums_dtype(dtype: torch.dtype, chunks: int) -> torch.dtype:
    """The dtype that dweight is added up in."""
    if dtype == torch.float16 or (dtype == torch.bfloat16 and chunks > ROUNDINGS):
        return torch.float32
    return dtype


# -- the walk ------------------------------------------------------------------------------------


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    if bias is None:
        return torch.mm(x, weight.t(), out=out)
    return torch.addmm(bias, x, weight.t(), out=out)


def _add(dweight: Tensor, dlogits: Tensor, x: Tensor, first: bool) -> None:
    """dweight += dlogits.T @ x, or = where it is the first of the sum."""
    if dweight.dtype != x.dtype:
        for v in range(0, len(dweight), SLAB):
            dweight[v : v + SLAB] += torch.mm(dlogits[:, v : v + SLAB].t(), x)
    elif first:
        torch.mm(dlogits.t(), x, out=dweight)
    else:
        dweight.addmm_(dlogits.t(), x)


def _walk(
    loss: Loss,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    g: Tensor,
    options: tuple[int, float, float],
    needs: list[bool],
) -> tuple[Tensor, Gradients]:
    """Losses [M], and the gradients in `needs` of the losses weighted by g, [] or [M]."""
    M, V = len(x), len(weight)
    step = chunk_rows(M, V, x.element_size(), CPU_CHUNKS if x.is_cpu else CHUNKS)
    sums = sums_dtype(x.dtype, -(-M // step))
    losses = x.new_empty(M, dtype=accumulator(x.dtype))
    dx = torch.empty_like(x) if needs[0] else None
    dweight = dbias = None
    if needs[1]:
        fresh = torch.empty_like if M and sums == x.dtype else torch.zeros_like
        dweight = fresh(weight, dtype=sums, memory_format=torch.contiguous_format)
    if needs[2]:
        dbias = losses.new_zeros(V)
    buffer = x.new_empty(min(step, M), V)
    for start in range(0, M, step):
        part = slice(start, min(start + step, M))
        logits = _product(x[part], weight, bias, buffer[: part.stop - start])
        if not any(needs):
            losses[part] = loss.losses(logits, target[part], *options)
            continue
        losses[part] = loss.in_place(logits, target[part], g[part] if g.dim() else g, *options)
        if dx is not None:
            torch.mm(logits, weight, out=dx[part])
        if dweight is not None:
            _add(dweight, logits, x[part], start == 0)
        if dbias is not None:
            dbias += logits.sum(0, dtype=dbias.dtype)
    if dweight is not None and x.dtype == torch.bfloat16:
        dweight = dweight.to(x.dtype)
    return losses, (dx, dweight, dbias)


def _counted_rows(target: Tensor, ignored: int) -> Tensor | None:
    """The rows of target [M] that are not ignored, where the host may know and it is not all."""
    if not target.is_cpu:
        return None
    kept = (target != ignored).nonzero()[:, 0]
    return None if len(kept) == len(target) else kept


def _spread(values: Tensor | None, kept: Tensor | None, M: int) -> Tensor | None:
    """values of the rows `kept` among M rows, 0 in the others."""
    if values is None or kept is None:
        return values
    return values.new_zeros(M, *values.shape[1:]).index_copy_(0, kept, values)


def _walk_counted(
    loss: Loss,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    g: Tensor,
    options: tuple[int, float, float],
    needs: list[bool],
) -> tuple[Tensor, Gradients]:
    """_walk over the rows that count, of x [..., K] and target [...]; results in their shapes."""
    rows, labels = x.reshape(target.numel(), x.shape[-1]), target.reshape(-1)
    g = g.reshape(-1) if g.dim() else g
    kept = _counted_rows(labels, options[0])
    if kept is not None:
        rows, labels = rows[kept], labels[kept]
        g = g[kept] if g.dim() else g
    losses, (dx, dweight, dbias) = _walk(loss, rows, weight, bias, labels, g, options, needs)
    whole, dx = _spread(losses, kept, target.numel()), _spread(dx, kept, target.numel())
    assert whole is not None
    dx = None if dx is None else dx.view(x.shape)
    return whole.view(target.shape), (dx, dweight, dbias)


# -- the op --------------------------------------------------------------------------------------


def _forward(loss: Loss) -> Callable[..., Outputs]:
    def forward(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        ignored: int,
        smoothing: float,
        z: float,
        reduction: str,
        needs: list[bool],
    ) -> Outputs:
        check_range("linear_cross_entropy", target, len(weight), ignored)
        one = x.new_ones((), dtype=accumulator(x.dtype))
        mean = one / counted(target, ignored) if reduction == "mean" else one
        late = x.dtype == torch.float16
        g, share = (one, mean) if late else (mean, one)
        options = (ignored, smoothing, z)
        losses, found = _walk_counted(loss, x, weight, bias, target, g, options, needs)
        dx, dweight, dbias = (x.new_empty(0) if d is None else d for d in found)
        return reduced(losses, target, ignored, reduction), share.clone(), dx, dweight, dbias

    return forward


def _backward(loss: Loss) -> Callable[..., Gradients]:
    def backward(
        grad: Tensor,
        x: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        target: Tensor | None,
        share: Tensor,
        dx: Tensor,
        dweight: Tensor,
        dbias: Tensor,
        ignored: int,
        smoothing: float,
        z: float,
        dtype: torch.dtype,
        needs: list[bool],
    ) -> Gradients:
        if x is not None and weight is not None and target is not None:  # reduction="none"
            options = (ignored, smoothing, z)
            _, found = _walk_counted(loss, x, weight, bias, target, grad, options, needs)
        else:
            factor = grad * share
            as_is = disposable() and factor.is_cpu and factor.item() == 1
            saved = zip((dx, dweight, dbias), needs, strict=True)
            found = tuple((d if as_is else d * factor) if need else None for d, need in saved)
        return tuple(None if d is None else d.to(dtype) for d in found)

    return backward


def cost(x: Tensor, weight: Tensor, *rest: Any) -> Cost:
    """Three products of 2MVK FLOPs, one of them forward; inputs and gradients move once."""
    product = 2 * x.numel() * len(weight)
    M = x.shape[:-1].numel()
    moved = (x.numel() + weight.numel()) * x.element_size() + 12 * M
    return Cost(product + 4 * M * len(weight), moved, 2 * product + 5 * M * len(weight), 2 * moved)


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, *rest: Any) -> Outputs:
    *_, reduction, needs = rest
    wide = accumulator(x.dtype)
    kept = torch.float32 if x.dtype == torch.float16 else x.dtype
    loss = x.new_empty(target.shape if reduction == "none" else (), dtype=wide)
    dx = x.new_empty(x.shape if needs[0] else 0)
    dweight = x.new_empty(weight.shape, dtype=kept) if needs[1] else x.new_empty(0)
    dbias = x.new_empty(len(weight), dtype=wide) if needs[2] else x.new_empty(0)
    return loss, x.new_empty((), dtype=wide), dx, dweight, dbias


def _fake_backward(
    grad: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    target: Tensor | None,
    share: Tensor,
    dx: Tensor,
    dweight: Tensor,
    dbias: Tensor,
    *rest: Any,
) -> tuple[Tensor, ...]:
    dtype = rest[3]
    if x is not None and weight is not None:
        like = (x, weight, weight[:, :1].squeeze(1))
    else:
        like = (dx, dweight, dbias)
    return tuple(grad.new_empty(d.shape, dtype=dtype) for d in like)


def _save(args: Any, outputs: Any) -> tuple[tuple[Tensor | None, ...], tuple[Any, ...]]:
    """The inputs for reduction="none", else the gradients."""
    x, weight, bias, target, ignored, smoothing, z, reduction, _ = args
    inputs = (x, weight, bias, target) if reduction == "none" else (None,) * 4
    return (*inputs, *outputs[1:]), (ignored, smoothing, z, x.dtype)


_TRITON = Loss(lambda *args: cross_entropy_triton.losses(*args)[0], cross_entropy_triton.in_place)
_NATIVE = Loss(native_losses, native_in_place)
_REFERENCE = Loss(lambda *args: reference_losses(*args)[0], reference_in_place)

OP = Op(
    "linear_cross_entropy",
    schema=(
        "(Tensor x, Tensor weight, Tensor? bias, Tensor target, int ignored, float smoothing,"
        " float z, str reduction, bool[] grads)"
        " -> (Tensor loss, Tensor share, Tensor dx, Tensor dweight, Tensor dbias)"
    ),
    backward_schema=(
        "(Tensor grad, Tensor? x, Tensor? weight, Tensor? bias, Tensor? target, Tensor share,"
        " Tensor dx, Tensor dweight, Tensor dbias, int ignored, float smoothing, float z,"
        " ScalarType dtype) -> (Tensor dx, Tensor dweight, Tensor dbias)"
    ),
    implementations=[
        Implementation(
            "triton",
            _forward(_TRITON),
            _backward(_TRITON),
            devices=("cuda",),
            missing=lazy_triton.missing,
            refuses=lambda x, *_: refuses(x),
            refuses_backward=lambda grad, x, weight, bias, target, share, dx, *_: refuses(dx),
        ),
        Implementation(
            "native",
            _forward(_NATIVE),
            _backward(_NATIVE),
            devices=("cpu",),
            missing=native.missing,
        ),
        Implementation("reference", _forward(_REFERENCE), _backward(_REFERENCE)),
    ],
    fake=_fake,
    fake_backward=_fake_backward,
    save=_save,
    inputs_with_grad=(0, 1, 2),
    cost=cost,
)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """cross_entropy(x @ weight.T + bias, target) without the whole logits in memory.

    x: [..., K] float32, float16, bfloat16 or float64. weight: [V, K], V 1 or more, and bias [V] or
    None, in x's dtype. target: [...] int64, 0 to V - 1 or ignore_index. label_smoothing, z_loss,
    reduction, the loss's dtype, and what happens where no target counts or one is out of range: as
    in `cross_entropy`. Logits are rounded to x's dtype, as torch's linear rounds them; the loss is
    computed in float32 (float64 for float64). Under autocast the products run in its dtype, the
    loss in float32. With mean or sum the gradients are computed in the forward call. Raises
    ArgumentError for anything else. Source: Hsu et al. 2024, fused linear cross-entropy.
    """
    op = "linear_cross_entropy"
    is_float_tensor(op, "x", x, min_dims=1)
    is_float_tensor(op, "weight", weight)
    if weight.dim() != 2 or weight.shape[0] == 0:
        raise fail(op, "weight", f"of shape {list(weight.shape)}", "it must be [V, K] with a class")
    has_shape(op, "weight", weight, (weight.shape[0], x.shape[-1]), "classes, the last dim of x")
    check_target(op, target, "x", x)
    check_options(op, ignore_index, label_smoothing, z_loss, reduction)
    if bias is not None:
        is_float_tensor(op, "bias", bias)
        has_shape(op, "bias", bias, weight.shape[:1], "the classes of weight")
    low = autocast_dtype(x.device)
    if low is not None and x.dtype != torch.float64:
        x, weight = x.to(low), weight.to(low)
        bias = None if bias is None else bias.to(low)
    matches(op, "weight", weight, "x", x)
    if bias is not None:
        matches(op, "bias", bias, "x", x)
    ahead = torch.is_grad_enabled() and reduction != "none"
    needs = [ahead and t is not None and tracked((t,)) for t in (x, weight, bias)]
    numbers = (ignore_index, float(label_smoothing), float(z_loss))
    loss: Tensor = OP(x, weight, bias, target, *numbers, reduction, needs)[0]
    return loss
