"""Checkpoint families: what each calls its configuration fields and its weights.

A family is one module of this package, found by its name being there, with

    MODEL_TYPES         the values of config.json's model_type that it opens
    EXAMPLES            small and odd config.json contents; the parity tests try every one
    config_from(raw, names) -> ModelConfig     names: the tensors of the folder
    config_to(config) -> dict                  the config.json of a saved folder
    rules(config, names) -> [WeightRule]       names: None when saving
    ignored(config, names) -> set              names without a use here
    tied(config, names) -> {name: other}       names that may repeat another tensor
"""

import importlib
import pkgutil
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..config import AnyConfig
from ..errors import ConfigError


def _families() -> dict[str, ModuleType]:
    files = [found.name for found in pkgutil.iter_modules(__path__)]
    modules = [importlib.import_module(f"{__name__}.{name}") for name in files]
    return {kind: module for module in modules for kind in getattr(module, "MODEL_TYPES", ())}


FAMILIES: dict[str, ModuleType] = _families()


def family_of(raw: Mapping[str, Any]) -> ModuleType:
    """The family that a config.json names in model_type; raises ConfigError for an unknown one."""
    name = raw.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise ConfigError(
            f"model_type is {name!r} in config.json; tilewise opens {', '.join(sorted(FAMILIES))}"
        )
    return FAMILIES[name]


def tensors_to(config: AnyConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A model's tensors (as from state_dict()) under its family's names and in its layout.

    Where several rules have one source, it is their parts one behind the other, in rule order.
    """
    found: dict[str, Tensor] = {}
    for rule in FAMILIES[config.model_type].rules(config, None):
        for name, part in zip(rule.sources, rule.split(state[rule.target]), strict=True):
            found[name] = torch.cat([found[name], part]) if name in found else part
    return found
