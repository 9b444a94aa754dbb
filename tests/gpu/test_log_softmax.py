"""log_softmax and log_softmax_topk on a GPU: tiles, pieces, ties, tensors beyond 2^31 elements.

Shapes: x [M, V]; scores, ids [M, k].
"""

import math

import pytest
import torch
from torch import Tensor

from tilewise_kernels import force, log_softmax, log_softmax_topk

pytestmark = pytest.mark.gpu
FLOAT, BF16, HALF = torch.float32, torch.bfloat16, torch.float16


def triton(t: dict[str, Tensor]) -> Tensor:
    with force("triton"):
        return log_softmax(t["x"])


def topk(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    with force("triton"):
        return log_softmax_topk(x, k)


def sorted_topk(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    ids = x.double().sort(descending=True, stable=True).indices[..., :k]
    return torch.log_softmax(x.double(), -1).gather(-1, ids), ids


@pytest.mark.parametrize("columns", [1, 31, 1000, 4096, 4097, 32000, 131072])
@pytest.mark.parametrize("dtype", [FLOAT, BF16, HALF], ids=str)
def test_accuracy(columns: int, dtype: torch.dtype, accurate, normal, pick) -> None:
    dtype = pick(dtype, HALF if dtype == BF16 else dtype)
    x = normal(pick(37, 3), columns, dtype=dtype, std=3.0)
    accurate(triton, lambda t: torch.log_softmax(t["x"], -1), {"x": x})


def test_strides_and_gradients_of_stride_0(normal) -> None:
    x = normal(6, 4, 700).requires_grad_()
    y = triton({"x": x})
    [dx] = torch.autograd.grad(y, x, torch.ones(1, device=x.device).expand_as(y))
    for same in (x.repeat_interleave(2, -1)[..., ::2], x.transpose(0, 1).clone().transpose(0, 1)):
        leaf = same.detach().requires_grad_()
        z = triton({"x": leaf})
        assert torch.equal(z, y)
        assert torch.equal(torch.autograd.grad(z, leaf, torch.ones_like(z))[0], dx)


@pytest.mark.parametrize("columns", [7, 2049, 50257, 128256])
@pytest.mark.parametrize("k", [1, 8, 64])
@pytest.mark.parametrize("dtype", [FLOAT, BF16], ids=str)
def test_topk(columns: int, k: int, dtype: torch.dtype, normal, pick) -> None:
    dtype, columns = pick(dtype, FLOAT), pick(columns, min(columns, 5000))
    k = min(k, columns)
    x = normal(pick(32, 2), columns, dtype=dtype, std=3.0)
    scores, ids = topk(x, k)
    true, true_ids = sorted_topk(x, k)
    assert torch.equal(ids, true_ids) and scores.dtype == FLOAT
    torch.testing.assert_close(scores.double(), true, rtol=1e-6, atol=1e-5)


def test_topk_ties_and_special_rows(normal, device) -> None:
    x = normal(7, 5000).mul(2).round()
    x[1], x[2], x[3, 7], x[4, 4999] = 1.0, -math.inf, math.nan, math.inf
    x[5] = -math.inf
    x[5, [4000, 17]] = 0.5
    scores, ids = topk(x, 8)
    for row in (0, 1, 6):
        assert torch.equal(ids[row], sorted_topk(x[row], 8)[1])
    first = torch.arange(8, device=device)
    assert scores[2:5].isnan().all() and torch.equal(ids[2:5], first.expand(3, 8))
    assert ids[5].tolist() == [17, 4000, 0, 1, 2, 3, 4, 5] and scores[5, 2:].isneginf().all()


def test_topk_repeats_bit_for_bit(normal, pick) -> None:
    x = normal(pick(64, 2), pick(50257, 4100))
    scores, ids = topk(x, 8)
    for _ in range(pick(50, 2)):
        again = topk(x, 8)
        assert torch.equal(again[0], scores) and torch.equal(again[1], ids)


def test_more_than_31_bits_of_elements(normal, pick, room) -> None:
    room(20)
    columns = pick(65536, 128)
    rows = pick(2**31, 2**11) // columns + 3
    x = torch.zeros(rows, columns, dtype=HALF, device=normal(1).device)
    x[-3:] = normal(3, columns, dtype=HALF)
    assert torch.equal(triton({"x": x})[-3:], triton({"x": x[-3:]}))
    assert torch.equal(topk(x, 2)[1][-3:], topk(x[-3:], 2)[1])
