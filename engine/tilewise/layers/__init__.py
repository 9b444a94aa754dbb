"""Layers with the parameter names of the torch.nn modules they replace."""

from .attention import LayerCache, Memory, MultiHeadAttention
from .feed_forward import FeedForward
from .linear import Linear
from .norm import LayerNorm, RMSNorm, norm_of
from .positions import Embedding, PositionTerms, StackPositions, alibi_slopes, sinusoids
from .recurrent import AdditiveAttention, GatedRecurrent
from .transformer_layer import TransformerLayer

__all__ = [
    "AdditiveAttention",
    "Embedding",
    "FeedForward",
    "GatedRecurrent",
    "LayerCache",
    "LayerNorm",
    "Linear",
    "Memory",
    "MultiHeadAttention",
    "PositionTerms",
    "RMSNorm",
    "StackPositions",
    "TransformerLayer",
    "alibi_slopes",
    "norm_of",
    "sinusoids",
]
