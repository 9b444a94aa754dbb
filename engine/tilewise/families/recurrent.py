"""The recurrent encoder-decoder (Cho et al. 2014, Bahdanau et al. 2015): the format is ours.

config.json holds RecurrentConfig's own fields; tensors keep the names of our state_dict.
"""

from collections.abc import Mapping
from typing import Any

import torch

from ..checkpoints import WeightRule
from ..config import RecurrentConfig
from ..models import build
from .transformer import own_fields

MODEL_TYPES = ("tilewise-recurrent",)
EXAMPLES: tuple[dict[str, Any], ...] = ()  # transformers has no such class


def config_from(raw: Mapping[str, Any], names: set[str] | None = None) -> RecurrentConfig:
    """Our configuration of a config.json we wrote; keys that are not ours are left alone."""
    return RecurrentConfig(**own_fields(raw, RecurrentConfig, ("eos_token_id",)))


def config_to(config: RecurrentConfig) -> dict[str, Any]:
    """RecurrentConfig's fields as they are."""
    return config.to_dict()


def rules(config: RecurrentConfig, names: set[str] | None) -> list[WeightRule]:
    """Every tensor under its own name."""
    with torch.device("meta"):
        return [WeightRule(name, name) for name in build(config).state_dict()]


def ignored(config: RecurrentConfig, names: set[str]) -> set[str]:
    """Nothing: the file holds just our tensors."""
    return set()


def tied(config: RecurrentConfig, names: set[str]) -> dict[str, str]:
    """No tensor repeats another."""
    return {}
