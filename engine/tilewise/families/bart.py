"""BART (Lewis et al. 2020), post-norm, and mBART (Liu et al. 2020), pre-norm with a last norm.

Learned positions from row 2 of their table on, a norm over embeddings, a bias on the logits.
"""

from typing import Any

from ..checkpoints import WeightRule
from ..config import ModelConfig
from .fields import (
    Raw,
    count,
    flag,
    has_head,
    has_logits_bias,
    same_again,
    seq2seq_fields,
    special_ids,
    written_ids,
    written_seq2seq,
)
from .tables import (
    first_of,
    linear,
    logits_bias,
    prefixed,
    seq2seq_layers,
    seq2seq_prefix,
    token_copies,
    token_embeddings,
)

MODEL_TYPES = ("bart", "mbart")
SMALL = {
    "model_type": "bart",
    "architectures": ["BartForConditionalGeneration"],
    "vocab_size": 61,
    "d_model": 12,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 3,
    "decoder_attention_heads": 3,
    "encoder_ffn_dim": 20,
    "decoder_ffn_dim": 20,
    "max_position_embeddings": 24,
}
UNEVEN = {
    "encoder_layers": 1,
    "decoder_layers": 3,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 6,
    "encoder_ffn_dim": 33,
}
MBART = {"model_type": "mbart", "architectures": ["MBartForConditionalGeneration"]}
EXAMPLES: tuple[dict[str, Any], ...] = (
    SMALL,
    SMALL | UNEVEN | {"scale_embedding": True, "activation_function": "relu"},
    SMALL | {"tie_word_embeddings": False, "normalize_before": False},
    SMALL | {"architectures": ["BartModel"], "decoder_attention_heads": 1},
    SMALL | {"architectures": ["BartModel"], "tie_word_embeddings": False},
    SMALL | MBART | {"scale_embedding": True, "decoder_start_token_id": 59},
    SMALL | UNEVEN | MBART | {"tie_word_embeddings": False, "decoder_start_token_id": 2},
    SMALL | MBART | {"architectures": ["MBartModel"], "activation_function": "gelu_new"},
)


def config_from(raw: Raw, names: set[str] | None = None) -> ModelConfig:
    """Our configuration of a BART config.json; raises ConfigError for what it cannot mean."""
    vocab, pre_norm = count(raw, "vocab_size", 50265), raw["model_type"] == "mbart"
    tied = flag(raw, "tie_word_embeddings", True)
    start = None if pre_norm else 2
    base, head = _base(raw["model_type"]), "lm_head.weight"
    has_logits = tied or has_head(raw, names, base, head)
    return ModelConfig(
        model_type=raw["model_type"],
        vocab_size=vocab,
        **seq2seq_fields(raw),
        norm_position="pre" if pre_norm else "post",
        final_norm=pre_norm,
        positions="learned",
        position_offset=2,
        embedding_norm=True,
        share_embeddings=tied or _one_matrix(raw, names),
        tie_embeddings=tied or (has_logits and names is not None and head not in names),
        output_head=has_logits,
        output_bias=has_logits_bias(raw, names),
        wrap_labels=pre_norm,
        **special_ids(
            raw, vocab, bos_token_id=0, pad_token_id=1, eos_token_id=2, decoder_start_token_id=start
        ),
    )


def _one_matrix(raw: Raw, names: set[str] | None) -> bool:
    """Whether an untied model's stacks share their embeddings, as before transformers 5."""
    if names is None:
        return flag(raw, "share_encoder_decoder_embeddings", False)
    prefix = prefixed("model.", names)
    own = {f"{prefix}{side}.embed_tokens.weight" for side in ("encoder", "decoder")}
    return not own <= names


def _base(kind: str) -> str:
    return "MBartModel" if kind == "mbart" else "BartModel"


def config_to(config: ModelConfig) -> dict[str, Any]:
    """The config.json of a BART folder that transformers reads back; ConfigError if none can."""
    base = _base(config.model_type)
    full = base.removesuffix("Model") + "ForConditionalGeneration"
    raw = {
        "model_type": config.model_type,
        "architectures": [full if config.output_bias else base],
        "is_encoder_decoder": True,
        "vocab_size": config.vocab_size,
        **written_seq2seq(config),
        "tie_word_embeddings": config.tie_embeddings,
        "share_encoder_decoder_embeddings": config.share_embeddings,
        **written_ids(config),
    }
    return same_again(raw, config, config_from)


def rules(config: ModelConfig, names: set[str] | None) -> list[WeightRule]:
    """Which tensor of the file fills which of ours."""
    prefix = seq2seq_prefix(config, names)
    table = [*token_embeddings(config, prefix, names, unused=True), *seq2seq_layers(config, prefix)]
    for side in ("encoder", "decoder"):
        ours, theirs = f"{side}.embedding.", f"{prefix}{side}."
        table.append(WeightRule(ours + "positions.weight", theirs + "embed_positions.weight"))
        table += linear(ours + "norm", theirs + "layernorm_embedding")
        if config.final_norm:
            table += linear(f"{side}.norm", theirs + "layer_norm")
    if config.output_bias:
        table.append(logits_bias("decoder.lm_head.bias"))
    if config.own_output:
        table.append(WeightRule("decoder.lm_head.weight", "lm_head.weight"))
    return table


def ignored(config: ModelConfig, names: set[str]) -> set[str]:
    """Version marks of fairseq, and the embeddings that an untied model does not use."""
    prefix = prefixed("model.", names)
    unused = {f"{prefix}{side}.version" for side in ("encoder", "decoder")}
    return unused if config.share_embeddings else unused | {token_copies(prefix)[0]}


def tied(config: ModelConfig, names: set[str]) -> dict[str, str]:
    """Names that may repeat another tensor of the file."""
    if not config.share_embeddings:
        return {}
    known = token_copies(prefixed("model.", names))
    tokens = first_of(known, names)
    copies = {name: tokens for name in known if name != tokens}
    return copies | ({"lm_head.weight": tokens} if config.tie_embeddings else {})
