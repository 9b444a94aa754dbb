"""The original Transformer (Vaswani et al. 2017): no Hugging Face class, so the format is ours.

config.json holds ModelConfig's own fields; tensors keep the names of our state_dict. Where a
file has fairseq's or OpenNMT-py's names instead, these are read.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from ..checkpoints import WeightRule
from ..config import AnyConfig, ModelConfig
from ..errors import ConfigError
from ..models import build
from .tables import attention, linear, seq2seq_layers

MODEL_TYPES = ("tilewise-transformer",)
EXAMPLES: tuple[dict[str, Any], ...] = ()  # transformers has no such class
FAIRSEQ: dict[str, Any] = {
    "norm_position": "post",
    "final_norm": False,
    "sinusoid": "stretched",
    "position_count": "tokens",  # from pad_token_id + 1 on
    "bos_token_id": 0,
    "pad_token_id": 1,
    "eos_token_id": (2,),
    "decoder_start_token_id": 2,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "paper": {"norm_position": "post", "final_norm": False},
    "fairseq": FAIRSEQ,
    "fairseq-pre-norm": FAIRSEQ | {"norm_position": "pre", "final_norm": True},
    "opennmt": {  # OpenNMT-py
        "norm_eps": 1e-6,
        "share_embeddings": False,
        "tie_embeddings": False,
        "output_bias": True,
        "pad_token_id": 1,
        "bos_token_id": 2,
        "eos_token_id": (3,),
        "decoder_start_token_id": 2,
    },
}
FAIRSEQ_TOKENS = "embed_tokens"
OPENNMT_TOKENS = "embeddings.make_embedding.emb_luts.0"
SHARED = "decoder.embedding.tokens.weight"  # a Seq2Seq's second name for its one embedding


def variant(name: str, **fields: Any) -> ModelConfig:
    """The original Transformer as the paper, fairseq or OpenNMT-py builds it.

    name: a key of VARIANTS. All scale their embeddings, add sinusoids and use ReLU; they differ in
    where norms stand, which sinusoids are added from which position on, what is tied, and special
    ids. fields: of ModelConfig; sizes, and what else shall differ. Raises ConfigError.
    """
    if name not in VARIANTS:
        raise ConfigError(f"the variant is {name!r}; it must be one of {', '.join(VARIANTS)}")
    common = {"model_type": MODEL_TYPES[0], "positions": "sinusoidal", "scale_embedding": True}
    values: dict[str, Any] = {**common, **VARIANTS[name], **fields}
    if values.get("position_count") == "tokens" and isinstance(values["pad_token_id"], int):
        values.setdefault("position_offset", values["pad_token_id"] + 1)
    return ModelConfig(**values)


def config_from(raw: Mapping[str, Any], names: set[str] | None = None) -> ModelConfig:
    """Our configuration of a config.json we wrote; keys that are not ours are left alone."""
    return ModelConfig(**own_fields(raw, ModelConfig, ("eos_token_id", "windows")))


def own_fields(
    raw: Mapping[str, Any], kind: type[AnyConfig], lists: tuple[str, ...]
) -> dict[str, Any]:
    """The arguments of a configuration class that config.json holds; `lists` become tuples."""
    ours = {field.name: field for field in dataclasses.fields(kind)}
    values = {name: value for name, value in raw.items() if name in ours}
    required = [name for name, f in ours.items() if f.default is dataclasses.MISSING]
    absent = [name for name in required if name not in values]
    if absent:
        raise ConfigError(f"config.json lacks {', '.join(absent)}, which {raw['model_type']} needs")
    for name in lists:
        value = values.setdefault(name, ())
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{name} is {value!r}; it must be a list")
        values[name] = tuple(value)
    return values


def config_to(config: ModelConfig) -> dict[str, Any]:
    """ModelConfig's fields as they are."""
    return config.to_dict()


def rules(config: ModelConfig, names: set[str] | None) -> list[WeightRule]:
    """Every tensor under its own name, but for those that repeat another."""
    if others := _names_elsewhere(names):
        return _embedding_rules(config, others) + _layer_rules(config, others)
    if names is None:
        with torch.device("meta"):
            names = set(build(config).state_dict())
    repeated = {SHARED} if config.share_embeddings else set()
    if config.tie_embeddings:
        repeated |= {name for name in names if name.endswith(("lm_head.weight", "output.weight"))}
    return [WeightRule(name, name) for name in sorted(names - repeated)]


def ignored(config: ModelConfig, names: set[str]) -> set[str]:
    """What fairseq's and OpenNMT's files hold beside weights; a file of ours holds just those."""
    marks = (".version", ".embed_positions._float_tensor", ".make_embedding.pe.pe")
    return {name for name in names if _names_elsewhere(names) and name.endswith(marks)}


def tied(config: ModelConfig, names: set[str]) -> dict[str, str]:
    """Repeated tensors are left out when saving; fairseq's and OpenNMT's files hold them."""
    others = _names_elsewhere(names)
    if others is None:
        return {}
    found = {others.target: others.source} if config.share_embeddings else {}
    if config.tie_embeddings:
        tokens = others.source if config.share_embeddings else others.target
        found[others.head + ".weight"] = tokens
    return found


class _Names(NamedTuple):
    """What another program calls the embeddings of each side and the output projection."""

    source: str
    target: str
    head: str


def _names_elsewhere(names: set[str] | None) -> _Names | None:
    """fairseq's names or OpenNMT-py's, where the file has them."""
    for inner, head in ((FAIRSEQ_TOKENS, "decoder.output_projection"), (OPENNMT_TOKENS, "")):
        source, target = f"encoder.{inner}.weight", f"decoder.{inner}.weight"
        if names is not None and source in names:
            old = "generator.0.weight" in names  # the last of OpenNMT's was a Sequential
            return _Names(source, target, head or ("generator.0" if old else "generator"))
    return None


def _embedding_rules(config: ModelConfig, names: _Names) -> list[WeightRule]:
    table = [WeightRule("encoder.embedding.tokens.weight", names.source)]
    if not config.share_embeddings:
        table.append(WeightRule("decoder.embedding.tokens.weight", names.target))
    head = linear("decoder.lm_head", names.head)
    return table + head[int(config.tie_embeddings) : 1 + int(config.output_bias)]


def _layer_rules(config: ModelConfig, names: _Names) -> list[WeightRule]:
    table = []
    if config.final_norm:
        for side in ("encoder", "decoder"):
            table += linear(f"{side}.norm", f"{side}.layer_norm")
    if FAIRSEQ_TOKENS in names.source:
        return table + seq2seq_layers(config, "")
    for i in range(config.encoder_layers):
        ours, theirs = f"encoder.layers.{i}.", f"encoder.transformer.{i}."
        table += _opennmt_attention(ours + "self_attn", theirs + "self_attn", config.of_encoder)
        table += linear(ours + "norm1", theirs + "layer_norm")
        table += _opennmt_feed_forward(ours, theirs, "norm2")
    for i in range(config.decoder_layers):
        ours, theirs = f"decoder.layers.{i}.", f"decoder.transformer_layers.{i}."
        table += _opennmt_attention(ours + "self_attn", theirs + "self_attn", config)
        table += _opennmt_attention(ours + "multihead_attn", theirs + "context_attn", config)
        table += linear(ours + "norm1", theirs + "layer_norm_1")
        table += linear(ours + "norm2", theirs + "layer_norm_2")
        table += _opennmt_feed_forward(ours, theirs, "norm3")
    return table


def _opennmt_attention(ours: str, theirs: str, config: ModelConfig) -> list[WeightRule]:
    sources = [f"{theirs}.linear_{part}" for part in ("query", "keys", "values")]
    return attention(ours, sources, theirs + ".final_linear", config)


def _opennmt_feed_forward(ours: str, theirs: str, norm: str) -> list[WeightRule]:
    inner = theirs + "feed_forward."
    first, second = linear(ours + "linear1", inner + "w_1"), linear(ours + "linear2", inner + "w_2")
    return first + second + linear(ours + norm, inner + "layer_norm")
