"""Fused Transformer kernels that run on CPU and GPU tensors under one contract."""

from .op import explain, force, record
from .softmax import softmax

__all__ = ["explain", "force", "record", "softmax"]
