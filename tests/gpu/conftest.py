"""Tests of what only a GPU can show.

TILEWISE_GPU_TEST_DEVICE=cpu rehearses them: the same bodies on the CPU at small sizes, Triton's
kernels in its interpreter. A rehearsal finds mistakes in the tests and proves nothing about a GPU.
"""

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

REHEARSAL = os.environ.get("TILEWISE_GPU_TEST_DEVICE") == "cpu"
if REHEARSAL:
    os.environ["TRITON_INTERPRET"] = "1"  # before any kernel is made

Tensors = dict[str, Tensor]
Call = Callable[[Tensors], Tensor]


# -- order ---------------------------------------------------------------------------------------


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """TILEWISE_GPU_TEST_HAND=0/12: the first of twelve hands, the most telling tests on top."""
    if hand := os.environ.get("TILEWISE_GPU_TEST_HAND"):
        first, step = map(int, hand.split("/"))
        items[:] = by_worth(items)[first::step]


def by_worth(items: list[pytest.Item]) -> list[pytest.Item]:
    """Each function once per dtype, accuracy first; then the contract; then second runs, ..."""
    groups: dict[tuple[Any, ...], list[pytest.Item]] = {}
    for item in items:
        given = item.callspec.params if hasattr(item, "callspec") else {}
        dtype = given.get("dtype", getattr(given.get("case"), "dtype", None))
        groups.setdefault((item.path, item.name.split("[")[0], dtype), []).append(item)
    worth = {}
    for (path, name, _), members in groups.items():
        middle = len(members) // 2  # lists of sizes begin with the smallest
        for turn, item in enumerate(members[middle:] + members[:middle]):
            contract = path.stem == "test_contract"
            worth[item] = (0.5 if contract else turn, "accuracy" not in name)
    return sorted(items, key=lambda item: worth[item])


# -- fixtures ------------------------------------------------------------------------------------


@pytest.fixture(scope="session", autouse=True)
def device() -> torch.device:
    """The GPU, or the CPU in a rehearsal."""
    if REHEARSAL:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture(scope="session")
def pick() -> Callable:
    """pick(real, small): the size to use here."""
    return lambda real, small: small if REHEARSAL else real


@pytest.fixture(scope="session")
def gpu_only() -> Callable[[str], None]:
    """gpu_only(what) skips a test that has nothing to rehearse on a CPU."""

    def check(what: str) -> None:
        if REHEARSAL:
            pytest.skip(f"a CPU has no {what}")

    return check


@pytest.fixture
def room() -> Iterator[Callable[[float], None]]:
    """room(gb) skips where that much GPU memory is not free."""

    def check(gb: float) -> None:
        if not REHEARSAL and torch.cuda.mem_get_info()[0] < gb * 1e9:
            pytest.skip(f"needs {gb} GB of free GPU memory")

    yield check
    if not REHEARSAL:
        torch.cuda.empty_cache()


@pytest.fixture
def normal(device: torch.device) -> Callable[..., Tensor]:
    """normal(*shape, dtype=, std=): from N(0, std), the same on every run."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int, dtype: torch.dtype = torch.float32, std: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator, device=device) * std).to(dtype)

    return draw


@pytest.fixture
def accurate(normal: Callable[..., Tensor]) -> Callable[[Call, Call, Tensors], None]:
    """accurate(ours, eager, inputs): the float64 rule for the output and all gradients."""
    from tilewise_kernels.benchmark import largest_errors, outcome, wrong

    def check(ours: Call, eager: Call, inputs: Tensors) -> None:
        with torch.no_grad():
            y = ours(inputs)
        grads = [normal(*y.shape, dtype=y.dtype)]
        doubles = {n: t.double() if t.is_floating_point() else t for n, t in inputs.items()}
        exact = outcome(eager, doubles, [grads[0].double()])
        plain = largest_errors(outcome(eager, inputs, grads), exact)
        scales = {name: true.abs().max().item() for name, true in exact.items()}
        problem = wrong(largest_errors(outcome(ours, inputs, grads), exact), plain, scales)
        assert problem is None, problem

    return check
