"""Checkpoint families: what each calls its configuration fields and its weights.

A family is one module with MODEL_TYPE, config_from, rules, ignored, tied, config_to, tensors_to.
"""

from types import ModuleType
from typing import Any

from ..errors import ConfigError
from . import gpt2, transformer

FAMILIES: dict[str, ModuleType] = {family.MODEL_TYPE: family for family in (gpt2, transformer)}


def family_of(raw: dict[str, Any]) -> ModuleType:
    """The family that a config.json names in model_type; raises ConfigError for an unknown one."""
    name = raw.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise ConfigError(
            f"model_type is {name!r} in config.json; tilewise opens {', '.join(sorted(FAMILIES))}"
        )
    return FAMILIES[name]
