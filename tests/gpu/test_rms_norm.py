"""rms_norm on a GPU: every width of the table, residuals, rows in blocks, repeats.

Shapes: x, residual [M, N]; weight [N].
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tilewise_kernels import force, rms_norm

pytestmark = pytest.mark.gpu
FLOAT, BF16, HALF = torch.float32, torch.bfloat16, torch.float16
EPS = 1e-6
Tensors = dict[str, Tensor]


def make(normal, rows: int, columns: int, dtype: torch.dtype) -> Tensors:
    weight = normal(columns, dtype=dtype, std=0.1) + 1
    return {"x": normal(rows, columns, dtype=dtype), "weight": weight}


def forced(t: Tensors, **options) -> Any:
    function: Any = rms_norm
    with force("triton"):
        return function(**t, **options)


def eager(t: Tensors) -> Tensor:
    x = t["x"] + t["residual"] if "residual" in t else t["x"]
    return F.rms_norm(x, x.shape[-1:], t.get("weight"), EPS)


@pytest.mark.parametrize("columns", [1, 40, 768, 4097, 8192, 16384])
@pytest.mark.parametrize("dtype", [FLOAT, BF16, HALF], ids=str)
def test_accuracy(columns: int, dtype: torch.dtype, accurate, normal, pick) -> None:
    dtype = pick(dtype, HALF if dtype == BF16 else dtype)
    accurate(forced, eager, make(normal, pick(517, 19), columns, dtype))


@pytest.mark.parametrize("columns", [16385, 65537, 131072])
def test_long_rows(columns: int, accurate, normal, pick) -> None:
    """Above 16384 columns the kernels walk over the row in blocks."""
    accurate(forced, eager, make(normal, pick(7, 2), columns, FLOAT))


@pytest.mark.parametrize("columns", [768, 4096, 20000])
@pytest.mark.parametrize("dtype", [FLOAT, BF16], ids=str)
def test_residual_accuracy(columns: int, dtype: torch.dtype, accurate, normal, pick) -> None:
    dtype = pick(dtype, HALF if dtype == BF16 else dtype)
    tensors = make(normal, pick(300, 3), columns, dtype)
    tensors["residual"] = normal(*tensors["x"].shape, dtype=dtype)
    accurate(forced, eager, tensors)
    accurate(
        lambda t: torch.cat(forced(t, prenorm=True), 1),
        lambda t: torch.cat([eager(t), t["x"] + t["residual"]], 1),
        tensors,
    )


def test_float32_weight_and_residual_beside_half(normal) -> None:
    """A float32 residual stream: the sum stays float32, the output has x's dtype."""
    tensors = make(normal, 65, 768, FLOAT)
    x, residual = normal(65, 768, dtype=HALF), normal(65, 768)
    y, s = forced(tensors | {"x": x, "residual": residual}, prenorm=True)
    assert y.dtype == HALF and torch.equal(s, x + residual)
    exact = F.rms_norm(s.double(), (768,), tensors["weight"].double(), EPS)
    assert (y - exact).abs().max() <= 2e-3 * exact.abs().max()


@pytest.mark.parametrize("shape", [(4096, 768), (64, 16384)])
def test_backward_repeats_bit_for_bit(shape: tuple[int, int], normal, pick) -> None:
    rows, columns = pick(shape, (40, 64))
    leaves = {n: t.requires_grad_() for n, t in make(normal, rows, columns, HALF).items()}
    grad = normal(rows, columns, dtype=HALF)

    def run() -> list[Tensor]:
        y = forced(leaves)
        return [y.detach(), *torch.autograd.grad(y, list(leaves.values()), grad)]

    first = run()
    for _ in range(pick(50, 2)):
        assert all(torch.equal(a, b) for a, b in zip(run(), first, strict=True))
