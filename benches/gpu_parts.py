"""The parts of `make gpu`; gpu.py runs each in a process of its own.

    python benches/gpu_parts.py PART --out DIR --seconds N [--dry-run]

Every finding is one JSON line in DIR/results.jsonl, written when it is made, so that a part that is
stopped loses nothing.
"""

import argparse
import importlib
import importlib.util
import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed, wait
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

from gpu import STOPPED
from gpu_plan import HEAD, PARAMETERS, SMALL, STEPS, Race, check, plan, shrunk

ROOT = Path(__file__).resolve().parent.parent


class Run(NamedTuple):
    """What a part knows: where results go, how long it has, and whether there is no GPU."""

    out: Path
    end: float  # on time.monotonic's clock
    dry_run: bool

    def emit(self, kind: str, **values: Any) -> None:
        with (self.out / "results.jsonl").open("a") as file:
            file.write(json.dumps({"kind": kind, **values}) + "\n")

    def read(self, kind: str) -> list[dict[str, Any]]:
        file = self.out / "results.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        return [row for row in map(json.loads, lines) if row["kind"] == kind]

    @property
    def left(self) -> float:
        return self.end - time.monotonic()

    @property
    def device(self) -> str:
        return "cpu" if self.dry_run else "cuda"


def output_of(*command: str) -> str:
    """What a command prints, stripped; empty where it is missing or fails."""
    if shutil.which(command[0]) is None:
        return ""
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()


def nvidia_smi(*fields: str) -> list[str]:
    """The first GPU's values of nvidia-smi's fields; none without a GPU."""
    text = output_of("nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader")
    return [value.strip() for value in text.splitlines()[0].split(",")] if text else []


# -- environment ---------------------------------------------------------------------------------

PACKAGES = (
    "torch triton numpy safetensors tokenizers huggingface_hub click tqdm transformers pytest "
    "ninja flash_attn xformers liger_kernel"
).split()


def environment(run: Run) -> None:
    """The GPU, driver, versions and commit that every number below belongs to."""
    import torch
    import triton

    fields = ("name", "driver_version", "memory.total", "clocks.max.sm", "compute_cap")
    found: dict[str, Any] = dict(zip(fields, nvidia_smi(*fields), strict=False))
    found |= {"python": platform.python_version(), "torch": torch.__version__}
    found |= {"cuda": torch.version.cuda, "triton": triton.__version__, "cpus": os.cpu_count()}
    release = re.search(r"release \S+", output_of("nvcc", "--version"))
    found["nvcc"] = release[0] if release else None
    found["missing"] = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    commit = output_of("git", "rev-parse", "HEAD") or "unknown"
    changed = output_of("git", "status", "--porcelain", "--untracked-files=no")
    found["commit"] = commit + (" with changes" if changed else "")
    run.emit("environment", **found)
    if not run.dry_run:
        assert torch.cuda.is_available(), "torch sees no CUDA device"
        print(torch.cuda.get_device_properties(0))


# -- build ---------------------------------------------------------------------------------------


def build(run: Run) -> None:
    """Build the extension in place for this GPU alone, and read back what it was built with."""
    if not run.dry_run:
        [capability] = nvidia_smi("compute_cap")
        wishes = {"TILEWISE_BUILD_EXT": "1", "TORCH_CUDA_ARCH_LIST": capability}
        wishes |= {"MAX_JOBS": str(os.cpu_count())} | cuda_home()
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        subprocess.run(command, cwd=ROOT, env=os.environ | wishes, check=True)
    else:
        print("skipped: the extension is left as it is")
    from tilewise_kernels import native

    run.emit("build", problem=native.missing(), cuda=native.built_for_cuda())
    print(native.missing() or native.build_info())


def cuda_home() -> dict[str, str]:
    """CUDA_HOME as nvcc itself has it: torch looks beside the nvcc on PATH, which may be a script
    that calls the real one."""
    if "CUDA_HOME" in os.environ or shutil.which("nvcc") is None:
        return {}
    said = subprocess.run(["nvcc", "--dryrun", "none.cu"], capture_output=True, text=True).stderr
    top = re.search(r"^#\$ TOP=(.+)$", said, re.MULTILINE)
    return {} if top is None else {"CUDA_HOME": str(Path(top[1].strip()).resolve())}


# -- compile -------------------------------------------------------------------------------------

JOBS: list[tuple[str, str, Any]] = []  # filled before the workers fork: kernels do not pickle


class NoDriver:
    """Stands in for Triton's CUDA driver: kernels are compiled for the target, none is loaded."""

    def __init__(self, target: Any) -> None:
        self.target = target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self.target


def compile_job(index: int) -> dict[str, Any]:
    """Compile one launch into Triton's cache, under the very key that the launch will ask for."""
    import aot

    title, configuration, launch = JOBS[index]
    start = time.monotonic()
    kernel = launch.kernel.warmup(grid=launch.grid, **launch.arguments, **launch.options)
    registers, stack = aot.resources(kernel.asm["cubin"])
    row = {"title": title, "configuration": configuration, "registers": registers, "stack": stack}
    return row | {"shared": kernel.metadata.shared, "seconds": time.monotonic() - start}


def add_jobs(knob: Any, values: tuple[int, ...]) -> None:
    for launch in knob.at(values, "meta"):
        JOBS.append((knob.title, str(values), launch))


def compile_kernels(run: Run) -> None:
    """Warm Triton's cache on all CPU cores: the tables, what the benches launch, the candidates."""
    import aot  # before gpu_sweeps: it turns the interpreter off
    import gpu_sweeps
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    capability = 90 if run.dry_run else int(nvidia_smi("compute_cap")[0].replace(".", ""))
    driver.set_active(NoDriver(GPUTarget("cuda", capability, 32)))
    for title, launch in gpu_sweeps.warm_launches(capability):
        JOBS.append((title, "entry", launch))
    swept = list(gpu_sweeps.knobs(capability, dry_run=False))
    for knob in swept:
        add_jobs(knob, knob.entry)
    for name in aot.MODULES:
        for case in importlib.import_module(name).compilations(capability):
            JOBS.append((case.name, case.configuration, case.launch))
    for knob in swept:
        for candidate in knob.candidates:
            add_jobs(knob, candidate)
    if run.dry_run:
        print(f"{len(JOBS)} compilations, of which a dry run makes every fortieth")
        JOBS[:] = JOBS[::40]
    workers = os.cpu_count()
    with ProcessPoolExecutor(workers, get_context("fork")) as pool:
        futures = {pool.submit(compile_job, i): JOBS[i] for i in range(len(JOBS))}
        for future in as_completed(futures):
            title, configuration, _ = futures[future]
            problem = future.exception()
            row = {"title": title, "configuration": configuration, "problem": str(problem)[:300]}
            run.emit("compile", **(future.result() if problem is None else row))
    failed = [row for row in run.read("compile") if "problem" in row]
    print(f"{len(JOBS) - len(failed)} of {len(JOBS)} compiled")


# -- tests ---------------------------------------------------------------------------------------

VERDICT = re.compile(r"(tests/gpu/\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL)\b.*%\]")
INTERRUPTED, NO_TESTS = 2, 5  # exit codes of pytest


def tests(run: Run) -> None:
    """Every test marked gpu, the most telling first, dealt out to several processes."""
    if importlib.util.find_spec("pytest") is None:
        raise SystemExit("skipped: this python has no pytest")
    cores = os.cpu_count() or 1
    hands = min(12, cores - cores // 4)  # most of a test's time is Triton compiling on one core
    # in the interpreter a test takes seconds: a rehearsal plays two hands of forty
    dealt = 40 if run.dry_run else hands
    processes = [start_tests(hand, dealt) for hand in range(hands)]
    with ThreadPoolExecutor(hands) as pool:
        said = [pool.submit(follow_tests, run, process) for process in processes]
        wait(said, timeout=max(1, run.left - 15))  # so that pytest still shows what failed
        late = [p for p, words in zip(processes, said, strict=True) if not words.done()]
        for process in late:
            process.send_signal(signal.SIGINT)
        for words in said:
            print(words.result(), end="")
    codes = {process.wait() for process in processes}
    failed = any(row["verdict"] in ("FAILED", "ERROR") for row in run.read("test"))
    if failed or codes - {0, NO_TESTS} - ({INTERRUPTED} if late else set()):
        raise SystemExit(f"tests failed; pytest's exit codes: {sorted(codes)}")
    if late:
        raise SystemExit(STOPPED)


def start_tests(hand: int, hands: int) -> subprocess.Popen[str]:
    """pytest over every hands-th test, in the order that tests/gpu/conftest.py gives them."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "tests/gpu", "-v", "--tb=short"]
    command += ["-p", "no:cacheprovider"]
    given = {"TILEWISE_GPU_TEST_HAND": f"{hand}/{hands}", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=ROOT, env=os.environ | given, text=True, errors="replace",
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def follow_tests(run: Run, process: subprocess.Popen[str]) -> str:
    """Emit each verdict as it comes; what else pytest says, for the end."""
    assert process.stdout is not None
    words = []
    for line in process.stdout:
        if found := VERDICT.match(line):
            run.emit("test", name=found[1], verdict=found[2])
        if found is None:
            words.append(line)
        elif found[2] in ("FAILED", "ERROR"):
            print(line, end="", flush=True)
    return "".join(words)


# -- bench ---------------------------------------------------------------------------------------


def bench(run: Run) -> None:
    """Judge, then time: ours by implementation, eager, torch's fused ways, installed peers."""
    import torch

    from tilewise_kernels import measure

    dtype = torch.float32 if run.dry_run else torch.bfloat16
    measure.MIN_ROUNDS = 1 if run.dry_run else measure.MIN_ROUNDS
    measured = measure.roof(run.device, dtype)
    run.emit("roof", bandwidth=measured.bandwidth, rate=measured.rate)
    print(f"copy {measured.bandwidth / 1e9:.0f} GB/s, matmul {measured.rate / 1e12:.1f} TFLOP/s")
    races = list(plan())
    if run.dry_run:
        rehearse(run, races, dtype)
        return
    for race in races[:HEAD]:
        attempt(run, race, lambda race: time_eagerly(run, race, dtype))
    for race in SMALL:
        attempt(run, race, lambda race: time_replayed(run, race, dtype))
    for race in STEPS:
        attempt(run, race, lambda race: time_steps(run, race))
    for race in races[HEAD:]:
        attempt(run, race, lambda race: time_eagerly(run, race, dtype))


def rehearse(run: Run, races: list[Race], dtype: Any) -> None:
    """Every kind of race at a tiny size; raises for one that its case would refuse."""
    for race in (*races, *SMALL):
        check(race)
    for race in {str(shrunk(race)): race for race in races}.values():
        time_eagerly(run, shrunk(race), dtype)
    time_steps(run, STEPS[-1])
    print("skipped: replayed graphs, which need CUDA")


def mishaps() -> tuple[type[Exception], ...]:
    """What torch, Triton, a peer of another version or a contender without memory may raise."""
    from triton.errors import TritonError

    return (RuntimeError, TypeError, ValueError, AttributeError, AssertionError, TritonError)


def attempt(run: Run, race: Race, work: Callable[[Race], None]) -> None:
    """One race; a mishap is reported and the next one runs."""
    import torch

    try:
        work(race)
    except mishaps() as error:
        problem = first_line(error)
        print(f"{race.op} {race.shape}: {problem}", flush=True)
        run.emit("bench", op=race.op, shape=race.shape, options=race.options, problem=problem)
    torch.cuda.empty_cache()


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def entrants(race: Race, dtype: Any, device: str) -> Any:
    """A Contest at the race's shape whose contenders were judged at the judged one."""
    import torch

    from tilewise_kernels.bench_cases import CASES, Options
    from tilewise_kernels.benchmark import Contest, Judge, Row, observed
    from tilewise_kernels.op import _ops, force

    case, options = CASES[race.op], Options(**race.options)
    ways: dict[str, Any] = {"tilewise": lambda t: case.ours(t, options)}

    def forced(name: str) -> Any:
        def call(tensors: Any) -> Any:
            with force(name, race.op):
                return case.ours(tensors, options)

        return call

    names = [n for n in _ops[race.op].implementations if n not in ("reference", "blocked")]
    ways |= {name: forced(name) for name in names}
    others = rivals(case, options, race)

    def inputs(shape: tuple[int, ...]) -> Any:
        made = case.make(shape, options, device, dtype)
        with torch.no_grad():
            outputs = outputs_of(case.ours(made, options))
        return made, [torch.randn_like(y) for y in outputs] if case.trains else None

    small, small_grads = inputs(race.judged)
    judges = [Judge(case, options, small, None)]
    judges += [] if small_grads is None else [Judge(case, options, small, small_grads)]
    rows = []
    for name, call in (ways | others).items():
        row = Row(name, name in ways, name, chosen=name == "tilewise")
        try:
            for judge in judges:
                judge.judge(call, row)
        except mishaps() as error:
            row.problem = first_line(error)
        rows.append(row)
    judges.clear()
    made, grads = inputs(race.shape)
    with observed() as seen, torch.no_grad():
        ways["tilewise"](made)
    rows[0].ran = seen[0][0]
    agree(rows, ways | others, made)
    directions = ("forward", "backward") if grads is not None else ("forward",)
    return Contest(
        case, race.shape, options, device, dtype, directions, made, grads, ways | others, rows
    )


def outputs_of(result: Any) -> tuple[Any, ...]:
    return result if isinstance(result, tuple) else (result,)


def agree(rows: Any, calls: Any, inputs: Any) -> None:
    """At the full shape every way must give the first one's output, up to rounding."""
    import torch

    with torch.no_grad():
        first = outputs_of(calls["tilewise"](inputs))[0].float()
        for row in rows[1:]:
            if row.problem is None:
                got = outputs_of(calls[row.name](inputs))[0].float()
                error = (got - first).norm() / first.norm()
                if not error <= 0.02:
                    row.problem = f"differs from tilewise by {error:.3g} at the full shape"


def rivals(case: Any, options: Any, race: Race) -> dict[str, Any]:
    """Eager, torch's own kernels, and the peers that this python has."""
    from peers import peers

    found = {"eager": case.eager} | dict(case.rivals) | peers(race.op, options, "cuda")
    if race.op == "attention" and race.shape[2] > 4096:  # these keep the scores: no memory for them
        found = {name: way for name, way in found.items() if name not in ("eager", "sdpa math")}
    return {name: lambda t, way=way: way(t, options) for name, way in found.items()}


def time_eagerly(run: Run, race: Race, dtype: Any) -> None:
    """Interleaved rounds by CUDA events, the L2 flushed before each call."""
    from tilewise_kernels.benchmark import observed
    from tilewise_kernels.measure import rounds

    held = entrants(race, dtype, run.device)
    with observed() as seen:
        held.calls["tilewise"](held.inputs)
    cost, least = seen[0][1], held.least_ms()
    right = {row.name: held.calls[row.name] for row in held.rows if row.problem is None}
    seconds = 0.01 if run.dry_run else 0.4
    samples: dict[str, list[Any]] = {name: [] for name in right}
    for direction in ("forward", "both") if held.grads is not None else ("forward",):
        passes = {name: held.passes(direction)(call) for name, call in right.items()}
        for name, found in rounds(passes, seconds).items():
            samples[name] += found
    for row in held.rows:
        for direction in held.directions:
            back = direction == "backward"
            work = (cost.backward_flops, cost.backward_bytes) if back else (cost.flops, cost.bytes)
            ms = sorted(s[direction] for s in samples.get(row.name, []) if direction in s)
            report(run, race, row, direction, ms, work, least[direction])


def report(
    run: Run, race: Race, row: Any, direction: str, ms: list[float], work: Any, least: float
) -> None:
    """Emit and print one contender's line in one direction."""
    error = row.gradient_error if direction == "backward" else row.forward_error
    found: dict[str, Any] = {
        "op": race.op, "shape": race.shape, "options": race.options, "direction": direction,
        "way": row.name, "ours": row.ours, "ran": row.ran, "problem": row.problem, "error": error,
    }  # fmt: skip
    if ms:
        median, low, high = (ms[len(ms) * part // 4] for part in (2, 1, 3))
        found |= {"ms": median, "spread": (high - low) / median, "rounds": len(ms)}
        found |= {"tflops": work[0] / median / 1e9, "gbps": work[1] / median / 1e6}
        found["roof"] = least / median
    run.emit("bench", **found)
    speed = f"{found['ms']:.4f} ms {100 * found['roof']:.0f}%" if ms else row.problem
    print(f"{race.op} {race.shape} {direction} {row.name}: {speed}")


def time_replayed(run: Run, race: Race, dtype: Any) -> None:
    """A small forward as a replayed CUDA graph, which leaves out what the launch costs the CPU."""
    import torch
    from triton.testing import do_bench_cudagraph

    held = entrants(race, dtype, run.device)
    least = held.least_ms()["forward"]
    for row in held.rows:
        if row.problem is None:
            with torch.no_grad():
                call = held.calls[row.name]
                ms = do_bench_cudagraph(lambda c=call: c(held.inputs), rep=20, return_mode="median")
            report(run, race, row, "replayed", [ms], (0, 0), least)


def time_steps(run: Run, race: Race) -> None:
    """adamw_step, which changes its inputs: judged by the parameters after a few steps."""
    import bench_adamw  # a bench of pytest's, which lends how it draws, steps and judges
    import torch

    from tilewise_kernels.benchmark import Row, observed
    from tilewise_kernels.measure import roof, rounds, timed

    bench_adamw.LISTS |= PARAMETERS
    name, clip = race.options["parameters"], race.options.get("clip", False)
    dtype = torch.bfloat16 if race.options.get("bfloat16") else torch.float32
    rows, once = [], {}
    for way in ("tilewise", *bench_adamw.TORCHS):
        error, problem = bench_adamw.judged(name, clip, way, dtype)
        rows.append(Row(way, way == "tilewise", way, problem=problem, forward_error=error))
        once[way] = bench_adamw.stepper(bench_adamw.drawn(name, dtype), clip, way)
    with observed() as seen:
        once["tilewise"]()
    rows[0].ran, cost = seen[0]
    right = [row.name for row in rows if row.problem is None]
    passes = {n: lambda call=once[n]: {"step": timed(run.device, call)[0]} for n in right}
    found = rounds(passes, 0.01 if run.dry_run else 0.4)
    least = roof(run.device, dtype).ms(cost.flops, cost.bytes)
    for row in rows:
        ms = sorted(sample["step"] for sample in found.get(row.name, []))
        report(run, race, row, "step", ms, (cost.flops, cost.bytes), least)


# -- sweep ---------------------------------------------------------------------------------------


def sweep(run: Run) -> None:
    """Time the candidates round each table entry that compiled without spilling more than it."""
    import gpu_sweeps
    import torch

    major, minor = (0, 0) if run.dry_run else torch.cuda.get_device_capability()
    compiled: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in run.read("compile"):
        compiled.setdefault((row["title"], row["configuration"]), []).append(row)
    for knob in gpu_sweeps.knobs(10 * major + minor, run.dry_run):
        candidates = knob.candidates[:1] if run.dry_run else allowed(knob, compiled)
        expected = result(run, knob, knob.at(knob.entry, run.device))
        if expected is None:
            continue
        tried = [knob.entry, *candidates]
        found = {values: clock(run, knob, values, expected) for values in tried}
        times = {values: ms for values, ms in found.items() if ms is not None}
        if knob.entry in times:
            tell_sweep(run, knob, times)


def tell_sweep(run: Run, knob: Any, times: dict[tuple[int, ...], float]) -> None:
    best = min(times, key=lambda values: times[values])
    gain = times[knob.entry] / times[best]
    row = {"title": knob.title, "entry": knob.text(knob.entry), "best": knob.text(best)}
    rate = {knob.text(values): ms for values, ms in times.items()}
    run.emit("sweep", **row, gain=gain, entry_ms=times[knob.entry], times=rate)
    print(f"{knob.title}: {knob.text(best)}  # {gain:.3f}x {knob.text(knob.entry)}")


def allowed(knob: Any, compiled: dict[tuple[str, str], Any]) -> list[tuple[int, ...]]:
    """Candidates in the cache that spill no more than the entry; the rest would take too long."""

    def stack(values: tuple[int, ...]) -> float:
        rows = compiled.get((knob.title, str(values)), [])
        return max((row.get("stack", math.inf) for row in rows), default=math.inf)

    most = stack(knob.entry)
    return [c for c in knob.candidates if stack(c) <= (0 if most == math.inf else most)]


def result(run: Run, knob: Any, launches: Any) -> Any:
    """The knob's output, when all launches have run; None where one does not fit."""
    import torch
    from triton.runtime.errors import OutOfResources

    try:
        for launch in launches:
            launch.run(torch.device(run.device))
    except OutOfResources as error:
        print(error)
        return None
    return knob.found(launches)


def clock(run: Run, knob: Any, values: tuple[int, ...], expected: Any) -> Any:
    """Median milliseconds; None where the launch does not fit the GPU or gives other results."""
    import torch
    from triton.testing import do_bench

    launches = knob.at(values, run.device)
    got = result(run, knob, launches)
    if got is None or not torch.allclose(got, expected, rtol=2e-2, atol=2e-2):
        print(f"{knob.title} {values}: {'does not fit' if got is None else 'WRONG RESULT'}")
        return None
    if run.dry_run:
        start = time.perf_counter()
        result(run, knob, launches)
        return 1e3 * (time.perf_counter() - start)

    def call() -> None:
        for launch in launches:
            launch.run(torch.device(run.device))

    return do_bench(call, warmup=5, rep=25, return_mode="median")


PARTS: dict[str, Callable[[Run], None]] = {
    "environment": environment,
    "build": build,
    "compile": compile_kernels,
    "tests": tests,
    "bench": bench,
    "sweep": sweep,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--dry-run", action="store_true")
    given = parser.parse_args()
    PARTS[given.part](Run(given.out, time.monotonic() + given.seconds, given.dry_run))


if __name__ == "__main__":
    main()
