"""BLOOM (BigScience 2022): ALiBi in place of positions, a norm of the embeddings, fused maps."""

from typing import Any

from ..checkpoints import WeightRule
from ..config import ModelConfig
from .fields import Raw, count, flag, has_head, number, same_again, special_ids, written_ids
from .tables import interleaved, linear, prefixed

MODEL_TYPES = ("bloom",)
POSITIONS = 2048  # that BLOOM was trained on; ALiBi itself has no end
SMALL = {
    "model_type": "bloom",
    "architectures": ["BloomForCausalLM"],
    "vocab_size": 61,
    "hidden_size": 16,
    "n_head": 4,
    "n_layer": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 3,
}
EXAMPLES: tuple[dict[str, Any], ...] = (
    SMALL,
    SMALL | {"hidden_size": 30, "n_head": 5, "apply_residual_connection_post_layernorm": True},
    SMALL | {"n_embed": 21, "n_head": 7, "tie_word_embeddings": False, "pad_token_id": None},
    {key: value for key, value in SMALL.items() if key not in ("n_head", "n_layer")}
    | {"num_attention_heads": 1, "num_hidden_layers": 1, "layer_norm_epsilon": 1e-3},
    SMALL | {"architectures": ["BloomModel"], "n_head": 8, "seq_length": 64},
    SMALL | {"architectures": ["BloomModel"], "tie_word_embeddings": False},
)


def config_from(raw: Raw, names: set[str] | None = None) -> ModelConfig:
    """Our configuration of a BLOOM config.json; raises ConfigError for what it cannot mean."""
    size = count(raw, "n_embed", count(raw, "hidden_size", 64))
    vocab = count(raw, "vocab_size", 250880)
    tied = flag(raw, "tie_word_embeddings", True)
    return ModelConfig(
        model_type="bloom",
        vocab_size=vocab,
        hidden_size=size,
        num_heads=count(raw, "num_attention_heads", count(raw, "n_head", 8)),
        ffn_size=4 * size,
        decoder_layers=count(raw, "num_hidden_layers", count(raw, "n_layer", 2)),
        max_positions=count(raw, "seq_length", POSITIONS),
        activation="gelu_tanh",
        norm_eps=number(raw, "layer_norm_epsilon", 1e-5),
        residual_from_norm=flag(raw, "apply_residual_connection_post_layernorm", False),
        positions="alibi",
        position_count="mask",
        embedding_norm=True,
        tie_embeddings=tied,
        output_head=tied or has_head(raw, names, "BloomModel", "lm_head.weight"),
        dropout=number(raw, "hidden_dropout", 0.0),
        **special_ids(raw, vocab, bos_token_id=1, eos_token_id=2),
    )


def config_to(config: ModelConfig) -> dict[str, Any]:
    """The config.json of a BLOOM folder that transformers reads back; ConfigError if none can."""
    raw = {
        "model_type": "bloom",
        "architectures": ["BloomForCausalLM" if config.output_head else "BloomModel"],
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "n_head": config.num_heads,
        "n_layer": config.decoder_layers,
        "seq_length": config.max_positions,
        "layer_norm_epsilon": config.norm_eps,
        "apply_residual_connection_post_layernorm": config.residual_from_norm,
        "tie_word_embeddings": config.tie_embeddings,
        "hidden_dropout": config.dropout,
        **written_ids(config),
    }
    return same_again(raw, config, config_from)


def rules(config: ModelConfig, names: set[str] | None) -> list[WeightRule]:
    """Which tensor of the file fills which of ours."""
    prefix = prefixed("transformer.", names)
    table = [
        WeightRule("embedding.tokens.weight", prefix + "word_embeddings.weight"),
        *linear("embedding.norm", prefix + "word_embeddings_layernorm"),
        *linear("norm", prefix + "ln_f"),
    ]
    for i in range(config.decoder_layers):
        ours, theirs = f"layers.{i}.", f"{prefix}h.{i}."
        fused = theirs + "self_attention.query_key_value"
        table += [
            *interleaved(ours + "self_attn", fused, config.num_heads),
            *linear(ours + "self_attn.out_proj", theirs + "self_attention.dense"),
            *linear(ours + "norm1", theirs + "input_layernorm"),
            *linear(ours + "norm2", theirs + "post_attention_layernorm"),
            *linear(ours + "linear1", theirs + "mlp.dense_h_to_4h"),
            *linear(ours + "linear2", theirs + "mlp.dense_4h_to_h"),
        ]
    if config.own_output:
        table.append(WeightRule("lm_head.weight", "lm_head.weight"))
    return table


def ignored(config: ModelConfig, names: set[str]) -> set[str]:
    """Nothing: BLOOM's files hold parameters only."""
    return set()


def tied(config: ModelConfig, names: set[str]) -> dict[str, str]:
    """Names that may repeat another tensor of the file."""
    tokens = prefixed("transformer.", names) + "word_embeddings.weight"
    return {"lm_head.weight": tokens} if config.tie_embeddings else {}
