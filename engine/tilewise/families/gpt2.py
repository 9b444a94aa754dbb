"""GPT-2 (Radford et al. 2019): Hugging Face's config.json and weight names to ours, and back."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from ..checkpoints import WeightRule
from ..config import ModelConfig, usable_ids
from ..errors import ConfigError

MODEL_TYPE = "gpt2"
ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
    "quick_gelu": "quick_gelu",
}


def config_from(raw: Mapping[str, Any]) -> ModelConfig:
    """Our configuration of a GPT-2 config.json; raises ConfigError for what it cannot mean."""
    activation = raw.get("activation_function", "gelu_new")
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise ConfigError(
            f"activation_function is {activation!r}; it must be one of {', '.join(ACTIVATIONS)}"
        )
    if raw.get("add_cross_attention", False):
        raise ConfigError("add_cross_attention is set; a GPT-2 here is a decoder on its own")
    size = _count(raw, "n_embd", 768)
    vocab = _count(raw, "vocab_size", 50257)
    end = 50256 if vocab > 50256 else None  # what the class assumes where a file is silent
    return ModelConfig(
        model_type=MODEL_TYPE,
        vocab_size=vocab,
        hidden_size=size,
        num_heads=_count(raw, "n_head", 12),
        ffn_size=raw.get("n_inner") or 4 * size,
        decoder_layers=_count(raw, "n_layer", 12),
        max_positions=_count(raw, "n_positions", 1024),
        activation=ACTIVATIONS[activation],  # type: ignore[arg-type]
        norm_eps=raw.get("layer_norm_epsilon", 1e-5),
        tie_embeddings=raw.get("tie_word_embeddings", True),
        attention_scale=None if raw.get("scale_attn_weights", True) else 1.0,
        attention_scale_by_layer=raw.get("scale_attn_by_inverse_layer_idx", False),
        dropout=raw.get("resid_pdrop", 0.1),
        bos_token_id=_one_id({"bos_token_id": end, **raw}, "bos_token_id", vocab),
        eos_token_id=usable_ids("eos_token_id", raw.get("eos_token_id", end), vocab),
        pad_token_id=_one_id(raw, "pad_token_id", vocab),
    )


def _count(raw: Mapping[str, Any], name: str, default: int) -> int:
    value = raw.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name} is {value!r}; it must be a whole number from 1")
    return value


def _one_id(raw: Mapping[str, Any], name: str, vocab_size: int) -> int | None:
    return next(iter(usable_ids(name, raw.get(name), vocab_size)), None)


def _transposed(weight: Tensor) -> Tensor:
    """GPT-2 stores its linear maps as [in, out]; ours are [out, in]."""
    return weight.t()


def rules(config: ModelConfig, names: set[str]) -> list[WeightRule]:
    """Which tensor of the file fills which of ours; `names`: all tensors of the file."""
    prefix = "transformer." if any(name.startswith("transformer.") for name in names) else ""
    table: list[tuple[str, str, Callable[[Tensor], Tensor] | None]] = [
        ("embedding.tokens.weight", "wte.weight", None),
        ("embedding.positions.weight", "wpe.weight", None),
        ("norm.weight", "ln_f.weight", None),
        ("norm.bias", "ln_f.bias", None),
    ]
    for i in range(config.decoder_layers):
        ours, theirs = f"layers.{i}.", f"h.{i}."
        table += [
            (ours + "norm1.weight", theirs + "ln_1.weight", None),
            (ours + "norm1.bias", theirs + "ln_1.bias", None),
            (ours + "self_attn.in_proj_weight", theirs + "attn.c_attn.weight", _transposed),
            (ours + "self_attn.in_proj_bias", theirs + "attn.c_attn.bias", None),
            (ours + "self_attn.out_proj.weight", theirs + "attn.c_proj.weight", _transposed),
            (ours + "self_attn.out_proj.bias", theirs + "attn.c_proj.bias", None),
            (ours + "norm2.weight", theirs + "ln_2.weight", None),
            (ours + "norm2.bias", theirs + "ln_2.bias", None),
            (ours + "linear1.weight", theirs + "mlp.c_fc.weight", _transposed),
            (ours + "linear1.bias", theirs + "mlp.c_fc.bias", None),
            (ours + "linear2.weight", theirs + "mlp.c_proj.weight", _transposed),
            (ours + "linear2.bias", theirs + "mlp.c_proj.bias", None),
        ]
    found = [WeightRule(target, prefix + source, change) for target, source, change in table]
    if not config.tie_embeddings:
        found.append(WeightRule("lm_head.weight", "lm_head.weight"))
    return found


def ignored(config: ModelConfig, names: set[str]) -> set[str]:
    """Mask buffers that old files carry."""
    return {name for name in names if name.endswith((".attn.bias", ".attn.masked_bias"))}


def tied(config: ModelConfig, names: set[str]) -> dict[str, str]:
    """Names that may repeat another tensor of the file."""
    prefix = "transformer." if "transformer.wte.weight" in names else ""
    return {"lm_head.weight": prefix + "wte.weight"} if config.tie_embeddings else {}


def config_to(config: ModelConfig) -> dict[str, Any]:
    """The config.json of a GPT-2 folder that transformers reads back.

    Raises ConfigError for a configuration that no GPT-2 has, such as post-norm layers.
    """
    eos = list(config.eos_token_id)
    names = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    raw = {
        "model_type": MODEL_TYPE,
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": config.vocab_size,
        "n_embd": config.hidden_size,
        "n_head": config.num_heads,
        "n_inner": config.ffn_size,
        "n_layer": config.decoder_layers,
        "n_positions": config.max_positions,
        "activation_function": names[config.activation],
        "layer_norm_epsilon": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "scale_attn_weights": config.attention_scale is None,
        "scale_attn_by_inverse_layer_idx": config.attention_scale_by_layer,
        "resid_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.dropout,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
        "pad_token_id": config.pad_token_id,
    }
    same = replace(config, num_kv_heads=None if config.kv_heads == config.num_heads else 1)
    read_back, wanted = config_from(raw).to_dict(), same.to_dict()
    wrong = [name for name in wanted if wanted[name] != read_back[name]]
    if wrong:
        raise ConfigError(
            f"{', '.join(wrong)}: a GPT-2 folder cannot say this; save it as a model_type that can"
        )
    return raw


def tensors_to(config: ModelConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors under GPT-2's names and in its layout."""
    everything = {rule.target: rule for rule in rules(config, {"transformer.wte.weight"})}
    return {rule.sources[0]: rule.apply(state[name]) for name, rule in everything.items()}
