"""GPT (Radford et al. 2018): learned positions, post-norm, maps stored as [in, out]."""

from typing import Any

from ..checkpoints import WeightRule
from ..config import Activation, ModelConfig
from ..errors import ConfigError
from .fields import Raw, count, flag, has_head, number, same_again, special_ids, written_ids
from .tables import linear, prefixed, transposed

MODEL_TYPES = ("openai-gpt",)
ACTIVATIONS: dict[str, Activation] = {  # its "gelu" is the tanh form, unlike everywhere else
    "gelu": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
SMALL = {
    "model_type": "openai-gpt",
    "architectures": ["OpenAIGPTLMHeadModel"],
    "vocab_size": 61,
    "n_positions": 24,
    "n_embd": 16,
    "n_head": 2,
    "n_layer": 2,
    "eos_token_id": 2,
}
EXAMPLES: tuple[dict[str, Any], ...] = (
    SMALL,
    SMALL | {"n_embd": 20, "n_head": 5, "afn": "swish", "tie_word_embeddings": False},
    SMALL | {"n_embd": 14, "n_head": 1, "n_layer": 1, "afn": "relu", "layer_norm_epsilon": 1e-3},
    SMALL | {"architectures": ["OpenAIGPTModel"], "afn": "silu", "n_ctx": 24},
    SMALL | {"architectures": ["OpenAIGPTModel"], "tie_word_embeddings": False},
)


def config_from(raw: Raw, names: set[str] | None = None) -> ModelConfig:
    """Our configuration of a GPT config.json; raises ConfigError for what it cannot mean."""
    size, vocab = count(raw, "n_embd", 768), count(raw, "vocab_size", 40478)
    name = raw.get("afn", "gelu")
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise ConfigError(f"afn is {name!r}; it must be one of {', '.join(ACTIVATIONS)}")
    tied = flag(raw, "tie_word_embeddings", True)
    return ModelConfig(
        model_type="openai-gpt",
        vocab_size=vocab,
        hidden_size=size,
        num_heads=count(raw, "n_head", 12),
        ffn_size=4 * size,
        decoder_layers=count(raw, "n_layer", 12),
        max_positions=count(raw, "n_positions", 512),
        activation=ACTIVATIONS[name],
        norm_position="post",
        norm_eps=number(raw, "layer_norm_epsilon", 1e-5),
        final_norm=False,
        tie_embeddings=tied,
        output_head=tied or has_head(raw, names, "OpenAIGPTModel", "lm_head.weight"),
        dropout=number(raw, "resid_pdrop", 0.1),
        **special_ids(raw, vocab),
    )


def config_to(config: ModelConfig) -> dict[str, Any]:
    """The config.json of a GPT folder that transformers reads back; ConfigError if none can."""
    names = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    raw = {
        "model_type": "openai-gpt",
        "architectures": ["OpenAIGPTLMHeadModel" if config.output_head else "OpenAIGPTModel"],
        "vocab_size": config.vocab_size,
        "n_embd": config.hidden_size,
        "n_head": config.num_heads,
        "n_layer": config.decoder_layers,
        "n_positions": config.max_positions,
        "afn": names.get(config.activation, "gelu"),
        "layer_norm_epsilon": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
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
        WeightRule("embedding.tokens.weight", prefix + "tokens_embed.weight"),
        WeightRule("embedding.positions.weight", prefix + "positions_embed.weight"),
    ]
    for i in range(config.decoder_layers):
        ours, theirs = f"layers.{i}.", f"{prefix}h.{i}."
        fused, packed = f"{theirs}attn.c_attn.", f"{ours}self_attn.in_proj_"
        table += [
            WeightRule(packed + "weight", fused + "weight", lambda w: w.t(), lambda w: (w.t(),)),
            WeightRule(packed + "bias", fused + "bias"),
            *transposed(ours + "self_attn.out_proj", theirs + "attn.c_proj"),
            *linear(ours + "norm1", theirs + "ln_1"),
            *transposed(ours + "linear1", theirs + "mlp.c_fc"),
            *transposed(ours + "linear2", theirs + "mlp.c_proj"),
            *linear(ours + "norm2", theirs + "ln_2"),
        ]
    if config.own_output:
        table.append(WeightRule("lm_head.weight", "lm_head.weight"))
    return table


def ignored(config: ModelConfig, names: set[str]) -> set[str]:
    """Mask and position buffers that old files carry."""
    return {name for name in names if name.endswith((".attn.bias", "position_ids"))}


def tied(config: ModelConfig, names: set[str]) -> dict[str, str]:
    """Names that may repeat another tensor of the file."""
    tokens = prefixed("transformer.", names) + "tokens_embed.weight"
    return {"lm_head.weight": tokens} if config.tie_embeddings else {}
