"""Everything that needs a GPU, in one command, on a machine with its own python3, torch and triton.

    python3 benches/gpu.py [--budget SECONDS] [--out DIR] [--only PART ...] [--dry-run]

Installs nothing and needs no network. Parts, each in a process of its own that is killed when its
share of the budget is over, the next one running all the same: environment, build (the extension,
in place, for this GPU), compile (Triton's cache, on all cores), tests (tests/gpu), bench, sweep
(configurations round each table entry). What an early part leaves over, later ones may use.

DIR (default: $OUT, else benches/results/<gpu>/<date>) gets results.jsonl, log.txt and summary.txt.
--dry-run runs every part on the CPU, in Triton's interpreter, at tiny sizes, and says what it
skips. Exit code 1 when a part failed; one that its budget cut short has not.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
SHARES = {"environment": 15, "build": 60, "compile": 90, "tests": 130, "bench": 175, "sweep": 70}
BUDGET = sum(SHARES.values())  # seconds
STOPPED = 75  # exit code of a part that ended itself because its time was over

COMPUTES = ("attention", "attention_varlen", "linear_act", "feed_forward", "linear_cross_entropy")

Rows = list[dict[str, Any]]


# -- running -------------------------------------------------------------------------------------


def environment_of(part: str, dry_run: bool) -> dict[str, str]:
    """The child's variables: our sources, and the interpreter for a dry run's kernels."""
    paths = [str(folder) for folder in (ROOT / "kernels", ROOT / "engine", HERE / "kernels")]
    paths += filter(None, [os.environ.get("PYTHONPATH")])
    changed = {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    changed["TRITON_INTERPRET"] = str(int(dry_run and part != "compile"))
    if dry_run:
        changed["TILEWISE_GPU_TEST_DEVICE"] = "cpu"
    return os.environ | changed


def run_part(part: str, seconds: float, out: Path, dry_run: bool) -> dict[str, Any]:
    """Run one part, its output on the screen and in log.txt; kill its process group at the end."""
    command = [sys.executable, str(HERE / "gpu_parts.py"), part, "--out", str(out)]
    command += ["--seconds", f"{seconds:.0f}"] + ["--dry-run"] * dry_run
    print(f"\n== {part}, {seconds:.0f} s", flush=True)
    start = time.monotonic()
    with subprocess.Popen(
        command, cwd=ROOT, env=environment_of(part, dry_run), text=True, errors="replace",
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    ) as child, (out / "log.txt").open("a") as log:  # fmt: skip
        alarm = threading.Timer(seconds, os.killpg, (child.pid, signal.SIGKILL))
        alarm.start()
        print(f"\n== {part}", file=log)
        assert child.stdout is not None
        for line in child.stdout:
            print(line, end="", flush=True)
            log.write(line)
            log.flush()
        code = child.wait()
        alarm.cancel()
    told = {0: "ok", STOPPED: "stopped at its budget", -signal.SIGKILL: "stopped at its budget"}
    status = told.get(code, f"exit code {code}")
    row = {"kind": "part", "part": part, "status": status, "seconds": time.monotonic() - start}
    with (out / "results.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    return row


def folder(given: Path | None, dry_run: bool) -> Path:
    """Where results go; raises SystemExit on a machine without a GPU that was not told so."""
    smi = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    name = "dry-run"
    if not dry_run:
        try:
            found = subprocess.run(smi, capture_output=True, text=True, check=True).stdout
        except (OSError, subprocess.CalledProcessError) as error:
            sys.exit(f"no GPU answers here ({error}); --dry-run rehearses on the CPU")
        name = found.splitlines()[0].strip().replace(" ", "-")
    default = ROOT / "build" / name if dry_run else HERE / "results" / name / f"{date.today()}"
    out = given or Path(os.environ.get("OUT") or default)
    out.mkdir(parents=True, exist_ok=True)
    for old in ("results.jsonl", "log.txt", "summary.txt"):
        (out / old).unlink(missing_ok=True)
    return out.resolve()


# -- the summary ---------------------------------------------------------------------------------


def summary(rows: Rows) -> Iterator[str]:
    """The lines that matter, short enough for the end of a log."""
    by_kind: dict[str, Rows] = {}
    for row in rows:
        by_kind.setdefault(row["kind"], []).append(row)
    for row in by_kind.get("environment", []):
        yield ", ".join(f"{key} {value}" for key, value in row.items() if key != "kind")
    yield from compile_lines(by_kind.get("compile", []))
    yield from bench_lines(by_kind.get("roof", []), by_kind.get("bench", []))
    yield from sweep_lines(by_kind.get("sweep", []))
    yield from test_lines(by_kind.get("test", []))
    for row in by_kind.get("build", []):
        yield f"extension: {row['problem'] or 'built'}, {'with' if row['cuda'] else 'without'} CUDA"
    for row in by_kind.get("part", []):
        yield f"{row['part']:12} {row['seconds']:5.0f} s  {row['status']}"


def compile_lines(rows: Rows) -> Iterator[str]:
    failed = [row for row in rows if "problem" in row]
    spilled = sum(row.get("stack", 0) > 0 for row in rows)
    if rows:
        yield f"compiled {len(rows) - len(failed)} kernels, {spilled} of them spill"
    for row in failed[:5]:
        yield f"  {row['title']} {row['configuration']}: {row['problem'][:80]}"


def bench_lines(roofs: Rows, rows: Rows) -> Iterator[str]:
    """A line per op, direction and shape: our choice, and each other way's time over ours."""
    for roof in roofs:
        yield f"copy {roof['bandwidth'] / 1e9:.0f} GB/s, matmul {roof['rate'] / 1e12:.1f} TFLOP/s"
    groups: dict[tuple[Any, ...], Rows] = {}
    for row in rows:
        words = " ".join(name for name, value in row["options"].items() if value is True)
        key = (row["op"], row.get("direction", ""), words, tuple(row["shape"][::-1]))
        groups.setdefault(key, []).append(row)
    if rows:
        yield "bench: ms, rate, share of the roof; then how many times as long the others take"
    shown = ""
    for (op, direction, words, sizes), group in sorted(groups.items()):
        if f"{op} {direction} {words}" != shown:
            shown = f"{op} {direction} {words}"
            yield shown
        yield f" {'x'.join(map(str, sizes[::-1])):22} {contenders(group)}"


def contenders(group: Rows) -> str:
    first = group[0]
    if "ms" not in first:
        return str(first.get("problem"))[:90]
    computes = first["op"] in COMPUTES
    rate = f"{first['tflops']:.0f} TF/s" if computes else f"{first['gbps']:.0f} GB/s"
    mine = f"{first['ran']} {first['ms']:.3f} {rate} {100 * first['roof']:.0f}%"
    ran = {first["way"], first["ran"]}
    others = [row for row in group if row["way"] not in ran]
    told = [
        f"{r['way']} {r['ms'] / first['ms']:.2f}" if "ms" in r else f"{r['way']} -" for r in others
    ]
    return f"{mine:30} {' '.join(told)}"


def sweep_lines(rows: Rows) -> Iterator[str]:
    """Ready to be pasted into configs.py where the gain is worth it."""
    for row in rows:
        better = f"{row['best']}  # {row['gain']:.2f}x" if row["gain"] > 1.02 else "stays"
        yield f"{row['title']}: {row['entry']} {row['entry_ms']:.3f} ms -> {better}"


def test_lines(rows: Rows) -> Iterator[str]:
    counts: dict[str, int] = {}
    for row in rows:
        counts[row["verdict"]] = counts.get(row["verdict"], 0) + 1
    if rows:
        yield "tests: " + ", ".join(f"{n} {verdict.lower()}" for verdict, n in counts.items())
    failed = [row["name"] for row in rows if row["verdict"] in ("FAILED", "ERROR")]
    yield from (f"  {name}" for name in failed[:30])
    if len(failed) > 30:
        yield f"  and {len(failed) - 30} more"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--budget", type=float, default=BUDGET, help=f"seconds in all ({BUDGET})")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", nargs="+", choices=SHARES, help="run these parts alone")
    parser.add_argument("--dry-run", action="store_true", help="no GPU: rehearse on the CPU")
    given = parser.parse_args()
    out = folder(given.out, given.dry_run)
    shares = {part: SHARES[part] for part in SHARES if part in (given.only or SHARES)}
    deadline, unit = time.monotonic(), given.budget / sum(shares.values())
    parts = []
    for part, share in shares.items():
        deadline += share * unit
        seconds = deadline - time.monotonic()
        parts.append(run_part(part, seconds, out, given.dry_run))
    lines = (out / "results.jsonl").read_text().splitlines()
    text = "\n".join(summary([json.loads(line) for line in lines]))
    (out / "summary.txt").write_text(text + "\n")
    print(f"\n== summary ({out})\n{text}")
    return int(any(part["status"].startswith("exit code") for part in parts))


if __name__ == "__main__":
    sys.exit(main())
