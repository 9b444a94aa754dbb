"""rotary in each of its ways, against the formula in float64 torch."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from tilewise_kernels import explain, force, rotary
from tilewise_kernels.errors import ArgumentError, KernelUnavailable

WAYS = ("triton", "native", "reference")
F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64


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


def tables(*shape: int, dtype: torch.dtype = F32) -> tuple[Tensor, Tensor]:
    """Cosines and sines of angles of every size, [.., S, R/2]."""
    angles = 20 * randn(*shape, seed=7, dtype=F64)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate_half(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), -1)


def rotate_pairs(x: Tensor) -> Tensor:
    return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)


def eager_turn(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """As models write it, with tables that repeat each angle for both columns of its pair."""
    cos, sin = cos.to(x.dtype).unsqueeze(-3), sin.to(x.dtype).unsqueeze(-3)
    if interleaved:
        cos, sin = cos.repeat_interleave(2, -1), sin.repeat_interleave(2, -1)
    else:
        cos, sin = torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)
    turning, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    other = rotate_pairs(turning) if interleaved else rotate_half(turning)
    return torch.cat((turning * cos + other * sin, rest), -1)


def eager(q, k, cos, sin, *, interleaved=False):
    return eager_turn(q, cos, sin, interleaved), eager_turn(k, cos, sin, interleaved)


def run(function, q: Tensor, k: Tensor, grads: tuple[Tensor, Tensor], *args: Any, **options: Any):
    """Both results and both gradients, by name."""
    q, k = q.detach().requires_grad_(), k.detach().requires_grad_()
    turned = function(q, k, *args, **options)
    dq, dk = torch.autograd.grad(turned, (q, k), [g.to(q.dtype) for g in grads])
    return {"q": turned[0], "k": turned[1], "dq": dq, "dk": dk}


# ---- accuracy ----------------------------------------------------------------------------------


@dataclass
class Case:
    """heads: (of q, of k). R: how many columns turn. table: leading dims of cos and sin."""

    name: str
    S: int
    D: int
    R: int
    B: int = 2
    heads: tuple[int, int] = (3, 1)
    table: tuple[int, ...] = ()


CASES = [
    Case("whole vectors", 7, 64, 64),
    Case("positions of each sequence", 5, 32, 32, table=(2,)),
    Case("one row of positions for all", 5, 32, 32, table=(1,)),
    Case("a quarter turns", 6, 80, 20),
    Case("odd number of pairs, odd rest", 9, 59, 38),
    Case("one pair", 4, 2, 2),
    Case("one pair of three columns", 4, 3, 2),
    Case("nothing turns", 3, 8, 0),
    Case("one token, many heads", 1, 128, 128, heads=(9, 5)),
    Case("more tokens than a tile", 150, 40, 40, B=1, heads=(2, 2)),
]


@pytest.mark.parametrize("interleaved", (False, True), ids=("halves", "interleaved"))
@pytest.mark.parametrize("dtype", (F32, BF16, F16), ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_accuracy(case, dtype, interleaved, way, assert_accurate, poisoned):
    shapes = [(case.B, heads, case.S, case.D) for heads in case.heads]
    q, k = (randn(*shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes))
    if way == "triton" and dtype == BF16:
        with pytest.raises(KernelUnavailable, match="bfloat16"):
            rotary(q, k, *tables(case.S, case.R // 2))
        return
    grads = randn(*shapes[0], seed=8, dtype=dtype), randn(*shapes[1], seed=9, dtype=dtype)
    cos, sin = tables(*case.table, case.S, case.R // 2)
    kept = [t.clone() for t in (q, k, cos, sin, *grads)]
    option = {"interleaved": interleaved}
    ours = run(rotary, q, k, grads, cos, sin, **option)
    exact = run(eager, q.double(), k.double(), grads, cos, sin, **option)
    assert_accurate(ours, run(eager, q, k, grads, cos, sin, **option), exact)
    assert all(t.dtype == dtype for t in ours.values())
    now = (q, k, cos, sin, *grads)
    assert all(torch.equal(a, b) for a, b in zip(kept, now, strict=True)), "an input was changed"


def test_tables_of_every_dtype(way):
    q, k = randn(1, 2, 5, 16, dtype=F16), randn(1, 1, 5, 16, seed=1, dtype=F16)
    for dtype in (F16, BF16, F64):
        cos, sin = tables(5, 8, dtype=dtype)
        for ours, same in zip(
            rotary(q, k, cos, sin), rotary(q, k, cos.float(), sin.float()), strict=True
        ):
            assert torch.equal(ours, same)


def test_float64_is_exact_and_turning_back_gives_the_input():
    q, k = randn(2, 3, 5, 20, dtype=F64), randn(2, 1, 5, 20, seed=1, dtype=F64)
    cos, sin = tables(5, 7, dtype=F64)
    for way in ("native", "reference"):
        with force(way):
            turned = rotary(q, k, cos, sin)
            for ours, exact in zip(turned, eager(q, k, cos, sin), strict=True):
                torch.testing.assert_close(ours, exact, rtol=1e-14, atol=1e-14)
            for back, x in zip(rotary(*turned, cos, -sin), (q, k), strict=True):
                torch.testing.assert_close(back, x, rtol=1e-13, atol=1e-13)


def test_scores_depend_on_distance_alone(way):
    """The point of the method: q at i and k at j meet as q at i + n and k at j + n."""
    q, k = (randn(1, 1, 1, 16, seed=i).expand(1, 1, 12, 16) for i in range(2))
    angles = torch.outer(torch.arange(12.0), 100 ** -(torch.arange(8) / 8))
    for interleaved in (False, True):
        turned = rotary(q, k, angles.cos(), angles.sin(), interleaved=interleaved)
        scores = (turned[0] @ turned[1].mT)[0, 0]
        for distance in range(-11, 12):
            diagonal = scores.diagonal(distance)
            torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))


# ---- layouts -----------------------------------------------------------------------------------


def packed(x: Tensor) -> Tensor:
    """x as a view of a packed [B, S, 2, H, D]."""
    both = torch.stack((x, x + 1)).permute(1, 3, 0, 2, 4).contiguous()
    return both.select(2, 0).transpose(1, 2)


def transposed(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def every_other(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, -1)[..., ::2]


def columns_first(x: Tensor) -> Tensor:
    return x.mT.contiguous().mT


def off_by_one(x: Tensor) -> Tensor:
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


LAYOUTS = (packed, transposed, every_other, columns_first, off_by_one)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
@pytest.mark.parametrize("interleaved", (False, True), ids=("halves", "interleaved"))
def test_strides_change_no_bit(layout, interleaved, way):
    q, k = randn(2, 3, 5, 24), randn(2, 2, 5, 24, seed=1)
    grads = randn(2, 3, 5, 24, seed=2), randn(2, 2, 5, 24, seed=3)
    cos, sin = tables(2, 5, 10)
    expected = run(rotary, q, k, grads, cos, sin, interleaved=interleaved)
    tables_too = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in (cos, sin)]
    moved = (layout(grads[0]), layout(grads[1]))
    found = run(rotary, layout(q), layout(k), moved, *tables_too, interleaved=interleaved)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_layout_of_dense_inputs_is_kept():
    cos, sin = tables(5, 12)
    for way in ("triton", "native"):
        with force(way):
            q, k = transposed(randn(2, 3, 5, 24)), packed(randn(2, 2, 5, 24))
            turned = rotary(q, k, cos, sin)
            assert turned[0].stride() == q.stride()
            assert turned[1].transpose(1, 2).is_contiguous()


def test_expanded_inputs_and_gradients(way):
    x, (cos, sin) = randn(1, 1, 5, 8), tables(5, 4)
    k = x.expand(2, 3, 5, 8)
    plain, view = rotary(k.contiguous(), k, cos, sin)
    assert torch.equal(plain, view)
    for upstream in (torch.ones(()).expand(2, 3, 5, 8), randn(3, 1, 1).expand(2, 3, 5, 8)):
        grads = (upstream, upstream.contiguous())
        found = run(rotary, k, k, grads, cos, sin)
        assert torch.equal(found["dq"], found["dk"])


@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (2, 0, 3, 4), (2, 2, 0, 4), (2, 2, 3, 0)], ids=str)
def test_empty(shape, way):
    B, _, S, D = shape
    q, k = torch.randn(shape, requires_grad=True), torch.randn(B, 1, S, D, requires_grad=True)
    cos, sin = tables(S, D // 2)
    turned = rotary(q, k, cos, sin)
    (turned[0].sum() + turned[1].sum()).backward()
    assert turned[0].shape == q.grad.shape == q.shape and k.grad.shape == k.shape


@pytest.mark.parametrize("used", (0, 1))
def test_one_output_used(used, way):
    """The other tensor's gradient is zero, or nothing at all."""
    leaves = [randn(1, h, 3, 4, seed=h).requires_grad_() for h in (2, 1)]
    cos, sin = tables(3, 2)
    turned = rotary(*leaves, cos, sin)
    turned[used].sum().backward()
    unused = leaves[1 - used]
    assert unused.grad is None or (unused.grad.shape == unused.shape and not unused.grad.any())
    expected = eager(*leaves, cos, sin)[used].sum()
    (grad,) = torch.autograd.grad(expected, leaves[used])
    torch.testing.assert_close(leaves[used].grad, grad)


def test_backward_saves_the_tables_alone():
    saved: list[Tensor] = []
    q, k = randn(2, 4, 32, 64).requires_grad_(), randn(2, 4, 32, 64).requires_grad_()
    cos, sin = tables(32, 32)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        rotary(q, k, cos, sin)
    assert sorted(t.data_ptr() for t in saved) == sorted(t.data_ptr() for t in (cos, sin))


# ---- choice and bad input ----------------------------------------------------------------------


def test_native_is_chosen_and_triton_declines_float64():
    q = randn(1, 1, 2, 4)
    assert explain(rotary, q, q, *tables(2, 2)).implementation == "native"
    with force("triton"), pytest.raises(KernelUnavailable, match="float64"):
        rotary(q.double(), q.double(), *tables(2, 2))


Q, K = randn(2, 3, 5, 8), randn(2, 1, 5, 8)
COS, SIN = tables(5, 4)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"q": [1.0]}, "q is list"),
        ({"q": Q.int()}, "q is torch.int32"),
        ({"q": Q[0]}, r"q is of shape \[3, 5, 8\]; it must be \[B, heads, S, D\]"),
        ({"k": None}, "k is NoneType"),
        ({"k": K.double()}, "k is torch.float64; q is torch.float32"),
        ({"k": K.to("meta")}, "k is on meta"),
        ({"k": K[:1]}, r"k is of shape \[1, 1, 5, 8\]; it must be \[2, heads, 5, 8\]"),
        ({"k": K[:, :, :4]}, "k is of shape"),
        ({"k": K[..., :6]}, "k is of shape"),
        ({"cos": 1.0}, "cos is float"),
        ({"cos": COS.long()}, "cos is torch.int64"),
        ({"cos": COS.to("meta")}, "cos is on meta"),
        ({"cos": COS.clone().requires_grad_()}, "cos is one that requires grad"),
        ({"sin": SIN.clone().requires_grad_()}, "sin is one that requires grad"),
        ({"cos": COS[:4]}, r"cos is of shape \[4, 4\]"),
        ({"cos": torch.ones(5, 8)}, "of a table that repeats them, the first half"),
        ({"cos": torch.ones(3, 5, 4)}, r"cos is of shape \[3, 5, 4\]"),
        ({"cos": torch.ones(1, 1, 5, 4)}, "cos is of shape"),
        ({"cos": torch.ones(4)}, "cos is of shape"),
        ({"sin": SIN[:, :2]}, r"sin is of shape \[5, 2\]; cos is \[5, 4\]"),
        ({"sin": torch.ones(2, 5, 4)}, "sin is of shape"),
        ({"interleaved": 1}, "interleaved is a int"),
    ],
)
def test_bad_input(changes, message):
    given = {"q": Q, "k": K, "cos": COS, "sin": SIN} | changes
    with pytest.raises(ArgumentError, match=f"^rotary: .*{message}|^rotary: {message}"):
        rotary(**given)
