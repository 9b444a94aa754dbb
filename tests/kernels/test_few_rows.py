"""Products of few rows on the CPU: linear_act and feed_forward by the kernel that decoding uses.

Shapes: x [M, K]; weight [N, K]; bias [N].
"""

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tilewise_kernels import feed_forward, few_rows, linear_act, native

DTYPES = [torch.float32, torch.bfloat16]

pytestmark = pytest.mark.skipif(
    native.missing() is not None or few_rows.most(torch.float32) == 0,
    reason="no kernel for few rows here",
)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype)


@pytest.fixture(autouse=True)
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, ...]]]:
    """The shapes of x that reached the kernel."""
    seen: list[tuple[int, ...]] = []
    run = native.op

    def watched(name: str):
        def call(x: Tensor, *more: object):
            seen.append(tuple(x.shape))
            return run(name)(x, *more)

        return call if name == "few_rows" else run(name)

    monkeypatch.setattr(native, "op", watched)
    yield seen


@pytest.mark.parametrize("k", [1, 7, 16, 31, 33, 100, 512])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_as_accurate_as_eager(dtype, k, calls, assert_accurate):
    """Every number of rows that a tile takes, with columns left over."""
    for m in (1, 2, 3, 4, 5, 8):
        for n in (1, 4, 15, 16, 17, 50):
            weight, bias = normal(n, k, seed=1, dtype=dtype), normal(n, seed=2, dtype=dtype)
            x = normal(m, k, dtype=dtype)
            for shift in (bias, None):
                exact = F.linear(
                    x.double(), weight.double(), None if shift is None else bias.double()
                )
                ours = linear_act(x, weight, shift, activation="identity")
                assert_accurate({"y": ours}, {"y": F.linear(x, weight, shift)}, {"y": exact})
    assert len(calls) == 6 * 6 * 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_up_to_the_limit(dtype, calls, assert_accurate):
    most = few_rows.most(dtype)
    weight, bias = normal(48, 64, seed=1, dtype=dtype), normal(48, seed=2, dtype=dtype)
    for m in (most, most + 1):
        x = normal(m, 64, dtype=dtype)
        ours = linear_act(x, weight, bias, activation="relu")
        exact = F.linear(x.double(), weight.double(), bias.double()).relu()
        assert_accurate({"y": ours}, {"y": F.linear(x, weight, bias).relu()}, {"y": exact})
    assert calls == [(most, 64)]  # one more row is torch's


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_does_not_depend_on_the_others(dtype, calls):
    weight, x = normal(40, 96, seed=1, dtype=dtype), normal(8, 96, dtype=dtype)
    whole = linear_act(x, weight, activation="identity")
    for rows in (slice(0, 1), slice(2, 5), slice(1, 8)):
        assert torch.equal(linear_act(x[rows], weight, activation="identity"), whole[rows])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        large, long = normal(4, 1024, seed=3, dtype=dtype), normal(2048, 1024, seed=4, dtype=dtype)
        alone = linear_act(large, long, activation="identity")
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(linear_act(large, long, activation="identity"), alone)
    assert len(calls) == 6


def test_strides(calls):
    """Rows of a larger weight, columns of a larger x, a bias with gaps, leading dims."""
    packed, wide = normal(60, 24, seed=1), normal(3, 48)
    bias = normal(40, seed=2)[::2]
    for x in (wide[:, ::2], wide[:, :24], normal(2, 2, 24), normal(24)):
        for weight in (packed[20:40], packed[::3]):
            ours = linear_act(x, weight, bias, activation="identity")
            torch.testing.assert_close(ours, F.linear(x, weight, bias))
    assert len(calls) == 8
    across = normal(24, 20).t()  # columns of stride 20: torch's
    torch.testing.assert_close(
        linear_act(wide[:, :24], across), F.gelu(F.linear(wide[:, :24], across))
    )
    assert len(calls) == 8


def test_nothing_to_multiply(calls):
    assert linear_act(normal(0, 8), normal(5, 8)).shape == (0, 5)
    assert linear_act(normal(2, 8), normal(0, 8)).shape == (2, 0)
    bias = normal(3)
    assert torch.equal(
        linear_act(normal(2, 0), normal(3, 0), bias, activation="identity"), bias.expand(2, 3)
    )


def test_not_finite_values_stay_in_their_places(calls):
    x, weight = normal(3, 40), normal(20, 40, seed=1)
    x[1, 3], weight[7, 5] = float("nan"), float("inf")
    y = linear_act(x, weight, activation="identity")
    assert torch.equal(y.isfinite(), F.linear(x, weight).isfinite())
    assert len(calls) == 1


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_feed_forward(dtype, gated, calls, assert_accurate):
    """Both layers and the gate, forward and backward."""
    shapes = {
        "x": (4, 48),
        "w1": (96, 48),
        "b1": (96,),
        "w2": (40, 96),
        "b2": (40,),
        "gate": (96, 48),
    }
    given = {
        name: (normal(*shape, seed=i, dtype=dtype) / shape[-1] ** 0.5).requires_grad_()
        for i, (name, shape) in enumerate(shapes.items())
        if gated or name != "gate"
    }

    def eager(x, w1, b1, w2, b2, gate=None):
        a = F.silu(F.linear(x, w1, b1))
        return F.linear(a if gate is None else a * F.linear(x, gate), w2, b2)

    def measured(function, inputs):
        y = function(*inputs.values())
        upstream = normal(4, 40, seed=9).to(y.dtype)
        gradients = torch.autograd.grad(y, tuple(inputs.values()), upstream)
        return {"y": y} | {f"d{name}": g for name, g in zip(inputs, gradients, strict=True)}

    def ours(x, w1, b1, w2, b2, gate=None):
        return feed_forward(x, w1, b1, w2, b2, gate=gate, activation="silu")

    exact = {name: t.detach().double().requires_grad_() for name, t in given.items()}
    assert_accurate(measured(ours, given), measured(eager, given), measured(eager, exact))
    assert len(calls) == 2 + gated


SCRIPT = """
import torch
from tilewise_kernels import few_rows, linear_act
print(few_rows.most(torch.float32), few_rows.most(torch.bfloat16))
for m in (1, 2, 3, 5, 8):
    for k in (1, 9, 40):
        x, weight, bias = torch.randn(m, k), torch.randn(21, k), torch.randn(21)
        y = linear_act(x, weight, bias, activation="identity")
        torch.testing.assert_close(y, torch.nn.functional.linear(x, weight, bias))
"""


@pytest.mark.parametrize(("capability", "rows"), [("default", "0 0"), ("avx2", "8 0")])
def test_older_processors(capability, rows):
    environment = os.environ | {"ATEN_CPU_CAPABILITY": capability}
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == rows.split()
