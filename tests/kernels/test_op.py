"""op.py: choosing, forcing, explaining, and the two ways into an op, on softmax and a toy op."""

import threading
import warnings
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import tilewise_kernels.op as op_module
from tilewise_kernels import (
    attention,
    explain,
    feed_forward,
    force,
    layer_norm,
    linear_act,
    linear_cross_entropy,
    log_softmax,
    record,
    rms_norm,
    rotary,
    softmax,
)
from tilewise_kernels.attention import OP as ATTENTION
from tilewise_kernels.errors import ArgumentError, KernelUnavailable
from tilewise_kernels.op import Cost, Implementation, Op, plain_eager
from tilewise_kernels.softmax import OP as SOFTMAX

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
Q = torch.randn(1, 2, 5, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def ran(monkeypatch):
    """The (direction, implementation) of each softmax kernel that runs, in order."""
    log: list[tuple[str, str]] = []

    def logged(direction, name, function):
        def run(*args):
            log.append((direction, name))
            return function(*args)

        return run

    for name, way in SOFTMAX.implementations.items():
        watched = replace(
            way,
            forward=logged("forward", name, way.forward),
            backward=logged("backward", name, way.backward),
        )
        monkeypatch.setitem(SOFTMAX.implementations, name, watched)
    return log


@pytest.fixture(scope="module")
def toy() -> Op:
    """y = 2x with a second output without gradient; `mode` decides who may and who should run it.

    fast: lacks something when mode is 1, refuses 2 forward, is slower for 3. slow: refuses 4.
    """

    def forward(x, mode):
        return 2 * x, x.detach().sum()

    def backward(grad, mode, needs):
        return (2 * grad,)

    return Op(
        "toy",
        schema="(Tensor x, int mode) -> (Tensor, Tensor)",
        backward_schema="(Tensor grad, int mode) -> Tensor",
        implementations=[
            Implementation("gpu", forward, backward, devices=("cuda",)),
            Implementation(
                "fast", forward, backward,
                refuses=lambda x, mode: "mode is 2" if mode == 2 else None,
                slower=lambda x, mode: "slow is faster for mode 3" if mode == 3 else None,
                refuses_backward=lambda grad, mode, *_: "mode is 2" if mode == 2 else None,
            ),
            Implementation("slow", forward, backward),
        ],
        fake=lambda x, mode: (torch.empty_like(x), x.new_empty(())),
        fake_backward=lambda grad, mode: (torch.empty_like(grad),),
        save=lambda args, outputs: ((), (args[1],)),
        inputs_with_grad=(0,),
        cost=lambda x, mode: Cost(x.numel(), 8 * x.numel(), x.numel(), 8 * x.numel()),
    )  # fmt: skip


@pytest.fixture
def fresh_warnings(monkeypatch):
    monkeypatch.setattr(op_module, "_warned", set())


# ---- choosing ----------------------------------------------------------------------------------


def test_the_first_that_may_run_is_chosen(toy):
    assert toy.choose((X, 0)).name == "fast"
    assert toy.choose((X, 3)).name == "slow"


def test_a_declined_way_warns_once_and_says_why(toy, fresh_warnings):
    with pytest.warns(RuntimeWarning, match="toy leaves its fast way: mode is 2"):
        assert toy.choose((X, 2)).name == "slow"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        toy(X, 2)
        toy(X, 3)  # a slower way is a choice, not a loss


def test_a_way_that_this_machine_lacks(toy, monkeypatch, fresh_warnings):
    lacking = replace(toy.implementations["fast"], missing=lambda: "no compiler was here")
    monkeypatch.setitem(toy.implementations, "fast", lacking)
    with pytest.warns(RuntimeWarning, match="no compiler was here"):
        assert toy.choose((X, 0)).name == "slow"
    assert "no compiler" in toy.explain(X, 0).others["fast"]
    with force("fast", "toy"), pytest.raises(KernelUnavailable, match="no compiler was here"):
        toy(X, 0)
    leaf = X.clone().requires_grad_()
    with Log():
        torch.autograd.grad(toy(leaf, 0)[0].sum(), leaf)


def test_nothing_that_can_run_is_an_error(toy, monkeypatch):
    monkeypatch.delitem(toy.implementations, "fast")
    monkeypatch.delitem(toy.implementations, "slow")
    with pytest.raises(KernelUnavailable, match="toy: nothing runs on cpu; it has gpu"):
        toy(X, 0)


# ---- force, explain, record ----------------------------------------------------------------------


def test_force_pins_forward_and_its_backward(ran):
    leaf = X.clone().requires_grad_()
    with force("reference"):
        y = softmax(leaf)
    y.sum().backward()
    softmax(leaf).sum().backward()
    ways = ["reference", "reference", "native", "native"]
    assert ran == list(zip(["forward", "backward"] * 2, ways, strict=True))


def test_force_pins_the_registered_way_too(ran):
    leaf = X.clone().requires_grad_()
    with Log(), force("reference"):
        y = softmax(leaf)
    y.sum().backward()
    assert ran == [("forward", "reference"), ("backward", "reference")]


def test_force_of_one_op_leaves_the_others_alone():
    with force("reference", "softmax"):
        assert explain(softmax, X).implementation == "reference"
        assert explain(attention, Q, Q, Q).implementation != "reference"


def test_force_nests_and_ends():
    def way():
        return explain(softmax, X).implementation

    with force("reference"):
        with force("native", "softmax"):
            assert way() == "native"
        assert way() == "reference"
        with pytest.raises(ZeroDivisionError), force("native"):
            raise ZeroDivisionError
        assert way() == "reference"
    assert way() == "native"


def test_force_holds_in_its_own_thread_only():
    seen = []
    with force("reference"):
        thread = threading.Thread(target=lambda: seen.append(explain(softmax, X).implementation))
        thread.start()
        thread.join()
    assert seen == ["native"]


def test_force_refuses_what_does_not_exist():
    with pytest.raises(ArgumentError, match="no implementation 'fastest'"), force("fastest"):
        pass
    with pytest.raises(ArgumentError, match="no op 'sofmax'"), force("native", "sofmax"):
        pass
    with force("blocked"), pytest.raises(KernelUnavailable, match="softmax has no 'blocked'"):
        softmax(X)


def test_explain_runs_nothing(ran):
    explanation = explain(softmax, X.requires_grad_(False), scale=2.0)
    assert explanation.implementation == "native" and ran == []
    assert explanation.others == {"reference": "native comes first"}
    assert str(explanation) == "softmax: native\n  not reference: native comes first"


def test_explain_says_why_not(toy):
    others = toy.explain(X, 2).others
    assert others == {"gpu": "runs on cuda, not on cpu", "fast": "mode is 2"}
    assert toy.explain(X, 3).others["fast"] == "slow is faster for mode 3"


def test_explain_checks_its_arguments_and_its_function():
    with pytest.raises(ArgumentError, match="softmax: x is"):
        explain(softmax, X.int())
    with pytest.raises(ArgumentError, match="called no tilewise op"):
        explain(torch.relu, X)
    assert op_module._observing.functions == []


def test_record_lists_the_calls_inside_it():
    with record() as outer:
        softmax(X)
        with record() as inner, force("reference"):
            attention(Q, Q, Q)
    softmax(X)
    assert [(e.op, e.implementation) for e in outer] == [
        ("softmax", "native"),
        ("attention", "reference"),
    ]
    assert [e.op for e in inner] == ["attention"]


def test_explain_does_not_disturb_other_threads():
    """A thread that calls ops all the while must never meet the explanation of another."""
    problems: list[BaseException] = []
    stop = threading.Event()

    def work():
        try:
            while not stop.is_set():
                softmax(X)
        except BaseException as problem:
            problems.append(problem)

    thread = threading.Thread(target=work)
    thread.start()
    for _ in range(300):
        explain(softmax, X)
    stop.set()
    thread.join()
    assert not problems


# ---- the eager way steps aside -------------------------------------------------------------


class Tagged(torch.Tensor):
    """A subclass with no behaviour of its own."""


class Log(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_plain_eager():
    assert plain_eager((X, None, 1.0, torch.nn.Parameter(X)))
    assert not plain_eager((X, X.as_subclass(Tagged)))
    assert plain_eager((X, [X, torch.nn.Parameter(X)], []))
    assert not plain_eager((X, [X, X.as_subclass(Tagged)]))
    assert not plain_eager((X.to("meta"),))
    with Log():
        assert not plain_eager((X,))
    with FakeTensorMode() as mode:
        assert not plain_eager((mode.from_tensor(X),))
    inside = []
    torch.func.vmap(lambda x: inside.append(plain_eager((x,))) or x)(X)
    torch.func.grad(lambda x: inside.append(plain_eager((x,))) or x.sum())(X)
    assert inside == [False, False]


def test_a_dispatch_mode_sees_the_op_and_its_backward():
    leaf = X.clone().requires_grad_()
    with Log() as log:
        softmax(leaf).sum().backward()
    assert "tilewise.softmax.default" in log.names
    assert "tilewise.softmax_backward.default" in log.names


def test_fake_tensors_and_make_fx_see_one_op():
    from torch.fx.experimental.proxy_tensor import make_fx

    with FakeTensorMode() as mode:
        assert softmax(mode.from_tensor(X), scale=2.0).shape == X.shape
    graph = make_fx(lambda x: softmax(x, causal=True))(X)
    called = [str(n.target) for n in graph.graph.nodes if n.op == "call_function"]
    assert called == ["tilewise.softmax.default"]
    assert torch.equal(graph(X), softmax(X, causal=True))


def test_subclasses_keep_their_results():
    assert torch.equal(softmax(X.as_subclass(Tagged)).as_subclass(torch.Tensor), softmax(X))


def test_vmap():
    batch = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(torch.func.vmap(softmax)(batch), softmax(batch))


def test_forward_mode_derivatives_are_refused():
    """A clear error, never a derivative that is silently dropped."""
    with pytest.raises(RuntimeError, match="softmax has no forward-mode derivative"):
        torch.func.jvp(softmax, (X,), (X,))
    for way in ("native", "reference"):
        with force(way), forward_ad.dual_level():
            with pytest.raises(RuntimeError, match="softmax has no forward-mode derivative"):
                softmax(forward_ad.make_dual(X, X))
            assert torch.equal(softmax(X), softmax(X.clone()))


# ---- autograd ----------------------------------------------------------------------------------


def test_saved_tensors_are_guarded_against_changes_in_place():
    leaf = X.clone().requires_grad_()
    y = softmax(leaf)
    y.detach().mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_outputs_without_gradient(toy):
    leaf = X.clone().requires_grad_()
    for mode in (torch.enable_grad(), Log()):
        with mode:
            y, total = toy(leaf, 0)
            (grad,) = torch.autograd.grad(y.sum(), leaf)
        assert not total.requires_grad and torch.equal(grad, torch.full_like(X, 2))


def test_a_second_derivative_says_what_is_wrong():
    leaf = X.clone().requires_grad_()
    for mode in (torch.enable_grad(), Log()):
        for upstream in (lambda y: y.square().sum(), lambda y: y[0].sum()):  # with a graph, without
            with mode:
                (first,) = torch.autograd.grad(upstream(softmax(leaf)), leaf, create_graph=True)
                with pytest.raises(RuntimeError, match="softmax has no second"):
                    first.square().sum().backward()


def test_checkpoint_recomputes_the_same():
    leaf, again = X.clone().requires_grad_(), X.clone().requires_grad_()
    softmax(leaf).square().sum().backward()
    y = torch.utils.checkpoint.checkpoint(softmax, again, use_reentrant=False)
    y.square().sum().backward()
    assert torch.equal(leaf.grad, again.grad)


def test_autocast_is_off_inside_an_implementation():
    states = []
    way = ATTENTION.implementations["reference"]

    def forward(*args):
        states.append((torch.is_autocast_enabled("cpu"), args[0].dtype))
        return way.forward(*args)

    ATTENTION.implementations["reference"] = replace(way, forward=forward)
    try:
        with force("reference"), torch.autocast("cpu", dtype=torch.bfloat16):
            attention(Q, Q, Q)
            assert torch.is_autocast_enabled("cpu")
    finally:
        ATTENTION.implementations["reference"] = way
    assert states == [(False, torch.bfloat16)]


W, LABELS = torch.ones(6, 4) + torch.arange(4), torch.tensor([2, 0, 5])
CALLS = {
    "attention": lambda x: attention(x[None, None], x[None, None], x[None, None]),
    "feed_forward": lambda x: feed_forward(x, W, None, W.t(), None, gate=W),
    "layer_norm": lambda x: layer_norm(x, residual=x),
    "linear_act": lambda x: linear_act(x, W),
    "linear_cross_entropy": lambda x: linear_cross_entropy(x, W, LABELS, reduction="none"),
    "log_softmax": lambda x: log_softmax(x),
    "rms_norm": lambda x: rms_norm(x),
    "rotary": lambda x: rotary(x[None, None], x[None, None], X[:, :2], X[:, 2:])[0],
}


@pytest.mark.parametrize("name", CALLS)
def test_vmap_over_a_backward_gives_each_gradient_as_alone(name):
    x = X.clone().requires_grad_()
    y = CALLS[name](x)
    upstream = torch.stack([torch.ones_like(y), y.detach(), -y.detach() / 3])
    alone = [torch.autograd.grad(y, x, each, retain_graph=True)[0] for each in upstream]

    def gradient(each: Tensor) -> Tensor:
        return torch.autograd.grad(y, x, each, retain_graph=True)[0]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that it falls back to a loop
        torch.testing.assert_close(torch.vmap(gradient)(upstream), torch.stack(alone))
        (found,) = torch.autograd.grad(y, x, upstream, is_grads_batched=True)
    torch.testing.assert_close(found, torch.stack(alone))


@pytest.mark.parametrize(
    "name", sorted(set(CALLS) - {"attention", "log_softmax"})
)  # they save theirs
def test_outputs_may_change_in_place(name):
    for way in ("native", "reference"):
        x = X.clone().requires_grad_()
        with force(way):
            expected = 2 * torch.autograd.grad(CALLS[name](x).sum(), x)[0]
            y = CALLS[name](x)
        y.mul_(2)
        y[:1] += 1
        torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], expected)


# ---- cost --------------------------------------------------------------------------------------


def test_costs_are_what_the_docstrings_say():
    x = torch.empty(8, 100)
    assert SOFTMAX.cost(x, None, 1.0, False) == Cost(4000, 6400, 3200, 9600)
    expanded = torch.ones(100, dtype=torch.bool).expand(8, 100)
    assert SOFTMAX.cost(x, expanded, 1.0, False).bytes == 6400 + 100
    q, k = torch.empty(2, 4, 6, 8), torch.empty(2, 2, 10, 8)

    def attended(q: Tensor, k: Tensor, causal: bool, left: int = -1) -> Cost:
        return ATTENTION.cost(q, k, k, *[None] * 5, causal, left, -1, 0.0, 1.0, 0.0)

    plain = attended(q, k, False)
    assert plain.flops == 4 * 2 * 4 * 6 * 10 * 8 and plain.backward_flops == plain.flops * 5 // 2
    assert plain.bytes == 4 * (2 * q.numel() + 2 * k.numel())
    assert attended(q, k, True).flops == 4 * 2 * 4 * 8 * (5 + 6 + 7 + 8 + 9 + 10)
    assert attended(q, k, True, left=2).flops == 4 * 2 * 4 * 8 * 6 * 3
    upside_down = attended(k[:, :1].expand(2, 4, 10, 8), q[:, :2], True)
    assert upside_down.flops == 4 * 2 * 4 * 8 * (0 + 0 + 0 + 0 + 1 + 2 + 3 + 4 + 5 + 6)
