"""One AdamW step over a list of tensors, in place, clipping by global norm folded in.

    g = clip * grad / grad_scale
    m = beta1 m + (1 - beta1) g      v = beta2 v + (1 - beta2) g^2
    w = (1 - lr weight_decay) w - lr / (1 - beta1^t) m / (sqrt(v / (1 - beta2^t)) + eps)

with clip = min(1, max_norm / (|grad / grad_scale| + 1e-6)). w is the float32 master weight where
there is one, from which the parameter is then rounded; else the parameter. Gradients are read only.

Memory contract: one pass, that reads parameter (or master), gradient and both moments once and
writes all but the gradient once: 28 bytes for each float32 parameter; clipping reads the gradient
once more. 16 FLOPs an element. Memory bound. The norm is summed in a fixed order: every run gives
the same bits.

Source: Loshchilov and Hutter 2019 (AdamW), algorithm 2; clipping: Pascanu et al. 2013.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import adamw_triton, lazy_triton, native
from .checks import (
    FLOATS,
    fail,
    has_shape,
    is_float_tensor,
    is_number,
    is_whole,
    same_device,
    shape_of,
)
from .errors import KernelUnavailable
from .op import _forced, _library, accumulator, plain_eager

HALF = (torch.float16, torch.bfloat16)
TINIEST = 2.0**-1074  # above 0


# -- reference -----------------------------------------------------------------------------------


def reference(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    masters: list[Tensor],
    coefficients: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    decay: float,
) -> None:
    """The definition, in torch, in float32 or wider. An empty master means none."""
    for param, grad, m, v, master in zip(
        params, grads, exp_avgs, exp_avg_sqs, masters, strict=True
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


def _norm(grads: list[Tensor]) -> Tensor:
    """The 2-norm of all gradients together, [] in float32 or wider."""
    if grads[0].device.type == "cpu" and native.missing() is None and plain_eager(grads):
        norm: Tensor = native.op("grad_norm")([grad.contiguous() for grad in grads])
        return norm
    each = [torch.linalg.vector_norm(grad, dtype=accumulator(grad.dtype)) for grad in grads]
    return torch.linalg.vector_norm(torch.stack([norm.double() for norm in each]))


# -- the ways ------------------------------------------------------------------------------------


def _native(*args: Any) -> None:
    native.op("adamw")(*args)


def _way(device: str) -> Callable[..., None]:
    """The implementation that runs on `device`: the forced one, else the fastest there is."""
    on_triton = "cpu" if lazy_triton.interpreted() else "cuda"
    ways = {
        "triton": (adamw_triton.step, on_triton, lazy_triton.missing()),
        "native": (_native, "cpu", native.missing()),
        "reference": (reference, device, None),
    }
    name = _forced.implementation("adamw_step")
    if name is not None:
        if name not in ways:
            raise KernelUnavailable(f"adamw_step has no {name!r} implementation; it has {[*ways]}")
        step, where, missing = ways[name]
        if where != device or missing is not None:
            why = missing or f"runs on {where}, not on {device}"
            raise KernelUnavailable(f"adamw_step cannot run on {name!r} here: {why}")
        return step
    name = "triton" if device == "cuda" else "native"
    step, where, missing = ways[name]
    return step if where == device and missing is None else reference


def _run(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    masters: list[Tensor],
    coefficients: Tensor,
    *hyper: float,
) -> None:
    """Contiguous tensors take the fastest way, others the reference."""
    step = _way(params[0].device.type)
    grads = [grad.contiguous() for grad in grads]
    flat: list[Any] = []
    rest: list[Any] = []
    for place in zip(params, grads, exp_avgs, exp_avg_sqs, masters, strict=True):
        wide = place[0].dtype == torch.float64 and step is adamw_triton.step
        (flat if all(t.is_contiguous() for t in place) and not wide else rest).append(place)
    ways: tuple[Callable[..., None], ...] = (step, reference)
    for way, chosen in zip(ways, (flat, rest), strict=True):
        if chosen:
            lists = [list(each) for each in zip(*chosen, strict=True)]
            way(*lists, coefficients, *hyper)
    # kernels write behind autograd's back
    torch.autograd.graph.increment_version([*params, *exp_avgs, *exp_avg_sqs, *masters])


_library.define(
    "adamw_step(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs,"
    " Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] masters, Tensor coefficients, float beta1,"
    " float beta2, float eps, float decay) -> ()"
)
_library.impl("adamw_step", _run, "CompositeExplicitAutograd")
torch.library.register_fake("tilewise::adamw_step", lambda *args: None, lib=_library)


# -- public function -----------------------------------------------------------------------------


def _alike(place: Sequence[Tensor | None]) -> bool:
    """Whether there is no master and the rest has one shape, dtype and device, as is usual."""
    param, *others, master = place
    if master is not None or not isinstance(param, Tensor):
        return False
    kind = (param.shape, param.dtype, param.device, torch.strided)
    return param.dtype in FLOATS and all(
        isinstance(t, Tensor) and (t.shape, t.dtype, t.device, t.layout) == kind for t in others
    )


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


def _check_memory(names: Sequence[str], lists: Sequence[Sequence[Tensor | None]]) -> None:
    """Raise if an element that the step writes is an element of another tensor, or its own twin."""
    used = [t for tensors in lists for t in tensors if t is not None and t.numel() > 0]
    if len({t.data_ptr() for t in used}) == len(used) and all(t.is_contiguous() for t in used):
        return  # as usual, and quick to find out
    seen: dict[int, str] = {}
    for name, tensors in zip(names, lists, strict=True):
        for i, tensor in enumerate(tensors):
            if tensor is None or tensor.numel() == 0:
                continue
            label, read_only = f"{name}[{i}]", name == "grads"
            if not read_only and torch._debug_has_internal_overlap(tensor) == 1:
                raise fail("adamw_step", label, "expanded", f"pass {label}.contiguous()")
            other = seen.setdefault(tensor.data_ptr(), label)
            if other != label and not (read_only and other.startswith("grads")):
                raise fail("adamw_step", label, f"in {other}'s memory", "pass it once, or a clone")


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


def _scalar(value: float | Tensor, device: torch.device) -> Tensor:
    """float64 [] on `device`."""
    if isinstance(value, Tensor):
        return value.detach().to(device, torch.float64).reshape(())
    return torch.full((), float(value), dtype=torch.float64, device=device)


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
    none: list[Tensor | None] = [None] * len(params) if isinstance(params, (list, tuple)) else []
    owners = none if master is None else master
    names = ("params", "grads", "exp_avgs", "exp_avg_sqs", "master")
    lists: tuple[Sequence[Tensor | None], ...] = (params, grads, exp_avgs, exp_avg_sqs, owners)
    for name, tensors in zip(names, lists, strict=True):
        if not isinstance(tensors, (list, tuple)):
            raise fail("adamw_step", name, f"a {type(tensors).__name__}", "pass a list of tensors")
        if len(tensors) != len(params):
            takes = f"params holds {len(params)}"
            raise fail("adamw_step", name, f"a list of {len(tensors)}", takes)
    for i, place in enumerate(zip(*lists, strict=True)):
        if not _alike(place):
            _check_place(i, names, place)
        same_device("adamw_step", f"params[{i}]", params[i], "params[0]", params[0])
    _check_numbers(step, lr, betas, eps, weight_decay, grad_scale, max_norm)
    if not params:
        return None if max_norm is None else torch.zeros(())
    if plain_eager(params):
        _check_memory(names, lists)
    device = params[0].device
    t, scale = _scalar(step, device), 1 / _scalar(grad_scale, device)
    norm = None
    if max_norm is not None:
        norm = _norm(list(grads)) * scale
        scale = scale * (max_norm / (norm + 1e-6)).clamp(max=1.0)
    coefficients = torch.stack([lr / (1 - betas[0] ** t), (1 - betas[1] ** t).sqrt(), scale])
    arguments: Any = (
        list(params),
        list(grads),
        list(exp_avgs),
        list(exp_avg_sqs),
        [params[0].new_empty(0, dtype=torch.float32) if w is None else w for w in owners],
        coefficients,
        *map(float, betas),
        float(eps),
        float(lr) * weight_decay,
    )
    run = _run if plain_eager(params) else torch.ops.tilewise.adamw_step
    run(*arguments)
    return None if norm is None else norm.float()
