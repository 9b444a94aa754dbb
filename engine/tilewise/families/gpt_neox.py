"""GPT-NeoX and Pythia (Black et al. 2022): part of each head rotary, parallel residual."""

from typing import Any

from ..checkpoints import WeightRule
from ..config import ModelConfig
from .fields import (
    Raw,
    activation,
    activation_name,
    count,
    flag,
    has_head,
    number,
    rotary_fields,
    same_again,
    special_ids,
    written_ids,
    written_rotary,
)
from .tables import interleaved, linear, prefixed

MODEL_TYPES = ("gpt_neox",)
SMALL = {
    "model_type": "gpt_neox",
    "architectures": ["GPTNeoXForCausalLM"],
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": 32,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
EXAMPLES: tuple[dict[str, Any], ...] = (
    SMALL,
    SMALL | {"rotary_pct": 0.5, "rotary_emb_base": 5000, "use_parallel_residual": False},
    SMALL | {"attention_bias": False, "hidden_act": "gelu_fast", "rotary_pct": 1.0},
    SMALL | {"hidden_size": 16, "num_attention_heads": 1, "tie_word_embeddings": True},
    SMALL
    | {
        "architectures": ["GPTNeoXModel"],
        "tie_word_embeddings": True,
        "rope_parameters": {
            "rope_type": "linear",
            "factor": 2.0,
            "rope_theta": 100.0,
            "partial_rotary_factor": 0.75,
        },
    },
    SMALL | {"architectures": ["GPTNeoXModel"], "tie_word_embeddings": False},
)


def config_from(raw: Raw, names: set[str] | None = None) -> ModelConfig:
    """Our configuration of a GPT-NeoX config.json; raises ConfigError for what it cannot mean."""
    size, heads = count(raw, "hidden_size", 6144), count(raw, "num_attention_heads", 64)
    vocab = count(raw, "vocab_size", 50432)
    tied = flag(raw, "tie_word_embeddings", False)
    return ModelConfig(
        model_type="gpt_neox",
        vocab_size=vocab,
        hidden_size=size,
        num_heads=heads,
        ffn_size=count(raw, "intermediate_size", 24576),
        decoder_layers=count(raw, "num_hidden_layers", 44),
        max_positions=count(raw, "max_position_embeddings", 2048),
        activation=activation(raw, "hidden_act", "gelu"),
        norm_eps=number(raw, "layer_norm_eps", 1e-5),
        parallel_residual=flag(raw, "use_parallel_residual", True),
        attention_bias=flag(raw, "attention_bias", True),
        tie_embeddings=tied,
        output_head=tied
        or has_head(raw, names, "GPTNeoXModel", "lm_head.weight", "embed_out.weight"),
        dropout=number(raw, "hidden_dropout", 0.0),
        **rotary_fields({"rotary_pct": 0.25} | dict(raw), max(size // heads, 1)),
        **special_ids(raw, vocab, bos_token_id=0, eos_token_id=2),
    )


def config_to(config: ModelConfig) -> dict[str, Any]:
    """The config.json of a GPT-NeoX folder that transformers reads back; ConfigError if none can.

    The older names of the rotary fields are written too, for readers that know no others.
    """
    rotary = written_rotary(config)
    share = rotary["rope_parameters"].setdefault("partial_rotary_factor", 1.0)
    raw = {
        "model_type": "gpt_neox",
        "architectures": ["GPTNeoXForCausalLM" if config.output_head else "GPTNeoXModel"],
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.ffn_size,
        "num_hidden_layers": config.decoder_layers,
        "max_position_embeddings": config.max_positions,
        "hidden_act": activation_name(config.activation),
        "layer_norm_eps": config.norm_eps,
        "use_parallel_residual": config.parallel_residual,
        "attention_bias": config.attention_bias,
        "tie_word_embeddings": config.tie_embeddings,
        "hidden_dropout": config.dropout,
        "rotary_pct": share,
        "rotary_emb_base": config.rotary_base,
        **rotary,
        **written_ids(config),
    }
    return same_again(raw, config, config_from)


def rules(config: ModelConfig, names: set[str] | None) -> list[WeightRule]:
    """Which tensor of the file fills which of ours."""
    prefix = prefixed("gpt_neox.", names)
    table = [
        WeightRule("embedding.tokens.weight", prefix + "embed_in.weight"),
        *linear("norm", prefix + "final_layer_norm"),
    ]
    for i in range(config.decoder_layers):
        ours, theirs = f"layers.{i}.", f"{prefix}layers.{i}."
        fused, out, bias = "attention.query_key_value", "attention.dense", config.attention_bias
        table += [
            *interleaved(ours + "self_attn", theirs + fused, config.num_heads, bias=bias),
            *linear(ours + "self_attn.out_proj", theirs + out, bias=bias),
            *linear(ours + "norm1", theirs + "input_layernorm"),
            *linear(ours + "norm2", theirs + "post_attention_layernorm"),
            *linear(ours + "linear1", theirs + "mlp.dense_h_to_4h"),
            *linear(ours + "linear2", theirs + "mlp.dense_4h_to_h"),
        ]
    if config.own_output:
        table.append(WeightRule("lm_head.weight", _head(names)))
    return table


def _head(names: set[str] | None) -> str:
    """The output matrix: embed_out in hub files, and in what transformers writes."""
    return "lm_head.weight" if names and "lm_head.weight" in names else "embed_out.weight"


def ignored(config: ModelConfig, names: set[str]) -> set[str]:
    """Mask buffers and rotary frequencies that old files carry."""
    buffers = (".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq")
    return {name for name in names if name.endswith(buffers)}


def tied(config: ModelConfig, names: set[str]) -> dict[str, str]:
    """Names that may repeat another tensor of the file."""
    tokens = prefixed("gpt_neox.", names) + "embed_in.weight"
    return {_head(names): tokens} if config.tie_embeddings else {}
