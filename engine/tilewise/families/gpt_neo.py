"""GPT-Neo (Black et al. 2021): GPT-2 with unscaled scores, and windows in layers called local."""

from collections.abc import Iterator
from itertools import islice
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
from .tables import attention, linear, prefixed

MODEL_TYPES = ("gpt_neo",)
SMALL = {
    "model_type": "gpt_neo",
    "architectures": ["GPTNeoForCausalLM"],
    "vocab_size": 61,
    "max_position_embeddings": 24,
    "hidden_size": 16,
    "num_heads": 2,
    "num_layers": 2,
    "attention_types": [[["global", "local"], 1]],
    "window_size": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXAMPLES: tuple[dict[str, Any], ...] = (
    SMALL | {"attention_layers": ["global", "local"]},
    SMALL | {"hidden_size": 15, "num_heads": 5, "num_layers": 3, "intermediate_size": 33}
    | {"attention_types": [[["local"], 2], [["global"], 1]], "window_size": 1},
    SMALL | {"attention_types": [[["global"], 2]], "tie_word_embeddings": False},
    SMALL | {"num_heads": 1, "activation_function": "relu", "layer_norm_epsilon": 1e-3}
    | {"attention_types": None, "attention_layers": ["local", "global"]},
    SMALL | {"architectures": ["GPTNeoModel"], "window_size": 2},
    SMALL | {"architectures": ["GPTNeoModel"], "tie_word_embeddings": False},
)  # fmt: skip


def config_from(raw: Raw, names: set[str] | None = None) -> ModelConfig:
    """Our configuration of a GPT-Neo config.json; raises ConfigError for what it cannot mean."""
    size, vocab = count(raw, "hidden_size", 2048), count(raw, "vocab_size", 50257)
    layers = count(raw, "num_layers", 24)
    end = 50256 if vocab > 50256 else None  # what the class assumes where a file is silent
    tied = flag(raw, "tie_word_embeddings", True)
    return ModelConfig(
        model_type="gpt_neo",
        vocab_size=vocab,
        hidden_size=size,
        num_heads=count(raw, "num_heads", 16),
        ffn_size=count(raw, "intermediate_size", 4 * size),
        decoder_layers=layers,
        max_positions=count(raw, "max_position_embeddings", 2048),
        activation=activation(raw, "activation_function", "gelu_new"),
        norm_eps=number(raw, "layer_norm_epsilon", 1e-5),
        qkv_bias=False,
        attention_scale=1.0,
        windows=windows(raw, layers),
        tie_embeddings=tied,
        output_head=tied or has_head(raw, names, "GPTNeoModel", "lm_head.weight"),
        dropout=number(raw, "resid_dropout", 0.0),
        **special_ids(raw, vocab, bos_token_id=end, eos_token_id=end),
    )


def windows(raw: Raw, layers: int) -> tuple[int | None, ...]:
    """Each layer's, from attention_layers or else attention_types; () when all are global."""
    before = count(raw, "window_size", 256) - 1  # window_size counts the query's own position
    groups = raw.get("attention_types")
    groups = [[["global", "local"], 12]] if groups is None else groups
    if raw.get("attention_layers") is not None:  # the hub's files say it twice
        groups = [[raw["attention_layers"], 1]]
    few = min(layers, 10_000)  # ModelConfig refuses as many; no tuple is made of more
    kinds = list(islice(each_kind(groups), few + 1))
    if len(kinds) != few or not set(kinds) <= {"global", "local"}:
        raise ConfigError(
            f"attention_types or attention_layers is {groups!r}; it must name {layers} layers, "
            'global or local, such as [[["global", "local"], 6]] for twelve'
        )
    return tuple(before if kind == "local" else None for kind in kinds) if "local" in kinds else ()


def each_kind(groups: object) -> Iterator[str]:
    """The layers that [[names, times], ...] stands for, one by one, for it may be any number."""
    for group in groups if isinstance(groups, (list, tuple)) else ():
        match group:
            case [[_, *_] as names, int(times)]:
                for _ in range(times):
                    yield from map(str, names)
            case _:
                yield "neither"


def config_to(config: ModelConfig) -> dict[str, Any]:
    """The config.json of a GPT-Neo folder that transformers reads back; ConfigError if none can."""
    every = config.windows or (None,) * config.decoder_layers
    kinds = ["global" if window is None else "local" for window in every]
    raw = {
        "model_type": "gpt_neo",
        "architectures": ["GPTNeoForCausalLM" if config.output_head else "GPTNeoModel"],
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_heads": config.num_heads,
        "intermediate_size": config.ffn_size,
        "num_layers": config.decoder_layers,
        "attention_types": [[kinds, 1]],
        "attention_layers": kinds,
        "window_size": 1 + next((window for window in every if window is not None), 255),
        "max_position_embeddings": config.max_positions,
        "activation_function": activation_name(config.activation),
        "layer_norm_epsilon": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "resid_dropout": config.dropout,
        "embed_dropout": config.dropout,
        "attention_dropout": config.dropout,
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
        q, k, v, out = (f"{theirs}attn.attention.{x}_proj" for x in ("q", "k", "v", "out"))
        table += [
            *linear(ours + "norm1", theirs + "ln_1"),
            *attention(ours + "self_attn", (q, k, v), out, config, bias=False),
            WeightRule(ours + "self_attn.out_proj.bias", out + ".bias"),
            *linear(ours + "norm2", theirs + "ln_2"),
            *linear(ours + "linear1", theirs + "mlp.c_fc"),
            *linear(ours + "linear2", theirs + "mlp.c_proj"),
        ]
    if config.own_output:
        table.append(WeightRule("lm_head.weight", "lm_head.weight"))
    return table


def ignored(config: ModelConfig, names: set[str]) -> set[str]:
    """Mask buffers that the hub's files carry."""
    buffers = (".attn.attention.bias", ".attn.attention.masked_bias")
    return {name for name in names if name.endswith(buffers)}


def tied(config: ModelConfig, names: set[str]) -> dict[str, str]:
    """Names that may repeat another tensor of the file."""
    wte = prefixed("transformer.", names) + "wte.weight"
    return {"lm_head.weight": wte} if config.tie_embeddings else {}
