"""ModernBERT (Warner et al. 2024): pre-norm, rotary positions, windows in most layers, GeGLU.

Layers that see everything and layers with a window turn queries and keys by angles of their own
base. The first layer has no norm of its own before attention: the embedding's serves it.
"""

from collections.abc import Mapping
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
    number,
    rotary_fields,
    same_again,
    special_ids,
    written_ids,
    written_rotary,
)
from .tables import linear, prefixed

MODEL_TYPES = ("modernbert",)
SMALL = {
    "model_type": "modernbert",
    "architectures": ["ModernBertForMaskedLM"],
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "local_attention": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "cls_token_id": 1,
    "sep_token_id": 2,
}
BIASES = {"attention_bias": True, "mlp_bias": True, "norm_bias": True, "classifier_bias": True}
HUB = {"global_attn_every_n_layers": 2, "global_rope_theta": 5000.0, "local_rope_theta": 100.0}
LAST = ["sliding_attention", "sliding_attention", "full_attention"]
EXAMPLES: tuple[dict[str, Any], ...] = (
    SMALL,
    SMALL | BIASES | {"hidden_activation": "silu", "classifier_activation": "relu"},
    SMALL | HUB | {"tie_word_embeddings": False, "decoder_bias": False},
    SMALL | {"architectures": ["ModernBertModel"], "hidden_size": 18, "num_attention_heads": 3},
    SMALL | {"layer_types": LAST, "num_hidden_layers": 3, "local_attention": 3},
    SMALL | {"num_hidden_layers": 1, "num_attention_heads": 1, "norm_eps": 1e-3},
    SMALL | {"local_attention": 1, "local_rope_theta": 20.0, "rope_parameters": None},
)


def config_from(raw: Raw, names: set[str] | None = None) -> ModelConfig:
    """Our configuration of a ModernBERT config.json; raises ConfigError for what it cannot mean."""
    size, heads = count(raw, "hidden_size", 768), count(raw, "num_attention_heads", 12)
    vocab = count(raw, "vocab_size", 50368)
    layers = count(raw, "num_hidden_layers", 22)
    masked = "head.dense.weight" in (names or ())
    assumed = {"bos_token_id": 50281, "eos_token_id": 50282, "pad_token_id": 50283}
    return ModelConfig(
        model_type="modernbert",
        vocab_size=vocab,
        hidden_size=size,
        num_heads=heads,
        ffn_size=count(raw, "intermediate_size", 1152),
        encoder_layers=layers,
        max_positions=count(raw, "max_position_embeddings", 8192),
        activation=activation(raw, "hidden_activation", "gelu"),
        gated=True,
        norm_eps=number(raw, "norm_eps", 1e-5),
        norm_bias=flag(raw, "norm_bias", False),
        first_norm=False,
        attention_bias=flag(raw, "attention_bias", False),
        ffn_bias=flag(raw, "mlp_bias", False),
        windows=windows(raw, layers),
        embedding_norm=True,
        train_padding=False,
        tie_embeddings=flag(raw, "tie_word_embeddings", True),
        masked_head=activation(raw, "classifier_activation", "gelu") if masked else None,
        masked_head_bias=flag(raw, "classifier_bias", False) if masked else True,
        output_bias=flag(raw, "decoder_bias", True) if masked else False,
        dropout=number(raw, "mlp_dropout", 0.0),
        **two_rotaries(raw, size // heads),
        **special_ids(raw, vocab, **(assumed if vocab > 50283 else {})),
    )


def windows(raw: Raw, layers: int) -> tuple[int | None, ...]:
    """Each layer's, from layer_types or how often the old global_attn_every_n_layers comes."""
    half = count(raw, "local_attention", 128) // 2
    kinds = raw.get("layer_types")
    if kinds is None:
        every = count(raw, "global_attn_every_n_layers", 3)
        few = min(layers, 10_000)  # ModelConfig refuses as many; no tuple is made of more
        return tuple(half if i % every else None for i in range(few))
    known = {"full_attention": None, "sliding_attention": half}
    if (
        not isinstance(kinds, list)
        or len(kinds) != layers
        or not set(map(str, kinds)) <= set(known)
    ):
        raise ConfigError(
            f"layer_types is {kinds!r}; it must list one of {', '.join(known)} for each of "
            f"{layers} layers"
        )
    return tuple(known[kind] for kind in kinds)


def two_rotaries(raw: Raw, head_size: int) -> dict[str, Any]:
    """ModelConfig's rotary fields: of layers that see everything, and the base of the others."""
    nested = raw.get("rope_parameters") or {}
    if not isinstance(nested, Mapping):
        raise ConfigError(f"rope_parameters is {nested!r}; it must be an object")
    scaling = raw.get("rope_scaling")
    found: list[dict[str, Any]] = []
    for kind, old, base in (
        ("full_attention", "global_rope_theta", 160_000.0),
        ("sliding_attention", "local_rope_theta", 10_000.0),
    ):
        theta = raw.get(old, base)
        if theta is None:  # an old file's way to say: as in the other layers
            theta = found[0]["rotary_base"] if found else base
        own = {"rope_parameters": nested.get(kind), "rope_scaling": scaling, "rope_theta": theta}
        found.append(rotary_fields(own, head_size))
    full, local = found
    if full | {"rotary_base": 0} != local | {"rotary_base": 0}:
        raise ConfigError("rope_parameters scales full and sliding attention differently")
    return full | {"rotary_base_local": local["rotary_base"]}


def config_to(config: ModelConfig) -> dict[str, Any]:
    """The config.json of a ModernBERT folder that transformers reads back.

    Raises ConfigError for a configuration that no ModernBERT has, such as post-norm layers.
    """
    full = written_rotary(config)["rope_parameters"]
    local = full | {"rope_theta": config.rotary_base_local or config.rotary_base}
    head = "Model" if config.masked_head is None else "ForMaskedLM"
    raw = {
        "model_type": "modernbert",
        "architectures": ["ModernBert" + head],
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.ffn_size,
        "num_hidden_layers": config.encoder_layers,
        "max_position_embeddings": config.max_positions,
        "hidden_activation": activation_name(config.activation),
        "norm_eps": config.norm_eps,
        "norm_bias": config.norm_bias,
        "attention_bias": config.attention_bias,
        "mlp_bias": config.ffn_bias,
        "tie_word_embeddings": config.tie_embeddings,
        "embedding_dropout": config.dropout,
        "attention_dropout": config.dropout,
        "mlp_dropout": config.dropout,
        "layer_types": [
            "full_attention" if window is None else "sliding_attention" for window in config.windows
        ],
        "rope_parameters": {"full_attention": full, "sliding_attention": local},
        **written_ids(config),
    }
    for window in config.windows:
        if window is not None:
            raw["local_attention"] = max(2 * window, 1)
    if config.masked_head is not None:
        raw["classifier_activation"] = activation_name(config.masked_head)
        raw["classifier_bias"] = config.masked_head_bias
        raw["decoder_bias"] = config.output_bias
    names = {name for rule in rules(config, None) for name in rule.sources}
    return same_again(raw, config, lambda raw: config_from(raw, names))


def rules(config: ModelConfig, names: set[str] | None) -> list[WeightRule]:
    """Which tensor of the file fills which of ours."""
    masked, bias = config.masked_head is not None, config.norm_bias
    prefix = "model." if names is None and masked else prefixed("model.", names or ())
    table = [
        WeightRule("embedding.tokens.weight", prefix + "embeddings.tok_embeddings.weight"),
        *linear("embedding.norm", prefix + "embeddings.norm", bias=bias),
        *linear("norm", prefix + "final_norm", bias=bias),
    ]
    for i in range(config.encoder_layers):
        ours, theirs = f"layers.{i}.", f"{prefix}layers.{i}."
        table += [
            *(linear(ours + "norm1", theirs + "attn_norm", bias=bias) if i else ()),
            *packed(ours + "self_attn", theirs + "attn.Wqkv", config.attention_bias),
            *linear(ours + "self_attn.out_proj", theirs + "attn.Wo", bias=config.attention_bias),
            *linear(ours + "norm2", theirs + "mlp_norm", bias=bias),
            *halves(ours, theirs + "mlp.Wi", config.ffn_bias),
            *linear(ours + "linear2", theirs + "mlp.Wo", bias=config.ffn_bias),
        ]
    if masked:
        table += linear("masked_head.linear", "head.dense", bias=config.masked_head_bias)
        table += linear("masked_head.norm", "head.norm", bias=bias)
        output = linear("masked_head.output", "decoder", bias=config.output_bias)
        table += output[config.tie_embeddings :]
    return table


def packed(target: str, source: str, bias: bool) -> list[WeightRule]:
    """q, k and v as one map, in the order of ours."""
    kinds = ("weight", "bias") if bias else ("weight",)
    return [WeightRule(f"{target}.in_proj_{kind}", f"{source}.{kind}") for kind in kinds]


def halves(layer: str, source: str, bias: bool) -> list[WeightRule]:
    """The activated half of a fused map, then its gate."""
    kinds = ("weight", "bias") if bias else ("weight",)
    return [
        rule
        for kind in kinds
        for rule in (
            WeightRule(f"{layer}linear1.{kind}", f"{source}.{kind}", lambda w: w.chunk(2)[0]),
            WeightRule(f"{layer}gate.{kind}", f"{source}.{kind}", lambda w: w.chunk(2)[1]),
        )
    ]


def ignored(config: ModelConfig, names: set[str]) -> set[str]:
    """Rotary frequencies that old files carry."""
    return {name for name in names if name.endswith("rotary_emb.inv_freq")}


def tied(config: ModelConfig, names: set[str]) -> dict[str, str]:
    """Names that may repeat another tensor of the file."""
    tokens = prefixed("model.", names) + "embeddings.tok_embeddings.weight"
    return {"decoder.weight": tokens} if config.tie_embeddings else {}
