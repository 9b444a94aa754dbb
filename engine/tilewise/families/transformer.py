"""The original Transformer (Vaswani et al. 2017): no Hugging Face class, so the format is ours.

config.json holds ModelConfig's own fields; tensors keep the names of our state_dict.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from ..checkpoints import WeightRule
from ..config import AnyConfig, ModelConfig
from ..errors import ConfigError
from ..models import build

MODEL_TYPES = ("tilewise-transformer",)
EXAMPLES: tuple[dict[str, Any], ...] = ()  # transformers has no such class
SHARED = "decoder.embedding.tokens.weight"  # a Seq2Seq's second name for its one embedding


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
    if names is None:
        with torch.device("meta"):
            names = set(build(config).state_dict())
    repeated = {SHARED} if config.share_embeddings else set()
    if config.tie_embeddings:
        repeated |= {name for name in names if name.endswith(("lm_head.weight", "output.weight"))}
    return [WeightRule(name, name) for name in sorted(names - repeated)]


def ignored(config: ModelConfig, names: set[str]) -> set[str]:
    """Nothing: the file holds just our tensors."""
    return set()


def tied(config: ModelConfig, names: set[str]) -> dict[str, str]:
    """Repeated tensors are left out when saving, so none are in the file."""
    return {}
