"""Lines of a weight table that many families have, each with its way back.

Ours on the left, a checkpoint's on the right; shapes: heads H, key heads Hkv, head size D, E.
"""

from collections.abc import Collection

import torch
from torch import Tensor

from ..checkpoints import WeightRule
from ..config import ModelConfig


def prefixed(prefix: str, names: Collection[str] | None) -> str:
    """`prefix` where the names of a checkpoint have it (and always when saving), else ""."""
    if names is None or any(name.startswith(prefix) for name in names):
        return prefix
    return ""


def linear(target: str, source: str, *, bias: bool = True) -> list[WeightRule]:
    """weight and bias of a linear map or a norm, as they are."""
    kinds = ("weight", "bias") if bias else ("weight",)
    return [WeightRule(f"{target}.{kind}", f"{source}.{kind}") for kind in kinds]


def transposed(target: str, source: str) -> list[WeightRule]:
    """A map stored as [in, out]; ours are [out, in]."""
    return [
        WeightRule(f"{target}.weight", f"{source}.weight", torch.t, lambda w: (w.t(),)),
        WeightRule(f"{target}.bias", f"{source}.bias"),
    ]


def attention(
    target: str, sources: Collection[str], out: str, config: ModelConfig, *, bias: bool = True
) -> list[WeightRule]:
    """Separate maps to q, k and v (three sources) and the output map, into our packed layer."""
    d = config.head_size
    rows = [config.num_heads * d, config.kv_heads * d, config.kv_heads * d]
    table = linear(f"{target}.out_proj", out, bias=bias)
    for kind in ("weight", "bias") if bias else ("weight",):
        names = tuple(f"{source}.{kind}" for source in sources)
        packed = f"{target}.in_proj_{kind}"
        table.append(WeightRule(packed, names, inverse=lambda w: w.split(rows)))
    return table


def interleaved(target: str, source: str, heads: int, *, bias: bool = True) -> list[WeightRule]:
    """A fused map with rows [H][q, k, v][D]; ours has [q, k, v][H][D]."""

    def ours(w: Tensor) -> Tensor:
        return w.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2)

    def theirs(w: Tensor) -> tuple[Tensor]:
        return (w.unflatten(0, (3, heads, -1)).transpose(0, 1).flatten(0, 2),)

    return [
        WeightRule(f"{target}.in_proj_{kind}", f"{source}.{kind}", ours, theirs)
        for kind in (("weight", "bias") if bias else ("weight",))
    ]


def seq2seq_layers(config: ModelConfig, prefix: str) -> list[WeightRule]:
    """Both stacks' layers under the names that BART and Marian share."""
    table = []
    for side, count in (("encoder", config.encoder_layers), ("decoder", config.decoder_layers)):
        parts = [("self_attn", "self_attn"), ("multihead_attn", "encoder_attn")]
        parts = parts if side == "decoder" else parts[:1]
        sized = config if side == "decoder" else config.of_encoder
        for i in range(count):
            ours, theirs = f"{side}.layers.{i}.", f"{prefix}{side}.layers.{i}."
            for n, (name, other) in enumerate(parts, 1):
                q, k, v, out = (f"{theirs}{other}.{x}_proj" for x in ("q", "k", "v", "out"))
                table += attention(ours + name, (q, k, v), out, sized)
                table += linear(f"{ours}norm{n}", f"{theirs}{other}_layer_norm")
            table += linear(f"{ours}norm{len(parts) + 1}", theirs + "final_layer_norm")
            table += linear(ours + "linear1", theirs + "fc1")
            table += linear(ours + "linear2", theirs + "fc2")
    return table


def logits_bias(target: str) -> WeightRule:
    """BART's and Marian's final_logits_bias [1, V]."""
    return WeightRule(target, "final_logits_bias", lambda b: b.flatten(), lambda b: (b[None],))


def seq2seq_prefix(config: ModelConfig, names: Collection[str] | None) -> str:
    """What the names of BART and Marian start with, which is nothing in their base models."""
    if names is None:
        return "model." if config.output_bias else ""
    return prefixed("model.", names)


def token_copies(prefix: str) -> tuple[str, ...]:
    """Names of the token embeddings of BART and Marian: of both stacks, and of each."""
    own = (f"{prefix}{side}.embed_tokens.weight" for side in ("encoder", "decoder"))
    return (f"{prefix}shared.weight", *own)


def token_embeddings(
    config: ModelConfig, prefix: str, names: Collection[str] | None, *, unused: bool = False
) -> list[WeightRule]:
    """Rules of the token embeddings of BART and Marian: one matrix, or one for each stack.

    transformers 5 reads three for an untied model. unused: the first is there for stacks that
    have their own, too.
    """
    shared, encoder, decoder = known = token_copies(prefix)
    target = "encoder.embedding.tokens.weight"
    if config.share_embeddings:
        if names is None and not config.tie_embeddings:
            return [WeightRule(target, known, lambda w, *_: w, lambda w: (w, w.clone(), w.clone()))]
        return [WeightRule(target, first_of(known, names))]
    own = WeightRule(target, encoder)
    if names is None and unused:
        own = WeightRule(target, (encoder, shared), lambda w, _: w, lambda w: (w, w.clone()))
    return [own, WeightRule("decoder.embedding.tokens.weight", decoder)]


def first_of(known: Collection[str], names: Collection[str] | None) -> str:
    """The first of these names that a checkpoint has; the first of all when saving."""
    listed = list(known)
    return next((name for name in listed if names is None or name in names), listed[0])
