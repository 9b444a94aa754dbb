"""tilewise: a kernel-optimised inference and training engine for Transformers."""

from importlib.metadata import PackageNotFoundError, version

from .config import ModelConfig
from .errors import TilewiseError
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
    "load",
]
