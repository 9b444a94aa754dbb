"""What `make gpu` benches, and in which order."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple


class Race(NamedTuple):
    """One line of the plan. judged: the shape, small enough, that is compared with float64."""

    op: str
    shape: tuple[int, ...]
    judged: tuple[int, ...]
    options: dict[str, Any]


GATED = {"gated": True, "activation": "silu"}
WINDOWED = {"causal": True, "window": 512}


def plan() -> Iterator[Race]:
    """What is benched, the figures that are wanted most first: the budget may end in between."""
    for s in (4096, 16384, 8192):
        yield from attention_races(s)
    for n in (4096, 8192, 2048, 1024, 16384, 32768):
        yield Race("layer_norm", (32768, n), (300, n), {"residual": n == 4096})
        yield Race("softmax", (32768, n), (300, n), {})
        yield Race("rms_norm", (32768, n), (300, n), {"residual": n == 4096})
    yield Race("decode_attention", (16, 32, 8192, 128), (4, 32, 8192, 128), {"heads_kv": 8})
    yield Race("decode_attention", (64, 16, 1024, 64), (8, 16, 1024, 64), {"beams": True})
    yield Race("cross_entropy", (8192, 32000), (512, 32000), {})
    yield Race("linear_cross_entropy", (8192, 4096, 32000), (256, 4096, 32000), {})
    yield Race("feed_forward", (8192, 4096, 11008), (512, 4096, 11008), GATED)
    yield Race("linear_act", (8192, 1024, 4096), (512, 1024, 4096), {"activation": "gelu"})
    yield Race("attention", (4, 16, 4096, 4096, 128), (1, 2, 4096, 4096, 128), WINDOWED)
    yield Race("attention", (4, 16, 4096, 4096, 64), (1, 2, 4096, 4096, 64), {"mask": True})
    yield Race("attention", (4, 16, 4096, 4096, 64), (1, 2, 4096, 4096, 64), {"bias": True})
    yield Race("attention_varlen", (16, 16, 2048, 128), (3, 2, 2048, 128), {"causal": True})
    yield Race("rotary", (8, 32, 4096, 128), (1, 8, 4096, 128), {"heads_kv": 8})
    yield Race("log_softmax_topk", (256, 50257), (32, 50257), {"top": 8})
    yield Race("log_softmax", (2048, 50257), (64, 50257), {})
    yield Race("linear", (32, 4096, 11008), (32, 4096, 11008), {})
    yield Race("linear", (32, 4096, 11008), (32, 4096, 11008), {"int8": True})
    for s in (2048, 1024, 512):
        yield from attention_races(s)
    yield Race("softmax", (8, 12, 512, 512), (2, 12, 512, 512), {"mask": True})
    yield Race("softmax", (2048, 131072), (30, 131072), {})
    yield Race("cross_entropy", (4096, 128256), (128, 128256), {})
    yield Race("linear_cross_entropy", (8192, 4096, 128256), (128, 4096, 128256), {})
    for k in (768, 1024, 4096):
        yield Race("feed_forward", (8192, k, 4 * k), (512, k, 4 * k), {"activation": "gelu"})
    for k in (768, 4096):
        yield Race("linear_act", (8192, k, 4 * k), (512, k, 4 * k), {"activation": "gelu"})


HEAD = 12  # races before SMALL has its turn


def attention_races(s: int) -> Iterator[Race]:
    """16384 tokens of width 2048, in sequences of s."""
    for d in (128, 64):
        for causal in (True, False):
            shape = (16384 // s, 2048 // d, s, s, d)
            yield Race("attention", shape, (1, 2, s, s, d), {"causal": causal})


SMALL = (
    Race("softmax", (64, 128), (64, 128), {}),
    Race("layer_norm", (64, 768), (64, 768), {"residual": True}),
    Race("attention", (1, 8, 128, 128, 64), (1, 8, 128, 128, 64), {"causal": True}),
    Race("linear_act", (16, 768, 3072), (16, 768, 3072), {}),
    Race("decode_attention", (4, 12, 256, 64), (4, 12, 256, 64), {}),
)

GPT2_LAYER = [(768,)] * 6 + [(2304,), (3072,), (2304, 768), (768, 768), (3072, 768), (768, 3072)]
PARAMETERS = {  # of a LLaMA layer, of GPT-2, and too few to keep a GPU busy
    "layer of 4096": [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)] + [(4096,)] * 2,
    "GPT-2": GPT2_LAYER * 12 + [(50257, 768), (1024, 768), (768,), (768,)],
    "64x1024": [(1024,)] * 64,
}


def stepped(name: str, *true: str) -> Race:
    """adamw_step on a list of PARAMETERS; its shape: how many tensors and elements."""
    sizes = PARAMETERS[name]
    shape = (len(sizes), sum(map(math.prod, sizes)))
    return Race("adamw_step", shape, shape, {"parameters": name} | dict.fromkeys(true, True))


STEPS = (
    stepped("layer of 4096"),
    stepped("layer of 4096", "clip"),
    stepped("layer of 4096", "bfloat16"),
    stepped("GPT-2", "clip"),
    stepped("64x1024", "clip"),
)


def check(race: Race) -> None:
    """Raise ArgumentError where its case would refuse the race."""
    from tilewise_kernels.bench_cases import CASES, Options  # not above: parts build it first

    for shape in (race.shape, race.judged):
        parsed = CASES[race.op].parse("x".join(map(str, shape)))
        CASES[race.op].check(parsed, Options(**race.options))


def shrunk(race: Race) -> Race:
    """The same call at a size for the interpreter."""
    small = tuple(min(n, 8) for n in race.shape)
    options = race.options | ({"heads_kv": 4} if "heads_kv" in race.options else {})
    return Race(race.op, small, small, options)
