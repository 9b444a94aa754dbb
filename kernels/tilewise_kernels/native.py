"""Whether the C++/CUDA extension `tilewise_kernels._C` is here, and what it was built with."""

import functools
import importlib
import importlib.util
from typing import Any

import torch

_C: Any = None
_problem: str | None = None
if importlib.util.find_spec("tilewise_kernels._C") is None:
    _problem = (
        "the native extension is not built (reinstall with a C++ compiler and ninja, "
        "without TILEWISE_BUILD_EXT=0)"
    )
else:
    try:
        _C = importlib.import_module("tilewise_kernels._C")  # fills torch.ops.tilewise_native
    except ImportError as error:
        _problem = f"the native extension does not load, so reinstall it: {error}"


def missing() -> str | None:
    """Why no native implementation can run, or None."""
    return _problem


@functools.cache
def op(name: str) -> Any:
    """torch.ops.tilewise_native.NAME, without the Python that torch wraps round its call."""
    return getattr(torch.ops.tilewise_native, name).default._op


def build_info() -> dict[str, Any]:
    """What the extension was built with; empty when there is none."""
    return dict(_C.build_info()) if _C is not None else {}


def built_for_cuda() -> bool:
    """Whether the extension carries CUDA kernels."""
    return bool(build_info().get("cuda"))
