"""layer_norm in each of its ways: against float64 torch, and every edge of its contract."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tilewise_kernels import explain, force, layer_norm
from tilewise_kernels.errors import ArgumentError, KernelUnavailable

WAYS = ("native", "triton", "torch", "reference")
F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64


@pytest.fixture(params=WAYS)
def way(request):
    """Runs the test once in each implementation."""
    with force(request.param, "layer_norm"):
        yield request.param


@pytest.fixture
def poisoned():
    """Uninitialised memory holds NaN, so that a result which was never written shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = F32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def eager(x, weight=None, bias=None, *, eps=1e-5, residual=None, prenorm=False):
    """What one writes in eager torch; a float32 residual stream keeps its dtype in the sum."""
    s = x if residual is None else x + residual
    parameters = [weight, bias]
    if s.dtype != x.dtype:
        parameters = [None if p is None else p.to(s.dtype) for p in parameters]
    y = F.layer_norm(s, s.shape[-1:], *parameters, eps).to(x.dtype)
    return (y, s) if prenorm else y


def run(function, tensors: dict[str, Tensor], grads: tuple[Tensor | None, ...], **options):
    """y, the sum and the gradient of every tensor, by name; grads are those of y and of the sum."""
    leaves = {name: t.detach().clone().requires_grad_() for name, t in tensors.items()}
    y, s = function(**leaves, prenorm=True, **options)
    pairs = [(out, g.to(out.dtype)) for out, g in zip((y, s), grads, strict=True) if g is not None]
    outs, upstream = zip(*pairs, strict=True)
    found = torch.autograd.grad(outs, list(leaves.values()), upstream, allow_unused=True)
    named = {f"d{name}": g for name, g in zip(leaves, found, strict=True) if g is not None}
    return {"y": y, "s": s, **named}


# ---- accuracy ----------------------------------------------------------------------------------


@dataclass
class Case:
    """One call. wide: tensors that are float32 whatever x is. shift, spread: mean and size of x."""

    name: str
    shape: tuple[int, ...]
    tensors: str = "residual weight bias"
    wide: str = ""
    shift: float = 0.0
    spread: float = 1.0
    eps: float = 1e-5


CASES = [
    Case("16 rows a tile, no masks", (32, 64)),
    Case("rows and columns past the tile", (3, 7, 250)),
    Case("4 rows a tile", (6, 1024)),
    Case("plain x", (5, 96), ""),
    Case("weight alone", (5, 96), "weight"),
    Case("bias alone, with a residual", (5, 96), "residual bias"),
    Case("one-dimensional", (33,)),
    Case("five-dimensional", (2, 1, 3, 2, 9)),
    Case("one column", (4, 1)),
    Case("float32 parameters", (9, 40), wide="weight bias"),
    Case("float32 residual stream", (9, 40), wide="residual weight bias"),
    Case("float32 residual, parameters of x", (9, 40), wide="residual"),
    Case("large mean, small variance", (8, 300), "weight bias", shift=1e3, spread=0.5),
    Case("values of 1e4", (8, 128), "weight bias", spread=1e4),
    Case("more rows than programs take at once", (150, 33)),
    Case("dweight in a kernel of its own", (5, 8200)),
    Case("small eps", (4, 50), eps=1e-12, spread=1e-3),
]


def tensors_of(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    shift = case.shift if dtype == F32 else case.shift / 50  # bfloat16 cannot tell 1000 from 1001
    tensors = {"x": (case.spread * randn(*case.shape, seed=1) + shift).to(dtype)}
    for seed, name in enumerate(case.tensors.split()):
        shape = case.shape if name == "residual" else case.shape[-1:]
        wanted = F32 if name in case.wide.split() else dtype
        tensors[name] = randn(*shape, seed=seed + 2).to(wanted)
    return tensors


@pytest.mark.parametrize("dtype", (F32, BF16, F16), ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_accuracy(case, dtype, way, assert_accurate, poisoned):
    if way == "triton" and dtype == BF16:
        with pytest.raises(KernelUnavailable, match="bfloat16"):
            layer_norm(randn(2, 3, dtype=BF16))
        return
    tensors = tensors_of(case, dtype)
    grads = randn(*case.shape, seed=8).to(dtype), randn(*case.shape, seed=9).to(dtype)
    kept = [t.clone() for t in (*tensors.values(), *grads)]
    ours = run(layer_norm, tensors, grads, eps=case.eps)
    exact = run(eager, {name: t.double() for name, t in tensors.items()}, grads, eps=case.eps)
    # s is rounded to its dtype before it is normalised, in eager as here
    assert_accurate(ours, run(eager, tensors, grads, eps=case.eps), exact)
    assert ours["y"].dtype == dtype
    assert ours["s"].dtype == tensors.get("residual", tensors["x"]).dtype
    for name, tensor in tensors.items():
        assert ours[f"d{name}"].dtype == tensor.dtype
    now = (*tensors.values(), *grads)
    assert all(torch.equal(a, b) for a, b in zip(kept, now, strict=True)), "an input was changed"


def test_y_is_the_norm_of_the_stored_sum(way):
    x, residual = randn(6, 40, dtype=F16), randn(6, 40, seed=1, dtype=F16)
    y, s = layer_norm(x, residual=residual, prenorm=True)
    assert torch.equal(s, x + residual)
    assert torch.equal(y, layer_norm(s))


def test_constant_rows_give_the_bias_and_large_means_do_not_cancel(way):
    bias = randn(64)
    for value in (0.0, 3.0, -1e4):
        assert torch.equal(layer_norm(torch.full((3, 64), value), bias=bias), bias.expand(3, 64))
    x = 1e4 + randn(4, 512) * 0.1
    exact = F.layer_norm(x.double(), (512,))
    assert (layer_norm(x).double() - exact).abs().max() < 1e-2  # E[x^2] - E[x]^2 would be off by 1


def test_half_statistics_are_kept_in_float32(way):
    x = randn(4, 64, dtype=F16) + 100
    _, _, mean, rstd = torch.ops.tilewise.layer_norm(
        x, None, None, None, None, 1e-5, 0.0, False, True
    )
    assert mean.dtype == rstd.dtype == F32 and mean.shape == rstd.shape == (4, 1)
    torch.testing.assert_close(mean, x.float().mean(-1, keepdim=True), rtol=1e-6, atol=0)


# ---- layouts and upstream gradients ------------------------------------------------------------


def every_other(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, -1)[..., ::2]


def transposed(x: Tensor) -> Tensor:
    return x.transpose(0, -1).contiguous().transpose(0, -1)


def off_by_one(x: Tensor) -> Tensor:
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


def out_of_a_wider_row(x: Tensor) -> Tensor:
    return torch.cat([x, x], -1)[..., : x.shape[-1]]


def grads_of(function, x, residual, weight, bias, grads):
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
    if residual is not None:
        leaves.append(residual.detach().requires_grad_())
    y, s = function(*leaves[:3], residual=leaves[3] if residual is not None else None, prenorm=True)
    return [y, s, *torch.autograd.grad((y, s), leaves, grads)]


@pytest.mark.parametrize("layout", [every_other, transposed, off_by_one, out_of_a_wider_row])
@pytest.mark.parametrize("with_residual", [True, False])
def test_layouts_give_the_same_result(layout, with_residual, way):
    x, r, g, h = (randn(3, 4, 37, seed=seed) for seed in range(4))
    weight, bias = randn(37, seed=4), randn(37, seed=5)
    r = r if with_residual else None
    plain = grads_of(layer_norm, x, r, weight, bias, (g, h))
    views = [layout(t) if t is not None else None for t in (x, r)]
    strided = grads_of(layer_norm, *views, weight, bias, (layout(g), layout(h)))
    for a, b in zip(plain, strided, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    if layout is every_other:
        wide = layer_norm(x, layout(weight), layout(bias), residual=r)
        torch.testing.assert_close(wide, plain[0], rtol=1e-6, atol=1e-6)


def far_apart(x: Tensor) -> Tensor:
    """Rows 2^31 elements apart: only the pages that hold a row ever exist."""
    far = torch.empty(2**31 + x.shape[1], dtype=x.dtype).as_strided(x.shape, (2**31, 1))
    return far.copy_(x)


def test_offsets_past_two_to_the_31(way):
    x, residual, g = (randn(2, 40, seed=seed, dtype=F16) for seed in range(3))
    far = [far_apart(t) for t in (x, residual, g)]
    weight = bias = randn(40, dtype=F16)
    plain = grads_of(layer_norm, x, residual, weight, bias, (g, g))
    strided = grads_of(layer_norm, *far[:2], weight, bias, (far[2], far[2]))
    for a, b in zip(plain, strided, strict=True):
        assert torch.equal(a, b)


def test_expanded_inputs_and_gradients(way):
    x, r, weight, bias = randn(1, 1, 9).expand(4, 5, 9), randn(4, 5, 9, seed=1), randn(9), randn(9)
    for g in (torch.ones(()).expand(4, 5, 9), randn(5, 1).expand(4, 5, 9)):
        plain = grads_of(layer_norm, x.contiguous(), r, weight, bias, (g.contiguous(),) * 2)
        expanded = grads_of(layer_norm, x, r, weight, bias, (g, g))
        for a, b in zip(plain, expanded, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("through", ["y", "sum"])
def test_gradient_through_one_output_only(through, way, assert_accurate):
    tensors = tensors_of(Case("", (6, 33)), F32)
    g = randn(6, 33, seed=9)
    grads = (g, None) if through == "y" else (None, g)
    ours = run(layer_norm, tensors, grads)
    exact = run(eager, {name: t.double() for name, t in tensors.items()}, grads)
    if through == "sum":  # eager leaves the parameters out of the graph: no gradient, ours is zero
        assert not ours.pop("dweight").any() and not ours.pop("dbias").any()
        assert torch.equal(ours["dx"], g)
    assert_accurate(ours, run(eager, tensors, grads), exact)
    ours["dx"].add_(1)
    assert torch.equal(g, randn(6, 33, seed=9)), "the gradient is a view of the upstream one"


def test_one_tensor_as_x_and_residual(way, assert_accurate):
    def twice(function):
        def call(x, prenorm):
            return function(x, residual=x, prenorm=prenorm)

        return call

    x, grads = {"x": randn(4, 20)}, (randn(4, 20, seed=1), randn(4, 20, seed=2))
    exact = run(twice(eager), {"x": x["x"].double()}, grads)
    assert_accurate(run(twice(layer_norm), x, grads), run(twice(eager), x, grads), exact)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (3,), (0, 3), (1, 2)], ids=str)
def test_only_the_wanted_gradients(wanted, way):
    tensors = [randn(6, 20, seed=1), randn(6, 20, seed=2), randn(20, seed=3), randn(20, seed=4)]
    leaves = [t.clone().requires_grad_(i in wanted) for i, t in enumerate(tensors)]
    (2 * layer_norm(leaves[0], leaves[2], leaves[3], residual=leaves[1])).sin().sum().backward()
    plain = [t.clone().requires_grad_() for t in tensors]
    (2 * eager(plain[0], plain[2], plain[3], residual=plain[1])).sin().sum().backward()
    for i, (leaf, other) in enumerate(zip(leaves, plain, strict=True)):
        if i in wanted:
            torch.testing.assert_close(leaf.grad, other.grad, rtol=1e-4, atol=1e-5)
        else:
            assert leaf.grad is None


@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 7), (3, 0), (0,)])
def test_empty(shape, way, poisoned):
    x, r = torch.randn(shape, requires_grad=True), torch.randn(shape, requires_grad=True)
    weight, bias = (torch.randn(shape[-1:], requires_grad=True) for _ in range(2))
    y, s = layer_norm(x, weight, bias, residual=r, prenorm=True)
    (y.sum() + s.sum()).backward()
    assert y.shape == s.shape == x.grad.shape == r.grad.shape == torch.Size(shape)
    assert not weight.grad.any() and not bias.grad.any()


def test_ten_repeats_are_the_same_bits(way):
    tensors, grads = tensors_of(Case("", (150, 65)), F32), (randn(150, 65), randn(150, 65, seed=1))
    first = run(layer_norm, tensors, grads)
    for _ in range(9):
        again = run(layer_norm, tensors, grads)
        assert all(torch.equal(first[name], again[name]) for name in first)


# ---- torch integration -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["plain", "grad", "no residual", "empty", "strided", "half"])
def test_opcheck(kind, way):
    x, r, weight, bias = randn(4, 9), randn(4, 9, seed=1), randn(9, seed=2), randn(9, seed=3)
    arguments = {
        "plain": (x, r, weight, bias),
        "grad": tuple(t.requires_grad_() for t in (x.clone(), r.clone(), weight, bias)),
        "no residual": (x.clone().requires_grad_(), None, weight, None),
        "empty": (x[:0], r[:0].clone().requires_grad_(), weight, bias),
        "strided": (transposed(x).requires_grad_(), every_other(r), weight, bias),
        "half": (x.half().requires_grad_(), r.clone().requires_grad_(), weight, bias),
    }[kind]
    torch.library.opcheck(
        torch.ops.tilewise.layer_norm.default, (*arguments, None, 1e-5, 0.0, True, True)
    )


@pytest.mark.parametrize("way", ["torch", "reference"])
def test_gradcheck(way):
    leaves = [randn(*shape, seed=i, dtype=F64).requires_grad_() for i, shape in
              enumerate([(3, 5), (3, 5), (5,), (5,)])]  # fmt: skip

    def both(x, residual, weight, bias):
        return layer_norm(x, weight, bias, residual=residual, prenorm=True)

    with force(way, "layer_norm"):
        assert torch.autograd.gradcheck(both, leaves)
        assert torch.autograd.gradcheck(layer_norm, leaves[0])
        assert torch.autograd.gradcheck(layer_norm, (leaves[0], leaves[2], leaves[3]))


def block(x, residual, weight, bias):
    y, s = layer_norm(x.sin(), weight, bias, residual=residual.cos(), prenorm=True)
    _, same = layer_norm(s, weight, residual=x, prenorm=True)  # a gradient through the sum alone
    return 2 * y + 3 * s, layer_norm(same, weight)


def eager_block(x, residual, weight, bias):
    s = x.sin() + residual.cos()
    return 2 * eager(s, weight, bias) + 3 * s, eager(s + x, weight)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(backend, monkeypatch):
    """x and residual share a gradient in eager calls; compiled, inductor would overwrite one."""
    monkeypatch.setenv("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend=backend)
    for rows in (6, 11):
        shapes = [(rows, 33), (rows, 33), (33,), (33,)]
        leaves = [randn(*shape, seed=i).requires_grad_() for i, shape in enumerate(shapes)]
        found, expected = compiled(*leaves), eager_block(*leaves)
        torch.testing.assert_close(found, expected)
        weights = [randn(rows, 33, seed=7), randn(rows, 33, seed=8)]
        ours = torch.autograd.grad(found, leaves, weights)
        torch.testing.assert_close(ours, torch.autograd.grad(expected, leaves, weights))


def test_autocast_computes_in_float32(way):
    x, r = randn(4, 32, dtype=F16), randn(4, 32, seed=1, dtype=F16)
    weight = randn(32, dtype=F16).requires_grad_()
    with torch.autocast("cpu", dtype=BF16):
        y, s = layer_norm(x, weight, residual=r, prenorm=True)
    assert y.dtype == s.dtype == F32
    torch.testing.assert_close(s, x.float() + r.float())
    y.sum().backward()
    assert weight.grad.dtype == F16
    with force("torch", "layer_norm"), torch.autocast("cpu", dtype=BF16):
        assert layer_norm(x.double()).dtype == F64


def test_what_is_kept_for_backward(way):
    x, r, weight, bias = (t.requires_grad_() for t in
                          (randn(8, 16), randn(8, 16), randn(16), randn(16)))  # fmt: skip
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        with torch.no_grad():
            layer_norm(x, weight, bias, residual=r)
        assert not kept
        y, s = layer_norm(x, weight, bias, residual=r, prenorm=True)
    assert sorted(t.numel() for t in kept) == [8, 8, 16, 8 * 16]  # rstd, mean, weight, s
    assert any(t.data_ptr() == s.data_ptr() for t in kept)
    with torch.inference_mode():
        assert not layer_norm(x, weight, bias).requires_grad


def test_double_backward_raises(way):
    x = randn(3, 8).requires_grad_()
    (dx,) = torch.autograd.grad(layer_norm(x).sin().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        dx.sum().backward()


def test_the_chosen_way():
    explanation = explain(layer_norm, randn(4, 8))
    assert explanation.implementation == "native"
    assert "native comes first" in explanation.others["torch"]
    with force("triton"), pytest.raises(KernelUnavailable, match="float64"):
        layer_norm(randn(2, 4, dtype=F64))


# ---- bad input ---------------------------------------------------------------------------------

X, W = randn(2, 3, 4), randn(4)


@pytest.mark.parametrize(
    "arguments, options, message",
    [
        (([1.0],), {}, "x is list"),
        ((X.int(),), {}, "x is torch.int32"),
        ((torch.tensor(1.0),), {}, r"x is of shape \[\]"),
        ((X.to_sparse(),), {}, "x is torch.sparse_coo"),
        ((X, randn(5)), {}, r"weight is of shape \[5\]"),
        ((X, randn(1, 4)), {}, r"weight is of shape \[1, 4\]"),
        ((X, 1.0), {}, "weight is float"),
        ((X, W.half()), {}, "weight is torch.float16"),
        ((X.double(), W), {}, "weight is torch.float32"),
        ((X.half(), W.bfloat16()), {}, "weight is torch.bfloat16"),
        ((X, W.to("meta")), {}, "weight is on meta"),
        ((X, None, randn(3)), {}, r"bias is of shape \[3\]"),
        ((X, None, W.int()), {}, "bias is torch.int32"),
        ((X.half(), W, W.half()), {}, "bias is torch.float16"),
        ((X,), {"residual": X[0]}, r"residual is of shape \[3, 4\]"),
        ((X,), {"residual": X.half()}, "residual is torch.float16"),
        ((X,), {"residual": X.to("meta")}, "residual is on meta"),
        ((X,), {"residual": 0}, "residual is int"),
        ((X,), {"eps": -1e-5}, "eps is -1e-05"),
        ((X,), {"eps": "1"}, "eps is '1'"),
        ((X,), {"eps": float("nan")}, "eps is NaN"),
        ((X,), {"dropout_p": 1.5}, "dropout_p is 1.5"),
        ((X,), {"dropout_p": -0.1}, "dropout_p is -0.1"),
    ],
)
def test_bad_input(arguments, options, message):
    before = X.clone()
    with pytest.raises(ArgumentError, match=f"layer_norm: {message}"):
        layer_norm(*arguments, **options)
    assert torch.equal(X, before)
