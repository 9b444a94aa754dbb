"""Attention of packed sequences: many lengths in one call, without padding.

Sequence b is rows cu_seqlens_q[b] .. cu_seqlens_q[b + 1] of q and cu_seqlens_k[b] ..
cu_seqlens_k[b + 1] of k and v; its queries attend its keys alone, by the formula of attention.py:

    out_b = softmax(softcap(scale q_b k_b^T) - slopes |j - i'|, where diagonals allow) v_b

with i' = i + Sk_b - Sq_b. Memory: out and lse, and what attention saves; nothing is padded. FLOPs:
2 Hq (D + Dv) for each pair of a query and a key it sees, 2.5 times that backward; bytes: q, k, v,
out once.

Shapes: q [Tq, Hq, D]; k [Tk, Hkv, D]; v [Tk, Hkv, Dv]; Hq = G * Hkv; cu_seqlens [B + 1]; out
[Tq, Hq, Dv]; lse [Hq, Tq]. Tq, Tk are the lengths of all sequences together.

Dropout: sequence b drops what attention() of it alone would with the seed `seed ^ (b << 32)`: its
place in the batch matters, its neighbours do not.

Ways: triton (attention_triton.py), where each program finds its sequence by itself and no length
reaches the host; native (csrc/attention.cpp), one call too; torch, blocked and reference:
attention's ways of these names, called once for each run of sequences of equal lengths.
"""

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from . import dropout, lazy_triton, native
from .attention import OP as ATTENTION
from .attention import bounds, check_numbers, check_slopes, native_lacks, native_refuses
from .checks import (
    fail,
    has_shape,
    is_flag,
    is_float_tensor,
    is_index_tensor,
    is_whole,
    matches,
    same_device,
)
from .op import Cost, Implementation, Op, Outputs, accumulator, autocast_dtype, warn_once

NAME = "attention_varlen"
NO_MASKS = (None, None, None)  # attention's mask, bias and key_lengths


# -- once for each run of sequences of equal lengths ---------------------------------------------


class _Run(NamedTuple):
    """`sequences` neighbours of equal lengths, from sequence `first` on; none of them is empty."""

    first: int
    sequences: int
    rows: slice
    keys: slice

    def batch(self, packed: Tensor, where: slice) -> Tensor:
        """These rows of [T, heads, width] as [sequences, heads, length, width]."""
        return packed[where].unflatten(0, (self.sequences, -1)).transpose(1, 2)

    def lse(self, lse: Tensor) -> Tensor:
        """Its part of [Hq, Tq] as [sequences, Hq, length]."""
        return lse[:, self.rows].unflatten(1, (self.sequences, -1)).transpose(0, 1)


def _runs(q: Tensor, k: Tensor, cu_q: Tensor, cu_k: Tensor, together: bool) -> Iterator[_Run]:
    """All sequences that have queries and keys; with `together` as few runs as there can be."""
    edges_q, edges_k = cu_q.tolist(), cu_k.tolist()
    _check_edges("cu_seqlens_q", edges_q, q.shape[0], "q")  # a compiled graph has not
    _check_edges("cu_seqlens_k", edges_k, k.shape[0], "k")
    first, count = 0, len(edges_q) - 1
    while first < count:
        length = (edges_q[first + 1] - edges_q[first], edges_k[first + 1] - edges_k[first])
        end = first + 1
        while together and end < count and length == (
            edges_q[end + 1] - edges_q[end], edges_k[end + 1] - edges_k[end]
        ):  # fmt: skip
            end += 1
        if min(length) > 0:
            rows, keys = slice(edges_q[first], edges_q[end]), slice(edges_k[first], edges_k[end])
            yield _Run(first, end - first, rows, keys)
        first = end


def _scoring(run: _Run, alibi_slopes: Tensor | None, seed: Tensor | None, *numbers: Any) -> Any:
    """attention's canonical arguments after q, k, v for a run."""
    if seed is not None:
        seed = seed ^ (run.first << 32)
    return (*NO_MASKS, alibi_slopes, seed, *numbers)


def _whole(x: Tensor) -> Tensor:
    """[T, heads, width] as [1, heads, T, width]."""
    return x.transpose(0, 1)[None]


def _by_runs(name: str) -> Implementation:
    """attention's way of that name as a way of this op."""
    way = ATTENTION.implementations[name]

    def forward(
        q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, *scoring: Any
    ) -> Outputs:
        out = q.new_zeros(*q.shape[:2], v.shape[2])
        lse = q.new_full((q.shape[1], q.shape[0]), -torch.inf, dtype=accumulator(q.dtype))
        for run in _runs(q, k, cu_q, cu_k, together=scoring[1] is None):
            tensors = run.batch(q, run.rows), run.batch(k, run.keys), run.batch(v, run.keys)
            part, part_lse = way.forward(*tensors, *_scoring(run, *scoring))
            run.batch(out, run.rows).copy_(part)
            run.lse(lse).copy_(part_lse)
        return out, lse

    def backward(
        grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
        cu_q: Tensor, cu_k: Tensor, *rest: Any,
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        *scoring, needs = rest
        wanted = zip((q, k, v), needs, strict=True)
        sums = [x.new_zeros(x.shape) if need else None for x, need in wanted]
        for run in _runs(q, k, cu_q, cu_k, together=scoring[1] is None):
            tensors = run.batch(q, run.rows), run.batch(k, run.keys), run.batch(v, run.keys)
            known = run.batch(out, run.rows), run.lse(lse).contiguous()
            given = (run.batch(grad, run.rows), *tensors, *known, *_scoring(run, *scoring))
            parts = way.backward(*given, [*needs, False])
            for total, part, where in zip(
                sums, parts, (run.rows, run.keys, run.keys), strict=False
            ):
                if total is not None and part is not None:
                    run.batch(total, where).copy_(part)
        return tuple(sums)

    return Implementation(
        name,
        forward,
        backward,
        devices=way.devices,
        missing=way.missing,
        slower=lambda q, k, v, cu_q, cu_k, *scoring: way.slower(
            _whole(q), _whole(k), _whole(v), *NO_MASKS, *scoring
        ),
        refuses=lambda q, k, v, cu_q, cu_k, *scoring: way.refuses(
            _whole(q), _whole(k), _whole(v), *NO_MASKS, *scoring
        ),
        refuses_backward=lambda grad, q, k, v, out, lse, cu_q, cu_k, *rest: (
            way.slower(_whole(q), _whole(k), _whole(v), *NO_MASKS, *rest[:-1])
            or way.refuses(_whole(q), _whole(k), _whole(v), *NO_MASKS, *rest[:-1])
        ),
    )


# -- native --------------------------------------------------------------------------------------


def _native_forward(q: Tensor, *rest: Any) -> Outputs:
    return native.op("attention_varlen_forward")(q, *rest)


def _native_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *rest: Any
) -> tuple[Tensor | None, ...]:
    if lost := native_refuses(q):  # oneDNN was there in forward and has been turned off
        warn_once(f"tilewise: {NAME}'s backward leaves its native way: {lost}")
        return OP.implementations["blocked"].backward(grad, q, k, v, out, lse, *rest)
    return native.op("attention_varlen_backward")(grad, q, k, v, lse, *rest[:-1])


# -- triton --------------------------------------------------------------------------------------


def _triton_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, *scoring: Any
) -> tuple[Tensor, Tensor]:
    from . import attention_triton

    given: list[Any] = [_whole(q), _whole(k), _whole(v), *NO_MASKS, *scoring]
    given += [cu_q.contiguous(), cu_k.contiguous()]
    return attention_triton.forward(*given)


def _triton_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    cu_q: Tensor, cu_k: Tensor, *rest: Any,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    from . import attention_triton

    *scoring, needs = rest
    given: list[Any] = [grad, _whole(q), _whole(k), _whole(v), out, lse, *NO_MASKS, *scoring]
    given += [[*needs, False], cu_q.contiguous(), cu_k.contiguous()]
    return attention_triton.backward(*given)[:3]


def _triton_refuses(q: Tensor, k: Tensor, v: Tensor, *_: object) -> str | None:
    return ATTENTION.implementations["triton"].refuses(_whole(q), _whole(k), _whole(v))


# -- the op --------------------------------------------------------------------------------------


def cost(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, slopes: Tensor | None,
    seed: Tensor | None, causal: bool, left: int, right: int, *_: object,
) -> Cost:  # fmt: skip
    """2 Hq (D + Dv) FLOPs for each pair of a query and a key it sees; q, k, v, out moved once."""
    pairs = 0
    reach = 0 if causal else right
    for run in _runs(q, k, cu_q, cu_k, together=True):
        sq = (run.rows.stop - run.rows.start) // run.sequences
        sk = (run.keys.stop - run.keys.start) // run.sequences
        at = torch.arange(sq) + sk - sq
        first = (at - left).clamp(0, sk) if left >= 0 else torch.zeros_like(at)
        last = (at + reach + 1).clamp(0, sk) if reach >= 0 else torch.full_like(at, sk)
        pairs += run.sequences * int((last - first).clamp(min=0).sum())
    flops = 2 * q.shape[1] * pairs * (q.shape[2] + v.shape[2])
    outputs = q.shape[0] * q.shape[1] * v.shape[2]
    moved = (q.numel() + k.numel() + v.numel() + outputs) * q.element_size()
    return Cost(flops, moved, flops * 5 // 2, 2 * moved + outputs * q.element_size())


def _fake(q: Tensor, k: Tensor, v: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    lse = q.new_empty(q.shape[1], q.shape[0], dtype=accumulator(q.dtype))
    return q.new_empty(*q.shape[:2], v.shape[2]), lse


_LENGTHS = "Tensor cu_seqlens_q, Tensor cu_seqlens_k"
_SCORING = (
    "Tensor? alibi_slopes, Tensor? seed, bool causal, int left, int right, float softcap, "
    "float scale, float dropout_p"
)

OP = Op(
    NAME,
    schema=f"(Tensor q, Tensor k, Tensor v, {_LENGTHS}, {_SCORING}) -> (Tensor, Tensor)",
    backward_schema="(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{_LENGTHS}, {_SCORING}) -> (Tensor, Tensor, Tensor)",
    implementations=[
        Implementation(
            "triton",
            _triton_forward,
            _triton_backward,
            devices=("cuda",),
            missing=lazy_triton.missing,
            refuses=_triton_refuses,
            refuses_backward=lambda grad, q, k, v, *_: _triton_refuses(q, k, v),
        ),
        Implementation(
            "native",
            _native_forward,
            _native_backward,
            devices=("cpu",),
            missing=native.missing,
            refuses=native_refuses,
            slower=native_lacks,
            refuses_backward=lambda grad, q, *_: native_refuses(q),
        ),
        *(_by_runs(name) for name in ("torch", "blocked", "reference")),
    ],
    fake=_fake,
    fake_backward=lambda grad, q, k, v, *_: tuple(t.new_empty(t.shape) for t in (q, k, v)),
    save=lambda args, outputs: ((*args[:3], *outputs, *args[3:7]), args[7:13]),
    inputs_with_grad=(0, 1, 2),
    cost=cost,
)


# -- the public function -------------------------------------------------------------------------


def _check_packed(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        is_float_tensor(NAME, name, tensor, min_dims=3)
        if tensor.dim() != 3:
            raise fail(NAME, name, f"{tensor.dim()}-dimensional", "pass [total, heads, dim]")
    matches(NAME, "k", k, "q", q)
    matches(NAME, "v", v, "q", q)
    (total, heads, _), d = k.shape, q.shape[2]
    has_shape(NAME, "k", k, (total, heads, d), "its own rows and heads, head dim of q")
    has_shape(NAME, "v", v, (total, heads, v.shape[2]), "rows and heads of k, its own head dim")
    if heads == 0 or q.shape[1] % heads:
        raise fail(NAME, "k", f"of {heads} heads", f"q has {q.shape[1]}: pass a divisor of that")


def _check_lengths(name: str, cu: Tensor, packed: Tensor, longest: object, letter: str) -> None:
    """cu_seqlens and max_seqlen of one side; values are read only where that stalls nothing."""
    is_index_tensor(NAME, name, cu)
    if cu.dim() != 1 or cu.shape[0] < 1:
        raise fail(NAME, name, f"of shape {list(cu.shape)}", "it must be [sequences + 1]")
    same_device(NAME, name, cu, letter, packed)
    limit = f"max_seqlen_{letter}"
    if longest is not None and not (is_whole(longest) and longest >= 0):  # type: ignore[operator]
        raise fail(NAME, limit, repr(longest), "pass a number >= 0, or None")
    # a GPU's kernels clamp; in a compiled graph the implementations of a CPU check
    if not cu.is_cpu or torch.compiler.is_compiling():
        return
    longest_found = _check_edges(name, cu.tolist(), packed.shape[0], letter)
    if isinstance(longest, int) and longest_found > longest:
        raise fail(NAME, limit, longest, f"{name} has a sequence of {longest_found}")


def _check_edges(name: str, edges: list[int], total: int, letter: str) -> int:
    """The longest sequence; raises unless the edges rise from 0 to `total`."""
    lengths = [after - before for before, after in zip(edges, edges[1:], strict=False)]
    if edges[0] != 0:
        raise fail(NAME, name, f"one that begins with {edges[0]}", "it must begin with 0")
    if lengths and min(lengths) < 0:
        at = next(i for i, length in enumerate(lengths) if length < 0)
        got = f"falling from {edges[at]} to {edges[at + 1]} at entry {at + 1}"
        raise fail(NAME, name, got, "each entry must be >= the one before")
    if edges[-1] != total:
        takes = f"it must end with {total}, the rows of {letter}"
        raise fail(NAME, name, f"one that ends with {edges[-1]}", takes)
    return max(lengths, default=0)


@overload
def attention_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, *,
    causal: bool = False, window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None, alibi_slopes: Tensor | None = None, scale: float | None = None,
    dropout_p: float = 0.0, max_seqlen_q: int | None = None, max_seqlen_k: int | None = None,
    return_lse: Literal[False] = False,
) -> Tensor: ...  # fmt: skip
@overload
def attention_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, *,
    causal: bool = False, window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None, alibi_slopes: Tensor | None = None, scale: float | None = None,
    dropout_p: float = 0.0, max_seqlen_q: int | None = None, max_seqlen_k: int | None = None,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """attention() of many packed sequences, each of which sees its own keys alone.

    q: [Tq, Hq, D]; k: [Tk, Hkv, D]; v: [Tk, Hkv, Dv]; Hq a multiple of Hkv; one dtype of float32,
    float16, bfloat16, float64; any strides. cu_seqlens_q, cu_seqlens_k: [B + 1] int32 or int64 on
    the device of q, the row where each sequence begins and, last, Tq or Tk; a sequence may be
    empty. On a GPU their values are not read by the host: entries outside 0..T or below the one
    before are clamped, and rows that belong to no sequence give out 0, gradient 0, lse -inf.
    causal, window, softcap, alibi_slopes ([Hq]), scale, dropout_p: as in attention(), within each
    sequence. max_seqlen_q, max_seqlen_k: not needed; taken because other libraries ask for them,
    and on the CPU checked to be no less than the longest sequence.
    Returns out [Tq, Hq, Dv] in q's dtype, and with return_lse also the log-sum-exp of the scores
    [Hq, Tq], float32 (float64 for float64), without gradient. The rows equal those of attention()
    on each sequence; a query whose sequence leaves it no key gives out 0, gradient 0, lse -inf.
    Differentiable in q, k, v; deterministic. Under autocast q, k, v are cast to its dtype. Raises
    ArgumentError for anything else. Source: Dao 2023 (FlashAttention-2).
    """
    _check_packed(q, k, v)
    _check_lengths("cu_seqlens_q", cu_seqlens_q, q, max_seqlen_q, "q")
    _check_lengths("cu_seqlens_k", cu_seqlens_k, k, max_seqlen_k, "k")
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        got = f"of {cu_seqlens_k.shape[0]} entries"
        takes = f"cu_seqlens_q has {cu_seqlens_q.shape[0]}: both are [sequences + 1]"
        raise fail(NAME, "cu_seqlens_k", got, takes)
    is_flag(NAME, "causal", causal)
    is_flag(NAME, "return_lse", return_lse)
    check_slopes(NAME, alibi_slopes, q)
    check_numbers(NAME, scale, softcap, dropout_p)
    left, right = bounds(NAME, window)
    dtype = autocast_dtype(q.device)
    if dtype is not None and q.dtype != torch.float64:
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    d = q.shape[2]
    scale = d**-0.5 if scale is None and d else float(scale or 0.0)
    seed = dropout.draw_seed(q.device) if dropout_p else None
    numbers = (causal, left, right, float(softcap or 0.0), scale, float(dropout_p))
    out, lse = OP(q, k, v, cu_seqlens_q, cu_seqlens_k, alibi_slopes, seed, *numbers)
    return (out, lse) if return_lse else out
