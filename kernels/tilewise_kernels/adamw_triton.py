"""AdamW in Triton: one elementwise launch for each parameter.

Shapes: param, grad, m, v and master are flat, `size` elements; coefficients float64 [3].
The functions here launch kernels and nothing else: `adamw.py` validates and chooses.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .configs import ADAMW_BLOCK
from .launch import Compilation, Launch
from .lazy_triton import jit, load

tl: Any = None  # triton.language once load() has run


@jit
def adamw_kernel(
    param_ptr, grad_ptr, m_ptr, v_ptr, master_ptr, coefficients_ptr, size,
    beta1, one_minus_beta1, beta2, one_minus_beta2, eps, keep, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK elements. keep: 1 - lr * weight_decay."""
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = places < size
    step_size = tl.load(coefficients_ptr).to(tl.float32)
    root = tl.load(coefficients_ptr + 1).to(tl.float32)
    scale = tl.load(coefficients_ptr + 2).to(tl.float32)
    g = tl.load(grad_ptr + places, mask=inside).to(tl.float32) * scale
    m = tl.load(m_ptr + places, mask=inside).to(tl.float32)
    v = tl.load(v_ptr + places, mask=inside, other=0.0).to(tl.float32)
    if master_ptr is not None:
        w = tl.load(master_ptr + places, mask=inside)
    else:
        w = tl.load(param_ptr + places, mask=inside).to(tl.float32)
    m = m + (g - m) * one_minus_beta1
    v = v * beta2 + g * g * one_minus_beta2
    w = w * keep - step_size * (m / (tl.sqrt(v) / root + eps))
    tl.store(m_ptr + places, m.to(m_ptr.dtype.element_ty), mask=inside)
    tl.store(v_ptr + places, v.to(v_ptr.dtype.element_ty), mask=inside)
    if master_ptr is not None:
        tl.store(master_ptr + places, w, mask=inside)
    tl.store(param_ptr + places, w.to(param_ptr.dtype.element_ty), mask=inside)


def adamw_launch(
    param: Tensor,
    grad: Tensor,
    m: Tensor,
    v: Tensor,
    master: Tensor | None,
    coefficients: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    decay: float,
) -> Launch:
    """Launch of one parameter's step; all tensors contiguous."""
    arguments = {
        "param_ptr": param, "grad_ptr": grad, "m_ptr": m, "v_ptr": v, "master_ptr": master,
        "coefficients_ptr": coefficients, "size": param.numel(), "beta1": beta1,
        "one_minus_beta1": 1 - beta1, "beta2": beta2, "one_minus_beta2": 1 - beta2,
        "eps": eps, "keep": 1 - decay, "BLOCK": ADAMW_BLOCK,
    }  # fmt: skip
    options = {"num_warps": 4, "enable_fp_fusion": True}
    return Launch(adamw_kernel, (-(-param.numel() // ADAMW_BLOCK),), arguments, options)


def step(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    masters: list[Tensor],
    coefficients: Tensor,
    *hyper: float,
) -> None:
    """The op on contiguous tensors; hyper: beta1, beta2, eps and decay."""
    load(globals())
    for param, grad, m, v, master in zip(
        params, grads, exp_avgs, exp_avg_sqs, masters, strict=True
    ):
        if param.numel() > 0:
            own = master if master.numel() > 0 else None
            adamw_launch(param, grad, m, v, own, coefficients, *hyper).run(param.device)


def compilations(arch: int) -> Iterator[Compilation]:
    """The launches worth compiling for `arch` where there is no GPU: with and without masters."""
    load(globals())
    for dtype, moments, mastered in (
        (torch.float32, torch.float32, False),
        (torch.bfloat16, torch.float32, True),
        (torch.float16, torch.float16, False),
    ):
        param = torch.empty(1 << 20, dtype=dtype, device="meta")
        m = torch.empty(1 << 20, dtype=moments, device="meta")
        master = m if mastered else None
        coefficients = torch.empty(3, dtype=torch.float64, device="meta")
        hyper = (0.9, 0.999, 1e-8, 1e-5)
        launch = adamw_launch(param, param, m, m, master, coefficients, *hyper)
        kind = f"{str(dtype)[6:]}{' master' * mastered}"
        yield Compilation("adamw", kind, launch, False, True, mastered)
