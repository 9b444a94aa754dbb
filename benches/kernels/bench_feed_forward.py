"""feed_forward: a whole block, in training size and for the few rows of decoding."""

from collections.abc import Callable

import pytest

from tilewise_kernels.bench_cases import Options, Shape

SHAPES = [
    ((512, 768, 3072), Options()),
    ((512, 768, 3072), Options(activation="relu")),
    ((16, 768, 3072), Options()),
]


@pytest.mark.parametrize("contender", ["tilewise", "eager"])
@pytest.mark.parametrize("direction", ["forward", "both"])
@pytest.mark.parametrize("shape, options", SHAPES)
def bench_feed_forward(
    bench_op: Callable[..., None], shape: Shape, options: Options, direction: str, contender: str
) -> None:
    bench_op("feed_forward", shape, options, direction, contender)
