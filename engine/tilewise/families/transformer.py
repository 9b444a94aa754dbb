"""The original Transformer (Vaswani et al. 2017): no Hugging Face class, so the format is ours.

config.json holds ModelConfig's own fields; tensors keep the names of our state_dict, or fairseq's.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from ..checkpoints import WeightRule
from ..config import AnyConfig, ModelConfig
from ..errors import ConfigError
from ..models import build
from .tables import linear, seq2seq_layers

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
    """Every tensor under its own name, but for those that repeat another; or from fairseq's."""
    if _is_fairseq(names):
        return _fairseq_rules(config)
    if names is None:
        with torch.device("meta"):
            names = set(build(config).state_dict())
    repeated = {SHARED} if config.share_embeddings else set()
    if config.tie_embeddings:
        repeated |= {name for name in names if name.endswith(("lm_head.weight", "output.weight"))}
    return [WeightRule(name, name) for name in sorted(names - repeated)]


def ignored(config: ModelConfig, names: set[str]) -> set[str]:
    """Marks without values that fairseq's files hold; a file of ours holds just our tensors."""
    marks = (".version", ".embed_positions._float_tensor")
    return {name for name in names if _is_fairseq(names) and name.endswith(marks)}


def tied(config: ModelConfig, names: set[str]) -> dict[str, str]:
    """Repeated tensors are left out when saving; fairseq's files hold them."""
    if not _is_fairseq(names):
        return {}
    source, target = (f"{side}.embed_tokens.weight" for side in ("encoder", "decoder"))
    found = {target: source} if config.share_embeddings else {}
    if config.tie_embeddings:
        found["decoder.output_projection.weight"] = source if config.share_embeddings else target
    return found


def _is_fairseq(names: set[str] | None) -> bool:
    return names is not None and "encoder.embed_tokens.weight" in names


def _fairseq_rules(config: ModelConfig) -> list[WeightRule]:
    table = seq2seq_layers(config, "")
    for side in ("encoder",) if config.share_embeddings else ("encoder", "decoder"):
        tokens = f"{side}.embedding.tokens.weight"
        table.append(WeightRule(tokens, f"{side}.embed_tokens.weight"))
    if config.final_norm:
        table += linear("encoder.norm", "encoder.layer_norm")
        table += linear("decoder.norm", "decoder.layer_norm")
    if not config.tie_embeddings:
        head = "decoder.output_projection.weight"
        table.append(WeightRule("decoder.lm_head.weight", head))
    return table
