"""Lines of a weight table that many families have, each with its way back.

Ours on the left, a checkpoint's on the right; shapes: heads H, key heads Hkv, head size D, E.
"""

from collections.abc import Collection

import torch
from torch import Tensor

from ..checkpoints import WeightRule
from ..config import ModelConfig


def prefixed(prefix: str, names: Collection[str] | None) -> str:
    """`prefix` where the names of a checkpoint have it (and always when saving), else ""."""
    if names is None or any(name.startswith(prefix) for name in names):
        return prefix
    return ""


def linear(target: str, source: str, *, bias: bool = True) -> list[WeightRule]:
    """weight and bias of a linear map or a norm, as they are."""
    kinds = ("weight", "bias") if bias else ("weight",)
    return [WeightRule(f"{target}.{kind}", f"{source}.{kind}") for kind in kinds]


def transposed(target: str, source: str) -> list[WeightRule]:
    """A map stored as [in, out]; ours are [out, in]."""
    return [
        WeightRule(f"{target}.weight", f"{source}.weight", torch.t, lambda w: (w.t(),)),
        WeightRule(f"{target}.bias", f"{source}.bias"),
    ]


def attention(
    target: str, sources: Collection[str], out: str, config: ModelConfig, *, bias: bool = True
) -> list[WeightRule]:
    """Separate maps to q, k and v (three sources) and the output map, into our packed layer."""
    d = config.head_size
    rows = [config.num_heads * d, config.kv_heads * d, config.kv_heads * d]
    table = linear(f"{target}.out_proj", out, bias=bias)
    for kind in ("weight", "bias") if bias else ("weight",):
        names = tuple(f"{source}.{kind}" for source in sources)
        packed = f"{target}.in_proj_{kind}"
        table.append(
            WeightRule(packed, names, lambda *parts: torch.cat(parts), lambda w: w.split(rows))
        )
    return table


def interleaved(target: str, source: str, heads: int, *, bias: bool = True) -> list[WeightRule]:
    """A fused map with rows [H][q, k, v][D]; ours has [q, k, v][H][D]."""

    def ours(w: Tensor) -> Tensor:
        return w.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2)

    def theirs(w: Tensor) -> tuple[Tensor]:
        return (w.unflatten(0, (3, heads, -1)).transpose(0, 1).flatten(0, 2),)

    return [
        WeightRule(f"{target}.in_proj_{kind}", f"{source}.{kind}", ours, theirs)
        for kind in (("weight", "bias") if bias else ("weight",))
    ]
