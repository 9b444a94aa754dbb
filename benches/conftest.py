"""What every bench shares: who competes at a shape, judged once, and the machine in the results."""

import functools
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tilewise_kernels.bench_cases import CASES, Options, Shape
from tilewise_kernels.benchmark import Contest, contest
from tilewise_kernels.measure import machine, peak_bytes, roof

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--dtype", default="bfloat16" if DEVICE == "cuda" else "float32", help="of the kernels"
    )


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    dtype = config.getoption("--dtype")
    measured = roof(DEVICE, getattr(torch, dtype))
    machine_info["tilewise"] = {
        "device": machine(DEVICE),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
        "dtype": dtype,
        "bandwidth": measured.bandwidth,
        "rate": measured.rate,
    }


@functools.lru_cache(maxsize=1)  # one shape's tensors at a time
def held(op: str, shape: Shape, options: Options, dtype: torch.dtype) -> Contest:
    case = CASES[op]
    directions = ("forward", "both") if case.trains else ("forward",)
    return contest(
        case, shape, options, device=DEVICE, dtype=dtype, directions=directions, every_way=False
    )


@pytest.fixture
def bench_op(benchmark: Any, request: pytest.FixtureRequest) -> Callable[..., None]:
    """bench_op(op, shape, options, direction, contender): time one contender, if it is right.

    contender: "tilewise" for what tilewise chooses, "eager" or "sdpa".
    """

    def run(op: str, shape: Shape, options: Options, direction: str, contender: str) -> None:
        dtype = request.config.getoption("--dtype")
        field = held(op, shape, options, getattr(torch, dtype))
        named = {row.name: row for row in field.rows if not row.ours}
        row = field.chosen if contender == "tilewise" else named[contender]
        if row.problem is not None:
            pytest.fail(f"no number for {contender}: {row.problem}")
        once = field.passes(direction)(field.calls[row.name])
        benchmark.group = f"{op} {'x'.join(map(str, shape))} {_words(options)} {direction}"
        benchmark(once)
        direction_error = row.forward_error if direction == "forward" else row.gradient_error
        benchmark.extra_info |= {
            "kind": "kernel",
            "op": f"{op} {_words(options)}".strip(),
            "shape": "x".join(map(str, shape)),
            "direction": direction,
            "contender": contender,
            "ran": row.ran,
            "roof_ms": field.least_ms()[direction],
            "error": direction_error,
            "peak_bytes": peak_bytes(DEVICE, once),
        }

    return run


def _words(options: Options) -> str:
    plain = Options()
    return " ".join(
        name if value is True else f"{name}={value}"
        for name, value in vars(options).items()
        if value != getattr(plain, name)
    )
