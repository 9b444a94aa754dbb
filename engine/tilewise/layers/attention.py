"""Multi-head attention over itself, over a memory, or over a cache of its own past.

Shapes: x [R, S, E]; memory [M, N, E]; heads [R, H, S, D], where H * D may differ from E.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tilewise_kernels import attention, decode_attention, rotary
from tilewise_kernels.checks import fail, is_float_tensor, matches, shape_of
from tilewise_kernels.errors import ArgumentError
from tilewise_kernels.op import autocast_dtype

from .linear import Linear, project
from .positions import PositionTerms

NO_TERMS = PositionTerms()
MAP_COLUMNS = 64  # of an attention map that are found at a time


class LayerCache(NamedTuple):
    """One layer's keys and values of the past, written once and read in place.

    keys, values: [C, Hkv, T, D]. rows [R]: the cache row that each active row writes to.
    lengths [R]: positions in use once this call's S tokens are written. beam_index [R, T] int32,
    or None when row r reads cache row r. prompt: this call writes the first S positions of rows
    that hold nothing yet (padded on the right; lengths says how far each row is real).
    """

    keys: Tensor
    values: Tensor
    rows: Tensor
    lengths: Tensor
    beam_index: Tensor | None
    prompt: bool

    def write(self, keys: Tensor, values: Tensor) -> None:
        """Store the new keys and values [R, Hkv, S, D] behind each row's past."""
        length = keys.shape[2]
        if self.prompt:
            self.keys[self.rows, :, :length] = keys
            self.values[self.rows, :, :length] = values
            return
        for i in range(length):
            at = self.lengths - length + i
            self.keys[self.rows, :, at] = keys[:, :, i]
            self.values[self.rows, :, at] = values[:, :, i]


class Memory(NamedTuple):
    """Keys and values of an encoder's output, computed once per sentence: [M, Hkv, N, D]."""

    keys: Tensor
    values: Tensor
    lengths: Tensor | None  # [M] real positions, None when all are

    def select(self, sentences: Tensor) -> "Memory":
        """The memory of these sentences [A] only."""
        lengths = None if self.lengths is None else self.lengths[sentences]
        return Memory(self.keys[sentences], self.values[sentences], lengths)


class MultiHeadAttention(nn.Module):
    """Attention with packed input projections, named as in torch.nn.MultiheadAttention.

    in_proj_weight holds the rows of q, k and v in that order: [(H + 2 Hkv) * D, E]; with Hkv = H
    the state_dict of torch.nn.MultiheadAttention(E, H) loads as it is. Batch comes first.
    head_size: D, E / H when None. qkv_bias: False takes the bias from q, k and v, and leaves it to
    the output map. window: how many keys on either side a query sees, None = all.
    relative_buckets: rows of a bias table of its own, indexed by terms.buckets; None: no table.
    Source: Vaswani et al. 2017, section 3.2; grouped keys: Ainslie et al. 2023.
    """

    def __init__(
        self,
        size: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        *,
        head_size: int | None = None,
        bias: bool = True,
        qkv_bias: bool = True,
        scale: float | None = None,
        window: int | None = None,
        relative_buckets: int | None = None,
    ) -> None:
        super().__init__()
        kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        fits = head_size is not None or (num_heads > 0 and size % num_heads == 0)
        if min(num_heads, kv_heads) < 1 or not fits or num_heads % kv_heads:
            raise ArgumentError(
                f"MultiHeadAttention: {num_heads} heads and {kv_heads} key heads do not fit size "
                f"{size}; heads must divide the size, and key heads the heads"
            )
        self.num_heads, self.kv_heads = num_heads, kv_heads
        self.head_size = size // num_heads if head_size is None else head_size
        self.scale = scale
        self.window = None if window is None else (window, window)
        self.relative: nn.Embedding | None = None
        if relative_buckets is not None:
            self.relative = nn.Embedding(relative_buckets, num_heads)
        packed = (num_heads + 2 * kv_heads) * self.head_size
        self.in_proj_weight = nn.Parameter(torch.empty(packed, size))
        self.in_proj_bias = nn.Parameter(torch.zeros(packed)) if bias and qkv_bias else None
        self.out_proj = Linear(num_heads * self.head_size, size, bias=bias)
        nn.init.xavier_uniform_(self.in_proj_weight)

    def forward(
        self,
        x: Tensor,
        memory: Tensor | Memory | None = None,
        *,
        mask: Tensor | None = None,
        causal: bool = False,
        key_lengths: Tensor | None = None,
        cache: LayerCache | None = None,
        terms: PositionTerms = NO_TERMS,
        maps: list[Tensor] | None = None,
    ) -> Tensor:
        """[R, S, E] to [R, S, E].

        memory: [M, N, E], or its keys and values from `remember`; attended to in place of x. When
        it has fewer rows than x, each memory row serves R / M consecutive rows of x (the beams of
        one sentence), which share its keys. mask: bool (True = attend) or float, broadcastable to
        [R, H, S, keys]. key_lengths: [rows of keys]. cache: write x's keys there, attend to it.
        terms: what positions do to queries, keys and scores. maps: a list that gets the attention
        probabilities [R, H, S, keys] appended (not of a step from a cache).
        """
        if memory is not None:
            if not isinstance(memory, Memory):
                memory = self.remember(memory, key_lengths)
            return self._attend_memory(x, memory, mask, maps)
        q, k, v = self._project(x, 0, self.num_heads + 2 * self.kv_heads).split(
            [self.num_heads, self.kv_heads, self.kv_heads], dim=1
        )
        turned = terms.rotary if self.window is None else terms.local_rotary
        if turned is not None:
            q, k = rotary(q, k, *turned)
        if cache is not None:
            cache.write(k, v)
        bias = terms.bias
        if self.relative is not None:
            bias = self.relative(terms.buckets).permute(0, 3, 1, 2)
        shared: Any = {
            "scale": self.scale,
            "window": self.window,
            "bias": bias,
            "alibi_slopes": terms.alibi_slopes,
        }
        if cache is None or cache.prompt:
            how = shared | {"mask": mask, "causal": causal, "key_lengths": key_lengths}
            out = attention(q, k, v, **how)
            if maps is not None:
                maps.append(attention_map(q, k, **how))
        else:
            index = cache.beam_index
            out = decode_attention(
                q, cache.keys, cache.values, cache.lengths, beam_index=index, **shared
            )
        return self._merge(out)

    def remember(self, memory: Tensor, lengths: Tensor | None = None) -> Memory:
        """Keys and values of a memory [M, N, E], to be attended to many times."""
        both = self._project(memory, self.num_heads, 2 * self.kv_heads)
        keys, values = both.split(self.kv_heads, dim=1)
        return Memory(keys, values, lengths)

    def _attend_memory(
        self, x: Tensor, memory: Memory, mask: Tensor | None, maps: list[Tensor] | None
    ) -> Tensor:
        rows, length, size = x.shape
        sentences = memory.keys.shape[0]
        if rows != sentences:  # beams become queries of their sentence
            if mask is not None or sentences == 0 or rows % sentences:
                raise ArgumentError(
                    f"MultiHeadAttention: x has {rows} rows and memory {sentences}; rows must be a "
                    "multiple of the memory's, and then takes no mask"
                )
            x = x.reshape(sentences, -1, size)
        q = self._project(x, 0, self.num_heads)
        how: Any = {"mask": mask, "key_lengths": memory.lengths, "scale": self.scale}
        out = attention(q, memory.keys, memory.values, **how)
        if maps is not None:
            maps.append(attention_map(q, memory.keys, **how))
        return self._merge(out).reshape(rows, length, size)

    def _project(self, x: Tensor, first_head: int, heads: int) -> Tensor:
        """Project x onto `heads` heads of the packed weights: [R, heads, S, D]."""
        size = self.in_proj_weight.shape[1]
        is_float_tensor("MultiHeadAttention", "x or memory", x)
        if x.dim() != 3 or x.shape[-1] != size:
            got = f"of shape {shape_of(x)}"
            raise fail("MultiHeadAttention", "x or memory", got, f"pass [rows, length, {size}]")
        if autocast_dtype(x.device) is None:
            matches("MultiHeadAttention", "x or memory", x, "in_proj_weight", self.in_proj_weight)
        rows = slice(first_head * self.head_size, (first_head + heads) * self.head_size)
        bias = None if self.in_proj_bias is None else self.in_proj_bias[rows]
        projected = project(x, self.in_proj_weight[rows], bias)
        return projected.unflatten(-1, (heads, -1)).transpose(1, 2)

    def _merge(self, out: Tensor) -> Tensor:
        return self.out_proj(out.transpose(1, 2).flatten(2))


def attention_map(q: Tensor, k: Tensor, **how: Any) -> Tensor:
    """The probabilities [R, H, S, N] of `attention` with these arguments: values = the identity."""
    one = torch.eye(k.shape[2], dtype=k.dtype, device=k.device)
    columns = one.split(MAP_COLUMNS, 1)
    shape = (*k.shape[:2], -1, -1)
    return torch.cat([attention(q, k, part.expand(shape), **how) for part in columns], -1)
