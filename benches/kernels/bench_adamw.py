"""adamw_step against torch.optim.AdamW, fused and foreach, with and without clipping by norm.

One large tensor, the tensors of a layer of width 512, and many small ones; the roof is 28 bytes a
parameter in float32 (read p, g, m, v; write p, m, v).
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tilewise_kernels import adamw_step
from tilewise_kernels.measure import peak_bytes, roof

LISTS = {
    "1x4194304": [(4194304,)],
    "layer of 512": [(1536, 512), (1536,), (512, 512), (512,), (2048, 512), (2048,), (512, 2048)],
    "64x1024": [(1024,)] * 64,
}
CLIP = 1.0
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RAN = "triton" if DEVICE == "cuda" else "native"


@pytest.mark.parametrize("contender", ["tilewise", "eager", "fused"])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("sizes", LISTS)
def bench_adamw(
    benchmark: Any, request: pytest.FixtureRequest, sizes: str, clip: bool, contender: str
) -> None:
    dtype = getattr(torch, request.config.getoption("--dtype"))
    torch.manual_seed(0)
    params = [torch.randn(size, device=DEVICE).to(dtype) for size in LISTS[sizes]]
    for p in params:
        p.grad = torch.randn_like(p)
    once = step(params, clip, contender)
    once()
    benchmark(once)
    count, size = sum(p.numel() for p in params), params[0].element_size()
    moved = (7 + clip) * count * size
    benchmark.extra_info |= {
        "kind": "kernel", "op": "adamw_step" + " clip" * clip, "shape": sizes,
        "direction": "step", "contender": contender, "ran": RAN,
        "roof_ms": roof(DEVICE, dtype).ms(12 * count, moved), "flops": 12 * count, "bytes": moved,
        "error": 0.0, "peak_bytes": peak_bytes(DEVICE, once),
    }  # fmt: skip


def step(params: list[Tensor], clip: bool, contender: str) -> Callable[[], object]:
    """One optimiser step over the same gradients; "eager" is torch's foreach way."""
    if contender != "tilewise":
        optimiser = torch.optim.AdamW(params, fused=contender == "fused")

        def theirs() -> None:
            if clip:
                torch.nn.utils.clip_grad_norm_(params, CLIP)
            optimiser.step()

        return theirs
    grads = [p.grad for p in params]
    means, squares = ([torch.zeros_like(p) for p in params] for _ in range(2))
    return lambda: adamw_step(
        params, grads, means, squares, 10, lr=1e-3, max_norm=CLIP if clip else None
    )
