"""Planning what to replace in a model, replacing it, proving it on an example, and undoing it."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ArgumentError, FusionError
from . import torch_modules, transformers_losses, transformers_models
from .report import FusionReport, Replaced, Skipped
from .swapping import Fused, fused_class, obstacle

TORCH: dict[type[nn.Module], type[Fused]] = {
    nn.LayerNorm: torch_modules.LayerNorm,
    nn.RMSNorm: torch_modules.RMSNorm,
    nn.Sequential: torch_modules.Sequential,
    nn.MultiheadAttention: torch_modules.MultiheadAttention,
    nn.TransformerEncoderLayer: torch_modules.TransformerEncoderLayer,
    nn.TransformerDecoderLayer: torch_modules.TransformerDecoderLayer,
    nn.TransformerEncoder: torch_modules.TransformerEncoder,
}
# How far an output may move, as a share of its largest element.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def fuse(model: nn.Module, example: Any = None, *, tolerance: float | None = None) -> FusionReport:
    """Replace, in place, what `model` computes with torch by tilewise's fused ops.

    model: any torch.nn.Module; see the package's docstring for what is known inside it. Parameters,
    state_dict, hooks, tied weights, requires_grad, dtype, device and training flags stay.
    example: a tensor, a tuple of arguments, or a dict of keyword arguments for `model`. It is run
    before and after, in evaluation mode without gradients, and every tensor returned must agree
    within `tolerance` times its largest element (1e-4 for float32, 1e-2 float16, 5e-2 bfloat16,
    1e-9 float64); not compared: NaN, and where a 2-D attention_mask in the example is 0. A model
    that changes what it is given (a cache) or keeps state between calls needs an example without.
    A fused model runs eagerly, under torch.compile, torch.export and torch.func's grad, vjp, jacrev
    and vmap; torch.jit and torch.fx take the model as it was, after report.revert(). Models of
    transformers that share one config object share its attention too.
    Returns a FusionReport. Raises ArgumentError for a model or example of another kind, and
    FusionError when outputs disagree; whatever is raised, the model is left as it was.
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"fuse: model is {type(model).__name__}; pass a torch.nn.Module")
    if tolerance is not None and not tolerance >= 0:
        raise ArgumentError(f"fuse: tolerance is {tolerance}; takes a share of the largest element")
    expected = None if example is None else _outputs(model, example)
    report = FusionReport()
    try:
        _replace(model, report)
        if expected is not None:
            report.max_difference = _difference(
                expected, _outputs(model, example), _attended(example), tolerance
            )
    except BaseException:
        report.revert()
        raise
    return report


# -- replacing -----------------------------------------------------------------------------------


def _replace(model: nn.Module, report: FusionReport) -> None:
    for path, module in model.named_modules():
        mixin, reason = _plan(module)
        if reason is not None:
            report.skipped.append(Skipped(path, type(module).__name__, reason))
        elif mixin is not None:
            report.replaced.append(_swap_class(path, module, mixin, report.undo))
    transformers_models.replace_attention(model, report)
    transformers_losses.replace_losses(model, report)


def _plan(module: nn.Module) -> tuple[type[Fused] | None, str | None]:
    """(what replaces this module, why nothing does); two None for a module of no concern."""
    if isinstance(module, Fused):
        return None, "it is fused already"
    mixin = TORCH.get(type(module)) or transformers_models.known(module)
    if mixin is None:
        return None, _near_miss(module)
    if not mixin.concerns(module):
        return None, None
    reason = obstacle(module) or mixin.refuses(module) or _other_signature(mixin, type(module))
    return (None, reason) if reason else (mixin, None)


def _near_miss(module: nn.Module) -> str | None:
    """Why a module that is close to a known one stays, None when it is not close."""
    for known in TORCH:
        if known is not nn.Sequential and isinstance(module, known):
            return obstacle(module) or f"only {known.__name__} itself is known, not its subclasses"
    return transformers_models.near_miss(module)


def _other_signature(mixin: type[Fused], original: type[nn.Module]) -> str | None:
    for name, method in vars(mixin).items():
        theirs = getattr(original, name, None)
        if inspect.isfunction(method) and inspect.isfunction(theirs) and name[:2] != "__":
            ours, own = (list(inspect.signature(f).parameters) for f in (method, theirs))
            if ours != own:
                return f"its {name} takes {', '.join(own[1:])} in this version"
    return None


def _swap_class(
    path: str, module: nn.Module, mixin: type[Fused], undo: list[Callable[[], None]]
) -> Replaced:
    old = type(module)
    new = fused_class(mixin, old)

    def restore() -> None:
        if type(module) is new:
            module.__class__ = old
        elif isinstance(module, new):  # parametrized or sharded since
            now = type(module).__name__
            warnings.warn(f"revert: {path} stays fused, for it has become {now}", stacklevel=3)

    undo.append(restore)
    module.__class__ = new
    return Replaced(path, old.__name__, new.__name__ + mixin.gains)


# -- comparing -----------------------------------------------------------------------------------


def _outputs(model: nn.Module, example: Any) -> list[Tensor]:
    """Copies of the tensors that the model returns in evaluation; its state stays as it is."""
    args, kwargs = _arguments(example)
    modes = [(module, module.training) for module in model.modules()]
    devices = {p.device for p in model.parameters() if p.is_cuda}
    try:
        for module, _ in modes:
            module.training = False
        with torch.no_grad(), torch.random.fork_rng(devices=list(devices)):
            found = [tensor.clone() for tensor in _tensors(model(*args, **kwargs))]
    finally:
        for module, training in modes:
            module.training = training
    if not found:
        raise ArgumentError("fuse: example gives no tensor that could be compared")
    return found


def _arguments(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example, Tensor):
        return (example,), {}
    if isinstance(example, tuple):
        return example, {}
    if isinstance(example, Mapping):
        return (), dict(example)
    takes = "pass a tensor, a tuple of arguments or a dict of keyword arguments"
    raise ArgumentError(f"fuse: example is {type(example).__name__}; {takes}")


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, (tuple, list)):
        for value in output:
            yield from _tensors(value)


def _attended(example: Any) -> Tensor | None:
    """[B, S] bool, False at padding, when the example has an attention_mask of that kind."""
    mask = example.get("attention_mask") if isinstance(example, Mapping) else None
    return mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None


def _difference(
    expected: list[Tensor], found: list[Tensor], attended: Tensor | None, tolerance: float | None
) -> float:
    """The largest difference; raises FusionError where it is larger than tolerated."""
    if [t.shape for t in expected] != [t.shape for t in found]:
        raise FusionError("fuse: outputs have other shapes than before; the model is as it was")
    largest = 0.0
    for i, (before, after) in enumerate(zip(expected, found, strict=True)):
        if attended is not None and before.shape[:2] == attended.shape:
            before, after = before[attended], after[attended]
        compared = (before == before) & (before != after)
        if not compared.any():
            continue
        wide = torch.complex128 if before.is_complex() else torch.float64
        moved = (before[compared].to(wide) - after[compared].to(wide)).abs().max().item()
        limit = TOLERANCE.get(before.abs().dtype, 0.0) if tolerance is None else tolerance
        scale = before[before.isfinite()].abs().max().item() if before.isfinite().any() else 0.0
        if not moved <= limit * scale:
            raise FusionError(
                f"fuse: output {i} ({before.dtype}) moved by {moved:.2e}, more than {limit:.0e} of "
                f"its largest element {scale:.2e}; the model is as it was. If that is rounding, "
                "raise tolerance; if the model changes the example or its own state when it runs, "
                "pass another or none; else report what differs"
            )
        largest = max(largest, moved)
    return largest
