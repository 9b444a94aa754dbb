"""layer_norm: with the residual add and without, at the widths of small and large models."""

from collections.abc import Callable

import pytest

from tilewise_kernels.bench_cases import Options, Shape

SHAPES = [
    ((4096, 768), Options(residual=True)),
    ((4096, 768), Options()),
    ((1024, 4096), Options(residual=True)),
]


@pytest.mark.parametrize("contender", ["tilewise", "eager"])
@pytest.mark.parametrize("direction", ["forward", "both"])
@pytest.mark.parametrize("shape, options", SHAPES)
def bench_layer_norm(
    bench_op: Callable[..., None], shape: Shape, options: Options, direction: str, contender: str
) -> None:
    bench_op("layer_norm", shape, options, direction, contender)
