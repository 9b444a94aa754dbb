"""Every error tilewise raises on purpose. Each is also the builtin a caller would catch."""

from tilewise_kernels.errors import ArgumentError, KernelUnavailable, TilewiseError

__all__ = [
    "ArgumentError",
    "CheckpointError",
    "ConfigError",
    "FusionError",
    "GenerationError",
    "KernelUnavailable",
    "TilewiseError",
    "TokenizerError",
]


class ConfigError(TilewiseError, ValueError):
    """A model configuration that contradicts itself or that no model here can follow."""


class CheckpointError(TilewiseError, ValueError):
    """A checkpoint folder or file that is missing, damaged, or does not fit the model."""


class TokenizerError(TilewiseError, ValueError):
    """Text was given where no tokenizer is, or a tokenizer file cannot be read."""


class GenerationError(TilewiseError, RuntimeError):
    """Generation met a state it cannot go on from, such as NaN scores."""


class FusionError(TilewiseError, RuntimeError):
    """A fused model whose outputs differ from what they were; it was put back."""
