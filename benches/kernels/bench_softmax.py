"""softmax: masked scores as in eager attention, the same without a mask, and short rows."""

from collections.abc import Callable

import pytest

from tilewise_kernels.bench_cases import Options, Shape

SHAPES = [
    ((8, 12, 512, 512), Options(mask=True)),
    ((8, 12, 512, 512), Options()),
    ((8, 12, 512, 512), Options(causal=True)),
    ((16384, 64), Options()),
]


@pytest.mark.parametrize("contender", ["tilewise", "eager"])
@pytest.mark.parametrize("direction", ["forward", "both"])
@pytest.mark.parametrize("shape, options", SHAPES)
def bench_softmax(
    bench_op: Callable[..., None], shape: Shape, options: Options, direction: str, contender: str
) -> None:
    bench_op("softmax", shape, options, direction, contender)
