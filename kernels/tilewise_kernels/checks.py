"""One vocabulary of argument checks: every message names the thing, what it got, what it takes."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .errors import ArgumentError

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


_INFINITE = (float("inf"), float("-inf"))


def shape_of(tensor: Tensor) -> str:
    """The shape as text, e.g. [2, 3]."""
    return str(list(tensor.shape))


def fail(op: str, name: str, got: object, takes: str) -> ArgumentError:
    """The error to raise: `op: name is got; takes`."""
    return ArgumentError(f"{op}: {name} is {got}; {takes}")


def is_float_tensor(op: str, name: str, tensor: object, min_dims: int = 1) -> None:
    """Raise unless `tensor` is a strided float Tensor of at least `min_dims` dimensions."""
    if not isinstance(tensor, Tensor):
        raise fail(op, name, type(tensor).__name__, "pass a torch.Tensor")
    if tensor.dtype not in FLOATS:
        raise fail(op, name, tensor.dtype, "pass float32, float16, bfloat16 or float64")
    if tensor.layout is not torch.strided:
        raise fail(op, name, tensor.layout, "pass a dense tensor (x.to_dense())")
    if tensor.is_nested:
        raise fail(op, name, "a nested tensor", "pass it padded (torch.nested.to_padded_tensor)")
    if tensor.dim() < min_dims:
        raise fail(op, name, f"of shape {shape_of(tensor)}", f"it needs {min_dims} or more dims")


def is_index_tensor(op: str, name: str, tensor: object) -> None:
    """Raise unless `tensor` is a strided int32 or int64 Tensor."""
    if not isinstance(tensor, Tensor):
        raise fail(op, name, type(tensor).__name__, "pass an int32 or int64 torch.Tensor")
    if tensor.dtype not in (torch.int32, torch.int64):
        raise fail(op, name, tensor.dtype, "pass int32 or int64")
    if tensor.layout is not torch.strided or tensor.is_nested:
        raise fail(op, name, "sparse or nested", "pass a dense tensor")


def same_device(op: str, name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Raise unless both tensors lie on one device."""
    if tensor.device != other.device:
        raise fail(
            op, name, f"on {tensor.device}", f"move it to {other.device}, where {other_name} is"
        )


def matches(op: str, name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Raise unless both tensors lie on one device and have one dtype."""
    same_device(op, name, tensor, other_name, other)
    if tensor.dtype != other.dtype:
        raise fail(
            op, name, tensor.dtype, f"{other_name} is {other.dtype}; cast one with .to(dtype)"
        )


def has_shape(op: str, name: str, tensor: Tensor, expected: Sequence[int], meaning: str) -> None:
    """Raise unless tensor.shape == expected; `meaning` spells the expected shape in symbols."""
    if tuple(tensor.shape) != tuple(expected):
        raise fail(
            op, name, f"of shape {shape_of(tensor)}", f"it must be {list(expected)} ({meaning})"
        )


def is_number(op: str, name: str, value: object) -> None:
    """Raise unless `value` is a real, finite number."""
    if type(value) is float and value - value == 0:
        return  # a finite one, as is usual
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymFloat, torch.SymInt)):
        raise fail(op, name, repr(value), "pass a number")
    if value != value or value in _INFINITE:  # math.isfinite would break a traced graph
        raise fail(op, name, "NaN" if value != value else value, "pass a finite number")
    if isinstance(value, int) and value.bit_length() > 1023:
        raise fail(op, name, "too large for a float", "pass a finite number")


def is_flag(op: str, name: str, value: object) -> None:
    """Raise unless `value` is True or False."""
    if not isinstance(value, bool):
        raise fail(op, name, f"a {type(value).__name__}", "pass True or False")


def is_whole(value: object) -> bool:
    """Whether `value` is an int and no bool."""
    return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)


def is_probability(op: str, name: str, value: object) -> None:
    """Raise unless `value` is a number within [0, 1]."""
    is_number(op, name, value)
    if not 0 <= value <= 1:  # type: ignore[operator]
        raise fail(op, name, value, "pass a probability from 0 to 1")


def broadcasts(op: str, name: str, tensor: Tensor, shape: Sequence[int], meaning: str) -> None:
    """Raise unless `tensor` broadcasts to `shape`."""
    pairs = zip(reversed(tensor.shape), reversed(shape), strict=False)
    if tensor.dim() > len(shape) or any(have != want and have != 1 for have, want in pairs):
        raise fail(
            op,
            name,
            f"of shape {shape_of(tensor)}",
            f"it must broadcast to {list(shape)} ({meaning})",
        )


def is_mask(
    op: str, mask: object, like_name: str, like: Tensor, shape: Sequence[int], meaning: str
) -> None:
    """Raise unless `mask` is bool, or float without gradient, and broadcasts to `shape`."""
    if not isinstance(mask, Tensor):
        raise fail(op, "mask", type(mask).__name__, "pass a bool or float torch.Tensor")
    if mask.dtype is not torch.bool and mask.dtype not in FLOATS:
        raise fail(op, "mask", mask.dtype, "pass bool (True = attend) or float (added)")
    if mask.layout is not torch.strided or mask.is_nested:
        raise fail(op, "mask", "sparse or nested", "pass a dense tensor")
    if mask.requires_grad:
        raise fail(op, "mask", "one that requires grad", "masks take no gradient: mask.detach()")
    same_device(op, "mask", mask, like_name, like)
    broadcasts(op, "mask", mask, shape, meaning)
