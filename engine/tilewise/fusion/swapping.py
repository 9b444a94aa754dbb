"""How a module is fused: it keeps everything it is, and a class in front of its own runs our ops.

`module.__class__` becomes a subclass of what it was. Parameters, buffers, hooks, tied weights, the
training flag, state_dict keys and isinstance checks are those of the module, because it is the same
module. A fused forward that cannot serve a call leaves it to the module's own forward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import _has_any_global_hook
from torch.nn.utils import parametrize

from tilewise_kernels import feed_forward, layer_norm, linear_act
from tilewise_kernels.op import autocast_dtype

# Called when a fused module of the class `original` is made anew by pickle or copy.
on_rebuild: list[Callable[[type[nn.Module]], None]] = []


class Fused(nn.Module):
    """Goes in front of a module's own class, whose methods it calls through super()."""

    original: ClassVar[type[nn.Module]]
    mixin: ClassVar[type[Fused]]
    gains: ClassVar[str] = ""  # of a class that keeps its name: what reports say behind it

    @classmethod
    def concerns(cls, module: Any) -> bool:
        """Whether there is anything in this module to fuse."""
        return True

    @classmethod
    def refuses(cls, module: Any) -> str | None:
        """Why a module of the right class stays as it is, or None."""
        return None

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _rebuild, (self.mixin, self.original), self.__dict__


_classes: dict[tuple[type[Fused], type[nn.Module]], type[Any]] = {}


def fused_class(mixin: type[Fused], original: type[nn.Module]) -> type[Any]:
    """The subclass of `original` whose forward is the mixin's."""
    key = (mixin, original)
    if key not in _classes:
        own = {"mixin": mixin, "original": original}
        name = original.__name__
        _classes[key] = type(name if mixin.gains else f"Fused{name}", key, own)
    return _classes[key]


def _rebuild(mixin: type[Fused], original: type[nn.Module]) -> nn.Module:
    for made in on_rebuild:
        made(original)
    fused: Any = fused_class(mixin, original)
    return fused.__new__(fused)


def own_class(module: object) -> type:
    """The class a module has when nothing is fused."""
    return module.original if isinstance(module, Fused) else type(module)


def transformers_name(module: object) -> str:
    """family.file.class of a module of transformers when nothing is fused, "" of any other."""
    kind = own_class(module)
    prefix, _, rest = f"{kind.__module__}.{kind.__qualname__}".partition("transformers.models.")
    return "" if prefix else rest


def obstacle(module: nn.Module) -> str | None:
    """Why no forward of this module may be replaced, whatever its class."""
    if parametrize.is_parametrized(module):
        return "its parameters are parametrized"
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance"
    return None


# -- may a call go past a module's own __call__? -------------------------------------------------


def is_bare(module: object) -> bool:
    """Whether nothing would miss the call of this module: no hooks, its own forward."""
    if not isinstance(module, nn.Module):
        return True
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
        or _has_any_global_hook()
    )


def fits(x: Tensor, *weights: Tensor | None) -> bool:
    """Whether our ops take x beside these weights as torch's own layers would."""
    if x.is_nested or x.layout is not torch.strided:
        return False
    for weight in weights:
        if weight is None:
            continue
        if type(weight) not in (nn.Parameter, Tensor) or weight.device != x.device:
            return False  # quantised, distributed or offloaded
        if weight.dtype != x.dtype and autocast_dtype(x.device) is None:
            return False
    return True


def norm_fits(x: Tensor, weight: Tensor | None) -> bool:
    """As fits(), for norms: autocast of a CPU leaves them the dtype of x, our ops give float32."""
    same = weight is None or weight.dtype == x.dtype
    return fits(x, weight) and (same or x.device.type != "cpu")


def linear_parameters(layer: Any) -> tuple[Tensor, Tensor | None] | None:
    """weight [out, in] and bias [out] of a plain linear layer without hooks, else None."""
    kind = type(layer)
    if kind is nn.Linear:
        weight, bias = layer.weight, layer.bias
    elif kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils":
        weight, bias = layer.weight.t(), layer.bias
    else:
        return None
    # torch takes a bias of any shape that broadcasts
    plain = weight.dim() == 2 and (bias is None or bias.shape == weight.shape[:1])
    return (weight, bias) if plain and is_bare(layer) else None


_BY_FUNCTION = {F.relu: "relu", torch.relu: "relu", F.gelu: "gelu", F.silu: "silu"}
_BY_CLASS = {
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
    "FastGELUActivation": "gelu_tanh",
    "QuickGELUActivation": "quick_gelu",
    "SiLUActivation": "silu",
}


def activation_name(activation: Any) -> str | None:
    """What our ops call this activation, None when they lack it or it has hooks."""
    if not isinstance(activation, nn.Module):
        return _BY_FUNCTION.get(activation)
    kind = type(activation)
    if not is_bare(activation):
        return None
    if kind is nn.GELU:
        return "gelu" if activation.approximate == "none" else "gelu_tanh"
    if kind is nn.ReLU:
        return "relu"
    if kind is nn.SiLU:
        return "silu"
    return _BY_CLASS.get(kind.__name__) if kind.__module__ == "transformers.activations" else None


def is_idle(dropout: Any) -> bool:
    """Whether a Dropout does nothing now and has no hooks."""
    if type(dropout) is nn.Identity:
        return is_bare(dropout)
    idle = type(dropout) is nn.Dropout and (dropout.p == 0 or not dropout.training)
    return idle and is_bare(dropout)


# -- pieces that every Transformer is made of ----------------------------------------------------


def two_layers(x: Tensor, first: Any, activation: Any, dropout: Any, second: Any) -> Tensor:
    """second(dropout(activation(first(x)))), as one op where the modules allow it.

    x: [..., K]. first, second: linear layers; activation: a module or function; dropout: a module
    or function, None when there is none. What has hooks or is not known is called as a module.
    """
    name, w1, w2 = activation_name(activation), linear_parameters(first), linear_parameters(second)
    if name is None or w1 is None or not fits(x, *w1):
        h = activation(first(x))
        return second(h if dropout is None else dropout(h))
    if (dropout is None or is_idle(dropout)) and w2 is not None and fits(x, *w2):
        return feed_forward(x, *w1, *w2, activation=name)
    h = linear_act(x, *w1, activation=name)
    return second(h if dropout is None else dropout(h))


def gated_layers(
    x: Tensor, first: Any, activation: Any, gate: Any, dropout: Any, second: Any
) -> Tensor:
    """second(dropout(activation(first(x)) * gate(x))), as one op where the modules allow it."""
    name, w1, w2 = activation_name(activation), linear_parameters(first), linear_parameters(second)
    up = linear_parameters(gate)
    if (
        name is None
        or w1 is None
        or w2 is None
        or up is None
        or up[1] is not None
        or not (dropout is None or is_idle(dropout))
        or not fits(x, *w1, *w2, up[0])
    ):
        h = activation(first(x)) * gate(x)
        return second(h if dropout is None else dropout(h))
    return feed_forward(x, *w1, *w2, activation=name, gate=up[0])


def norm_of_sum(norm: Any, x: Tensor, residual: Tensor) -> Tensor:
    """norm(x + residual), [..., N], the sum inside the norm's kernel where norm is a LayerNorm."""
    if _adds(norm, x, residual):
        return layer_norm(x, norm.weight, norm.bias, eps=norm.eps, residual=residual)
    return norm(x + residual)


def norm_and_sum(norm: Any, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """(norm(s), s) with s = x + residual: the pre-norm step."""
    if _adds(norm, x, residual):
        return layer_norm(x, norm.weight, norm.bias, eps=norm.eps, residual=residual, prenorm=True)
    s = x + residual
    return norm(s), s


def _adds(norm: Any, x: Tensor, residual: Tensor) -> bool:
    """Whether layer_norm may add these two before a norm."""
    return (
        own_class(norm) is nn.LayerNorm
        and len(norm.normalized_shape) == 1
        and is_bare(norm)
        and x.shape == residual.shape
        and x.dtype == residual.dtype
        and norm_fits(x, norm.weight)
    )
