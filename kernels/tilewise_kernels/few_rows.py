"""x W^T + b where x has few rows, as in decoding: the weight is read once, where it lies.

A library packs W before it multiplies, which for a few rows costs more than the products. Whatever
has no kernel here is torch's. Forward only. 2MNK FLOPs; reads W and x once, writes y once: bound by
memory below about 10 rows of float32.

Shapes: x [..., K], seen as [M, K]; weight [N, K]; bias [N]; y [..., N].
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from . import native


@functools.cache
def most(dtype: torch.dtype) -> int:
    """How many rows of `dtype` the kernel takes on this CPU; 0 where torch's measures faster."""
    return 0 if native.missing() else int(native.op("few_rows_most")(dtype))


def serves(x: Tensor, weight: Tensor) -> bool:
    """Whether x [..., K] @ weight [N, K]^T runs on the kernel."""
    return (
        x.is_cpu
        and 0 < x.numel() <= most(x.dtype) * x.shape[-1]
        and weight.dtype == x.dtype
        and weight.stride(-1) == 1
    )


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear, by the kernel where it serves; operands have been checked."""
    if serves(x, weight):
        y: Tensor = native.op("few_rows")(x, weight, bias)
        return y
    return F.linear(x, weight, bias)
