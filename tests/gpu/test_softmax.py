"""Softmax's CUDA kernels: a warp per row, a block per row, rows beyond shared memory, huge tensors.

Shapes: x [..., Sq, N].
"""

import math
from functools import partial

import pytest
import torch
from torch import Tensor

from tilewise_kernels import force, softmax

pytestmark = pytest.mark.gpu
FLOAT, BF16, HALF, DOUBLE = torch.float32, torch.bfloat16, torch.float16, torch.float64


def native(t: dict[str, Tensor], **options) -> Tensor:
    with force("native"):
        return softmax(t["x"], **options)


def eager(t: dict[str, Tensor], mask=None, scale=1.0, causal=False) -> Tensor:
    scores = t["x"] * scale
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -math.inf)
    elif mask is not None:
        scores = scores + mask.to(scores.dtype)
    if causal:
        sq, n = scores.shape[-2:]
        allowed = torch.ones(sq, n, dtype=torch.bool, device=scores.device).tril(n - sq)
        scores = scores.masked_fill(~allowed, -math.inf)
    return torch.softmax(scores, -1)


# Both kernels and their edges: 1024 columns is the last warp row, 131072 exceeds shared memory.
@pytest.mark.parametrize("columns", [1, 31, 257, 1000, 1024, 1025, 4096, 65537, 131072])
@pytest.mark.parametrize("dtype", [FLOAT, BF16, HALF, DOUBLE], ids=str)
def test_accuracy(columns: int, dtype: torch.dtype, accurate, normal) -> None:
    accurate(native, eager, {"x": normal(3, 5, columns, dtype=dtype, std=3.0)})


@pytest.mark.parametrize("dtype", [FLOAT, BF16, HALF], ids=str)
@pytest.mark.parametrize("columns", [37, 1024, 2049])
def test_masked_accuracy(columns: int, dtype: torch.dtype, accurate, normal, device) -> None:
    """Scale, causal limit, and masks of each kind and broadcast."""
    x = normal(2, 3, 17, columns, dtype=dtype)
    lengths = torch.tensor([columns, 5], device=device)
    padding = (torch.arange(columns, device=device) < lengths[:, None])[:, None, None]
    added = normal(3, 17, 1).expand(3, 17, columns)
    for options in (
        {"mask": padding, "scale": 0.125},
        {"mask": padding, "causal": True, "scale": 0.5},
        {"mask": added, "scale": -2.0},
    ):
        accurate(partial(native, **options), partial(eager, **options), {"x": x})


def test_unforced_accuracy_and_other_dims(accurate, normal) -> None:
    for dim in (0, 1, 2):
        accurate(
            lambda t, dim=dim: softmax(t["x"], dim=dim),
            lambda t, dim=dim: torch.softmax(t["x"], dim),
            {"x": normal(5, 33, 7)},
        )


@pytest.mark.parametrize("columns", [64, 3000, 131072])
def test_dead_rows_are_zero_with_zero_gradient(columns: int, normal, device) -> None:
    x = normal(4, columns).requires_grad_()
    mask = torch.ones(4, columns, dtype=torch.bool, device=device)
    mask[1] = mask[3] = False
    y = native({"x": x}, mask=mask)
    [dx] = torch.autograd.grad(y, x, normal(4, columns))
    assert (y[1::2] == 0).all() and (dx[1::2] == 0).all()
    assert torch.allclose(y[::2].sum(-1), torch.ones(2, device=device), atol=1e-5)
    assert dx.isfinite().all()


@pytest.mark.parametrize("columns", [64, 1031, 131072])
def test_strides_change_no_bit(columns: int, normal) -> None:
    x = normal(6, 4, columns)
    expected = native({"x": x})
    doubled = x.repeat_interleave(2, -1)[..., ::2]
    shifted = x.new_empty(x.numel() + 1)[1:].view(x.shape).copy_(x)
    transposed = x.transpose(0, 1).contiguous().transpose(0, 1)
    expanded = x[:1].expand(6, 4, columns)
    for same in (doubled, shifted, transposed):
        assert torch.equal(native({"x": same}), expected)
    assert torch.equal(native({"x": expanded}), expected[:1].expand_as(expected))


def test_a_gradient_of_stride_0(normal) -> None:
    x = normal(5, 700).requires_grad_()
    weights = normal(5, 1)
    y = native({"x": x})
    [got] = torch.autograd.grad(y, x, weights.expand_as(y))
    y = native({"x": x})
    [expected] = torch.autograd.grad(y, x, weights.expand_as(y).contiguous())
    assert torch.equal(got, expected)


@pytest.mark.parametrize("columns", [512, 5000])
def test_huge_logits(columns: int, normal, device) -> None:
    """One key above all others by 1e4, rows of one value, and infinities."""
    x = normal(3, columns)
    x[0, 7], x[1] = 1e4, 3e38
    y = native({"x": x})
    assert y[0, 7] == 1 and torch.allclose(y[1], torch.full_like(y[1], 1 / columns))
    x[2, 3] = math.nan
    assert native({"x": x})[2].isnan().all()


@pytest.mark.parametrize("columns", [1000, 40000])
def test_backward_repeats_bit_for_bit(columns: int, normal, pick) -> None:
    x, grad = normal(64, columns).requires_grad_(), normal(64, columns)
    runs = [torch.autograd.grad(native({"x": x}), x, grad)[0] for _ in range(pick(50, 2))]
    assert all(torch.equal(dx, runs[0]) for dx in runs)


def test_more_than_31_bits_of_elements(normal, pick, room) -> None:
    room(40)
    for columns in (pick(1024, 64), pick(16384, 128)):
        rows = pick(2**31, 2**13) // columns + 3
        x = torch.empty(rows, columns, dtype=HALF, device=normal(1).device)
        x[-3:] = normal(3, columns, dtype=HALF)
        x[:-3] = 0
        y = native({"x": x.requires_grad_()})
        [dx] = torch.autograd.grad(y, x, x)
        small = x[-3:].detach().requires_grad_()
        expected = native({"x": small})
        assert torch.equal(y[-3:], expected)
        assert torch.equal(dx[-3:], torch.autograd.grad(expected, small, small)[0])
        del x, y, dx


def test_more_rows_than_a_grid_dimension(normal, pick) -> None:
    x = normal(pick(70000 * 4, 100), 5)
    assert torch.equal(native({"x": x})[-4:], native({"x": x[-4:]}))
