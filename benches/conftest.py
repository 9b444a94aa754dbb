"""What every bench shares: who competes at a shape, judged once, and the machine in the results."""

import functools
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peers import installed, peers

from tilewise_kernels.bench_cases import CASES, Options, Shape
from tilewise_kernels.benchmark import Contest, contest, observed
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
        "peers": installed(),
        "bandwidth": measured.bandwidth,
        "rate": measured.rate,
    }


@functools.lru_cache(maxsize=1)  # one shape's tensors at a time
def held(op: str, shape: Shape, options: Options, dtype: torch.dtype, compiled: bool) -> Contest:
    case = CASES[op]
    return contest(
        case, shape, options, device=DEVICE, dtype=dtype, directions=directions_of(op),
        every_way=False, compiled=compiled, peers=peers(op, options, DEVICE),
    )  # fmt: skip


def directions_of(op: str) -> tuple[str, ...]:
    return ("forward", "both") if CASES[op].trains else ("forward",)


@pytest.fixture
def bench_op(benchmark: Any, request: pytest.FixtureRequest) -> Callable[..., None]:
    """bench_op(op, shape, options, direction, contender): time one contender, if it is right.

    contender: "tilewise" for what tilewise chooses, else a rival's name; one that does not take the
    call is skipped with the reason.
    """

    def run(op: str, shape: Shape, options: Options, direction: str, contender: str) -> None:
        dtype = request.config.getoption("--dtype")
        compiled = (shape, options) == request.module.SHAPES[op][0]
        field = held(op, shape, options, getattr(torch, dtype), compiled)
        named = {row.name: row for row in field.rows if not row.ours}
        row = field.chosen if contender == "tilewise" else named[contender]
        if row.problem is not None:
            refuse = pytest.fail if contender in ("tilewise", "eager") else pytest.skip
            refuse(f"no number for {contender}: {row.problem}")
        once = field.passes(direction)(field.calls[row.name])
        benchmark.group = f"{op} {'x'.join(map(str, shape))} {_words(options)} {direction}"
        benchmark(once)
        direction_error = row.forward_error if direction == "forward" else row.gradient_error
        flops, moved = work(field, direction)
        benchmark.extra_info |= {
            "kind": "kernel",
            "op": f"{op} {_words(options)}".strip(),
            "shape": "x".join(map(str, shape)),
            "direction": direction,
            "contender": contender,
            "ran": row.ran,
            "roof_ms": field.least_ms()[direction],
            "flops": flops,
            "bytes": moved,
            "error": direction_error,
            "peak_bytes": peak_bytes(DEVICE, once),
        }

    return run


def work(field: Contest, direction: str) -> tuple[int, int]:
    """FLOPs and bytes that the op counts for this call."""
    with observed() as seen, torch.no_grad():
        field.calls[field.chosen.name](field.inputs)
    cost = seen[0][1]
    if direction == "forward":
        return cost.flops, cost.bytes
    return cost.flops + cost.backward_flops, cost.bytes + cost.backward_bytes


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every op at every shape of the module's SHAPES, direction by direction, rival by rival."""
    if "bench_op" not in metafunc.fixturenames:
        return
    cases = [
        (op, shape, options, direction, contender)
        for op, shapes in metafunc.module.SHAPES.items()
        for shape, options in shapes
        for direction in directions_of(op)
        for contender in contenders(op, options, (shape, options) == shapes[0])
    ]
    names = [
        f"{op}-{'x'.join(map(str, shape))}-{_words(o)}-{d}-{c}" for op, shape, o, d, c in cases
    ]
    metafunc.parametrize("op, shape, options, direction, contender", cases, ids=names)


def contenders(op: str, options: Options, first: bool) -> list[str]:
    """Who may compete. torch.compile takes long to start: at the first shape of an op only."""
    ours_and_torchs = ["tilewise", "eager", *CASES[op].rivals, *["compile"] * first]
    return [*ours_and_torchs, *peers(op, options, DEVICE)]


def _words(options: Options) -> str:
    plain = Options()
    return " ".join(
        name if value is True else f"{name}={value}"
        for name, value in vars(options).items()
        if value != getattr(plain, name)
    )
