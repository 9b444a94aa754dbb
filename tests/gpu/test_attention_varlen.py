"""Packed attention on a GPU: against attention() on each sequence, and the same bits every time.

Shapes: q [Tq, Hq, D]; k, v [Tk, Hkv, D].
"""

import math

import pytest
import torch
from torch import Tensor

from tilewise_kernels import attention_varlen, force

pytestmark = pytest.mark.gpu
HALF, BF16, FLOAT = torch.float16, torch.bfloat16, torch.float32
Tensors = dict[str, Tensor]


def cut(lengths: list[int], device) -> Tensor:
    return torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)


def make(lengths: list[int], heads: tuple[int, int], D: int, dtype, normal) -> Tensors:
    """q, k and v of self-attention; normal makes at least three dims."""
    total = sum(lengths)
    sizes = {"q": heads[0], "k": heads[1], "v": heads[1]}
    return {name: normal(total, count, D, dtype=dtype) for name, count in sizes.items()}


def run(t: Tensors, lengths: Tensor, **options) -> Tensor:
    with force("triton"):
        return attention_varlen(t["q"], t["k"], t["v"], lengths, lengths, **options)


def eager(t: Tensors, lengths: list[int], causal=False, window=None, softcap=None) -> Tensor:
    """The formula on every sequence, in the dtype of q."""
    parts = []
    for q, k, v in zip(*(t[name].split(lengths) for name in "qkv"), strict=True):
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        k, v = (x.repeat_interleave(q.shape[0] // k.shape[0], 0) for x in (k, v))
        scores = q @ k.mT * q.shape[2] ** -0.5
        scores = softcap * torch.tanh(scores / softcap) if softcap else scores
        at = torch.arange(q.shape[1], device=q.device)
        ahead = at - at[:, None]
        keep = ahead <= (0 if causal else q.shape[1])
        keep = keep & (ahead >= -window[0]) if window else keep
        parts.append((torch.softmax(scores.masked_fill(~keep, -math.inf), -1) @ v).transpose(0, 1))
    return torch.cat(parts)


@pytest.mark.parametrize("dtype", [FLOAT, BF16, HALF], ids=str)
@pytest.mark.parametrize("D", [40, 128])
@pytest.mark.parametrize(
    "options", [{"causal": True}, {}, {"causal": True, "window": (100, None), "softcap": 20.0}]
)
def test_accuracy(dtype, D: int, options: dict, accurate, normal, pick, device) -> None:
    dtype = pick(dtype, HALF if dtype == BF16 else dtype)  # the interpreter multiplies it wrongly
    lengths = pick([200, 0, 1, 513, 64, 129], [20, 0, 1, 5])
    tensors = make(lengths, (6, 2), D, dtype, normal)
    on_device = cut(lengths, device)
    accurate(
        lambda t: run(t, on_device, **options), lambda t: eager(t, lengths, **options), tensors
    )


def test_backward_repeats_bit_for_bit(normal, pick, device) -> None:
    lengths = pick([500, 3, 1025, 64], [17, 3])
    tensors = make(lengths, (6, 2), 64, HALF, normal)
    on_device = cut(lengths, device)
    grad = normal(*tensors["q"].shape, dtype=HALF)
    leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}

    def once() -> list[Tensor]:
        out = run(leaves, on_device, causal=True)
        return [out, *torch.autograd.grad(out, list(leaves.values()), grad)]

    first = once()
    for _ in range(pick(50, 2)):
        assert all(torch.equal(a, b) for a, b in zip(once(), first, strict=True))


def test_the_host_never_waits_for_lengths(normal, gpu_only, device) -> None:
    """With synchronising calls made errors, forward and backward still run."""
    gpu_only("stream to wait for")
    lengths = [300, 20, 77]
    tensors = make(lengths, (4, 4), 64, HALF, normal)
    leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
    on_device = cut(lengths, device)
    run(leaves, on_device, causal=True).sum().backward()  # compiles
    try:
        torch.cuda.set_sync_debug_mode("error")
        run(leaves, on_device, causal=True, dropout_p=0.1).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_seqlens_that_lie_stay_in_bounds(normal, gpu_only, device) -> None:
    gpu_only("lengths that the host cannot check")
    tensors = make([17, 10], (2, 2), 64, HALF, normal)
    wild = torch.tensor([-7, 17, 2**30], device=device, dtype=torch.int32)
    assert torch.equal(run(tensors, wild), run(tensors, cut([17, 10], device)))
