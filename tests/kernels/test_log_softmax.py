"""log_softmax and log_softmax_topk: native, Triton (interpreted) and reference against float64."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from tilewise_kernels import explain, force, log_softmax, log_softmax_topk
from tilewise_kernels.errors import ArgumentError, KernelUnavailable

INF, NAN = math.inf, math.nan
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def has_triton() -> bool:
    from tilewise_kernels import lazy_triton

    return lazy_triton.missing() is None


no_triton = pytest.mark.skipif(not has_triton(), reason="triton is not installed")


WAYS = {"native": (), "reference": (), "triton": (no_triton,)}


@pytest.fixture(params=[pytest.param(way, marks=marks) for way, marks in WAYS.items()])
def way(request):
    """Runs the test once in each implementation."""
    with force(request.param):
        yield request.param


def every_way(argument: str, cases: list, dtypes: Sequence[torch.dtype], small: Callable):
    """way x case x dtype; Triton's interpreter takes float32, float16 and what is small."""
    grid = [
        pytest.param(
            way, case, dtype, marks=marks, id=f"{way}-{getattr(case, 'name', case)}-{dtype}"
        )
        for way, marks in WAYS.items()
        for case in cases
        for dtype in dtypes
        if way != "triton" or (dtype in (torch.float32, torch.float16) and small(case))
    ]
    return pytest.mark.parametrize(f"way, {argument}, dtype", grid, indirect=["way"])


def normal(*shape: int, dtype: torch.dtype = torch.float32, spread: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return (spread * torch.randn(shape, generator=generator)).to(dtype)


def run(function: Callable[..., Tensor], x: Tensor, dtype: torch.dtype, grad: Tensor, **options):
    leaf = x.detach().to(dtype).requires_grad_()
    y = function(leaf, **options)
    (dx,) = torch.autograd.grad(y, leaf, grad.to(y.dtype))
    return {"y": y, "dx": dx}


# ---- log_softmax -------------------------------------------------------------------------------


@dataclass
class Case:
    name: str
    shape: tuple[int, ...]
    dim: int = -1
    spread: float = 1.0


CASES = [
    Case("plain", (3, 5, 64)),
    Case("one column", (7, 1)),
    Case("one-dimensional, odd", (33,)),
    Case("five-dimensional", (2, 1, 3, 4, 9)),
    Case("a piece and one more", (4, 257)),
    Case("many threads", (64, 1025), spread=3.0),
    Case("65537 columns", (2, 65537)),
    Case("131072 columns, sharp", (1, 131072), spread=6.0),
    Case("first dim", (9, 4, 5), dim=0),
    Case("middle dim", (2, 31, 6), dim=-2),
    Case("logits of 1e4", (5, 600), spread=1e4),
]


@every_way("case", CASES, DTYPES, lambda case: math.prod(case.shape) <= 70_000)
def test_accuracy(case, dtype, way, assert_accurate):
    x = normal(*case.shape, dtype=dtype, spread=case.spread)
    grad = normal(*case.shape[::-1]).reshape(case.shape).to(dtype)
    ours = run(log_softmax, x, dtype, grad, dim=case.dim)
    plain = run(torch.log_softmax, x, dtype, grad, dim=case.dim)
    assert_accurate(ours, plain, run(torch.log_softmax, x, torch.float64, grad, dim=case.dim))
    assert ours["y"].dtype == ours["dx"].dtype == dtype


def test_the_largest_value_may_come_in_any_piece(way):
    """The running maximum rises in the first, a middle or the last piece, or with each value."""
    for at in (0, 255, 256, 700, 999):
        x = normal(1, 1000)
        x[0, at] = 50.0
        torch.testing.assert_close(log_softmax(x), torch.log_softmax(x, -1))
    rising = torch.arange(1000.0)[None] / 3
    torch.testing.assert_close(log_softmax(rising), torch.log_softmax(rising, -1))


@pytest.mark.parametrize("columns", [5, 600])
def test_special_values_as_in_eager(columns, way):
    x = normal(6, columns)
    x[0, 2], x[1, 3], x[2], x[3, :4], x[4, 1:] = NAN, INF, -INF, -INF, -INF
    y, expected = log_softmax(x), torch.log_softmax(x, -1)
    assert expected[:3].isnan().all() and y[4, 0] == 0
    torch.testing.assert_close(y, expected, equal_nan=True)


@pytest.mark.parametrize("way", ["native", "reference"], indirect=True)
def test_half_sums_pass_the_largest_half(way):
    x = torch.zeros(1, 131072, dtype=torch.float16)
    expected = torch.full_like(x, -17 * math.log(2))
    torch.testing.assert_close(log_softmax(x), expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("function", [log_softmax, lambda x: log_softmax_topk(x, 5)[0]])
def test_layouts_give_the_same_bits(function, way):
    """Under reference the same but for torch's own order of summation."""
    tolerance = 1e-6 if way == "reference" else 0.0
    x = normal(4, 6, 37)
    expected, grad = function(x), normal(4, 6, 37)[..., : function(x).shape[-1]]
    (dx,) = torch.autograd.grad(function(plain := x.clone().requires_grad_()), plain, grad)
    for view in (
        x.repeat_interleave(2, -1)[..., ::2],
        x.transpose(0, -1).contiguous().transpose(0, -1),
        torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
        torch.cat([x, x], -1)[..., :37],
    ):
        leaf = view.detach().requires_grad_()
        y = function(leaf)
        (dz,) = torch.autograd.grad(y, leaf, grad)
        torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(dz, dx, rtol=1e-6, atol=1e-6)  # top-k's backward is torch
    wide = x[:1].expand(4, 6, 37)
    repeated = expected[:1].expand_as(expected)
    torch.testing.assert_close(function(wide), repeated, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shape", [(0,), (0, 5), (3, 0), (2, 0, 5), (0, 0)])
def test_empty(shape, way):
    x = torch.randn(shape, requires_grad=True)
    y = log_softmax(x)
    y.sum().backward()
    assert y.shape == x.grad.shape == torch.Size(shape)


# ---- log_softmax_topk --------------------------------------------------------------------------


def expected_topk(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """By a stable sort, in float64."""
    ids = x.double().sort(descending=True, stable=True).indices[..., :k]
    return torch.log_softmax(x.double(), -1).gather(-1, ids), ids


TOPK = [  # shape, k: whole vectors and tails, one piece and many, k below and above the pieces
    ((3, 5), 5),
    ((7, 1), 1),
    ((33,), 4),
    ((2, 3, 100), 7),
    ((4, 256), 1),
    ((4, 257), 64),
    ((3, 5000), 8),
    ((2, 5000), 40),
    ((2, 3000), 1000),
    ((2, 65537), 16),
    ((1, 131072), 64),
]


def quick(top: tuple[tuple[int, ...], int]) -> bool:
    """The interpreter takes seconds for each of many candidates."""
    shape, k = top
    return math.prod(shape) <= 70_000 and k <= 100


@every_way("top", TOPK, [*DTYPES, torch.float64], quick)
def test_topk(top, dtype, way):
    shape, k = top
    x = normal(*shape, dtype=dtype, spread=3.0)
    scores, ids = log_softmax_topk(x, k)
    true, true_ids = expected_topk(x, k)
    assert torch.equal(ids, true_ids)
    assert scores.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(scores.double(), true, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("k", [1, 2, 16, 60])
def test_ties_go_to_the_lowest_id(k, way):
    """Values that repeat, all of one value, and a repeated maximum at the end of the row."""
    x = torch.randint(0, 4, (5, 700), generator=torch.Generator().manual_seed(0)).float()
    x[3], x[4] = 2.5, 0
    x[4, 690:] = 1
    scores, ids = log_softmax_topk(x, k)
    assert torch.equal(ids, expected_topk(x, k)[1])
    assert torch.equal(ids[3], torch.arange(k))
    assert torch.equal(scores, scores.sort(descending=True).values)


def test_rising_rows_pass_the_threshold_at_every_value(way):
    x = torch.arange(3000.0).repeat(2, 1) / 100
    assert torch.equal(log_softmax_topk(x, 9)[1][0], torch.arange(2999, 2990, -1))


@pytest.mark.parametrize("columns", [9, 600])
def test_rows_short_of_finite_values(columns, way):
    x = torch.full((4, columns), -INF)
    x[0, 5], x[1, [7, 3]], x[2, 0] = 1.0, torch.tensor([2.0, 2.0]), 0.0
    x[3, 1:] = normal(columns - 1)
    scores, ids = log_softmax_topk(x, 4)
    assert ids[:3].tolist() == [[5, 0, 1, 2], [3, 7, 0, 1], [0, 1, 2, 3]]
    assert scores[0].tolist() == [0, -INF, -INF, -INF]
    assert torch.equal(ids[3], expected_topk(x[3], 4)[1])


@pytest.mark.parametrize("columns", [6, 600])
def test_rows_that_are_nan_throughout(columns, way):
    """NaN, +inf or -inf alone: NaN scores at the first ids; the other rows do not notice."""
    x = normal(5, columns)
    x[0, 3], x[1, 4], x[2], x[3] = NAN, INF, -INF, NAN
    scores, ids = log_softmax_topk(x, 3)
    assert scores[:4].isnan().all() and torch.equal(ids[:4], torch.arange(3).repeat(4, 1))
    assert torch.equal(ids[4], expected_topk(x[4], 3)[1]) and scores[4].isfinite().all()


@every_way("columns", [300], DTYPES, bool)
def test_topk_gradient(columns, dtype, way, assert_accurate):
    x, grad = normal(5, columns, dtype=dtype), normal(5, 6)
    ours = run(lambda x: log_softmax_topk(x, 6)[0], x, dtype, grad)
    ids = expected_topk(x, 6)[1]

    def eager(x: Tensor) -> Tensor:
        return torch.log_softmax(x, -1).gather(-1, ids)

    assert_accurate(ours, run(eager, x, dtype, grad), run(eager, x, torch.float64, grad))
    assert not log_softmax_topk(x.requires_grad_(), 2)[1].requires_grad


def test_topk_of_nothing(way):
    scores, ids = log_softmax_topk(torch.empty(2, 0, 5), 3)
    assert scores.shape == ids.shape == (2, 0, 3)


# ---- choice and bad input ------------------------------------------------------------------------


def test_native_is_chosen_on_the_cpu():
    x = torch.randn(4, 50)
    assert explain(log_softmax, x).implementation == "native"
    assert explain(log_softmax_topk, x, 3).implementation == "native"
    assert "last" in explain(log_softmax, x, dim=0).others["native"]


@no_triton
def test_triton_says_what_it_does_not_take():
    with force("triton"):
        with pytest.raises(KernelUnavailable, match="float64"):
            log_softmax(torch.randn(2, 3, dtype=torch.float64))
        with pytest.raises(KernelUnavailable, match="k = 4000 of 100000 columns"):
            log_softmax_topk(torch.randn(1, 100_000), 4000)


X = torch.randn(2, 3, 4)


@pytest.mark.parametrize(
    "arguments, options, message",
    [
        (([1.0],), {}, "x is list"),
        ((X.int(),), {}, "x is torch.int32"),
        ((torch.tensor(1.0),), {}, r"x is of shape \[\]"),
        ((X.to_sparse(),), {}, "x is torch.sparse_coo"),
        ((X,), {"dim": 3}, "dim is 3"),
        ((X,), {"dim": -4}, "dim is -4"),
        ((X,), {"dim": True}, "dim is True"),
    ],
)
def test_bad_input(arguments, options, message):
    with pytest.raises(ArgumentError, match=f"log_softmax: {message}"):
        log_softmax(*arguments, **options)


@pytest.mark.parametrize("k", [0, 5, -1, 2.0, True, None, X])
def test_bad_k(k):
    with pytest.raises(ArgumentError, match="(?s)log_softmax_topk: k is .*from 1 to .* 4"):
        log_softmax_topk(X, k)
    with pytest.raises(ArgumentError, match="log_softmax_topk: k is 1;"):
        log_softmax_topk(torch.empty(3, 0), 1)
