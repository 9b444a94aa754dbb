"""Cross-entropy in Triton: losses, and the gradient of the logits, which may take their place.

Shapes: logits, dlogits [M, V]; target, losses [M]; statistics [M, 2]: the largest logit and the log
of the sum of exponentials; weight [M], or one number for all rows (stride 0).

A program holds ROWS rows and walks their columns. Every sum has one owner and one order. A target
out of range gives NaN: nothing is read outside the row.

The functions here launch kernels and nothing else: `cross_entropy.py` validates and chooses.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .launch import Compilation, Launch
from .lazy_triton import jit, load
from .log_softmax_triton import load_tile, normaliser, tile, unit_rows

tl: Any = None  # triton.language once load() has run

# -- kernels -------------------------------------------------------------------------------------


@jit
def losses_kernel(
    logits_ptr, target_ptr, losses_ptr, statistics_ptr, M, V, stride_row, ignored, smoothing, z,
    SMOOTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: loss and statistics of ROWS rows."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < M
    wide_rows = rows.to(tl.int64)
    target = tl.load(target_ptr + rows, mask=inside, other=0)
    skipped = target == ignored
    known = (target >= 0) & (target < V)
    top, log_sum = normaliser(logits_ptr, rows, M, V, stride_row, ROWS, BLOCK)
    at = logits_ptr + wide_rows * stride_row + tl.where(known, target, 0)
    picked = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    loss = log_sum - (1.0 - smoothing) * (picked - top)
    if SMOOTH:
        below = tl.zeros([ROWS], tl.float32)
        for start in range(0, V, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            x = load_tile(logits_ptr, rows, cols, M, V, stride_row, 0.0) - top[:, None]
            below += tl.sum(tl.where(cols[None, :] < V, x, 0.0), 1)
        loss -= smoothing * (below / V)
    lse = top + log_sum
    loss = tl.where(known, loss + z * lse * lse, float("nan"))
    tl.store(losses_ptr + rows, tl.where(skipped, 0.0, loss), mask=inside)
    tl.store(statistics_ptr + 2 * wide_rows, top, mask=inside)
    tl.store(statistics_ptr + 2 * wide_rows + 1, log_sum, mask=inside)


@jit
def dlogits_kernel(
    logits_ptr, target_ptr, statistics_ptr, weight_ptr, dlogits_ptr, M, V, stride_row,
    stride_weight, ignored, smoothing, z, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: dlogits of ROWS rows; dlogits may be the logits themselves."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < M
    wide_rows = rows.to(tl.int64)
    target = tl.load(target_ptr + rows, mask=inside, other=0)
    skipped = target == ignored
    top = tl.load(statistics_ptr + 2 * wide_rows, mask=inside, other=0.0)
    log_sum = tl.load(statistics_ptr + 2 * wide_rows + 1, mask=inside, other=0.0)
    weight = tl.load(weight_ptr + wide_rows * stride_weight, mask=inside, other=0.0)
    weight = tl.where((target >= 0) & (target < V), weight, float("nan"))
    scale = weight * (1.0 + 2.0 * z * (top + log_sum))
    for start in range(0, V, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        x = load_tile(logits_ptr, rows, cols, M, V, stride_row, 0.0)
        p = tl.exp(x - top[:, None] - log_sum[:, None])
        right = tl.where(cols[None, :] == target[:, None], 1.0 - smoothing, 0.0) + smoothing / V
        dx = tl.where(skipped[:, None], 0.0, p * scale[:, None] - right * weight[:, None])
        ptrs = dlogits_ptr + wide_rows[:, None] * V + cols[None, :]
        here = inside[:, None] & (cols[None, :] < V)
        tl.store(ptrs, dx.to(dlogits_ptr.dtype.element_ty), mask=here)


# -- launchers -----------------------------------------------------------------------------------


def losses_launch(
    rows: Tensor, target: Tensor, losses: Tensor, statistics: Tensor, *options: Any
) -> Launch:
    """Launch that fills losses and statistics; options: ignored, smoothing, z."""
    programs, constants, launch_options = tile("cross_entropy losses", *rows.shape)
    tensors = {"logits_ptr": rows, "target_ptr": target, "losses_ptr": losses}
    arguments = {**tensors, "statistics_ptr": statistics, **_numbers(rows, options)}
    smooth = {"SMOOTH": options[1] != 0}
    return Launch(losses_kernel, (programs,), arguments | smooth | constants, launch_options)


def dlogits_launch(
    weight: Tensor,
    rows: Tensor,
    target: Tensor,
    statistics: Tensor,
    dlogits: Tensor,
    *options: Any,
) -> Launch:
    """Launch that fills dlogits, contiguous; options: ignored, smoothing, z."""
    programs, constants, launch_options = tile("cross_entropy dlogits", *rows.shape)
    tensors = {"logits_ptr": rows, "target_ptr": target, "statistics_ptr": statistics}
    tensors |= {"weight_ptr": weight, "dlogits_ptr": dlogits}
    stride = {"stride_weight": weight.stride(0) if weight.dim() else 0}
    arguments = {**tensors, **stride, **_numbers(rows, options)}
    return Launch(dlogits_kernel, (programs,), arguments | constants, launch_options)


def _numbers(rows: Tensor, options: tuple[Any, ...]) -> dict[str, Any]:
    ignored, smoothing, z = options
    sizes = {"M": rows.shape[0], "V": rows.shape[1], "stride_row": rows.stride(0)}
    return sizes | {"ignored": ignored, "smoothing": smoothing, "z": z}


def losses(
    logits: Tensor, target: Tensor, ignored: int, smoothing: float, z: float
) -> tuple[Tensor, Tensor]:
    """Losses [...] and statistics [..., 2], float32, of logits [..., V] and target [...]."""
    load(globals())
    found = torch.empty(target.shape, dtype=torch.float32, device=logits.device)
    statistics = found.new_empty((*target.shape, 2))
    if target.numel():
        rows, flat = unit_rows(logits), target.reshape(-1).contiguous()
        launch = losses_launch(rows, flat, found, statistics, ignored, smoothing, z)
        launch.run(logits.device)
    return found, statistics


def dlogits(
    weight: Tensor,
    logits: Tensor,
    target: Tensor,
    statistics: Tensor,
    ignored: int,
    smoothing: float,
    z: float,
) -> Tensor:
    """dlogits [..., V] of weight [] or [...], what each row's gradient is multiplied with."""
    load(globals())
    found = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    _write_dlogits(weight, logits, target, statistics, found, ignored, smoothing, z)
    return found


def in_place(
    logits: Tensor, target: Tensor, weight: Tensor, ignored: int, smoothing: float, z: float
) -> Tensor:
    """Losses [...] float32; the gradient times weight, [] or [...], replaces logits [..., V]."""
    found, statistics = losses(logits, target, ignored, smoothing, z)
    _write_dlogits(weight, logits, target, statistics, logits, ignored, smoothing, z)
    return found


def _write_dlogits(
    weight: Tensor, logits: Tensor, target: Tensor, statistics: Tensor, out: Tensor, *options: Any
) -> None:
    if not target.numel():
        return
    weight = weight.reshape(-1) if weight.dim() else weight
    rows, flat = unit_rows(logits), target.reshape(-1).contiguous()
    dlogits_launch(weight, rows, flat, statistics.contiguous(), out, *options).run(out.device)


def compilations(arch: int) -> Iterator[Compilation]:
    """The launches worth compiling for `arch` where there is no GPU."""
    load(globals())
    for dtype in (torch.bfloat16, torch.float32):
        for V in (40, 1000, 50257):
            rows = torch.empty(1024, V, dtype=dtype, device="meta")
            target = torch.empty(1024, dtype=torch.int64, device="meta")
            statistics, weight = torch.empty(1024, 2, device="meta"), torch.empty((), device="meta")
            options = (-100, 0.1, 1e-4)
            for launch in (
                losses_launch(rows, target, weight, statistics, *options),
                dlogits_launch(weight, rows, target, statistics, rows, *options),
            ):
                name = f"cross_entropy {launch.kernel.__name__.removesuffix('_kernel')}"
                kind = f"{str(dtype)[6:]} V{V}"
                yield Compilation(name, kind, launch, False, True, V == 50257)
