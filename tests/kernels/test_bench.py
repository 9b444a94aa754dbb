"""The benchmark: it refuses wrong implementations, says who ran, counts right, and is fair.

Times are not asserted: only arithmetic on given times is, and that every number is there.
"""

import dataclasses
import importlib.util
from pathlib import Path

import pytest
import torch

from tilewise_kernels import softmax
from tilewise_kernels.bench_cases import CASES, Options
from tilewise_kernels.benchmark import Judge, Row, benchmark, contest, outcome, verdict, wrong
from tilewise_kernels.errors import ArgumentError
from tilewise_kernels.measure import Roof, Timing, peak_bytes, rounds, summary
from tilewise_kernels.op import _ops

SMALL = {
    "softmax": ((2, 3, 5, 16), Options(mask=True, causal=True)),
    "attention": ((2, 4, 6, 8, 16), Options(mask=True, causal=True, heads_kv=2)),
    "decode_attention": ((8, 4, 9, 16), Options(heads_kv=2, beams=True)),
    "layer_norm": ((6, 32), Options(residual=True)),
    "attention_varlen": ((3, 2, 9, 16), Options(causal=True)),
    "rms_norm": ((6, 32), Options(residual=True)),
    "linear_act": ((6, 8, 12), Options(activation="silu")),
    "feed_forward": ((6, 8, 12), Options(activation="gelu_tanh", gated=True)),
    "linear": ((6, 8, 12), Options()),
    "rotary": ((2, 4, 5, 8), Options(heads_kv=2)),
    "log_softmax": ((3, 5, 16), Options()),
    "log_softmax_topk": ((6, 50), Options(top=3)),
    "cross_entropy": ((6, 50), Options()),
    "linear_cross_entropy": ((6, 8, 50), Options()),
    "adamw_step": ((3, 17), Options()),
}


@pytest.fixture(autouse=True)
def without_interpreter(monkeypatch) -> None:
    """As on a user's machine: Triton's interpreter would take minutes and is not for benchmarks."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")


def timing(ms: float, spread: float = 0.0) -> Timing:
    return Timing(ms, spread, 100, 50.0, 0)


def row(name: str, ms: float | None, ours: bool = False, chosen: bool = False) -> Row:
    timings = {} if ms is None else {"forward": timing(ms)}
    return Row(name, ours, name, chosen=chosen, timings=timings)


def replace_forward(monkeypatch, op: str, name: str, forward) -> None:
    ways = _ops[op].implementations
    monkeypatch.setitem(ways, name, dataclasses.replace(ways[name], forward=forward))


def chosen_way(op: str) -> str:
    shape, options = SMALL[op]
    return contest(CASES[op], shape, options, directions=["forward"], every_way=False).chosen.ran


# -- every case ----------------------------------------------------------------------------------


def test_every_op_has_a_case() -> None:
    assert set(CASES) == set(_ops) == set(SMALL)


@pytest.mark.parametrize("op", SMALL)
def test_case_is_right_and_measured(op: str) -> None:
    """Every contender agrees with float64 under all options, and gets every number."""
    case, (shape, options) = CASES[op], SMALL[op]
    directions = ("forward", "backward", "both") if case.trains else ("forward",)
    result = benchmark(case, shape, options, directions=directions, seconds=0.01)
    assert set(result.verdicts) == set(directions)
    assert {"eager", "reference"} <= {r.name for r in result.rows}
    elsewhere = {"triton", "sdpa efficient", "sdpa cudnn"}  # these need a GPU
    elsewhere |= {"torch"} if op == "linear" and chosen_way(op) == "native" else set()
    for contender in result.rows:
        if contender.name in elsewhere:
            assert contender.problem is not None
            continue
        assert contender.problem is None
        assert set(contender.timings) == set(directions)
        assert contender.ran == contender.name
        for measured in contender.timings.values():
            assert measured.ms > 0 and measured.rounds >= 5 and measured.peak_bytes > 0
        assert 0 <= contender.forward_error < 1e-5


@pytest.mark.parametrize("op", SMALL)
def test_default_shape_fits_its_own_syntax(op: str) -> None:
    case = CASES[op]
    assert case.parse("x".join(map(str, case.shape))) == case.shape
    case.check(case.shape, case.options)


@pytest.mark.parametrize(
    ("op", "text"),
    [("attention", "2x8x512"), ("softmax", "8x"), ("softmax", ""), ("linear_act", "2x-3x4"),
     ("layer_norm", "4x0"), ("feed_forward", "1x2x3x4"), ("softmax", "\u0664x4"),
     ("softmax", "99999999x99999999"), ("softmax", "9" * 5000)],
)  # fmt: skip
def test_bad_shapes_name_the_syntax(op: str, text: str) -> None:
    with pytest.raises(ArgumentError, match=CASES[op].dims.replace(".", "[.]")):
        CASES[op].parse(text)


@pytest.mark.parametrize(
    ("op", "options", "words"),
    [("layer_norm", Options(causal=True), "no option causal"),
     ("softmax", Options(heads_kv=2), "no option heads_kv"),
     ("attention", Options(heads_kv=3), "must divide the 8 heads"),
     ("linear_act", Options(activation="swish"), "gelu_tanh")],
)  # fmt: skip
def test_bad_options_are_named(op: str, options: Options, words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        benchmark(CASES[op], CASES[op].shape, options)


def test_decode_attention_has_no_backward() -> None:
    with pytest.raises(ArgumentError, match="without gradients"):
        benchmark(CASES["decode_attention"], (2, 2, 4, 8), directions=["both"])


def test_inputs_repeat_and_are_of_realistic_scale() -> None:
    case = CASES["linear_act"]
    one, two = (case.make((64, 256, 128), Options(), "cpu", torch.float32) for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert one["x"].std().item() == pytest.approx(1, rel=0.05)
    assert one["weight"].std().item() == pytest.approx(256**-0.5, rel=0.05)


# -- refusing what is wrong ----------------------------------------------------------------------


@pytest.mark.parametrize("damage", [1.01, torch.nan])
def test_a_wrong_implementation_gets_no_number(monkeypatch, damage: float) -> None:
    name, (shape, options) = chosen_way("softmax"), SMALL["softmax"]
    right = _ops["softmax"].implementations[name].forward
    replace_forward(monkeypatch, "softmax", name, lambda *args: (right(*args)[0] * damage,))
    result = benchmark(CASES["softmax"], shape, options, directions=["forward"], seconds=0.01)
    refused = {r.name: r for r in result.rows}[name]
    assert refused.problem is not None and refused.problem.startswith("wrong here: y is off by")
    assert refused.timings == {} and refused.forward_error is None
    assert result.verdicts["forward"] == "use eager here: tilewise has no number"


def test_a_wrong_gradient_is_enough_to_be_refused(monkeypatch) -> None:
    name, (shape, options) = chosen_way("layer_norm"), SMALL["layer_norm"]
    ways = _ops["layer_norm"].implementations
    right = ways[name].backward

    def wrong_weight_gradient(*args):
        dx, dresidual, dweight, dbias = right(*args)
        return dx, dresidual, dweight + 1e-2, dbias

    broken = dataclasses.replace(ways[name], backward=wrong_weight_gradient)
    monkeypatch.setitem(ways, name, broken)
    held = contest(CASES["layer_norm"], shape, options, every_way=False)
    assert held.chosen.problem is not None
    assert held.chosen.problem.startswith("wrong here: dweight is off by")


def test_accuracy_rule() -> None:
    scales = {"y": 2.0, "dx": 1e-9}
    eager = {"y": 1e-6, "dx": 1e-6}
    assert wrong({"y": 2.1e-5, "dx": 2.2e-5}, eager, scales) is None
    assert "y is off by" in str(wrong({"y": 2.3e-5, "dx": 0.0}, eager, scales))
    assert "dx is off by" in str(wrong({"y": 0.0, "dx": 2.4e-5}, eager, scales))
    assert "y is off by nan" in str(wrong({"y": float("nan"), "dx": 0.0}, eager, scales))


def test_item_by_item_is_the_whole() -> None:
    """The reference may go one batch item at a time; that must not change what it says."""
    case, (shape, options) = CASES["attention"], SMALL["attention"]
    inputs = case.make(shape, options, "cpu", torch.float64)
    grads = [torch.randn(2, 4, 6, 16, dtype=torch.float64)]
    parts = outcome(lambda t: case.eager(t, options), inputs, grads, True)
    whole = outcome(lambda t: case.eager(t, options), inputs, grads, False)
    assert set(parts) == {"y", "dq", "dk", "dv"}
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-12, atol=1e-12)


def test_half_precision_is_judged_by_what_its_rounded_inputs_give() -> None:
    case, (shape, options) = CASES["feed_forward"], SMALL["feed_forward"]
    inputs = case.make(shape, options, "cpu", torch.bfloat16)
    judge = Judge(case, options, inputs, None)
    contender = Row("eager", False, "eager")
    judge.judge(lambda t: case.eager(t, options), contender)
    assert contender.problem is None and 1e-4 < contender.forward_error < 3e-2


# -- who ran -------------------------------------------------------------------------------------


def test_every_implementation_is_named_and_forced(monkeypatch) -> None:
    """The reference row really runs the reference, whatever the call would choose."""
    calls = []
    right = _ops["layer_norm"].implementations["reference"].forward

    def counted(*args):
        calls.append(1)
        return right(*args)

    replace_forward(monkeypatch, "layer_norm", "reference", counted)
    shape, options = SMALL["layer_norm"]
    chosen = contest(CASES["layer_norm"], shape, options, every_way=False).chosen.ran
    assert chosen != "reference" and not calls
    every = contest(CASES["layer_norm"], shape, options)
    ran = [r.ran for r in every.rows if r.ours and not r.problem]
    assert ran[0] == chosen and "reference" in ran and len(set(ran)) == len(ran)
    assert calls


# -- arithmetic ----------------------------------------------------------------------------------


def test_roof_is_the_larger_bound_and_percent_its_share() -> None:
    roof = Roof(bandwidth=1e9, rate=1e12)
    assert roof.ms(flops=10**9, moved=10**7) == pytest.approx(10)  # bytes bind
    assert roof.ms(flops=10**11, moved=10**7) == pytest.approx(100)  # FLOPs bind
    told = summary([40.0, 50.0, 50.0, 50.0, 90.0], roof_ms=10.0, peak=7)
    assert (told.ms, told.rounds, told.peak_bytes) == (50.0, 5, 7)
    assert told.roof_percent == pytest.approx(20)
    assert told.spread == pytest.approx((70 - 45) / 50)


def test_rounds_are_interleaved() -> None:
    order: list[str] = []

    def run(name: str):
        return lambda: (order.append(name), {"forward": 1.0})[1]

    samples = rounds({"a": run("a"), "b": run("b"), "c": run("c")}, seconds=0.0)
    assert {name: len(found) for name, found in samples.items()} == {"a": 5, "b": 5, "c": 5}
    assert order[3:12] == ["a", "b", "c", "b", "c", "a", "c", "a", "b"]  # after the warm-up


def test_peak_counts_what_lives_at_once() -> None:
    x = torch.randn(256, 256)  # 256 KiB

    def three_in_turn_two_at_once() -> torch.Tensor:
        y = x + 1
        for _ in range(2):
            y = y + 1
        return y

    assert peak_bytes("cpu", three_in_turn_two_at_once) in range(2 * 2**18, 2 * 2**18 + 4096)


def test_softmax_keeps_no_second_matrix_alive() -> None:
    """The memory column agrees with the op's contract: native softmax allocates its output."""
    if chosen_way("softmax") != "native":
        pytest.skip("the native extension is not built")
    x = torch.randn(64, 4096)
    peak = peak_bytes("cpu", lambda: softmax(x))
    assert x.numel() * 4 <= peak < x.numel() * 4 * 1.1


# -- verdicts ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([row("native", 1.0, True, True), row("eager", 2.0)],
         "use tilewise (native): 2.00x as fast as eager"),
        ([row("torch", 1.0, True, True), row("eager", 4.0), row("sdpa", 1.5)],
         "use tilewise (torch): 1.50x as fast as sdpa, 4.00x eager"),
        ([row("native", 3.0, True, True), row("eager", 2.0)],
         "use eager here: 1.50x as fast as tilewise (native)"),
        ([row("native", 1.04, True, True), row("eager", 1.0)],
         "no difference: tilewise (native) and eager are within 5%"),
        ([row("native", None, True, True), row("eager", 1.0), row("compile", 0.5)],
         "use compile here: tilewise has no number"),
        ([row("a", 2.0, True, True), row("b", 1.0, True), row("eager", 1.0)],
         "use eager here: 2.00x as fast as tilewise (a); its b would have been 2.00x as fast"),
        ([row("native", 1.0, True, True), row("eager", None)], "nothing to compare with"),
    ],
)  # fmt: skip
def test_verdict(rows: list[Row], words: str) -> None:
    assert verdict(rows, "forward") == words


def test_verdict_admits_noise() -> None:
    rows = [row("native", 1.0, True, True), row("eager", 1.3)]
    rows[1].timings["forward"] = timing(1.3, spread=2.0)  # 100 rounds: 20% doubt, doubled
    assert verdict(rows, "forward") == "too noisy to tell tilewise (native) from eager: 40% doubt"


# -- the report ----------------------------------------------------------------------------------


def report_module():
    file = Path(__file__).parents[2] / "benches" / "report.py"
    spec = importlib.util.spec_from_file_location("bench_report", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def kernel_bench(contender: str, seconds: float) -> dict:
    told = {"kind": "kernel", "op": "softmax", "shape": "4x4", "direction": "both",
            "contender": contender, "ran": "native", "roof_ms": 0.5, "error": 1e-7,
            "flops": 3_000_000, "bytes": 2_000_000, "peak_bytes": 2_000_000}  # fmt: skip
    return {"extra_info": told, "stats": {"median": seconds}}


def test_report_replaces_what_is_between_its_markers(tmp_path: Path) -> None:
    module, readme = report_module(), tmp_path / "README.md"
    document = {
        "datetime": "2026-01-02T03:04:05",
        "machine_info": {"tilewise": {"device": "a CPU", "threads": 2, "torch": "2", "rate": 5e9,
                                      "dtype": "float32", "bandwidth": 1e9,
                                      "peers": {"liger_kernel": "1.2"}}},
        "benchmarks": [kernel_bench("tilewise", 0.001), kernel_bench("eager", 0.003),
                       kernel_bench("sdpa", 0.002)],
    }  # fmt: skip
    readme.write_text(f"before\n{module.BEGIN}\nold\n{module.END}\nafter\n")
    for _ in range(2):  # the second time changes nothing
        module.write_between_markers(readme, module.section(document))
        text = readme.read_text()
        assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
        assert text.count("a CPU, 2 threads, torch 2, liger_kernel 1.2,") == 1
        row = (
            "| softmax 4x4 | forward+backward | native | 1 | **3.00x** | 2.00x sdpa | eager 3.00x "
            "| 2.0 GB/s | 50% | 1.0e-07 |"
        )
        assert row in text
    readme.write_text("no markers")
    with pytest.raises(SystemExit, match="lacks the lines"):
        module.write_between_markers(readme, [])
