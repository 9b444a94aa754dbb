"""Layers with the parameter names of the torch.nn modules they replace."""

from .attention import LayerCache, Memory, MultiHeadAttention
from .feed_forward import FeedForward
from .norm import LayerNorm, RMSNorm
from .positions import Embedding, sinusoids
from .transformer_layer import TransformerLayer

__all__ = [
    "Embedding",
    "FeedForward",
    "LayerCache",
    "LayerNorm",
    "Memory",
    "MultiHeadAttention",
    "RMSNorm",
    "TransformerLayer",
    "sinusoids",
]
