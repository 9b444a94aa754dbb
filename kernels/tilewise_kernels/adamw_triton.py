"""AdamW in Triton: one elementwise launch for all parameters of a kind.

The launch walks a table on the device. places, int64 [N, 8]: of each parameter the addresses of
param, grad, m, v and master (0 for none), its size, the first program that works on it, and how
many do. owners, int64 [P]: the row of `places` that each program works on. coefficients: float64
[3]. The functions here launch kernels and nothing else: `adamw.py` validates and chooses.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .configs import ADAMW
from .launch import Compilation, Launch
from .lazy_triton import jit, load

tl: Any = None  # triton.language once load() has run

Row = tuple[int, ...]  # of `places`


class Kind(NamedTuple):
    """What one launch has in common. aligned: every address is a multiple of 16 bytes."""

    dtype: torch.dtype
    moments: torch.dtype
    mastered: bool
    aligned: bool


# -- kernel --------------------------------------------------------------------------------------


@jit
def array_at(address_ptr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """The pointer whose address is stored at address_ptr."""
    pointer = tl.load(address_ptr).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@jit
def advance(
    param, grad, m_at, v_at, master, inside, coefficients_ptr,
    beta1, one_minus_beta1, beta2, one_minus_beta2, eps, keep, MASTERED: tl.constexpr,
):  # fmt: skip
    """One block of a step, at blocks of pointers; inside: a mask or None."""
    step_size = tl.load(coefficients_ptr).to(tl.float32)
    root = tl.load(coefficients_ptr + 1).to(tl.float32)
    scale = tl.load(coefficients_ptr + 2).to(tl.float32)
    g = tl.load(grad, mask=inside).to(tl.float32) * scale
    m = tl.load(m_at, mask=inside).to(tl.float32)
    v = tl.load(v_at, mask=inside).to(tl.float32)
    if MASTERED:
        w = tl.load(master, mask=inside)
    else:
        w = tl.load(param, mask=inside).to(tl.float32)
    m = m + (g - m) * one_minus_beta1
    v = v * beta2 + g * g * one_minus_beta2
    w = w * keep - step_size * (m / (tl.sqrt(v) / root + eps))
    tl.store(m_at, m.to(m_at.dtype.element_ty), mask=inside)
    tl.store(v_at, v.to(v_at.dtype.element_ty), mask=inside)
    if MASTERED:
        tl.store(master, w, mask=inside)
    tl.store(param, w.to(param.dtype.element_ty), mask=inside)


@jit
def adamw_kernel(
    places_ptr, owners_ptr, coefficients_ptr,
    beta1, one_minus_beta1, beta2, one_minus_beta2, eps, keep,
    DTYPE: tl.constexpr, MOMENTS: tl.constexpr, MASTERED: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK elements of one parameter. keep: 1 - lr * weight_decay."""
    program = tl.program_id(0).to(tl.int64)
    row = places_ptr + 8 * tl.load(owners_ptr + program)
    size = tl.load(row + 5)
    start = (program - tl.load(row + 6)) * BLOCK
    places = start + tl.arange(0, BLOCK)
    param = array_at(row, DTYPE, ALIGNED) + places
    grad = array_at(row + 1, DTYPE, ALIGNED) + places
    m_at = array_at(row + 2, MOMENTS, ALIGNED) + places
    v_at = array_at(row + 3, MOMENTS, ALIGNED) + places
    master = array_at(row + 4, tl.float32, ALIGNED) + places
    if start + BLOCK <= size:  # without a mask, whose edge is not known to fall between vectors
        advance(
            param, grad, m_at, v_at, master, None, coefficients_ptr,
            beta1, one_minus_beta1, beta2, one_minus_beta2, eps, keep, MASTERED,
        )  # fmt: skip
    else:
        advance(
            param, grad, m_at, v_at, master, places < size, coefficients_ptr,
            beta1, one_minus_beta1, beta2, one_minus_beta2, eps, keep, MASTERED,
        )  # fmt: skip


# -- launch --------------------------------------------------------------------------------------


def adamw_launch(
    places: Tensor,
    owners: Tensor,
    coefficients: Tensor,
    kind: Kind,
    beta1: float,
    beta2: float,
    eps: float,
    decay: float,
) -> Launch:
    """Launch of the step of every parameter in a table."""
    block, warps = ADAMW
    arguments = {
        "places_ptr": places, "owners_ptr": owners, "coefficients_ptr": coefficients,
        "beta1": beta1, "one_minus_beta1": 1 - beta1, "beta2": beta2,
        "one_minus_beta2": 1 - beta2, "eps": eps, "keep": 1 - decay,
        "DTYPE": getattr(tl, str(kind.dtype)[6:]), "MOMENTS": getattr(tl, str(kind.moments)[6:]),
        "MASTERED": kind.mastered, "ALIGNED": kind.aligned, "BLOCK": block,
    }  # fmt: skip
    options = {"num_warps": warps, "enable_fp_fusion": True}
    return Launch(adamw_kernel, (owners.numel(),), arguments, options)


def step(coefficients: Tensor, places: Sequence[Sequence[Tensor]], *hyper: float) -> None:
    """The op on places (param, grad, m, v and perhaps a master, empty for none), all tensors of
    each in one order in memory; hyper: beta1, beta2, eps and decay."""
    load(globals())
    groups: dict[Kind, list[Row]] = {}
    for param, grad, m, v, *master in places:
        if param.numel() > 0:
            own = master[0].data_ptr() if master and master[0].numel() > 0 else 0
            addresses = (param.data_ptr(), grad.data_ptr(), m.data_ptr(), v.data_ptr(), own)
            aligned = all(address % 16 == 0 for address in addresses)
            kind = Kind(param.dtype, m.dtype, own != 0, aligned)
            rows = groups.setdefault(kind, [])
            first = rows[-1][6] + rows[-1][7] if rows else 0
            rows.append((*addresses, param.numel(), first, -(-param.numel() // ADAMW[0])))
    for kind, rows in groups.items():
        places_and_owners = _table(tuple(rows), coefficients.device)
        adamw_launch(*places_and_owners, coefficients, kind, *hyper).run(coefficients.device)


# -- table ---------------------------------------------------------------------------------------


def _table(rows: tuple[Row, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """places and owners, on the device without waiting for it.

    The last few are kept, so that steady training copies nothing. A CUDA graph copies nothing
    either, for it would read the host's memory at each replay: there kernels write the table, from
    numbers among their arguments, and it lives in the graph's own memory.
    """
    if device.type != "cuda":
        return _with_owners(torch.tensor(rows, device=device), rows)
    if torch.cuda.is_current_stream_capturing():
        return _with_owners(_written(rows, device), rows)
    return _copied(rows, device, torch.cuda.current_stream(device).cuda_stream)


@functools.lru_cache(maxsize=16)
def _copied(rows: tuple[Row, ...], device: torch.device, stream: int) -> tuple[Tensor, Tensor]:
    """stream: where the table is copied and used; another stream might read it too early."""
    host = torch.tensor(rows, device="cpu").pin_memory()
    return _with_owners(host.to(device, non_blocking=True), rows)


def _written(rows: tuple[Row, ...], device: torch.device) -> Tensor:
    places = torch.zeros(len(rows), 8, dtype=torch.int64, device=device)
    torch._foreach_add_(list(places.view(-1).unbind()), list(chain(*rows)))
    return places


def _with_owners(places: Tensor, rows: tuple[Row, ...]) -> tuple[Tensor, Tensor]:
    programs = rows[-1][6] + rows[-1][7]
    numbers = torch.arange(len(rows), device=places.device)
    return places, numbers.repeat_interleave(places[:, 7], output_size=programs)


def refuses(params: Sequence[Tensor]) -> str | None:
    """What the parameters have that no kernel here takes, or None."""
    if any(p.dtype == torch.float64 for p in params):
        return "a parameter is float64, which torch computes"
    if any(p.dtype == torch.bfloat16 and not p.is_cuda for p in params):
        return "Triton's interpreter rounds bfloat16 wrongly"
    return None


# -- ahead of time -------------------------------------------------------------------------------


def compilations(arch: int) -> Iterator[Compilation]:
    """The launches worth compiling for `arch` where there is no GPU: with and without masters."""
    load(globals())
    places, owners = (torch.empty(8, dtype=torch.int64, device="meta") for _ in range(2))
    coefficients = torch.empty(3, dtype=torch.float64, device="meta")
    for kind in (
        Kind(torch.float32, torch.float32, False, True),
        Kind(torch.float32, torch.float32, False, False),
        Kind(torch.bfloat16, torch.float32, True, True),
        Kind(torch.bfloat16, torch.float32, True, False),
        Kind(torch.float16, torch.float16, False, True),
    ):
        launch = adamw_launch(places, owners, coefficients, kind, 0.9, 0.999, 1e-8, 1e-5)
        name = (
            f"{str(kind.dtype)[6:]}{' master' * kind.mastered}{' unaligned' * (not kind.aligned)}"
        )
        yield Compilation("adamw", name, launch, False, True, kind.mastered)
