"""linear_act and feed_forward in each of their ways, against float64 torch."""

from dataclasses import dataclass
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tilewise_kernels import explain, feed_forward, force, linear_act
from tilewise_kernels.errors import ArgumentError, KernelUnavailable

WAYS = ("triton", "native", "torch", "reference")
F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
WAYS_AND_DTYPES = [  # Triton's interpreter multiplies bfloat16 wrongly
    (way, dtype) for way in WAYS for dtype in (F32, BF16, F16) if (way, dtype) != ("triton", BF16)
]
EAGER = {
    "gelu": F.gelu,
    "gelu_tanh": lambda h: F.gelu(h, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "quick_gelu": lambda h: h * torch.sigmoid(1.702 * h),
    "identity": lambda h: h,
}


@pytest.fixture(params=WAYS)
def way(request):
    """Runs the test once in each implementation of both ops."""
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


def eager_act(x, weight, bias=None, *, activation="gelu"):
    return EAGER[activation](F.linear(x, weight, bias))


def eager_forward(x, w1, b1, w2, b2, *, activation="gelu", gate=None):
    a = eager_act(x, w1, b1, activation=activation)
    return F.linear(a if gate is None else a * F.linear(x, gate), w2, b2)


def layer(*shape: int, K: int, N: int, bias: bool = True) -> dict[str, Tensor | None]:
    """x [*shape, K], weight [N, K], bias [N], at the scale they have in a model."""
    weight = randn(N, K, seed=2) / max(K, 1) ** 0.5
    shift = randn(N, seed=3) if bias else None
    return {"x": randn(*shape, K, seed=1), "weight": weight, "bias": shift}


def block(*shape: int, K: int, inner: int, N: int, bias: bool = True) -> dict[str, Tensor | None]:
    first = layer(*shape, K=K, N=inner, bias=bias)
    second = layer(K=inner, N=N, bias=bias)
    w2, b2 = second["weight"], second["bias"]
    return {"x": first["x"], "w1": first["weight"], "b1": first["bias"], "w2": w2, "b2": b2}


def run(function, tensors: dict[str, Tensor | None], dtype: torch.dtype, grad: Tensor, **options):
    """y and the gradient of every tensor, by name."""
    leaves = {name: None if t is None else t.detach().to(dtype, copy=True).requires_grad_()
              for name, t in tensors.items()}  # fmt: skip
    y = function(**leaves, **options)
    named = {name: leaf for name, leaf in leaves.items() if leaf is not None}
    found = torch.autograd.grad(y, list(named.values()), grad.to(y.dtype))
    return {"y": y, **{f"d{name}": g for name, g in zip(named, found, strict=True)}}


# ---- accuracy ----------------------------------------------------------------------------------


@dataclass
class Case:
    """One call of linear_act."""

    name: str
    shape: tuple[int, ...]
    K: int
    N: int
    activation: str = "gelu"
    bias: bool = True
    spread: float = 1.0


CASES = [
    Case("tiles that divide, no masks", (64,), 64, 96),
    Case("past every tile", (3, 23), 50, 41),
    Case("more than one group of tiles", (170,), 33, 70, "gelu_tanh"),
    Case("without bias", (2, 9), 40, 24, bias=False),
    Case("one-dimensional x", (), 24, 17),
    Case("five-dimensional x", (2, 1, 2, 3), 16, 8),
    Case("one column in, one out", (5,), 1, 1),
    Case("nothing to sum over", (4,), 0, 6),
    Case("gelu_tanh", (6,), 40, 24, "gelu_tanh"),
    Case("relu", (6,), 40, 24, "relu"),
    Case("silu", (6,), 40, 24, "silu"),
    Case("quick_gelu", (6,), 40, 24, "quick_gelu"),
    Case("identity", (6,), 40, 24, "identity"),
    Case("far out, gelu", (16,), 32, 24, "gelu", spread=20),
    Case("far out, gelu_tanh", (16,), 32, 24, "gelu_tanh", spread=20),
    Case("far out, quick_gelu", (16,), 32, 24, "quick_gelu", spread=20),
]


@pytest.mark.parametrize("dtype", (F32, BF16, F16), ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_linear_act_accuracy(case, dtype, way, assert_accurate, poisoned):
    tensors = layer(*case.shape, K=case.K, N=case.N, bias=case.bias)
    tensors["x"] = tensors["x"] * case.spread
    tensors = {name: None if t is None else t.to(dtype) for name, t in tensors.items()}
    if way == "triton" and dtype == BF16:
        with pytest.raises(KernelUnavailable, match="bfloat16"):
            linear_act(**tensors)
        return
    grad = randn(*case.shape, case.N, seed=9, dtype=dtype)
    kept = [t.clone() for t in (*tensors.values(), grad) if t is not None]
    ours = run(linear_act, tensors, dtype, grad, activation=case.activation)
    plain = run(eager_act, tensors, dtype, grad, activation=case.activation)
    assert_accurate(ours, plain, run(eager_act, tensors, F64, grad, activation=case.activation))
    assert all(t.dtype == dtype for t in ours.values())
    now = [t for t in (*tensors.values(), grad) if t is not None]
    assert all(torch.equal(a, b) for a, b in zip(kept, now, strict=True)), "an input was changed"


@pytest.mark.parametrize("way, dtype", WAYS_AND_DTYPES, ids=str, indirect=["way"])
@pytest.mark.parametrize("activation", EAGER)
def test_feed_forward_accuracy(activation, dtype, way, assert_accurate, poisoned):
    tensors = block(3, 11, K=20, inner=50, N=12, bias=activation != "silu")
    tensors = {name: None if t is None else t.to(dtype) for name, t in tensors.items()}
    grad = randn(3, 11, 12, seed=9, dtype=dtype)
    ours = run(feed_forward, tensors, dtype, grad, activation=activation)
    plain = run(eager_forward, tensors, dtype, grad, activation=activation)
    assert_accurate(ours, plain, run(eager_forward, tensors, F64, grad, activation=activation))
    with torch.no_grad():
        torch.testing.assert_close(feed_forward(**tensors, activation=activation), ours["y"])


def test_dropout_falls_on_the_inner_elements(way):
    x = torch.ones(400, 1, requires_grad=True)
    ones = torch.ones(50, 1)
    torch.manual_seed(3)
    y = feed_forward(x, ones, None, torch.eye(50), None, activation="relu", dropout_p=0.25)
    assert 0.24 < (y == 0).float().mean() < 0.26
    assert ((y == 0) | ((y - 4 / 3).abs() < 1e-6)).all()
    y.sum().backward()
    torch.testing.assert_close(x.grad, y.sum(1, keepdim=True).detach())
    torch.manual_seed(3)
    again = feed_forward(x, ones, None, torch.eye(50), None, activation="relu", dropout_p=0.25)
    assert torch.equal(again, y)
    assert not feed_forward(x, ones, None, torch.eye(50), None, dropout_p=1.0).any()


def test_nan_stays_nan_and_infinity_passes_relu(way):
    h = torch.tensor([[float("nan")], [float("inf")], [-float("inf")], [0.0]])
    for activation, eager in EAGER.items():
        ours = linear_act(h, torch.ones(1, 1), activation=activation)
        if activation in ("relu", "identity"):
            assert torch.equal(ours.nan_to_num(7), eager(h).nan_to_num(7))
        assert ours[0].isnan() and ours[3] == 0


def test_a_gradient_passes_relu_where_it_is_nan(way):
    h = torch.tensor([[float("nan")], [1.0], [0.0]], requires_grad=True)
    for gate in (None, torch.ones(1, 1)):
        one = torch.ones(1, 1)
        y = feed_forward(h, one, None, one, None, activation="relu", gate=gate)
        (ours,) = torch.autograd.grad(y.sum(), h)
        (eager,) = torch.autograd.grad((F.relu(h) * (1 if gate is None else h)).sum(), h)
        assert torch.equal(ours.nan_to_num(7), eager.nan_to_num(7))


# ---- layouts and upstream gradients ------------------------------------------------------------


def every_other(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, -1)[..., ::2]


def transposed(x: Tensor) -> Tensor:
    return x.transpose(0, -1).contiguous().transpose(0, -1)


def off_by_one(x: Tensor) -> Tensor:
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


def expanded(x: Tensor) -> Tensor:
    return x[:1].expand(x.shape)


@pytest.mark.parametrize("layout", [every_other, transposed, off_by_one, expanded])
@pytest.mark.parametrize("activation", ["gelu", "relu", "identity"])
def test_layouts_give_the_same_result(layout, activation, way):
    tensors, grad = block(5, 6, K=10, inner=40, N=7), layout(randn(5, 6, 7, seed=9))
    views = {name: layout(t) for name, t in tensors.items()}
    leaves = [t.detach().requires_grad_() for t in views.values()]
    plain = [torch.empty(t.shape).copy_(t.detach()).requires_grad_() for t in leaves]
    y, z = (feed_forward(*each, activation=activation) for each in (plain, leaves))
    torch.testing.assert_close(z, y, rtol=1e-5, atol=1e-5)
    found = torch.autograd.grad(z, leaves, grad)
    expected = torch.autograd.grad(y, plain, grad.contiguous())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def far_apart(x: Tensor) -> Tensor:
    """Rows 2^31 elements apart: only the pages that hold a row ever exist."""
    far = torch.empty(2**31 + x.shape[1], dtype=x.dtype).as_strided(x.shape, (2**31, 1))
    return far.copy_(x)


def test_offsets_past_two_to_the_31(way):
    x, weight = randn(2, 40, dtype=F16), randn(2, 40, seed=1, dtype=F16)
    assert torch.equal(linear_act(far_apart(x), far_apart(weight)), linear_act(x, weight))


def test_the_gradient_of_a_sum(way):
    """An upstream gradient of stride 0."""
    leaves = [t.requires_grad_() for t in layer(4, K=6, N=5).values()]
    linear_act(*leaves, activation="identity").sum().backward()
    torch.testing.assert_close(leaves[0].grad, leaves[1].detach().sum(0).expand(4, 6))
    torch.testing.assert_close(leaves[2].grad, torch.full((5,), 4.0))


@pytest.mark.parametrize("wanted", range(5))
def test_only_the_wanted_gradient(wanted, way):
    tensors = list(block(6, K=8, inner=12, N=5).values())
    leaves = [t.clone().requires_grad_(i == wanted) for i, t in enumerate(tensors)]
    plain = [t.clone().requires_grad_(i == wanted) for i, t in enumerate(tensors)]
    feed_forward(*leaves).sin().sum().backward()
    eager_forward(*plain).sin().sum().backward()
    torch.testing.assert_close(leaves[wanted].grad, plain[wanted].grad, rtol=1e-4, atol=1e-5)
    assert all(leaf.grad is None for i, leaf in enumerate(leaves) if i != wanted)


@pytest.mark.parametrize("shape", [(0,), (2, 0)])
def test_no_rows(shape, way, poisoned):
    leaves = [t.requires_grad_() for t in block(*shape, K=8, inner=12, N=5).values()]
    y = feed_forward(*leaves)
    y.sum().backward()
    assert y.shape == (*shape, 5) and leaves[0].grad.shape == leaves[0].shape
    assert all(not leaf.grad.any() for leaf in leaves[1:])


def test_ten_repeats_are_the_same_bits(way):
    tensors, grad = block(70, K=20, inner=50, N=12), randn(70, 12, seed=9)
    first = run(feed_forward, tensors, F32, grad)
    for _ in range(9):
        again = run(feed_forward, tensors, F32, grad)
        assert all(torch.equal(first[name], again[name]) for name in first)


# ---- torch integration -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["plain", "grad", "no bias, relu", "empty", "strided", "identity"])
def test_opcheck(kind, way):
    x, weight, bias = layer(4, K=8, N=5).values()
    leaf = x.clone().requires_grad_()
    arguments = {
        "plain": (x, weight, bias, "gelu", False),
        "grad": (*(t.clone().requires_grad_() for t in (x, weight, bias)), "gelu", True),
        "no bias, relu": (leaf, weight, None, "relu", True),
        "empty": (x[:0].clone().requires_grad_(), weight, bias, "silu", True),
        "strided": (transposed(x).requires_grad_(), transposed(weight), bias, "gelu_tanh", True),
        "identity": (leaf, weight, bias, "identity", True),
    }[kind]
    torch.library.opcheck(torch.ops.tilewise.linear_act.default, arguments)
    second = randn(3, 5).requires_grad_(arguments[-1])
    both = (*arguments[:3], second, None, None, None, arguments[3], 0.0, arguments[4])
    torch.library.opcheck(torch.ops.tilewise.feed_forward.default, both)


@pytest.mark.parametrize("way", ["torch", "reference"])
@pytest.mark.parametrize("activation", EAGER)
def test_gradcheck(activation, way):
    leaves = [t.double().requires_grad_() for t in block(3, K=4, inner=5, N=2).values()]
    with force(way):
        for function, inputs in ((linear_act, leaves[:3]), (feed_forward, leaves)):
            act = partial(function, activation=activation)
            assert torch.autograd.gradcheck(act, inputs)


def compiled_body(x, w1, b1, w2, b2):
    y = feed_forward(x.sin(), w1, b1, w2, b2, activation="relu")
    return y, linear_act(feed_forward(y, w1, b1, w2, b2, gate=w1), w1)


def eager_body(x, w1, b1, w2, b2):
    y = eager_forward(x.sin(), w1, b1, w2, b2, activation="relu")
    return y, eager_act(eager_forward(y, w1, b1, w2, b2, gate=w1), w1)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(backend, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")
    torch._dynamo.reset()
    compiled = torch.compile(compiled_body, fullgraph=True, dynamic=True, backend=backend)
    for rows in (6, 11):
        leaves = [t.requires_grad_() for t in block(rows, K=8, inner=20, N=8).values()]
        found, expected = compiled(*leaves), eager_body(*leaves)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        upstream = [randn(rows, 8, seed=7), randn(rows, 20, seed=8)]
        ours = torch.autograd.grad(found, leaves, upstream)
        plain = torch.autograd.grad(expected, leaves, upstream)
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)


def test_autocast_casts_as_linear_does():
    leaves = [t.requires_grad_() for t in block(6, K=8, inner=20, N=5).values()]
    with torch.autocast("cpu", dtype=BF16):
        found, expected = feed_forward(*leaves), eager_forward(*leaves)
        assert linear_act(leaves[0].half(), *leaves[1:3]).dtype == BF16
        assert linear_act(*(t.double() for t in leaves[:3])).dtype == F64
    assert found.dtype == expected.dtype == BF16
    torch.testing.assert_close(found, expected)
    found.sum().backward()
    assert leaves[1].grad.dtype == F32


def kept_bytes(function, *arguments, **options) -> int:
    """Bytes that the graph holds on to, parameters and x included, each storage once."""
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = function(*arguments, **options)
    assert result.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("activation", EAGER)
def test_backward_keeps_the_pre_activation_only(activation, way):
    x, w1, _, w2, _ = block(64, K=8, inner=32, N=8, bias=False).values()
    for t in (x, w1, w2):
        t.requires_grad_()
    inner, given = 4 * 64 * 32, 4 * (64 * 8 + 32 * 8 + 8 * 32)
    ours = kept_bytes(feed_forward, x, w1, None, w2, None, activation=activation)
    assert ours == given + inner
    eager = kept_bytes(eager_forward, x, w1, None, w2, None, activation=activation)
    assert ours <= eager and (activation in ("relu", "identity") or ours <= eager - inner)
    one = kept_bytes(linear_act, x, w1, activation=activation)
    assert one == 4 * (64 * 8 + 32 * 8) + (0 if activation == "identity" else inner)
    with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(lambda t: 1 / 0, lambda t: t):
        feed_forward(x, w1, None, w2, None, activation=activation)
        linear_act(x, w1, activation=activation)


def test_double_backward_raises(way):
    x = randn(3, 8).requires_grad_()
    (dx,) = torch.autograd.grad(linear_act(x, randn(4, 8)).sin().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        dx.sum().backward()


def test_the_chosen_way():
    x, weight, bias = layer(4, K=8, N=5).values()
    assert explain(linear_act, x, weight, bias).implementation == "native"
    assert explain(feed_forward, x, weight, bias, randn(3, 5), None).implementation == "native"
    with force("triton"), pytest.raises(KernelUnavailable, match="float64"):
        linear_act(x.double(), weight.double())


# ---- bad input ---------------------------------------------------------------------------------

X, W1, B1, W2, B2 = block(2, 3, K=4, inner=6, N=5).values()


@pytest.mark.parametrize(
    "arguments, options, message",
    [
        (([1.0], W1), {}, "x is list"),
        ((X.int(), W1), {}, "x is torch.int32"),
        ((torch.tensor(1.0), W1), {}, r"x is of shape \[\]"),
        ((X, None), {}, "weight is NoneType"),
        ((X, W1.t()), {}, r"weight is of shape \[4, 6\]"),
        ((X, W1[0]), {}, r"weight is of shape \[4\]"),
        ((X, W1.half()), {}, "weight is torch.float16"),
        ((X, W1.to("meta")), {}, "weight is on meta"),
        ((X, W1, B2), {}, r"bias is of shape \[5\]"),
        ((X, W1, B1.double()), {}, "bias is torch.float64"),
        ((X, W1), {"activation": "swish"}, "activation is 'swish'"),
        ((X, W1), {"activation": None}, "activation is None"),
    ],
)
def test_bad_input_of_linear_act(arguments, options, message):
    with pytest.raises(ArgumentError, match=f"linear_act: {message}"):
        linear_act(*arguments, **options)


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"x": X[..., :3]}, r"w1 is of shape \[6, 4\]"),
        ({"w1": W2}, r"w1 is of shape \[5, 6\]"),
        ({"b1": B2}, r"b1 is of shape \[5\]"),
        ({"b1": 0}, "b1 is int"),
        ({"w2": W1}, r"w2 is of shape \[6, 4\]"),
        ({"w2": W2.half()}, "w2 is torch.float16"),
        ({"b2": B1}, r"b2 is of shape \[6\]"),
        ({"b2": B2.to("meta")}, "b2 is on meta"),
        ({"gate": W2}, r"gate is of shape \[5, 6\]"),
        ({"gate": W1.bfloat16()}, "gate is torch.bfloat16"),
        ({"dropout_p": 2}, "dropout_p is 2"),
        ({"dropout_p": "a"}, "dropout_p is 'a'"),
        ({"activation": "geglu"}, "activation is 'geglu'"),
    ],
)
def test_bad_input_of_feed_forward(changed, message):
    with pytest.raises(ArgumentError, match=f"feed_forward: {message}"):
        feed_forward(**({"x": X, "w1": W1, "b1": B1, "w2": W2, "b2": B2} | changed))
