"""One AdamW step over a list of tensors, in place, clipping by global norm folded in.

    g = clip * grad / grad_scale
    m = beta1 m + (1 - beta1) g      v = beta2 v + (1 - beta2) g^2
    w = (1 - lr weight_decay) w - lr / (1 - beta1^t) m / (sqrt(v / (1 - beta2^t)) + eps)

with clip = min(1, max_norm / (|grad / grad_scale| + 1e-6)). w is the float32 master weight where
there is one, from which the parameter is then rounded; else the parameter. Gradients are read only.

Memory contract: one pass, that reads parameter (or master), gradient and both moments once and
writes all but the gradient once: 28 bytes for each float32 parameter; clipping reads the gradient
once more. 15 FLOPs an element, 2 for its share of the norm. Memory bound. The norm is summed in a
fixed order: every run gives the same bits. Tensors whose memory is in no common order are copied.

Names: a place is what stands at one index of the lists; coefficients, float64 [3] on the device,
hold lr / (1 - beta1^t), sqrt(1 - beta2^t) and the factor of the gradients, 1 / grad_scale.

Source: Loshchilov and Hutter 2019 (AdamW), algorithm 2; clipping: Pascanu et al. 2013.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from . import adamw_triton, lazy_triton, native
from .checks import (
    fail,
    has_shape,
    is_float_tensor,
    is_number,
    is_whole,
    same_device,
    shape_of,
)
from .op import Cost, Implementation, Op, accumulator, plain_eager

HALF = (torch.float16, torch.bfloat16)
TINIEST = 2.0**-1074  # above 0

Tensors = list[Tensor]


# -- reference -----------------------------------------------------------------------------------


def reference(
    coefficients: Tensor,
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    masters: Tensors,
    beta1: float,
    beta2: float,
    eps: float,
    decay: float,
    max_norm: float | None,
) -> tuple[Tensor]:
    """The definition, in torch, in float32 or wider; returns the norm. masters: [] means none, and
    so does an empty one."""
    norm, coefficients = _clipped(coefficients, grads, max_norm)
    for param, grad, m, v, master in zip(
        params, grads, exp_avgs, exp_avg_sqs, masters or params, strict=True
    ):
        wide = accumulator(param.dtype)
        step_size, root, scale = coefficients.to(wide).unbind()
        w = master if master.numel() > 0 else param
        g = grad.to(wide) * scale
        new_m = torch.lerp(m.to(wide), g, 1 - beta1)
        new_v = v.to(wide) * beta2 + g * g * (1 - beta2)
        new_w = w.to(wide) * (1 - decay) - step_size * (new_m / (new_v.sqrt() / root + eps))
        for tensor, value in ((m, new_m), (v, new_v), (w, new_w), (param, new_w)):
            tensor.copy_(value)
    return (norm,)


def _clipped(coefficients: Tensor, grads: Tensors, max_norm: float | None) -> tuple[Tensor, Tensor]:
    """(the norm of all gradients, float32 [], coefficients that clip it); no norm is empty."""
    if max_norm is None:
        return coefficients.new_empty(0, dtype=torch.float32), coefficients
    each = torch._foreach_norm(grads, 2, torch.float64)
    step_size, root, scale = coefficients.unbind()
    norm = torch.linalg.vector_norm(torch.stack(each)) * scale
    clip = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    return norm.float(), torch.stack([step_size, root, scale * clip])


# -- the other ways ------------------------------------------------------------------------------


def _native(*args: Any) -> tuple[Tensor]:
    return (native.op("adamw")(*args),)


def _triton(
    coefficients: Tensor,
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    masters: Tensors,
    *hyper_and_max_norm: Any,
) -> tuple[Tensor]:
    *hyper, max_norm = hyper_and_max_norm
    norm, coefficients = _clipped(coefficients, grads, max_norm)
    given = list(zip(params, grads, exp_avgs, exp_avg_sqs, *[masters] * bool(masters), strict=True))
    places = [_in_one_order(place) for place in given]
    adamw_triton.step(coefficients, places, *hyper)
    for to, place in zip(given, places, strict=True):
        for i, copy in enumerate(place):
            if copy is not to[i] and i != 1:  # a gradient is read only
                to[i].copy_(copy)
    # kernels write behind autograd's back
    torch.autograd.graph.increment_version([*params, *exp_avgs, *exp_avg_sqs, *masters])
    return (norm,)


def _in_one_order(place: tuple[Tensor, ...]) -> Sequence[Tensor]:
    """The tensors of a place, or copies, so that equal offsets in memory are equal elements."""
    strides = place[0].stride()
    dense = torch._debug_has_internal_overlap(place[0]) == 0
    if dense and all(t.stride() == strides for t in place if t.numel() > 0):
        return place
    return [t.contiguous() for t in place]


# -- the op --------------------------------------------------------------------------------------


def cost(
    coefficients: Tensor,
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    masters: Tensors,
    *hyper: Any,
) -> Cost:
    """15 FLOPs an element and each tensor moved as the module docstring counts."""
    clips = hyper[-1] is not None
    flops = moved = 0
    for param, grad, m, v, master in zip(
        params, grads, exp_avgs, exp_avg_sqs, masters or params, strict=True
    ):
        flops += (15 + 2 * clips) * param.numel()
        moved += sum(2 * t.nbytes for t in (m, v, param)) + (1 + clips) * grad.nbytes
        if masters and master.numel() > 0:  # read in the parameter's stead
            moved += 2 * master.nbytes - param.nbytes
    return Cost(flops, moved, 0, 0)


OP = Op(
    "adamw_step",
    schema=(
        "(Tensor coefficients, Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs,"
        " Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] masters, float beta1, float beta2, float eps,"
        " float decay, float? max_norm) -> Tensor"
    ),
    implementations=[
        Implementation(
            "triton",
            _triton,
            devices=("cuda",),
            missing=lazy_triton.missing,
            refuses=lambda coefficients, params, *_: adamw_triton.refuses(params),
        ),
        Implementation("native", _native, devices=("cpu",), missing=native.missing),
        Implementation("reference", reference),
    ],
    fake=lambda coefficients, *rest: coefficients.new_empty(
        0 if rest[-1] is None else (), dtype=torch.float32
    ),
    cost=cost,
)


# -- public function -----------------------------------------------------------------------------


def _is_usual(params: Sequence[Tensor], *lists: Sequence[Tensor | None]) -> bool:
    """Whether C++, where it is there, sees at a glance that _check_lists would pass the lists."""
    if native.missing() is not None or not params or not plain_eager(params):
        return False
    if not {Tensor, torch.nn.Parameter}.issuperset(map(type, chain(*lists))):
        return False
    missing: list[list[Tensor]] = [[]] * (4 - len(lists))
    usual: bool = native.op("adamw_usual")(params, *lists, *missing)
    return usual


def _check_lists(named: Mapping[str, Sequence[Tensor | None]]) -> None:
    """Raise unless the tensors of every place fit each other and none is in another's memory."""
    first = named["params"][0] if named["params"] else None
    for i, place in enumerate(zip(*named.values(), strict=True)):
        _check_place(i, list(named), place)
        same_device("adamw_step", f"params[{i}]", place[0], "params[0]", first)  # type: ignore[arg-type]
    if first is not None and plain_eager(list(chain(*named.values()))):
        _check_memory(named)


def _check_place(i: int, names: Sequence[str], place: Sequence[Tensor | None]) -> None:
    """Raise unless the tensors at place i of the lists fit the first, which is the parameter."""
    param = place[0]
    for name, tensor in zip(names, place, strict=True):
        if tensor is None and name == "master":
            continue
        label = f"{name}[{i}]"
        is_float_tensor("adamw_step", label, tensor, min_dims=0)
        assert param is not None and tensor is not None
        has_shape("adamw_step", label, tensor, param.shape, f"the shape of params[{i}]")
        same_device("adamw_step", label, tensor, "params[0]", param)
        allowed = {
            "params": (param.dtype,),
            "grads": (param.dtype,),
            "master": (torch.float32,) if param.dtype in HALF else (),
        }.get(name, (param.dtype, torch.float32) if param.dtype in HALF else (param.dtype,))
        if tensor.dtype not in allowed:
            takes = " or ".join(map(str, allowed)) or "None"
            raise fail("adamw_step", label, tensor.dtype, f"{takes} goes with {param.dtype}")
    if place[2].dtype != place[3].dtype:  # type: ignore[union-attr]
        got = place[3].dtype  # type: ignore[union-attr]
        raise fail("adamw_step", f"exp_avg_sqs[{i}]", got, "cast both moments alike")


def _check_writable(label: str, tensor: Tensor) -> None:
    """Raise where torch lets nobody write into a tensor in place."""
    if tensor.is_neg():
        takes = f"step {label}.resolve_neg() and keep it"
        raise fail("adamw_step", label, "a view with the negative bit", takes)
    if tensor.is_inference() and not torch.is_inference_mode_enabled():
        takes = f"step {label}.clone() and keep it, or step inside inference mode"
        raise fail("adamw_step", label, "made in inference mode", takes)


def _check_memory(named: Mapping[str, Sequence[Tensor | None]]) -> None:
    """Raise if an element that the step writes is an element of another tensor, or its own twin, or
    may not be written.

    Of a tensor with gaps only the first element is looked for: others may lie in the gaps.
    """
    spans: list[tuple[int, int, int, str, bool]] = []
    for name, tensors in named.items():
        for i, tensor in enumerate(tensors):
            if tensor is None:
                continue
            label, overlap = f"{name}[{i}]", torch._debug_has_internal_overlap(tensor)
            if name != "grads":
                _check_writable(label, tensor)
            if tensor.numel() == 0:
                continue
            if overlap == 1 and name != "grads":
                raise fail("adamw_step", label, "expanded", f"pass {label}.contiguous()")
            size = tensor.nbytes if overlap == 0 else tensor.element_size()
            spans.append((tensor.data_ptr(), len(spans), size, label, name == "grads"))
    reach = {True: (0, ""), False: (0, "")}  # the furthest end so far, of gradients and of others
    for start, _, size, label, read_only in sorted(spans):
        for end, other in (reach[False], *[reach[True]] * (not read_only)):
            if start < end:
                raise fail("adamw_step", label, f"in {other}'s memory", "pass it once, or a clone")
        reach[read_only] = max(reach[read_only], (start + size, label))


def _check_scalar(name: str, scalar: Tensor, least: float, takes: str) -> None:
    """Raise unless a tensor holds one number; what number it is shows on a CPU alone."""
    if scalar.numel() != 1:
        raise fail("adamw_step", name, f"of shape {shape_of(scalar)}", "pass one number")
    if scalar.is_complex() or scalar.dtype == torch.bool:
        raise fail("adamw_step", name, scalar.dtype, takes)
    if plain_eager([scalar]) and scalar.is_cpu and not least <= scalar.item() < math.inf:
        raise fail("adamw_step", name, scalar.item(), takes)


def _check_numbers(
    step: int | Tensor,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    grad_scale: float | Tensor,
    max_norm: float | None,
) -> None:
    for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
        is_number("adamw_step", name, value)
        if value < 0:
            raise fail("adamw_step", name, value, "pass 0 or more")
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise fail("adamw_step", "betas", repr(betas), "pass two numbers")
    for i, beta in enumerate(betas):
        is_number("adamw_step", f"betas[{i}]", beta)
        if not 0 <= beta < 1:
            raise fail("adamw_step", f"betas[{i}]", beta, "pass 0 or more, below 1")
    if isinstance(grad_scale, Tensor):
        _check_scalar("grad_scale", grad_scale, TINIEST, "pass a number above 0")
    else:
        is_number("adamw_step", "grad_scale", grad_scale)
        if grad_scale <= 0:
            raise fail("adamw_step", "grad_scale", grad_scale, "pass a number above 0")
    if max_norm is not None and max_norm != math.inf:
        is_number("adamw_step", "max_norm", max_norm)
    if max_norm is not None and max_norm <= 0:
        raise fail("adamw_step", "max_norm", max_norm, "pass a number above 0, or None")
    first = "pass 1 for the first step, and so on"
    if isinstance(step, Tensor):
        _check_scalar("step", step, 1, first)
    elif not is_whole(step) or step < 1:
        raise fail("adamw_step", "step", repr(step), first)
    else:
        is_number("adamw_step", "step", step)


def _coefficients(
    step: int | Tensor,
    lr: float,
    betas: tuple[float, float],
    grad_scale: float | Tensor,
    device: torch.device,
) -> Tensor:
    """What the module docstring says, from numbers or from tensors, which nothing waits for."""

    def wide(value: float | Tensor) -> Tensor:
        if isinstance(value, Tensor):
            return value.detach().to(device, torch.float64).reshape(())
        return torch.full((), float(value), dtype=torch.float64, device=device)

    t: Any = wide(step) if isinstance(step, Tensor) else float(step)
    scale = 1 / (wide(grad_scale) if isinstance(grad_scale, Tensor) else grad_scale)
    found = (lr / (1 - betas[0] ** t), (1 - betas[1] ** t) ** 0.5, scale)
    return torch.stack([wide(each) for each in found])


@torch.no_grad()
def adamw_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    step: int | Tensor,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    master: Sequence[Tensor | None] | None = None,
    grad_scale: float | Tensor = 1.0,
    max_norm: float | None = None,
) -> Tensor | None:
    """Step `step` (1 is the first) of AdamW: changes params, exp_avgs, exp_avg_sqs and master.

    params: tensors of any shapes and strides on one device, float32, float16, bfloat16 or
    float64. grads: of the same shapes and dtypes; read only. exp_avgs, exp_avg_sqs: the moments,
    zeros before the first step, in the parameters' dtype, or float32 beside half-precision ones.
    master: None, or for each parameter a float32 master weight or None (only half-precision
    parameters take one): the step is done on it and the parameter is written rounded from it.
    step: an int, or a tensor of one number that holds it. grad_scale: what the loss was multiplied
    with, a number above 0 or a tensor of one; gradients are divided by it first. max_norm: clip the
    gradients so that the 2-norm of all together is at most this; inf only measures it; None does
    neither.

    Returns that norm before clipping, float32 [] on the parameters' device, or None without
    max_norm. NaN and infinities in gradients reach the parameters, through the norm all of them,
    as with torch.nn.utils.clip_grad_norm_. Equal to torch.optim.AdamW up to rounding. Nothing
    waits for a GPU. No gradient flows through the step. Raises ArgumentError for anything else,
    before any tensor changes. Source: module docstring.
    """
    named: dict[str, Any] = {
        "params": params, "grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs
    }  # fmt: skip
    if master is not None:
        named["master"] = master
    for name, tensors in named.items():
        if not isinstance(tensors, (list, tuple)):
            raise fail("adamw_step", name, f"a {type(tensors).__name__}", "pass a list of tensors")
        if len(tensors) != len(params):
            takes = f"params holds {len(params)}"
            raise fail("adamw_step", name, f"a list of {len(tensors)}", takes)
    if not _is_usual(*named.values()):
        _check_lists(named)
    _check_numbers(step, lr, betas, eps, weight_decay, grad_scale, max_norm)
    if not params:
        return None if max_norm is None else torch.zeros(())
    norm: Tensor = OP(
        _coefficients(step, lr, betas, grad_scale, params[0].device),
        list(params),
        list(grads),
        list(exp_avgs),
        list(exp_avg_sqs),
        [params[0].new_empty(0, dtype=torch.float32) if w is None else w for w in master or ()],
        *map(float, betas),
        float(eps),
        float(lr) * weight_decay,
        None if max_norm is None else float(max_norm),
    )
    return None if max_norm is None else norm
