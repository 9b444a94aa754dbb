"""The benchmark: is a way right, how fast, how near the roof, and is it worth using.

    benchmark(CASES["softmax"], (8, 12, 512, 512)) -> Result

In this order, for our implementations, eager, SDPA and torch.compile on the same inputs:
1. right: outputs and gradients against float64. An output may be off by twice what eager is in the
   same dtype, a gradient by three times, plus 1e-5 of the scale. Who fails gets no number.
2. fast: rounds in which every contender runs once, in rotating order, so that a change of clock
   or a busy neighbour hits all alike; medians, and (third - first quartile) / median as the
   spread. CUDA events after an L2 flush on a GPU; on a CPU the wall clock, with caches as the
   last run left them.
3. near the roof: the op's own count of FLOPs and bytes over the matmul rate and copy bandwidth that
   this process measured, whichever takes longer. Above 100% the data sat in a cache.
4. memory: the peak a call allocates beyond its inputs. Scratch that oneDNN or cuBLAS keeps outside
   torch's allocators is not seen.

forward is without gradients; backward runs on a fresh forward; both is forward and backward in
training. The peak of backward and both is that of the two together.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .bench_cases import Case, Function, Options, Outputs, Shape, Tensors
from .errors import ArgumentError, KernelUnavailable
from .measure import Roof, Timing, machine, peak_bytes, roof, rounds, summary, timed
from .op import Cost, Op, _observing, _ops, force

DIRECTIONS = ("forward", "backward", "both")
MARGIN = 0.05  # differences below this are called none

Call = Callable[[Tensors], Outputs]
Grads = list[Tensor]  # what comes from above, one per output


@dataclass
class Row:
    """One contender. ran: the implementation that really ran; problem: why it has no numbers."""

    name: str
    ours: bool
    ran: str
    chosen: bool = False
    problem: str | None = None
    forward_error: float | None = None  # largest |difference| from float64 over the largest value
    gradient_error: float | None = None  # the worst gradient's
    timings: dict[str, Timing] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """One op at one shape; verdicts by direction."""

    op: str
    shape: Shape
    dtype: str
    device: str
    machine: str
    threads: int
    options: Options
    roof: Roof
    rows: list[Row]
    verdicts: dict[str, str]


# -- right? --------------------------------------------------------------------------------------


def outcome(
    call: Call,
    inputs: Tensors,
    grads: Grads | None,
    by_item: bool = False,
    fixed: Sequence[str] = (),
) -> Tensors:
    """The outputs "y", "y1", ... of call(inputs) and, with `grads` for them, a gradient "d..." per
    float input but the fixed ones."""
    if by_item:
        items = [
            outcome(
                call,
                {n: t[i : i + 1] for n, t in inputs.items()},
                None if grads is None else [g[i : i + 1] for g in grads],
                fixed=fixed,
            )
            for i in range(next(iter(inputs.values())).shape[0])
        ]
        return {name: torch.cat([item[name] for item in items]) for name in items[0]}
    if grads is None:
        with torch.no_grad():
            return _named(call(inputs))
    leaves = _leaves(inputs, fixed)
    outputs = call(leaves)
    detached = {name: y.detach() for name, y in _named(outputs).items()}
    return detached | _gradients(outputs, leaves, grads)


def _named(outputs: Outputs) -> Tensors:
    every = outputs if isinstance(outputs, tuple) else (outputs,)
    return {f"y{i or ''}": y for i, y in enumerate(every)}


def _leaves(inputs: Tensors, fixed: Sequence[str] = ()) -> Tensors:
    """The same data, float tensors asking for gradients."""
    return {
        n: t.detach().requires_grad_() if _is_float(t) and n not in fixed else t
        for n, t in inputs.items()
    }


def _is_float(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _gradients(outputs: Outputs, leaves: Tensors, grads: Grads) -> Tensors:
    wanted = {f"d{n}": t for n, t in leaves.items() if isinstance(t, Tensor) and t.requires_grad}
    found = torch.autograd.grad(list(_named(outputs).values()), list(wanted.values()), grads)
    return dict(zip(wanted, found, strict=True))


def _doubles(inputs: Tensors) -> Tensors:
    return {n: t.double() if _is_float(t) else t for n, t in inputs.items()}


def largest_errors(got: Tensors, exact: Tensors) -> dict[str, float]:
    """The largest |got - exact| per tensor; NaN where got holds one."""
    return {n: (got[n].double() - true).abs().max().item() for n, true in exact.items()}


def wrong(
    errors: Mapping[str, float],
    eager: Mapping[str, float],
    scales: Mapping[str, float],
    rounding: float = 0.0,
) -> str | None:
    """Why errors break the accuracy rule, or None. All three by tensor; y, y1 are the outputs.

    scales: the largest exact magnitude. Gradients may cancel to nothing, so theirs is at least y's.
    rounding: the share of the scale that is allowed besides.
    """
    for name, error in errors.items():
        factor = 2 if name.startswith("y") else 3
        limit = factor * eager[name] + (1e-5 + rounding) * max(scales[name], scales["y"])
        if not error <= limit:  # NaN is not
            return f"wrong here: {name} is off by {error:.3g}, allowed are {limit:.3g}"
    return None


class Judge:
    """Holds the float64 results of one case and the errors of eager, and judges contenders."""

    def __init__(self, case: Case, options: Options, inputs: Tensors, grads: Grads | None) -> None:
        def eager(tensors: Tensors) -> Outputs:
            return case.eager(tensors, options)

        self.inputs, self.grads, self.fixed = inputs, grads, case.fixed
        self.rounding = case.rounding(options)
        items = case.by_item and next(iter(inputs.values())).dim() > 1
        wide = None if grads is None else [grad.double() for grad in grads]
        self.exact = outcome(eager, _doubles(inputs), wide, items, case.fixed)
        theirs = outcome(eager, inputs, grads, items, case.fixed)
        self.eager_errors = largest_errors(theirs, self.exact)
        self.scales = {n: t.abs().max().item() for n, t in self.exact.items()}

    def judge(self, call: Call, row: Row) -> None:
        """Fill in the row's errors, and its problem when the accuracy rule is broken."""
        found = outcome(call, self.inputs, self.grads, fixed=self.fixed)
        errors = largest_errors(found, self.exact)
        row.problem = row.problem or wrong(errors, self.eager_errors, self.scales, self.rounding)
        if row.problem is not None:
            row.forward_error = row.gradient_error = None
            return
        relative = {n: e / (self.scales[n] or 1.0) for n, e in errors.items()}
        outputs = [error for name, error in relative.items() if name.startswith("y")]
        row.forward_error = max([*outputs, row.forward_error or 0.0])
        gradients = [error for name, error in relative.items() if name.startswith("d")]
        row.gradient_error = max(gradients, default=row.gradient_error)


# -- who competes --------------------------------------------------------------------------------


@contextlib.contextmanager
def observed() -> Iterator[list[tuple[str, Cost]]]:
    """Collect (implementation, cost) of each eager op call made inside the block."""
    seen: list[tuple[str, Cost]] = []

    def note(op: Op, args: tuple[object, ...]) -> None:
        seen.append((op.choose(args).name, op.cost(*args)))

    _observing.functions.append(note)
    try:
        yield seen
    finally:
        _observing.functions.remove(note)


def _ran(call: Call, inputs: Tensors) -> list[tuple[str, Cost]]:
    with observed() as seen, torch.no_grad():
        call(inputs)
    return seen


def _forced(case: Case, options: Options, name: str) -> Call:
    def call(inputs: Tensors) -> Outputs:
        with force(name, case.op):
            return case.ours(inputs, options)

    return call


def _our_ways(case: Case, options: Options, inputs: Tensors, every_way: bool) -> dict[str, Call]:
    """Our calls by implementation: the plain call under the name it chose, the others forced."""
    chosen = _ran(lambda t: case.ours(t, options), inputs)[0][0]
    calls: dict[str, Call] = {chosen: lambda t: case.ours(t, options)}
    for name in _ops[case.op].implementations if every_way else ():
        if name != chosen:
            calls[name] = _forced(case, options, name)
    return calls


def _rivals(
    case: Case, options: Options, peers: Mapping[str, Function], compiled: bool
) -> dict[str, Call]:
    """torch's own ways to do the same, and those of other libraries that were given."""

    def bound(function: Function) -> Call:
        return lambda t: function(t, options)

    rivals = {name: bound(f) for name, f in ({"eager": case.eager} | dict(case.rivals)).items()}
    if compiled:
        rivals["compile"] = _compiled(rivals["eager"])
    return rivals | {name: bound(function) for name, function in peers.items()}


def _compiled(eager: Call) -> Call:
    """eager under torch.compile; raises KernelUnavailable where that does not work."""
    from torch._dynamo.exc import TorchDynamoException  # slow to import

    torch.compiler.reset()  # earlier graphs count against the limit of recompilations
    compiled = torch.compile(eager, dynamic=False)

    def call(inputs: Tensors) -> Outputs:
        try:
            return compiled(inputs)
        except TorchDynamoException as error:
            why = str(error).strip().splitlines()[0]
            raise KernelUnavailable(f"torch.compile does not work here: {why}") from error

    return call


def _admit(call: Call, row: Row, judges: Sequence[Judge]) -> None:
    """Judge a contender that may also turn out to be missing here."""
    try:
        for judge in judges:
            judge.judge(call, row)
        if row.ours and row.problem is None:
            row.ran = _ran(call, judges[0].inputs)[0][0]
    except KernelUnavailable as error:
        row.problem = str(error)
    except torch.OutOfMemoryError:
        row.problem = "out of memory"


# -- how fast ------------------------------------------------------------------------------------


def _time(
    rows: Sequence[Row],
    calls: Mapping[str, Call],
    passes: Callable[[Call], Callable[[], dict[str, float]]],
    roof_ms: Mapping[str, float],
    device: str,
    seconds: float,
) -> None:
    """Add to each right row the timings of one kind of pass."""
    runs = {row.name: passes(calls[row.name]) for row in rows if row.problem is None}
    samples = rounds(runs, seconds) if runs else {}
    for row in rows:
        if row.name not in samples:
            continue
        peak = peak_bytes(device, runs[row.name])
        for direction, least in roof_ms.items():
            ms = [sample[direction] for sample in samples[row.name]]
            row.timings[direction] = summary(ms, least, peak)


def _inference(device: str, inputs: Tensors) -> Callable[[Call], Callable[[], dict[str, float]]]:
    def prepare(call: Call) -> Callable[[], dict[str, float]]:
        def run() -> dict[str, float]:
            with torch.no_grad():
                return {"forward": timed(device, lambda: call(inputs))[0]}

        return run

    return prepare


def _training(
    device: str, inputs: Tensors, grads: Grads, fixed: Sequence[str]
) -> Callable[[Call], Callable[[], dict[str, float]]]:
    leaves = _leaves(inputs, fixed)

    def prepare(call: Call) -> Callable[[], dict[str, float]]:
        def run() -> dict[str, float]:
            y: list[Outputs] = []
            forward, backward = timed(
                device, lambda: y.append(call(leaves)), lambda: _gradients(y[0], leaves, grads)
            )
            return {"backward": backward, "both": forward + backward}

        return run

    return prepare


# -- which to use --------------------------------------------------------------------------------


def verdict(rows: Sequence[Row], direction: str) -> str:
    """Which contender to use, in words: tilewise's choice against the fastest of torch's ways."""
    found = {row.name: row.timings[direction] for row in rows if direction in row.timings}
    rivals = [row.name for row in rows if row.name in found and not row.ours]
    chosen = next((row.name for row in rows if row.chosen), "")
    if not rivals:
        return "nothing to compare with"
    best = min(rivals, key=lambda name: found[name].ms)
    if chosen not in found:
        return f"use {best} here: tilewise has no number"
    ours, theirs = found[chosen], found[best]
    margin = _margin(ours, theirs)
    ratio = theirs.ms / ours.ms
    if ratio > 1 + margin:
        eager = f", {found['eager'].ms / ours.ms:.2f}x eager" if best != "eager" else ""
        text = f"use tilewise ({chosen}): {ratio:.2f}x as fast as {best}{eager}"
    elif ratio < 1 / (1 + margin):
        text = f"use {best} here: {1 / ratio:.2f}x as fast as tilewise ({chosen})"
    elif margin > MARGIN:
        text = f"too noisy to tell tilewise ({chosen}) from {best}: {margin:.0%} doubt"
    else:
        text = f"no difference: tilewise ({chosen}) and {best} are within {margin:.0%}"
    return text + _missed(rows, direction, ours, chosen)


def _margin(a: Timing, b: Timing) -> float:
    """The relative difference that a and b must exceed to count as one."""
    return max(MARGIN, 2 * (a.doubt + b.doubt))


def _missed(rows: Sequence[Row], direction: str, ours: Timing, chosen: str) -> str:
    """A remark when another implementation of ours was faster than the chosen one."""
    others = [r for r in rows if r.ours and r.name != chosen and direction in r.timings]
    best = min(others, key=lambda row: row.timings[direction].ms, default=None)
    if best is None:
        return ""
    timing = best.timings[direction]
    ratio = ours.ms / timing.ms
    if ratio <= 1 + _margin(ours, timing):
        return ""
    return f"; its {best.name} would have been {ratio:.2f}x as fast"


# -- all of it -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Contest:
    """One op at one shape, ready to be timed: inputs, and who competes after being judged."""

    case: Case
    shape: Shape
    options: Options
    device: str
    dtype: torch.dtype
    directions: Sequence[str]
    inputs: Tensors
    grads: Grads | None  # what comes from above, when a backward is wanted
    calls: dict[str, Call]
    rows: list[Row]

    @property
    def chosen(self) -> Row:
        return next(row for row in self.rows if row.chosen)

    def passes(self, direction: str) -> Callable[[Call], Callable[[], dict[str, float]]]:
        """Of a call, a function that runs it once in this direction and gives the times."""
        if direction == "forward":
            return _inference(self.device, self.inputs)
        if self.grads is None:
            raise ArgumentError(f"{self.case.op}: no {direction} was asked for")
        return _training(self.device, self.inputs, self.grads, self.case.fixed)

    def least_ms(self) -> dict[str, float]:
        """The roof's time per direction, for the work that the op itself counts."""
        measured, found = roof(self.device, self.dtype), {}
        call = self.calls[self.chosen.name]
        if "forward" in self.directions:
            cost = _ran(call, self.inputs)[0][1]
            found["forward"] = measured.ms(cost.flops, cost.bytes)
        if self.grads is not None:
            with observed() as seen:
                call(_leaves(self.inputs, self.case.fixed))
            cost = seen[0][1]
            found["backward"] = measured.ms(cost.backward_flops, cost.backward_bytes)
            found["both"] = measured.ms(cost.flops, cost.bytes) + found["backward"]
        return found


def contest(
    case: Case,
    shape: Shape,
    options: Options,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    directions: Sequence[str] = DIRECTIONS,
    every_way: bool = True,
    compiled: bool = False,
    peers: Mapping[str, Function] | None = None,
) -> Contest:
    """Make inputs and judge every contender; arguments as in benchmark. peers: other libraries'
    ways to do the same, by name."""
    case.check(shape, options)
    inputs, grads = _prepare(case, shape, options, device, dtype, directions)
    judges = [Judge(case, options, inputs, None)] if "forward" in directions else []
    judges += [] if grads is None else [Judge(case, options, inputs, grads)]
    ours = _our_ways(case, options, inputs, every_way)
    rivals = _rivals(case, options, peers or {}, compiled)
    rows = [Row(name, True, name, chosen=i == 0) for i, name in enumerate(ours)]
    rows += [Row(name, False, name) for name in rivals]
    for row in rows:
        _admit((ours | rivals)[row.name], row, judges)
    return Contest(
        case, shape, options, device, dtype, directions, inputs, grads, ours | rivals, rows
    )


def benchmark(
    case: Case,
    shape: Shape,
    options: Options | None = None,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    directions: Sequence[str] = DIRECTIONS,
    seconds: float = 20.0,
    every_way: bool = True,
    compiled: bool = False,
) -> Result:
    """Measure one op at one shape.

    directions: of forward, backward, both. seconds: for the timing rounds; checking comes on top.
    every_way: force every implementation of ours, not the chosen one alone. compiled: include
    torch.compile, which takes tens of seconds to start. Raises ArgumentError for a shape or option
    that the op does not take, or a direction it has not.
    """
    held = contest(
        case, shape, options or Options(), device=device, dtype=dtype, directions=directions,
        every_way=every_way, compiled=compiled,
    )  # fmt: skip
    least, rows, calls = held.least_ms(), held.rows, held.calls
    forward = {d: ms for d, ms in least.items() if d == "forward"}
    training = {d: ms for d, ms in least.items() if d != "forward"}
    share = seconds / (bool(forward) + bool(training))
    if forward:
        _time(rows, calls, held.passes("forward"), forward, device, share)
    if training:
        _time(rows, calls, held.passes("both"), training, device, share)
    for row in rows:
        row.timings = {d: row.timings[d] for d in directions if d in row.timings}
    return Result(
        case.op, shape, str(dtype).removeprefix("torch."), device, machine(device),
        torch.get_num_threads(), held.options, roof(device, dtype), rows,
        {direction: verdict(rows, direction) for direction in directions},
    )  # fmt: skip


def _prepare(
    case: Case,
    shape: Shape,
    options: Options,
    device: str,
    dtype: torch.dtype,
    directions: Sequence[str],
) -> tuple[Tensors, Grads | None]:
    """Inputs and, when a backward is wanted, the gradients that come from above."""
    trains = any(direction != "forward" for direction in directions)
    if trains and not case.trains:
        raise ArgumentError(f"{case.op} is used without gradients; pass direction forward alone")
    inputs = case.make(shape, options, device, dtype)
    if not trains:
        return inputs, None
    with torch.no_grad():
        outputs = _named(case.ours(inputs, options)).values()
    generator = torch.Generator(device).manual_seed(1)
    return inputs, [
        torch.randn(y.shape, device=device, generator=generator).to(y.dtype) for y in outputs
    ]
