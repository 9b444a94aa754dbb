"""One layer of a Transformer, pre- or post-norm, with or without attention to a memory.

Shapes: x [R, S, E].
"""

from typing import Any

from torch import Tensor, nn

from tilewise_kernels.errors import ArgumentError

from ..config import ModelConfig
from .attention import NO_TERMS, LayerCache, Memory, MultiHeadAttention
from .feed_forward import run_feed_forward
from .linear import Linear
from .norm import LayerNorm, RMSNorm, norm_of
from .positions import PositionTerms


class TransformerLayer(nn.Module):
    """Self-attention, attention to a memory (decoders of seq2seq models), feed-forward.

    Parameters are named as in torch.nn.TransformerEncoderLayer and TransformerDecoderLayer.
    Post-norm: x = norm(x + sublayer(x)) (Vaswani et al. 2017). Pre-norm: x = x + sublayer(norm(x))
    (Xiong et al. 2020); there the residual sum comes out of the next norm's kernel. Parallel:
    x + attention(norm1(x)) + ffn(norm2(x)) (Wang and Komatsuzaki 2021). Dropout of a sublayer's
    output happens in the norm that follows.
    """

    def __init__(self, config: ModelConfig, *, number: int = 1, cross_attention: bool = False):
        super().__init__()
        size, bias = config.hidden_size, config.ffn_bias
        scale = config.attention_scale
        if config.attention_scale_by_layer:
            scale = (config.head_size**-0.5 if scale is None else scale) / number
        self.pre_norm = config.norm_position == "pre"
        self.parallel, self.residual_from_norm = config.parallel_residual, config.residual_from_norm
        self.activation = config.activation
        heads = (size, config.num_heads, config.kv_heads)
        attention: dict[str, Any] = {
            "head_size": config.head_size,
            "bias": config.attention_bias,
            "qkv_bias": config.qkv_bias,
            "scale": scale,
        }
        window = config.windows[number - 1] if config.windows else None
        own_table = config.positions == "relative" and config.relative_by_layer
        self.self_attn = MultiHeadAttention(
            *heads,
            **attention,
            window=window,
            relative_buckets=config.relative_buckets if own_table else None,
        )
        self.norm1: LayerNorm | RMSNorm | None = None
        if config.first_norm or number > 1:
            self.norm1 = norm_of(config)
        self.multihead_attn: MultiHeadAttention | None = None
        if cross_attention:
            self.multihead_attn = MultiHeadAttention(*heads, **attention)
            self.norm3 = norm_of(config)
        self.linear1 = Linear(size, config.ffn_size, bias=bias)
        self.linear2 = Linear(config.ffn_size, size, bias=bias)
        self.gate = Linear(size, config.ffn_size, bias=bias) if config.gated else None
        self.norm2 = norm_of(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        causal: bool = False,
        key_lengths: Tensor | None = None,
        memory: Tensor | Memory | None = None,
        memory_mask: Tensor | None = None,
        memory_lengths: Tensor | None = None,
        cache: LayerCache | None = None,
        terms: PositionTerms = NO_TERMS,
        maps: list[Tensor] | None = None,
        memory_maps: list[Tensor] | None = None,
    ) -> Tensor:
        """[R, S, E] to [R, S, E]; the other arguments are those of MultiHeadAttention."""
        if (memory is None) != (self.multihead_attn is None):
            raise ArgumentError(
                "TransformerLayer: a layer with cross attention takes a memory, and no other does; "
                f"memory is {'not given' if memory is None else 'given'}"
            )
        inner = self.norm1(x) if self.pre_norm and self.norm1 is not None else x
        step = self.self_attn(
            inner,
            mask=mask,
            causal=causal,
            key_lengths=key_lengths,
            cache=cache,
            terms=terms,
            maps=maps,
        )
        if self.parallel:
            both = self.dropout(step) + self.dropout(self._feed_forward(self.norm2(x)))
            return x + both
        if self.residual_from_norm:
            x = inner
        norms = [self.norm1, self.norm2]
        if self.multihead_attn is not None:
            norms.append(self.norm3)
            inner, x = self._close(norms[1 if self.pre_norm else 0], step, x)
            step = self.multihead_attn(
                inner, memory, mask=memory_mask, key_lengths=memory_lengths, maps=memory_maps
            )
        inner, x = self._close(norms[-1] if self.pre_norm else norms[-2], step, x)
        step = self._feed_forward(inner)
        if self.pre_norm:
            return (inner if self.residual_from_norm else x) + self.dropout(step)
        return norms[-1](step, residual=x, dropout_p=self._dropout_p)  # type: ignore[misc]

    @property
    def _dropout_p(self) -> float:
        return self.dropout.p if self.training else 0.0

    def _close(
        self, norm: LayerNorm | RMSNorm | None, step: Tensor, x: Tensor
    ) -> tuple[Tensor, Tensor]:
        """End a sublayer: (input of the next sublayer, residual stream)."""
        assert norm is not None  # only the norm before the first sublayer may be absent
        if self.pre_norm:
            return norm.add(step, x, self._dropout_p)
        x = norm(step, residual=x, dropout_p=self._dropout_p)
        return x, x

    def _feed_forward(self, x: Tensor) -> Tensor:
        return run_feed_forward(x, self.linear1, self.linear2, self.gate, self.activation)
