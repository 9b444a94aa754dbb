"""Between feed_forward's products: activation, gate and dropout, in each of the ways."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tilewise_kernels import explain, feed_forward, force, linear_act
from tilewise_kernels.dropout import draw_seed, kept
from tilewise_kernels.measure import peak_bytes

WAYS = ("triton", "native", "torch", "reference")
F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
EAGER = {
    "gelu": F.gelu,
    "gelu_tanh": lambda h: F.gelu(h, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "quick_gelu": lambda h: h * torch.sigmoid(1.702 * h),
    "identity": lambda h: h,
}
Tensors = dict[str, Tensor]


@pytest.fixture(params=WAYS)
def way(request):
    """Runs the test once in each implementation."""
    with force(request.param):
        yield request.param


@pytest.fixture
def poisoned():
    """Uninitialised memory holds NaN, so that a result which was never written shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = F32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def block(*shape: int, K: int, inner: int, N: int, dtype: torch.dtype = F32) -> Tensors:
    """A gated block at the scale it has in a model."""
    x, b1, b2 = randn(*shape, K, seed=1), randn(inner, seed=3), randn(N, seed=5)
    w1, gate = (randn(inner, K, seed=s) / max(K, 1) ** 0.5 for s in (2, 6))
    w2 = randn(N, inner, seed=4) / inner**0.5
    tensors = {"x": x, "w1": w1, "b1": b1, "w2": w2, "b2": b2, "gate": gate}
    return {name: t.to(dtype) for name, t in tensors.items()}


def eager(x, w1, b1, w2, b2, *, activation="gelu", gate=None, factors=None):
    """factors: what dropout multiplies with."""
    a = EAGER[activation](F.linear(x, w1, b1))
    a = a if gate is None else a * F.linear(x, gate)
    return F.linear(a if factors is None else a * factors.to(a.dtype), w2, b2)


def run(function, tensors: Tensors, grad: Tensor, **options) -> Tensors:
    """y and the gradient of every tensor, by name."""
    leaves = {name: t.detach().clone().requires_grad_() for name, t in tensors.items()}
    y = function(**leaves, **options)
    found = torch.autograd.grad(y, list(leaves.values()), grad.to(y.dtype))
    return {"y": y, **{f"d{name}": g for name, g in zip(leaves, found, strict=True)}}


def double(tensors: Tensors) -> Tensors:
    return {name: t.double() for name, t in tensors.items()}


def factors_of_the_next_call(rows: int, inner: int, p: float) -> Tensor:
    """What dropout will multiply with after torch.manual_seed(11), which is set anew."""
    torch.manual_seed(11)
    seed = draw_seed(torch.device("cpu"))
    torch.manual_seed(11)
    return kept(seed, torch.arange(rows)[:, None], torch.arange(inner), p) / (1 - p)


# ---- accuracy ----------------------------------------------------------------------------------


# 33 rows of 50: past every vector and in several tiles; 300 columns: more than a strip.
@pytest.mark.parametrize("dtype", (F32, BF16, F16), ids=str)
@pytest.mark.parametrize("activation", EAGER)
def test_gated_accuracy(activation, dtype, way, assert_accurate, poisoned):
    if way == "triton" and dtype == BF16:
        return  # refused, as test_feed_forward.py checks
    for rows, inner in ((33, 50), (5, 300)):
        tensors = block(rows, K=20, inner=inner, N=12, dtype=dtype)
        grad = randn(rows, 12, seed=9, dtype=dtype)
        before = [t.clone() for t in (*tensors.values(), grad)]
        ours = run(feed_forward, tensors, grad, activation=activation)
        plain = run(eager, tensors, grad, activation=activation)
        assert_accurate(ours, plain, run(eager, double(tensors), grad, activation=activation))
        now = (*tensors.values(), grad)
        assert all(torch.equal(a, b) for a, b in zip(before, now, strict=True))
        with torch.no_grad():
            again = feed_forward(**tensors, activation=activation)
        torch.testing.assert_close(again, ours["y"])


@pytest.mark.parametrize("activation", ("gelu", "relu", "identity"))
@pytest.mark.parametrize("gated", (False, True), ids=("plain", "gated"))
def test_dropout_accuracy(gated, activation, way, assert_accurate, poisoned):
    """Against eager with the mask that the seed stands for."""
    tensors = block(3, 11, K=20, inner=300, N=12)
    if not gated:
        del tensors["gate"]
    grad = randn(3, 11, 12, seed=9)
    factors = factors_of_the_next_call(33, 300, 0.3).view(3, 11, 300)
    ours = run(feed_forward, tensors, grad, activation=activation, dropout_p=0.3)
    option = {"activation": activation, "factors": factors}
    exact = run(eager, double(tensors), grad, **option)
    assert_accurate(ours, run(eager, tensors, grad, **option), exact)


@pytest.mark.parametrize("p", (1e-9, 1.0))
def test_the_ends_of_dropout(p, way):
    tensors = block(6, K=8, inner=12, N=5)
    y = run(feed_forward, tensors, randn(6, 5), dropout_p=p)
    if p == 1:
        assert torch.equal(y["y"], tensors["b2"].expand(6, 5)) and not y["dx"].any()
    else:  # at most a few elements fall
        torch.testing.assert_close(y["y"], feed_forward(**tensors), rtol=1e-4, atol=1e-4)


def test_every_way_drops_the_same_elements():
    tensors = block(9, K=8, inner=40, N=5)
    found = []
    for way in WAYS:
        with force(way):
            torch.manual_seed(5)
            found.append(feed_forward(**tensors, dropout_p=0.5))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-5, atol=1e-5)


def test_a_recomputing_checkpoint_drops_the_same_elements():
    leaves = {n: t.requires_grad_() for n, t in block(9, K=8, inner=40, N=5).items()}

    def call(x: Tensor) -> Tensor:
        return feed_forward(**(leaves | {"x": x}), dropout_p=0.5, activation="silu")

    torch.manual_seed(5)
    y = call(leaves["x"])
    expected = torch.autograd.grad(y, list(leaves.values()), torch.ones_like(y))
    torch.manual_seed(5)
    y = checkpoint(call, leaves["x"], use_reentrant=False)
    found = torch.autograd.grad(y, list(leaves.values()), torch.ones_like(y))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_huge_and_missing_numbers(way):
    """NaN stays NaN and act does not overflow, in values and in gradients."""
    for activation in EAGER:
        x = torch.tensor([[float("nan")], [1e30], [-1e30], [0.0], [90.0], [-90.0]])
        x.requires_grad_()
        one = torch.ones(1, 1)
        y = feed_forward(x, one, None, one, None, activation=activation, gate=one)
        (dx,) = torch.autograd.grad(y.sum(), x)
        assert y[0].isnan() and dx[0].isnan()
        expected = EAGER[activation](x.detach().double()) * x.detach().double()
        torch.testing.assert_close(y[2:].detach(), expected[2:].float())
        assert dx[3:].isfinite().all()


# ---- memory ------------------------------------------------------------------------------------


def test_a_kept_graph_gives_the_same_gradients_again(way):
    """Backward overwrites what forward kept only when nobody can ask again."""
    for function, names in ((feed_forward, None), (linear_act, ("x", "w1", "b1"))):
        tensors = block(6, K=8, inner=12, N=5)
        leaves = [t.requires_grad_() for n, t in tensors.items() if names is None or n in names]
        y = function(*leaves) if names else function(*leaves[:5], gate=leaves[5])
        first = torch.autograd.grad(y.sum(), leaves, retain_graph=True)
        second = torch.autograd.grad(y.sum(), leaves, retain_graph=True)
        last = torch.autograd.grad(y.sum(), leaves)
        for a, b, c in zip(first, second, last, strict=True):
            assert torch.equal(a, b) and torch.equal(a, c)


def test_tensors_that_a_hook_saw_are_left_alone(way):
    saved: list[Tensor] = []
    leaves = [t.requires_grad_() for t in block(6, K=8, inner=12, N=5).values()]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = feed_forward(*leaves[:5], gate=leaves[5])
    before = [t.detach().clone() for t in saved]
    y.sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(saved, before, strict=True))


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
def test_a_retry_after_an_error_raises_and_reads_nothing_overwritten(gated, way):
    """torch frees what a node saved only once the node's hooks have run."""
    for function, count in ((feed_forward, 5), (linear_act, 3)):
        leaves = [t.requires_grad_() for t in block(6, K=8, inner=12, N=5).values()]
        options = {"gate": leaves[5]} if gated and count == 5 else {}
        y = function(*leaves[:count], **options)

        def interrupt(*_: object) -> None:
            raise KeyboardInterrupt

        hook = y.grad_fn.register_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            y.sum().backward()
        hook.remove()
        with pytest.raises(RuntimeError, match="second time"):
            y.sum().backward()


@pytest.mark.parametrize("kind", ["plain", "relu", "gated", "dropout", "linear_act"])
def test_peak_memory_is_no_higher_than_eagers(kind):
    """At the proportions of a model, forward and forward with backward, in the chosen way."""
    tensors = block(128, K=96, inner=384, N=96)
    option = {"activation": "relu"} if kind == "relu" else {}
    ours_option = option | ({"dropout_p": 0.2} if kind == "dropout" else {})
    function, plain = feed_forward, eager
    if kind == "linear_act":
        function, plain = linear_act, lambda x, weight, bias: F.gelu(F.linear(x, weight, bias))
        tensors = {"x": tensors["x"], "weight": tensors["w1"], "bias": tensors["b1"]}
    elif kind != "gated":
        del tensors["gate"]

    def dropped(**given: Tensor) -> Tensor:
        if kind != "dropout":
            return plain(**given, **option)
        a = F.dropout(F.gelu(F.linear(given["x"], given["w1"], given["b1"])), 0.2)
        return F.linear(a, given["w2"], given["b2"])

    def forward(call) -> None:
        with torch.no_grad():
            call(**tensors)

    def train(call) -> None:
        leaves = {n: t.detach().requires_grad_() for n, t in tensors.items()}
        y = call(**leaves)
        torch.autograd.grad(y, list(leaves.values()), torch.ones(()).expand_as(y))

    ours = lambda **given: function(**given, **ours_option)  # noqa: E731
    assert peak_bytes("cpu", lambda: forward(ours)) < peak_bytes("cpu", lambda: forward(dropped))
    least = 1.0 if kind in ("relu", "linear_act") else 0.97
    trained = peak_bytes("cpu", lambda: train(ours)), peak_bytes("cpu", lambda: train(dropped))
    assert trained[0] <= least * trained[1], trained


def test_backward_keeps_h_and_g_only(way):
    tensors = block(64, K=8, inner=32, N=8)
    leaves = {n: t.requires_grad_() for n, t in tensors.items() if n not in ("b1", "b2")}
    sizes: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        feed_forward(**leaves, b1=None, b2=None, activation="silu", dropout_p=0.1)
    given = sum(4 * t.numel() for t in leaves.values())
    assert sum(sizes.values()) == given + 2 * 4 * 64 * 32 + 8


@pytest.mark.parametrize("wanted", ["x", "w1", "b1", "w2", "b2", "gate"])
def test_only_the_wanted_gradient(wanted, way):
    tensors = block(6, K=8, inner=12, N=5)
    leaf = tensors[wanted].requires_grad_()
    (found,) = torch.autograd.grad(feed_forward(**tensors, activation="silu").sin().sum(), leaf)
    (expected,) = torch.autograd.grad(eager(**tensors, activation="silu").sin().sum(), leaf)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_ten_repeats_are_the_same_bits(way):
    tensors, grad = block(70, K=20, inner=50, N=12), randn(70, 12, seed=9)
    runs = []
    for _ in range(10):
        torch.manual_seed(4)
        runs.append(run(feed_forward, tensors, grad, dropout_p=0.1, activation="silu"))
    assert all(torch.equal(runs[0][name], other[name]) for other in runs for name in other)


def test_native_is_chosen_with_gate_and_dropout():
    tensors = block(6, K=8, inner=12, N=5)
    assert explain(feed_forward, **tensors, dropout_p=0.1).implementation == "native"
