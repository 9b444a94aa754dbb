"""A Triton launch as a value: run it, or compile it ahead of time for a GPU that is not there."""

import contextlib
import functools
from typing import Any, NamedTuple

import torch


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
