"""adamw_step against torch.optim.AdamW, with and without clipping by norm.

eager is torch's loop over the tensors (foreach=False, its default on a CPU), foreach its lists
(foreach=True, its default on a GPU), fused its kernel. Each takes STEPS steps from the same start
first, and fails where its parameters are further from the same steps in float64 than the accuracy
rule allows. One large tensor, the tensors of a layer of width 512, and many small ones; the roof is
28 bytes a parameter in float32 (read p, g, m, v; write p, m, v).
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tilewise_kernels import adamw_step, explain
from tilewise_kernels.benchmark import largest_errors, observed, wrong
from tilewise_kernels.measure import peak_bytes, roof

LISTS = {
    "1x4194304": [(4194304,)],
    "layer of 512": [(1536, 512), (1536,), (512, 512), (512,), (2048, 512), (2048,), (512, 2048)],
    "64x1024": [(1024,)] * 64,
}
TORCHS = {"eager": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}
CLIP, LR, STEPS = 1.0, 1e-2, 3
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("contender", ["tilewise", *TORCHS])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("sizes", LISTS)
def bench_adamw(
    benchmark: Any, request: pytest.FixtureRequest, sizes: str, clip: bool, contender: str
) -> None:
    dtype = getattr(torch, request.config.getoption("--dtype"))
    error, problem = judged(sizes, clip, contender, dtype)
    if problem is not None:
        pytest.fail(f"no number for {contender}: {problem}")
    ours, once = (stepper(drawn(sizes, dtype), clip, name) for name in ("tilewise", contender))
    with observed() as seen:
        ours()
    cost = seen[0][1]
    benchmark(once)
    benchmark.extra_info |= {
        "kind": "kernel", "op": "adamw_step" + " clip" * clip, "shape": sizes,
        "direction": "step", "contender": contender,
        "ran": explain(once).implementation if contender == "tilewise" else contender,
        "roof_ms": roof(DEVICE, dtype).ms(cost.flops, cost.bytes), "flops": cost.flops,
        "bytes": cost.bytes, "error": error, "peak_bytes": peak_bytes(DEVICE, once),
    }  # fmt: skip


def drawn(sizes: str, dtype: torch.dtype) -> list[Tensor]:
    """Parameters with gradients, the same every time."""
    generator = torch.Generator(DEVICE).manual_seed(0)

    def normal(size: tuple[int, ...]) -> Tensor:
        return torch.randn(size, generator=generator, device=DEVICE).to(dtype)

    params = [normal(size) for size in LISTS[sizes]]
    for p in params:
        p.grad = normal(tuple(p.shape))
    return params


def stepper(params: list[Tensor], clip: bool, contender: str) -> Callable[[], object]:
    """A function that takes one optimiser step, always over the same gradients."""
    if contender == "tilewise":
        grads = [p.grad for p in params]
        means, squares = ([torch.zeros_like(p) for p in params] for _ in range(2))
        count = itertools.count(1)
        return lambda: adamw_step(
            params, grads, means, squares, next(count), lr=LR, max_norm=CLIP if clip else None
        )
    optimiser = torch.optim.AdamW(params, lr=LR, **TORCHS[contender])

    def theirs() -> None:
        if clip:
            torch.nn.utils.clip_grad_norm_(params, CLIP)
        optimiser.step()

    return theirs


# -- right? --------------------------------------------------------------------------------------


def judged(sizes: str, clip: bool, contender: str, dtype: torch.dtype) -> tuple[float, str | None]:
    """(the largest error of a parameter over the largest parameter, why it is too large or None)"""
    exact, eager_errors = truth(sizes, clip, dtype)
    errors = largest_errors(stepped(drawn(sizes, dtype), clip, contender), exact)
    scales = {name: true.abs().max().item() for name, true in exact.items()}
    largest = max(error / scales[name] for name, error in errors.items())
    return largest, wrong(errors, eager_errors, scales)


@functools.lru_cache(maxsize=1)
def truth(sizes: str, clip: bool, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, float]]:
    """(the parameters after the steps in float64, the errors of eager in dtype)."""
    wide = drawn(sizes, dtype)
    for i, p in enumerate(wide):
        wide[i] = p.double()
        wide[i].grad = p.grad.double()  # type: ignore[union-attr]
    exact = stepped(wide, clip, "eager")
    return exact, largest_errors(stepped(drawn(sizes, dtype), clip, "eager"), exact)


def stepped(params: list[Tensor], clip: bool, contender: str) -> dict[str, Tensor]:
    """The parameters after STEPS steps, under the names of outputs: y, y1, ..."""
    once = stepper(params, clip, contender)
    for _ in range(STEPS):
        once()
    return {f"y{i or ''}": p for i, p in enumerate(params)}
