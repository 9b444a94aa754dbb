"""The benchmark's instruments: the machine's roof, clocks, rounds of samples, peak memory.

Times come from CUDA events after an L2 flush on a GPU; on a CPU from the wall clock, with caches
as the last run left them.
"""

import functools
import gc
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

MIN_ROUNDS, MAX_ROUNDS = 5, 200
COPY_BYTES = {"cpu": 1 << 27, "cuda": 1 << 30}
MATMUL_SIZE = {"cpu": 1024, "cuda": 8192}


@dataclass(frozen=True)
class Timing:
    """ms: median; spread: interquartile range over it; roof_percent: of the roof's speed."""

    ms: float
    spread: float
    rounds: int
    roof_percent: float
    peak_bytes: int

    @property
    def doubt(self) -> float:
        """About the standard error of the median, as a share of it."""
        return self.spread / self.rounds**0.5


@dataclass(frozen=True)
class Roof:
    """What this machine measured: copy bandwidth [bytes/s] and matmul rate [FLOP/s]."""

    bandwidth: float
    rate: float

    def ms(self, flops: int, moved: int) -> float:
        """The least time such work takes: the larger of its two bounds."""
        return 1e3 * max(moved / self.bandwidth, flops / self.rate)


def machine(device: str) -> str:
    """The name of the processor or GPU."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


@functools.cache
def roof(device: str, dtype: torch.dtype) -> Roof:
    """Best copy bandwidth (read + write) and best square-matmul rate, measured once per process."""
    kind = torch.device(device).type
    source = torch.ones(COPY_BYTES[kind] // 4, device=device)
    target = torch.empty_like(source)
    bandwidth = 2 * COPY_BYTES[kind] / _best_seconds(device, lambda: target.copy_(source))
    n = MATMUL_SIZE[kind]
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return Roof(bandwidth, 2 * n**3 / _best_seconds(device, lambda: a @ b))


def _best_seconds(device: str, call: Callable[[], object]) -> float:
    call()
    end, best, runs = time.perf_counter() + 0.4, float("inf"), 0
    while runs < 3 or time.perf_counter() < end:
        best = min(best, *timed(device, call))
        runs += 1
    return best / 1e3


@functools.cache
def _cold(device: str) -> Tensor:
    """Memory larger than any GPU's L2; writing it also keeps the GPU busy while calls queue up."""
    return torch.empty(1 << 28, dtype=torch.uint8, device=device)


def timed(device: str, *steps: Callable[[], object]) -> list[float]:
    """Milliseconds of each step, run one after the other."""
    if device == "cpu":
        marks = [time.perf_counter()]
        for step in steps:
            step()
            marks.append(time.perf_counter())
        return [1e3 * (stop - start) for start, stop in zip(marks, marks[1:], strict=False)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(len(steps) + 1)]
    _cold(device).zero_()
    events[0].record()
    for step, event in zip(steps, events[1:], strict=True):
        step()
        event.record()
    events[-1].synchronize()
    return [start.elapsed_time(stop) for start, stop in zip(events, events[1:], strict=False)]


def peak_bytes(device: str, call: Callable[[], object]) -> int:
    """The most memory that torch's allocator holds during call(), beyond what it held before."""
    if device != "cpu":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler prints its own start and stop
    gc.collect()  # what dies during the call must have been born in it
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        call()
    changes = [e for e in profile.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for change in sorted(changes, key=lambda e: e.start_ns()):
        held += change.nbytes()
        peak = max(peak, held)
    return peak


def rounds(
    runs: Mapping[str, Callable[[], Mapping[str, float]]], seconds: float
) -> dict[str, list[Mapping[str, float]]]:
    """Run every contender once a round, in rotating order, for `seconds`, MIN_ROUNDS at least."""
    samples: dict[str, list[Mapping[str, float]]] = {name: [] for name in runs}
    for run in runs.values():
        run()  # warm-up
    end, names, count = time.perf_counter() + seconds, list(runs), 0
    while count < MIN_ROUNDS or (count < MAX_ROUNDS and time.perf_counter() < end):
        for name in names:
            samples[name].append(runs[name]())
        names.append(names.pop(0))
        count += 1
    return samples


def summary(ms: Sequence[float], roof_ms: float, peak: int) -> Timing:
    """The Timing of a list of samples."""
    median = statistics.median(ms)
    low, _, high = statistics.quantiles(ms, n=4)
    return Timing(median, (high - low) / median, len(ms), 100 * roof_ms / median, peak)
