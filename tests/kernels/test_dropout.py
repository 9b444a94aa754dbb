"""The dropout numbers: the same in torch, Triton and C++, and as random as dropout needs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tilewise_kernels import dropout
from tilewise_kernels.dropout import draw_seed, kept, kept_at, mixed_rows, threshold
from tilewise_kernels.lazy_triton import jit, load

tl: Any = None


@jit
def keep_kernel(seed_ptr, out_ptr, first_row, threshold, BLOCK: tl.constexpr):
    rows = first_row + tl.arange(0, BLOCK).to(tl.int64)
    mixed = mixed_rows(tl.load(seed_ptr), rows)
    columns = tl.arange(0, BLOCK)
    keep = kept_at(mixed[:, None], columns[None, :], threshold)
    tl.store(out_ptr + tl.arange(0, BLOCK)[:, None] * BLOCK + columns[None, :], keep)


def block(seed: int, first_row: int, size: int, p: float) -> Tensor:
    rows = first_row + torch.arange(size)[:, None]
    return kept(torch.tensor([seed]), rows, torch.arange(size), p)


@pytest.mark.parametrize("seed", [0, 1, -1, 2**62 + 12345, -(2**63)])
@pytest.mark.parametrize("first_row", [0, 2**31 - 8, 2**32 - 8, 2**40])
def test_triton_finds_the_same_elements(seed: int, first_row: int) -> None:
    load(globals())
    out = torch.empty(16, 16, dtype=torch.bool)
    keep_kernel[(1,)](torch.tensor([seed]), out, first_row, threshold(0.3), BLOCK=16)
    assert torch.equal(out, block(seed, first_row, 16, 0.3))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_the_kept_share_and_its_independence(p: float) -> None:
    keep = block(7, 0, 1024, p).double()
    n, wanted = keep.numel(), 1 - p
    deviation = (p * (1 - p)) ** 0.5
    assert abs(keep.mean() - wanted) < 5 * deviation / n**0.5
    centred = (keep - wanted) / deviation
    shifted = [centred.roll(1, 0), centred.roll(1, 1), centred.roll((1, 1), (0, 1)), centred.t()]
    shifted += [(block(8, 0, 1024, p).double() - wanted) / deviation]  # the next seed
    shifted += [(block(7, 1024, 1024, p).double() - wanted) / deviation]
    for other in shifted:
        assert abs((centred * other).mean()) < 5 * 2**0.5 / n**0.5
    by_row, by_column = centred.mean(1), centred.mean(0)
    for means in (by_row, by_column):
        assert abs(means.var() * 1024 - 1) < 0.25


def test_the_ends_of_the_range() -> None:
    assert block(3, 0, 64, 0.0).all() and not block(3, 0, 64, 1.0).any()
    assert dropout.scale(0.0) == 1 and dropout.scale(0.5) == 2 and dropout.scale(1.0) == 0


def test_seeds_follow_torchs_generator() -> None:
    torch.manual_seed(5)
    first = [draw_seed(torch.device("cpu")).item() for _ in range(3)]
    torch.manual_seed(5)
    assert first == [draw_seed(torch.device("cpu")).item() for _ in range(3)]
    assert len(set(first)) == 3
