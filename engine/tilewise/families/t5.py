"""T5, its v1.1, Flan and UL2 (Raffel et al. 2020), mT5 (Xue et al. 2021), umT5 (Chung et al. 2023).

Pre-norm RMSNorm without biases, scores that are not scaled, one relative bias per stack; umT5 has
one per layer.
"""

from typing import Any

from ..checkpoints import WeightRule
from ..config import ModelConfig
from ..errors import ConfigError
from .fields import (
    ACTIVATIONS,
    Raw,
    activation,
    activation_name,
    count,
    flag,
    has_head,
    number,
    same_again,
    special_ids,
    written_ids,
)
from .tables import attention, first_of, linear

MODEL_TYPES = ("t5", "mt5", "umt5")
TOKENS = ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
HEAD = "lm_head.weight"
SMALL = {
    "model_type": "t5",
    "architectures": ["T5ForConditionalGeneration"],
    "vocab_size": 61,
    "d_model": 16,
    "d_kv": 6,
    "d_ff": 33,
    "num_layers": 2,
    "num_heads": 3,
    "n_positions": 512,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 10,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
}
V1_1 = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
UMT5 = SMALL | {"model_type": "umt5", "architectures": ["UMT5ForConditionalGeneration"]}
EXAMPLES: tuple[dict[str, Any], ...] = (
    SMALL,
    SMALL | V1_1,
    SMALL | V1_1 | {"feed_forward_proj": "gated-silu", "num_decoder_layers": 1, "num_heads": 1,
                    "relative_attention_max_distance": 6},
    SMALL | {"tie_word_embeddings": False, "scale_decoder_outputs": True},
    SMALL | {"scale_decoder_outputs": False, "feed_forward_proj": "gelu", "num_layers": 3,
             "num_decoder_layers": 2},
    SMALL | {"architectures": ["T5Model"], "d_kv": 4, "num_heads": 4},
    SMALL | V1_1 | {"architectures": ["T5Model"]},
    SMALL | {"architectures": ["T5EncoderModel"], "is_encoder_decoder": False},
    SMALL | V1_1 | {"model_type": "mt5", "architectures": ["MT5ForConditionalGeneration"]},
    SMALL | {"model_type": "mt5", "architectures": ["MT5EncoderModel"], "vocab_size": 63,
             "is_encoder_decoder": False, "feed_forward_proj": "gated-gelu"},
    UMT5,
    UMT5 | {"tie_word_embeddings": False, "scale_decoder_outputs": True, "num_layers": 3,
            "num_decoder_layers": 2, "feed_forward_proj": "gated-silu"},
    UMT5 | {"architectures": ["UMT5Model"], "num_heads": 1, "feed_forward_proj": "relu"},
    UMT5 | {"architectures": ["UMT5EncoderModel"], "is_encoder_decoder": False, "num_layers": 3},
)  # fmt: skip


def config_from(raw: Raw, names: set[str] | None = None) -> ModelConfig:
    """Our configuration of a T5 config.json; raises ConfigError for what it cannot mean.

    transformers 5 writes tie_word_embeddings true for every T5, whose older meaning is then in
    scale_decoder_outputs: without it a head that the folder holds is one of its own.
    """
    kind = raw["model_type"]
    multilingual = kind != "t5"
    size, vocab = count(raw, "d_model", 512), count(raw, "vocab_size", 32128)
    layers = count(raw, "num_layers", 8 if multilingual else 6)
    tied = flag(raw, "tie_word_embeddings", True)
    scaled = kind != "mt5" and flag(raw, "scale_decoder_outputs", tied)
    alone = _encoder_alone(raw, names)
    has_logits = alone or tied or has_head(raw, names, _class(kind) + "Model", HEAD)
    # A scaled model's head may be a copy, or all that the file has of the embedding.
    own_head = names is not None and HEAD in names and not names.isdisjoint(TOKENS)
    act, gated = _feed_forward(raw, "gated-gelu" if multilingual else "relu")
    return ModelConfig(
        model_type=kind,
        vocab_size=vocab,
        hidden_size=size,
        num_heads=count(raw, "num_heads", 6 if multilingual else 8),
        head_dim=count(raw, "d_kv", 64),
        ffn_size=count(raw, "d_ff", 1024 if multilingual else 2048),
        encoder_layers=layers,
        decoder_layers=0 if alone else count(raw, "num_decoder_layers", layers),
        max_positions=count(raw, "n_positions", 512),
        activation=act,
        gated=gated,
        norm="rms",
        norm_eps=number(raw, "layer_norm_epsilon", 1e-6),
        attention_bias=False,
        ffn_bias=False,
        attention_scale=1.0,
        positions="relative",
        relative_buckets=count(raw, "relative_attention_num_buckets", 32),
        relative_distance=count(raw, "relative_attention_max_distance", 128),
        relative_by_layer=kind == "umt5",
        tie_embeddings=alone
        or (tied if names is None else has_logits and (scaled or not own_head)),
        output_head=has_logits,
        output_scale=size**-0.5 if scaled and not alone else 1.0,
        dropout=number(raw, "dropout_rate", 0.1),
        **special_ids(raw, vocab, pad_token_id=0, eos_token_id=1, decoder_start_token_id=0),
    )


def _class(kind: str) -> str:
    """What the names of transformers' classes start with."""
    return {"t5": "T5", "mt5": "MT5", "umt5": "UMT5"}[kind]


def _encoder_alone(raw: Raw, names: set[str] | None) -> bool:
    """Whether there is no decoder: by the tensors, or by what `config_to` wrote."""
    if names is not None:
        return not any(name.startswith("decoder.") for name in names)
    return raw.get("is_encoder_decoder") is False


def _feed_forward(raw: Raw, default: str) -> tuple[Any, bool]:
    """feed_forward_proj, "relu" or "gated-gelu": our activation, and whether it is gated.

    The gated "gelu" is the tanh approximation, the other one is exact.
    """
    value = raw.get("feed_forward_proj", default)
    known = [*ACTIVATIONS, *(f"gated-{name}" for name in ACTIVATIONS)]
    if not isinstance(value, str) or value not in known:
        raise ConfigError(f"feed_forward_proj is {value!r}; it must be one of {', '.join(known)}")
    name = "gelu_new" if value == "gated-gelu" else value.removeprefix("gated-")
    return activation({"name": name}, "name", name), value.startswith("gated-")


def config_to(config: ModelConfig) -> dict[str, Any]:
    """The config.json of a T5 folder that transformers reads back; ConfigError if none can."""
    alone = config.decoder_layers == 0
    head = "ForConditionalGeneration" if config.output_head else "Model"
    act = activation_name(config.activation)
    if config.gated:
        act = "gated-gelu" if config.activation == "gelu_tanh" else f"gated-{act}"
    raw = {
        "model_type": config.model_type,
        "architectures": [_class(config.model_type) + ("EncoderModel" if alone else head)],
        "is_encoder_decoder": not alone,
        "vocab_size": config.vocab_size,
        "d_model": config.hidden_size,
        "d_kv": config.head_size,
        "d_ff": config.ffn_size,
        "num_heads": config.num_heads,
        "num_layers": config.encoder_layers,
        "num_decoder_layers": config.decoder_layers or config.encoder_layers,
        "n_positions": config.max_positions,
        "feed_forward_proj": act,
        "layer_norm_epsilon": config.norm_eps,
        "relative_attention_num_buckets": config.relative_buckets,
        "relative_attention_max_distance": config.relative_distance,
        "tie_word_embeddings": config.tie_embeddings,
        "scale_decoder_outputs": config.output_scale != 1.0,
        "dropout_rate": config.dropout,
        **written_ids(config),
    }
    return same_again(raw, config, config_from)


def rules(config: ModelConfig, names: set[str] | None) -> list[WeightRule]:
    """Which tensor of the file fills which of ours."""
    alone = config.decoder_layers == 0
    ours = "" if alone else "encoder."
    table = _stack(config, ours, "encoder.")
    table.append(WeightRule(ours + "embedding.tokens.weight", _tokens(names)))
    if not alone:
        table += _stack(config, "decoder.", "decoder.")
    if config.own_output:
        table.append(WeightRule("decoder.lm_head.weight", "lm_head.weight"))
    return table


def _stack(config: ModelConfig, ours: str, theirs: str) -> list[WeightRule]:
    """The table of one stack; a relative bias that its layers share stands in the first block."""
    crossed = theirs == "decoder."
    block = theirs + "block.{}.layer.{}."
    bias = "SelfAttention.relative_attention_bias.weight"
    table = linear(ours + "norm", theirs + "final_layer_norm", bias=False)
    if not config.relative_by_layer:
        table.append(WeightRule(ours + "position_terms.relative.weight", block.format(0, 0) + bias))
    parts = [("self_attn", "SelfAttention")] + [("multihead_attn", "EncDecAttention")] * crossed
    first, second = ("wi_0", "wi_1") if config.gated else ("wi", None)
    for i in range(config.decoder_layers if crossed else config.encoder_layers):
        mine = f"{ours}layers.{i}."
        if config.relative_by_layer:
            table.append(WeightRule(mine + "self_attn.relative.weight", block.format(i, 0) + bias))
        for n, (name, their_name) in enumerate(parts):
            own = block.format(i, n)
            q, k, v, out = (f"{own}{their_name}.{x}" for x in "qkvo")
            table += attention(mine + name, (q, k, v), out, config, bias=False)
            table += linear(f"{mine}norm{n + 1}", own + "layer_norm", bias=False)
        own = block.format(i, len(parts))
        table += linear(f"{mine}norm{len(parts) + 1}", own + "layer_norm", bias=False)
        table += linear(mine + "linear1", f"{own}DenseReluDense.{first}", bias=False)
        table += linear(mine + "linear2", f"{own}DenseReluDense.wo", bias=False)
        if second is not None:
            table += linear(mine + "gate", f"{own}DenseReluDense.{second}", bias=False)
    return table


def _tokens(names: set[str] | None) -> str:
    """The embedding under the first of its names that the folder has."""
    return first_of(TOKENS, names)


def ignored(config: ModelConfig, names: set[str]) -> set[str]:
    """A bias of the attention to the source that the first T5 files carry and nothing reads."""
    return {"decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"}


def tied(config: ModelConfig, names: set[str]) -> dict[str, str]:
    """Names that may repeat another tensor of the file."""
    tokens = _tokens(names)
    heads = (HEAD,) if config.tie_embeddings and config.decoder_layers else ()
    return {name: tokens for name in (*TOKENS[1:], *heads) if name != tokens}
