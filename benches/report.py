"""Turn benchmark results into the tables of benches/README.md and a plot.

    OMP_NUM_THREADS=2 pytest benches --dtype float32 --benchmark-json=results.json
    python benches/report.py results.json [more.json ...] [--aot FILE] [--readme FILE] [--plot FILE]

The tables go between the lines `<!-- report:begin -->` and `<!-- report:end -->` of the README.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- report:begin -->", "<!-- report:end -->"
Bench = dict[str, Any]  # the extra_info of one bench, and "ms": the median


def benches_of(document: dict[str, Any], kind: str) -> list[Bench]:
    """The benches of one kind ("kernel" or "decoding"), in the order they ran."""
    return [
        bench["extra_info"] | {"ms": 1e3 * bench["stats"]["median"]}
        for bench in document["benchmarks"]
        if bench["extra_info"].get("kind") == kind
    ]


def grouped(benches: Iterable[Bench], *names: str) -> dict[tuple[str, ...], dict[str, Bench]]:
    """{values of names: {contender: bench}}."""
    groups: dict[tuple[str, ...], dict[str, Bench]] = defaultdict(dict)
    for bench in benches:
        groups[tuple(bench[name] for name in names)][bench["contender"]] = bench
    return groups


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A Markdown table; columns after the first are aligned right."""
    rule = ["---", *["---:"] * (len(heads) - 1)]
    return [f"| {' | '.join(cells)} |" for cells in (heads, rule, *rows)]


def conditions(document: dict[str, Any]) -> str:
    """One sentence: what the numbers were measured on."""
    of = document["machine_info"]["tilewise"]
    peers = "".join(f", {name} {version}" for name, version in of["peers"].items())
    return (
        f"{of['dtype']}: {of['device']}, {of['threads']} threads, torch {of['torch']}{peers}, "
        f"{document['datetime'][:10]}; this machine copies {of['bandwidth'] / 1e9:.1f} GB/s and "
        f"multiplies {of['rate'] / 1e9:.0f} GFLOP/s."
    )


def kernel_rows(benches: list[Bench]) -> Iterable[list[str]]:
    """One row per op, shape and direction where tilewise and eager both have a number."""
    for (op, shape, direction), by in grouped(benches, "op", "shape", "direction").items():
        if not {"tilewise", "eager"} <= set(by):
            continue
        ours, eager = by.pop("tilewise"), by["eager"]
        others = sorted(by, key=lambda name: by[name]["ms"])
        best = by[others[0]]
        yield [
            f"{op} {shape}",
            "forward+backward" if direction == "both" else direction,
            ours["ran"],
            f"{ours['ms']:.3g}",
            f"**{eager['ms'] / ours['ms']:.2f}x**",
            f"{best['ms'] / ours['ms']:.2f}x {others[0]}",
            ", ".join(f"{name} {by[name]['ms'] / ours['ms']:.2f}x" for name in others[1:]),
            rate(ours),
            f"{100 * ours['roof_ms'] / ours['ms']:.0f}%",
            f"{ours['error']:.1e}",
            f"{ours['peak_bytes'] / 1e6:.1f} / {eager['peak_bytes'] / 1e6:.1f}",
        ]


def rate(bench: Bench) -> str:
    """FLOP/s of what computes, bytes/s of what only moves."""
    flops, moved = (bench[name] / bench["ms"] / 1e6 for name in ("flops", "bytes"))
    return f"{flops:.0f} GFLOP/s" if bench["flops"] > 16 * bench["bytes"] else f"{moved:.1f} GB/s"


def decoding_rows(benches: list[Bench]) -> Iterable[list[str]]:
    """One row per model and search: tokens per second of each contender."""
    for (model, search), by in grouped(benches, "model", "search").items():
        rates = {name: bench["tokens"] / bench["ms"] * 1e3 for name, bench in by.items()}
        names = ("tilewise", "tilewise uncached", "transformers")
        cells = [f"{rates[name]:.0f}" if name in rates else "" for name in names]
        known = {"tilewise", "transformers"} <= set(rates)
        ratio = f"{rates['tilewise'] / rates['transformers']:.2f}x" if known else ""
        yield [model, search, *cells, ratio]


def section(document: dict[str, Any]) -> list[str]:
    """The Markdown of one result file."""
    lines = [conditions(document), ""]
    kernels, decoding = benches_of(document, "kernel"), benches_of(document, "decoding")
    if kernels:
        heads = ["op and shape", "direction", "runs on", "ms", "against eager", "the best rival",
                 "the others", "achieved", "of the roof", "error",
                 "peak MB, ours / eager"]  # fmt: skip
        lines += [*table(heads, kernel_rows(kernels)), ""]
    if decoding:
        heads = ["model", "search", "tilewise tokens/s", "without cache", "transformers", "ratio"]
        lines += [*table(heads, decoding_rows(decoding)), ""]
    return lines


def ahead_of_time(rows: list[dict[str, Any]]) -> list[str]:
    """The Markdown of benches/aot.py's table: bfloat16 at the sizes most models have."""
    sizes = (" D64 ", " D128 ", " N1024 ", " K1024 ")
    shown = [
        row
        for row in rows
        if row["configuration"].startswith("bfloat16")
        and any(size in row["configuration"] for size in sizes)
        and row["target"] in ("sm_80", "sm_90", "sm_100")
    ]
    heads = ["kernel", "configuration", "target", "registers", "stack", "shared", "instruction"]
    clean = sum(row["verdict"] == "ok" for row in rows)
    return [
        "## Compiled ahead of time",
        "",
        f"{len(rows)} configurations of the Triton kernels, for GPUs that are not here: {clean} "
        "meet the rule (no spilled register, products on tensor cores); the others, float32 above "
        "head dim 64 and a few wide rows, are only reported. bfloat16 at common sizes (stack and "
        "shared memory in bytes):",
        "",
        *table(heads, [[str(row[head]) for head in heads] for row in shown]),
    ]


def write_between_markers(
    readme: Path, lines: list[str], begin: str = BEGIN, end: str = END
) -> None:
    """Replace what is between the markers of the README; raises SystemExit without them."""
    text = readme.read_text()
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise SystemExit(f"{readme} lacks the lines {begin} and {end}")
    readme.write_text(f"{before}{begin}\n\n" + "\n".join(lines).rstrip() + f"\n\n{end}{after}")


def draw(documents: list[dict[str, Any]], file: str) -> None:
    """A bar per op, shape and direction: how many times as fast as eager."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    bars = [
        (f"{op} {shape} {direction}", by["eager"]["ms"] / by["tilewise"]["ms"])
        for document in documents
        for (op, shape, direction), by in grouped(
            benches_of(document, "kernel"), "op", "shape", "direction"
        ).items()
        if {"tilewise", "eager"} <= set(by)
    ]
    figure, axes = pyplot.subplots(figsize=(9, 1 + 0.28 * len(bars)), layout="constrained")
    axes.barh([name for name, _ in bars], [ratio for _, ratio in bars])
    axes.axvline(1, color="black", linewidth=0.8)
    axes.invert_yaxis()
    axes.set_xlabel("times as fast as eager PyTorch")
    figure.savefig(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("--readme", type=Path, default=Path(__file__).parent / "README.md")
    parser.add_argument("--aot", type=Path, help="the JSON of benches/aot.py")
    parser.add_argument("--plot")
    arguments = parser.parse_args()
    documents = [json.loads(file.read_text()) for file in arguments.results]
    lines = [line for document in documents for line in section(document)]
    if arguments.aot:
        lines += ahead_of_time(json.loads(arguments.aot.read_text()))
    write_between_markers(arguments.readme, lines)
    if arguments.plot:
        draw(documents, arguments.plot)


if __name__ == "__main__":
    main()
