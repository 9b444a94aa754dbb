"""Fused Transformer kernels that run on CPU and GPU tensors under one contract."""

from .attention import attention
from .decode_attention import decode_attention
from .op import explain, force, record
from .softmax import softmax

__all__ = ["attention", "decode_attention", "explain", "force", "record", "softmax"]
