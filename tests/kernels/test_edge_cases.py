"""Hard cases 1 to 9 of fifteen: those of attention, asked of every op that they concern.

Expected values are written out in float64 here. What needs a GPU (streams, a second device, grids
past 65535 programs, offsets past 2^31 in real memory) is in tests/gpu.
"""

import contextlib
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tilewise_kernels import (
    attention,
    attention_varlen,
    cross_entropy,
    decode_attention,
    feed_forward,
    force,
    layer_norm,
    linear_act,
    log_softmax,
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


def explicit(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, causal: bool = False,
    bias: Tensor | None = None, softcap: float | None = None, scale: float | None = None,
) -> Tensor:  # fmt: skip
    """Attention in float64, rows without keys 0."""
    q, k, v = q.double(), k.double(), v.double()
    group, (sq, sk) = q.shape[1] // k.shape[1], (q.shape[2], k.shape[2])
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias.double()
    if mask is not None:
        scores = scores.masked_fill(~mask, -INF) if mask.dtype == torch.bool else scores + mask
    if causal:
        seen = torch.arange(sk) <= torch.arange(sq)[:, None] + sk - sq
        scores = scores.masked_fill(~seen, -INF)
    dead = (scores == -INF).all(-1, keepdim=True)
    return scores.softmax(-1).masked_fill(dead, 0) @ v


def train(function: Callable[..., Tensor], tensors: list[Tensor], grad: Tensor | None = None):
    """(output, gradients) of function(*tensors)."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    out = function(*leaves)
    upstream = torch.ones_like(out) if grad is None else grad.to(out.dtype)
    return out.detach(), torch.autograd.grad(out, leaves, upstream)


def pinned(way: str) -> contextlib.AbstractContextManager[None]:
    """attention pinned to an implementation, or left to choose where way is ""."""
    return force(way, "attention") if way else contextlib.nullcontext()


def close(got: Tensor, wanted: Tensor, tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(got.double(), wanted.double(), rtol=tolerance, atol=tolerance)


# ---- 1. rows with nothing to attend to ---------------------------------------------------------


@pytest.mark.parametrize("way", ["native", "torch", "blocked", "reference", "triton"])
@pytest.mark.parametrize("kind", ["padding", "causal", "bool", "item"])
def test_01_dead_rows_are_zero_and_touch_nobody(way: str, kind: str) -> None:
    q, k, v = qkv(sq=9, sk=5) if kind == "causal" else qkv()
    lengths = torch.tensor([7, 0]) if kind == "padding" else None
    mask = torch.rand(2, 1, 5, 7, generator=torch.Generator().manual_seed(0)) < 0.6
    mask[0, 0, 2] = False
    if kind == "item":
        mask[1] = False
    options = {"mask": mask} if kind in ("bool", "item") else {}
    options |= {"key_lengths": lengths} if lengths is not None else {"causal": kind == "causal"}
    with pinned(way):
        out, lse = attention(q, k, v, return_lse=True, **options)
        _, grads = train(lambda *t: attention(*t, **options), [q, k, v])
    dead = lse == -INF
    assert dead.any() and not dead.all()
    assert (out[dead] == 0).all() and (grads[0][dead] == 0).all()
    assert all(g.isfinite().all() for g in grads) and out.isfinite().all()
    if lengths is not None:
        options = {"mask": torch.arange(7) < lengths[:, None, None, None]}
    close(out, explicit(q, k, v, **options))


def test_01_softmax_and_decode_have_dead_rows_too() -> None:
    x, mask = normal(3, 5), torch.ones(3, 5, dtype=torch.bool)
    mask[1] = False
    out, (grad,) = train(lambda t: softmax(t, mask=mask), [x])
    assert (out[1] == 0).all() and (grad[1] == 0).all() and out.isfinite().all()
    cache = normal(2, 2, 6, 8, seed=4)
    out = decode_attention(normal(2, 2, 1, 8), cache, cache, torch.tensor([0, 4]))
    assert (out[0] == 0).all() and out.isfinite().all()


# ---- 2. what masks mean ------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["native", "torch", "blocked", "triton"])
@pytest.mark.parametrize("shape", [(5, 7), (2, 1, 1, 7), (1, 2, 5, 7), (2, 2, 5, 7)])
def test_02_masks_of_every_shape_bool_and_added(way: str, shape: tuple[int, ...]) -> None:
    q, k, v = qkv()
    keep = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.7
    keep[..., 0] = True
    added = normal(*shape, seed=9) * 3
    hard = added.masked_fill(~keep, -INF)
    lowest = added.masked_fill(~keep, torch.finfo(torch.float32).min)
    strided = torch.stack([added, added], -1)[..., 0]
    full = (2, 2, 5, 7)
    for mask in (keep, added, hard, lowest, strided, added.expand(full), keep.expand(full)):
        with pinned(way):
            close(attention(q, k, v, mask=mask), explicit(q, k, v, mask=mask))


@pytest.mark.parametrize("way", ["", "native", "blocked", "triton"])
@pytest.mark.parametrize("shape", [(5, 7), (1, 2, 5, 7), (2, 1, 1, 7), (2, 2, 5, 1), (1,)])
def test_02_bias_gradients_have_the_shape_of_the_bias(way: str, shape: tuple[int, ...]) -> None:
    q, k, v, bias = *qkv(), normal(*shape, seed=5)
    weight = normal(2, 2, 5, 8, seed=6)
    _, wanted = train(lambda a, b, c, d: explicit(a, b, c, bias=d), [q, k, v, bias], weight)
    with pinned(way):
        _, got = train(lambda a, b, c, d: attention(a, b, c, bias=d), [q, k, v, bias], weight)
    for found, exact in zip(got, wanted, strict=True):
        assert found.shape == exact.shape
        close(found, exact, 5e-5)


# ---- 3. NaN behind the padding -----------------------------------------------------------------


@pytest.mark.parametrize("poison", [math.nan, INF])
@pytest.mark.parametrize("way", ["native", "torch", "blocked", "triton"])
def test_03_padding_may_hold_anything(way: str, poison: float) -> None:
    q, k, v = qkv(sq=7)
    lengths = torch.tensor([4, 6])
    clean = [t.clone() for t in (k, v)]
    for item, length in enumerate(lengths.tolist()):
        k[item, :, length:], v[item, :, length:] = poison, poison
        for t in clean:
            t[item, :, length:] = 0
    with pinned(way):
        for causal in (False, True):

            def call(*t: Tensor) -> Tensor:
                return attention(*t, causal=causal, key_lengths=lengths)  # noqa: B023

            out, grads = train(call, [q, k, v])
            wanted, exact = train(call, [q, *clean])
            assert torch.equal(out, wanted) and out.isfinite().all()
            close(grads[0], exact[0])
            for g, e in zip(grads[1:], exact[1:], strict=True):
                assert g.isfinite().all()
                close(g, e)


def test_03_stale_cache_and_neighbouring_sequences_do_not_leak() -> None:
    cache = normal(2, 2, 9, 8)
    lengths, q = torch.tensor([3, 9]), normal(2, 2, 1, 8, seed=1)
    wanted = decode_attention(q, cache, cache, lengths)
    dirty = cache.clone()
    dirty[0, :, 3:] = math.nan
    assert torch.equal(decode_attention(q, dirty, dirty, lengths), wanted)
    packed, ends = normal(9, 2, 8), torch.tensor([0, 4, 9], dtype=torch.int32)
    wanted = attention_varlen(packed, packed, packed, ends, ends)
    dirty = packed.clone()
    dirty[4:] = math.nan
    assert torch.equal(attention_varlen(dirty, dirty, dirty, ends, ends)[:4], wanted[:4])


# ---- 4. causal with unequal lengths ------------------------------------------------------------


@pytest.mark.parametrize("way", ["native", "torch", "blocked", "triton"])
@pytest.mark.parametrize("sq, sk", [(1, 1), (2, 2), (1, 9), (9, 1), (3, 7), (7, 3), (2, 33)])
def test_04_causal_is_bottom_right(way: str, sq: int, sk: int) -> None:
    tensors = qkv(sq=sq, sk=sk)
    with pinned(way):
        out, grads = train(lambda *t: attention(*t, causal=True), tensors)
    wanted, exact = train(lambda *t: explicit(*t, causal=True), tensors)
    close(out, wanted)
    for g, e in zip(grads, exact, strict=True):
        close(g, e, 5e-5)


# ---- 5. lengths that are no multiple of anything -----------------------------------------------


@pytest.mark.parametrize("n", [3, 17, 97, 113, 127, 129, 1023, 1025])
def test_05_odd_lengths(n: int) -> None:
    q, k, v = qkv(b=1, hq=1, hkv=1, sq=n, sk=n)
    close(attention(q, k, v, causal=True), explicit(q, k, v, causal=True))
    x, w = normal(3, n), normal(n, seed=1)
    close(layer_norm(x, w), F.layer_norm(x.double(), (n,), w.double()))
    close(rms_norm(x, w), F.rms_norm(x.double(), (n,), w.double(), 1e-6))
    close(softmax(x), x.double().softmax(-1))
    close(log_softmax(x), x.double().log_softmax(-1))
    target = torch.tensor([0, n // 2, n - 1])
    close(cross_entropy(x, target), F.cross_entropy(x.double(), target))
    close(linear_act(x, normal(5, n, seed=2)), F.gelu(x.double() @ normal(5, n, seed=2).double().T))


@pytest.mark.parametrize("n", [3, 17, 33])
def test_05_nothing_outside_the_outputs_is_written(n: int) -> None:
    """Inputs lie inside larger tensors of NaN: a read past the end shows, and the frame stays."""
    frames = [torch.full((1, 2, n + 2, 10), math.nan) for _ in range(3)]
    inner = [f[:, :, 1 : n + 1, 1:9] for f in frames]
    for i, t in enumerate(inner):
        t.copy_(normal(1, 2, n, 8, seed=i))
    before = [f.clone() for f in frames]
    for way in ("torch", "triton"):
        with pinned(way):
            out, grads = train(lambda *t: attention(*t, causal=True), inner)
        assert out.isfinite().all() and all(g.isfinite().all() for g in grads)
    assert all(torch.equal(a.isnan(), b.isnan()) for a, b in zip(frames, before, strict=True))


# ---- 6. head dims ------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["", "triton"])
@pytest.mark.parametrize(
    "d, dv", [(8, 8), (40, 40), (59, 59), (80, 16), (96, 96), (1, 3), (64, 96)]
)
def test_06_any_head_dim_and_other_values(way: str, d: int, dv: int) -> None:
    tensors = qkv(b=1, d=d, dv=dv, sq=5, sk=6)
    with pinned(way):
        out, grads = train(lambda *t: attention(*t), tensors)
    wanted, exact = train(explicit, tensors)
    assert out.shape == (1, 2, 5, dv)
    close(out, wanted)
    for g, e in zip(grads, exact, strict=True):
        close(g, e, 5e-5)


@pytest.mark.parametrize("d", [111, 192, 256, 257, 300])
def test_06_wide_heads_work_or_say_so(d: int) -> None:
    from tilewise_kernels.errors import KernelUnavailable

    q, k, v = qkv(b=1, hq=1, hkv=1, d=d)
    close(attention(q, k, v), explicit(q, k, v))
    if d > 256:
        with pytest.raises(KernelUnavailable, match="head dim"), pinned("triton"):
            attention(q, k, v)


# ---- 7. grouped heads --------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["torch", "triton"])
@pytest.mark.parametrize("hq, hkv", [(3, 1), (5, 1), (7, 1), (6, 2), (4, 1)])
def test_07_groups(way: str, hq: int, hkv: int) -> None:
    q, k, v = qkv(b=1, hq=hq, hkv=hkv, sk=33)
    with pinned(way):
        out, grads = train(lambda *t: attention(*t), [q, k, v])
    wanted, exact = train(explicit, [q, k, v])
    close(out, wanted)
    for g, e in zip(grads, exact, strict=True):
        close(g, e, 5e-5)
    expanded = k[:, :1].expand(1, hq, 33, 8)  # stride 0, and a length that is 1 modulo 32
    close(attention(q, expanded, expanded), explicit(q, expanded, expanded))


def test_07_groups_that_do_not_divide_are_refused() -> None:
    q, k, v = qkv(hq=5, hkv=2)
    with pytest.raises(ValueError, match="multiple"):
        attention(q, k, v)
    with pytest.raises(ValueError, match="multiple"):
        decode_attention(q[:, :, :1], k, v, torch.tensor([2, 2]))


# ---- 8. strides --------------------------------------------------------------------------------


def layouts(shape: tuple[int, ...]) -> dict[str, Tensor]:
    """The same values laid out in different ways."""
    x = normal(*shape, seed=3)
    packed = torch.stack([x, x, x], -2).flatten(-2)[..., shape[-1] : 2 * shape[-1]]
    offset = torch.empty(x.numel() + 1)[1:].view(shape).copy_(x)  # off 16-byte alignment
    return {
        "packed": packed,
        "last stride 2": torch.stack([x, x], -1).flatten(-2)[..., ::2],
        "transposed": x.transpose(0, 1).contiguous().transpose(0, 1),
        "reversed order": x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
        "offset": offset,
    }  # fmt: skip


@pytest.mark.parametrize("name", list(layouts((2, 2, 5, 8))))
def test_08_layouts_do_not_matter(name: str) -> None:
    x = layouts((2, 2, 5, 8))[name]
    plain = x.contiguous()
    w = normal(8, seed=1)
    w1, w2 = normal(6, 8, seed=4), normal(8, 6, seed=5)
    cos, sin = normal(5, 4, seed=6), normal(5, 4, seed=7)
    for call in (
        lambda t: attention(t, t, t, causal=True),
        lambda t: layer_norm(t, w, w, residual=t),
        lambda t: rms_norm(t, w, residual=t),
        lambda t: softmax(t, causal=True),
        lambda t: log_softmax(t),
        lambda t: feed_forward(t, w1, None, w2, None, activation="silu", gate=w1),
        lambda t: rotary(t, t, cos, sin)[0],
        lambda t: cross_entropy(t, torch.zeros(2, 2, 5, dtype=torch.long), reduction="none"),
    ):
        out, (grad,) = train(call, [x])
        wanted, (exact,) = train(call, [plain])
        close(out, wanted)
        close(grad, exact)
        leaf = x.detach().requires_grad_()
        call(leaf).sum().backward()  # stride-0 upstream gradient
        close(leaf.grad, exact)


# ---- 9. huge, equal and odd scores -------------------------------------------------------------


@pytest.mark.parametrize("way", ["native", "torch", "blocked", "triton"])
@pytest.mark.parametrize("scale", [1e4, 0.0, -0.5])
def test_09_huge_equal_and_negated_scores(way: str, scale: float) -> None:
    q, k, v = qkv()
    with pinned(way):
        close(attention(q, k, v, scale=scale), explicit(q, k, v, scale=scale), 3e-3)


@pytest.mark.parametrize("way", ["", "triton"])
@pytest.mark.parametrize("softcap", [1.0, 30.0])
def test_09_softcap(way: str, softcap: float) -> None:
    tensors = [t * 4 for t in qkv()]
    with pinned(way):
        out, grads = train(lambda *t: attention(*t, softcap=softcap), tensors)
    wanted, exact = train(lambda *t: explicit(*t, softcap=softcap), tensors)
    close(out, wanted, 5e-5)
    for g, e in zip(grads, exact, strict=True):
        close(g, e, 2e-4)


def test_09_a_score_of_minus_a_million_is_a_number() -> None:
    q, k, v = qkv()
    mask = torch.full((5, 7), -1e6)
    close(attention(q, k, v, mask=mask), explicit(q, k, v, mask=mask), 1e-1)  # ulp(1e6) is 0.06
    close(softmax(torch.full((2, 4), -1e6)), torch.full((2, 4), 0.25))
    close(log_softmax(torch.tensor([[1e4, 0.0, -1e4]])), torch.tensor([[0.0, -1e4, -2e4]]))
