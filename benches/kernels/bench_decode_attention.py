"""decode_attention: one new token against a cache, a greedy batch and one with grouped heads."""

from collections.abc import Callable

import pytest

from tilewise_kernels.bench_cases import Options, Shape

SHAPES = [
    ((16, 8, 1024, 64), Options()),
    ((16, 8, 1024, 64), Options(heads_kv=2)),
    ((4, 12, 128, 64), Options()),
]


@pytest.mark.parametrize("contender", ["tilewise", "eager", "sdpa"])
@pytest.mark.parametrize("direction", ["forward"])
@pytest.mark.parametrize("shape, options", SHAPES)
def bench_decode_attention(
    bench_op: Callable[..., None], shape: Shape, options: Options, direction: str, contender: str
) -> None:
    bench_op("decode_attention", shape, options, direction, contender)
