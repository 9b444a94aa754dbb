"""cross_entropy on a GPU: every tile, options, ignored and wrong targets, tensors beyond 2^31.

Shapes: logits [M, V]; target [M].
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tilewise_kernels import cross_entropy, force

pytestmark = pytest.mark.gpu
FLOAT, BF16, HALF = torch.float32, torch.bfloat16, torch.float16


def triton(logits: Tensor, target: Tensor, **options) -> Tensor:
    with force("triton"):
        return cross_entropy(logits, target, **options)


def labels(logits: Tensor) -> Tensor:
    """Classes that spread over the columns; every third row is ignored."""
    rows, V = logits.shape
    target = torch.arange(rows, device=logits.device) * 7919 % V
    target[::3] = -100
    return target


@pytest.mark.parametrize("columns", [1, 1000, 4097, 131072])
@pytest.mark.parametrize("dtype", [FLOAT, BF16, HALF], ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_accuracy(columns, dtype, smoothing, accurate, normal, pick) -> None:
    dtype = pick(dtype, HALF if dtype == BF16 else dtype)
    logits = normal(pick(37, 4), columns, dtype=dtype, std=3.0)
    target = labels(logits)
    options = {"label_smoothing": smoothing, "reduction": "none"}
    accurate(
        lambda t: triton(t["logits"], target, **options),
        lambda t: F.cross_entropy(t["logits"], target, **options).to(
            torch.promote_types(t["logits"].dtype, FLOAT)
        ),
        {"logits": logits},
    )


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_z_loss_and_reduction(reduction: str, normal) -> None:
    logits = normal(9, 5000).requires_grad_()
    target = labels(logits)
    kept = target != -100
    lse = logits[kept].logsumexp(-1)
    expected = F.cross_entropy(logits, target, reduction=reduction)
    expected = expected + 0.01 * getattr(lse.square(), reduction)()
    found = triton(logits, target, z_loss=0.01, reduction=reduction)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    [dx] = torch.autograd.grad(found, logits)
    [wanted] = torch.autograd.grad(expected, logits)
    torch.testing.assert_close(dx, wanted, rtol=1e-4, atol=1e-7)


def test_ignored_and_wrong_targets(normal, device) -> None:
    logits = normal(5, 300)
    logits[1] = torch.nan
    target = torch.tensor([4, -100, 300, -1, 2**40], device=device)
    leaf = logits.requires_grad_()
    losses = triton(leaf, target, reduction="none")
    [dx] = torch.autograd.grad(losses, leaf, torch.ones(1, device=device).expand(5))
    assert losses[:2].isfinite().all() and losses[2:].isnan().all()
    assert (dx[1] == 0).all() and dx[0].isfinite().all() and dx[2:].isnan().all()
    nothing = triton(leaf, torch.full_like(target, -100))
    assert nothing == 0 and (torch.autograd.grad(nothing, leaf)[0] == 0).all()


def test_repeats_bit_for_bit(normal, pick) -> None:
    logits = normal(64, pick(32000, 300)).requires_grad_()
    target = labels(logits)
    losses = [triton(logits, target, label_smoothing=0.1) for _ in range(pick(50, 2))]
    grads = [torch.autograd.grad(loss, logits)[0] for loss in losses]
    assert all(torch.equal(a, losses[0]) for a in losses)
    assert all(torch.equal(a, grads[0]) for a in grads)


def test_more_than_31_bits_of_elements(normal, pick, room) -> None:
    room(20)
    columns = pick(65536, 128)
    rows = pick(2**31, 2**11) // columns + 3
    logits = torch.zeros(rows, columns, dtype=HALF, device=normal(1).device)
    logits[-3:] = normal(3, columns, dtype=HALF)
    target = labels(logits)
    losses = triton(logits.requires_grad_(), target, reduction="none")
    assert torch.equal(losses[-3:], triton(logits[-3:], target[-3:], reduction="none"))
    [dx] = torch.autograd.grad(losses, logits, torch.ones_like(losses))
    small = logits[-3:].detach().requires_grad_()
    again = triton(small, target[-3:], reduction="none")
    assert torch.equal(dx[-3:], torch.autograd.grad(again, small, torch.ones_like(again))[0])
