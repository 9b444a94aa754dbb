"""BERT (Devlin et al. 2019): a post-norm encoder over tokens, positions and segments.

Which heads a folder has follows from its tensors: the pooler, the masked-token head, the
next-sentence head. Old files call a norm's weight and bias gamma and beta, and base models' files
have no "bert." before their names.
"""

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
    same_again,
    special_ids,
    written_ids,
)
from .tables import attention, linear, prefixed

MODEL_TYPES = ("bert",)
SMALL = {
    "model_type": "bert",
    "architectures": ["BertForPreTraining"],
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 24,
    "pad_token_id": 0,
}
EXAMPLES: tuple[dict[str, Any], ...] = (
    SMALL,
    SMALL | {"architectures": ["BertModel"], "hidden_size": 15, "num_attention_heads": 3},
    SMALL | {"architectures": ["BertForMaskedLM"], "hidden_act": "gelu_new", "type_vocab_size": 1},
    SMALL | {"architectures": ["BertForMaskedLM"], "tie_word_embeddings": False, "pad_token_id": 3},
    SMALL | {"architectures": ["BertForNextSentencePrediction"], "hidden_act": "relu"},
    SMALL | {"num_attention_heads": 1, "layer_norm_eps": 1e-3, "type_vocab_size": 3},
)
MASKED, NEXT = "cls.predictions", "cls.seq_relationship"
CLASSES = {  # (masked-token head, next-sentence head)
    (False, False): "BertModel",
    (True, False): "BertForMaskedLM",
    (False, True): "BertForNextSentencePrediction",
    (True, True): "BertForPreTraining",
}


def config_from(raw: Raw, names: set[str] | None = None) -> ModelConfig:
    """Our configuration of a BERT config.json; raises ConfigError for what it cannot mean."""
    names = names or set()
    vocab = count(raw, "vocab_size", 30522)
    act = activation(raw, "hidden_act", "gelu")
    masked = f"{MASKED}.transform.dense.weight" in names
    following = f"{NEXT}.weight" in names
    return ModelConfig(
        model_type="bert",
        max_positions=count(raw, "max_position_embeddings", 512),
        masked_head=act if masked else None,
        output_bias=masked,
        next_sentence=following,
        pooler=following or has_pooler(names),
        **encoder_fields(raw, vocab),
        **special_ids(raw, vocab, pad_token_id=0),
    )


def encoder_fields(raw: Raw, vocab_size: int) -> dict[str, Any]:
    """What BERT and its relatives have in common."""
    for name in ("is_decoder", "add_cross_attention"):
        if flag(raw, name, False):
            raise ConfigError(f"{name} is set; a {raw['model_type']} here is an encoder")
    kind = raw.get("position_embedding_type", "absolute")
    if kind != "absolute":
        raise ConfigError(f"position_embedding_type is {kind!r}; it must be 'absolute'")
    return {
        "vocab_size": vocab_size,
        "hidden_size": count(raw, "hidden_size", 768),
        "num_heads": count(raw, "num_attention_heads", 12),
        "ffn_size": count(raw, "intermediate_size", 3072),
        "encoder_layers": count(raw, "num_hidden_layers", 12),
        "activation": activation(raw, "hidden_act", "gelu"),
        "norm_position": "post",
        "norm_eps": number(raw, "layer_norm_eps", 1e-12),
        "final_norm": False,
        "token_types": count(raw, "type_vocab_size", 2),
        "embedding_norm": True,
        "train_padding": False,
        "tie_embeddings": flag(raw, "tie_word_embeddings", True),
        "dropout": number(raw, "hidden_dropout_prob", 0.1),
    }


def has_pooler(names: set[str]) -> bool:
    """Whether a folder of these tensors maps its first token; masked models rarely do."""
    return any(name.endswith("pooler.dense.weight") for name in names)


def config_to(config: ModelConfig) -> dict[str, Any]:
    """The config.json of a BERT folder that transformers reads back; ConfigError if none can."""
    raw = {
        "model_type": "bert",
        "architectures": [CLASSES[config.masked_head is not None, config.next_sentence]],
        "max_position_embeddings": config.max_positions,
        **written_encoder(config),
    }
    names = {name for rule in rules(config, None) for name in rule.sources}
    return same_again(raw, config, lambda raw: config_from(raw, names))


def written_encoder(config: ModelConfig) -> dict[str, Any]:
    """encoder_fields and the special ids as config.json holds them."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.ffn_size,
        "num_hidden_layers": config.encoder_layers,
        "hidden_act": activation_name(config.activation),
        "layer_norm_eps": config.norm_eps,
        "type_vocab_size": config.token_types,
        "tie_word_embeddings": config.tie_embeddings,
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": config.dropout,
        **written_ids(config),
    }


def rules(config: ModelConfig, names: set[str] | None) -> list[WeightRule]:
    """Which tensor of the file fills which of ours."""
    table = encoder_rules(config, encoder_prefix("bert.", config, names), names)
    if config.masked_head is not None:
        table += [
            *linear("masked_head.linear", f"{MASKED}.transform.dense"),
            *norm("masked_head.norm", f"{MASKED}.transform.LayerNorm", names),
            *output_rules(config, MASKED, names),
        ]
    if config.next_sentence:
        table += linear("next_sentence", NEXT)
    return table


def encoder_prefix(prefix: str, config: ModelConfig, names: set[str] | None) -> str:
    """`prefix` where the names have it; when saving, where there is a head beside the encoder."""
    if names is None:
        return prefix if config.masked_head is not None or config.next_sentence else ""
    return prefixed(prefix, names)


def encoder_rules(config: ModelConfig, prefix: str, names: set[str] | None) -> list[WeightRule]:
    """Embeddings, layers and the pooler."""
    table = [
        WeightRule(f"embedding.{ours}.weight", f"{prefix}embeddings.{theirs}_embeddings.weight")
        for ours, theirs in (
            ("tokens", "word"),
            ("positions", "position"),
            ("token_types", "token_type"),
        )
    ]
    table += norm("embedding.norm", prefix + "embeddings.LayerNorm", names)
    for i in range(config.encoder_layers):
        ours, theirs = f"layers.{i}.", f"{prefix}encoder.layer.{i}."
        parts = [f"{theirs}attention.self.{part}" for part in ("query", "key", "value")]
        table += [
            *attention(ours + "self_attn", parts, theirs + "attention.output.dense", config),
            *norm(ours + "norm1", theirs + "attention.output.LayerNorm", names),
            *linear(ours + "linear1", theirs + "intermediate.dense"),
            *linear(ours + "linear2", theirs + "output.dense"),
            *norm(ours + "norm2", theirs + "output.LayerNorm", names),
        ]
    return table + (linear("pooler", prefix + "pooler.dense") if config.pooler else [])


def norm(target: str, source: str, names: set[str] | None) -> list[WeightRule]:
    """A LayerNorm, whose weight and bias old files call gamma and beta."""
    if names is None or f"{source}.gamma" not in names:
        return linear(target, source)
    return [
        WeightRule(f"{target}.weight", f"{source}.gamma"),
        WeightRule(f"{target}.bias", f"{source}.beta"),
    ]


def output_rules(config: ModelConfig, head: str, names: set[str] | None) -> list[WeightRule]:
    """The map to the vocabulary, whose bias has two names: head.bias and head.decoder.bias.

    A tied model's file may have either or both; an untied one's has both, and uses the second.
    """
    target, plain, second = "masked_head.output.bias", f"{head}.bias", f"{head}.decoder.bias"
    if config.tie_embeddings:
        only_second = names is not None and plain not in names and second in names
        return [WeightRule(target, second if only_second else plain)]
    weight = WeightRule("masked_head.output.weight", f"{head}.decoder.weight")
    if names is None:
        both = WeightRule(target, (second, plain), lambda w, _: w, lambda w: (w, w.clone()))
        return [weight, both]
    return [weight, WeightRule(target, second if second in names else plain)]


def ignored(config: ModelConfig, names: set[str]) -> set[str]:
    """Position buffers of old files, and an untied head's bias that nothing reads."""
    return ignored_by(config, MASKED, names)


def ignored_by(config: ModelConfig, head: str, names: set[str]) -> set[str]:
    """`ignored` of a family whose masked-token head is called `head`."""
    unread = {f"{head}.bias"} if not config.tie_embeddings else set()
    has_both = f"{head}.decoder.bias" in names
    buffers = {name for name in names if name.endswith("embeddings.position_ids")}
    return buffers | (unread & names if has_both else set())


def tied(config: ModelConfig, names: set[str]) -> dict[str, str]:
    """Names that may repeat another tensor of the file."""
    return tied_to(config, "bert.", MASKED, names)


def tied_to(config: ModelConfig, prefix: str, head: str, names: set[str]) -> dict[str, str]:
    """`tied` of a family whose masked-token head is called `head`."""
    if not config.tie_embeddings:
        return {}
    tokens = prefixed(prefix, names) + "embeddings.word_embeddings.weight"
    found = {f"{head}.decoder.weight": tokens}
    if f"{head}.bias" in names:
        found[f"{head}.decoder.bias"] = f"{head}.bias"
    return found
