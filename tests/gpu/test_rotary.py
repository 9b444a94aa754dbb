"""rotary's Triton kernel: queries and keys in one launch, any layout, offsets past 2^31.

Shapes: q [B, Hq, S, D]; k [B, Hkv, S, D]; cos, sin [S, R/2] or [B, S, R/2].
"""

from functools import partial

import pytest
import torch
from torch import Tensor

from tilewise_kernels import force, rotary

pytestmark = pytest.mark.gpu
FLOAT, BF16, HALF = torch.float32, torch.bfloat16, torch.float16


def triton(t: dict[str, Tensor], cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Both results in one tensor, so that both gradients are checked."""
    with force("triton"):
        return torch.cat(rotary(t["q"], t["k"], cos, sin, interleaved=interleaved), 1)


def eager(t: dict[str, Tensor], cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    x = torch.cat((t["q"], t["k"]), 1)
    cos, sin = (table.to(x.dtype).unsqueeze(-3) for table in (cos, sin))
    turning, rest = x[..., : 2 * cos.shape[-1]], x[..., 2 * cos.shape[-1] :]
    dim = -1 if interleaved else -2
    a, b = turning.unflatten(-1, (-1, 2) if interleaved else (2, -1)).unbind(dim)
    turned = torch.stack((a * cos - b * sin, b * cos + a * sin), dim).flatten(-2)
    return torch.cat((turned, rest), -1)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", [FLOAT, BF16, HALF], ids=str)
@pytest.mark.parametrize("D, R", [(128, 128), (80, 20), (59, 38), (256, 256)])
def test_accuracy(D: int, R: int, dtype, interleaved, accurate, normal, pick) -> None:
    S, dtype = pick(517, 9), pick(dtype, HALF if dtype == BF16 else dtype)
    inputs = {"q": normal(2, 5, S, D, dtype=dtype), "k": normal(2, 2, S, D, dtype=dtype)}
    for lead in ((), (2,)):
        angles = normal(*lead, S, R // 2, std=20.0)
        options = {"cos": angles.cos(), "sin": angles.sin(), "interleaved": interleaved}
        accurate(partial(triton, **options), partial(eager, **options), inputs)


@pytest.mark.parametrize("interleaved", [False, True])
def test_strides_change_no_bit(interleaved: bool, normal, pick) -> None:
    S, D = pick(300, 7), 64
    qkv = normal(2, S, 3, 4, D, dtype=HALF)
    q, k = (qkv.select(2, i).transpose(1, 2) for i in range(2))
    angles = normal(S, D // 2, std=20.0)
    run = partial(triton, cos=angles.cos(), sin=angles.sin(), interleaved=interleaved)
    expected = run({"q": q.contiguous(), "k": k.contiguous()})
    assert torch.equal(run({"q": q, "k": k}), expected)
    assert torch.equal(run({"q": q.mT.contiguous().mT, "k": k}), expected)


def test_more_than_31_bits_of_elements(normal, pick, room) -> None:
    room(24)
    S, D = pick(2**15, 64), 64
    heads = pick(2**31 // (S * D) + 3, 5)
    q = torch.zeros(1, heads, S, D, dtype=HALF, device=normal(1).device)
    q[:, -3:] = normal(1, 3, S, D, dtype=HALF)
    angles = normal(S, D // 2)
    with force("triton"):
        large, k = rotary(q, q[:, -3:], angles.cos(), angles.sin())
    assert torch.equal(large[:, -3:], k)


def test_more_programs_than_a_grid_dimension(normal, pick) -> None:
    B = pick(70000, 40)
    x, angles = normal(B, 2, 1, 16), normal(1, 8)
    with force("triton"):
        y, _ = rotary(x, x, angles.cos(), angles.sin())
        last, _ = rotary(x[-1:], x[-1:], angles.cos(), angles.sin())
    assert torch.equal(y[-1:], last)
