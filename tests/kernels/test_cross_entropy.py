"""cross_entropy: native, Triton (interpreted) and reference against float64 torch."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tilewise_kernels import cross_entropy, explain, force, lazy_triton, native
from tilewise_kernels.errors import ArgumentError, KernelUnavailable

INF, NAN = math.inf, math.nan
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
no_triton = pytest.mark.skipif(lazy_triton.missing() is not None, reason="triton is not installed")


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


def classes(shape: tuple[int, ...], V: int) -> Tensor:
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(1))


def eager(logits: Tensor, target: Tensor, *, ignore_index=-100, label_smoothing=0.0, z_loss=0.0,
          reduction="mean") -> Tensor:  # fmt: skip
    """torch's loss, the z-loss beside it, and 0 where no target counts."""
    flat, labels = logits.reshape(-1, logits.shape[-1]), target.reshape(-1)
    smooth = {"ignore_index": ignore_index, "label_smoothing": label_smoothing}
    losses = F.cross_entropy(flat, labels, reduction="none", **smooth)
    kept = labels != ignore_index
    if z_loss:
        losses = losses + (z_loss * flat.logsumexp(-1).square()).masked_fill(~kept, 0)
    if reduction == "none":
        return losses.view(target.shape)
    total = losses.sum()
    return total / kept.sum().clamp(min=1) if reduction == "mean" else total


def run(function, logits: Tensor, dtype: torch.dtype, target: Tensor, **options):
    leaf = logits.detach().to(dtype).requires_grad_()
    loss = function(leaf, target, **options)
    weights = torch.linspace(0.5, 1.5, loss.numel(), dtype=loss.dtype).view(loss.shape)
    (dx,) = torch.autograd.grad(loss, leaf, weights)
    return {"loss": loss, "dlogits": dx}


# ---- accuracy ----------------------------------------------------------------------------------


@dataclass
class Case:
    """One call; `ignored` rows at even places carry the ignore_index."""

    name: str
    shape: tuple[int, ...]
    smoothing: float = 0.0
    z: float = 0.0
    ignored: bool = False
    reduction: str = "mean"
    spread: float = 1.0


CASES = [
    Case("plain", (6, 33)),
    Case("one class", (7, 1), smoothing=0.1),
    Case("one-dimensional logits", (17,), z=0.1),
    Case("five-dimensional", (2, 1, 3, 2, 9), reduction="none"),
    Case("smoothing", (5, 300), smoothing=0.1),
    Case("smoothing of everything", (5, 300), smoothing=1.0, reduction="sum"),
    Case("z-loss", (5, 300), z=0.01, spread=4.0),
    Case("everything, ignored rows", (3, 4, 700), 0.2, 1e-3, True),
    Case("ignored rows, sum", (8, 40), 0.2, 0.0, True, "sum"),
    Case("ignored rows, none", (8, 40), 0.0, 1e-2, True, "none"),
    Case("many threads", (64, 1025), 0.1, 1e-4),
    Case("65537 classes", (2, 65537), 0.1, 1e-4),
    Case("131072 classes, sharp", (1, 131072), spread=6.0),
    Case("logits of 1e4", (5, 600), 0.1, spread=1e4),
    Case("logits of 1e4, no smoothing", (5, 600), spread=1e4),
]


@every_way("case", CASES, DTYPES, lambda case: math.prod(case.shape) <= 150_000)
def test_accuracy(case, dtype, way, assert_accurate):
    logits = normal(*case.shape, dtype=dtype, spread=case.spread)
    target = classes(case.shape[:-1], case.shape[-1])
    if case.ignored:
        target.view(-1)[::2] = -100
    options = {"label_smoothing": case.smoothing, "z_loss": case.z, "reduction": case.reduction}
    before = logits.clone(), target.clone()
    ours = run(cross_entropy, logits, dtype, target, **options)
    plain = run(eager, logits, dtype, target, **options)
    assert_accurate(ours, plain, run(eager, logits, torch.float64, target, **options))
    assert ours["loss"].dtype == torch.float32 and ours["dlogits"].dtype == dtype
    assert torch.equal(logits, before[0]) and torch.equal(target, before[1])


def test_equals_torch_with_the_classes_last(way):
    logits, target = normal(4, 7, 50), classes((4, 7), 50)
    ours = cross_entropy(logits, target, label_smoothing=0.1)
    theirs = F.cross_entropy(logits.transpose(1, 2), target, label_smoothing=0.1)
    torch.testing.assert_close(ours, theirs)


def test_a_mean_far_from_zero_keeps_the_smoothed_part(way):
    """The mean of x - max, not mean(x) - max: the difference of two 1e6 would lose it."""
    logits, target = 1e6 + normal(3, 5000).round(), classes((3,), 5000)
    found = cross_entropy(logits, target, label_smoothing=0.5)
    expected = F.cross_entropy(logits.double(), target, label_smoothing=0.5)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)


def test_rising_logits_with_smoothing(way):
    logits, target = torch.arange(3000.0).repeat(2, 1) / 100, torch.tensor([0, 2999])
    found = cross_entropy(logits, target, label_smoothing=0.3, z_loss=0.1)
    expected = eager(logits.double(), target, label_smoothing=0.3, z_loss=0.1)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)


def test_half_sums_pass_the_largest_half(way):
    logits = torch.zeros(1, 131072, dtype=torch.float16)
    loss = cross_entropy(logits, torch.tensor([5]))
    torch.testing.assert_close(loss.item(), 17 * math.log(2), rtol=1e-6, atol=0)


# ---- ignored rows, special values ----------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("ignore_index", [-100, 3, 1000])
def test_ignored_rows_are_not_read(reduction, ignore_index, way):
    """NaN in them reaches neither the loss nor any gradient; their gradient is exactly 0."""
    target = torch.tensor([1, 2, ignore_index, 4, ignore_index])
    logits = normal(5, 9)
    logits[2], logits[4, 0] = NAN, INF
    options = {"ignore_index": ignore_index, "reduction": reduction, "label_smoothing": 0.1}
    found = run(cross_entropy, logits, torch.float32, target, **options)
    clean = logits.nan_to_num(0, 0, 0)
    expected = run(eager, clean, torch.float32, target, **options)
    torch.testing.assert_close(found["loss"], expected["loss"])
    torch.testing.assert_close(found["dlogits"], expected["dlogits"])
    assert (found["dlogits"][[2, 4]] == 0).all()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("rows", [0, 3])
def test_no_target_that_counts(rows, reduction, way):
    logits, target = normal(rows, 5), torch.full((rows,), -100)
    found = run(cross_entropy, logits, torch.float32, target, z_loss=1.0, reduction=reduction)
    assert (found["loss"] == 0).all() and (found["dlogits"] == 0).all()
    assert found["loss"].shape == ((rows,) if reduction == "none" else ())


def test_minus_infinity_at_other_classes(way):
    logits, target = normal(4, 600), classes((4,), 600)
    keep = F.one_hot(target, 600).bool() | (normal(4, 600).abs() < 0.5)
    logits = logits.masked_fill(~keep, -INF)
    found, expected = (run(f, logits, torch.float32, target) for f in (cross_entropy, eager))
    torch.testing.assert_close(found["loss"], expected["loss"])
    torch.testing.assert_close(found["dlogits"], expected["dlogits"])
    assert found["dlogits"].isfinite().all()


def test_special_rows_as_in_eager(way):
    """A target at -inf is infinite; NaN, +inf and -inf alone spoil their own row."""
    logits, target = normal(6, 40), classes((6,), 40)
    logits[0, target[0]], logits[1, 3], logits[2, 4], logits[3] = -INF, NAN, INF, -INF
    target[2] = 7
    found = cross_entropy(logits, target, reduction="none")
    expected = F.cross_entropy(logits, target, reduction="none")
    assert found[0] == INF and found[1].isnan() and found[3].isnan()
    torch.testing.assert_close(found, expected, equal_nan=True)


# ---- layouts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_layouts_give_the_same_result(reduction, way):
    logits, target = normal(4, 6, 37), classes((4, 6), 37)
    options = {"reduction": reduction, "label_smoothing": 0.1}
    expected = run(cross_entropy, logits, torch.float32, target, **options)
    labels = target.repeat_interleave(2, -1)[:, ::2]
    for view in (
        logits.repeat_interleave(2, -1)[..., ::2],
        logits.transpose(0, -1).contiguous().transpose(0, -1),
        torch.cat([logits.new_zeros(1), logits.flatten()])[1:].view(logits.shape),
        torch.cat([logits, logits], -1)[..., :37],
    ):
        found = run(cross_entropy, view, torch.float32, labels, **options)
        torch.testing.assert_close(found["loss"], expected["loss"], rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(found["dlogits"], expected["dlogits"], rtol=1e-6, atol=1e-7)


def test_upstream_gradients_of_stride_zero(way):
    logits, target = normal(4, 6, 37).requires_grad_(), classes((4, 6), 37)
    losses = cross_entropy(logits, target, reduction="none")
    for upstream in (torch.ones(()).expand(4, 6), normal(6)[None].expand(4, 6)):
        (a,) = torch.autograd.grad(losses, logits, upstream, retain_graph=True)
        (b,) = torch.autograd.grad(losses, logits, upstream.contiguous(), retain_graph=True)
        assert torch.equal(a, b)


# ---- choice and bad input ------------------------------------------------------------------------

X, T = normal(2, 3, 4), torch.zeros(2, 3, dtype=torch.int64)


def test_native_is_chosen_on_the_cpu():
    assert explain(cross_entropy, X, T).implementation == "native"


@no_triton
def test_triton_says_what_it_does_not_take():
    with force("triton"), pytest.raises(KernelUnavailable, match="float64"):
        cross_entropy(X.double(), T)


@pytest.mark.parametrize("value", [4, -1, -101, 2**40])
def test_a_target_out_of_range(value, way):
    target = T.clone()
    target[1, 2] = value
    if way != "triton":
        with pytest.raises(ValueError, match=f"cross_entropy: target .*{value}.*0 to 3"):
            cross_entropy(X, target)
        return
    found = run(cross_entropy, X, torch.float32, target, reduction="none")  # as on a GPU
    assert found["loss"][1, 2].isnan() and found["loss"].isnan().sum() == 1
    assert found["dlogits"][1, 2].isnan().all() and found["dlogits"].isnan().sum() == 4


@pytest.mark.parametrize(
    "arguments, options, message",
    [
        (([1.0], T), {}, "logits is list"),
        ((X.int(), T), {}, "logits is torch.int32"),
        ((torch.tensor(1.0), torch.tensor(0)), {}, r"logits is of shape \[\]"),
        ((X[..., :0], T), {}, r"logits is of shape \[2, 3, 0\]"),
        ((X, [0]), {}, "target is list"),
        ((X, T.int()), {}, r"target is torch.int32; .*long\(\)"),
        ((X, X), {}, "target is torch.float32"),
        ((X, T[0]), {}, r"target is of shape \[3\]; it must be \[2, 3\]"),
        ((X, T.to("meta")), {}, "target is on meta"),
        ((X, T), {"ignore_index": 1.5}, "ignore_index is 1.5"),
        ((X, T), {"ignore_index": 2**63}, "ignore_index is past int64"),
        ((X, T.to_sparse()), {}, "target is sparse"),
        ((X, T), {"label_smoothing": 1.5}, "label_smoothing is 1.5"),
        ((X, T), {"label_smoothing": NAN}, "label_smoothing is NaN"),
        ((X, T), {"z_loss": -1.0}, "z_loss is -1.0"),
        ((X, T), {"z_loss": INF}, "z_loss is inf"),
        ((X, T), {"reduction": "max"}, "reduction is 'max'"),
        ((X, T), {"reduction": None}, "reduction is None"),
    ],
)
def test_bad_input(arguments, options, message):
    with pytest.raises(ArgumentError, match=f"cross_entropy: {message}"):
        cross_entropy(*arguments, **options)


@pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))
def test_the_native_op_takes_no_logits_without_classes():
    with pytest.raises(ValueError, match="no classes"):
        native.op("cross_entropy_forward")(torch.ones(3, 0), T[0], -100, 0.0, 0.0, "mean")
