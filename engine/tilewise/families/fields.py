"""Reading the fields of a config.json, and checking that a written one says the same."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from ..config import Activation, ModelConfig, usable_ids
from ..errors import ConfigError

Raw = Mapping[str, Any]
ACTIVATIONS: dict[str, Activation] = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
    "quick_gelu": "quick_gelu",
}


def count(raw: Raw, name: str, default: int) -> int:
    """A whole number from 1; ConfigError otherwise, as from every reader here."""
    value = raw.get(name)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name} is {value!r}; it must be a whole number from 1")
    return value


def number(raw: Raw, name: str, default: float) -> float:
    """A finite number."""
    value = raw.get(name, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e300:
        raise ConfigError(f"{name} is {value!r}; it must be a number")
    return float(value)


def flag(raw: Raw, name: str, default: bool) -> bool:
    """true or false."""
    value = raw.get(name, default)
    if not isinstance(value, bool):
        raise ConfigError(f"{name} is {value!r}; it must be true or false")
    return value


def activation(raw: Raw, name: str, default: str) -> Activation:
    """One of ours, by transformers' name for it."""
    value = raw.get(name, default)
    if not isinstance(value, str) or value not in ACTIVATIONS:
        raise ConfigError(f"{name} is {value!r}; it must be one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[value]


def activation_name(ours: Activation) -> str:
    """transformers' name for an activation."""
    return next(theirs for theirs, known in ACTIVATIONS.items() if known == ours)


def one_id(raw: Raw, name: str, vocab_size: int, default: int | None = None) -> int | None:
    """A token id that the vocabulary has, or None."""
    return next(iter(usable_ids(name, raw.get(name, default), vocab_size)), None)


def special_ids(raw: Raw, vocab_size: int, **defaults: int | None) -> dict[str, Any]:
    """ModelConfig's bos_token_id, eos_token_id, pad_token_id, and decoder_start_token_id if named.

    defaults: what the class assumes where a file is silent, by field; others are None.
    """
    names = ["bos_token_id", "pad_token_id"]
    names += ["decoder_start_token_id"] * ("decoder_start_token_id" in defaults)
    ids: dict[str, Any] = {n: one_id(raw, n, vocab_size, defaults.get(n)) for n in names}
    eos = raw.get("eos_token_id", defaults.get("eos_token_id"))
    return ids | {"eos_token_id": usable_ids("eos_token_id", eos, vocab_size)}


def written_ids(config: ModelConfig) -> dict[str, Any]:
    """The special ids as config.json holds them."""
    eos = list(config.eos_token_id)
    start = config.decoder_start_token_id
    return {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
        "pad_token_id": config.pad_token_id,
        **({} if start is None else {"decoder_start_token_id": start}),
    }


def rotary_fields(raw: Raw, head_size: int, *, base: float = 10_000.0) -> dict[str, Any]:
    """ModelConfig's rotary fields, from rope_parameters or the older top-level names."""
    nested = raw.get("rope_parameters") or {}
    scaling = raw.get("rope_scaling") or {}
    for name, value in (("rope_parameters", nested), ("rope_scaling", scaling)):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{name} is {value!r}; it must be an object")
    found = dict(scaling or nested)  # transformers, too, takes the older one where both are there
    kind = found.get("rope_type", found.get("type", "default"))
    names = {"default": "none", "linear": "linear", "llama3": "llama3"}
    if not isinstance(kind, str) or kind not in names:
        raise ConfigError(f"rope_type is {kind!r}; it must be one of {', '.join(names)}")
    theta = raw.get("rope_theta", raw.get("rotary_emb_base", base))
    share = raw.get("partial_rotary_factor", raw.get("rotary_pct", 1.0))
    found = {"rope_theta": theta, "partial_rotary_factor": share} | found
    part = number(found, "partial_rotary_factor", 1.0)
    if not 0 < part <= 1:
        raise ConfigError(f"partial_rotary_factor is {part}; it must be above 0 and at most 1")
    if kind != "default" and "factor" not in found:
        raise ConfigError(f"rope_type is {kind!r}; it needs a factor beside it")
    original = count(found, "original_max_position_embeddings", 8192)
    return {
        "positions": "rotary",
        "rotary_dim": None if part == 1 else int(head_size * part),
        "rotary_base": number(found, "rope_theta", base),
        "rotary_scaling": names[kind],
        "rotary_factor": number(found, "factor", 1.0),
        "rotary_low_factor": number(found, "low_freq_factor", 1.0),
        "rotary_high_factor": number(found, "high_freq_factor", 4.0),
        "rotary_original_positions": original,
    }


def written_rotary(config: ModelConfig) -> dict[str, Any]:
    """rope_parameters as config.json holds them."""
    kinds = {"none": "default", "linear": "linear", "llama3": "llama3"}
    found: dict[str, Any] = {
        "rope_type": kinds[config.rotary_scaling],
        "rope_theta": config.rotary_base,
    }
    if config.rotary_dim is not None:
        found["partial_rotary_factor"] = config.rotary_dim / config.head_size
    if config.rotary_scaling != "none":
        found["factor"] = config.rotary_factor
    if config.rotary_scaling == "llama3":
        found["low_freq_factor"] = config.rotary_low_factor
        found["high_freq_factor"] = config.rotary_high_factor
        found["original_max_position_embeddings"] = config.rotary_original_positions
    return {"rope_parameters": found}


def same_again(
    raw: dict[str, Any], config: ModelConfig, read: Callable[[Raw], ModelConfig]
) -> dict[str, Any]:
    """raw, if reading it gives config; ConfigError naming what a folder of it cannot say."""
    wanted, found = _usual_as_none(config), _usual_as_none(read(raw))
    wrong = [name for name in wanted if wanted[name] != found[name]]
    if wrong:
        raise ConfigError(
            f"{', '.join(wrong)}: a {config.model_type} folder cannot say this; save it as a "
            "model_type that can"
        )
    return raw


def _usual_as_none(config: ModelConfig) -> dict[str, Any]:
    """Its fields, with None for as many key heads as heads, and for heads of the usual size.

    Whether padding is trained is a family's own way, which no folder says.
    """
    heads = None if config.kv_heads == config.num_heads else config.num_kv_heads
    size = None if config.head_dim == config.hidden_size / config.num_heads else config.head_dim
    return replace(config, num_kv_heads=heads, head_dim=size, train_padding=True).to_dict()


def seq2seq_fields(raw: Raw) -> dict[str, Any]:
    """ModelConfig's sizes from the names that BART and Marian share."""
    heads = {side: count(raw, f"{side}_attention_heads", 16) for side in ("encoder", "decoder")}
    sizes = {side: count(raw, f"{side}_ffn_dim", 4096) for side in ("encoder", "decoder")}
    same_heads = heads["encoder"] == heads["decoder"]
    same_size = sizes["encoder"] == sizes["decoder"]
    return {
        "hidden_size": count(raw, "d_model", 1024),
        "num_heads": heads["decoder"],
        "encoder_heads": None if same_heads else heads["encoder"],
        "ffn_size": sizes["decoder"],
        "encoder_ffn_size": None if same_size else sizes["encoder"],
        "encoder_layers": count(raw, "encoder_layers", 12),
        "decoder_layers": count(raw, "decoder_layers", 12),
        "max_positions": count(raw, "max_position_embeddings", 1024),
        "activation": activation(raw, "activation_function", "gelu"),
        "scale_embedding": flag(raw, "scale_embedding", False),
        "train_padding": False,
        "dropout": number(raw, "dropout", 0.1),
    }


def written_seq2seq(config: ModelConfig) -> dict[str, Any]:
    """The sizes as config.json holds them."""
    return {
        "d_model": config.hidden_size,
        "encoder_attention_heads": config.encoder_heads or config.num_heads,
        "decoder_attention_heads": config.num_heads,
        "encoder_ffn_dim": config.encoder_ffn_size or config.ffn_size,
        "decoder_ffn_dim": config.ffn_size,
        "encoder_layers": config.encoder_layers,
        "decoder_layers": config.decoder_layers,
        "max_position_embeddings": config.max_positions,
        "activation_function": activation_name(config.activation),
        "scale_embedding": config.scale_embedding,
        "dropout": config.dropout,
    }


def has_head(raw: Raw, names: set[str] | None, base: str, *heads: str) -> bool:
    """Whether an untied decoder has an output matrix: it may not in a folder of its base class."""
    classes = raw.get("architectures")
    if not isinstance(classes, list) or base not in classes:
        return True
    return names is not None and not names.isdisjoint(heads)


def has_logits_bias(raw: Raw, names: set[str] | None) -> bool:
    """Whether BART or Marian has a final_logits_bias, which the base models lack."""
    if names is not None:
        return "final_logits_bias" in names
    classes = str(raw.get("architectures"))
    return "BartModel" not in classes and "MarianModel" not in classes
