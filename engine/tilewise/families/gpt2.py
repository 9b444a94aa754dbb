"""GPT-2 (Radford et al. 2019): learned positions, pre-norm, maps stored as [in, out]."""

from typing import Any

from ..checkpoints import WeightRule
from ..config import ModelConfig
from ..errors import ConfigError
from .fields import (
    Raw,
    activation,
    activation_name,
    count,
    flag,
    has_head,
    number,
    same_again,
    special_ids,
    written_ids,
)
from .tables import linear, prefixed, transposed

MODEL_TYPES = ("gpt2",)
SMALL = {
    "model_type": "gpt2",
    "architectures": ["GPT2LMHeadModel"],
    "vocab_size": 61,
    "n_positions": 24,
    "n_embd": 16,
    "n_head": 2,
    "n_layer": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXAMPLES: tuple[dict[str, Any], ...] = (
    SMALL,
    SMALL | {"n_embd": 20, "n_head": 5, "n_inner": 33, "tie_word_embeddings": False},
    SMALL | {"scale_attn_by_inverse_layer_idx": True, "activation_function": "relu"},
    SMALL | {"n_embd": 14, "n_head": 1, "n_layer": 1, "scale_attn_weights": False},
    SMALL | {"architectures": ["GPT2Model"]},
    SMALL | {"architectures": ["GPT2Model"], "tie_word_embeddings": False},
)


def config_from(raw: Raw, names: set[str] | None = None) -> ModelConfig:
    """Our configuration of a GPT-2 config.json; raises ConfigError for what it cannot mean."""
    if raw.get("add_cross_attention", False):
        raise ConfigError("add_cross_attention is set; a GPT-2 here is a decoder on its own")
    size, vocab = count(raw, "n_embd", 768), count(raw, "vocab_size", 50257)
    end = 50256 if vocab > 50256 else None  # what the class assumes where a file is silent
    tied = flag(raw, "tie_word_embeddings", True)
    return ModelConfig(
        model_type="gpt2",
        vocab_size=vocab,
        hidden_size=size,
        num_heads=count(raw, "n_head", 12),
        ffn_size=count(raw, "n_inner", 4 * size),
        decoder_layers=count(raw, "n_layer", 12),
        max_positions=count(raw, "n_positions", 1024),
        activation=activation(raw, "activation_function", "gelu_new"),
        norm_eps=number(raw, "layer_norm_epsilon", 1e-5),
        tie_embeddings=tied,
        output_head=tied or has_head(raw, names, "GPT2Model", "lm_head.weight"),
        attention_scale=None if flag(raw, "scale_attn_weights", True) else 1.0,
        attention_scale_by_layer=flag(raw, "scale_attn_by_inverse_layer_idx", False),
        dropout=number(raw, "resid_pdrop", 0.1),
        **special_ids(raw, vocab, bos_token_id=end, eos_token_id=end),
    )


def config_to(config: ModelConfig) -> dict[str, Any]:
    """The config.json of a GPT-2 folder that transformers reads back.

    Raises ConfigError for a configuration that no GPT-2 has, such as post-norm layers.
    """
    raw = {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel" if config.output_head else "GPT2Model"],
        "vocab_size": config.vocab_size,
        "n_embd": config.hidden_size,
        "n_head": config.num_heads,
        "n_inner": config.ffn_size,
        "n_layer": config.decoder_layers,
        "n_positions": config.max_positions,
        "activation_function": activation_name(config.activation),
        "layer_norm_epsilon": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "scale_attn_weights": config.attention_scale is None,
        "scale_attn_by_inverse_layer_idx": config.attention_scale_by_layer,
        "resid_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.dropout,
        **written_ids(config),
    }
    return same_again(raw, config, config_from)


def rules(config: ModelConfig, names: set[str] | None) -> list[WeightRule]:
    """Which tensor of the file fills which of ours."""
    prefix = prefixed("transformer.", names)
    table = [
        WeightRule("embedding.tokens.weight", prefix + "wte.weight"),
        WeightRule("embedding.positions.weight", prefix + "wpe.weight"),
        *linear("norm", prefix + "ln_f"),
    ]
    for i in range(config.decoder_layers):
        ours, theirs = f"layers.{i}.", f"{prefix}h.{i}."
        table += [
            *linear(ours + "norm1", theirs + "ln_1"),
            WeightRule(
                ours + "self_attn.in_proj_weight",
                theirs + "attn.c_attn.weight",
                lambda w: w.t(),
                lambda w: (w.t(),),
            ),
            WeightRule(ours + "self_attn.in_proj_bias", theirs + "attn.c_attn.bias"),
            *transposed(ours + "self_attn.out_proj", theirs + "attn.c_proj"),
            *linear(ours + "norm2", theirs + "ln_2"),
            *transposed(ours + "linear1", theirs + "mlp.c_fc"),
            *transposed(ours + "linear2", theirs + "mlp.c_proj"),
        ]
    if config.own_output:
        table.append(WeightRule("lm_head.weight", "lm_head.weight"))
    return table


def ignored(config: ModelConfig, names: set[str]) -> set[str]:
    """Mask buffers that old files carry."""
    return {name for name in names if name.endswith((".attn.bias", ".attn.masked_bias"))}


def tied(config: ModelConfig, names: set[str]) -> dict[str, str]:
    """Names that may repeat another tensor of the file."""
    wte = prefixed("transformer.", names) + "wte.weight"
    return {"lm_head.weight": wte} if config.tie_embeddings else {}
