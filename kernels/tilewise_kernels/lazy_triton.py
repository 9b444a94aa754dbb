"""Triton kernels that cost nothing until the first launch.

Triton is optional and slow to import, so a kernel file never imports it. It writes

    from __future__ import annotations  # tl.constexpr below is not evaluated at import
    tl: Any = None                      # triton.language once load() has run

    @jit
    def scale_kernel(x_ptr, n, BLOCK: tl.constexpr): ...

and its launcher calls `load(globals())` first: that imports triton, fills in `tl`, and replaces
every @jit function of the file by the Triton kernel made from it; those that the file imports from
another are made there first. From then on the module looks as if triton had been imported at its
top.
"""

import importlib.util
import os
from collections.abc import Callable
from typing import Any


class Pending:
    """A function marked by `jit`, waiting for `load` to make a Triton kernel of it."""

    def __init__(self, function: Callable[..., None]) -> None:
        self.function = function

    def __getitem__(self, grid: Any) -> Any:
        raise RuntimeError(f"{self.function.__name__} launched before lazy_triton.load(globals())")


def jit(function: Callable[..., Any]) -> Any:
    """Mark `function` as a Triton kernel or device function of its module."""
    return Pending(function)


def load(namespace: dict[str, Any]) -> None:
    """Make the @jit functions in a module's `globals()` real; later calls return at once.

    Raises ModuleNotFoundError when triton is not installed (ask `missing` first).
    """
    if namespace["tl"] is not None:
        return
    import triton
    import triton.language

    namespace["tl"] = triton.language
    for name, value in list(namespace.items()):
        if isinstance(value, Pending):
            home = value.function.__globals__
            if home is namespace:
                namespace[name] = triton.jit(value.function)
            else:
                load(home)
                namespace[name] = home[value.function.__name__]


def missing() -> str | None:
    """Why no Triton kernel can run on this machine, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install 'tilewise[triton]')"
    return None


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, which takes CPU tensors (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"
