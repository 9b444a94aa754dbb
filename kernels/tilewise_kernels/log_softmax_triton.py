"""log-softmax in Triton: whole rows, and the k largest of each.

Shapes: x, y, grad, dx [M, V]; scores, ids [M, k]; of the pieces of a row: values, piece_ids
[M, PIECES, k], tops, totals [M, PIECES] float32.

Whole rows: a program holds ROWS rows and walks their columns twice, first for the largest value and
the sum of exponentials, then to write; the second walk finds a row of usual length in the L2 cache.
Top k: rows are few when decoding, so every row is cut into pieces. A program holds one piece, takes
its maximum k times and leaves k candidates; a second kernel, one program a row, does the same with
the candidates of all pieces. Every sum has one owner and one order.

The functions here launch kernels and nothing else: `log_softmax.py` validates and chooses.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .configs import TOPK, walk_config
from .launch import Compilation, Launch, as_rows, padded, refuses
from .lazy_triton import jit, load

tl: Any = None  # triton.language once load() has run

MOST_CANDIDATES = 4096  # that the second top-k kernel holds

# -- kernels -------------------------------------------------------------------------------------


@jit
def load_tile(x_ptr, rows, cols, M, V, stride_row, other):
    """float32 [ROWS, BLOCK] of a matrix whose columns are contiguous, `other` outside it."""
    ptrs = x_ptr + rows.to(tl.int64)[:, None] * stride_row + cols[None, :]
    return tl.load(ptrs, mask=(rows[:, None] < M) & (cols[None, :] < V), other=other).to(tl.float32)


@jit
def finite_top(top):
    """What to subtract before exp: the largest value, 0 where all are -inf."""
    return tl.where(top == float("-inf"), 0.0, top)


@jit
def normaliser(x_ptr, rows, M, V, stride_row, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """top and log_sum [ROWS]: log_softmax(x) = (x - top) - log_sum."""
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for start in range(0, V, BLOCK):
        x = load_tile(x_ptr, rows, start + tl.arange(0, BLOCK), M, V, stride_row, float("-inf"))
        higher = tl.maximum(top, tl.max(x, 1))
        shift = finite_top(higher)
        total = total * tl.exp(top - shift) + tl.sum(tl.exp(x - shift[:, None]), 1)
        top = higher
    return finite_top(top), tl.log(total)


@jit
def forward_kernel(
    x_ptr, y_ptr, M, V, stride_row, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """One program: y of ROWS rows."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    top, log_sum = normaliser(x_ptr, rows, M, V, stride_row, ROWS, BLOCK)
    for start in range(0, V, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        y = load_tile(x_ptr, rows, cols, M, V, stride_row, 0.0) - top[:, None] - log_sum[:, None]
        ptrs = y_ptr + rows.to(tl.int64)[:, None] * V + cols[None, :]
        inside = (rows[:, None] < M) & (cols[None, :] < V)
        tl.store(ptrs, y.to(y_ptr.dtype.element_ty), mask=inside)


@jit
def backward_kernel(
    grad_ptr, y_ptr, dx_ptr, M, V, stride_grad, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """One program: dx = grad - exp(y) * sum(grad) of ROWS rows."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros([ROWS], tl.float32)
    for start in range(0, V, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        total += tl.sum(load_tile(grad_ptr, rows, cols, M, V, stride_grad, 0.0), 1)
    for start in range(0, V, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        grad = load_tile(grad_ptr, rows, cols, M, V, stride_grad, 0.0)
        dx = grad - tl.exp(load_tile(y_ptr, rows, cols, M, V, V, 0.0)) * total[:, None]
        ptrs = dx_ptr + rows.to(tl.int64)[:, None] * V + cols[None, :]
        inside = (rows[:, None] < M) & (cols[None, :] < V)
        tl.store(ptrs, dx.to(dx_ptr.dtype.element_ty), mask=inside)


@jit
def best_of(values, ids, left, none):
    """The largest value still left and the lowest id that has it; (-inf, none) when all are taken.

    values, ids: one-dimensional; left: which of them may be taken. There is no NaN among values.
    """
    best = tl.max(tl.where(left, values, float("-inf")), 0)
    return best, tl.min(tl.where(left & (values == best), ids, none), 0)


@jit
def piece_kernel(
    x_ptr, values_ptr, ids_ptr, tops_ptr, totals_ptr, V, stride_row, pieces,
    K: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """Program (row, piece): the k best of the piece, its largest value and sum of exponentials."""
    program = tl.program_id(0).to(tl.int64)
    cols = (program % pieces) * PIECE + tl.arange(0, PIECE)
    left = cols < V
    x = tl.load(x_ptr + (program // pieces) * stride_row + cols, mask=left, other=float("-inf"))
    x = x.to(tl.float32)
    top = tl.max(x, 0)
    tl.store(tops_ptr + program, top)
    tl.store(totals_ptr + program, tl.sum(tl.exp(x - finite_top(top)), 0))
    x = tl.where(x == x, x, float("-inf"))  # a row with NaN is told by its sum
    for i in range(K):
        best, at = best_of(x, cols, left, V)
        tl.store(values_ptr + program * K + i, best)
        tl.store(ids_ptr + program * K + i, at)
        left = left & (cols != at)


@jit
def combine_kernel(
    values_ptr, piece_ids_ptr, tops_ptr, totals_ptr, scores_ptr, ids_ptr, V, pieces,
    K: tl.constexpr, PIECES: tl.constexpr, CANDIDATES: tl.constexpr,
):  # fmt: skip
    """Program row: the k best of the pieces' candidates, as log-probabilities."""
    row = tl.program_id(0).to(tl.int64)
    piece = tl.arange(0, PIECES)
    tops = tl.load(tops_ptr + row * pieces + piece, mask=piece < pieces, other=float("-inf"))
    totals = tl.load(totals_ptr + row * pieces + piece, mask=piece < pieces, other=0.0)
    top = finite_top(tl.max(tops, 0))
    log_sum = tl.log(tl.sum(totals * tl.exp(tops - top), 0))
    sound = tl.abs(log_sum) < float("inf")

    candidate = tl.arange(0, CANDIDATES)
    inside = candidate < pieces * K
    first = row * pieces * K
    ids = tl.load(piece_ids_ptr + first + candidate, mask=inside, other=V)
    values = tl.load(values_ptr + first + candidate, mask=inside, other=float("-inf"))
    left = ids < V
    for i in range(K):
        best, at = best_of(values, ids, left, V)
        score = tl.where(sound, best - top - log_sum, float("nan"))
        tl.store(scores_ptr + row * K + i, score)
        tl.store(ids_ptr + row * K + i, tl.where(sound, at, i))
        left = left & (ids != at)


# -- launchers -----------------------------------------------------------------------------------


def unit_rows(tensor: Tensor) -> Tensor:
    """[M, V] with column stride 1 (a copy only where the strides demand one)."""
    rows = as_rows(tensor)
    return rows if rows.stride(1) == 1 else rows.contiguous()


def tile(kernel: str, M: int, V: int) -> tuple[int, dict[str, Any], dict[str, Any]]:
    """Programs, constexpr arguments and options of a kernel that walks whole rows of [M, V]."""
    config = walk_config(kernel, V)
    options = {"num_warps": config.num_warps, "enable_fp_fusion": True}
    constants = {"ROWS": config.rows, "BLOCK": config.block_n}
    return -(-M // config.rows), constants, options


def forward_launch(x: Tensor, y: Tensor) -> Launch:
    """Launch that fills y [M, V]; x [M, V] has column stride 1."""
    M, V = x.shape
    programs, constants, options = tile("log_softmax forward", M, V)
    sizes = {"M": M, "V": V, "stride_row": x.stride(0)}
    arguments = {"x_ptr": x, "y_ptr": y, **sizes, **constants}
    return Launch(forward_kernel, (programs,), arguments, options)


def backward_launch(grad: Tensor, y: Tensor, dx: Tensor) -> Launch:
    """Launch that fills dx [M, V]; grad [M, V] has column stride 1, y is contiguous."""
    M, V = y.shape
    programs, constants, options = tile("log_softmax backward", M, V)
    sizes = {"M": M, "V": V, "stride_grad": grad.stride(0)}
    arguments = {"grad_ptr": grad, "y_ptr": y, "dx_ptr": dx, **sizes, **constants}
    return Launch(backward_kernel, (programs,), arguments, options)


def topk_launches(x: Tensor, k: int, scores: Tensor, ids: Tensor) -> Iterator[Launch]:
    """Launches that fill scores and ids [M, k]; x [M, V] has column stride 1."""
    M, V = x.shape
    piece = piece_of(V)
    pieces = -(-V // piece)
    values = scores.new_empty(M, pieces, k)
    piece_ids = ids.new_empty(M, pieces, k)
    tops, totals = (scores.new_empty(M, pieces) for _ in range(2))
    between = {"values_ptr": values, "tops_ptr": tops, "totals_ptr": totals, "pieces": pieces}
    first = {"x_ptr": x, "ids_ptr": piece_ids, "V": V, "stride_row": x.stride(0), "PIECE": piece}
    least, warps = TOPK["piece"]
    options = {"num_warps": warps if piece <= least else 2 * warps, "enable_fp_fusion": True}
    yield Launch(piece_kernel, (M * pieces,), between | first | {"K": k}, options)
    second = {"piece_ids_ptr": piece_ids, "scores_ptr": scores, "ids_ptr": ids, "V": V, "K": k}
    second |= {"PIECES": padded(pieces), "CANDIDATES": padded(pieces * k)}
    options = {"num_warps": TOPK["join"][1], "enable_fp_fusion": True}
    yield Launch(combine_kernel, (M,), between | second, options)


def piece_of(V: int) -> int:
    """Columns of a piece: a power of two, and a row has no more of them than the table says."""
    least, most = TOPK["piece"][0], TOPK["join"][0]
    return max(min(least, padded(V)), padded(-(-V // most)))


def forward(x: Tensor) -> Tensor:
    """log_softmax of x [..., V] over its last dim, in x's dtype."""
    load(globals())
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel():
        forward_launch(unit_rows(x), unit_rows(y)).run(x.device)
    return y


def backward(grad: Tensor, y: Tensor) -> Tensor:
    """dx [..., V] from grad and y = log_softmax(x), both [..., V]."""
    load(globals())
    dx = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    if y.numel():
        backward_launch(unit_rows(grad), unit_rows(y.contiguous()), unit_rows(dx)).run(y.device)
    return dx


def topk(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Of x [..., V]: scores [..., k] float32 [nats] and ids [..., k] int64, largest first."""
    load(globals())
    rows = unit_rows(x)
    scores = torch.empty(rows.shape[0], k, dtype=torch.float32, device=x.device)
    ids = torch.empty(rows.shape[0], k, dtype=torch.int64, device=x.device)
    if x.numel():
        for launch in topk_launches(rows, k, scores, ids):
            launch.run(x.device)
    shape = (*x.shape[:-1], k)
    return scores.view(shape), ids.view(shape)


def refuses_topk(x: Tensor, k: int) -> str | None:
    """What a top-k call has that the kernels here do not take, or None."""
    V = max(x.shape[-1], 1)
    if -(-V // piece_of(V)) * k > MOST_CANDIDATES:
        return f"k = {k} of {V} columns leaves more than {MOST_CANDIDATES} candidates"
    return refuses(x)


def compilations(arch: int) -> Iterator[Compilation]:
    """The launches worth compiling for `arch` where there is no GPU."""
    load(globals())
    for dtype in (torch.bfloat16, torch.float32):
        for V in (40, 1000, 50257, 200_000):
            x, y, grad = (torch.empty(1024, V, dtype=dtype, device="meta") for _ in range(3))
            kind = f"{str(dtype)[6:]} V{V}"
            quick = V == 50257
            for launch in (forward_launch(x, y), backward_launch(grad, y, x)):
                part = launch.kernel.__name__.removesuffix("_kernel")
                yield Compilation(f"log_softmax {part}", kind, launch, False, True, quick)
            for k in (1, 8, 64) if quick else (8,):
                scores = torch.empty(1024, k, device="meta")
                ids = torch.empty(1024, k, dtype=torch.int64, device="meta")
                for launch in topk_launches(x, k, scores, ids):
                    part = launch.kernel.__name__.removesuffix("_kernel")
                    name = f"log_softmax_topk {part}"
                    yield Compilation(name, f"{kind} k{k}", launch, False, True, quick and k == 8)
