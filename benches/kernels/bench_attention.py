"""attention: self-attention causal and padded, cross-attention, grouped heads, a long text."""

from collections.abc import Callable

import pytest

from tilewise_kernels.bench_cases import Options, Shape

SHAPES = [
    ((2, 8, 512, 512, 64), Options(causal=True)),
    ((2, 8, 512, 512, 64), Options(mask=True)),
    ((8, 8, 64, 256, 64), Options()),
    ((2, 8, 512, 512, 64), Options(causal=True, heads_kv=2)),
    ((1, 4, 2048, 2048, 64), Options(causal=True)),
]


@pytest.mark.parametrize("contender", ["tilewise", "eager", "sdpa"])
@pytest.mark.parametrize("direction", ["forward", "both"])
@pytest.mark.parametrize("shape, options", SHAPES)
def bench_attention(
    bench_op: Callable[..., None], shape: Shape, options: Options, direction: str, contender: str
) -> None:
    bench_op("attention", shape, options, direction, contender)
