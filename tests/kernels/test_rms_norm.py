"""rms_norm in each of its ways: against float64 torch, and every edge of its contract."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tilewise_kernels import explain, force, rms_norm
from tilewise_kernels.errors import ArgumentError, KernelUnavailable

WAYS = ("native", "triton", "reference")
F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64


@pytest.fixture(params=WAYS)
def way(request):
    """Runs the test once in each implementation."""
    with force(request.param, "rms_norm"):
        yield request.param


@pytest.fixture
def poisoned():
    """Uninitialised memory holds NaN, so that a result which was never written shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = F32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def eager(x, weight=None, *, eps=1e-6, residual=None, prenorm=False):
    """What one writes in eager torch; a float32 residual stream keeps its dtype in the sum."""
    s = x if residual is None else x + residual
    weight = weight if weight is None else weight.to(s.dtype)
    y = F.rms_norm(s, s.shape[-1:], weight, eps).to(x.dtype)
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
    """One call. wide: tensors that are float32 whatever x is. spread: size of x."""

    name: str
    shape: tuple[int, ...]
    tensors: str = "residual weight"
    wide: str = ""
    spread: float = 1.0
    eps: float = 1e-6


CASES = [
    Case("16 rows a tile, no masks", (32, 64)),
    Case("rows and columns past the tile", (3, 7, 250)),
    Case("plain x", (5, 96), ""),
    Case("weight alone", (5, 96), "weight"),
    Case("one-dimensional", (33,)),
    Case("five-dimensional", (2, 1, 3, 2, 9)),
    Case("one column", (4, 1)),
    Case("float32 weight", (9, 40), wide="weight"),
    Case("float32 residual stream", (9, 40), wide="residual weight"),
    Case("float32 residual, weight of x", (9, 40), wide="residual"),
    Case("values of 1e4", (8, 128), "weight", spread=1e4),
    Case("more rows than programs take at once", (150, 33)),
    Case("dweight in a kernel of its own", (3, 8200)),
    Case("small values, small eps", (4, 50), eps=1e-12, spread=1e-3),
]


@pytest.mark.parametrize("dtype", (F32, BF16, F16), ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_accuracy(case, dtype, way, assert_accurate, poisoned):
    if way == "triton" and dtype == BF16:
        with pytest.raises(KernelUnavailable, match="bfloat16"):
            rms_norm(randn(2, 3, dtype=BF16))
        return
    tensors = {"x": (case.spread * randn(*case.shape, seed=1)).to(dtype)}
    for seed, name in enumerate(case.tensors.split()):
        shape = case.shape if name == "residual" else case.shape[-1:]
        tensors[name] = randn(*shape, seed=seed + 2).to(F32 if name in case.wide.split() else dtype)
    grads = randn(*case.shape, seed=8).to(dtype), randn(*case.shape, seed=9).to(dtype)
    kept = [t.clone() for t in (*tensors.values(), *grads)]
    ours = run(rms_norm, tensors, grads, eps=case.eps)
    exact = run(eager, {name: t.double() for name, t in tensors.items()}, grads, eps=case.eps)
    assert_accurate(ours, run(eager, tensors, grads, eps=case.eps), exact)
    assert ours["y"].dtype == dtype
    assert ours["s"].dtype == tensors.get("residual", tensors["x"]).dtype
    for name, tensor in tensors.items():
        assert ours[f"d{name}"].dtype == tensor.dtype
    now = (*tensors.values(), *grads)
    assert all(torch.equal(a, b) for a, b in zip(kept, now, strict=True)), "an input was changed"


def test_half_sums_of_squares_do_not_overflow(way):
    x = torch.full((2, 64), 3e4, dtype=F16)  # its square is beyond float16
    assert torch.equal(rms_norm(x), torch.ones(2, 64, dtype=F16))


def test_zero_and_subnormal_rows(way):
    assert not rms_norm(torch.zeros(3, 20)).any()
    x = torch.full((2, 32), 1e-41)  # its square is 0: what eps leaves of it
    y = rms_norm(x, eps=1e-6)
    torch.testing.assert_close(y, 1e3 * x, rtol=1e-3, atol=0)
    leaf = torch.zeros(3, 20, requires_grad=True)
    rms_norm(leaf, eps=1e-6).sum().backward()
    torch.testing.assert_close(leaf.grad, torch.full((3, 20), 1e3))


def test_only_rstd_is_kept_and_in_float32(way):
    x = randn(4, 64, dtype=F16) * 100
    arguments = (x, None, None, None, None, 1e-6, 0.0, False, True)
    _, s, mean, rstd = torch.ops.tilewise.rms_norm(*arguments)
    assert s.numel() == mean.numel() == 0 and rstd.shape == (4, 1) and rstd.dtype == F32
    exact = x.double().square().mean(-1, keepdim=True).add(1e-6).rsqrt()
    torch.testing.assert_close(rstd.double(), exact, rtol=1e-6, atol=0)


# ---- layouts and upstream gradients ------------------------------------------------------------


def every_other(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, -1)[..., ::2]


def transposed(x: Tensor) -> Tensor:
    return x.transpose(0, -1).contiguous().transpose(0, -1)


def off_by_one(x: Tensor) -> Tensor:
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


def grads_of(x, residual, weight, grads):
    leaves = [t.detach().requires_grad_() for t in (x, residual, weight)]
    y, s = rms_norm(leaves[0], leaves[2], residual=leaves[1], prenorm=True)
    return [y, s, *torch.autograd.grad((y, s), leaves, grads)]


@pytest.mark.parametrize("layout", [every_other, transposed, off_by_one])
def test_layouts_give_the_same_result(layout, way):
    x, r, g, h = (randn(3, 4, 37, seed=seed) for seed in range(4))
    plain = grads_of(x, r, randn(37, seed=4), (g, h))
    strided = grads_of(layout(x), layout(r), layout(randn(37, seed=4)), (layout(g), layout(h)))
    for a, b in zip(plain, strided, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_expanded_inputs_and_gradients(way):
    x, r, weight = randn(1, 1, 9).expand(4, 5, 9), randn(4, 5, 9, seed=1), randn(9)
    for g in (torch.ones(()).expand(4, 5, 9), randn(5, 1).expand(4, 5, 9)):
        plain = grads_of(x.contiguous(), r, weight, (g.contiguous(),) * 2)
        for a, b in zip(plain, grads_of(x, r, weight, (g, g)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("through", ["y", "sum"])
def test_gradient_through_one_output_only(through, way, assert_accurate):
    tensors = {"x": randn(6, 33), "residual": randn(6, 33, seed=1), "weight": randn(33, seed=2)}
    g = randn(6, 33, seed=9)
    grads = (g, None) if through == "y" else (None, g)
    ours = run(rms_norm, tensors, grads)
    exact = run(eager, {name: t.double() for name, t in tensors.items()}, grads)
    if through == "sum":  # eager leaves the weight out of the graph: no gradient, ours is zero
        assert not ours.pop("dweight").any()
        assert torch.equal(ours["dx"], g)
    assert_accurate(ours, run(eager, tensors, grads), exact)
    ours["dx"].add_(1)
    assert torch.equal(g, randn(6, 33, seed=9)), "the gradient is a view of the upstream one"


def test_one_tensor_as_x_and_residual(way):
    x = randn(4, 20).requires_grad_()
    y, s = rms_norm(x, residual=x, prenorm=True)
    (found,) = torch.autograd.grad((y, s), x, (randn(4, 20, seed=1), randn(4, 20, seed=2)))
    y, s = eager(x, residual=x, prenorm=True)
    (wanted,) = torch.autograd.grad((y, s), x, (randn(4, 20, seed=1), randn(4, 20, seed=2)))
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)], ids=str)
def test_only_the_wanted_gradients(wanted, way):
    tensors = [randn(6, 20, seed=1), randn(6, 20, seed=2), randn(20, seed=3)]
    leaves = [t.clone().requires_grad_(i in wanted) for i, t in enumerate(tensors)]
    (2 * rms_norm(leaves[0], leaves[2], residual=leaves[1])).sin().sum().backward()
    plain = [t.clone().requires_grad_() for t in tensors]
    (2 * eager(plain[0], plain[2], residual=plain[1])).sin().sum().backward()
    for i, (leaf, other) in enumerate(zip(leaves, plain, strict=True)):
        if i in wanted:
            torch.testing.assert_close(leaf.grad, other.grad, rtol=1e-4, atol=1e-5)
        else:
            assert leaf.grad is None


@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 7), (3, 0), (0,)])
def test_empty(shape, way, poisoned):
    x, r = torch.randn(shape, requires_grad=True), torch.randn(shape, requires_grad=True)
    weight = torch.randn(shape[-1:], requires_grad=True)
    y, s = rms_norm(x, weight, residual=r, prenorm=True)
    (y.sum() + s.sum()).backward()
    assert y.shape == s.shape == x.grad.shape == r.grad.shape == torch.Size(shape)
    assert weight.grad.shape == weight.shape and not weight.grad.any()


@pytest.mark.parametrize("way", ["native", "reference"])
def test_gradcheck(way):
    x, residual, weight = (randn(*shape, seed=i, dtype=F64).requires_grad_() for i, shape in
                           enumerate([(3, 5), (3, 5), (5,)]))  # fmt: skip

    def both(x, residual, weight):
        return rms_norm(x, weight, residual=residual, prenorm=True)

    with force(way, "rms_norm"):
        assert torch.autograd.gradcheck(both, (x, residual, weight))
        assert torch.autograd.gradcheck(rms_norm, x)


def test_what_is_kept_for_backward(way):
    x, r, weight = (t.requires_grad_() for t in (randn(8, 16), randn(8, 16), randn(16)))
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        with torch.no_grad():
            rms_norm(x, weight, residual=r)
        assert not kept
        y, s = rms_norm(x, weight, residual=r, prenorm=True)
    assert sorted(t.numel() for t in kept) == [8, 16, 8 * 16]  # rstd, weight, s
    assert any(t.data_ptr() == s.data_ptr() for t in kept)


def test_the_chosen_way():
    explanation = explain(rms_norm, randn(4, 8))
    assert explanation.implementation == "native"
    assert "native comes first" in explanation.others["reference"]


# ---- bad input ---------------------------------------------------------------------------------

X, W = randn(2, 3, 4), randn(4)


@pytest.mark.parametrize(
    "arguments, options, message",
    [
        (([1.0],), {}, "x is list"),
        ((X.int(),), {}, "x is torch.int32"),
        ((torch.tensor(1.0),), {}, r"x is of shape \[\]"),
        ((X, randn(5)), {}, r"weight is of shape \[5\]"),
        ((X, 1.0), {}, "weight is float"),
        ((X, W.half()), {}, "weight is torch.float16"),
        ((X, W.to("meta")), {}, "weight is on meta"),
        ((X,), {"residual": X[0]}, r"residual is of shape \[3, 4\]"),
        ((X,), {"residual": X.half()}, "residual is torch.float16"),
        ((X,), {"residual": X.to_sparse()}, "residual is torch.sparse_coo"),
        ((X,), {"eps": -1e-5}, "eps is -1e-05"),
        ((X,), {"eps": float("nan")}, "eps is NaN"),
        ((X,), {"dropout_p": 1.5}, "dropout_p is 1.5"),
        ((X,), {"prenorm": 1}, "prenorm is a int"),
    ],
)
def test_bad_input(arguments, options, message):
    with pytest.raises(ArgumentError, match=f"rms_norm: {message}"):
        rms_norm(*arguments, **options)
