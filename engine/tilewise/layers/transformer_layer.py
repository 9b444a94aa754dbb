"""One layer of a Transformer, pre- or post-norm, with or without attention to a memory.

Shapes: x [R, S, E].
"""

from torch import Tensor, nn

from tilewise_kernels import feed_forward
from tilewise_kernels.errors import ArgumentError

from ..config import ModelConfig
from .attention import LayerCache, Memory, MultiHeadAttention
from .norm import LayerNorm


class TransformerLayer(nn.Module):
    """Self-attention, attention to a memory (decoders of seq2seq models), feed-forward.

    Parameters are named as in torch.nn.TransformerEncoderLayer and TransformerDecoderLayer.
    Post-norm: x = norm(x + sublayer(x)) (Vaswani et al. 2017). Pre-norm: x = x + sublayer(norm(x))
    (Xiong et al. 2020); there the residual sum comes out of the next norm's kernel. Dropout of a
    sublayer's output happens in the norm that follows.
    """

    def __init__(self, config: ModelConfig, *, number: int = 1, cross_attention: bool = False):
        super().__init__()
        size, eps = config.hidden_size, config.norm_eps
        scale = config.attention_scale
        if config.attention_scale_by_layer:
            scale = (config.head_size**-0.5 if scale is None else scale) / number
        self.pre_norm = config.norm_position == "pre"
        self.activation = config.activation
        self.self_attn = MultiHeadAttention(size, config.num_heads, config.kv_heads, scale=scale)
        self.norm1 = LayerNorm(size, eps=eps)
        self.multihead_attn: MultiHeadAttention | None = None
        if cross_attention:
            self.multihead_attn = MultiHeadAttention(
                size, config.num_heads, config.kv_heads, scale=scale
            )
            self.norm3 = LayerNorm(size, eps=eps)
        self.linear1 = nn.Linear(size, config.ffn_size)
        self.linear2 = nn.Linear(config.ffn_size, size)
        self.norm2 = LayerNorm(size, eps=eps)
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
    ) -> Tensor:
        """[R, S, E] to [R, S, E]; the masks and the cache are those of MultiHeadAttention."""
        if (memory is None) != (self.multihead_attn is None):
            raise ArgumentError(
                "TransformerLayer: a layer with cross attention takes a memory, and no other does; "
                f"memory is {'not given' if memory is None else 'given'}"
            )
        last_norm = self.norm2 if self.multihead_attn is None else self.norm3
        inner = self.norm1(x) if self.pre_norm else x
        step = self.self_attn(inner, mask=mask, causal=causal, key_lengths=key_lengths, cache=cache)
        if self.multihead_attn is not None:
            inner, x = self._close(self.norm2 if self.pre_norm else self.norm1, step, x)
            step = self.multihead_attn(inner, memory, mask=memory_mask, key_lengths=memory_lengths)
            inner, x = self._close(self.norm3 if self.pre_norm else self.norm2, step, x)
        else:
            inner, x = self._close(self.norm2 if self.pre_norm else self.norm1, step, x)
        step = self._feed_forward(inner)
        if self.pre_norm:
            return x + self.dropout(step)
        return last_norm(step, residual=x, dropout_p=self._dropout_p)

    @property
    def _dropout_p(self) -> float:
        return self.dropout.p if self.training else 0.0

    def _close(self, norm: LayerNorm, step: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """End a sublayer: (input of the next sublayer, residual stream)."""
        if self.pre_norm:
            return norm.add(step, x, self._dropout_p)
        x = norm(step, residual=x, dropout_p=self._dropout_p)
        return x, x

    def _feed_forward(self, x: Tensor) -> Tensor:
        return feed_forward(
            x,
            self.linear1.weight,
            self.linear1.bias,
            self.linear2.weight,
            self.linear2.bias,
            activation=self.activation,
        )
