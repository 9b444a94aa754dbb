"""linear with a packed weight: its three ways against float64, the int8 formula, every edge.

Shapes: x [..., K], weight [N, K], bias [N], y [..., N].
"""

import copy
import importlib
import math
import os
import pickle
import subprocess
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tilewise_kernels import PackedLinear, explain, force, linear, native, pack_linear
from tilewise_kernels.errors import ArgumentError, KernelUnavailable

FLOAT, BF16, HALF, INT8 = torch.float32, torch.bfloat16, torch.float16, torch.int8
PACKED = (FLOAT, BF16, INT8)
SIZES = [(1, 1), (7, 33), (33, 7), (127, 96), (768, 769), (769, 49)]  # K, N
ROWS = {"panels": [0, 1, 2, 5, 8, 9, 31, 32, 33, 65, 100], "plain": [0, 1, 17, 33]}
NO_PANELS = "some dtype is not packed in panels on this CPU"


def packs_panels() -> bool:
    return native.missing() is None and all(native.op("linear_runs")(d) for d in PACKED)


has_panels = pytest.mark.skipif(not packs_panels(), reason=NO_PANELS)
module = importlib.import_module("tilewise_kernels.linear")


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = FLOAT) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype)


@pytest.fixture(params=["panels", "plain"])
def layout(request, monkeypatch):
    """Packs weights in panels, for the native way, and plain, for torch's."""
    if request.param == "plain":
        monkeypatch.setattr(module, "_no_panels", lambda device, dtype: "the test says so")
    elif not packs_panels():
        pytest.skip(NO_PANELS)
    return request.param


# ---- accuracy ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("k", "n"), SIZES)
@pytest.mark.parametrize("dtype", [FLOAT, BF16, HALF], ids=str)
def test_as_accurate_as_eager(dtype, k, n, layout, assert_accurate):
    """Weight, bias and x of one dtype, packed in it (float16 in float32)."""
    weight, bias = normal(n, k, seed=1, dtype=dtype), normal(n, seed=2, dtype=dtype)
    packed = pack_linear(weight, bias)
    assert packed.dtype == (FLOAT if dtype == HALF else dtype)
    for rows in ROWS[layout]:
        x = normal(rows, k, dtype=dtype)
        y = linear(x, packed)
        assert y.dtype == dtype and y.shape == (rows, n) and y.is_contiguous()
        exact = {"y": F.linear(x.double(), weight.double(), bias.double())}
        assert_accurate({"y": y}, {"y": F.linear(x, weight, bias)}, exact)


@pytest.mark.parametrize("packed_dtype", [FLOAT, BF16], ids=str)
@pytest.mark.parametrize("dtype", [FLOAT, BF16, HALF], ids=str)
def test_x_of_another_dtype(dtype, packed_dtype, layout, assert_accurate):
    """x is rounded to the packed dtype; y comes back in x's."""
    x, weight, bias = normal(5, 67, dtype=dtype), normal(50, 67, seed=1), normal(50, seed=2)
    y = linear(x, pack_linear(weight, bias, packed_dtype))
    rounded = [t.to(packed_dtype) for t in (x, weight, bias)]
    exact = {"y": F.linear(*(t.double() for t in rounded))}
    assert y.dtype == dtype
    assert_accurate({"y": y}, {"y": F.linear(*rounded).to(dtype)}, exact)


def formula(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The int8 product as documented, in float64 integers, and the scales of x and weight."""

    def quantise(rows: Tensor) -> tuple[Tensor, Tensor]:
        largest = rows.float().abs().amax(1)
        factor = torch.full_like(largest, 127) / largest
        return (rows.float() * factor[:, None]).round(), largest / 127

    qx, sx = quantise(x)
    qw, sw = quantise(weight)
    y = (qx.double() @ qw.double().T) * sx.double()[:, None] * sw.double()
    return (y if bias is None else y + bias.double()), sx.double()[:, None], sw.double()


@pytest.mark.parametrize(("k", "n"), SIZES)
@pytest.mark.parametrize("dtype", [FLOAT, BF16, HALF], ids=str)
def test_int8_is_its_formula_and_within_its_bound(dtype, k, n, layout):
    weight, bias = normal(n, k, seed=1), normal(n, seed=2)
    packed = pack_linear(weight, bias, INT8)
    for rows in ROWS[layout][1:]:
        x = normal(rows, k, dtype=dtype)
        y = linear(x, packed)
        assert y.dtype == dtype
        expected, sx, sw = formula(x, weight, bias)
        rtol = 1e-6 if dtype == FLOAT else torch.finfo(dtype).eps
        torch.testing.assert_close(y.double(), expected, rtol=rtol, atol=1e-6 * math.sqrt(k))
        exact = F.linear(x.double(), weight.double(), bias.double())
        x_sum, w_sum = x.double().abs().sum(1, keepdim=True), weight.double().abs().sum(1)
        bound = (sx * w_sum + sw * x_sum + k * sx * sw / 2) / 2
        assert ((expected - exact).abs() <= bound * (1 + 1e-5) + 1e-6).all()


def test_int8_sums_stay_exact_at_the_extremes(layout):
    """Every product 127 * 127, of either sign, at a K whose sums need 31 bits."""
    k = 100_000
    x = torch.ones(3, k)
    x[1] = -1
    x[2, ::2] = -1
    weight = torch.ones(2, k)
    weight[1] = -1
    expected = torch.tensor([[1.0, -1], [-1, 1], [0, 0]]) * k
    torch.testing.assert_close(linear(x, pack_linear(weight, dtype=INT8)), expected)


def test_huge_and_tiny_values(layout):
    weight = normal(50, 40, seed=1)
    x = normal(4, 40)
    scales = torch.tensor([2.0**100, 2.0**-93, 1e-45, 1.0])[:, None]
    for dtype in PACKED:
        y = linear(x * scales, pack_linear(weight, dtype=dtype))
        plain = linear(x, pack_linear(weight, dtype=dtype))
        assert y.isfinite().all()
        torch.testing.assert_close(y[:2] / scales[:2], plain[:2])
        assert (y[2].abs() < 1e-40).all() and torch.equal(y[3], plain[3])


# ---- edges ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", PACKED, ids=str)
def test_nan_and_infinity_stay_in_their_row(dtype, layout):
    weight, bias = normal(50, 35, seed=1), normal(50, seed=2)
    packed = pack_linear(weight, bias, dtype)
    x = normal(9, 35)
    clean = linear(x, packed)
    x[2, 34], x[5, 0] = math.nan, math.inf
    y = linear(x, packed)
    others = [0, 1, 3, 4, 6, 7, 8]
    assert torch.equal(y[others], clean[others])
    assert y[2].isnan().all() and not y[5].isfinite().any()
    if dtype == INT8:
        assert y[5].isnan().all()
    else:
        bad = weight.clone()
        bad[7, 3] = math.nan
        spoilt = linear(x, pack_linear(bad, bias, dtype))
        assert spoilt[:, 7].isnan().all() and not spoilt[0, :7].isnan().any()


@pytest.mark.parametrize("bias", [None, normal(33, seed=2)], ids=["no bias", "bias"])
@pytest.mark.parametrize("dtype", PACKED, ids=str)
def test_rows_and_columns_of_zeros_give_the_bias(dtype, bias, layout):
    weight = normal(33, 20, seed=1)
    weight[4] = 0
    x = normal(3, 20)
    x[1] = 0
    y = linear(x, pack_linear(weight, bias, dtype))
    added = torch.zeros(33) if bias is None else bias.to(BF16 if dtype == BF16 else FLOAT).float()
    if bias is not None and dtype == BF16 and layout == "panels":
        added = bias
    assert torch.equal(y[1], added)
    assert torch.equal(y[:, 4], added[4].expand(3))


@pytest.mark.parametrize("dtype", PACKED, ids=str)
def test_strides_and_dims_change_nothing(dtype, layout):
    """Not a bit from panels; MKL has other kernels for other strides."""
    packed = pack_linear(normal(50, 36, seed=1), normal(50, seed=2), dtype)
    for x_dtype in (FLOAT, BF16):
        x = normal(6, 36, dtype=x_dtype)
        expected = linear(x, packed)
        doubled = x.repeat_interleave(2, 1)[:, ::2]
        shifted = x.new_empty(6 * 36 + 1)[1:].view(6, 36).copy_(x)
        wide = torch.cat([x, x[:, :5]], 1)[:, :36]
        for same in (doubled, shifted, wide, x.T.contiguous().T):
            torch.testing.assert_close(linear(same, packed), expected)
            assert layout == "plain" or torch.equal(linear(same, packed), expected)
        assert torch.equal(linear(x.view(2, 3, 1, 36), packed), expected.view(2, 3, 1, 50))
        torch.testing.assert_close(linear(x[0], packed), expected[0])
        assert linear(x[0], packed).shape == (50,)


@pytest.mark.parametrize("dtype", PACKED, ids=str)
def test_empty(dtype, layout):
    assert linear(torch.empty(2, 0, 5), pack_linear(normal(3, 5), dtype=dtype)).shape == (2, 0, 3)
    assert linear(normal(2, 5), pack_linear(torch.empty(0, 5), dtype=dtype)).shape == (2, 0)


@has_panels
@pytest.mark.parametrize("dtype", PACKED, ids=str)
def test_a_row_depends_on_no_other_row_and_no_thread(dtype):
    """The same bits alone, in any company, on one thread or three, and again."""
    packed = pack_linear(normal(500, 300, seed=1), normal(500, seed=2), dtype)
    x = normal(130, 300)
    whole = linear(x, packed)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(linear(x, packed), whole)
            for rows in (1, 2, 7, 33, 64, 65):
                assert torch.equal(linear(x[-rows:], packed), whole[-rows:])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", PACKED, ids=str)
def test_nothing_given_is_changed_or_kept(dtype, layout):
    weight, bias, x = normal(50, 36, seed=1), normal(50, seed=2), normal(4, 36)
    before = copy.deepcopy((weight, bias, x))
    packed = pack_linear(weight, bias, dtype)
    y = linear(x, packed)
    for now, then in zip((weight, bias, x), before, strict=True):
        assert torch.equal(now, then)
    weight.zero_()
    bias.zero_()
    assert torch.equal(linear(x, packed), y)


# ---- the packed object ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", PACKED, ids=str)
def test_packed_tells_what_it_is_and_copies(dtype, layout):
    packed = pack_linear(normal(50, 36, seed=1), normal(50, seed=2), dtype)
    assert packed.shape == (50, 36) and packed.dtype == dtype
    assert packed.device == torch.device("cpu")
    assert repr(packed) == f"PackedLinear([50, 36], {dtype}, bias, {layout}, cpu)"
    size = 50 * 36 * packed.weight.element_size()
    assert size < packed.nbytes < 2.2 * size + 4096
    x = normal(4, 36)
    for other in (copy.deepcopy(packed), copy.copy(packed), pickle.loads(pickle.dumps(packed))):
        assert isinstance(other, PackedLinear)
        assert torch.equal(linear(x, other), linear(x, packed))
    with pytest.raises(AttributeError):
        packed.shape = (1, 1)


def test_weights_of_any_stride_and_dtype(layout):
    weight = normal(36, 50)
    for dtype in PACKED:
        x = normal(4, 36)
        expected = linear(x, pack_linear(weight.T.contiguous(), dtype=dtype))
        assert torch.equal(linear(x, pack_linear(weight.T, dtype=dtype)), expected)
        half = pack_linear(weight.T.half(), dtype=dtype)
        assert torch.equal(
            linear(x, half), linear(x, pack_linear(weight.T.half().float(), None, dtype))
        )


@has_panels
def test_panels_hold_the_weight():
    for dtype in PACKED:
        weight = normal(100, 37).to(dtype)
        panels = module._to_panels(weight, torch.arange(100, dtype=torch.int32))
        assert panels.shape == (
            3,
            1 + -(-37 // (4 // weight.element_size())),
            48,
            4 // weight.element_size(),
        )
        assert torch.equal(module._from_panels(panels, 100, 37), weight)


# ---- choosing ------------------------------------------------------------------------------------


def test_explain_and_force(layout):
    for dtype in PACKED:
        x, packed = normal(3, 5), pack_linear(normal(4, 5), dtype=dtype)
        ours, other = ("native", "torch") if layout == "panels" else ("torch", "native")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            explanation = explain(linear, x, packed)
            y = linear(x, packed)
        assert (
            explanation.implementation == ours and "packed in panels" in explanation.others[other]
        )
        with force("reference"):
            torch.testing.assert_close(linear(x, packed), y, rtol=1e-2, atol=1e-2)
        with force(other), pytest.raises(KernelUnavailable, match="packed in panels"):
            linear(x, packed)


@has_panels
def test_a_cpu_without_the_instructions_multiplies_panels_all_the_same(monkeypatch):
    x, packed = normal(3, 5), pack_linear(normal(4, 5))
    y = linear(x, packed)
    monkeypatch.setattr(module, "_no_panels", lambda device, dtype: "the test says so")
    with pytest.warns(RuntimeWarning, match="leaves its native way: the test says so"):
        torch.testing.assert_close(linear(x, packed), y)


@has_panels
@pytest.mark.parametrize("able", [(), (FLOAT,), (FLOAT, INT8), (FLOAT, BF16)], ids=str)
def test_each_dtype_has_needs_of_its_own(able, monkeypatch):
    """Weights of the dtypes whose instructions are there go in panels; explain says what lacks."""
    runs = {"linear_runs": able.__contains__}
    operator = native.op
    monkeypatch.setattr(native, "op", lambda name: runs.get(name) or operator(name))
    module._no_panels.cache_clear()
    needs = {FLOAT: "AVX-512", BF16: "AVX-512 bfloat16", INT8: "AVX-512 VNNI"}
    for dtype in PACKED:
        x, packed = normal(3, 5), pack_linear(normal(4, 5), dtype=dtype)
        explanation = explain(linear, x, packed)
        assert explanation.implementation == ("native" if dtype in able else "torch")
        if dtype not in able:
            why = explanation.others["native"]
            assert f"not packed in panels: {dtype} needs a CPU with {needs[dtype]}" in why
        assert linear(x, packed).shape == (3, 4)
    module._no_panels.cache_clear()


WITHOUT_AVX512 = """
import torch
from tilewise_kernels import explain, linear, pack_linear
x, weight = torch.ones(3, 5), torch.ones(4, 5)
for dtype in (torch.float32, torch.bfloat16, torch.int8):
    packed = pack_linear(weight, dtype=dtype)
    print(explain(linear, x, packed))
    torch.testing.assert_close(linear(x, packed), torch.full((3, 4), 5.0))
"""


@pytest.mark.skipif(native.missing() is not None, reason="no native extension")
@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_without_avx512_torch_multiplies(capability):
    environment = os.environ | {"ATEN_CPU_CAPABILITY": capability}
    command = [sys.executable, "-W", "error", "-c", WITHOUT_AVX512]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("linear: torch") == 3
    assert done.stdout.count("needs a CPU with AVX-512") == 3


# ---- registration and compilation ----------------------------------------------------------------


def packed_samples() -> list[tuple[Tensor, PackedLinear]]:
    weight, bias = normal(50, 36, seed=1), normal(50, seed=2)
    strided = normal(3, 72)[:, ::2]
    found = [(x, pack_linear(weight, bias, d)) for d in PACKED for x in (normal(2, 36), strided)]
    return [*found, (torch.empty(0, 36), pack_linear(weight)), (normal(36), pack_linear(weight))]


def test_opcheck(layout):
    for x, packed in packed_samples():
        args = (x, packed.weight, packed.scale, packed.bias, packed.shape[0])
        torch.library.opcheck(torch.ops.tilewise.linear.default, args)
        assert torch.equal(torch.ops.tilewise.linear(*args), linear(x, packed))


@pytest.mark.parametrize(
    ("dtype", "backend"),
    [(FLOAT, "aot_eager"), (BF16, "aot_eager"), (INT8, "aot_eager"), (INT8, "inductor")],
    ids=str,
)
def test_compiles_whole(dtype, backend):
    """One graph for several numbers of rows, the packed weight an argument or a constant."""
    torch._dynamo.reset()
    packed = pack_linear(normal(50, 36, seed=1), normal(50, seed=2), dtype)
    as_argument = torch.compile(linear, fullgraph=True, dynamic=True, backend=backend)
    as_constant = torch.compile(lambda x: linear(x, packed) * 2, fullgraph=True, backend=backend)
    with torch.no_grad():
        for rows in (3, 5, 9):
            x = normal(rows, 36)
            assert torch.equal(as_argument(x, packed), linear(x, packed))
            assert torch.equal(as_constant(x), linear(x, packed) * 2)


def test_exports():
    packed = pack_linear(normal(50, 36, seed=1), normal(50, seed=2), INT8)

    class Module(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return linear(x, packed)

    x = normal(3, 36)
    program = torch.export.export(Module(), (x,))
    assert any("tilewise.linear" in str(node.target) for node in program.graph.nodes)
    assert torch.equal(program.module()(x), linear(x, packed))


def test_autocast_changes_nothing(layout):
    for x, packed in packed_samples():
        y = linear(x, packed)
        with torch.autocast("cpu", dtype=BF16):
            assert torch.equal(linear(x, packed), y)


def test_gradients_are_refused_not_dropped():
    packed = pack_linear(torch.nn.Parameter(normal(4, 5)))
    assert not packed.weight.requires_grad
    x = normal(3, 5).requires_grad_()
    with pytest.raises(ArgumentError, match="linear: x is one that requires grad; .*inference"):
        linear(x, packed)
    with torch.no_grad():
        assert torch.equal(linear(x, packed), linear(x.detach(), packed))


# ---- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (normal(3, 6), "x is of shape .3, 6.; its last dim must be 5"),
        (torch.ones(()), "x is of shape"),
        (normal(3, 5).double(), "x is torch.float64; pass float32, bfloat16 or float16"),
        (torch.ones(3, 5, dtype=torch.int64), "x is torch.int64"),
        (torch.ones(3, 5, device="meta"), "x is on meta; move it to cpu"),
        (torch.eye(5).to_sparse(), "x is torch.sparse_coo"),
        ([1.0], "x is list"),
    ],
    ids=["wrong K", "no dims", "float64", "integers", "device", "sparse", "list"],
)
def test_bad_x(x, message):
    with pytest.raises(ArgumentError, match=f"linear: {message}"):
        linear(x, pack_linear(normal(4, 5)))


@pytest.mark.parametrize(
    ("weight", "bias", "dtype", "message"),
    [
        (normal(2, 3, 4), None, None, "weight is of shape"),
        (normal(5), None, None, "weight is of shape"),
        (normal(3, 0), None, None, "weight is of shape .3, 0.; it must be .N, K., K at least 1"),
        (normal(3, 4).double(), None, None, "weight is torch.float64"),
        (normal(3, 4).to(INT8), None, None, "weight is torch.int8"),
        (normal(3, 4), None, HALF, "dtype is torch.float16"),
        (normal(3, 4), None, "int8", "dtype is int8"),
        (normal(3, 4), normal(4), None, "bias is of shape .4.; it must be .3."),
        (normal(3, 4), torch.ones(3, device="meta"), None, "bias is on meta"),
        (normal(3, 4), torch.ones(3).long(), None, "bias is torch.int64"),
        (normal(3, 4), torch.ones(3).double(), None, "bias is torch.float64"),
        (normal(3, 4) / 0, None, INT8, "weight is not finite"),
        (torch.ones(1, 133_145), None, INT8, "K is 133145; int8 sums hold 133144"),
    ],
    ids=(
        "3-d 1-d K=0 float64 int8 half name bias-shape bias-device bias-dtype bias-wide inf huge-K"
    ).split(),
)
def test_bad_weight(weight, bias, dtype, message):
    with pytest.raises(ArgumentError, match=f"pack_linear: {message}"):
        pack_linear(weight, bias, dtype)


def test_something_else_for_packed():
    with pytest.raises(ArgumentError, match="packed is Tensor; pass what pack_linear returned"):
        linear(normal(3, 5), normal(4, 5))


@has_panels
def test_the_native_op_checks_its_own_arguments():
    packed = pack_linear(normal(50, 36), dtype=INT8)
    raw = native.op("linear")
    with pytest.raises(ValueError, match="panels have shape"):
        raw(normal(2, 40), packed.weight, packed.scale, None, 50)
    with pytest.raises(ValueError, match="panels have shape"):
        raw(normal(2, 36), packed.weight, packed.scale, None, 97)
    with pytest.raises(ValueError, match="take a scale"):
        raw(normal(2, 36), packed.weight, None, None, 50)
    with pytest.raises(ValueError, match="scale and bias must be"):
        raw(normal(2, 36), packed.weight, packed.scale[:-1], None, 50)
    with pytest.raises(ValueError, match="x has no columns"):
        raw(normal(2, 0), torch.zeros(1, 1, 48, 1), None, None, 48)
