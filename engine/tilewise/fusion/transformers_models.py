"""Fused forwards of Hugging Face's BERT, RoBERTa, GPT-2, BART, LLaMA, GPT-NeoX and T5.

transformers is never imported: a model that is to be fused has brought it, and it is found among
the loaded modules. Its classes are known by module and name, and each fused method must have the
parameters of the one it stands before, so that a version that differs is left alone.

Shapes: hidden_states [B, S, E]; query [B, Hq, S, D]; key, value [B, Hkv, T, D].
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tilewise_kernels import attention, rms_norm, rotary

from .report import FusionReport, Replaced, Skipped
from .swapping import (
    Fused,
    fits,
    gated_layers,
    is_bare,
    norm_of_sum,
    on_rebuild,
    transformers_name,
    two_layers,
)
from .torch_modules import attention_weights
from .transformers_losses import MaskedLM, Seq2SeqLM, Seq2SeqLMWithoutCache

NAME = "tilewise"  # of our attention in transformers' two registries
_CAPTURING = "transformers.utils.output_capturing"


# -- attention -----------------------------------------------------------------------------------


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """What transformers' AttentionInterface calls: (out [B, S, Hq, D], weights or None).

    attention_mask: bool with True = attend, or float to be added, broadcastable to [B, Hq, S, T];
    without one, is_causal (the module's own when None) decides. position_bias: [1, Hq, S, T], added
    to the scores, with gradient. Weights [B, Hq, S, T] come with output_attentions only.
    """
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = bool(causal and attention_mask is None and query.shape[2] > 1)
    if causal and key.shape[2] > query.shape[2]:  # the unused end of a static cache
        key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
        position_bias = None if position_bias is None else position_bias[..., : query.shape[2]]
    config = getattr(module, "config", None)
    asked = kwargs.get("output_attentions", getattr(config, "output_attentions", False))
    if asked or _weights_are_read(module):
        return _attention_with_weights(
            query, key, value, attention_mask, position_bias, causal, scaling, dropout
        )
    out = attention(
        query,
        key,
        value,
        mask=attention_mask,
        bias=position_bias,
        causal=causal,
        scale=scaling,
        dropout_p=dropout,
    )
    return out.transpose(1, 2), None


def _weights_are_read(module: nn.Module) -> bool:
    """Whether a hook of transformers will take the weights: GPT-2 drops output_attentions on the
    way to its attention, and collects what hooks find there."""
    if not module._forward_hooks:
        return False
    collector = getattr(sys.modules.get(_CAPTURING), "_active_collector", None)
    return collector is None or any("attentions" in name for name in collector.get() or ())


def _attention_with_weights(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    causal: bool,
    scale: float | None,
    dropout: float,
) -> tuple[Tensor, Tensor]:
    group = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(group, 1) for t in (key, value))
    scale = query.shape[3] ** -0.5 if scale is None else scale
    weights = attention_weights(query, key, mask, bias, causal, scale, dropout)
    return (weights @ value).transpose(1, 2), weights


def register(*_: Any) -> None:
    """Enter our attention, and the masks it takes, into the registries of the loaded transformers.

    Both: with the attention alone every mask would silently become None.
    """
    masking = sys.modules["transformers.masking_utils"]
    modeling = sys.modules["transformers.modeling_utils"]
    masking.AttentionMaskInterface.register(NAME, masking.sdpa_mask)
    modeling.AttentionInterface.register(NAME, attention_forward)


def _register_for(original: type[nn.Module]) -> None:
    """An unpickled model finds its attention registered."""
    if original.__module__.startswith("transformers."):
        register()


on_rebuild.append(_register_for)


class LlamaAttention(Fused):
    """The three projections, rotary positions as one op, the cache, and our attention."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if self.config._attn_implementation != NAME or position_embeddings is None:
            return super().forward(
                hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs
            )
        heads = (*hidden_states.shape[:-1], -1, self.head_dim)
        layers = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (layer(hidden_states).view(heads).transpose(1, 2) for layer in layers)
        out, weights = _attend_turned(
            self, q, k, v, position_embeddings, attention_mask, past_key_values, kwargs
        )
        return self.o_proj(out.flatten(2)), weights


class GPTNeoXAttention(Fused):
    """As LlamaAttention, with one projection, and positions in a part of each head."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        attention_mask: Tensor,
        layer_past: Any = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if self.config._attn_implementation != NAME or position_embeddings is None:
            return super().forward(
                hidden_states, attention_mask, layer_past, position_embeddings, **kwargs
            )
        heads = (*hidden_states.shape[:-1], -1, 3 * self.head_size)
        qkv = self.query_key_value(hidden_states).view(heads).transpose(1, 2)
        q, k, v = qkv.chunk(3, dim=-1)
        out, weights = _attend_turned(
            self, q, k, v, position_embeddings, attention_mask, layer_past, kwargs
        )
        return self.dense(out.flatten(2)), weights


def _attend_turned(
    module: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    mask: Tensor | None,
    cache: Any,
    kwargs: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """Attention over q, k turned by their positions, behind what the cache holds.

    position_embeddings: cosines and sines [B, S, R], which say the same in both halves of R.
    """
    half = position_embeddings[0].shape[-1] // 2
    cos, sin = (table[..., :half] for table in position_embeddings)
    q, k = rotary(q, k, cos, sin)
    if cache is not None:
        k, v = cache.update(k, v, module.layer_idx)
    dropout = module.attention_dropout if module.training else 0.0
    return attention_forward(module, q, k, v, mask, dropout, module.scaling, **kwargs)


# -- norms and feed-forward ----------------------------------------------------------------------


class RMSNorm(Fused):
    """In front of the norms with a weight and a variance_epsilon."""

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        if hidden_states.dtype != self.weight.dtype or not fits(hidden_states, self.weight):
            return super().forward(hidden_states)  # the result's dtype follows other rules
        return rms_norm(hidden_states, self.weight, eps=self.variance_epsilon)


class BertSelfOutput(Fused):
    """dense, dropout, and the norm of the sum with input_tensor."""

    def forward(self: Any, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        return norm_of_sum(self.LayerNorm, self.dropout(self.dense(hidden_states)), input_tensor)


class BertLayer(Fused):
    """BertIntermediate and BertOutput as one feed-forward op and one norm."""

    def feed_forward_chunk(self: Any, attention_output: Tensor) -> Tensor:
        inner, output = self.intermediate, self.output
        # A subclass, or a module round one of them, does more than the layers inside.
        plain = all(transformers_name(m) in _BERT_FEED_FORWARD for m in (inner, output))
        if not (plain and is_bare(inner) and is_bare(output)):
            return super().feed_forward_chunk(attention_output)  # type: ignore[misc]
        step = two_layers(
            attention_output, inner.dense, inner.intermediate_act_fn, None, output.dense
        )
        return norm_of_sum(output.LayerNorm, output.dropout(step), attention_output)


class GPT2MLP(Fused):
    """Conv1D, activation, Conv1D: their weights are stored transposed."""

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        return self.dropout(two_layers(hidden_states, self.c_fc, self.act, None, self.c_proj))


class GPTNeoXMLP(Fused):
    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        return two_layers(hidden_states, self.dense_h_to_4h, self.act, None, self.dense_4h_to_h)


class LlamaMLP(Fused):
    """down(act(gate(x)) * up(x))."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return gated_layers(x, self.gate_proj, self.act_fn, self.up_proj, None, self.down_proj)


class T5DenseActDense(Fused):
    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        if self.wo.weight.dtype != self.wi.weight.dtype:  # transformers may keep wo in float32
            return super().forward(hidden_states)
        return two_layers(hidden_states, self.wi, self.act, self.dropout, self.wo)


class T5DenseGatedActDense(Fused):
    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        if self.wo.weight.dtype != self.wi_0.weight.dtype:
            return super().forward(hidden_states)
        return gated_layers(hidden_states, self.wi_0, self.act, self.wi_1, self.dropout, self.wo)


def _dropout(p: float, training: bool) -> Callable[[Tensor], Tensor] | None:
    return partial(F.dropout, p=p) if training and p else None


class BartEncoderLayer(Fused):
    """Self-attention and feed-forward, each closed by the norm of a sum."""

    def forward(self: Any, hidden_states: Tensor, attention_mask: Tensor, **kwargs: Any) -> Tensor:
        x = hidden_states
        step = self.self_attn(x, attention_mask=attention_mask, **kwargs)[0]
        x = _bart_norm(self, self.self_attn_layer_norm, step, x)
        x = _bart_norm(self, self.final_layer_norm, _bart_feed_forward(self, x), x)
        if x.dtype == torch.float16 and not torch.isfinite(x).all():
            limit = torch.finfo(x.dtype).max - 1000
            x = x.clamp(-limit, limit)
        return x


class BartDecoderLayer(Fused):
    """Self-attention, attention to the encoder, feed-forward, each closed by the norm of a sum."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = True,
        **kwargs: Any,
    ) -> Tensor:
        x = hidden_states
        kwargs["past_key_values"] = past_key_values
        step = self.self_attn(x, attention_mask=attention_mask, **kwargs)[0]
        x = _bart_norm(self, self.self_attn_layer_norm, step, x)
        if encoder_hidden_states is not None:
            step = self.encoder_attn(
                x,
                key_value_states=encoder_hidden_states,
                attention_mask=encoder_attention_mask,
                **kwargs,
            )[0]
            x = _bart_norm(self, self.encoder_attn_layer_norm, step, x)
        return _bart_norm(self, self.final_layer_norm, _bart_feed_forward(self, x), x)


def _bart_norm(layer: Any, norm: nn.Module, step: Tensor, x: Tensor) -> Tensor:
    step = F.dropout(step, layer.dropout, training=layer.training)
    return norm_of_sum(norm, step, x)


def _bart_feed_forward(layer: Any, x: Tensor) -> Tensor:
    dropout = _dropout(layer.activation_dropout, layer.training)
    return two_layers(x, layer.fc1, layer.activation_fn, dropout, layer.fc2)


# -- what is known -------------------------------------------------------------------------------

_KNOWN: dict[str, type[Fused]] = {
    "bert.modeling_bert.BertLayer": BertLayer,
    "bert.modeling_bert.BertSelfOutput": BertSelfOutput,
    "bert.modeling_bert.BertForMaskedLM": MaskedLM,
    "roberta.modeling_roberta.RobertaLayer": BertLayer,
    "roberta.modeling_roberta.RobertaSelfOutput": BertSelfOutput,
    "roberta.modeling_roberta.RobertaForMaskedLM": MaskedLM,
    "gpt2.modeling_gpt2.GPT2MLP": GPT2MLP,
    "bart.modeling_bart.BartEncoderLayer": BartEncoderLayer,
    "bart.modeling_bart.BartDecoderLayer": BartDecoderLayer,
    "bart.modeling_bart.BartForConditionalGeneration": Seq2SeqLMWithoutCache,
    "llama.modeling_llama.LlamaAttention": LlamaAttention,
    "llama.modeling_llama.LlamaMLP": LlamaMLP,
    "llama.modeling_llama.LlamaRMSNorm": RMSNorm,
    "gpt_neox.modeling_gpt_neox.GPTNeoXAttention": GPTNeoXAttention,
    "gpt_neox.modeling_gpt_neox.GPTNeoXMLP": GPTNeoXMLP,
    "t5.modeling_t5.T5LayerNorm": RMSNorm,
    "t5.modeling_t5.T5DenseActDense": T5DenseActDense,
    "t5.modeling_t5.T5DenseGatedActDense": T5DenseGatedActDense,
    "t5.modeling_t5.T5ForConditionalGeneration": Seq2SeqLM,
}
_ATTENTION = {
    "bert.modeling_bert.BertSelfAttention",
    "bert.modeling_bert.BertCrossAttention",
    "roberta.modeling_roberta.RobertaSelfAttention",
    "roberta.modeling_roberta.RobertaCrossAttention",
    "gpt2.modeling_gpt2.GPT2Attention",
    "bart.modeling_bart.BartAttention",
    "llama.modeling_llama.LlamaAttention",
    "gpt_neox.modeling_gpt_neox.GPTNeoXAttention",
    "t5.modeling_t5.T5Attention",
}
_BERT_FEED_FORWARD = {
    "bert.modeling_bert.BertIntermediate",
    "bert.modeling_bert.BertOutput",
    "roberta.modeling_roberta.RobertaIntermediate",
    "roberta.modeling_roberta.RobertaOutput",
}
_FAMILIES = {name.split(".")[0] for name in _KNOWN}


def known(module: nn.Module) -> type[Fused] | None:
    """What fuses this module of transformers, if anything does."""
    return _KNOWN.get(transformers_name(module))


def near_miss(module: nn.Module) -> str | None:
    """Why a module of transformers stays although its like is known, None when it is no such."""
    family, _, name = transformers_name(module).partition(".")
    if family and family not in _FAMILIES and name.endswith("Attention"):
        return f"attention of {family} is not known"
    return None


def replace_attention(model: nn.Module, report: FusionReport) -> None:
    """Point every config of the known models inside `model` at our attention."""
    configs: dict[int, Any] = {}
    reported = {r.path for r in report.replaced} | {s.path for s in report.skipped}
    for path, module in model.named_modules():
        key = transformers_name(module)
        config: Any = getattr(module, "config", None)
        if key.split(".")[0] not in _FAMILIES or not hasattr(config, "_attn_implementation"):
            continue
        # transformers saves no such config with another attention than eager
        asks = getattr(config, "output_attentions", False)
        if config._attn_implementation != NAME and not asks:
            configs[id(config)] = config
        if key in _ATTENTION and path not in reported:
            kind = type(module).__name__
            if config._attn_implementation == NAME:
                report.skipped.append(Skipped(path, kind, "it is fused already"))
            elif asks:
                report.skipped.append(Skipped(path, kind, "its config asks for output_attentions"))
            else:
                report.replaced.append(Replaced(path, kind, f"{kind} on tilewise attention"))
    if configs:
        register()
    for config in configs.values():
        report.undo.append(partial(_restore_attention, config, config._attn_implementation))
        config._attn_implementation = NAME


def _restore_attention(config: Any, name: str | None) -> None:
    if config._attn_implementation == NAME:  # else the user has set another
        config._attn_implementation = name
