"""Write the table of kernels/README.md: every op by dtype, device and implementation.

    python benches/op_table.py [--readme FILE] [--check]

For every implementation that this machine has, at a small odd shape with the op's usual options:
the largest error against float64 over that of eager PyTorch in the same dtype, of the outputs and
of the worst gradient, and whether ten runs give the same bits. Triton runs in its interpreter where
there is no GPU. --check only compares the implementations named there with those registered; exit
code 1 when they differ.
"""

import argparse
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

if "--check" not in sys.argv:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when the first kernel is made

import torch  # noqa: E402
from report import table, write_between_markers  # noqa: E402
from torch import Tensor  # noqa: E402

from tilewise_kernels.bench_cases import CASES, Case, Options, Shape  # noqa: E402
from tilewise_kernels.benchmark import Judge, largest_errors, outcome  # noqa: E402
from tilewise_kernels.errors import ArgumentError, KernelUnavailable  # noqa: E402
from tilewise_kernels.linear import PackedLinear  # noqa: E402
from tilewise_kernels.op import _ops, force  # noqa: E402

README = Path(__file__).parents[1] / "kernels" / "README.md"
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
REPEATS = 10
SHAPES: dict[str, tuple[Shape, Options]] = {
    "softmax": ((2, 3, 17, 33), Options(mask=True, causal=True)),
    "attention": ((2, 4, 33, 65, 40), Options(mask=True, causal=True, heads_kv=2)),
    "attention_varlen": ((3, 2, 40, 40), Options(causal=True)),
    "decode_attention": ((8, 4, 65, 40), Options(heads_kv=2, beams=True)),
    "layer_norm": ((33, 257), Options(residual=True)),
    "rms_norm": ((33, 257), Options(residual=True)),
    "linear_act": ((33, 40, 65), Options()),
    "feed_forward": ((33, 40, 65), Options(activation="silu", gated=True)),
    "linear": ((33, 40, 65), Options()),
    "rotary": ((2, 4, 17, 40), Options(heads_kv=2)),
    "log_softmax": ((9, 1025), Options()),
    "log_softmax_topk": ((9, 1025), Options(top=5)),
    "cross_entropy": ((9, 1025), Options()),
    "linear_cross_entropy": ((33, 40, 257), Options()),
    "adamw_step": ((5, 1025), Options()),
}


def rows(device: str) -> Iterator[list[str]]:
    """One row per op and implementation on this device."""
    for op, case in CASES.items():
        shape, options = SHAPES[op]
        for way in _ops[op].implementations.values():
            if way.absent(device) is None:
                cells = [cell(case, shape, options, way.name, device, dtype) for dtype in DTYPES]
                ran = [repeats for text, repeats in cells if text != "-"]
                same = ("yes" if all(ran) else "no") if ran else "-"
                where = "interpreter" if way.name == "triton" and device == "cpu" else device
                yield [f"`{op}`", way.name, where, *(text for text, _ in cells), same]


def cell(
    case: Case, shape: Shape, options: Options, way: str, device: str, dtype: torch.dtype
) -> tuple[str, bool]:
    """(the error ratios as text, whether every run gave the same bits) of one implementation."""
    try:
        inputs = case.make(shape, options, device, dtype)
        if case.op == "linear" and way == "torch":  # which takes no weight in panels
            inputs["packed"] = as_it_lies(inputs["weight"], inputs["bias"])
        with force(way, case.op):
            return measured(case, options, inputs)
    except (ArgumentError, KernelUnavailable):
        return "-", True  # explain() says why


def as_it_lies(weight: Tensor, bias: Tensor) -> PackedLinear:
    """What pack_linear makes where torch multiplies: on a GPU, or a CPU without AVX-512."""
    return PackedLinear(weight, None, bias, (weight.shape[0], weight.shape[1]))


def measured(case: Case, options: Options, inputs: dict) -> tuple[str, bool]:
    with torch.no_grad():
        outputs = case.ours(inputs, options)
    every = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator(every[0].device).manual_seed(1)
    grads = [torch.randn(y.shape, generator=generator, device=y.device).to(y.dtype) for y in every]
    judge = Judge(case, options, inputs, grads if _ops[case.op].inputs_with_grad else None)

    def run() -> dict:
        call = lambda t: case.ours(t, options)  # noqa: E731
        return outcome(call, inputs, judge.grads, fixed=case.fixed)

    first = run()
    errors = largest_errors(first, judge.exact)
    same = all(
        torch.equal(first[name], again[name])
        for again in (run() for _ in range(REPEATS - 1))
        for name in first
    )
    texts = [
        text
        for kind in ("y", "d")
        if (text := worst({n: e for n, e in errors.items() if n.startswith(kind)}, judge))
    ]
    return " / ".join(texts), same


def worst(errors: dict[str, float], judge: Judge) -> str:
    """The largest ratio of our error to eager's; in float64, where eager is exact, the error."""
    if not errors:
        return ""
    scale = max(judge.scales.values()) or 1.0
    if not any(judge.eager_errors[name] for name in errors):
        return f"{max(errors.values()) / scale:.0e}"
    floor = 1e-7 * scale  # below it either is rounding noise
    ratios = [(e + floor) / (judge.eager_errors[n] + floor) for n, e in errors.items()]
    return f"{max(ratios):.2f}"


def registered() -> set[tuple[str, str]]:
    return {(op, way) for op in CASES for way in _ops[op].implementations}


def listed(text: str) -> set[tuple[str, str]]:
    """(op, implementation) of every row of a table."""
    return set(re.findall(r"^\| `(\w+)` \| (\w+) \|", text, re.MULTILINE))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--readme", type=Path, default=README)
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    if arguments.check:
        differ = registered() ^ listed(arguments.readme.read_text())
        for op, way in sorted(differ):
            print(f"{arguments.readme}: {op} {way} is listed or registered, not both")
        return int(bool(differ))
    devices = ["cpu", *["cuda"] * torch.cuda.is_available()]
    heads = ["op", "implementation", "runs on", "float32", "bfloat16", "float16", "float64",
             "deterministic"]  # fmt: skip
    lines = table(heads, [row for device in devices for row in rows(device)])
    write_between_markers(arguments.readme, lines)
    return 0


if __name__ == "__main__":
    sys.exit(main())
