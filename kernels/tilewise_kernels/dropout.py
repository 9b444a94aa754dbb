"""Which elements dropout keeps: a pure function of a seed and the element's position.

    u(seed, row, column) = mix(mix(mix(low(row) ^ low(seed)) ^ high(row) ^ high(seed)) ^ column)
    kept where the top 24 bits of u reach ceil(p 2^24);  kept values are divided by 1 - p

mix is the 32-bit finaliser of MurmurHash3 (Appleby 2011), a bijection whose output bits each depend
on every input bit. Nothing of the mask is stored: the backward pass, a recomputing checkpoint and
every implementation (torch here, Triton below, C++ in csrc/dropout.h) find the same bits from the
seed. The seed is drawn on the device from torch's generator, so that torch.manual_seed governs it
and a captured CUDA graph draws a new one at each replay.
"""

# mypy: allow-untyped-defs
# (Triton functions have no Python types)

from __future__ import annotations  # tl.constexpr and tl.uint32 are not evaluated at import

import math
from typing import Any

import torch
from torch import Tensor

from .lazy_triton import jit

tl: Any = None  # triton.language once load() has run
MASK32 = 0xFFFFFFFF


def draw_seed(device: torch.device) -> Tensor:
    """A fresh int64 seed [1] on `device`, from torch's generator there; no synchronisation."""
    return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=device)


def threshold(p: float) -> int:
    """What the top 24 bits of an element's number must reach for it to be kept: 0 .. 2^24."""
    return math.ceil(p * 2**24)


def scale(p: float) -> float:
    """1 / (1 - p), what kept elements are multiplied by; 0 where p is 1 and none is kept."""
    return 0.0 if p == 1 else 1 / (1 - p)


def _mix(x: Tensor) -> Tensor:
    """The finaliser on 32-bit numbers held in int32 (products wrap); overwrites and returns x."""
    x ^= _shifted(x, 16)
    x *= 0x85EBCA6B - 2**32
    x ^= _shifted(x, 13)
    x *= 0xC2B2AE35 - 2**32
    x ^= _shifted(x, 16)
    return x


def _shifted(x: Tensor, bits: int) -> Tensor:
    """x shifted right as an unsigned number."""
    return (x >> bits).bitwise_and_(MASK32 >> bits)


def kept(seed: Tensor, rows: Tensor, columns: Tensor, p: float) -> Tensor:
    """Bool mask of the kept elements.

    seed: int64 [1]. rows: int64 row numbers, columns: int64 column numbers below 2^32; they
    broadcast to the mask's shape. p: the probability of dropping, 0 to 1.
    """
    low = (rows ^ seed).to(torch.int32)  # a cast keeps the low half
    high = ((rows ^ seed) >> 32).to(torch.int32)
    mixed = _mix(_mix(low) ^ high)
    return _shifted(_mix(mixed ^ columns.to(torch.int32)), 8) >= threshold(p)


@jit
def mix(x):
    """The finaliser, on uint32."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


@jit
def mixed_rows(seed, rows):
    """The part of the number that a row's elements share. seed: int64 scalar; rows: int64."""
    low = (rows & 0xFFFFFFFF).to(tl.uint32) ^ (seed & 0xFFFFFFFF).to(tl.uint32)
    high = ((rows >> 32) & 0xFFFFFFFF).to(tl.uint32) ^ ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    return mix(mix(low) ^ high)


@jit
def kept_at(mixed, columns, threshold):
    """Whether to keep elements: mixed_rows(...) and columns broadcast; threshold is an int."""
    return (mix(mixed ^ columns.to(tl.uint32)) >> 8).to(tl.int32) >= threshold
