"""Fused forwards of torch.nn modules.

Shapes: x [..., N]; in attention query [B, S, E], key and value [B, T, E] (batch second unless
batch_first), heads [B, H, S, D] with E = H * D.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tilewise_kernels import attention, layer_norm, rms_norm, softmax
from tilewise_kernels.op import accumulator, autocast_dtype

from .swapping import (
    Fused,
    activation_name,
    fits,
    norm_and_sum,
    norm_fits,
    norm_of_sum,
    own_class,
    two_layers,
)


class LayerNorm(Fused):
    """In front of nn.LayerNorm over one dim."""

    @classmethod
    def refuses(cls, module: Any) -> str | None:
        dims = len(module.normalized_shape)
        return None if dims == 1 else f"it normalises over {dims} dims, layer_norm over the last"

    def forward(self: Any, input: Tensor) -> Tensor:
        if not norm_fits(input, self.weight):
            return super().forward(input)
        return layer_norm(input, self.weight, self.bias, eps=self.eps)


class RMSNorm(Fused):
    """In front of nn.RMSNorm over one dim."""

    @classmethod
    def refuses(cls, module: Any) -> str | None:
        dims = len(module.normalized_shape)
        return None if dims == 1 else f"it normalises over {dims} dims, rms_norm over the last"

    def forward(self: Any, x: Tensor) -> Tensor:
        if not norm_fits(x, self.weight):
            return super().forward(x)
        eps = self.eps
        if eps is None:  # torch takes that of the dtype it sums in
            eps = torch.finfo(accumulator(x.dtype)).eps
        return rms_norm(x, self.weight, eps=eps)


class Sequential(Fused):
    """In front of nn.Sequential: each Linear, activation, (Dropout,) Linear in it is one op."""

    @classmethod
    def concerns(cls, module: Any) -> bool:
        steps = list(module)
        return any(_feed_forward_at(steps, i) for i in range(len(steps)))

    def forward(self: Any, input: Any) -> Any:
        steps = list(self)
        i = 0
        while i < len(steps):
            block = _feed_forward_at(steps, i)
            if block and isinstance(input, Tensor):
                input = two_layers(input, *block)
                i += 3 + (block[2] is not None)
            else:
                input = steps[i](input)
                i += 1
        return input


def _feed_forward_at(steps: list[Any], i: int) -> tuple[Any, Any, Any, Any] | None:
    """(Linear, activation, Dropout or None, Linear) if steps[i:] begins with them."""
    if len(steps) < i + 3 or type(steps[i]) is not nn.Linear or not activation_name(steps[i + 1]):
        return None
    has_dropout = type(steps[i + 2]) is nn.Dropout
    if len(steps) < i + 3 + has_dropout or type(steps[i + 2 + has_dropout]) is not nn.Linear:
        return None
    return steps[i], steps[i + 1], steps[i + 2] if has_dropout else None, steps[i + 2 + has_dropout]


# -- attention -----------------------------------------------------------------------------------


class MultiheadAttention(Fused):
    """In front of nn.MultiheadAttention, whose masks say where not to attend."""

    @classmethod
    def refuses(cls, module: Any) -> str | None:
        if module.bias_k is not None or module.bias_v is not None:
            return "add_bias_kv is not supported"
        return "add_zero_attn is not supported" if module.add_zero_attn else None

    def forward(
        self: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        if not self._takes((query, key, value), attn_mask, is_causal):
            return super().forward(
                query,
                key,
                value,
                key_padding_mask,
                need_weights,
                attn_mask,
                average_attn_weights,
                is_causal,
            )
        batched = query.dim() == 3
        if not batched:
            at = 0 if self.batch_first else 1
            query, key, value = _unsqueezed(at, query, key, value)
            key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
        q, k, v = self._project(query, key, value)
        causal = is_causal and q.shape[2] == k.shape[2]  # the hint says that attn_mask is causal
        mask = _attended(None if causal else attn_mask, key_padding_mask, self.num_heads)
        bias = None
        if mask is not None and mask.requires_grad:  # a learned one
            mask, bias = None, mask
        dropout_p = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            weights = attention_weights(q, k, mask, bias, causal, q.shape[3] ** -0.5, dropout_p)
            out = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            out = attention(q, k, v, mask=mask, bias=bias, causal=causal, dropout_p=dropout_p)
        out = out.transpose(1, 2) if self.batch_first else out.permute(2, 0, 1, 3)
        out = F.linear(out.flatten(2), self.out_proj.weight, self.out_proj.bias)
        if not batched:
            return out.squeeze(at), None if weights is None else weights.squeeze(0)
        return out, weights

    def _takes(
        self: Any, inputs: tuple[Tensor, ...], attn_mask: Tensor | None, is_causal: bool
    ) -> bool:
        """Whether query, key and value are what we compute; the module's own forward takes, or
        refuses in its own words, what they are not."""
        each = (self.in_proj_weight, self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        weights = (*each, self.in_proj_bias, self.out_proj.weight, self.out_proj.bias)
        dims = inputs[0].dim()
        if dims not in (2, 3) or not all(x.dim() == dims and fits(x, *weights) for x in inputs):
            return False
        return not is_causal or attn_mask is not None  # torch raises without the mask

    def _project(self: Any, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """q, k and v as heads [B, H, length, D], with as few products as the inputs allow."""
        bias = self.in_proj_bias
        if not self._qkv_same_embed_dim:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            biases = (None,) * 3 if bias is None else bias.chunk(3)
            each = zip((query, key, value), weights, biases, strict=True)
            return [self._heads(F.linear(*one))[0] for one in each]
        weight, size = self.in_proj_weight, self.embed_dim
        if query is key and key is value:
            return self._heads(F.linear(query, weight, bias))
        parts = [slice(0, size), slice(size, 3 * size)]
        inputs = [query, key]
        if key is not value:
            parts = [slice(0, size), slice(size, 2 * size), slice(2 * size, 3 * size)]
            inputs = [query, key, value]
        found: list[Tensor] = []
        for x, rows in zip(inputs, parts, strict=True):
            found += self._heads(F.linear(x, weight[rows], None if bias is None else bias[rows]))
        return found

    def _heads(self: Any, projected: Tensor) -> list[Tensor]:
        """[.., .., n * E] as n tensors [B, H, length, D]."""
        split = projected.unflatten(-1, (-1, self.num_heads, self.head_dim))
        order = (2, 0, 3, 1, 4) if self.batch_first else (2, 1, 3, 0, 4)
        return list(split.permute(order).unbind(0))


def _unsqueezed(dim: int, *tensors: Tensor) -> list[Tensor]:
    """Each tensor with a batch dim, equal tensors once."""
    made = {id(t): t.unsqueeze(dim) for t in tensors}
    return [made[id(t)] for t in tensors]


def _attended(
    attn_mask: Tensor | None, key_padding_mask: Tensor | None, heads: int
) -> Tensor | None:
    """torch's two masks as one of ours: bool with True = attend, or float to be added.

    attn_mask: [S, T] or [B * H, S, T]; key_padding_mask: [B, T]; each bool (True = ignore) or
    float. The result broadcasts to [B, H, S, T].
    """
    masks = []
    if attn_mask is not None:
        per_head = attn_mask.dim() == 3
        masks.append(attn_mask.unflatten(0, (-1, heads)) if per_head else attn_mask[None, None])
    if key_padding_mask is not None:
        masks.append(key_padding_mask[:, None, None])
    if not masks:
        return None
    if all(mask.dtype == torch.bool for mask in masks):
        return ~(masks[0] if len(masks) == 1 else masks[0] | masks[1])
    added = [_added(mask) for mask in masks]
    return added[0] if len(added) == 1 else added[0] + added[1]


def _added(mask: Tensor) -> Tensor:
    """A float mask; bool with True = ignore becomes -inf there."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, device=mask.device).masked_fill_(mask, -torch.inf)


def attention_weights(
    q: Tensor,
    k: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    causal: bool,
    scale: float,
    dropout_p: float,
) -> Tensor:
    """softmax(scale * q k^T + bias, over what the masks leave) [B, H, S, T], with dropout."""
    scores = q @ k.transpose(-1, -2) * scale
    scores = scores if bias is None else scores + bias
    weights = softmax(scores, mask=mask, causal=causal).to(q.dtype)
    return F.dropout(weights, dropout_p) if dropout_p else weights


# -- encoder and decoder -------------------------------------------------------------------------


class TransformerEncoderLayer(Fused):
    """In front of nn.TransformerEncoderLayer, evaluation included: torch's own fast path reads the
    weights of the submodules and never calls them, so it would go past whatever is fused there."""

    def forward(
        self: Any,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        if src.is_nested:
            return super().forward(src, src_mask, src_key_padding_mask, is_causal)
        x = src
        if self.norm_first:
            step = self._sa_block(self.norm1(x), src_mask, src_key_padding_mask, is_causal)
            inner, x = norm_and_sum(self.norm2, step, x)
            return x + self._ff_block(inner)
        step = self._sa_block(x, src_mask, src_key_padding_mask, is_causal)
        x = norm_of_sum(self.norm1, step, x)
        return norm_of_sum(self.norm2, self._ff_block(x), x)

    def _ff_block(self: Any, x: Tensor) -> Tensor:
        return self.dropout2(
            two_layers(x, self.linear1, self.activation, self.dropout, self.linear2)
        )


class TransformerDecoderLayer(Fused):
    """In front of nn.TransformerDecoderLayer."""

    def forward(
        self: Any,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> Tensor:
        own = (tgt_mask, tgt_key_padding_mask, tgt_is_causal)
        other = (memory, memory_mask, memory_key_padding_mask, memory_is_causal)
        x = tgt
        if self.norm_first:
            inner, x = norm_and_sum(self.norm2, self._sa_block(self.norm1(x), *own), x)
            inner, x = norm_and_sum(self.norm3, self._mha_block(inner, *other), x)
            return x + self._ff_block(inner)
        x = norm_of_sum(self.norm1, self._sa_block(x, *own), x)
        x = norm_of_sum(self.norm2, self._mha_block(x, *other), x)
        return norm_of_sum(self.norm3, self._ff_block(x), x)

    def _ff_block(self: Any, x: Tensor) -> Tensor:
        return self.dropout3(
            two_layers(x, self.linear1, self.activation, self.dropout, self.linear2)
        )


class TransformerEncoder(Fused):
    """In front of nn.TransformerEncoder, which in evaluation packs padded batches into a nested
    tensor that only torch's fast path can read. Here they stay padded; the positions that the
    packing would have lost are set to 0 before the last norm, as unpacking does."""

    @classmethod
    def refuses(cls, module: Any) -> str | None:
        known = all(own_class(layer) is nn.TransformerEncoderLayer for layer in module.layers)
        return None if known else "it holds layers that are no nn.TransformerEncoderLayer"

    def forward(
        self: Any,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        if src.is_nested:
            return super().forward(src, mask, src_key_padding_mask, is_causal)
        batch_first = self.layers[0].self_attn.batch_first
        if is_causal is None:
            is_causal = _is_causal(mask, src.shape[1 if batch_first and src.dim() == 3 else 0])
        x = src
        for layer in self.layers:
            x = layer(
                x,
                src_mask=mask,
                src_key_padding_mask=src_key_padding_mask,
                is_causal=is_causal,
            )
        if src_key_padding_mask is not None and self._packs(src, mask):
            padding = _added(src_key_padding_mask) != 0
            if bool((padding[:, 1:] >= padding[:, :-1]).all()):  # only padding at the end is packed
                x = x.masked_fill(padding[..., None], 0)
        return x if self.norm is None else self.norm(x)

    def _packs(self: Any, src: Tensor, mask: Tensor | None) -> bool:
        """Whether torch would pack this padded batch."""
        if not getattr(self, "use_nested_tensor", False) or self.layers[0].training:
            return False
        if src.dim() != 3 or mask is not None or autocast_dtype(src.device) is not None:
            return False
        tracked = src.requires_grad or any(p.requires_grad for p in self.layers[0].parameters())
        return torch.backends.mha.get_fastpath_enabled() and not (
            torch.is_grad_enabled() and tracked
        )


def _is_causal(mask: Tensor | None, length: int) -> bool:
    """Whether attn_mask [S, S] hides exactly the keys after each query."""
    if mask is None or mask.shape != (length, length):
        return False
    later = torch.ones(length, length, dtype=torch.bool, device=mask.device).triu(1)
    return torch.equal(_added(mask), _added(later).to(_added(mask).dtype))


__all__ = [
    "LayerNorm",
    "MultiheadAttention",
    "RMSNorm",
    "Sequential",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
    "attention_weights",
]
