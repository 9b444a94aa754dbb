"""Generation: greedy and batched beam search with a cache that is written once."""

from .generate import GenerationOutput, generate
from .options import GenerationOptions

__all__ = ["GenerationOptions", "GenerationOutput", "generate"]
