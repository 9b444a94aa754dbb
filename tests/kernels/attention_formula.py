"""Attention as a formula in eager torch: what the tests of its ways measure errors against.

Shapes: q [B, Hq, Sq, D]; k [B, Hkv, Sk, D]; v [B, Hkv, Sk, Dv].
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tilewise_kernels import dropout

INF = math.inf
Named = dict[str, Tensor]


def seen(sq: int, sk: int, causal: bool, window: Any, key_lengths: Tensor | None) -> Tensor:
    """Bool, broadcastable to [B, Hq, Sq, Sk]: what causality, window and lengths leave."""
    left, right = window or (None, None)
    ahead = torch.arange(sk) - (torch.arange(sq)[:, None] + sk - sq)
    keep = torch.ones(sq, sk, dtype=torch.bool)
    for bound in (0 if causal else None, right):
        if bound is not None:
            keep = keep & (ahead <= bound)
    if left is not None:
        keep = keep & (ahead >= -min(left, 2**31))
    if key_lengths is not None:
        keep = keep & (torch.arange(sk) < key_lengths[:, None, None, None])
    return keep


def eager(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, *, mask: Tensor | None = None,
    causal: bool = False, key_lengths: Tensor | None = None, window: Any = None,
    softcap: float | None = None, alibi_slopes: Tensor | None = None, scale: float | None = None,
    dropout_p: float = 0.0, seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The formula in the dtype of q; dead rows give out 0 and lse -inf."""
    (b, hq, sq, d), sk, dtype = q.shape, k.shape[2], q.dtype
    k, v = (t.repeat_interleave(hq // k.shape[1], 1) for t in (k, v))
    scores = q @ k.mT * (d**-0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias.to(dtype)
    if alibi_slopes is not None:
        distance = (torch.arange(sq)[:, None] + sk - sq - torch.arange(sk)).abs()
        scores = scores - alibi_slopes.to(dtype)[:, None, None] * distance.to(dtype)
    keep = seen(sq, sk, causal, window, key_lengths)
    if mask is not None and mask.dtype != torch.bool:
        scores = scores + mask.masked_fill(mask == -INF, 0).to(dtype)
        keep = keep & (mask > -INF)
    elif mask is not None:
        keep = keep & mask
    dead = ~keep.expand_as(scores).any(-1, keepdim=True)
    scores = scores.masked_fill(~keep, -INF)
    p = torch.softmax(scores.masked_fill(dead, 0), -1).masked_fill(dead, 0)
    if dropout_p:
        assert seed is not None
        rows = torch.arange(b * hq * sq).view(b, hq, sq, 1)
        p = p * dropout.kept(seed, rows, torch.arange(sk), dropout_p) * dropout.scale(dropout_p)
    return p @ v, torch.logsumexp(scores, -1)


def run(
    function: Callable[..., Any], tensors: Named, dtype: torch.dtype, grad: Tensor, **options: Any
) -> Named:
    """out, lse and the gradients of the tensors, by name; bias keeps its own dtype below float64"""
    leaves = {
        name: t.detach().to(t.dtype if name == "bias" and dtype != torch.float64 else dtype)
        for name, t in tensors.items()
    }
    for leaf in leaves.values():
        leaf.requires_grad_()
    out, lse = function(**leaves, **options)
    grads = torch.autograd.grad(out, list(leaves.values()), grad.to(dtype))
    found = dict(zip((f"d{name}" for name in leaves), grads, strict=True))
    return {"out": out, "lse": lse} | found
