"""RoBERTa (Liu et al. 2019), XLM-RoBERTa and CamemBERT: BERT's network, counted positions.

A token's position is the number of tokens that are not padding up to it, plus pad_token_id, at
which padding itself stays. The head's activation is GELU whatever the layers have.
"""

from typing import Any

from ..checkpoints import WeightRule
from ..config import ModelConfig
from ..errors import ConfigError
from .bert import (
    encoder_fields,
    encoder_prefix,
    encoder_rules,
    has_pooler,
    ignored_by,
    norm,
    output_rules,
    tied_to,
    written_encoder,
)
from .fields import Raw, count, same_again, special_ids
from .tables import linear

CLASSES = {"roberta": "Roberta", "xlm-roberta": "XLMRoberta", "camembert": "Camembert"}
VOCABULARIES = {"roberta": 50265, "xlm-roberta": 30522, "camembert": 30522}  # of a silent file
MODEL_TYPES = tuple(CLASSES)
SMALL = {
    "model_type": "roberta",
    "architectures": ["RobertaForMaskedLM"],
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 24,
    "type_vocab_size": 1,
    "layer_norm_eps": 1e-5,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
XLM = {"model_type": "xlm-roberta", "architectures": ["XLMRobertaModel"]}
CAMEMBERT = {"model_type": "camembert", "architectures": ["CamembertForMaskedLM"]}
EXAMPLES: tuple[dict[str, Any], ...] = (
    SMALL,
    SMALL | {"architectures": ["RobertaModel"], "hidden_size": 15, "num_attention_heads": 3},
    SMALL | {"tie_word_embeddings": False, "pad_token_id": 3, "type_vocab_size": 2},
    SMALL | {"hidden_act": "gelu_new", "pad_token_id": 0, "bos_token_id": 1},
    SMALL | XLM | {"num_attention_heads": 1, "num_hidden_layers": 1},
    SMALL | CAMEMBERT | {"bos_token_id": 2, "eos_token_id": 3},
)
MASKED = "lm_head"


def config_from(raw: Raw, names: set[str] | None = None) -> ModelConfig:
    """Our configuration of a RoBERTa config.json; raises ConfigError for what it cannot mean."""
    names, kind = names or set(), raw["model_type"]
    vocab = count(raw, "vocab_size", VOCABULARIES[kind])
    ids = special_ids(raw, vocab, pad_token_id=1, bos_token_id=0, eos_token_id=2)
    if ids["pad_token_id"] is None:
        raise ConfigError("pad_token_id is none of the vocabulary; positions are counted from it")
    offset = ids["pad_token_id"] + 1
    rows = count(raw, "max_position_embeddings", 512)
    if rows <= offset:
        raise ConfigError(
            f"max_position_embeddings is {rows}; it must be above pad_token_id + 1, {offset}"
        )
    masked = f"{MASKED}.dense.weight" in names
    return ModelConfig(
        model_type=kind,
        max_positions=rows - offset,
        position_offset=offset,
        position_count="tokens",
        masked_head="gelu" if masked else None,
        output_bias=masked,
        pooler=has_pooler(names),
        **encoder_fields(raw, vocab),
        **ids,
    )


def config_to(config: ModelConfig) -> dict[str, Any]:
    """The config.json of a RoBERTa folder that transformers reads back; ConfigError if none can."""
    head = "Model" if config.masked_head is None else "ForMaskedLM"
    raw = {
        "model_type": config.model_type,
        "architectures": [CLASSES[config.model_type] + head],
        "max_position_embeddings": config.max_positions + config.position_offset,
        **written_encoder(config),
    }
    names = {name for rule in rules(config, None) for name in rule.sources}
    return same_again(raw, config, lambda raw: config_from(raw, names))


def rules(config: ModelConfig, names: set[str] | None) -> list[WeightRule]:
    """Which tensor of the file fills which of ours."""
    table = encoder_rules(config, encoder_prefix("roberta.", config, names), names)
    if config.masked_head is not None:
        table += [
            *linear("masked_head.linear", f"{MASKED}.dense"),
            *norm("masked_head.norm", f"{MASKED}.layer_norm", names),
            *output_rules(config, MASKED, names),
        ]
    return table


def ignored(config: ModelConfig, names: set[str]) -> set[str]:
    """Position buffers of old files, and an untied head's bias that nothing reads."""
    return ignored_by(config, MASKED, names)


def tied(config: ModelConfig, names: set[str]) -> dict[str, str]:
    """Names that may repeat another tensor of the file."""
    return tied_to(config, "roberta.", MASKED, names)
