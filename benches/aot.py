"""Compile every Triton kernel for GPUs that are not here and read what the compiler made of it.

    python benches/aot.py [--quick] [--json FILE]

Prints one line per kernel, configuration and target: registers and stack bytes per thread, shared
memory per program, the tensor-core instruction, and what breaks the rule, if anything. The rule: no
stack, shared memory within the chip's, matrix products on the target's own tensor-core instruction.
Lines marked "report" are outside the rule but for fitting in memory. Exit code 1 when a line breaks
it.

Each kernel module offers `compilations(architecture)`, which yields `launch.Compilation`s built by
the very functions that build the real launches; arguments are specialised here as Triton's launcher
does it.
"""

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

os.environ["TRITON_INTERPRET"] = "0"  # before any kernel is made: it changes what a kernel is

import torch  # noqa: E402
import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.runtime.jit import mangle_type  # noqa: E402

from tilewise_kernels.launch import Compilation, Launch  # noqa: E402

MODULES = [
    "tilewise_kernels.activation_triton",
    "tilewise_kernels.adamw_triton",
    "tilewise_kernels.attention_triton",
    "tilewise_kernels.decode_attention_triton",
    "tilewise_kernels.cross_entropy_triton",
    "tilewise_kernels.norm_triton",
    "tilewise_kernels.linear_act_triton",
    "tilewise_kernels.rotary_triton",
    "tilewise_kernels.log_softmax_triton",
]
SHARED_MEMORY = {80: 163 << 10, 86: 99 << 10, 90: 227 << 10, 100: 227 << 10}  # bytes a program has
TENSOR_CORE = {80: "mma.sync", 86: "mma.sync", 90: "wgmma", 100: "tcgen05"}
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class Report(NamedTuple):
    """What one compilation came to; `verdict` is "ok", "report" or what breaks the rule."""

    kernel: str
    configuration: str
    target: str
    registers: int
    stack: int
    shared: int
    instruction: str
    verdict: str


def source(launch: Launch) -> ASTSource:
    """The kernel specialised as for a real launch: 1 is constant, multiples of 16 are known."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for index, parameter in enumerate(launch.kernel.params):
        name, value = parameter.name, launch.arguments[parameter.name]
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            signature[name], constants[name] = "constexpr", value
            continue
        signature[name] = mangle_type(value)
        if isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0):
            attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(launch.kernel, signature, constants, attributes)


def measure(case: Compilation, architecture: int) -> Report:
    """Compile one launch and read registers, stack, shared memory and instruction."""
    target = GPUTarget("cuda", architecture, 32)
    compiled = triton.compile(source(case.launch), target=target, options=case.launch.options)
    registers, stack = resources(compiled.asm["cubin"])
    shared = compiled.metadata.shared
    found = [name for name in ("tcgen05.mma", "wgmma", "mma.sync") if name in compiled.asm["ptx"]]
    instruction = found[0] if found else "none"
    verdict = judge(case, architecture, stack, shared, instruction)
    labels = (case.name, case.configuration, f"sm_{architecture}")
    return Report(*labels, registers, stack, shared, instruction, verdict)


def judge(case: Compilation, architecture: int, stack: int, shared: int, instruction: str) -> str:
    """The rule of this file for one compilation."""
    faults = []
    if shared > SHARED_MEMORY[architecture]:
        faults.append(f"needs {shared} bytes of shared memory of {SHARED_MEMORY[architecture]}")
    if case.strict and stack:
        faults.append(f"spills {stack} bytes")
    if case.strict and case.tensor_core and not instruction.startswith(TENSOR_CORE[architecture]):
        faults.append(f"no {TENSOR_CORE[architecture]}")
    return ", ".join(faults) or ("ok" if case.strict else "report")


def resources(cubin: bytes) -> tuple[int, int]:
    """(registers, stack bytes) per thread, as cuobjdump reads them from a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(CUOBJDUMP), "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    usage = dict(re.findall(r"(REG|STACK):(\d+)", text))
    return int(usage["REG"]), int(usage["STACK"])


def work(quick: bool) -> Iterator[tuple[Compilation, int]]:
    """Every (compilation, architecture) of the chosen run."""
    for name in MODULES:
        module = importlib.import_module(name)
        for architecture in SHARED_MEMORY:
            for case in module.compilations(architecture):
                if case.quick or not quick:
                    yield case, architecture


JOBS: list[tuple[Compilation, int]] = []  # filled before the workers fork: kernels do not pickle


def measure_job(index: int) -> Report:
    """The job of one worker process."""
    return measure(*JOBS[index])


def main() -> int:
    """Compile, print the table, write the JSON; 1 when a line breaks the rule."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="only the chosen dozen")
    parser.add_argument("--json", type=Path, help="also write the table to this file")
    options = parser.parse_args()
    JOBS.extend(work(options.quick))
    line = "{:22} {:46} {:7} {:>9} {:>6} {:>7}  {:12} {}"
    print(line.format(*(field for field in Report._fields)))
    with ProcessPoolExecutor(os.cpu_count(), get_context("fork")) as pool:
        reports = []
        for report in pool.map(measure_job, range(len(JOBS))):
            print(line.format(*report), flush=True)
            reports.append(report)
    if options.json:
        rows = [report._asdict() for report in reports]
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    return int(any(report.verdict not in ("ok", "report") for report in reports))


if __name__ == "__main__":
    sys.exit(main())
