"""tilewise bench: the kernels against torch, for the user's shape, with a verdict."""

import dataclasses
from typing import TYPE_CHECKING, Any

import click

from .console import Command, print_json, progress, usable_device
from .generate import DTYPES

if TYPE_CHECKING:
    from tilewise_kernels.bench_cases import Case, Options
    from tilewise_kernels.benchmark import Result, Row

OPS = [
    "softmax", "attention", "attention_varlen", "decode_attention", "layer_norm", "rms_norm",
    "linear_act", "feed_forward", "linear", "rotary", "log_softmax", "log_softmax_topk",
    "cross_entropy", "linear_cross_entropy", "adamw_step",
]  # fmt: skip
DIRECTIONS = ["forward", "backward", "both"]
SECONDS_FOR_ONE, SECONDS_FOR_ALL = 20.0, 15.0


@click.command(cls=Command)
@click.argument("op", required=False, type=click.Choice(OPS), metavar="[OP]")
@click.option("--shape", help="Such as 8x12x512x512; see above.")
@click.option("--dtype", type=click.Choice(DTYPES), help="float32, or bfloat16 on a GPU.")
@click.option(
    "--direction", type=click.Choice([*DIRECTIONS, "all"]), default="all", show_default=True
)
@click.option("--device", metavar="cpu|cuda|cuda:N", help="The GPU when there is one.")
@click.option("--causal", is_flag=True, help="softmax, attention: no key after its query.")
@click.option("--mask", is_flag=True, help="softmax, attention: padded keys.")
@click.option("--bias", is_flag=True, help="attention: a bias with gradient on the scores.")
@click.option("--window", type=click.IntRange(0), help="attention: no key further than this.")
@click.option("--beams", is_flag=True, help="decode_attention: rows read their ancestors' cache.")
@click.option("--residual", is_flag=True, help="layer_norm, rms_norm: with the residual add.")
@click.option("--heads-kv", type=click.IntRange(1), help="attention, rotary: key and value heads.")
@click.option("--activation", default="gelu", show_default=True, help="linear_act, feed_forward.")
@click.option("--gated", is_flag=True, help="feed_forward: gated, without biases.")
@click.option("--int8", is_flag=True, help="linear: int8 weights and activations.")
@click.option(
    "--top", type=click.IntRange(1), default=8, show_default=True, help="log_softmax_topk."
)
@click.option(
    "--compile/--no-compile",
    "compiled",
    default=None,
    help="torch.compile too (needs a compiler).  [default: with OP]",
)
@click.option(
    "--time-budget",
    type=click.FloatRange(0.0, min_open=True),
    metavar="SECONDS",
    help=f"Measuring time.  [default: {SECONDS_FOR_ONE:.0f}, without OP"
    f" {SECONDS_FOR_ALL:.0f} for all]",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
@click.option(
    "--plot",
    type=click.Path(dir_okay=False, writable=True),
    metavar="FILE",
    help="Draw the times (.png, .svg or .pdf).",
)
def bench(
    op: str | None,
    shape: str | None,
    dtype: str | None,
    direction: str,
    device: str | None,
    compiled: bool | None,
    time_budget: float | None,
    as_json: bool,
    plot: str | None,
    **options: Any,
) -> None:
    """Measure OP, or every op in short, against eager PyTorch.

    \b
    Shapes: softmax, log_softmax   ...xN, such as 8x12x512x512
            attention              BxHxSqxSkxD
            attention_varlen       BxHxSxD, about S tokens a sequence
            decode_attention       RxHxTxD
            layer_norm, rms_norm   ...xN
            linear, linear_act     MxKxN
            feed_forward           MxExF
            rotary                 BxHxSxD
            log_softmax_topk       MxV
            cross_entropy          MxV
            linear_cross_entropy   MxKxV
            adamw_step             TxN

    Every implementation is first checked against float64 at this shape; one that is wrong gets no
    number. % of roof compares with the copy bandwidth and matmul rate that this machine measures.
    Without --shape and the options of the op, each runs at a default.
    """  # fmt: skip
    if plot is not None:
        _need_matplotlib()
        _check_plot(plot)
    requests = _requests(op, shape, options)
    where = usable_device(device)
    seconds = time_budget or (SECONDS_FOR_ONE if op else SECONDS_FOR_ALL)
    results = [
        _measure(request, where, dtype, direction, seconds / len(requests), op, compiled)
        for request in progress(requests, len(requests), "op")
    ]
    if plot is not None:
        _draw(results, plot)
    if as_json:
        print_json({"results": [dataclasses.asdict(result) for result in results]})
        return
    click.echo("\n\n".join(map(_full, results)) if op else _brief(results))


Request = tuple["Case", tuple[int, ...], "Options"]


def _requests(op: str | None, shape: str | None, given: dict[str, Any]) -> list[Request]:
    """The cases to run, checked; raises UsageError for a shape or option that does not fit."""
    from tilewise_kernels.bench_cases import CASES, Options
    from tilewise_kernels.errors import ArgumentError

    options = Options(**given)
    if op is None:
        if shape is not None or options != Options():
            raise click.UsageError("--shape and the options of an op need an OP to go with")
        return [(case, case.shape, case.options) for case in CASES.values()]
    case = CASES[op]
    if shape is None and options == Options():
        return [(case, case.shape, case.options)]
    try:
        sizes = case.shape if shape is None else case.parse(shape)
        case.check(sizes, options)
    except ArgumentError as error:
        raise click.UsageError(str(error)) from error
    return [(case, sizes, options)]


def _measure(
    request: Request,
    device: str,
    dtype: str | None,
    direction: str,
    seconds: float,
    op: str | None,
    compiled: bool | None,
) -> "Result":
    import torch

    from tilewise_kernels.benchmark import benchmark

    case, shape, options = request
    wanted = DIRECTIONS if direction == "all" else [direction]
    if not case.trains and direction not in ("all", "forward") and op is not None:
        raise click.UsageError(f"{case.op} is used without gradients; it has --direction forward")
    return benchmark(
        case,
        shape,
        options,
        device=device,
        dtype=getattr(torch, dtype or ("float32" if device == "cpu" else "bfloat16")),
        directions=wanted if case.trains else ["forward"],
        seconds=seconds,
        every_way=op is not None,
        compiled=(op is not None) if compiled is None else compiled,
    )


# -- text ----------------------------------------------------------------------------------------


def _title(result: "Result") -> str:
    set_ones = [
        f"{name}={value}" if not isinstance(value, bool) else name
        for name, value in vars(result.options).items()
        if value != getattr(type(result.options)(), name)
    ]
    return " ".join([result.op, "x".join(map(str, result.shape)), result.dtype, *set_ones])


def _machine(result: "Result") -> str:
    threads = f", {result.threads} threads" if result.device == "cpu" else ""
    return (
        f"{result.machine}{threads}: copies {result.roof.bandwidth / 1e9:.1f} GB/s, "
        f"multiplies {result.roof.rate / 1e9:.0f} GFLOP/s in {result.dtype}"
    )


def _full(result: "Result") -> str:
    """Everything about one op: a table and a verdict per direction."""
    lines = [_title(result), _machine(result)]
    heads = f"{'ms':>9} {'spread':>7} {'% roof':>7} {'error':>9} {'peak MB':>8}"
    for direction, verdict in result.verdicts.items():
        lines += ["", f"{direction:<20} {heads}"]
        lines += [_line(row, direction) for row in result.rows]
        lines += [f"=> {verdict}"]
    chosen = next(row for row in result.rows if row.chosen)
    return "\n".join([*lines, "", f"* what tilewise chose for this call; {chosen.ran} really ran"])


def _line(row: "Row", direction: str) -> str:
    name = ("tilewise " if row.ours else "") + row.ran + (" *" if row.chosen else "")
    timing = row.timings.get(direction)
    if timing is None:
        return f"{name:<20} {row.problem}"
    error = row.forward_error if direction == "forward" else row.gradient_error
    return (
        f"{name:<20} {timing.ms:>9.3f} {timing.spread:>7.0%} {timing.roof_percent:>7.1f} "
        f"{error or 0.0:>9.1e} {timing.peak_bytes / 1e6:>8.1f}"
    )


def _brief(results: list["Result"]) -> str:
    """One line per op and direction: ours against the best of torch's."""
    heads = f"{'':<41} {'tilewise':>9} {'eager':>9} {'% roof':>7}  verdict"
    lines = [_machine(results[0]), "milliseconds, medians of interleaved rounds", "", heads]
    for result in results:
        for direction in ("forward", "both"):
            if direction in result.verdicts:
                lines.append(_brief_line(result, direction))
    return "\n".join(lines)


def _brief_line(result: "Result", direction: str) -> str:
    named = {"forward": "forward", "both": "forward+backward"}[direction]
    times = {row.name: row.timings.get(direction) for row in result.rows}
    chosen = next(row for row in result.rows if row.chosen)
    ours, eager = times[chosen.name], times["eager"]
    text = f"{_title(result) if direction == 'forward' else '':<41} {named:<16}"
    for timing in (ours, eager):
        text += f" {timing.ms:>9.3f}" if timing else f" {'-':>9}"
    roof = f"{ours.roof_percent:>7.1f}" if ours else f"{'-':>7}"
    problem = f" ({chosen.problem})" if chosen.problem else ""
    return f"{text} {roof}  {result.verdicts[direction]}{problem}"


# -- plot ----------------------------------------------------------------------------------------


def _need_matplotlib() -> None:
    from importlib.util import find_spec

    from ..errors import KernelUnavailable

    if find_spec("matplotlib") is None:
        raise KernelUnavailable("--plot needs matplotlib: pip install 'tilewise[bench]'")


def _check_plot(file: str) -> None:
    from pathlib import Path

    path = Path(file)
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise click.UsageError(f"--plot is {file}; its name must end in .png, .svg or .pdf")
    if not path.parent.is_dir():
        raise click.UsageError(f"--plot is {file}; there is no folder {path.parent}")


def _draw(results: list["Result"], file: str) -> None:
    """A bar per contender and direction, one panel per op."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(
        len(results), 1, figsize=(8, 1 + 2.2 * len(results)), squeeze=False, layout="constrained"
    )
    for panel, result in zip(panels[:, 0], results, strict=True):
        bars = [(row, d) for d in result.verdicts for row in result.rows if d in row.timings]
        panel.barh(
            [f"{direction} {row.ran}" for row, direction in bars],
            [row.timings[direction].ms for row, direction in bars],
            color=["C0" if row.ours else "C7" for row, _ in bars],
        )
        panel.invert_yaxis()
        panel.set_title(_title(result), fontsize=10)
        panel.set_xlabel("milliseconds (blue: tilewise)")
    figure.savefig(file)
    pyplot.close(figure)
