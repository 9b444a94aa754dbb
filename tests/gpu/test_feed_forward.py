"""linear_act and feed_forward on a GPU: the Triton epilogue and what the choice takes instead.

Shapes: x [M, K]; weight [N, K]; w1 [F, K]; w2 [N, F].
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tilewise_kernels import feed_forward, force, linear_act
from tilewise_kernels.dropout import draw_seed, kept

pytestmark = pytest.mark.gpu
FLOAT, BF16, HALF = torch.float32, torch.bfloat16, torch.float16
Tensors = dict[str, Tensor]
NAMED = {
    "gelu": F.gelu,
    "gelu_tanh": lambda h: F.gelu(h, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "quick_gelu": lambda h: h * torch.sigmoid(1.702 * h),
    "identity": lambda h: h,
}


def one_layer(normal, m: int, k: int, n: int, dtype: torch.dtype) -> Any:
    weight = normal(n, k, dtype=dtype, std=k**-0.5)
    return {"x": normal(m, k, dtype=dtype), "weight": weight, "bias": normal(n, dtype=dtype)}


def two_layers(normal, m: int, k: int, f: int, dtype: torch.dtype) -> Any:
    first, second = one_layer(normal, m, k, f, dtype), one_layer(normal, m, f, k, dtype)
    weights = {"w1": first["weight"], "b1": first["bias"]}
    return {"x": first["x"]} | weights | {"w2": second["weight"], "b2": second["bias"]}


def linear(t: Tensors, activation: str) -> Tensor:
    with force("triton"):
        return linear_act(**t, activation=activation)


def eager_linear(t: Tensors, activation: str) -> Tensor:
    return NAMED[activation](F.linear(t["x"], t["weight"], t.get("bias")))


def eager_two(t: Tensors, activation: str) -> Tensor:
    a = NAMED[activation](F.linear(t["x"], t["w1"], t["b1"]))
    return F.linear(a, t["w2"], t["b2"])


@pytest.mark.parametrize("activation", NAMED)
@pytest.mark.parametrize("dtype", [FLOAT, BF16, HALF], ids=str)
def test_linear_act(activation: str, dtype: torch.dtype, accurate, normal, pick) -> None:
    """Whole tiles, then every dimension ragged."""
    dtype = pick(dtype, HALF if dtype == BF16 else dtype)
    for m, k, n in (pick((256, 512, 384), (32, 32, 32)), pick((517, 250, 129), (35, 18, 41))):
        accurate(
            lambda t: linear(t, activation),
            lambda t: eager_linear(t, activation),
            one_layer(normal, m, k, n, dtype),
        )


@pytest.mark.parametrize("way", ["triton", None])
@pytest.mark.parametrize("dtype", [FLOAT, BF16, HALF], ids=str)
def test_feed_forward(way: str | None, dtype: torch.dtype, accurate, normal, pick) -> None:
    dtype = pick(dtype, HALF if dtype == BF16 else dtype)

    def ours(t: Any) -> Tensor:
        if way is None:
            return feed_forward(**t, activation="gelu")
        with force(way):
            return feed_forward(**t, activation="gelu")

    for m, k, f in (pick((512, 256, 1024), (32, 16, 64)), pick((517, 250, 129), (35, 18, 41))):
        accurate(ours, lambda t: eager_two(t, "gelu"), two_layers(normal, m, k, f, dtype))


def eager_gated(t: Tensors, activation: str, factors: Tensor | float = 1.0) -> Tensor:
    a = NAMED[activation](F.linear(t["x"], t["w1"], t["b1"])) * F.linear(t["x"], t["gate"])
    return F.linear(a * factors, t["w2"], t["b2"])


@pytest.mark.parametrize("activation", NAMED)
@pytest.mark.parametrize("dtype", [FLOAT, BF16, HALF], ids=str)
def test_gated(activation: str, dtype: torch.dtype, accurate, normal, pick) -> None:
    """The elementwise kernels between the products, in the way that is chosen."""
    dtype = pick(dtype, HALF if dtype == BF16 else dtype)

    def ours(t: Any) -> Tensor:
        with force("triton"):
            return feed_forward(**t, activation=activation)

    for m, k, f in (pick((512, 256, 1024), (32, 16, 64)), pick((517, 250, 129), (35, 18, 41))):
        inputs = two_layers(normal, m, k, f, dtype)
        inputs |= {"gate": normal(f, k, dtype=dtype, std=k**-0.5)}
        accurate(ours, lambda t: eager_gated(t, activation), inputs)


def test_dropout_finds_the_elements_of_the_seed(normal, pick, device) -> None:
    m, k, f = pick((517, 256, 1000), (35, 18, 41))
    t = two_layers(normal, m, k, f, FLOAT) | {"gate": normal(f, k, std=k**-0.5)}
    leaves = {name: x.requires_grad_() for name, x in t.items()}
    torch.manual_seed(3)
    seed = draw_seed(device)
    rows, columns = (torch.arange(n, device=device) for n in (m, f))
    factors = kept(seed, rows[:, None], columns, 0.25) / 0.75
    torch.manual_seed(3)
    with force("triton"):
        y = feed_forward(**leaves, activation="silu", dropout_p=0.25)
    expected = eager_gated(leaves, "silu", factors)
    upstream = normal(*y.shape)
    found = torch.autograd.grad(y, list(leaves.values()), upstream)
    for a, b in zip(
        (y, *found),
        (expected, *torch.autograd.grad(expected, list(leaves.values()), upstream)),
        strict=True,
    ):
        assert (a - b).abs().max() <= 1e-3 * b.abs().max()


@pytest.mark.parametrize("rows", [1, 600, 2048])
def test_unforced_linear_act(rows: int, accurate, normal, pick) -> None:
    """Few rows, and enough of them that the choice may fall on the epilogue."""
    accurate(
        lambda t: linear_act(**t),
        lambda t: eager_linear(t, "gelu"),
        one_layer(normal, pick(rows, 20), 256, pick(1024, 32), pick(BF16, HALF)),
    )


def test_no_bias_and_strides(normal, pick) -> None:
    t = one_layer(normal, pick(300, 20), 256, pick(200, 24), HALF)
    expected = linear(t, "silu")
    column_major = {n: x.t().contiguous().t() if x.dim() == 2 else x for n, x in t.items()}
    scale = expected.abs().max()
    assert (linear(column_major, "silu") - expected).abs().max() <= 2e-3 * scale
    del t["bias"]
    difference = linear(t, "silu") - eager_linear(t, "silu")
    assert difference.abs().max() <= 4e-3 * scale


def test_backward_repeats_bit_for_bit(normal, pick) -> None:
    tensors = two_layers(normal, pick(2048, 20), pick(512, 16), pick(1024, 32), HALF)
    leaves: Any = {n: t.requires_grad_() for n, t in tensors.items()}
    grad = normal(*tensors["x"].shape, dtype=HALF)

    def run() -> list[Tensor]:
        with force("triton"):
            y = feed_forward(**leaves)
        return [y.detach(), *torch.autograd.grad(y, list(leaves.values()), grad)]

    first = run()
    for _ in range(pick(50, 2)):
        assert all(torch.equal(a, b) for a, b in zip(run(), first, strict=True))


def test_outputs_past_31_bits(normal, pick, room) -> None:
    room(20)
    k, n = 64, pick(16384, 48)
    t = one_layer(normal, pick(2**17 + 5, 70), k, n, HALF)
    y = linear(t, "gelu")
    small = linear(t | {"x": t["x"][-5:]}, "gelu")
    assert (y[-5:] - small).abs().max() <= 2e-3 * small.abs().max()
