"""linear_cross_entropy on a GPU: chunks of every kind, memory, repeats.

Shapes: x [M, K]; weight [V, K]; target [M].
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tilewise_kernels import force, linear_cross_entropy

pytestmark = pytest.mark.gpu
FLOAT, BF16, HALF = torch.float32, torch.bfloat16, torch.float16


def triton(t: dict[str, Tensor], target: Tensor, **options) -> Tensor:
    with force("triton"):
        return linear_cross_entropy(target=target, **t, **options)


def eager(t: dict[str, Tensor], target: Tensor, **options) -> Tensor:
    logits = F.linear(t["x"], t["weight"], t.get("bias"))
    loss = F.cross_entropy(logits, target, **options)
    return loss.to(torch.promote_types(loss.dtype, FLOAT))


@pytest.fixture
def make(normal, device, pick):
    """make(M, K, V, dtype): tensors and a target with some rows ignored."""

    def draw(M: int, K: int, V: int, dtype: torch.dtype = FLOAT) -> tuple[dict, Tensor]:
        t = {"x": normal(M, K, dtype=dtype), "weight": normal(V, K, dtype=dtype, std=K**-0.5)}
        target = torch.arange(M, device=device) * 7919 % V
        target[::5] = -100
        return t | {"bias": normal(V, dtype=dtype)}, target

    return draw


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [FLOAT, BF16, HALF], ids=str)
@pytest.mark.parametrize("M, V", [(60, 1000), (700, 1000), (300, 50257)])
def test_accuracy(M, V, dtype, reduction, make, accurate, pick) -> None:
    dtype = pick(dtype, HALF if dtype == BF16 else dtype)
    tensors, target = make(pick(M, 70), 64, pick(V, 90), dtype)
    options = {"reduction": reduction, "label_smoothing": 0.1}
    accurate(lambda t: triton(t, target, **options), lambda t: eager(t, target, **options), tensors)


def test_repeats_bit_for_bit(make, pick) -> None:
    tensors, target = make(pick(1000, 70), 64, pick(32000, 90), pick(BF16, FLOAT))
    leaves = {n: t.requires_grad_() for n, t in tensors.items()}
    runs = []
    for _ in range(pick(50, 2)):
        loss = triton(leaves, target)
        runs.append([loss, *torch.autograd.grad(loss, list(leaves.values()))])
    assert all(torch.equal(a, b) for run in runs for a, b in zip(run, runs[0], strict=True))


def test_no_target_counts(make) -> None:
    tensors, target = make(10, 16, 40)
    leaves = {n: t.requires_grad_() for n, t in tensors.items()}
    loss = triton(leaves, torch.full_like(target, -100))
    grads = torch.autograd.grad(loss, list(leaves.values()))
    assert loss == 0 and all((g == 0).all() for g in grads)


def test_peak_memory_is_at_most_a_quarter_of_torchs(make, gpu_only) -> None:
    """Forward and backward, above the inputs and the final gradients."""
    gpu_only("memory statistics")

    def peak(function) -> int:
        tensors, target = make(4096, 512, 128256, BF16)
        leaves = {n: t.requires_grad_() for n, t in tensors.items()}
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function(leaves, target).backward()
        gradients = sum(t.numel() * t.element_size() for t in leaves.values())
        return torch.cuda.max_memory_allocated() - before - gradients

    assert peak(triton) <= peak(eager) / 4
