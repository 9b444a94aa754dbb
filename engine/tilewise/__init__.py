"""tilewise: a kernel-optimised inference and training engine for Transformers.

The names below are imported when first used: the command line answers --help without torch.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import ModelConfig
    from .errors import TilewiseError
    from .fusion import fuse
    from .generation import GenerationOutput
    from .models import build
    from .pretrained import Model, load

try:
    __version__ = version("tilewise")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0+unknown"

__all__ = [
    "GenerationOutput",
    "Model",
    "ModelConfig",
    "TilewiseError",
    "__version__",
    "build",
    "fuse",
    "load",
]

_HOMES = {
    "GenerationOutput": "generation",
    "Model": "pretrained",
    "ModelConfig": "config",
    "TilewiseError": "errors",
    "build": "models",
    "fuse": "fusion",
    "load": "pretrained",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
