"""Marian and OPUS-MT (Junczys-Dowmunt et al. 2018): post-norm, sinusoids in halves.

One vocabulary or one for each side; decoding starts from the padding token.
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
    logits_bias,
    prefixed,
    seq2seq_layers,
    seq2seq_prefix,
    token_copies,
    token_embeddings,
)

MODEL_TYPES = ("marian",)
SMALL = {
    "model_type": "marian",
    "architectures": ["MarianMTModel"],
    "vocab_size": 61,
    "d_model": 12,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 3,
    "decoder_attention_heads": 3,
    "encoder_ffn_dim": 20,
    "decoder_ffn_dim": 20,
    "max_position_embeddings": 24,
    "activation_function": "swish",
    "scale_embedding": True,
    "pad_token_id": 60,
    "decoder_start_token_id": 60,
    "eos_token_id": 0,
    "forced_eos_token_id": 0,
    "bad_words_ids": [[60]],
    "static_position_embeddings": True,
    "normalize_before": False,
}
APART = {"share_encoder_decoder_embeddings": False, "decoder_vocab_size": 62}
EXAMPLES: tuple[dict[str, Any], ...] = (
    SMALL,
    SMALL | APART | {"encoder_layers": 3, "encoder_attention_heads": 2, "encoder_ffn_dim": 33},
    SMALL | APART | {"tie_word_embeddings": False, "activation_function": "relu"},
    SMALL | {"d_model": 10, "encoder_attention_heads": 5, "decoder_attention_heads": 1,
             "decoder_layers": 1, "scale_embedding": False},
    SMALL | {"architectures": ["MarianModel"], "activation_function": "gelu"},
    SMALL | APART | {"architectures": ["MarianModel"], "tie_word_embeddings": False},
)  # fmt: skip


def config_from(raw: Raw, names: set[str] | None = None) -> ModelConfig:
    """Our configuration of a Marian config.json; raises ConfigError for what it cannot mean."""
    vocab = count(raw, "vocab_size", 58101)
    shared = flag(raw, "share_encoder_decoder_embeddings", True)
    target = vocab if shared else count(raw, "decoder_vocab_size", vocab)
    tied = flag(raw, "tie_word_embeddings", True)
    if names is not None and not tied:  # transformers 5 then reads a matrix of each stack
        shared = shared and not set(token_copies(prefixed("model.", names))[1:]) <= names
    head = "lm_head.weight"
    has_logits = tied or has_head(raw, names, "MarianModel", head)
    pad = 58100 if target > 58100 else None  # what the class assumes where a file is silent
    return ModelConfig(
        model_type="marian",
        vocab_size=vocab,
        target_vocab_size=None if shared else target,
        **seq2seq_fields(raw),
        norm_position="post",
        final_norm=False,
        positions="sinusoidal",
        sinusoid="halves",
        share_embeddings=shared,
        tie_embeddings=tied or (has_logits and names is not None and head not in names),
        output_head=has_logits,
        output_bias=has_logits_bias(raw, names),
        **special_ids(raw, target, pad_token_id=pad, eos_token_id=0, decoder_start_token_id=pad),
    )


def config_to(config: ModelConfig) -> dict[str, Any]:
    """The config.json of a Marian folder that transformers reads back; ConfigError if none can."""
    raw = {
        "model_type": "marian",
        "architectures": ["MarianMTModel" if config.output_bias else "MarianModel"],
        "is_encoder_decoder": True,
        "vocab_size": config.vocab_size,
        "decoder_vocab_size": config.output_vocab_size,
        **written_seq2seq(config),
        "tie_word_embeddings": config.tie_embeddings,
        "share_encoder_decoder_embeddings": config.share_embeddings,
        **written_ids(config),
    }
    return same_again(raw, config, config_from)


def rules(config: ModelConfig, names: set[str] | None) -> list[WeightRule]:
    """Which tensor of the file fills which of ours."""
    prefix = seq2seq_prefix(config, names)
    table = [*token_embeddings(config, prefix, names), *seq2seq_layers(config, prefix)]
    if config.output_bias:
        table.append(logits_bias("decoder.lm_head.bias"))
    if config.own_output:
        table.append(WeightRule("decoder.lm_head.weight", "lm_head.weight"))
    return table


def ignored(config: ModelConfig, names: set[str]) -> set[str]:
    """Sinusoids, which are computed here, and what stacks with their own embeddings do not use."""
    found = {name for name in names if name.endswith("embed_positions.weight")}
    unused = token_copies(seq2seq_prefix(config, names))[0]
    return found if config.share_embeddings else found | {unused}


def tied(config: ModelConfig, names: set[str]) -> dict[str, str]:
    """Names that may repeat another tensor of the file."""
    known = token_copies(seq2seq_prefix(config, names))
    tokens = first_of(known, names) if config.share_embeddings else known[2]
    copies = {name: tokens for name in known if name != tokens and config.share_embeddings}
    return copies | ({"lm_head.weight": tokens} if config.tie_embeddings else {})
