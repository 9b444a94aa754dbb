"""LLaMA 1 to 3 (Touvron et al. 2023): RMSNorm, rotary positions, SwiGLU, grouped keys.

Weights may carry transformers' names or Meta's own, which come with a params.json. Meta rotates
neighbouring columns of a head, so the rows of its wq and wk are put in our order on loading; a
saved folder has transformers' form.
"""

from typing import Any

from torch import Tensor

from ..checkpoints import WeightRule
from ..config import ModelConfig
from ..errors import ConfigError
from .fields import (
    Raw,
    activation,
    activation_name,
    count,
    flag,
    has_head,
    number,
    rotary_fields,
    same_again,
    special_ids,
    written_ids,
    written_rotary,
)
from .tables import attention, linear, prefixed

MODEL_TYPES = ("llama",)
SMALL = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
EXAMPLES: tuple[dict[str, Any], ...] = (
    SMALL,
    SMALL | {"num_key_value_heads": 2, "head_dim": 10, "tie_word_embeddings": True},
    SMALL | {"num_key_value_heads": 1, "rope_parameters": LLAMA3, "eos_token_id": [2, 3]},
    SMALL | {"attention_bias": True, "mlp_bias": True, "hidden_act": "gelu"},
    SMALL | {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 5000.0},
    SMALL | {"architectures": ["LlamaModel"], "tie_word_embeddings": True},
    SMALL | {"architectures": ["LlamaModel"], "tie_word_embeddings": False},
)


def config_from(raw: Raw, names: set[str] | None = None) -> ModelConfig:
    """Our configuration of a LLaMA config.json; raises ConfigError for what it cannot mean."""
    if "dim" in raw and "hidden_size" not in raw:
        raw = {**raw, **_from_params(raw, names or set())}
    size, heads = count(raw, "hidden_size", 4096), count(raw, "num_attention_heads", 32)
    vocab = count(raw, "vocab_size", 32000)
    head_dim = count(raw, "head_dim", max(size // heads, 1))
    tied = flag(raw, "tie_word_embeddings", False)
    return ModelConfig(
        model_type="llama",
        vocab_size=vocab,
        hidden_size=size,
        num_heads=heads,
        num_kv_heads=count(raw, "num_key_value_heads", heads),
        head_dim=head_dim,
        ffn_size=count(raw, "intermediate_size", 11008),
        decoder_layers=count(raw, "num_hidden_layers", 32),
        max_positions=count(raw, "max_position_embeddings", 2048),
        activation=activation(raw, "hidden_act", "silu"),
        gated=True,
        norm="rms",
        norm_eps=number(raw, "rms_norm_eps", 1e-6),
        attention_bias=flag(raw, "attention_bias", False),
        ffn_bias=flag(raw, "mlp_bias", False),
        train_padding=False,
        tie_embeddings=tied,
        output_head=tied or has_head(raw, names, "LlamaModel", "lm_head.weight"),
        **rotary_fields(raw, head_dim),
        **special_ids(raw, vocab, bos_token_id=1, eos_token_id=2),
    )


def config_to(config: ModelConfig) -> dict[str, Any]:
    """The config.json of a LLaMA folder that transformers reads back; ConfigError if none can."""
    raw = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM" if config.output_head else "LlamaModel"],
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "intermediate_size": config.ffn_size,
        "num_hidden_layers": config.decoder_layers,
        "max_position_embeddings": config.max_positions,
        "hidden_act": activation_name(config.activation),
        "rms_norm_eps": config.norm_eps,
        "attention_bias": config.attention_bias,
        "mlp_bias": config.ffn_bias,
        "tie_word_embeddings": config.tie_embeddings,
        **written_rotary(config),
        **written_ids(config),
    }
    return same_again(raw, config, config_from)


def _from_params(raw: Raw, names: set[str]) -> dict[str, Any]:
    """A config.json of Meta's params.json, which leaves the special ids to the tokenizer.

    Its "use_scaled_rope" is Llama 3.1's scaling by 8 unless rope_scaling_factor says otherwise: a
    file of Llama 3.2, which scales by 32, must say so.
    """
    raw = {name: value for name, value in raw.items() if value is not None}
    if "sliding_window" in raw:
        raise ConfigError(f"sliding_window is {raw['sliding_window']!r}; LLaMA has none")
    size, vocab = count(raw, "dim", 4096), raw.get("vocab_size", -1)
    inner = int(number(raw, "ffn_dim_multiplier", 1.0) * (8 * size // 3))
    multiple = count(raw, "multiple_of", 256)
    is_third = isinstance(vocab, int) and vocab > 128_000
    found = {
        "hidden_size": size,
        "num_attention_heads": count(raw, "n_heads", 32),
        "num_key_value_heads": raw.get("n_kv_heads"),
        "num_hidden_layers": count(raw, "n_layers", 32),
        "intermediate_size": -(-inner // multiple) * multiple,
        "vocab_size": 32_000 if vocab == -1 else vocab,  # -1: as many as the tokenizer has
        "rms_norm_eps": number(raw, "norm_eps", 1e-5),
        "max_position_embeddings": raw.get("max_seq_len"),
        "tie_word_embeddings": "tok_embeddings.weight" in names and "output.weight" not in names,
        "bos_token_id": 128_000 if is_third else 1,
        "eos_token_id": [128_001, 128_008, 128_009] if is_third else 2,
    }
    if flag(raw, "use_scaled_rope", False):
        factor = {"factor": number(raw, "rope_scaling_factor", 8.0)}
        found["rope_scaling"] = {"rope_type": "llama3", "high_freq_factor": 4.0} | factor
    return found


def rules(config: ModelConfig, names: set[str] | None) -> list[WeightRule]:
    """Which tensor of the file fills which of ours."""
    if names is not None and "tok_embeddings.weight" in names:
        return _metas_rules(config)
    prefix = prefixed("model.", names)
    table = [
        WeightRule("embedding.tokens.weight", prefix + "embed_tokens.weight"),
        *linear("norm", prefix + "norm", bias=False),
    ]
    for i in range(config.decoder_layers):
        ours, theirs = f"layers.{i}.", f"{prefix}layers.{i}."
        q, k, v, out = (f"{theirs}self_attn.{x}_proj" for x in "qkvo")
        table += [
            *attention(ours + "self_attn", (q, k, v), out, config, bias=config.attention_bias),
            *linear(ours + "norm1", theirs + "input_layernorm", bias=False),
            *linear(ours + "norm2", theirs + "post_attention_layernorm", bias=False),
            *linear(ours + "linear1", theirs + "mlp.gate_proj", bias=config.ffn_bias),
            *linear(ours + "gate", theirs + "mlp.up_proj", bias=config.ffn_bias),
            *linear(ours + "linear2", theirs + "mlp.down_proj", bias=config.ffn_bias),
        ]
    if config.own_output:
        table.append(WeightRule("lm_head.weight", "lm_head.weight"))
    return table


def _metas_rules(config: ModelConfig) -> list[WeightRule]:
    """The table for Meta's own names; nothing is saved under them."""

    def halves(w: Tensor) -> Tensor:  # rows [H][D / 2][2] to [H][2][D / 2]
        pairs = w.unflatten(0, (-1, config.head_size // 2, 2))
        return pairs.transpose(1, 2).flatten(0, 2)

    def packed(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        return halves(q), halves(k), v

    table = [
        WeightRule("embedding.tokens.weight", "tok_embeddings.weight"),
        WeightRule("norm.weight", "norm.weight"),
    ]
    for i in range(config.decoder_layers):
        layer = f"layers.{i}."  # on both sides
        q, k, v = (f"{layer}attention.w{x}.weight" for x in "qkv")
        table += [
            WeightRule(layer + "self_attn.in_proj_weight", (q, k, v), packed),
            *linear(layer + "self_attn.out_proj", layer + "attention.wo", bias=False),
            *linear(layer + "norm1", layer + "attention_norm", bias=False),
            *linear(layer + "norm2", layer + "ffn_norm", bias=False),
            *linear(layer + "linear1", layer + "feed_forward.w1", bias=False),
            *linear(layer + "gate", layer + "feed_forward.w3", bias=False),
            *linear(layer + "linear2", layer + "feed_forward.w2", bias=False),
        ]
    if config.own_output:
        table.append(WeightRule("lm_head.weight", "output.weight"))
    return table


def ignored(config: ModelConfig, names: set[str]) -> set[str]:
    """Rotary frequencies that old files carry."""
    return {name for name in names if name.endswith(("rotary_emb.inv_freq", "rope.freqs"))}


def tied(config: ModelConfig, names: set[str]) -> dict[str, str]:
    """Names that may repeat another tensor of the file."""
    if not config.tie_embeddings:
        return {}
    tokens = prefixed("model.", names) + "embed_tokens.weight"
    return {"lm_head.weight": tokens, "output.weight": "tok_embeddings.weight"}
