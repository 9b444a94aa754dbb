"""A Triton launch as a value: run it, or compile it ahead of time for a GPU that is not there.

Below it, what the launchers of several kernels need to build their arguments.
"""

import contextlib
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Launch(NamedTuple):
    """A kernel with everything its launch needs: `arguments` by name, constexpr ones included."""

    kernel: Any
    grid: tuple[int]
    arguments: dict[str, Any]
    options: dict[str, Any]

    def run(self, device: torch.device) -> None:
        """Launch on the current stream of `device`."""
        guard = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
        with guard:
            self.kernel[self.grid](**self.arguments, **self.options)


class Compilation(NamedTuple):
    """One row of the ahead-of-time table: a launch on meta tensors and what its code must show.

    tensor_core: matrix products must run on tensor cores. strict: no stack (spilled registers) is
    allowed; without it stack and instruction are only reported. quick: belongs to the short run.
    """

    name: str
    configuration: str
    launch: Launch
    tensor_core: bool
    strict: bool
    quick: bool


@functools.cache
def architecture(device: torch.device) -> int:
    """Compute capability as one number (90 for sm_90); 0 for the interpreter on CPU tensors."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.cache
def multiprocessors(device: torch.device, interpreted: int = 16) -> int:
    """How many programs a GPU runs side by side, one per multiprocessor; `interpreted` on a CPU."""
    if device.type != "cuda":
        return interpreted
    return torch.cuda.get_device_properties(device).multi_processor_count


def refuses(x: Tensor) -> str | None:
    """What x has that no Triton kernel here takes, or None."""
    if x.dtype == torch.float64:
        return "float64 is computed by torch"
    if not x.is_cuda and x.dtype == torch.bfloat16:
        return "Triton's interpreter is not to be trusted with bfloat16"
    return None


def as_rows(tensor: Tensor) -> Tensor:
    """[M, N] of [..., N] (a copy only where the leading dims do not collapse into one stride)."""
    if tensor.dim() == 2:
        return tensor
    return tensor.reshape(tensor.shape[:-1].numel(), tensor.shape[-1])


def padded(width: int) -> int:
    """Width of the tile that holds `width`: a power of two, at least what a tensor core takes."""
    return max(16, 1 << (width - 1).bit_length())


def strides(name: str, axes: Sequence[str], tensor: Tensor | None) -> dict[str, int]:
    """Strides of the leading dims as kernel arguments stride_<name><axis>; 0 where size is 1."""
    if tensor is None:
        return {f"stride_{name}{axis}": 0 for axis in axes}
    sizes = zip(axes, tensor.shape, tensor.stride(), strict=False)
    return {f"stride_{name}{axis}": stride if size > 1 else 0 for axis, size, stride in sizes}
