"""Layer and RMS normalisation in Triton: rows of s = dropout(x) + residual, forward and backward.

Shapes: x, residual, s, y, grad, grad_s, ds, dx [M, N]; weight, bias [N]; mean, rstd [M] float32;
the partial sums of dweight and dbias [programs, N] float32; seed [1]. A norm without a mean (RMS)
has mean_ptr None and no mean(g).

Forward: a program holds whole rows, several when they are short, and reads each once. Backward:
few programs walk over all rows, load the next tile while they work on one, and keep their sums of
dweight and dbias in registers; each writes one row of partial sums at its end, and one sum reduces
those. Longer rows are walked over twice in blocks of columns, the second time out of L2, and their
sums are left to a kernel that walks down strips of columns. Every sum has one owner and one order.
A tile that divides the matrix loads and stores without masks.

The functions here launch kernels and nothing else: `norm.py` validates and chooses.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .configs import norm_config
from .dropout import kept_at, mixed_rows, scale, threshold
from .launch import Compilation, Launch, as_rows, multiprocessors, strides
from .lazy_triton import jit, load

tl: Any = None  # triton.language once load() has run

ROW_COLUMNS = 16384  # longest row that one program holds: 64 KB in float32
SUM_COLUMNS = 8192  # longest row whose dweight and dbias sums one program holds besides
BACKWARD_STAGES = 2  # tiles that backward_kernel has in flight

Outputs = tuple[Tensor, Tensor, Tensor, Tensor]  # y, s, mean, rstd; empty where not wanted
Gradients = tuple[Tensor | None, ...]  # of x, residual, weight and bias


# -- kernels -------------------------------------------------------------------------------------


@jit
def load_rows(
    ptr, rows, cols, M, N, stride_row, stride_col, EVEN_M: tl.constexpr, EVEN_N: tl.constexpr
):  # fmt: skip
    """float32 tile of a [M, N] matrix, 0 outside it; no mask where the tile divides the matrix."""
    ptrs = ptr + rows.to(tl.int64)[:, None] * stride_row + cols.to(tl.int64)[None, :] * stride_col
    if EVEN_M and EVEN_N:
        tile = tl.load(ptrs)
    elif EVEN_M:
        tile = tl.load(ptrs, mask=cols[None, :] < N, other=0.0)
    elif EVEN_N:
        tile = tl.load(ptrs, mask=rows[:, None] < M, other=0.0)
    else:
        tile = tl.load(ptrs, mask=(rows[:, None] < M) & (cols[None, :] < N), other=0.0)
    return tile.to(tl.float32)


@jit
def store_rows(ptr, tile, rows, cols, M, N, EVEN_M: tl.constexpr, EVEN_N: tl.constexpr):
    """Write a tile into a contiguous [M, N] matrix."""
    ptrs = ptr + rows.to(tl.int64)[:, None] * N + cols[None, :]
    tile = tile.to(ptr.dtype.element_ty)
    if EVEN_M and EVEN_N:
        tl.store(ptrs, tile)
    elif EVEN_M:
        tl.store(ptrs, tile, mask=cols[None, :] < N)
    elif EVEN_N:
        tl.store(ptrs, tile, mask=rows[:, None] < M)
    else:
        tl.store(ptrs, tile, mask=(rows[:, None] < M) & (cols[None, :] < N))


@jit
def load_vector(ptr, cols, N, EVEN_N: tl.constexpr):
    """float32 [1, BLOCK_N] of a contiguous [N] vector."""
    if EVEN_N:
        vector = tl.load(ptr + cols)
    else:
        vector = tl.load(ptr + cols, mask=cols < N, other=0.0)
    return vector.to(tl.float32)[None, :]


@jit
def dropped(tile, seed_ptr, rows, cols, threshold, scale):
    """What dropout leaves of a tile."""
    mixed = mixed_rows(tl.load(seed_ptr), rows.to(tl.int64))
    return tl.where(kept_at(mixed[:, None], cols[None, :], threshold), tile * scale, 0.0)


@jit
def load_sum(
    x_ptr, residual_ptr, seed_ptr, rows, cols, M, N, threshold, scale,
    stride_xm, stride_xn, stride_rm, stride_rn,
    EVEN_M: tl.constexpr, EVEN_N: tl.constexpr,
):  # fmt: skip
    """A tile of s, rounded as it is stored: what backward will read."""
    s = load_rows(x_ptr, rows, cols, M, N, stride_xm, stride_xn, EVEN_M, EVEN_N)
    if seed_ptr is not None:
        s = dropped(s, seed_ptr, rows, cols, threshold, scale)
    if residual_ptr is not None:
        s += load_rows(residual_ptr, rows, cols, M, N, stride_rm, stride_rn, EVEN_M, EVEN_N)
        s = s.to(residual_ptr.dtype.element_ty).to(tl.float32)
    elif seed_ptr is not None:
        s = s.to(x_ptr.dtype.element_ty).to(tl.float32)
    return s


@jit
def scaled(normal, weight_ptr, bias_ptr, cols, N, EVEN_N: tl.constexpr):
    """y, from the normalised tile."""
    if weight_ptr is not None:
        normal *= load_vector(weight_ptr, cols, N, EVEN_N)
    if bias_ptr is not None:
        normal += load_vector(bias_ptr, cols, N, EVEN_N)
    return normal


@jit
def centred_at(s, mean, cols, N, EVEN_N: tl.constexpr):
    """s - mean, 0 past the last column."""
    centred = s - mean[:, None]
    if not EVEN_N:
        centred = tl.where(cols[None, :] < N, centred, 0.0)
    return centred


@jit
def store_statistics(mean_ptr, rstd_ptr, mean, rstd, rows, M):
    """mean and rstd [ROWS] to [M], each where it is wanted."""
    if mean_ptr is not None:
        tl.store(mean_ptr + rows, mean, mask=rows < M)
    if rstd_ptr is not None:
        tl.store(rstd_ptr + rows, rstd, mask=rows < M)


@jit
def forward_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, seed_ptr, y_ptr, s_ptr, mean_ptr, rstd_ptr,
    M, N, eps, threshold, scale, stride_xm, stride_xn, stride_rm, stride_rn,
    RMS: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
    EVEN_M: tl.constexpr, EVEN_N: tl.constexpr,
):  # fmt: skip
    """One program: ROWS whole rows."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK_N)
    s = load_sum(x_ptr, residual_ptr, seed_ptr, rows, cols, M, N, threshold, scale,
                 stride_xm, stride_xn, stride_rm, stride_rn, EVEN_M, EVEN_N)  # fmt: skip
    if s_ptr is not None:
        store_rows(s_ptr, s, rows, cols, M, N, EVEN_M, EVEN_N)
    if RMS:
        mean = tl.zeros([ROWS], dtype=tl.float32)
        centred = s
    else:
        mean = tl.sum(s, 1) / N
        mean += tl.sum(centred_at(s, mean, cols, N, EVEN_N), 1) / N  # a large sum is rounded
        centred = centred_at(s, mean, cols, N, EVEN_N)
    rstd = 1.0 / tl.sqrt_rn(tl.sum(centred * centred, 1) / N + eps)
    y = scaled(centred * rstd[:, None], weight_ptr, bias_ptr, cols, N, EVEN_N)
    store_rows(y_ptr, y, rows, cols, M, N, EVEN_M, EVEN_N)
    store_statistics(mean_ptr, rstd_ptr, mean, rstd, rows, M)


@jit
def forward_long_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, seed_ptr, y_ptr, s_ptr, mean_ptr, rstd_ptr,
    M, N, eps, threshold, scale, stride_xm, stride_xn, stride_rm, stride_rn,
    RMS: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
    EVEN_M: tl.constexpr, EVEN_N: tl.constexpr,
):  # fmt: skip
    """ROWS rows in blocks of columns: once for the statistics, once more for y.

    The blocks' means and centred squares combine exactly (Chan, Golub and LeVeque 1979).
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mean = tl.zeros([ROWS], dtype=tl.float32)
    squares = tl.zeros([ROWS], dtype=tl.float32)
    for start in range(0, N, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        s = load_sum(x_ptr, residual_ptr, seed_ptr, rows, cols, M, N, threshold, scale,
                     stride_xm, stride_xn, stride_rm, stride_rn, EVEN_M, EVEN_N)  # fmt: skip
        if s_ptr is not None:
            store_rows(s_ptr, s, rows, cols, M, N, EVEN_M, EVEN_N)
        if RMS:
            squares += tl.sum(s * s, 1)
        else:
            count = tl.minimum(N - start, BLOCK_N).to(tl.float32)
            block_mean = tl.sum(s, 1) / count
            block_mean += tl.sum(centred_at(s, block_mean, cols, N, EVEN_N), 1) / count
            centred = centred_at(s, block_mean, cols, N, EVEN_N)
            apart = block_mean - mean
            share = count / (start + count)
            mean += apart * share
            squares += tl.sum(centred * centred, 1) + apart * apart * share * start
    rstd = 1.0 / tl.sqrt_rn(squares / N + eps)
    for start in range(0, N, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        s = load_sum(x_ptr, residual_ptr, seed_ptr, rows, cols, M, N, threshold, scale,
                     stride_xm, stride_xn, stride_rm, stride_rn, EVEN_M, EVEN_N)  # fmt: skip
        normal = (s - mean[:, None]) * rstd[:, None]
        y = scaled(normal, weight_ptr, bias_ptr, cols, N, EVEN_N)
        store_rows(y_ptr, y, rows, cols, M, N, EVEN_M, EVEN_N)
    store_statistics(mean_ptr, rstd_ptr, mean, rstd, rows, M)


@jit
def load_statistics(mean_ptr, rstd_ptr, rows, M, ROWS: tl.constexpr):
    """mean (0 where there is none) and rstd, [ROWS, 1] each."""
    if mean_ptr is not None:
        mean = tl.load(mean_ptr + rows, mask=rows < M, other=0.0)
    else:
        mean = tl.zeros([ROWS], dtype=tl.float32)
    return mean[:, None], tl.load(rstd_ptr + rows, mask=rows < M, other=0.0)[:, None]


@jit
def store_gradients(
    ds, grad_s_ptr, seed_ptr, dx_ptr, ds_ptr, rows, cols, M, N, threshold, scale,
    stride_hm, stride_hn, EVEN_M: tl.constexpr, EVEN_N: tl.constexpr,
):  # fmt: skip
    """Add the gradient that came through s, and write those of the residual and of x."""
    if grad_s_ptr is not None:
        ds += load_rows(grad_s_ptr, rows, cols, M, N, stride_hm, stride_hn, EVEN_M, EVEN_N)
    if ds_ptr is not None:
        store_rows(ds_ptr, ds, rows, cols, M, N, EVEN_M, EVEN_N)
    if dx_ptr is not None:
        if seed_ptr is not None:
            ds = dropped(ds, seed_ptr, rows, cols, threshold, scale)
        store_rows(dx_ptr, ds, rows, cols, M, N, EVEN_M, EVEN_N)


@jit
def backward_kernel(
    grad_ptr, grad_s_ptr, s_ptr, weight_ptr, mean_ptr, rstd_ptr, seed_ptr, dx_ptr, ds_ptr,
    dweight_ptr, dbias_ptr, M, N, programs, threshold, scale,
    stride_gm, stride_gn, stride_hm, stride_hn, stride_sm, stride_sn,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
    EVEN_M: tl.constexpr, EVEN_N: tl.constexpr,
):  # fmt: skip
    """Program p: tiles p, p + programs, ... of ROWS rows, and row p of the partial sums."""
    first = tl.program_id(0)
    cols = tl.arange(0, BLOCK_N)
    if weight_ptr is not None:
        weight = load_vector(weight_ptr, cols, N, EVEN_N)
    dweight = tl.zeros([ROWS, BLOCK_N], dtype=tl.float32)
    dbias = tl.zeros([ROWS, BLOCK_N], dtype=tl.float32)
    for tile in tl.range(first, tl.cdiv(M, ROWS), programs, num_stages=STAGES):
        rows = tile * ROWS + tl.arange(0, ROWS)
        grad = load_rows(grad_ptr, rows, cols, M, N, stride_gm, stride_gn, EVEN_M, EVEN_N)
        s = load_rows(s_ptr, rows, cols, M, N, stride_sm, stride_sn, EVEN_M, EVEN_N)
        mean, rstd = load_statistics(mean_ptr, rstd_ptr, rows, M, ROWS)
        normal = (s - mean) * rstd
        if dweight_ptr is not None:
            dweight += grad * normal
        if dbias_ptr is not None:
            dbias += grad
        if (dx_ptr is not None) or (ds_ptr is not None):
            g = grad
            if weight_ptr is not None:
                g *= weight
            # columns past N hold g = 0, so that the two means need no mask
            ds = g - normal * (tl.sum(g * normal, 1) / N)[:, None]
            if mean_ptr is not None:
                ds -= (tl.sum(g, 1) / N)[:, None]
            store_gradients(ds * rstd, grad_s_ptr, seed_ptr, dx_ptr, ds_ptr, rows, cols, M, N,
                            threshold, scale, stride_hm, stride_hn, EVEN_M, EVEN_N)  # fmt: skip
    partial = first.to(tl.int64) * N + cols
    if dweight_ptr is not None:
        tl.store(dweight_ptr + partial, tl.sum(dweight, 0), mask=cols < N)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + partial, tl.sum(dbias, 0), mask=cols < N)


@jit
def backward_long_kernel(
    grad_ptr, grad_s_ptr, s_ptr, weight_ptr, mean_ptr, rstd_ptr, seed_ptr, dx_ptr, ds_ptr,
    M, N, threshold, scale, stride_gm, stride_gn, stride_hm, stride_hn, stride_sm, stride_sn,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, EVEN_M: tl.constexpr, EVEN_N: tl.constexpr,
):  # fmt: skip
    """ds and dx of ROWS rows in blocks of columns: once for the two means, once more to write."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mean, rstd = load_statistics(mean_ptr, rstd_ptr, rows, M, ROWS)
    slope = tl.zeros([ROWS], dtype=tl.float32)
    centre = tl.zeros([ROWS], dtype=tl.float32)
    for start in range(0, N, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        g = load_rows(grad_ptr, rows, cols, M, N, stride_gm, stride_gn, EVEN_M, EVEN_N)
        s = load_rows(s_ptr, rows, cols, M, N, stride_sm, stride_sn, EVEN_M, EVEN_N)
        g = scaled(g, weight_ptr, None, cols, N, EVEN_N)
        slope += tl.sum(g * ((s - mean) * rstd), 1)
        if mean_ptr is not None:
            centre += tl.sum(g, 1)
    for start in range(0, N, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        g = load_rows(grad_ptr, rows, cols, M, N, stride_gm, stride_gn, EVEN_M, EVEN_N)
        s = load_rows(s_ptr, rows, cols, M, N, stride_sm, stride_sn, EVEN_M, EVEN_N)
        g = scaled(g, weight_ptr, None, cols, N, EVEN_N)
        ds = (g - (centre / N)[:, None] - (s - mean) * rstd * (slope / N)[:, None]) * rstd
        store_gradients(ds, grad_s_ptr, seed_ptr, dx_ptr, ds_ptr, rows, cols, M, N,
                        threshold, scale, stride_hm, stride_hn, EVEN_M, EVEN_N)  # fmt: skip


@jit
def weight_kernel(
    grad_ptr, s_ptr, mean_ptr, rstd_ptr, dweight_ptr, dbias_ptr,
    M, N, programs, stride_gm, stride_gn, stride_sm, stride_sn,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, EVEN_M: tl.constexpr, EVEN_N: tl.constexpr,
):  # fmt: skip
    """The partial sums alone, for rows too long for backward_kernel: BLOCK_N columns of row p."""
    first = tl.program_id(0) % programs
    cols = tl.program_id(0) // programs * BLOCK_N + tl.arange(0, BLOCK_N)
    dweight = tl.zeros([ROWS, BLOCK_N], dtype=tl.float32)
    dbias = tl.zeros([ROWS, BLOCK_N], dtype=tl.float32)
    for tile in range(first, tl.cdiv(M, ROWS), programs):
        rows = tile * ROWS + tl.arange(0, ROWS)
        grad = load_rows(grad_ptr, rows, cols, M, N, stride_gm, stride_gn, EVEN_M, EVEN_N)
        s = load_rows(s_ptr, rows, cols, M, N, stride_sm, stride_sn, EVEN_M, EVEN_N)
        mean, rstd = load_statistics(mean_ptr, rstd_ptr, rows, M, ROWS)
        dweight += grad * ((s - mean) * rstd)
        dbias += grad
    partial = first.to(tl.int64) * N + cols
    if dweight_ptr is not None:
        tl.store(dweight_ptr + partial, tl.sum(dweight, 0), mask=cols < N)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + partial, tl.sum(dbias, 0), mask=cols < N)


# -- launchers -----------------------------------------------------------------------------------


def _dropout(seed: Tensor | None, p: float) -> dict[str, Any]:
    return {"seed_ptr": seed, "threshold": threshold(p), "scale": scale(p)}


def _present(tensor: Tensor | None) -> Tensor | None:
    """None for an empty tensor, which stands for one that is not wanted."""
    return tensor if tensor is not None and tensor.numel() else None


def forward_launch(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    eps: float,
    dropout_p: float,
    outputs: Outputs,
    rms: bool,
) -> Launch:
    """Launch that fills the outputs that are not empty; x and residual are [M, N]."""
    M, N = x.shape
    y, s, mean, rstd = (_present(output) for output in outputs)
    whole = N <= ROW_COLUMNS
    tile, options = _tile("forward" if whole else "forward_long", M, N)
    arguments = {
        "x_ptr": x, "residual_ptr": residual, "weight_ptr": weight, "bias_ptr": bias,
        "y_ptr": y, "s_ptr": s, "mean_ptr": mean, "rstd_ptr": rstd,
        "M": M, "N": N, "eps": eps, "RMS": rms,
        **strides("x", "mn", x), **strides("r", "mn", residual), **_dropout(seed, dropout_p),
        **tile,
    }  # fmt: skip
    kernel = forward_kernel if whole else forward_long_kernel
    return Launch(kernel, (-(-M // tile["ROWS"]),), arguments, options)


def backward_launches(
    grad: Tensor,
    grad_s: Tensor | None,
    s: Tensor,
    weight: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    seed: Tensor | None,
    dropout_p: float,
    dx: Tensor | None,
    ds: Tensor | None,
    partial: list[Tensor | None],
) -> Iterator[Launch]:
    """Launches that fill dx and ds [M, N] and the partial sums [programs, N] of dweight and dbias.

    One kernel does both, up to the row length whose sums fit in registers.
    """
    M, N = s.shape
    programs = next((p.shape[0] for p in partial if p is not None), partial_rows(M, N, s.device))
    common = {"grad_ptr": grad, "s_ptr": s, "mean_ptr": mean, "rstd_ptr": rstd, "M": M, "N": N}
    common |= {**strides("g", "mn", grad), **strides("s", "mn", s)}
    sums: dict[str, Any] = {"dweight_ptr": partial[0], "dbias_ptr": partial[1]}
    sums["programs"] = programs
    rows: dict[str, Any] = {"grad_s_ptr": grad_s, "weight_ptr": weight, "dx_ptr": dx, "ds_ptr": ds}
    rows |= {**_dropout(seed, dropout_p), **strides("h", "mn", grad_s)}
    if N <= SUM_COLUMNS:
        tile, options = _tile("backward", M, N)
        stages = {"STAGES": BACKWARD_STAGES}
        yield Launch(backward_kernel, (programs,), common | sums | rows | tile | stages, options)
        return
    if dx is not None or ds is not None:
        tile, options = _tile("backward_long", M, N)
        grid = (-(-M // tile["ROWS"]),)
        yield Launch(backward_long_kernel, grid, common | rows | tile, options)
    if any(p is not None for p in partial):
        tile, options = _tile("weight", M, N)
        grid = (programs * -(-N // tile["BLOCK_N"]),)
        yield Launch(weight_kernel, grid, common | sums | tile, options)


def partial_rows(M: int, N: int, device: torch.device) -> int:
    """Programs that share the rows: enough to fill the GPU twice, at most one per tile."""
    wanted = 32 if N > SUM_COLUMNS else 2 * multiprocessors(device, interpreted=2)
    return min(-(-M // norm_config("weight" if N > SUM_COLUMNS else "backward", N).rows), wanted)


def _tile(kernel: str, M: int, N: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The constexpr arguments and launch options of a kernel for [M, N]."""
    rows, block_n, num_warps = norm_config(kernel, N)
    even = {"EVEN_M": M % rows == 0, "EVEN_N": N % block_n == 0}
    return {"ROWS": rows, "BLOCK_N": block_n, **even}, {
        "num_warps": num_warps,
        "enable_fp_fusion": True,
    }


def forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    eps: float,
    dropout_p: float,
    wants_sum: bool,
    wants_statistics: bool,
    *,
    rms: bool,
) -> Outputs:
    """y, s [..., N], mean, rstd [..., 1] float32 of x, residual [..., N], weight, bias [N]."""
    load(globals())
    has_sum = wants_sum and (residual is not None or seed is not None)
    statistics = (*x.shape[:-1], 1)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    s, mean, rstd = (x.new_empty(0) for _ in range(3))
    if has_sum:
        s = torch.empty(x.shape, dtype=(x if residual is None else residual).dtype, device=x.device)
    if wants_statistics:
        mean = mean if rms else x.new_empty(statistics, dtype=torch.float32)
        rstd = x.new_empty(statistics, dtype=torch.float32)
    if x.numel() == 0:
        return y, s, mean.fill_(torch.nan), rstd.fill_(torch.nan)  # N = 0: the mean of nothing
    weight, bias = (None if p is None else p.contiguous() for p in (weight, bias))
    residual = None if residual is None else as_rows(residual)
    operands = as_rows(x), residual, weight, bias, seed, eps, dropout_p
    forward_launch(*operands, (y, s, mean, rstd), rms).run(x.device)
    return y, s, mean, rstd


def gradients(
    grad: Tensor,
    grad_s: Tensor | None,
    s: Tensor,
    weight: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    seed: Tensor | None,
    x_dtype: torch.dtype,
    weight_dtype: torch.dtype,
    dropout_p: float,
    needs: list[bool],
) -> Gradients:
    """dx, dresidual [..., N], dweight, dbias [N] of grad, grad_s, s [..., N]; None: not needed."""
    load(globals())
    needs_x, needs_residual, *parameters = needs
    shared = seed is None and x_dtype == s.dtype and needs_x  # one tensor serves both
    dx = torch.empty(s.shape, dtype=x_dtype, device=s.device) if needs_x else None
    ds = (
        torch.empty(s.shape, dtype=s.dtype, device=s.device)
        if needs_residual and not shared
        else None
    )
    dresidual = dx if shared and needs_residual else ds
    columns = s.shape[-1]
    if s.numel() == 0:
        zeros = [s.new_zeros(columns, dtype=weight_dtype) for _ in range(2)]
        return dx, dresidual, *zeros
    weight = None if weight is None else weight.contiguous()
    grad, s, grad_s = as_rows(grad), as_rows(s), None if grad_s is None else as_rows(grad_s)
    programs = partial_rows(s.shape[0], columns, s.device)
    sums = rstd.new_empty(sum(parameters), programs, columns)
    each = iter(sums)
    partial = [next(each) if wanted else None for wanted in parameters]
    operands = grad, grad_s, s, weight, mean, rstd, seed, dropout_p
    for launch in backward_launches(*operands, dx, ds, partial):
        launch.run(s.device)
    totals = iter(sums.sum(1).to(weight_dtype))
    return dx, dresidual, *(next(totals) if wanted else None for wanted in parameters)


# -- ahead of time ---------------------------------------------------------------------------------


def compilations(arch: int) -> Iterator[Compilation]:
    """The launches worth compiling for `arch` where there is no GPU: every width of the table."""
    load(globals())
    for N in (64, 250, 512, 768, 1024, 2048, 4096, 8192, 12288, 16384, 65537, 131072):
        for dtype in (torch.bfloat16, torch.float32):
            yield from _compilations_of(N, dtype, rms=False, dropout_p=0.0)
    for N in (1024, 4096, 131072):
        yield from _compilations_of(N, torch.bfloat16, rms=True, dropout_p=0.0)
        yield from _compilations_of(N, torch.bfloat16, rms=False, dropout_p=0.1)


def _compilations_of(
    N: int, dtype: torch.dtype, *, rms: bool, dropout_p: float
) -> Iterator[Compilation]:
    x, residual, y, s, grad, dx, ds = (
        torch.empty(4096, N, dtype=dtype, device="meta") for _ in range(7)
    )
    weight, bias = torch.empty(2, N, dtype=dtype, device="meta")
    mean, rstd = torch.empty(2, 4096, 1, device="meta")
    sums = torch.empty(2, 264, N, device="meta")
    seed = torch.empty(1, dtype=torch.int64, device="meta") if dropout_p else None
    outputs = y, s, mean[:0] if rms else mean, rstd
    forward = forward_launch(
        x, residual, weight, None if rms else bias, seed, 1e-5, dropout_p, outputs, rms
    )
    partial = [sums[0], None if rms else sums[1]]
    backward = backward_launches(
        grad, grad, s, weight, None if rms else mean, rstd, seed, dropout_p, dx,
        ds if dropout_p else None, partial,
    )  # fmt: skip
    for launch in (forward, *backward):
        a, o = launch.arguments, launch.options
        part = launch.kernel.__name__.removesuffix("_kernel")
        kind = f"{str(dtype)[6:]} N{N} {a['ROWS']}x{a['BLOCK_N']} w{o['num_warps']}"
        kind += " dropout" * bool(dropout_p)
        name = f"{'rms' if rms else 'layer'}_norm {part}"
        quick = N == 1024 and dtype == torch.bfloat16
        yield Compilation(name, kind, launch, False, True, quick)
