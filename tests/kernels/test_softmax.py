"""softmax on the CPU: native and reference against float64 torch; every edge of its contract."""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from tilewise_kernels import explain, force, softmax
from tilewise_kernels.errors import ArgumentError, KernelUnavailable

INF, NAN = math.inf, math.nan
WAYS = ("native", "reference")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=WAYS)
def way(request):
    """Runs the test once in each implementation."""
    with force(request.param, "softmax"):
        yield request.param


def eager(x: Tensor, mask: Tensor | None = None, scale: float = 1.0, causal: bool = False,
          dim: int = -1) -> Tensor:  # fmt: skip
    """What one writes in eager torch, in the dtype of x, with dead rows set to 0."""
    scores = x * scale
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -INF)
    elif mask is not None:
        scores = scores + mask.to(torch.promote_types(x.dtype, mask.dtype))
    if causal:
        queries, keys = x.shape[-2:]
        allowed = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
        scores = scores.masked_fill(~allowed, -INF)
    dead = (scores == -INF).all(dim, keepdim=True)
    return torch.softmax(scores, dim).masked_fill(dead, 0).to(x.dtype)


def run(function: Callable[..., Tensor], x: Tensor, dtype: torch.dtype, grad: Tensor, **kwargs):
    leaf = x.detach().to(dtype).requires_grad_()
    y = function(leaf, **kwargs)
    (dx,) = torch.autograd.grad(y, leaf, grad.to(dtype))
    return {"y": y, "dx": dx}


# ---- accuracy ----------------------------------------------------------------------------------


@dataclass
class Case:
    """One call; mask is a shape and its dtype (torch.bool, or a float dtype)."""

    name: str
    shape: tuple[int, ...]
    mask: tuple[int, ...] | None = None
    mask_dtype: torch.dtype = torch.bool
    scale: float = 1.0
    causal: bool = False
    dim: int = -1
    spread: float = 1.0  # standard deviation of x


CASES = [
    Case("plain", (3, 5, 64)),
    Case("one column", (7, 1)),
    Case("one row, odd", (1, 17)),
    Case("one-dimensional", (33,)),
    Case("five-dimensional", (2, 1, 3, 4, 9)),
    Case("vector tail", (4, 127), scale=0.3),
    Case("many threads", (64, 1025)),
    Case("65537 columns", (2, 65537)),
    Case("131072 columns, sharp", (1, 131072), spread=6.0),
    Case("first dim", (9, 4, 5), dim=0),
    Case("middle dim", (2, 31, 6), dim=-2),
    Case("masked along the first dim", (9, 4, 5), dim=0, mask=(4, 1)),
    Case("scale 0", (3, 20), scale=0.0),
    Case("negative scale", (3, 20), scale=-2.5),
    Case("causal", (2, 17, 17), causal=True),
    Case("causal, more keys", (2, 5, 40), causal=True),
    Case("causal, more queries: dead rows", (2, 40, 5), causal=True),
    Case("causal, one query", (2, 1, 9), causal=True),
    Case("mask [Sq, N]", (2, 3, 8, 33), mask=(8, 33)),
    Case("mask [B, 1, 1, N]", (2, 3, 8, 33), mask=(2, 1, 1, 33), scale=0.125),
    Case("mask [1, H, Sq, N], causal", (2, 3, 8, 33), mask=(1, 3, 8, 33), causal=True),
    Case("mask broadcast over columns", (2, 3, 8, 33), mask=(8, 1)),
    Case("mask of one element", (2, 8), mask=(1,)),
    Case("float32 mask", (2, 3, 8, 33), mask=(2, 1, 8, 33), mask_dtype=torch.float32),
    Case("bfloat16 mask", (2, 8, 33), mask=(8, 33), mask_dtype=torch.bfloat16, causal=True),
    Case("float64 mask", (2, 8, 33), mask=(2, 1, 33), mask_dtype=torch.float64),
    Case("logits of 1e4", (5, 50), spread=1e4),
]  # fmt: skip


def make_mask(case: Case, generator: torch.Generator) -> Tensor | None:
    if case.mask is None:
        return None
    keep = torch.rand(case.mask, generator=generator) < 0.7
    if case.mask_dtype == torch.bool:
        return keep
    values = 2 * torch.randn(case.mask, generator=generator)
    return values.masked_fill(~keep, -INF).to(case.mask_dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_accuracy(case, dtype, way, assert_accurate):
    generator = torch.Generator().manual_seed(0)
    x = (case.spread * torch.randn(case.shape, generator=generator)).to(dtype)
    grad = torch.randn(case.shape, generator=generator).to(dtype)
    mask = make_mask(case, generator)
    options = {"mask": mask, "scale": case.scale, "causal": case.causal, "dim": case.dim}
    kept = [t.clone() for t in (x, grad) + (() if mask is None else (mask,))]
    ours = run(softmax, x, dtype, grad, **options)
    exact = run(eager, x, torch.float64, grad, **options)
    assert_accurate(ours, run(eager, x, dtype, grad, **options), exact)
    assert ours["y"].dtype == ours["dx"].dtype == dtype
    now = (x, grad) + (() if mask is None else (mask,))
    assert all(torch.equal(a, b) for a, b in zip(kept, now, strict=True)), "an input was changed"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_extremes_of_the_dtype(dtype, way):
    top = torch.finfo(dtype).max
    x = torch.tensor([[top, -top, 0.0], [top, top, top], [-top, -top, -top], [0.0, 1e-7, -1e-7]])
    y = softmax(x.to(dtype))
    expected = torch.softmax(x.to(dtype).double(), -1)
    torch.testing.assert_close(y.double(), expected, rtol=torch.finfo(dtype).eps, atol=0)


def test_a_float32_mask_keeps_its_range_under_half_precision(way):
    """-1e6 fits no float16: as a float32 mask it must stay finite, so a row of it is not dead."""
    x = torch.zeros(2, 4, dtype=torch.float16)
    mask = torch.tensor([[-1e6] * 4, [0.0, -1e6, 0.0, 0.0]])
    expected = torch.tensor([[0.25] * 4, [1 / 3, 0, 1 / 3, 1 / 3]])
    torch.testing.assert_close(softmax(x, mask=mask).float(), expected, rtol=1e-3, atol=0)


def test_columns_that_sum_past_the_largest_half(way):
    x = torch.zeros(1, 131072, dtype=torch.float16)
    assert (softmax(x) == 2.0**-17).all()


# ---- rows with nothing to attend to, masks, special values ---------------------------------------


@pytest.mark.parametrize("how", ["bool", "-inf mask", "-inf rows", "causal"])
def test_dead_rows_are_zero_and_have_no_gradient(how, way):
    x = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(1))
    dead = torch.zeros(2, 6, dtype=torch.bool)
    options: dict = {}
    if how == "causal":
        dead[:, :2], options = True, {"causal": True}
    else:
        dead[0] = dead[1, 3] = True  # a whole batch item, and one row
        keep = (~dead)[..., None].expand(2, 6, 4)
        if how == "bool":
            options = {"mask": keep}
        elif how == "-inf mask":
            options = {"mask": torch.zeros(2, 6, 4).masked_fill(~keep, -INF)}
        else:
            x = x.masked_fill(~keep, -INF)
    leaf = x.clone().requires_grad_()
    y = softmax(leaf, **options)
    (1e4 * y.square()).sum().backward()
    assert (y[dead] == 0).all() and (leaf.grad[dead] == 0).all()
    torch.testing.assert_close(y[~dead].sum(-1), torch.ones(int((~dead).sum())))
    assert leaf.grad.isfinite().all()


def test_finite_float_masks_are_added_and_never_kill_a_row(way):
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(2))
    low = torch.finfo(torch.float32).min
    mask = torch.zeros(3, 8)
    mask[0, 2:5], mask[1], mask[2, :7] = low, low, -1e6
    y = softmax(x, mask=mask)
    torch.testing.assert_close(y, torch.softmax(x + mask, -1))
    hard = softmax(x[:1], mask=mask[:1] == 0)
    torch.testing.assert_close(y[:1], hard)


@pytest.mark.parametrize("value", [NAN, INF])
def test_nan_and_inf_spoil_their_row_alone_as_in_eager(value, way):
    x = torch.randn(4, 37, generator=torch.Generator().manual_seed(3))
    x[1, 36] = value
    y, expected = softmax(x), torch.softmax(x, -1)
    assert expected[1].isnan().all() and torch.equal(y.isnan(), expected.isnan())
    torch.testing.assert_close(y, expected, equal_nan=True)


def test_nan_behind_a_bool_mask_or_the_causal_limit_does_not_leak(way):
    x = torch.randn(4, 4, generator=torch.Generator().manual_seed(4))
    hidden = ~torch.ones(4, 4, dtype=torch.bool).tril()
    clean = softmax(x, causal=True)
    for options in ({"causal": True}, {"mask": ~hidden}):
        leaf = x.masked_fill(hidden, NAN).requires_grad_()
        y = softmax(leaf, **options)
        assert torch.equal(y, clean)
        y.square().sum().backward()
        assert leaf.grad.isfinite().all() and (leaf.grad[hidden] == 0).all()


# ---- layouts -----------------------------------------------------------------------------------


def every_other(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, -1)[..., ::2]


def transposed(x: Tensor) -> Tensor:
    return x.transpose(0, -1).contiguous().transpose(0, -1)


def off_by_one(x: Tensor) -> Tensor:
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


def out_of_a_wider_row(x: Tensor) -> Tensor:
    return torch.cat([x, x], -1)[..., : x.shape[-1]]


@pytest.mark.parametrize("layout", [every_other, transposed, off_by_one, out_of_a_wider_row])
def test_layouts_give_the_same_result(layout, way):
    """The same bits from native; torch.softmax, under reference, sums in an order of its own."""
    tolerance = 0.0 if way == "native" else 1e-6
    generator = torch.Generator().manual_seed(5)
    x, grad, added = (torch.randn(3, 4, 6, 37, generator=generator) for _ in range(3))
    plain, view = x.clone().requires_grad_(), layout(x).requires_grad_()
    y, z = softmax(plain, mask=added, causal=True), softmax(view, mask=layout(added), causal=True)
    torch.testing.assert_close(z, y, rtol=tolerance, atol=tolerance)
    (dx,) = torch.autograd.grad(y, plain, grad)
    (dz,) = torch.autograd.grad(z, view, layout(grad))
    torch.testing.assert_close(dz, dx, rtol=tolerance, atol=tolerance)


def test_expanded_inputs_masks_and_gradients_give_the_same_bits(way):
    generator = torch.Generator().manual_seed(6)
    x = torch.randn(1, 1, 5, 9, generator=generator).expand(2, 3, 5, 9)
    mask = (torch.rand(2, 1, 1, 9, generator=generator) < 0.7).expand(2, 3, 5, 9)
    view, plain = x.detach().requires_grad_(), x.contiguous().requires_grad_()
    y, z = softmax(plain, mask=mask.contiguous()), softmax(view, mask=mask)
    assert torch.equal(y, z)
    for upstream in (
        torch.ones(()).expand_as(y),
        torch.randn(3, generator=generator)[:, None, None].expand_as(y),
    ):
        (dx,) = torch.autograd.grad(y, plain, upstream.contiguous(), retain_graph=True)
        (dz,) = torch.autograd.grad(z, view, upstream, retain_graph=True)
        assert torch.equal(dx, dz)


@pytest.mark.parametrize("shape", [(0,), (0, 5), (3, 0), (2, 0, 5), (2, 3, 0, 5), (0, 0)])
def test_empty(shape, way):
    x = torch.randn(shape, requires_grad=True)
    for options in ({}, {"dim": 0}, {"mask": torch.ones(shape, dtype=torch.bool)}):
        y = softmax(x, **options)
        y.sum().backward()
        assert y.shape == x.grad.shape == torch.Size(shape)


def test_more_dims_than_native_walks():
    x = torch.randn([2] * 18, generator=torch.Generator().manual_seed(7))
    x = x.permute(*range(17, -1, -1)).requires_grad_()
    with force("native"), pytest.raises(KernelUnavailable, match="x has 17"):
        softmax(x)
    y = softmax(x)
    torch.testing.assert_close(y, torch.softmax(x, -1))
    y.square().sum().backward()
    assert x.grad.isfinite().all()


def test_both_ways_agree_and_native_is_chosen():
    x = torch.randn(2, 3, 16, 65, generator=torch.Generator().manual_seed(8))
    assert explain(softmax, x, causal=True).implementation == "native"
    with force("reference"):
        expected = softmax(x, causal=True, scale=0.3)
    torch.testing.assert_close(softmax(x, causal=True, scale=0.3), expected, rtol=1e-6, atol=1e-8)


# ---- bad input -----------------------------------------------------------------------------------

X = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(9))
with warnings.catch_warnings(action="ignore"):  # torch says that the layout is a prototype
    NESTED = torch.nested.nested_tensor([X[0], X[1, :2]])


@pytest.mark.parametrize(
    "arguments, options, message",
    [
        (([1.0],), {}, "x is list"),
        ((X.int(),), {}, "x is torch.int32"),
        ((X.to(torch.complex64),), {}, "x is torch.complex64"),
        ((torch.tensor(1.0),), {}, r"x is of shape \[\]"),
        ((X.to_sparse(),), {}, "x is torch.sparse_coo"),
        ((NESTED,), {}, "x is a nested tensor"),
        ((X,), {"scale": NAN}, "scale is NaN"),
        ((X,), {"scale": 10**400}, "scale is too large"),
        ((X,), {"mask": NESTED}, "mask is sparse or nested"),
        ((X,), {"mask": X.to_sparse()}, "mask is sparse or nested"),
        ((X,), {"scale": "1"}, "scale is '1'"),
        ((X,), {"scale": torch.tensor(1.0)}, "scale is tensor"),
        ((X,), {"scale": True}, "scale is True"),
        ((X,), {"dim": 3}, "dim is 3"),
        ((X,), {"dim": -4}, "dim is -4"),
        ((X,), {"dim": 1.0}, "dim is 1.0"),
        ((X,), {"causal": True, "dim": 0}, "causal is True"),
        ((X[0, 0],), {"causal": True}, "causal is True"),
        ((X,), {"mask": [True]}, "mask is list"),
        ((X,), {"mask": torch.ones(3, 4, dtype=torch.int64)}, "mask is torch.int64"),
        ((X,), {"mask": torch.ones(3, 5, dtype=torch.bool)}, r"mask is of shape \[3, 5\]"),
        ((X,), {"mask": torch.ones(1, 2, 3, 4, dtype=torch.bool)}, "mask is of shape"),
        ((X,), {"mask": torch.zeros(4, requires_grad=True)}, "mask is one that requires grad"),
        ((X,), {"mask": torch.ones(4, dtype=torch.bool, device="meta")}, "mask is on meta"),
    ],
)
def test_bad_input(arguments, options, message):
    before = X.clone()
    with pytest.raises(ArgumentError, match=f"softmax: {message}"):
        softmax(*arguments, **options)
    assert torch.equal(X, before)
