"""What layer_norm and rms_norm have in common: dropout, rows of any length, native on the CPU."""

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tilewise_kernels import force, layer_norm, record, rms_norm
from tilewise_kernels.dropout import kept

F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
NORMS = {"layer_norm": layer_norm, "rms_norm": rms_norm}
WAYS = ("native", "triton", "reference")


@pytest.fixture(params=NORMS)
def norm(request):
    return NORMS[request.param]


@pytest.fixture(params=WAYS)
def way(request):
    """Runs the test once in each implementation."""
    with force(request.param):
        yield request.param


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = F32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def gradients(norm, x: Tensor, residual: Tensor | None, **options) -> list[Tensor]:
    """y, s and the gradients of x, the residual and the weight."""
    weight = (1 + randn(x.shape[-1], seed=7)).to(x.dtype)
    leaves = [t.detach().requires_grad_() for t in (x, weight, residual) if t is not None]
    given = leaves[2] if residual is not None else None
    y, s = norm(leaves[0], leaves[1], residual=given, prenorm=True, **options)
    upstream = randn(*y.shape, seed=8).to(y.dtype), randn(*s.shape, seed=9).to(s.dtype)
    if not s.requires_grad or s is leaves[0]:
        return [y, *torch.autograd.grad(y, leaves, upstream[0])]
    return [y, s, *torch.autograd.grad((y, s), leaves, upstream)]


def assert_close(ours: list[Tensor], theirs: list[Tensor], tolerance: float = 1e-5) -> None:
    for a, b in zip(ours, theirs, strict=True):
        scale = b.abs().max().item()
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * scale)


# ---- dropout -----------------------------------------------------------------------------------


def test_dropout_falls_on_x_before_the_residual(norm, way):
    x, residual = torch.ones(40, 50, requires_grad=True), 10 * torch.ones(40, 50)
    torch.manual_seed(3)
    y, s = norm(x, residual=residual, dropout_p=0.25, prenorm=True)
    dropped = s == 10
    assert 0.2 < dropped.float().mean() < 0.3
    assert torch.allclose(s[~dropped], torch.tensor(10 + 4 / 3))
    assert torch.allclose(y, norm(s), atol=1e-6)
    torch.manual_seed(3)
    assert torch.equal(norm(x, residual=residual, dropout_p=0.25), y)
    assert not torch.equal(norm(x, residual=residual, dropout_p=0.25), y)
    s.sum().backward()
    assert torch.equal(x.grad == 0, dropped)


@pytest.mark.parametrize("dtype", (F32, F16), ids=str)
@pytest.mark.parametrize("with_residual", [True, False])
def test_every_way_drops_the_same_elements(norm, dtype, with_residual):
    """Outputs and gradients against plain torch with the mask of the same seed; 37 columns leave
    a rest in every vector."""
    x = randn(3, 4, 37, seed=1, dtype=dtype)
    residual = randn(3, 4, 37, seed=2, dtype=F32) if with_residual else None
    found = {}
    for way in WAYS:
        with force(way):
            torch.manual_seed(5)
            found[way] = gradients(norm, x, residual, dropout_p=0.3)
    for way in ("native", "triton"):
        assert_close(found[way], found["reference"], 1e-5 if dtype == F32 else 2e-3)
        for name, mine, other in zip(
            "y s dx".split(), found[way], found["reference"], strict=False
        ):
            assert torch.equal(mine == 0, other == 0) or name == "y"
    torch.manual_seed(5)
    seed = torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64)
    mask = kept(seed, torch.arange(12)[:, None], torch.arange(37), 0.3).view(3, 4, 37)
    s = found["reference"][1]
    wanted = torch.where(mask, x.float() / 0.7, 0) + (0 if residual is None else residual)
    torch.testing.assert_close(s.float(), wanted, rtol=1e-3, atol=1e-3)


def test_gradients_under_dropout_are_those_of_the_same_mask(norm, way):
    """Central differences in float64 cannot reach Triton; a second call with the seed can."""
    x, direction = randn(4, 24), randn(4, 24, seed=1)

    def loss(x: Tensor) -> Tensor:
        torch.manual_seed(11)
        y, s = norm(x, residual=randn(4, 24, seed=2), dropout_p=0.4, prenorm=True)
        return (y.double() * randn(4, 24, seed=3)).sum() + s.double().sum()

    leaf = x.clone().requires_grad_()
    loss(leaf).backward()
    step = 1e-2
    slope = (loss(x + step * direction) - loss(x - step * direction)) / (2 * step)
    torch.testing.assert_close((leaf.grad * direction).sum().double(), slope, rtol=2e-3, atol=2e-3)


def test_the_ends_of_dropout(norm, way):
    x = randn(6, 40).requires_grad_()
    assert torch.equal(norm(x, dropout_p=0.0), norm(x))
    residual = randn(6, 40, seed=1)
    y, s = norm(x, residual=residual, dropout_p=1.0, prenorm=True)
    assert torch.equal(s, residual)
    (y.sum() + s.sum()).backward()
    assert not x.grad.any()
    gone, zeros = norm(x.detach() * torch.inf, dropout_p=1.0, prenorm=True)
    assert not gone.any() and not zeros.any()


def test_dropout_survives_checkpointing(norm, way):
    x, residual = randn(5, 33).requires_grad_(), randn(5, 33, seed=1).requires_grad_()

    def block(x: Tensor, residual: Tensor) -> Tensor:
        return norm(x, residual=residual, dropout_p=0.5).sin()

    results = []
    for again in (False, True):
        torch.manual_seed(2)
        y = checkpoint(block, x, residual, use_reentrant=False) if again else block(x, residual)
        results.append([y, *torch.autograd.grad(y.sum(), (x, residual))])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_dropout_compiles(norm):
    compiled = torch.compile(norm, fullgraph=True, dynamic=True, backend="aot_eager")
    x, residual = randn(5, 33).requires_grad_(), randn(5, 33, seed=1)
    y, s = compiled(x, residual=residual, dropout_p=0.5, prenorm=True)
    (dx,) = torch.autograd.grad(s.sum(), x)
    assert torch.equal(dx == 0, s == residual)
    torch.testing.assert_close(y, norm(s))


def test_dropout_opcheck(norm, way):
    op = getattr(torch.ops.tilewise, norm.__name__).default
    seed, weight = torch.tensor([77]), randn(9).requires_grad_()
    for x, residual in ((randn(4, 9), randn(4, 9)), (randn(4, 9, dtype=F16), randn(4, 9))):
        x.requires_grad_()
        for given in (residual, None):
            w = weight.to(x.dtype).detach().requires_grad_()
            torch.library.opcheck(op, (x, given, w, None, seed, 1e-5, 0.3, True, True))


# ---- extremes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("rows, columns", [(1, 65537), (1, 131072), (2, 16385)])
def test_rows_that_no_program_holds(norm, rows, columns, assert_accurate):
    """Triton in blocks of columns, beside torch in float64."""
    x, residual = 5 + randn(rows, columns, seed=1), randn(rows, columns, seed=2)
    with force("triton"):
        ours = gradients(norm, x, residual)
    with force("reference"):
        eager = gradients(norm, x, residual)
        exact = gradients(norm, x.double(), residual.double())
    names = ("y", "s", "dx", "dweight", "dresidual")
    assert_accurate(*(dict(zip(names, each, strict=True)) for each in (ours, eager, exact)))


def test_a_long_row_with_a_large_mean_and_an_outlier(norm):
    x = 1e4 + 0.1 * randn(1, 20000)
    x[0, 0] = -3e4
    exact = norm(x.double())
    for way in ("native", "triton"):
        with force(way):
            assert (norm(x) - exact).abs().max() < 2e-5 * exact.abs().max()


def test_dropout_over_long_rows(norm):
    x, residual = randn(2, 16400), randn(2, 16400, seed=1)
    found = []
    for way in ("triton", "native"):
        with force(way):
            torch.manual_seed(1)
            found.append(gradients(norm, x, residual, dropout_p=0.2))
    assert_close(*found)


def test_nan_and_inf_spoil_their_row_alone(norm, way):
    for value in (torch.nan, torch.inf):
        x = randn(3, 40)
        x[1, 7] = value
        y = norm(x)
        assert y[1].isnan().any() and torch.equal(y[::2], norm(x[::2]))


# ---- what is not wanted ------------------------------------------------------------------------


def test_nothing_is_made_that_nobody_needs(norm, way):
    op = getattr(torch.ops.tilewise, norm.__name__)
    x, r = randn(4, 16), randn(4, 16, seed=1)
    sizes = {(False, False): 0, (True, False): 64, (True, True): 64}
    for (wants_sum, wants_statistics), size in sizes.items():
        y, s, mean, rstd = op(x, r, None, None, None, 1e-5, 0.0, wants_sum, wants_statistics)
        assert s.numel() == size and rstd.numel() == 4 * wants_statistics
        assert mean.numel() == 4 * (wants_statistics and norm is layer_norm)
        assert torch.equal(y, norm(x, residual=r, eps=1e-5))
    seen = []
    with force(way), record() as calls:
        norm(x, residual=r)
        norm(x.clone().requires_grad_(), residual=r)
        seen += calls
    assert [call.implementation for call in seen] == [way, way]


def test_a_gradient_needs_the_statistics(norm):
    x = randn(4, 16).requires_grad_()
    op = getattr(torch.ops.tilewise, norm.__name__)
    with pytest.raises(RuntimeError, match="wants_statistics"):
        op(x, None, None, None, None, 1e-5, 0.0, False, False)


# ---- native ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", (F32, BF16, F64), ids=str)
@pytest.mark.parametrize("shape", [(700, 1600), (700, 1601), (2, 350, 1600)], ids=str)
def test_native_on_large_outputs(norm, dtype, shape):
    """Above 4 MB whole vectors are written past the caches; 1601 columns and views are not."""
    x, residual = randn(*shape, seed=1).to(dtype), randn(*shape, seed=2).to(dtype)
    found = []
    for way in ("native", "reference"):
        with force(way):
            found.append(gradients(norm, x, residual))
    assert_close(*found, {F32: 1e-5, BF16: 1e-2, F64: 1e-12}[dtype])


def test_native_bits_do_not_depend_on_the_threads(norm):
    x, residual = randn(500, 257, seed=1), randn(500, 257, seed=2)
    threads, found = torch.get_num_threads(), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        with force("native"):
            found.append(gradients(norm, x, residual, eps=1e-6))
    torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


SCRIPT = """
import torch
from tilewise_kernels import force, layer_norm, rms_norm
from tilewise_kernels.native import build_info
print(build_info()["cpu_capability"])
def normal(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
for norm in (layer_norm, rms_norm):
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        for shape in ((9, 83), (2800 // dtype.itemsize, 1600)):  # the second is streamed
            found = []
            for way in ("native", "reference"):
                x, r = (normal(*shape, seed=i).to(dtype).requires_grad_() for i in (1, 2))
                torch.manual_seed(1)
                with force(way):
                    y, s = norm(x, residual=r, dropout_p=0.2, prenorm=True)
                upstream = normal(*shape, seed=3).to(dtype)
                found.append([y, s, *torch.autograd.grad(y, (x, r), upstream)])
            for a, b in zip(*found, strict=True):
                worst = (a.double() - b.double()).abs().max() / b.abs().max()
                assert worst < 20 * torch.finfo(dtype).eps, (norm, dtype, shape, worst)
"""


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_native_of_older_processors(capability):
    environment = os.environ | {"ATEN_CPU_CAPABILITY": capability}
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] == capability.upper()
