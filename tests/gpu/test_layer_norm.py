"""layer_norm on a GPU: every width of the table, residuals, parameters, and tensors beyond 2^31.

Shapes: x, residual [M, N]; weight, bias [N].
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tilewise_kernels import force, layer_norm
from tilewise_kernels.dropout import draw_seed, kept

pytestmark = pytest.mark.gpu
FLOAT, BF16, HALF = torch.float32, torch.bfloat16, torch.float16
Tensors = dict[str, Tensor]


def make(normal, rows: int, columns: int, dtype: torch.dtype) -> Tensors:
    weight = normal(columns, dtype=dtype, std=0.1) + 1
    return {
        "x": normal(rows, columns, dtype=dtype),
        "weight": weight,
        "bias": normal(columns, dtype=dtype, std=0.1),
    }


def forced(t: Tensors, **options) -> Any:
    function: Any = layer_norm
    with force("triton"):
        return function(**t, **options)


def eager(t: Tensors) -> Tensor:
    x = t["x"] + t["residual"] if "residual" in t else t["x"]
    weight, bias = t.get("weight"), t.get("bias")
    return F.layer_norm(x, x.shape[-1:], weight, bias)


@pytest.mark.parametrize("columns", [1, 40, 768, 4097, 8192, 16384])
@pytest.mark.parametrize("dtype", [FLOAT, BF16, HALF], ids=str)
def test_accuracy(columns: int, dtype: torch.dtype, accurate, normal, pick) -> None:
    dtype = pick(dtype, HALF if dtype == BF16 else dtype)
    accurate(forced, eager, make(normal, pick(517, 19), columns, dtype))


@pytest.mark.parametrize("columns", [768, 4096, 12288])
@pytest.mark.parametrize("dtype", [FLOAT, BF16], ids=str)
def test_residual_accuracy(columns: int, dtype: torch.dtype, accurate, normal, pick) -> None:
    dtype = pick(dtype, HALF if dtype == BF16 else dtype)
    tensors = make(normal, pick(300, 9), columns, dtype)
    tensors["residual"] = normal(*tensors["x"].shape, dtype=dtype)
    accurate(forced, eager, tensors)
    both = make(normal, 9, columns, dtype) | {"residual": tensors["residual"][:9]}
    accurate(
        lambda t: torch.cat(forced(t, prenorm=True), 1),
        lambda t: torch.cat([eager(t), t["x"] + t["residual"]], 1),
        both,
    )


@pytest.mark.parametrize("columns", [16385, 65537, 131072])
def test_long_rows(columns: int, accurate, normal, pick) -> None:
    """Above 16384 columns the kernels walk over the row in blocks."""
    tensors = make(normal, pick(7, 2), columns, FLOAT)
    tensors["residual"] = normal(*tensors["x"].shape)
    accurate(forced, eager, tensors)


def test_without_parameters(accurate, normal, pick) -> None:
    x = {"x": normal(65, 768)}
    accurate(forced, eager, x)
    accurate(forced, eager, x | {"weight": normal(768)})
    accurate(forced, eager, x | {"bias": normal(768)})


def test_float32_parameters_and_residual_beside_half(normal) -> None:
    """A float32 residual stream: the sum stays float32, the output has x's dtype."""
    tensors = make(normal, 65, 768, FLOAT)
    x, residual = normal(65, 768, dtype=HALF), normal(65, 768)
    y, s = forced(tensors | {"x": x, "residual": residual}, prenorm=True)
    assert y.dtype == HALF and torch.equal(s, x + residual)
    exact = F.layer_norm(s.double(), (768,), tensors["weight"].double(), tensors["bias"].double())
    assert (y - exact).abs().max() <= 2e-3 * exact.abs().max()


def test_large_mean_and_constant_rows(normal) -> None:
    """Means of 1e4 beside a variance of 1 must not cancel; a constant row gives the bias."""
    x = normal(4, 4096) + 1e4
    x[3] = 7.0
    bias = normal(4096)
    y = forced({"x": x, "bias": bias})
    exact = F.layer_norm(x.double(), (4096,), None, bias.double())
    assert (y - exact).abs().max() <= 1e-4 * exact.abs().max()
    assert torch.equal(y[3], bias)


def test_strides_change_no_bit(normal) -> None:
    tensors = make(normal, 33, 768, FLOAT)
    x, grad = tensors["x"], normal(33, 768)

    def both(x: Tensor, grad: Tensor) -> list[Tensor]:
        leaf = x.detach().requires_grad_()
        y = forced(tensors | {"x": leaf})
        return [y, *torch.autograd.grad(y, leaf, grad)]

    expected = both(x, grad)
    doubled = x.repeat_interleave(2, -1)[..., ::2]
    shifted = x.new_empty(x.numel() + 1)[1:].view(x.shape).copy_(x)
    transposed = x.t().contiguous().t()
    for same in (doubled, shifted, transposed):
        for got, wanted in zip(both(same, grad), expected, strict=True):
            assert torch.allclose(got, wanted, rtol=0, atol=1e-6)
    ones = grad[:1].expand(33, 768)
    for got, wanted in zip(both(x, ones), both(x, ones.contiguous()), strict=True):
        assert torch.allclose(got, wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(4096, 768), (300, 8192), (64, 16384)])
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


@pytest.mark.parametrize("columns", [768, 20000])
def test_dropout(columns: int, normal) -> None:
    """The mask of the seed, forward and backward, the same for the same generator state."""
    x, residual = normal(33, columns).requires_grad_(), normal(33, columns)
    torch.manual_seed(4)
    seed = draw_seed(x.device)
    rows = torch.arange(33, device=x.device)[:, None]
    keep = kept(seed, rows, torch.arange(columns, device=x.device), 0.2)
    torch.manual_seed(4)
    y, s = forced({"x": x, "residual": residual}, dropout_p=0.2, prenorm=True)
    assert torch.allclose(s, torch.where(keep, x / 0.8, 0) + residual, atol=1e-6)
    assert torch.allclose(y, F.layer_norm(s, (columns,)), atol=1e-4)
    [dx] = torch.autograd.grad(s.sum(), x)
    assert torch.equal(dx == 0, ~keep)
    [dx] = torch.autograd.grad(forced({"x": x, "residual": residual}, dropout_p=1.0).sum(), x)
    assert not dx.any()


def test_more_than_31_bits_of_elements(normal, pick, room) -> None:
    room(60)
    columns = pick(4096, 64)
    rows = pick(2**31, 2**11) // columns + 3
    tensors = make(normal, 3, columns, HALF)
    x = torch.zeros(rows, columns, dtype=HALF, device=normal(1).device)
    x[-3:] = tensors["x"]
    y = forced(tensors | {"x": x.requires_grad_()})
    [dx] = torch.autograd.grad(y, x, x)
    small = tensors["x"].requires_grad_()
    expected = forced(tensors | {"x": small})
    assert torch.equal(y[-3:], expected)
    assert torch.allclose(dx[-3:], torch.autograd.grad(expected, small, small)[0], atol=2e-3)
