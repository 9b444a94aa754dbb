"""OPT (Zhang et al. 2022): learned positions counted by the mask, from row 2 of the table."""

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
    same_again,
    special_ids,
    written_ids,
)
from .tables import attention, linear

MODEL_TYPES = ("opt",)
SMALL = {
    "model_type": "opt",
    "architectures": ["OPTForCausalLM"],
    "vocab_size": 61,
    "hidden_size": 16,
    "ffn_dim": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 24,
    "pad_token_id": 1,
    "bos_token_id": 2,
    "eos_token_id": 2,
}
POST_NORM = SMALL | {"do_layer_norm_before": False, "word_embed_proj_dim": 10}  # as in OPT-350M
EXAMPLES: tuple[dict[str, Any], ...] = (
    SMALL,
    POST_NORM,
    POST_NORM | {"tie_word_embeddings": False, "hidden_size": 15, "num_attention_heads": 5},
    SMALL | {"enable_bias": False, "layer_norm_elementwise_affine": False},
    SMALL | {"_remove_final_layer_norm": True, "activation_function": "gelu", "enable_bias": False},
    SMALL | {"architectures": ["OPTModel"], "word_embed_proj_dim": 12},
    SMALL | {"architectures": ["OPTModel"], "tie_word_embeddings": False},
)


def config_from(raw: Raw, names: set[str] | None = None) -> ModelConfig:
    """Our configuration of an OPT config.json; raises ConfigError for what it cannot mean."""
    size, vocab = count(raw, "hidden_size", 768), count(raw, "vocab_size", 50272)
    before = flag(raw, "do_layer_norm_before", True)
    bias = flag(raw, "enable_bias", True)
    narrow = count(raw, "word_embed_proj_dim", size)
    tied = flag(raw, "tie_word_embeddings", True)
    return ModelConfig(
        model_type="opt",
        vocab_size=vocab,
        hidden_size=size,
        num_heads=count(raw, "num_attention_heads", 12),
        ffn_size=count(raw, "ffn_dim", 3072),
        decoder_layers=count(raw, "num_hidden_layers", 12),
        max_positions=count(raw, "max_position_embeddings", 2048),
        activation=activation(raw, "activation_function", "relu"),
        norm_position="pre" if before else "post",
        norm_weight=flag(raw, "layer_norm_elementwise_affine", True),
        final_norm=before and not flag(raw, "_remove_final_layer_norm", False),
        attention_bias=bias,
        ffn_bias=bias,
        position_offset=2,
        position_count="mask",
        embedding_size=None if narrow == size else narrow,
        train_padding=False,
        tie_embeddings=tied,
        output_head=tied or has_head(raw, names, "OPTModel", "lm_head.weight"),
        dropout=number(raw, "dropout", 0.1),
        **special_ids(raw, vocab, pad_token_id=1, bos_token_id=2, eos_token_id=2),
    )


def config_to(config: ModelConfig) -> dict[str, Any]:
    """The config.json of an OPT folder that transformers reads back; ConfigError if none can."""
    raw = {
        "model_type": "opt",
        "architectures": ["OPTForCausalLM" if config.output_head else "OPTModel"],
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_heads,
        "ffn_dim": config.ffn_size,
        "num_hidden_layers": config.decoder_layers,
        "max_position_embeddings": config.max_positions,
        "activation_function": activation_name(config.activation),
        "do_layer_norm_before": config.norm_position == "pre",
        "layer_norm_elementwise_affine": config.norm_weight,
        "_remove_final_layer_norm": config.norm_position == "pre" and not config.final_norm,
        "enable_bias": config.attention_bias,
        "word_embed_proj_dim": config.embedding_size or config.hidden_size,
        "tie_word_embeddings": config.tie_embeddings,
        "dropout": config.dropout,
        **written_ids(config),
    }
    return same_again(raw, config, config_from)


def rules(config: ModelConfig, names: set[str] | None) -> list[WeightRule]:
    """Which tensor of the file fills which of ours."""
    prefix, bias = _prefix(names), config.attention_bias
    table = [
        WeightRule("embedding.tokens.weight", prefix + "embed_tokens.weight"),
        WeightRule("embedding.positions.weight", prefix + "embed_positions.weight"),
    ]
    norms = [("norm", prefix + "final_layer_norm")] if config.final_norm else []
    for i in range(config.decoder_layers):
        ours, theirs = f"layers.{i}.", f"{prefix}layers.{i}."
        q, k, v, out = (f"{theirs}self_attn.{x}_proj" for x in ("q", "k", "v", "out"))
        table += [
            *attention(ours + "self_attn", (q, k, v), out, config, bias=bias),
            *linear(ours + "linear1", theirs + "fc1", bias=bias),
            *linear(ours + "linear2", theirs + "fc2", bias=bias),
        ]
        norms.append((ours + "norm1", theirs + "self_attn_layer_norm"))
        norms.append((ours + "norm2", theirs + "final_layer_norm"))
    if config.norm_weight:
        table += [line for norm in norms for line in linear(*norm)]
    if config.embedding_size is not None:
        table += linear("embedding.project", prefix + "project_in", bias=False)
        table += linear("project", prefix + "project_out", bias=False)
    if config.own_output:
        table.append(WeightRule("lm_head.weight", "lm_head.weight"))
    return table


def _prefix(names: set[str] | None) -> str:
    """model.decoder., or what is left of it in files of the model without its head."""
    known = ("model.decoder.", "decoder.", "")
    there = (p for p in known if names is not None and p + "embed_tokens.weight" in names)
    return next(there, known[0])


def ignored(config: ModelConfig, names: set[str]) -> set[str]:
    """Nothing: OPT's files hold parameters only."""
    return set()


def tied(config: ModelConfig, names: set[str]) -> dict[str, str]:
    """Names that may repeat another tensor of the file."""
    return (
        {"lm_head.weight": _prefix(names) + "embed_tokens.weight"} if config.tie_embeddings else {}
    )
