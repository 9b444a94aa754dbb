"""The original Transformer (Vaswani et al. 2017): no Hugging Face class, so the format is ours.

config.json holds ModelConfig's own fields; tensors keep the names of our state_dict.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..checkpoints import WeightRule
from ..config import ModelConfig
from ..errors import ConfigError

MODEL_TYPE = "tilewise-transformer"
SHARED = "decoder.embedding.tokens.weight"  # a Seq2Seq's second name for its one embedding
HEADS = ("lm_head.weight", "decoder.lm_head.weight")


def config_from(raw: Mapping[str, Any]) -> ModelConfig:
    """Our configuration of a config.json we wrote; keys that are not ours are left alone."""
    ours = {field.name: field for field in dataclasses.fields(ModelConfig)}
    values = {name: value for name, value in raw.items() if name in ours}
    required = [name for name, f in ours.items() if f.default is dataclasses.MISSING]
    absent = [name for name in required if name not in values]
    if absent:
        raise ConfigError(f"config.json lacks {', '.join(absent)}, which {MODEL_TYPE} needs")
    eos = values.get("eos_token_id", ())
    if not isinstance(eos, (list, tuple)):
        raise ConfigError(f"eos_token_id is {eos!r}; it must be a list of ids")
    return ModelConfig(**(values | {"eos_token_id": tuple(eos)}))


def rules(config: ModelConfig, names: set[str]) -> list[WeightRule]:
    """Every tensor under its own name."""
    return [WeightRule(name, name) for name in sorted(names)]


def ignored(config: ModelConfig, names: set[str]) -> set[str]:
    """Nothing: the file holds just our tensors."""
    return set()


def tied(config: ModelConfig, names: set[str]) -> dict[str, str]:
    """Repeated tensors are left out when saving, so none are in the file."""
    return {}


def config_to(config: ModelConfig) -> dict[str, Any]:
    """ModelConfig's fields as they are."""
    return config.to_dict()


def tensors_to(config: ModelConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """state_dict without the names that repeat the shared embedding."""
    repeated = {SHARED, *HEADS} if config.tie_embeddings else {SHARED}
    return {name: tensor for name, tensor in state.items() if name not in repeated}
