"""adamw_step in each of its ways, against torch.optim.AdamW and the formula in float64."""

import math
import time
import warnings

import pytest
import torch
from torch import Tensor

import tilewise_kernels.op as op_module
from tilewise_kernels import adamw_step, adamw_triton, explain, force, lazy_triton, native, record
from tilewise_kernels.adamw import OP
from tilewise_kernels.errors import ArgumentError, KernelUnavailable

WAYS = ("triton", "native", "reference")
F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
SHAPES = [(), (1,), (7,), (33, 50), (3, 5, 17), (9000,), (0, 4)]


@pytest.fixture(params=WAYS)
def way(request):
    """Runs the test once in each implementation."""
    with force(request.param):
        yield request.param


def randn(*shape: int, seed: int, dtype: torch.dtype = F32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def parameters(dtype: torch.dtype = F32) -> list[Tensor]:
    return [randn(*shape, seed=i, dtype=dtype) for i, shape in enumerate(SHAPES)]


def gradients(step: int, dtype: torch.dtype = F32) -> list[Tensor]:
    """Of every size: the smallest are near eps."""
    sizes = [10.0 ** (-3 * (i % 4)) for i in range(len(SHAPES))]
    return [
        (size * randn(*shape, seed=100 * step + i)).to(dtype)
        for i, (shape, size) in enumerate(zip(SHAPES, sizes, strict=True))
    ]


class State:
    """Parameters with what a step needs beside them."""

    def __init__(self, params: list[Tensor], moments: torch.dtype | None = None) -> None:
        self.params = params
        self.m, self.v = (
            [torch.zeros_like(p, dtype=moments or p.dtype) for p in params] for _ in range(2)
        )

    def step(self, grads: list[Tensor], t: int, **options) -> Tensor | None:
        return adamw_step(self.params, grads, self.m, self.v, t, **({"lr": 1e-2} | options))


def largest_difference(a: list[Tensor], b: list[Tensor]) -> float:
    pairs = [(x, y) for x, y in zip(a, b, strict=True) if x.numel()]
    return max((x.double() - y.double()).abs().max().item() for x, y in pairs)


# ---- equal to torch ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", (F32, F64), ids=str)
@pytest.mark.parametrize("max_norm", (None, 0.5, 1e4))
def test_twenty_steps_equal_torchs(dtype, max_norm, way):
    """To rounding: against float64 no further off than torch itself, twice."""
    if way == "triton" and dtype == F64:
        return  # which it refuses: below
    option = {"betas": (0.8, 0.99), "eps": 1e-6, "weight_decay": 0.1}
    ours = State(parameters(dtype))
    plain, exact = ([torch.nn.Parameter(p.to(d)) for p in parameters(dtype)] for d in (dtype, F64))
    optimizers = [torch.optim.AdamW(each, lr=1e-2, **option) for each in (plain, exact)]
    for t in range(1, 21):
        grads = gradients(t, dtype)
        before = [g.clone() for g in grads]
        norm = ours.step(grads, t, max_norm=max_norm, **option)
        assert all(torch.equal(a, b) for a, b in zip(grads, before, strict=True))
        for params, optimizer in zip((plain, exact), optimizers, strict=True):
            for p, g in zip(params, grads, strict=True):
                p.grad = g.to(p.dtype, copy=True)
            if max_norm is not None:
                total = torch.nn.utils.clip_grad_norm_(params, max_norm)
                torch.testing.assert_close(norm, total.float())
            optimizer.step()
    assert max_norm is not None or norm is None
    error = largest_difference(ours.params, exact)
    assert error <= 2 * largest_difference(plain, exact) + 1e-7 * (1e-7 if dtype == F64 else 1)
    for name, moments in (("exp_avg", ours.m), ("exp_avg_sq", ours.v)):
        theirs = [optimizers[0].state[p][name] for p in plain]
        for a, b in zip(moments, theirs, strict=True):
            largest = b.abs().max().item() if b.numel() else 0.0  # means cancel
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6 * largest)


@pytest.mark.parametrize("dtype", (BF16, F16), ids=str)
def test_masters_follow_float32_and_parameters_are_rounded_from_them(dtype, way):
    if way == "triton" and dtype == BF16:
        return  # refused: its interpreter rounds bfloat16 wrongly
    params = parameters(dtype)
    master = [p.float() for p in params]
    ours, wide = State(params, F32), State([p.float() for p in params])
    for t in range(1, 11):
        grads = gradients(t, dtype)
        ours.step(grads, t, master=master, lr=1e-4)
        with force("reference"):
            wide.step([g.float() for g in grads], t, lr=1e-4)
    for p, w, exact in zip(params, master, wide.params, strict=True):
        torch.testing.assert_close(w, exact, rtol=1e-6, atol=1e-7)
        assert torch.equal(p, w.to(dtype))
    # a step too small for bfloat16 gets lost without a master
    assert any(not torch.equal(w, p.float()) for p, w in zip(params, master, strict=True))


@pytest.mark.parametrize("dtype", (BF16, F16), ids=str)
def test_half_precision_without_masters(dtype, way):
    """Moments in the parameters' dtype, each step rounded once, as torch does or better."""
    if way == "triton" and dtype == BF16:
        return
    ours = State(parameters(dtype))
    plain, exact = ([torch.nn.Parameter(p.to(d)) for p in parameters(dtype)] for d in (dtype, F64))
    optimizers = [torch.optim.AdamW(each, lr=1e-2, eps=1e-6) for each in (plain, exact)]
    grads = [g.sign() for g in gradients(1, dtype)]
    for t in range(1, 4):
        ours.step(grads, t, eps=1e-6)
        for params, optimizer in zip((plain, exact), optimizers, strict=True):
            for p, g in zip(params, grads, strict=True):
                p.grad = g.to(p.dtype)
            optimizer.step()
    assert largest_difference(ours.params, exact) <= 2 * largest_difference(plain, exact)


def test_some_masters_are_none(way):
    params = [randn(5, seed=0, dtype=F16), randn(6, seed=1)]
    master = [params[0].float(), None]
    state = State(params, F32)
    state.step([torch.ones_like(p) for p in params], 1, master=master)
    assert torch.equal(params[0], master[0].half()) and master[1] is None
    with force("reference"):
        alone = State([randn(6, seed=1)])
        alone.step([torch.ones(6)], 1)
    torch.testing.assert_close(params[1], alone.params[0])


def test_the_step_may_be_a_tensor_and_gradients_scaled(way):
    a, b = State(parameters()), State(parameters())
    for t in range(1, 4):
        first = a.step(gradients(t), t, max_norm=math.inf)
        scaled = [64 * g for g in gradients(t)]
        scale = 64.0 if t == 1 else torch.tensor([64.0])
        second = b.step(scaled, torch.tensor(float(t)), grad_scale=scale, max_norm=math.inf)
        torch.testing.assert_close(first, second)
    for x, y in zip(a.params, b.params, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-7)


# ---- layouts, repeats, strange numbers ---------------------------------------------------------


def strided(x: Tensor) -> Tensor:
    """The same values with gaps between them."""
    return x.repeat_interleave(2, -1)[..., ::2]


def turned(x: Tensor) -> Tensor:
    """The same values, dense, columns first."""
    return x.t().contiguous().t()


@pytest.mark.parametrize(
    "layouts",
    [(turned, turned, turned), (strided, turned, torch.clone), (torch.clone, strided, turned)],
    ids=["turned alike", "strided params", "strided grads"],
)
@pytest.mark.parametrize("dtype", (F32, F16), ids=str)
def test_any_strides_change_no_bit(layouts, dtype, way):
    """layouts: of parameters with their masters, of gradients, of moments."""
    of_params, of_grads, of_moments = layouts
    plain = State([randn(6, 9, seed=i, dtype=dtype) for i in (0, 1)], F32)
    moved = State([of_params(p) for p in plain.params])
    moved.m, moved.v = ([of_moments(torch.zeros(6, 9)) for _ in range(2)] for _ in range(2))
    masters = [[p.float() for p in plain.params] if dtype == F16 else None]
    masters += [masters[0] and [of_params(w) for w in masters[0]]]
    for t in (1, 2):
        grads = [randn(6, 9, seed=5 * t + i, dtype=dtype) for i in (0, 1)]
        norm = plain.step(grads, t, max_norm=1.0, master=masters[0])
        shuffled = [of_grads(g) for g in grads]
        strides = [x.stride() for x in (*moved.params, *moved.m, *moved.v)]
        torch.testing.assert_close(
            moved.step(shuffled, t, max_norm=1.0, master=masters[1]), norm, rtol=1e-6, atol=0
        )
        assert strides == [x.stride() for x in (*moved.params, *moved.m, *moved.v)]
        assert all(torch.equal(a, b) for a, b in zip(shuffled, grads, strict=True))
    for a, b in zip(
        [*plain.params, *plain.m, *plain.v], [*moved.params, *moved.m, *moved.v], strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_gaps_are_left_alone(way):
    memory = torch.full((5, 14), math.nan)
    param = memory[:, 1::2]
    param.copy_(randn(5, 7, seed=0))
    State([param]).step([torch.ones(5, 7)], 1)
    assert memory[:, ::2].isnan().all() and param.isfinite().all()


def test_repeats_and_threads_change_no_bit():
    found = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            state = State([randn(100003, seed=0), randn(333, 77, seed=1)])
            for t in (1, 2):
                norm = state.step([randn(*p.shape, seed=t) for p in state.params], t, max_norm=1.0)
            found.append([norm, *state.params, *state.m, *state.v])
    finally:
        torch.set_num_threads(threads)
    assert all(
        torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True)
    )


def test_the_norm_does_not_overflow_and_is_accurate(way):
    x = randn(100000, seed=3, dtype=F16) * 3e4
    x = x.clamp(-6e4, 6e4)
    norm = State([torch.zeros_like(x)], F32).step([x], 1, max_norm=1.0)
    torch.testing.assert_close(norm.double(), x.double().norm(), rtol=1e-6, atol=0.0)


def test_nan_reaches_what_it_must(way):
    grads = [torch.ones(4), torch.ones(5)]
    grads[0][1] = math.nan
    without, clipped = State([torch.ones(4), torch.ones(5)]), State([torch.ones(4), torch.ones(5)])
    without.step(grads, 1)
    assert without.params[0].isnan().tolist() == [False, True, False, False]
    assert without.params[1].isfinite().all()
    assert clipped.step(grads, 1, max_norm=1.0).isnan()
    assert all(p.isnan().all() for p in clipped.params)


@pytest.mark.parametrize("registered", (False, True))
def test_version_counters_of_what_is_written_go_up(registered, way):
    params = [strided(randn(3, 4, seed=0, dtype=F16)), randn(5, seed=1, dtype=F16)]
    state, master = State(params, F32), [p.float() for p in params]
    written = [*params, *state.m, *state.v, *master]
    grads = [torch.ones_like(p) for p in params]
    before = [t._version for t in (*written, *grads)]
    if registered:
        coefficients = torch.tensor([0.1, 0.2, 1.0], dtype=F64)
        lists = (params, grads, state.m, state.v, master)
        torch.ops.tilewise.adamw_step(coefficients, *lists, 0.9, 0.999, 1e-8, 1e-5, None)
    else:
        state.step(grads, 1, master=master)
    after = [t._version for t in (*written, *grads)]
    assert all(a < b for a, b in zip(before, after[: len(written)], strict=False))
    assert before[len(written) :] == after[len(written) :]


def test_parameters_that_require_grad_and_stale_graphs(way):
    p = torch.ones(3, requires_grad=True)
    y = p.square()
    state = State([p])
    state.step([torch.ones(3)], 1)
    assert p.requires_grad and p.is_leaf and p.grad is None
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_inference_mode(way):
    with torch.inference_mode():
        state = State([torch.ones(3), strided(torch.ones(2, 3))])
        state.step([torch.ones(3), torch.ones(2, 3)], 1)
    assert all((p < 1).all() for p in state.params)


def test_an_empty_list_does_nothing():
    assert adamw_step([], [], [], [], 1, lr=1.0) is None
    assert adamw_step([], [], [], [], 1, lr=1.0, max_norm=1.0) == 0


# ---- torch integration -------------------------------------------------------------------------


def test_opcheck():
    params, grads = [randn(3, 4, seed=0), randn(5, seed=1)], [randn(3, 4, seed=2), randn(5, seed=3)]
    m, v = ([torch.zeros_like(p) for p in params] for _ in range(2))
    masters = [torch.empty(0), torch.empty(0)]
    coefficients = torch.tensor([0.1, 0.2, 1.0], dtype=F64)
    arguments = (coefficients, params, grads, m, v, masters, 0.9, 0.999, 1e-8, 1e-5, 1.0)
    torch.library.opcheck(torch.ops.tilewise.adamw_step.default, arguments)


@pytest.mark.parametrize("backend", ("aot_eager", "inductor"))
def test_compile(backend):
    torch._dynamo.reset()
    compiled = torch.compile(adamw_step, fullgraph=True, backend=backend)
    ours, plain = State(parameters()[3:5]), State(parameters()[3:5])
    for t in range(1, 4):
        grads, step = gradients(t)[3:5], torch.tensor(float(t))
        norm = compiled(ours.params, grads, ours.m, ours.v, step, lr=1e-2, max_norm=0.1)
        torch.testing.assert_close(norm, plain.step(grads, t, max_norm=0.1))
    for a, b in zip(ours.params, plain.params, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dynamic", (False, True))
def test_compile_with_numbers(dynamic):
    """A step that is an int, strided tensors, masters."""
    torch._dynamo.reset()
    compiled = torch.compile(adamw_step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    ours, plain = (State([strided(randn(6, 9, seed=0, dtype=BF16))], F32) for _ in range(2))
    masters = [[p.float() for p in state.params] for state in (ours, plain)]
    for t in (1, 2, 3):
        grads = [randn(6, 9, seed=t, dtype=BF16)]
        lists = (ours.params, grads, ours.m, ours.v)
        assert compiled(*lists, t, lr=1e-2, master=masters[0], grad_scale=2.0) is None
        plain.step(grads, t, master=masters[1], grad_scale=2.0)
    torch.testing.assert_close([*masters[0], *ours.params], [*masters[1], *plain.params])


# ---- choosing ----------------------------------------------------------------------------------


def call(dtype: torch.dtype = F32) -> tuple:
    state = State(parameters(dtype))
    return state.params, gradients(1, dtype), state.m, state.v, 1


def test_explain_and_record_name_the_way():
    told = explain(adamw_step, *call(), lr=0.1)
    assert told.implementation == ("reference" if native.missing() else "native")
    assert set(told.others) | {told.implementation} == set(WAYS)
    with record() as seen, force("reference"):
        adamw_step(*call(), lr=0.1, max_norm=1.0)
    assert [(each.op, each.implementation) for each in seen] == [("adamw_step", "reference")]


def test_explain_changes_nothing():
    lists = call()
    before = [p.clone() for p in lists[0]]
    explain(adamw_step, *lists, lr=0.1)
    assert all(torch.equal(a, b) for a, b in zip(lists[0], before, strict=True))


def test_a_lost_extension_is_told_once(monkeypatch):
    monkeypatch.setattr(op_module, "_warned", set())
    lost = {**OP.implementations}
    lost["native"] = op_module.Implementation(
        "native", lambda *_: pytest.fail("ran"), devices=("cpu",), missing=lambda: "lost it"
    )
    monkeypatch.setattr(OP, "implementations", lost)
    with pytest.warns(RuntimeWarning, match="adamw_step leaves its native way: lost it"):
        adamw_step(*call(), lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adamw_step(*call(), lr=0.1)


def test_triton_refuses_float64():
    with force("triton"), pytest.raises(KernelUnavailable, match="a parameter is float64"):
        adamw_step(*call(F64), lr=0.1)


def test_forced_ways_that_are_not_there():
    with force("torch"), pytest.raises(KernelUnavailable, match="no 'torch' implementation"):
        State([torch.ones(3)]).step([torch.ones(3)], 1)


@pytest.mark.parametrize("moments, master", [(F32, None), (F64, F32)])
def test_native_refuses_what_it_has_no_kernel_for(moments, master):
    """Called directly: the public function does not come so far."""
    if native.missing():
        pytest.skip("the native extension is not built")
    param, m, v = torch.ones(3, dtype=F64), *(torch.zeros(3, dtype=moments) for _ in range(2))
    masters = [] if master is None else [torch.ones(3, dtype=master)]
    coefficients = torch.tensor([0.1, 0.2, 1.0], dtype=F64)
    with pytest.raises(ValueError, match="adamw: "):
        native.op("adamw")(
            coefficients, [param], [param], [m], [v], masters, 0.9, 0.999, 1e-8, 0.0, None
        )
    assert torch.equal(param, torch.ones(3, dtype=F64)) and not m.any()


@pytest.mark.parametrize("change", (None, "dtype", "shape", "overlap", "strided", "none"))
def test_the_quick_glance_passes_only_what_the_checks_would(change):
    """And passes the usual: else nothing would be quick."""
    if native.missing():
        pytest.skip("the native extension is not built")
    lists = [list(each) for each in call()[:4]]
    if change == "dtype":
        lists[1][2] = lists[1][2].double()
    elif change == "shape":
        lists[3][2] = torch.zeros(8)
    elif change == "overlap":
        lists[2][2] = lists[0][5][8000:8007]
    elif change == "strided":
        lists[0][2] = strided(lists[0][2])
    elif change == "none":
        lists[1] = lists[1][:-1]
    assert native.op("adamw_usual")(*lists, []) is (change is None)


# ---- Triton's table ----------------------------------------------------------------------------


def test_one_launch_for_every_kind(monkeypatch):
    """However many parameters: a kind is dtypes, whether there are masters, and alignment."""
    launched = []
    run = adamw_triton.Launch.run

    def counted(launch, device):
        launched.append(launch.grid)
        run(launch, device)

    monkeypatch.setattr(adamw_triton.Launch, "run", counted)
    sizes = [3, 5000, 1, 2048, 2049, 0, 700]
    params = [randn(n, seed=i, dtype=d) for d in (F32, F16) for i, n in enumerate(sizes)]
    params.append(torch.ones(6)[1:])  # off by four bytes
    ours, plain = (State([p.clone() if i < 14 else p for i, p in enumerate(params)]) for _ in "ab")
    plain.params[-1] = params[-1].clone()
    grads = [randn(*p.shape, seed=50 + i, dtype=p.dtype) for i, p in enumerate(params)]
    with force("triton"):
        ours.step(grads, 1)
    with force("reference"):
        plain.step(grads, 1)
    assert sorted(launched) == [(1,), (9,), (9,)]
    torch.testing.assert_close(ours.params, plain.params, rtol=1e-3, atol=1e-6)


def test_rows_cut_a_list_into_programs():
    lazy_triton.load(vars(adamw_triton))
    block = adamw_triton.ADAMW[0]
    row = (2**56 + 1, 2**63 - 1, 48, 64, 0)
    rows = ((*row, 2 * block + 1, 0, 3), (*row, 1, 3, 1))
    places, owners = adamw_triton._table(rows, torch.device("cpu"))
    assert places.tolist() == [list(each) for each in rows] and owners.tolist() == [0, 0, 0, 1]
    assert torch.equal(places, adamw_triton._written(rows, torch.device("cpu")))  # in CUDA graphs


def test_no_slower_than_twice_torchs_fused(record_property):
    """A guard against losing the parallel pass, loose enough for a busy machine."""
    ours = State([randn(2**21, seed=0)])
    plain = torch.nn.Parameter(randn(2**21, seed=0))
    plain.grad = randn(2**21, seed=1)
    optimizer = torch.optim.AdamW([plain], lr=1e-2, fused=True)
    best = {"ours": math.inf, "torch": math.inf}
    for t in range(1, 16):
        for name, call in (
            ("ours", lambda t=t: ours.step([plain.grad], t)),
            ("torch", optimizer.step),
        ):
            start = time.perf_counter()
            call()
            best[name] = min(best[name], time.perf_counter() - start)
    record_property("ratio", best["torch"] / best["ours"])
    assert best["ours"] <= 2 * best["torch"]


# ---- bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"params": [torch.ones(3).int()]}, r"params\[0\] is torch.int32"),
        ({"grads": []}, "grads is a list of 0; params holds 1"),
        ({"grads": [None]}, r"grads\[0\] is NoneType"),
        ({"grads": [torch.ones(4)]}, r"grads\[0\] is of shape \[4\]"),
        ({"grads": [torch.ones(3).half()]}, r"grads\[0\] is torch.float16"),
        ({"grads": [torch.ones(3).to_sparse()]}, r"grads\[0\] is torch.sparse_coo"),
        ({"grads": [torch.ones(3, device="meta")]}, r"grads\[0\] is on meta"),
        ({"exp_avgs": [torch.ones(3).double()]}, r"exp_avgs\[0\] is torch.float64"),
        ({"exp_avg_sqs": [torch.ones(2)]}, r"exp_avg_sqs\[0\] is of shape \[2\]"),
        ({"exp_avg_sqs": [torch.ones(3)] * 2}, "exp_avg_sqs is a list of 2"),
        ({"master": [torch.ones(3)]}, r"master\[0\] is torch.float32; None goes with"),
        ({"master": []}, "master is a list of 0"),
        ({"step": 0}, "step is 0"),
        ({"step": 1.5}, "step is 1.5"),
        ({"step": torch.ones(2)}, r"step is of shape \[2\]"),
        ({"lr": math.nan}, "lr is NaN"),
        ({"lr": -1.0}, "lr is -1.0"),
        ({"lr": torch.tensor(0.1)}, "lr is tensor"),
        ({"eps": math.nan}, "eps is NaN"),
        ({"eps": -1e-8}, "eps is -1e-08"),
        ({"weight_decay": math.inf}, "weight_decay is inf"),
        ({"betas": 0.9}, "betas is 0.9"),
        ({"betas": (0.9, math.nan)}, r"betas\[1\] is NaN"),
        ({"betas": (1.0, 0.9)}, r"betas\[0\] is 1.0"),
        ({"grad_scale": 0.0}, "grad_scale is 0.0"),
        ({"max_norm": 0.0}, "max_norm is 0.0"),
        ({"max_norm": math.nan}, "max_norm is NaN"),
        ({"params": None}, "params is a NoneType; pass a list"),
        ({"grads": torch.ones(1, 3)}, "grads is a Tensor; pass a list"),
        ({"exp_avgs": [torch.ones(1).expand(3)]}, r"exp_avgs\[0\] is expanded"),
        ({"step": torch.tensor(0)}, "step is 0"),
        ({"step": torch.tensor(math.nan)}, "step is nan"),
        ({"step": torch.tensor(1j)}, "step is torch.complex64"),
        ({"step": 10**400}, "step is too large"),
        ({"grad_scale": torch.tensor(0.0)}, "grad_scale is 0.0"),
        ({"grad_scale": torch.tensor(math.inf)}, "grad_scale is inf"),
    ],
)
def test_bad_input_changes_nothing(changes, message):
    given = {name: [torch.ones(3)] for name in ("params", "grads", "exp_avgs", "exp_avg_sqs")}
    given |= {"step": 1, "lr": 0.1}
    before = {name: given[name][0].clone() for name in ("params", "exp_avgs", "exp_avg_sqs")}
    with pytest.raises(ArgumentError, match=f"adamw_step: {message}"):
        adamw_step(**(given | changes))
    assert all(torch.equal(given[name][0], value) for name, value in before.items())


def negative(*shape):
    return torch.complex(torch.ones(shape), -torch.ones(shape)).conj().imag


def from_inference(*shape):
    with torch.inference_mode():
        return torch.ones(shape)


@pytest.mark.parametrize("size", (3, 0))
@pytest.mark.parametrize("name", ("params", "exp_avgs", "exp_avg_sqs", "master"))
@pytest.mark.parametrize("make, message", [
    (negative, r"a view with the negative bit; step .*\.resolve_neg\(\)"),
    (from_inference, r"made in inference mode; step .*\.clone\(\)"),
])  # fmt: skip
def test_tensors_that_torch_would_not_write_are_refused(make, message, name, size):
    dtype = BF16 if name == "master" else F32
    lists = {each: [torch.ones(4, dtype=dtype), torch.ones(size, dtype=dtype)]
             for each in ("params", "grads", "exp_avgs", "exp_avg_sqs")}  # fmt: skip
    lists[name] = [torch.ones(4), make(size)]
    before = {each: [t.clone() for t in tensors] for each, tensors in lists.items()}
    with pytest.raises(ArgumentError, match=rf"adamw_step: {name}\[1\] is {message}"):
        adamw_step(**lists, step=1, lr=0.1)
    for each, tensors in lists.items():
        assert all(map(torch.equal, tensors, before[each])), each


def test_gradients_may_be_negative_views_or_from_inference(way):
    for make in (negative, from_inference):
        grad, found = make(3), []
        for each in (grad, grad.clone().resolve_neg()):
            state = State([torch.ones(3)])
            state.step([each], 1)
            found.append(state.params[0])
        assert torch.equal(*found)


@pytest.mark.parametrize(
    "at, message",
    [
        ((0, 0, 1, 2, 3, 4, 5, 6), r"params\[1\] is in params\[0\]'s memory"),
        ((0, 1, 2, 3, 4, 5, 4, 6), r"exp_avg_sqs\[0\] is in exp_avgs\[0\]'s memory"),
        ((0, 1, 2, 1, 3, 4, 5, 6), r"grads\[1\] is in params\[1\]'s memory"),
        ((0, 1, 2, 3, 4, 5, 6, 6), r"exp_avg_sqs\[1\] is in exp_avg_sqs\[0\]'s memory"),
    ],
)
def test_tensors_that_share_memory_are_refused(at, message):
    """at: the place in memory of both parameters, both gradients, and so on."""
    memory = torch.ones(7, 3)
    lists = [[memory[at[i]], memory[at[i + 1]]] for i in range(0, 8, 2)]
    with pytest.raises(ArgumentError, match=message):
        adamw_step(*lists, 1, lr=0.1)
    assert torch.equal(memory, torch.ones(7, 3))


@pytest.mark.parametrize("of", ("params", "grads"))
def test_tensors_that_share_a_part_are_refused(of):
    memory = torch.ones(8)
    lists = {"params": [memory[:5]], "grads": [torch.ones(5)]}
    lists[of] = [*lists[of], memory[3:]] if of == "params" else [memory[3:]]
    lists["grads"] = [*lists["grads"], torch.ones(5)][: len(lists["params"])]
    state = State(lists["params"])
    with pytest.raises(ArgumentError, match=r"\[\d\] is in params\[0\]'s memory"):
        state.step(lists["grads"], 1)
    assert torch.equal(memory, torch.ones(8))


def test_columns_of_one_matrix_are_apart(way):
    memory = randn(6, 2, seed=0)
    plain = State([column.clone() for column in memory.unbind(1)])
    woven = State(list(memory.unbind(1)))
    for state in (plain, woven):
        state.step([torch.ones(6), -torch.ones(6)], 1)
    torch.testing.assert_close(woven.params, plain.params)


def test_gradients_may_share_memory(way):
    memory, grad = torch.ones(6, 3), torch.ones(1).expand(3)
    adamw_step(
        memory[:2].unbind(), [grad, grad], memory[2:4].unbind(), memory[4:].unbind(), 1, lr=1
    )
    assert torch.equal(memory[::2], memory[1::2])
