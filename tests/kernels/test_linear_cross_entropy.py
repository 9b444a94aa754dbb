"""linear_cross_entropy: every way against float64 torch, in one chunk and in many; peak memory."""

import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tilewise_kernels import cross_entropy, explain, force, lazy_triton, linear_cross_entropy
from tilewise_kernels.errors import ArgumentError

module = sys.modules["tilewise_kernels.linear_cross_entropy"]
NAN = math.nan
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
no_triton = pytest.mark.skipif(lazy_triton.missing() is not None, reason="triton is not installed")


WAYS = {"native": (), "reference": (), "triton": (no_triton,)}
WAYS_AND_DTYPES = [
    pytest.param(way, dtype, marks=marks, id=f"{way}-{dtype}")
    for way, marks in WAYS.items()
    for dtype in DTYPES
    if (way, dtype) != ("triton", torch.bfloat16)  # which its interpreter multiplies wrongly
]


@pytest.fixture(params=[pytest.param(way, marks=marks) for way, marks in WAYS.items()])
def way(request):
    """Runs the test once in each implementation."""
    with force(request.param):
        yield request.param


@pytest.fixture(params=[64, 5], ids=lambda rows: f"chunks of {rows}")
def chunks(request, monkeypatch):
    """One chunk for all rows, or about four."""
    monkeypatch.setattr(module, "FEWEST_ROWS", request.param)


def normal(*shape: int, spread: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return spread * torch.randn(shape, generator=generator)


def classes(shape: tuple[int, ...], V: int) -> Tensor:
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(1))


def eager(x: Tensor, weight: Tensor, target: Tensor, *, bias=None, z_loss=0.0, reduction="mean",
          **options) -> Tensor:  # fmt: skip
    logits = F.linear(x, weight, bias).flatten(0, -2)
    labels = target.flatten()
    losses = F.cross_entropy(logits, labels, reduction="none", **options)
    if z_loss:
        squares = logits.logsumexp(-1).square()
        losses = losses + (z_loss * squares).masked_fill(labels == -100, 0)
    if reduction == "none":
        return losses.view(target.shape)
    total = losses.sum()
    return total / (labels != -100).sum().clamp(min=1) if reduction == "mean" else total


def run(function, tensors: dict[str, Tensor], dtype: torch.dtype, target: Tensor, **options):
    leaves = {n: t.detach().to(dtype).requires_grad_() for n, t in tensors.items()}
    loss = function(target=target, **leaves, **options)
    weights = torch.linspace(0.5, 1.5, loss.numel(), dtype=loss.dtype).view(loss.shape)
    grads = torch.autograd.grad(loss, list(leaves.values()), weights)
    return {"loss": loss} | {f"d{n}": g for n, g in zip(leaves, grads, strict=True)}


# ---- accuracy ----------------------------------------------------------------------------------


@dataclass
class Case:
    name: str
    rows: tuple[int, ...]
    K: int
    V: int
    bias: bool = False
    smoothing: float = 0.0
    z: float = 0.0
    ignored: bool = False
    reduction: str = "mean"


CASES = [
    Case("plain", (17,), 24, 90),
    Case("bias, smoothing, z-loss", (17,), 24, 90, True, 0.1, 1e-3),
    Case("ignored rows", (3, 6), 24, 90, True, 0.1, 1e-3, True),
    Case("ignored rows, sum", (3, 6), 24, 90, False, 0.0, 0.0, True, "sum"),
    Case("ignored rows, none", (3, 6), 24, 90, True, 0.1, 1e-3, True, "none"),
    Case("one class", (4,), 8, 1, True, 0.1),
    Case("one row", (1,), 40, 300, reduction="none"),
]


@pytest.mark.parametrize("way, dtype", WAYS_AND_DTYPES, indirect=["way"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_accuracy(case, dtype, way, chunks, assert_accurate):
    tensors = {"x": normal(*case.rows, case.K), "weight": normal(case.V, case.K, spread=0.3)}
    if case.bias:
        tensors["bias"] = normal(case.V)
    tensors = {n: t.to(dtype).float() for n, t in tensors.items()}
    target = classes(case.rows, case.V)
    if case.ignored:
        target.view(-1)[::3] = -100
    options = {"label_smoothing": case.smoothing, "z_loss": case.z, "reduction": case.reduction}
    ours = run(linear_cross_entropy, tensors, dtype, target, **options)
    plain = run(eager, tensors, dtype, target, **options)
    assert_accurate(ours, plain, run(eager, tensors, torch.float64, target, **options))
    assert ours["loss"].dtype == torch.float32
    assert all(ours[name].dtype == dtype for name in ours if name != "loss")


@pytest.mark.parametrize("V", [65537, 131072])
def test_large_vocabularies(V, assert_accurate):
    tensors = {"x": normal(9, 16), "weight": normal(V, 16, spread=0.3)}
    target = classes((9,), V)
    exact = run(eager, tensors, torch.float64, target)
    for dtype in (torch.float32, torch.bfloat16):
        ours = run(linear_cross_entropy, tensors, dtype, target)
        assert_accurate(ours, run(eager, tensors, dtype, target), exact)


@pytest.mark.parametrize("rows", [1024, 4096])
def test_many_bfloat16_rows_with_one_class_in_common(rows, assert_accurate):
    """One row of dweight sums all rows: 4 roundings, or float32 sums when there are more chunks."""
    tensors = {"x": 1 + normal(rows, 8), "weight": normal(50, 8, spread=0.1)}
    tensors = {n: t.bfloat16().float() for n, t in tensors.items()}
    target = torch.full((rows,), 7)
    exact = run(eager, tensors, torch.float64, target)
    plain = run(eager, tensors, torch.bfloat16, target)
    assert_accurate(run(linear_cross_entropy, tensors, torch.bfloat16, target), plain, exact)
    before = module.CHUNK_BYTES
    module.CHUNK_BYTES = 64 * 50 * 2
    try:
        assert_accurate(run(linear_cross_entropy, tensors, torch.bfloat16, target), plain, exact)
    finally:
        module.CHUNK_BYTES = before


def test_float16_gradients_under_loss_scaling(way, chunks):
    """1 / rows on top of small probabilities is below float16's range; times 2^14 it is not."""
    tensors = {"x": normal(40, 16), "weight": normal(3000, 16, spread=0.02)}
    tensors = {n: t.half().float() for n, t in tensors.items()}
    target = classes((40,), 3000)
    exact = run(lambda **t: eager(**t) * 2**14, tensors, torch.float64, target)
    ours = run(lambda **t: linear_cross_entropy(**t) * 2**14, tensors, torch.float16, target)
    for name in ("dx", "dweight"):
        torch.testing.assert_close(ours[name].double(), exact[name], rtol=0.02, atol=0.01)


# ---- the op beside cross_entropy -----------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_rows_that_do_not_count_are_not_read(reduction, way, chunks):
    x, weight, target = normal(6, 8), normal(11, 8), classes((6,), 11)
    target[[1, 4]] = -100
    clean = run(linear_cross_entropy, {"x": x, "weight": weight}, torch.float32, target,
                reduction=reduction)  # fmt: skip
    x[1], x[4, 0] = NAN, math.inf
    found = run(linear_cross_entropy, {"x": x, "weight": weight}, torch.float32, target,
                reduction=reduction)  # fmt: skip
    assert all(torch.equal(found[name], clean[name]) for name in clean)
    assert (found["dx"][[1, 4]] == 0).all() and found["dweight"].isfinite().all()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("rows", [0, 3])
def test_no_target_that_counts(rows, reduction, way):
    tensors = {"x": normal(rows, 4), "weight": normal(5, 4), "bias": normal(5)}
    found = run(linear_cross_entropy, tensors, torch.float32, torch.full((rows,), -100),
                reduction=reduction)  # fmt: skip
    assert all((value == 0).all() for value in found.values())


def test_the_loss_without_gradients_is_the_same(way, chunks):
    x, weight, target = normal(20, 8), normal(30, 8), classes((20,), 30)
    expected = linear_cross_entropy(x, weight.clone().requires_grad_(), target, z_loss=0.1)
    with torch.no_grad():
        found = linear_cross_entropy(x, weight, target, z_loss=0.1)
    assert torch.equal(found, expected) and not found.requires_grad
    whole = cross_entropy(F.linear(x, weight), target, z_loss=0.1)
    torch.testing.assert_close(found, whole)


def test_the_upstream_gradient_is_applied_each_time(way):
    """The saved gradients serve several backward passes, and come out multiplied."""
    tensors = {"x": normal(9, 8), "weight": normal(30, 8), "bias": normal(30)}
    leaves = {n: t.requires_grad_() for n, t in tensors.items()}
    loss = linear_cross_entropy(**leaves, target=classes((9,), 30))
    inputs = list(leaves.values())
    once = torch.autograd.grad(loss, inputs, retain_graph=True)
    kept = [g.clone() for g in once]
    half = torch.autograd.grad(loss, inputs, torch.tensor(0.5), retain_graph=True)
    again = torch.autograd.grad(loss, inputs, retain_graph=True)
    for a, b, c, d in zip(once, half, again, kept, strict=True):
        assert torch.equal(a, d) and torch.equal(a / 2, b) and torch.equal(a, c)
    loss.backward(retain_graph=True)
    loss.backward()
    for leaf, g in zip(inputs, kept, strict=True):
        assert torch.equal(leaf.grad, 2 * g)


def test_gradients_of_a_kept_graph_may_be_changed_in_place():
    leaves = [normal(6, 4).requires_grad_(), normal(5, 4).requires_grad_()]
    loss = linear_cross_entropy(*leaves, torch.arange(6) % 5, reduction="sum")
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    expected = [gradient.clone() for gradient in first]
    for gradient in first:
        gradient.zero_()
    for keeps in (True, False):
        found = torch.autograd.grad(loss, leaves, retain_graph=keeps)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_upstream_gradients_of_stride_zero(way, chunks):
    x, weight = normal(4, 5, 8).requires_grad_(), normal(30, 8).requires_grad_()
    losses = linear_cross_entropy(x, weight, classes((4, 5), 30), reduction="none")
    for upstream in (torch.ones(()).expand(4, 5), normal(5)[None].expand(4, 5)):
        found = torch.autograd.grad(losses, (x, weight), upstream, retain_graph=True)
        plain = torch.autograd.grad(losses, (x, weight), upstream.contiguous(), retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))


def test_layouts(way, chunks):
    tensors = {"x": normal(12, 8), "weight": normal(30, 8), "bias": normal(30)}
    target = classes((12,), 30)
    expected = run(linear_cross_entropy, tensors, torch.float32, target)
    views = {n: t.repeat_interleave(2, -1)[..., ::2] for n, t in tensors.items()}
    views["weight"] = tensors["weight"].t().contiguous().t()
    found = run(linear_cross_entropy, views, torch.float32, target.repeat_interleave(2)[::2])
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)


# ---- memory ------------------------------------------------------------------------------------


@pytest.mark.parametrize("M, itemsize, chunks, rows",
                         [(1, 4, 4, 64), (200, 4, 4, 64), (2048, 4, 4, 512), (2048, 4, 2, 1024),
                          (16384, 2, 4, 4096), (65536, 2, 2, 4194)])  # fmt: skip
def test_chunk_rule(M, itemsize, chunks, rows):
    assert module.chunk_rows(M, 32000, itemsize, chunks) == rows


MEASURE = """
import json, re, torch
import torch.nn.functional as F
from tilewise_kernels import linear_cross_entropy

def eager(x, weight, target):
    return F.cross_entropy(F.linear(x, weight), target)

def peak():
    with open("/proc/self/status") as status:
        return int(re.search(r"VmHWM:\\s+(\\d+)", status.read())[1]) / 1024

def growth(function, V, dtype):
    x = torch.randn(512, 64).to(dtype).requires_grad_()
    weight = torch.randn(V, 64).to(dtype).requires_grad_()
    target = torch.randint(V, (512,))
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak starts again from what is in use now
    before = peak()
    function(x, weight, target).backward()
    gradients = sum(t.grad.numel() * t.element_size() for t in (x, weight)) / 2**20
    return peak() - before - gradients

for dtype in (torch.float32, torch.bfloat16):
    for function in (linear_cross_entropy, eager):
        growth(function, 512, dtype)
    print(json.dumps([growth(f, 32000, dtype) for f in (linear_cross_entropy, eager)]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc/self")
def test_peak_memory_is_at_most_a_quarter_of_torchs():
    """Forward and backward, above the inputs and the final gradients: 512 rows, 32000 classes."""
    result = subprocess.run(
        [sys.executable, "-c", MEASURE], capture_output=True, text=True,
        check=True,
        # the last: freed tensors go back to the system, or the next one would not show in the peak
        env=os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"},
    )  # fmt: skip
    for line in result.stdout.splitlines():
        ours, theirs = json.loads(line)
        print(f"{ours:.0f} MiB, torch {theirs:.0f} MiB")
        assert theirs > 80 and ours <= theirs / 4, f"{ours} MiB, torch {theirs} MiB"


# ---- choice and bad input ------------------------------------------------------------------------

X, W, T, B = normal(2, 3, 4), normal(5, 4), torch.zeros(2, 3, dtype=torch.int64), normal(5)


def test_native_is_chosen_on_the_cpu():
    assert explain(linear_cross_entropy, X, W, T).implementation == "native"


@pytest.mark.parametrize("value", [5, -1, -101, 2**40])
def test_a_target_out_of_range(value, way):
    target = T.clone()
    target[1, 2] = value
    with pytest.raises(ArgumentError, match=f"linear_cross_entropy: target is {value}.*0 to 4"):
        linear_cross_entropy(X, W, target)


@pytest.mark.parametrize(
    "arguments, options, message",
    [
        (([1.0], W, T), {}, "x is list"),
        ((X.int(), W, T), {}, "x is torch.int32"),
        ((X, [1.0], T), {}, "weight is list"),
        ((X, W[0], T), {}, r"weight is of shape \[4\]; it must be \[V, K\]"),
        ((X, W[:0], T), {}, r"weight is of shape \[0, 4\]"),
        ((X, W[:, :3], T), {}, r"weight is of shape \[5, 3\]; it must be \[5, 4\]"),
        ((X, W.double(), T), {}, "weight is torch.float64; x is torch.float32"),
        ((X, W, T), {"bias": B[:4]}, r"bias is of shape \[4\]"),
        ((X, W, T), {"bias": B.half()}, "bias is torch.float16"),
        ((X, W, T), {"bias": 1.0}, "bias is float"),
        ((X, W, T.int()), {}, "target is torch.int32"),
        ((X, W, T[0]), {}, r"target is of shape \[3\]; it must be \[2, 3\]"),
        ((X, W, T), {"ignore_index": None}, "ignore_index is None"),
        ((X, W, T), {"label_smoothing": -0.1}, "label_smoothing is -0.1"),
        ((X, W, T), {"z_loss": NAN}, "z_loss is NaN"),
        ((X, W, T), {"reduction": "max"}, "reduction is 'max'"),
    ],
)
def test_bad_input(arguments, options, message):
    with pytest.raises(ArgumentError, match=f"linear_cross_entropy: {message}"):
        linear_cross_entropy(*arguments, **options)
