"""Fused Transformer kernels that run on CPU and GPU tensors under one contract."""

from .adamw import adamw_step
from .attention import attention
from .attention_varlen import attention_varlen
from .cross_entropy import cross_entropy
from .decode_attention import decode_attention
from .feed_forward import feed_forward, linear_act
from .layer_norm import layer_norm
from .linear import PackedLinear, linear, pack_linear
from .linear_cross_entropy import linear_cross_entropy
from .log_softmax import log_softmax, log_softmax_topk
from .op import explain, force, record
from .rms_norm import rms_norm
from .rotary import rotary
from .softmax import softmax

__all__ = [
    "PackedLinear",
    "adamw_step",
    "attention",
    "attention_varlen",
    "cross_entropy",
    "decode_attention",
    "explain",
    "feed_forward",
    "force",
    "layer_norm",
    "linear",
    "linear_act",
    "linear_cross_entropy",
    "log_softmax",
    "log_softmax_topk",
    "pack_linear",
    "record",
    "rms_norm",
    "rotary",
    "softmax",
]
