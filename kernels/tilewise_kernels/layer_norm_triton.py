"""Layer normalisation in Triton: rows of s = x + residual, forward and backward.

Shapes: x, residual, s, y, grad, grad_s, ds [M, N]; weight, bias [N]; mean, rstd [M] float32; the
partial sums of dweight and dbias [programs, N] float32.

Forward: a program holds whole rows, several when they are short, and reads each once. Backward:
few programs walk over all rows and keep their sums of dweight and dbias in registers; each writes
one row of partial sums at its end, and one sum reduces those. Rows whose sums do not fit beside
them leave the sums to a second kernel, which walks down strips of columns. Every sum has one owner
and one order. A tile that divides the matrix loads and stores without masks.

The functions here launch kernels and nothing else: `layer_norm.py` validates and chooses.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .configs import norm_config
from .launch import Compilation, Launch
from .lazy_triton import jit, load

tl: Any = None  # triton.language once load() has run

ROW_COLUMNS = 16384  # longest row that one program holds: 64 KB in float32
SUM_COLUMNS = 8192  # longest row whose dweight and dbias sums one program holds besides

Outputs = tuple[Tensor, Tensor, Tensor, Tensor]  # y, s (empty without a residual), mean, rstd
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]  # ds, dweight, dbias


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
def forward_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, y_ptr, s_ptr, mean_ptr, rstd_ptr, M, N, eps,
    stride_xm, stride_xn, stride_rm, stride_rn,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, EVEN_M: tl.constexpr, EVEN_N: tl.constexpr,
):  # fmt: skip
    """One program: ROWS whole rows."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK_N)
    s = load_rows(x_ptr, rows, cols, M, N, stride_xm, stride_xn, EVEN_M, EVEN_N)
    if residual_ptr is not None:
        s += load_rows(residual_ptr, rows, cols, M, N, stride_rm, stride_rn, EVEN_M, EVEN_N)
        store_rows(s_ptr, s, rows, cols, M, N, EVEN_M, EVEN_N)
        s = s.to(s_ptr.dtype.element_ty).to(tl.float32)  # normalise what backward will read

    mean = tl.sum(s, 1) / N
    centred = s - mean[:, None]
    if not EVEN_N:
        centred = tl.where(cols[None, :] < N, centred, 0.0)
    mean += tl.sum(centred, 1) / N  # a sum of large values is itself rounded
    centred = s - mean[:, None]
    if not EVEN_N:
        centred = tl.where(cols[None, :] < N, centred, 0.0)
    rstd = 1.0 / tl.sqrt_rn(tl.sum(centred * centred, 1) / N + eps)
    y = centred * rstd[:, None]
    if weight_ptr is not None:
        y *= load_vector(weight_ptr, cols, N, EVEN_N)
    if bias_ptr is not None:
        y += load_vector(bias_ptr, cols, N, EVEN_N)
    store_rows(y_ptr, y, rows, cols, M, N, EVEN_M, EVEN_N)
    tl.store(mean_ptr + rows, mean, mask=rows < M)
    tl.store(rstd_ptr + rows, rstd, mask=rows < M)


@jit
def backward_kernel(
    grad_ptr, grad_s_ptr, s_ptr, weight_ptr, mean_ptr, rstd_ptr, ds_ptr, dweight_ptr, dbias_ptr,
    M, N, programs, stride_gm, stride_gn, stride_hm, stride_hn, stride_sm, stride_sn,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, EVEN_M: tl.constexpr, EVEN_N: tl.constexpr,
):  # fmt: skip
    """Program p: tiles p, p + programs, ... of ROWS rows, and row p of the partial sums."""
    first = tl.program_id(0)
    cols = tl.arange(0, BLOCK_N)
    if weight_ptr is not None:
        weight = load_vector(weight_ptr, cols, N, EVEN_N)
    dweight = tl.zeros([ROWS, BLOCK_N], dtype=tl.float32)
    dbias = tl.zeros([ROWS, BLOCK_N], dtype=tl.float32)
    for tile in range(first, tl.cdiv(M, ROWS), programs):
        rows = tile * ROWS + tl.arange(0, ROWS)
        grad = load_rows(grad_ptr, rows, cols, M, N, stride_gm, stride_gn, EVEN_M, EVEN_N)
        s = load_rows(s_ptr, rows, cols, M, N, stride_sm, stride_sn, EVEN_M, EVEN_N)
        mean = tl.load(mean_ptr + rows, mask=rows < M, other=0.0)
        rstd = tl.load(rstd_ptr + rows, mask=rows < M, other=0.0)
        normal = (s - mean[:, None]) * rstd[:, None]
        if dweight_ptr is not None:
            dweight += grad * normal
        if dbias_ptr is not None:
            dbias += grad
        if ds_ptr is not None:
            g = grad
            if weight_ptr is not None:
                g *= weight
            # columns past N hold g = 0, so that the two means need no mask
            slope = tl.sum(g * normal, 1) / N
            centre = tl.sum(g, 1) / N
            ds = (g - centre[:, None] - normal * slope[:, None]) * rstd[:, None]
            if grad_s_ptr is not None:
                ds += load_rows(grad_s_ptr, rows, cols, M, N, stride_hm, stride_hn, EVEN_M, EVEN_N)
            store_rows(ds_ptr, ds, rows, cols, M, N, EVEN_M, EVEN_N)
    partial = first.to(tl.int64) * N + cols
    if dweight_ptr is not None:
        tl.store(dweight_ptr + partial, tl.sum(dweight, 0), mask=cols < N)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + partial, tl.sum(dbias, 0), mask=cols < N)


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
        mean = tl.load(mean_ptr + rows, mask=rows < M, other=0.0)
        rstd = tl.load(rstd_ptr + rows, mask=rows < M, other=0.0)
        dweight += grad * ((s - mean[:, None]) * rstd[:, None])
        dbias += grad
    partial = first.to(tl.int64) * N + cols
    if dweight_ptr is not None:
        tl.store(dweight_ptr + partial, tl.sum(dweight, 0), mask=cols < N)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + partial, tl.sum(dbias, 0), mask=cols < N)


# -- launchers -----------------------------------------------------------------------------------


def _as_rows(tensor: Tensor) -> Tensor:
    """[M, N] view (a copy only where the leading dims do not collapse into one stride)."""
    return tensor.reshape(tensor.shape[:-1].numel(), tensor.shape[-1])


def _strides(name: str, rows: Tensor | None) -> dict[str, int]:
    row, column = (0, 0) if rows is None else rows.stride()
    return {f"stride_{name}m": row, f"stride_{name}n": column}


def forward_launch(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    outputs: Outputs,
) -> Launch:
    """Launch that fills y, s, mean and rstd; x and residual are [M, N]."""
    M, N = x.shape
    y, s, mean, rstd = outputs
    tile, options = _tile("forward", M, N)
    arguments = {
        "x_ptr": x, "residual_ptr": residual, "weight_ptr": weight, "bias_ptr": bias,
        "y_ptr": y, "s_ptr": None if residual is None else s, "mean_ptr": mean, "rstd_ptr": rstd,
        "M": M, "N": N, "eps": eps, **_strides("x", x), **_strides("r", residual), **tile,
    }  # fmt: skip
    return Launch(forward_kernel, (-(-M // tile["ROWS"]),), arguments, options)


def backward_launches(
    grad: Tensor,
    grad_s: Tensor | None,
    s: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    ds: Tensor | None,
    partial: list[Tensor | None],
) -> Iterator[Launch]:
    """Launches that fill ds [M, N] and the partial sums [programs, N] of dweight and dbias.

    One kernel does both, up to the row length whose sums fit in registers.
    """
    M, N = s.shape
    programs = next((p.shape[0] for p in partial if p is not None), partial_rows(M, N, s.device))
    common = {"grad_ptr": grad, "s_ptr": s, "mean_ptr": mean, "rstd_ptr": rstd, "M": M, "N": N}
    common |= {**_strides("g", grad), **_strides("s", s), "programs": programs}
    sums = {"dweight_ptr": partial[0], "dbias_ptr": partial[1]}
    split = N > SUM_COLUMNS
    if ds is not None or not split:
        tile, options = _tile("backward", M, N)
        whole = {"grad_s_ptr": grad_s, "weight_ptr": weight, "ds_ptr": ds, **_strides("h", grad_s)}
        whole |= {"dweight_ptr": None, "dbias_ptr": None, "programs": M} if split else sums
        grid = (M if split else programs,)
        yield Launch(backward_kernel, grid, common | whole | tile, options)
    if split and any(p is not None for p in partial):
        tile, options = _tile("weight", M, N)
        grid = (programs * -(-N // tile["BLOCK_N"]),)
        yield Launch(weight_kernel, grid, common | sums | tile, options)


def partial_rows(M: int, N: int, device: torch.device) -> int:
    """Programs that share the rows: enough to fill the GPU twice, at most one per tile."""
    wanted = 32 if N > SUM_COLUMNS else 2 * _processors(device)
    return min(-(-M // norm_config("weight" if N > SUM_COLUMNS else "backward", N).rows), wanted)


def _tile(kernel: str, M: int, N: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The constexpr arguments and launch options of a kernel for [M, N]."""
    rows, block_n, num_warps = norm_config(kernel, N)
    even = {"EVEN_M": M % rows == 0, "EVEN_N": N % block_n == 0}
    return {"ROWS": rows, "BLOCK_N": block_n, **even}, {
        "num_warps": num_warps,
        "enable_fp_fusion": True,
    }


@functools.cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 2  # the interpreter
    return torch.cuda.get_device_properties(device).multi_processor_count


def forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Outputs:
    load(globals())
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    s = x.new_empty(0) if residual is None else residual.new_empty(residual.shape)
    mean, rstd = (x.new_empty((*x.shape[:-1], 1), dtype=torch.float32) for _ in range(2))
    if x.numel() == 0:
        return y, s, mean.fill_(torch.nan), rstd.fill_(torch.nan)  # N = 0: the mean of nothing
    weight, bias = (None if p is None else p.contiguous() for p in (weight, bias))
    rows = _as_rows(x), None if residual is None else _as_rows(residual)
    forward_launch(*rows, weight, bias, eps, (y, s, mean, rstd)).run(x.device)
    return y, s, mean, rstd


def gradients(
    grad: Tensor,
    grad_s: Tensor | None,
    s: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    needs: tuple[bool, bool, bool],
) -> Gradients:
    load(globals())
    ds = torch.empty(s.shape, dtype=s.dtype, device=s.device) if needs[0] else None
    if s.numel() == 0:
        return ds, mean.new_zeros(s.shape[-1]), mean.new_zeros(s.shape[-1])
    grad, s = _as_rows(grad), _as_rows(s)
    grad_s = None if grad_s is None else _as_rows(grad_s)
    weight = None if weight is None else weight.contiguous()
    M, N = s.shape
    programs = partial_rows(M, N, s.device)
    partial = [mean.new_empty(programs, N) if need else None for need in needs[1:]]
    for launch in backward_launches(grad, grad_s, s, weight, mean, rstd, ds, partial):
        launch.run(s.device)
    dweight, dbias = (None if sums is None else sums.sum(0) for sums in partial)
    return ds, dweight, dbias


def refuses(s: Tensor) -> str | None:
    """What the rows s have that no kernel here takes, or None."""
    if s.dtype == torch.float64:
        return "float64 is computed by torch"
    if s.shape[-1] > ROW_COLUMNS:
        return f"{s.shape[-1]} columns are above the {ROW_COLUMNS} that one program holds"
    if not s.is_cuda and s.dtype == torch.bfloat16:
        return "Triton's interpreter is not to be trusted with bfloat16"
    return None


def compilations(arch: int) -> Iterator[Compilation]:
    """The launches worth compiling for `arch` where there is no GPU: every width of the table."""
    load(globals())
    for N in (64, 250, 512, 768, 1024, 2048, 4096, 8192, 12288, 16384):
        for dtype in (torch.bfloat16, torch.float32):
            yield from _compilations_of(N, dtype)


def _compilations_of(N: int, dtype: torch.dtype) -> Iterator[Compilation]:
    x, residual, y, s, grad, ds = (
        torch.empty(4096, N, dtype=dtype, device="meta") for _ in range(6)
    )
    weight, bias = torch.empty(2, N, dtype=dtype, device="meta")
    mean, rstd = torch.empty(2, 4096, 1, device="meta")
    partial: list[Tensor | None] = [torch.empty(264, N, device="meta") for _ in range(2)]
    forward = forward_launch(x, residual, weight, bias, 1e-5, (y, s, mean, rstd))
    backward = backward_launches(grad, grad, s, weight, mean, rstd, ds, partial)
    for launch in (forward, *backward):
        a, o = launch.arguments, launch.options
        part = next(k for k in ("forward", "backward", "weight") if k in launch.kernel.__name__)
        kind = f"{str(dtype)[6:]} N{N} {a['ROWS']}x{a['BLOCK_N']} w{o['num_warps']}"
        strict = N <= SUM_COLUMNS  # longer rows may spill a little
        yield Compilation(f"layer_norm {part}", kind, launch, False, strict, N == 1024)
