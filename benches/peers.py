"""Other libraries that do the same, where they are installed: what the benches also compare with.

Each takes the named tensors of a case (tilewise_kernels/bench_cases.py) and its options. Nothing
here is a dependency; a peer that is missing, or that cannot take the call, gets no number.
Liger's rotary and cross_entropy write into their inputs, which the next pass needs again: each call
pays for copies of them, and its time holds that.
"""

import functools
import importlib
import importlib.util
from collections.abc import Iterator
from typing import Any

from tilewise_kernels.bench_cases import Function, Options, Tensors

NAMES = ("flash_attn", "xformers", "liger_kernel")


def installed() -> dict[str, str]:
    """{library: version} of the peers that are here."""
    from importlib.metadata import version

    return {
        name: version(name.replace("_", "-"))
        for name in NAMES
        if importlib.util.find_spec(name) is not None
    }


def peers(op: str, options: Options, device: str) -> dict[str, Function]:
    """{name: call} of the peers that have this op on this device; they all need a GPU."""
    here = installed() if device != "cpu" else {}
    found: dict[str, Function] = {}
    if "flash_attn" in here:
        found |= dict(_flash_attn(op, options))
    if "xformers" in here:
        found |= dict(_xformers(op, options))
    if "liger_kernel" in here:
        found |= dict(_liger(op, options))
    return found


def _plain(options: Options) -> bool:
    return not options.mask and not options.bias


def _flash_attn(op: str, options: Options) -> Iterator[tuple[str, Function]]:
    library = importlib.import_module("flash_attn")
    window = (-1, -1) if options.window is None else (options.window, options.window)
    if op == "attention" and _plain(options):
        yield (
            "flash_attn",
            lambda t, o: library.flash_attn_func(
                *(t[name].transpose(1, 2) for name in "qkv"), causal=o.causal, window_size=window
            ).transpose(1, 2),
        )
    if op == "attention_varlen":
        yield "flash_attn", lambda t, o: library.flash_attn_varlen_func(
            t["q"], t["k"], t["v"], t["cu_seqlens"], t["cu_seqlens"],
            t["longest"], t["longest"], causal=o.causal,
        )  # fmt: skip
    if op == "decode_attention" and not options.beams:
        yield "flash_attn", lambda t, o: library.flash_attn_with_kvcache(
            t["q"].transpose(1, 2), t["k"].transpose(1, 2), t["v"].transpose(1, 2),
            cache_seqlens=t["lengths"].int(),
        ).transpose(1, 2)  # fmt: skip


def _xformers(op: str, options: Options) -> Iterator[tuple[str, Function]]:
    library = importlib.import_module("xformers.ops")
    if op == "attention" and _plain(options) and options.window is None and not options.heads_kv:
        mask = library.LowerTriangularMask() if options.causal else None
        yield (
            "xformers",
            lambda t, o: library.memory_efficient_attention(
                *(t[name].transpose(1, 2) for name in "qkv"), attn_bias=mask
            ).transpose(1, 2),
        )


@functools.cache
def _liger_op(module: str, name: str) -> Any:
    return getattr(importlib.import_module(f"liger_kernel.ops.{module}"), name).apply


def _liger(op: str, options: Options) -> Iterator[tuple[str, Function]]:
    def summed(t: Tensors) -> Any:
        return t["x"] + t["residual"] if options.residual else t["x"]

    if op == "layer_norm":
        yield (
            "liger",
            lambda t, o: _liger_op("layer_norm", "LigerLayerNormFunction")(
                summed(t), t["weight"], t["bias"], 1e-5
            ),
        )
    if op == "rms_norm":
        yield (
            "liger",
            lambda t, o: _liger_op("rms_norm", "LigerRMSNormFunction")(
                summed(t), t["weight"], 1e-6, 0.0, "llama", False
            ),
        )
    if op == "rotary":
        yield (
            "liger",
            lambda t, o: _liger_op("rope", "LigerRopeFunction")(
                t["q"].clone(), t["k"].clone(), t["cos doubled"][None], t["sin doubled"][None]
            ),
        )
    if op == "cross_entropy":
        yield (
            "liger",
            lambda t, o: _liger_op("cross_entropy", "LigerCrossEntropyFunction")(
                t["logits"].clone(), t["target"], None
            )[0],
        )
    if op == "linear_cross_entropy":
        yield (
            "liger",
            lambda t, o: _liger_op(
                "fused_linear_cross_entropy", "LigerFusedLinearCrossEntropyFunction"
            )(t["x"], t["weight"], t["target"])[0],
        )
    if op == "softmax" and not options.mask and not options.causal:
        yield "liger", lambda t, o: _liger_op("softmax", "LigerSoftmaxFunction")(t["x"])
    if op == "feed_forward" and options.gated and options.activation == "silu":
        swiglu = _liger_op("swiglu", "LigerSiLUMulFunction")
        yield (
            "liger",
            lambda t, o: swiglu(t["x"] @ t["w1"].t(), t["x"] @ t["gate"].t()) @ t["w2"].t(),
        )
