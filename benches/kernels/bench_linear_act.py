"""linear_act: the first layer of a feed-forward block, by activation."""

from collections.abc import Callable

import pytest

from tilewise_kernels.bench_cases import Options, Shape

SHAPES = [
    ((1024, 768, 3072), Options()),
    ((1024, 768, 3072), Options(activation="gelu_tanh")),
    ((1024, 768, 3072), Options(activation="relu")),
    ((16, 768, 3072), Options()),
]


@pytest.mark.parametrize("contender", ["tilewise", "eager"])
@pytest.mark.parametrize("direction", ["forward", "both"])
@pytest.mark.parametrize("shape, options", SHAPES)
def bench_linear_act(
    bench_op: Callable[..., None], shape: Shape, options: Options, direction: str, contender: str
) -> None:
    bench_op("linear_act", shape, options, direction, contender)
