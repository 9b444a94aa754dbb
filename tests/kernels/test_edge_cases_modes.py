"""Hard cases 10 to 15 of fifteen: extreme values and sizes, modes, dropout, the rest of torch.

Each is asked of every op that it concerns. Cases 1 to 9 are in test_edge_cases.py.
"""

import copy
import math
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tilewise_kernels import (
    attention,
    cross_entropy,
    feed_forward,
    layer_norm,
    linear_act,
    linear_cross_entropy,
    log_softmax,
    log_softmax_topk,
    rms_norm,
    rotary,
    softmax,
)

INF = torch.inf


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def qkv(b=2, hq=2, hkv=2, sq=5, sk=7, d=8, dv=None, dtype=torch.float32) -> list[Tensor]:
    shapes = ((b, hq, sq, d), (b, hkv, sk, d), (b, hkv, sk, dv or d))
    return [normal(*shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes)]


def train(function: Callable[..., Tensor], tensors: list[Tensor], grad: Tensor | None = None):
    """(output, gradients) of function(*tensors)."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    out = function(*leaves)
    upstream = torch.ones_like(out) if grad is None else grad.to(out.dtype)
    return out.detach(), torch.autograd.grad(out, leaves, upstream)


def close(got: Tensor, wanted: Tensor, tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(got.double(), wanted.double(), rtol=tolerance, atol=tolerance)


# ---- 10. the ends of half precision ------------------------------------------------------------


@pytest.mark.parametrize("norm", [layer_norm, rms_norm])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_10_large_constant_zero_and_subnormal_rows(norm: Callable, dtype: torch.dtype) -> None:
    eager = F.layer_norm if norm is layer_norm else F.rms_norm
    n = 512
    ramp = torch.linspace(-1, 1, n, dtype=torch.float64)
    rows = torch.stack([1e4 + ramp * 50, ramp * 3e4, torch.full((n,), 7.0).double(),
                        torch.zeros(n).double(), ramp * 1e-6, 100 + ramp * 0.5])  # fmt: skip
    x = rows.to(dtype)
    eps = 1e-5
    exact = eager(x.double(), (n,), None, *([None] if norm is layer_norm else []), eps)
    theirs = eager(x, (n,), None, *([None] if norm is layer_norm else []), eps)
    ours = norm(x, eps=eps)
    assert ours.isfinite().all()
    limit = 2 * (theirs.double() - exact).abs().amax(-1) + 1e-5 * exact.abs().amax(-1)
    assert ((ours.double() - exact).abs().amax(-1) <= limit).all()


def test_10_float16_sums_past_65504() -> None:
    x = torch.full((2, 4096), 60.0, dtype=torch.float16)
    assert torch.equal(rms_norm(x, eps=0.0), torch.ones_like(x))
    assert softmax(x).sum(-1).sub(1).abs().max() < 1e-2
    loss = cross_entropy(x, torch.zeros(2, dtype=torch.long))
    assert loss.dtype == torch.float32
    close(loss, torch.tensor(math.log(4096)))
    w = torch.full((3, 4096), 1.0, dtype=torch.float16)
    big = linear_act(x / 8, w, activation="identity").float()  # 30720: the sum itself fits
    close(big, torch.full((2, 3), 30720.0))


# ---- 11. very wide, very many ------------------------------------------------------------------


@pytest.mark.parametrize("n", [65537, 131072])
def test_11_wide_rows(n: int) -> None:
    x, w = normal(2, n), normal(n, seed=1)
    close(softmax(x), x.double().softmax(-1))
    close(log_softmax(x), x.double().log_softmax(-1), 5e-5)
    close(layer_norm(x, w), F.layer_norm(x.double(), (n,), w.double()))
    close(rms_norm(x, w), F.rms_norm(x.double(), (n,), w.double(), 1e-6))
    scores, ids = log_softmax_topk(x, 4)
    wanted = x.double().log_softmax(-1).topk(4)
    assert torch.equal(ids, wanted.indices)
    close(scores, wanted.values, 5e-5)


def test_11_offsets_past_two_to_the_31() -> None:
    """Rows 2^31 elements apart: of the memory between them no page is ever touched."""
    x = torch.empty_strided((2, 32), (2**31, 1), dtype=torch.float16).copy_(normal(2, 32).half())
    for call in (softmax, rms_norm, log_softmax, layer_norm):
        assert torch.equal(call(x), call(x.clone()))


# ---- 12. empty and small -----------------------------------------------------------------------


def test_12_empty_inputs() -> None:
    for b, sq, sk in ((0, 5, 7), (2, 0, 7), (2, 5, 0)):
        tensors = qkv(b=b, sq=sq, sk=sk)
        out, grads = train(lambda *t: attention(*t), tensors)
        assert out.shape == (b, 2, sq, 8) and (out == 0).all()
        assert all((g == 0).all() for g in grads)
    w = normal(8, seed=1)
    for norm in (layer_norm, rms_norm):
        out, (dx, dw) = train(lambda x, w, norm=norm: norm(x, w), [normal(0, 8), w])
        assert out.shape == (0, 8) and torch.equal(dw, torch.zeros(8))
    assert softmax(normal(0, 3)).shape == (0, 3) and softmax(normal(3, 0)).shape == (3, 0)
    scores, ids = log_softmax_topk(normal(0, 9), 2)
    assert scores.shape == ids.shape == (0, 2)
    q, k = rotary(normal(0, 2, 3, 8), normal(0, 2, 3, 8), normal(3, 4), normal(3, 4))
    assert q.shape == k.shape == (0, 2, 3, 8)


def test_12_one_column_one_dim_five_dims() -> None:
    assert torch.equal(layer_norm(normal(4, 1)), torch.zeros(4, 1))
    close(rms_norm(normal(4, 1)), normal(4, 1).sign())
    assert torch.equal(softmax(normal(4, 1)), torch.ones(4, 1))
    for shape in ((6,), (2, 1, 3, 2, 6)):
        x = normal(*shape)
        close(layer_norm(x), F.layer_norm(x.double(), (6,)))
        close(rms_norm(x), F.rms_norm(x.double(), (6,), None, 1e-6))
        close(linear_act(x, normal(4, 6)), F.gelu(x.double() @ normal(4, 6).double().T))
    x = normal(3, 4, 5)
    for dim in range(-3, 3):
        close(softmax(x, dim=dim), x.double().softmax(dim))
        close(log_softmax(x, dim=dim), x.double().log_softmax(dim))


# ---- 13. the modes of a norm -------------------------------------------------------------------


@pytest.mark.parametrize("norm", [layer_norm, rms_norm])
def test_13_only_the_residual_output_is_used(norm: Callable) -> None:
    x, r, w = normal(3, 8), normal(3, 8, seed=1), normal(8, seed=2)
    leaves = [t.clone().requires_grad_() for t in (x, r, w)]
    norm(leaves[0], leaves[2], residual=leaves[1], prenorm=True)[1].sum().backward()
    assert torch.equal(leaves[0].grad, torch.ones(3, 8))
    assert torch.equal(leaves[1].grad, torch.ones(3, 8))
    assert leaves[2].grad is None or (leaves[2].grad == 0).all()


@pytest.mark.parametrize("norm", [layer_norm, rms_norm])
def test_13_the_residual_is_x_itself_and_weights_may_be_frozen(norm: Callable) -> None:
    x, w = normal(3, 8).requires_grad_(), normal(8, seed=2)
    y = norm(x, w, residual=x)
    eager = F.layer_norm if norm is layer_norm else F.rms_norm
    double = x.detach().double().requires_grad_()
    wanted = eager(2 * double, (8,), w.double(), *([] if norm is layer_norm else [1e-6]))
    close(y, wanted)
    (got,), (exact,) = (
        torch.autograd.grad(t.sum(), leaf) for t, leaf in ((y, x), (wanted, double))
    )
    close(got, exact, 5e-5)


@pytest.mark.parametrize("norm", [layer_norm, rms_norm])
@pytest.mark.parametrize("residual", [torch.bfloat16, torch.float32])
def test_13_float32_weight_and_residual_under_bfloat16(norm: Callable, residual) -> None:
    x, r, w = normal(5, 64, dtype=torch.bfloat16), normal(5, 64, seed=1, dtype=residual), normal(64)
    y, s = norm(x, w, residual=r, prenorm=True)
    assert y.dtype == torch.bfloat16 and s.dtype == residual
    _, (dx, dw) = train(lambda a, b: norm(a, b, residual=r), [x, w])
    assert dx.dtype == torch.bfloat16 and dw.dtype == torch.float32


# ---- 14. dropout -------------------------------------------------------------------------------

DROPS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "attention": lambda x, p: attention(x, x, x, dropout_p=p),
    "layer_norm": lambda x, p: layer_norm(x, dropout_p=p, residual=torch.zeros_like(x)),
    "rms_norm": lambda x, p: rms_norm(x, dropout_p=p, prenorm=True)[1],
    "feed_forward": lambda x, p: feed_forward(
        x, normal(16, 8), None, normal(8, 16, seed=1), None, dropout_p=p
    ),
}


@pytest.mark.parametrize("name", DROPS)
def test_14_dropout(name: str) -> None:
    call, x = DROPS[name], normal(2, 4, 16, 8, seed=8)
    assert torch.equal(call(x, 0.0), call(x, 0.0))
    nothing = call(x, 1.0)
    assert nothing.isfinite().all() and (nothing == 0).all()

    def seeded(function: Callable[[], Tensor]) -> Tensor:
        torch.manual_seed(3)
        return function()

    one, two = (seeded(lambda: call(x, 0.5)) for _ in range(2))
    assert torch.equal(one, two)
    torch.manual_seed(3)
    first, second = call(x, 0.5), call(x, 0.5)
    assert not torch.equal(first, second)  # each step draws its own
    grads = []
    for wrap in (lambda f, t: f(t), lambda f, t: checkpoint(f, t, use_reentrant=False)):
        leaf = x.clone().requires_grad_()
        torch.manual_seed(5)
        wrap(lambda t: call(t, 0.3), leaf).square().sum().backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads)
    for _ in range(9):
        leaf = x.clone().requires_grad_()
        torch.manual_seed(5)
        call(leaf, 0.3).square().sum().backward()
        assert torch.equal(leaf.grad, grads[0])


def test_14_the_dropped_share_and_the_mean() -> None:
    x = torch.ones(256, 256)
    torch.manual_seed(0)
    _, s = layer_norm(x, dropout_p=0.25, prenorm=True)
    kept = (s != 0).double().mean()
    assert abs(kept - 0.75) < 0.01 and torch.allclose(s[s != 0], torch.tensor(1 / 0.75))
    q = torch.zeros(4, 4, 32, 8)
    v = torch.ones(4, 4, 32, 8)
    torch.manual_seed(0)
    out = attention(q, q, v, dropout_p=0.25)
    assert abs(out.mean() - 1) < 0.01
    assert not torch.equal(out[:, 0], out[:, 1])  # heads differ


# ---- 15. living with the rest of torch ---------------------------------------------------------


def calls() -> dict[str, Callable[[Tensor], Tensor]]:
    w, w1, w2 = normal(8, seed=1), normal(16, 8, seed=2), normal(8, 16, seed=3)
    cos, sin, target = normal(5, 4, seed=4), normal(5, 4, seed=5), torch.zeros(2, 2, 5).long()
    return {
        "attention": lambda x: attention(x, x, x, causal=True),
        "layer_norm": lambda x: layer_norm(x, w, residual=x),
        "rms_norm": lambda x: rms_norm(x, w, residual=x),
        "softmax": lambda x: softmax(x),
        "log_softmax": lambda x: log_softmax(x),
        "linear_act": lambda x: linear_act(x, w1),
        "feed_forward": lambda x: feed_forward(x, w1, None, w2, None, gate=w1),
        "rotary": lambda x: rotary(x, x, cos, sin)[0],
        "cross_entropy": lambda x: cross_entropy(x, target),
        "linear_cross_entropy": lambda x: linear_cross_entropy(x, w1, target),
    }


@pytest.mark.parametrize("name", calls())
def test_15_inference_double_backward_and_vmap_of_leaves(name: str) -> None:
    call, x = calls()[name], normal(2, 2, 5, 8)
    expected = call(x)
    with torch.inference_mode():
        close(call(x), expected, 1e-6)
    leaf = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(call(leaf).square().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        first.sum().backward()


@pytest.mark.parametrize("name", calls())
def test_15_integers_other_devices_and_other_dtypes_are_refused(name: str) -> None:
    call = calls()[name]
    with pytest.raises(ValueError, match=name):
        call(torch.zeros(2, 2, 5, 8, dtype=torch.int64))
    if name in ("softmax", "log_softmax", "attention"):
        q = normal(2, 2, 5, 8)
        with pytest.raises(ValueError, match="attention: k"):
            attention(q, q.half(), q)
        return
    with pytest.raises(ValueError, match=name):
        call(torch.zeros(2, 2, 5, 8, device="meta"))


def test_15_modules_copy_and_pickle() -> None:
    from tilewise.layers import FeedForward, LayerNorm, MultiHeadAttention, RMSNorm

    x = normal(2, 5, 8)
    for layer in (LayerNorm(8), RMSNorm(8), MultiHeadAttention(8, 2), FeedForward(8, 16)):
        expected = layer(x)
        for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert torch.equal(twin(x), expected)
        assert layer.to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16


def test_every_numbered_case_is_here() -> None:
    """Cases 1 to 9 are in test_edge_cases.py."""
    files = Path(__file__).parent.glob("test_edge_cases*.py")
    numbers = {
        n for file in files for n in re.findall(r"^def test_(\d\d)_", file.read_text(), re.M)
    }
    assert numbers == {f"{n:02d}" for n in range(1, 16)}
