"""linear with a packed weight on a GPU: cuBLASLt in three dtypes, int8 products of any shape.

Shapes: x [..., K], weight [N, K], bias [N], y [..., N].
"""

import math

import pytest
import torch
import torch.nn.functional as F

from tilewise_kernels import explain, linear, pack_linear
from tilewise_kernels.errors import ArgumentError

pytestmark = pytest.mark.gpu
FLOAT, BF16, HALF, INT8 = torch.float32, torch.bfloat16, torch.float16, torch.int8
SIZES = [(1, 1), (7, 33), (768, 769), (1024, 4096)]  # K, N
ROWS = [0, 1, 2, 16, 17, 32, 33, 100]


@pytest.mark.parametrize(("k", "n"), SIZES)
@pytest.mark.parametrize("dtype", [FLOAT, BF16, HALF], ids=str)
def test_as_linear_of_the_same_dtype(dtype, k, n, normal):
    weight, bias = normal(n, k, dtype=dtype), normal(n, dtype=dtype)
    packed = pack_linear(weight, bias)
    for rows in ROWS:
        x = normal(rows, k, dtype=dtype)
        y = linear(x, packed)
        assert y.dtype == dtype and y.shape == (rows, n)
        if rows > 0:
            exact = F.linear(x.double(), weight.double(), bias.double())
            eager_error = (F.linear(x, weight, bias).double() - exact).abs().max()
            limit = 2 * eager_error + 1e-5 * exact.abs().max()
            assert (y.double() - exact).abs().max() <= limit


@pytest.mark.parametrize(("k", "n"), SIZES)
@pytest.mark.parametrize("dtype", [FLOAT, BF16, HALF], ids=str)
def test_int8_is_its_formula(dtype, k, n, normal):
    """At row counts and sizes that cuBLASLt takes and that are padded for it."""
    weight, bias = normal(n, k), normal(n)
    packed = pack_linear(weight, bias, INT8)
    for rows in ROWS[1:]:
        x = normal(rows, k, dtype=dtype)
        scales, integers = [], []
        for matrix in (x.float(), weight):
            largest = matrix.abs().amax(1)
            factor = torch.full_like(largest, 127) / largest
            integers.append((matrix * factor[:, None]).round().double())
            scales.append((largest / 127).double())
        expected = (integers[0] @ integers[1].T) * scales[0][:, None] * scales[1] + bias.double()
        rtol = 1e-6 if dtype == FLOAT else torch.finfo(dtype).eps
        y = linear(x, packed)
        assert y.dtype == dtype
        torch.testing.assert_close(y.double(), expected, rtol=rtol, atol=1e-6 * math.sqrt(k))


@pytest.mark.parametrize("dtype", [FLOAT, BF16, INT8], ids=str)
def test_rows_that_are_not_finite_or_zero(dtype, normal):
    weight, bias = normal(50, 40), normal(50)
    packed = pack_linear(weight, bias, dtype)
    x = normal(9, 40)
    clean = linear(x, packed)
    x[2, 3], x[5, 0], x[7] = math.nan, math.inf, 0
    y = linear(x, packed)
    for row in (0, 1, 3, 4, 6, 8):
        torch.testing.assert_close(y[row], clean[row])
    assert y[2].isnan().all() and not y[5].isfinite().any()
    assert torch.equal(y[7], bias.to(BF16).float() if dtype == BF16 and y.is_cuda else bias)


@pytest.mark.parametrize("dtype", [FLOAT, BF16, INT8], ids=str)
def test_compiles_and_explains(dtype, normal, device):
    torch._dynamo.reset()
    x, packed = normal(5, 40), pack_linear(normal(50, 40), normal(50), dtype)
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, packed), linear(x, packed))
    if device.type == "cuda":
        assert explain(linear, x, packed).implementation == "torch"


def test_x_on_another_device(normal, gpu_only):
    gpu_only("second device")
    with pytest.raises(ArgumentError, match="x is on cpu; move it to cuda"):
        linear(torch.ones(2, 40), pack_linear(normal(50, 40)))
