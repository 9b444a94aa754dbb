"""Attention on a GPU: accuracy by dtype, head dim and mask; hard cases; the same bits every time.

Shapes: q [B, Hq, Sq, D]; k [B, Hkv, Sk, D]; v [B, Hkv, Sk, Dv].
"""

import math
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tilewise_kernels import attention, dropout, force

pytestmark = pytest.mark.gpu
HALF, BF16, FLOAT = torch.float16, torch.bfloat16, torch.float32
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """One call. mask: "", or "bool" / "float" and the shape it is broadcast from; bias: its shape.

    options: window, softcap, dropout_p as attention takes them.
    """

    name: str
    heads: tuple[int, int]
    lengths: tuple[int, int]
    D: int
    dtype: torch.dtype
    causal: bool = False
    mask: str = ""
    mask_shape: str = ""  # of the letters BHQK and 1
    key_lengths: bool = False
    B: int = 2
    bias: str = ""  # of the letters BHQK and 1
    alibi: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    Dv: int = 0  # 0: D


# Every head dim, dtype, group and mask shape once or more, at lengths round the tile sizes.
CASES = [
    Case("d8", (4, 4), (97, 97), 8, HALF, causal=True),
    Case("d40, cross", (4, 2), (113, 200), 40, BF16),
    Case("d59, odd", (6, 2), (127, 129), 59, BF16, causal=True),
    Case("d59, float32", (3, 1), (97, 97), 59, FLOAT, causal=True),
    Case("d64, group of 3", (6, 2), (1023, 1023), 64, BF16, causal=True),
    Case("d64, full", (4, 4), (1024, 1024), 64, BF16),
    Case("d64, half", (4, 4), (513, 513), 64, HALF),
    Case("d64, float32", (4, 4), (257, 257), 64, FLOAT, causal=True),
    Case("d80, group of 5", (5, 1), (129, 1025), 80, HALF, causal=True),
    Case("d96, group of 7", (7, 1), (200, 97), 96, BF16, causal=True),
    Case("d128, causal", (4, 4), (1025, 1025), 128, BF16, causal=True),
    Case("d128, full", (4, 2), (1024, 1024), 128, HALF),
    Case("d128, float32", (2, 2), (129, 257), 128, FLOAT),
    Case("d192", (4, 2), (127, 257), 192, BF16, causal=True),
    Case("d256", (2, 1), (129, 127), 256, BF16, causal=True),
    Case("d256, float32", (2, 1), (65, 127), 256, FLOAT),
    Case("one query", (8, 2), (1, 1023), 128, BF16, causal=True),
    Case("one key", (2, 2), (17, 1), 64, HALF),
    Case("bool mask over keys", (4, 4), (129, 200), 64, BF16, mask="bool", mask_shape="B11K"),
    Case("bool mask, causal", (4, 2), (257, 257), 128, BF16, True, "bool", "QK"),
    Case("bool mask, d256", (2, 2), (129, 129), 256, HALF, mask="bool", mask_shape="BHQK"),
    Case("float mask", (4, 4), (200, 129), 64, BF16, mask="float", mask_shape="1HQK"),
    Case("float mask, causal", (6, 2), (129, 129), 128, HALF, True, "float", "QK"),
    Case("float mask, float32", (4, 4), (97, 113), 64, FLOAT, mask="float", mask_shape="1HQK"),
    Case("key lengths", (4, 4), (129, 257), 64, BF16, key_lengths=True),
    Case("key lengths, causal", (6, 2), (257, 257), 128, BF16, causal=True, key_lengths=True),
    Case("bias [Sq, Sk]", (4, 2), (129, 200), 64, BF16, bias="QK"),
    Case("bias [1, H, Sq, Sk], causal, padding", (4, 4), (257, 257), 64, BF16, True, bias="1HQK",
         key_lengths=True),
    Case("bias over keys, under a mask", (4, 2), (129, 129), 128, HALF, mask="bool",
         mask_shape="1HQK", bias="B11K"),
    Case("bias [B, Hq, 1, 1], float32", (6, 2), (65, 129), 64, FLOAT, bias="BH11"),
    Case("bias of one element", (2, 2), (129, 65), 64, BF16, bias="1"),
    Case("alibi", (8, 2), (257, 513), 128, BF16, alibi=True),
    Case("alibi, causal, float32", (3, 1), (129, 129), 64, FLOAT, True, alibi=True),
    Case("window", (4, 2), (1023, 1023), 64, BF16, options={"window": (200, 0)}),
    Case("two-sided window, more keys", (4, 4), (257, 513), 128, HALF, options={"window": (40, 9)}),
    Case("window, more queries, padding", (2, 1), (513, 257), 64, BF16, key_lengths=True,
         options={"window": (100, None)}),
    Case("softcap", (4, 2), (257, 257), 128, BF16, True, options={"softcap": 3.0}),
    Case("dropout", (4, 2), (257, 129), 64, HALF, True, options={"dropout_p": 0.3}),
    Case("wider values", (4, 2), (129, 257), 64, BF16, True, Dv=128),
    Case("narrower values", (4, 2), (129, 257), 96, HALF, Dv=40),
    Case("group of 7, everything", (7, 1), (129, 200), 64, BF16, True, "bool", "B11K", True,
         bias="HQK", alibi=True, options={"window": (90, 3), "softcap": 5.0, "dropout_p": 0.2}),
]  # fmt: skip


def shrink(case: Case) -> Case:
    """What the interpreter has time for; it multiplies bfloat16 wrongly."""
    dtype = HALF if case.dtype == BF16 else case.dtype
    sq, sk = (max(1, n * 33 // 1025) for n in case.lengths)
    window = tuple(n and -(-n // 30) for n in case.options.get("window", ()))
    options = case.options | ({"window": window} if window else {})
    return replace(case, dtype=dtype, lengths=(sq, sk), B=1 + case.key_lengths, options=options)


def make(case: Case, normal) -> tuple[Tensors, dict]:
    """Tensors that differentiate, and the options of the call."""
    (hq, hkv), (sq, sk) = case.heads, case.lengths
    tensors = {"q": normal(case.B, hq, sq, case.D, dtype=case.dtype)}
    for name, width in (("k", case.D), ("v", case.Dv or case.D)):
        tensors[name] = normal(case.B, hkv, sk, width, dtype=case.dtype)
    options: dict = {"causal": case.causal} | case.options
    sizes = {"B": case.B, "H": hq, "Q": sq, "K": sk, "1": 1}
    if case.bias:
        tensors["bias"] = normal(*(sizes[letter] for letter in case.bias))
    if case.alibi:
        options["alibi_slopes"] = normal(hq).abs() / 8
    if case.mask:
        drawn = normal(*(sizes[letter] for letter in case.mask_shape))
        kept = drawn > -0.8
        options["mask"] = kept if case.mask == "bool" else drawn.masked_fill(~kept, -math.inf)
    if case.key_lengths:
        lengths = [sk, sk // 3, *[1] * (case.B - 2)]
        options["key_lengths"] = torch.tensor(lengths, device=tensors["q"].device)
    return tensors, options


def eager(
    t: Tensors, causal=False, mask=None, key_lengths=None, scale=None, window=None, softcap=None,
    alibi_slopes=None, dropout_p=0.0,
) -> Tensor:  # fmt: skip
    """The formula in the dtype of q; rows without keys give 0. Draws the seed that run draws."""
    q, (sq, sk) = t["q"], (t["q"].shape[2], t["k"].shape[2])
    group = q.shape[1] // t["k"].shape[1]
    k, v = (t[name].repeat_interleave(group, 1) for name in "kv")
    scores = q @ k.mT * (q.shape[3] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if "bias" in t:
        scores = scores + t["bias"].to(scores.dtype)
    ahead = torch.arange(sk, device=q.device)
    ahead = ahead - torch.arange(sk - sq, sk, device=q.device)[:, None]
    if alibi_slopes is not None:
        scores = scores - (alibi_slopes[:, None, None] * ahead.abs()).to(scores.dtype)
    left, right = window or (None, None)
    keep = torch.ones_like(ahead, dtype=torch.bool)
    for bound in (0 if causal else None, right):
        if bound is not None:
            keep = keep & (ahead <= bound)
    if left is not None:
        keep = keep & (ahead >= -left)
    if key_lengths is not None:
        keep = keep & (torch.arange(sk, device=q.device) < key_lengths[:, None, None, None])
    if mask is not None and mask.dtype == torch.bool:
        keep = keep & mask
    elif mask is not None:
        scores = scores + mask.to(scores.dtype)
        keep = keep & (mask != -math.inf)
    lowest = scores.masked_fill(~keep, torch.finfo(scores.dtype).min)
    p = torch.softmax(lowest, -1).masked_fill(~keep, 0)
    if dropout_p:
        torch.manual_seed(5)
        rows = torch.arange(p.shape[0] * p.shape[1] * sq, device=q.device).view(*p.shape[:3], 1)
        columns = torch.arange(sk, device=q.device)
        kept = dropout.kept(dropout.draw_seed(q.device), rows, columns, dropout_p)
        p = p * kept * dropout.scale(dropout_p)
    return p @ v


def run(t: Tensors, **options) -> Tensor:
    torch.manual_seed(5)  # of dropout: as in eager
    with force("triton"):
        return attention(**t, **options)


def gradients(t: Tensors, grad: Tensor | None = None, **options) -> list[Tensor]:
    """out, dq, dk, dv; of out.sum() without an upstream gradient."""
    leaves = {name: x.detach().requires_grad_() for name, x in t.items()}
    out = run(leaves, **options)
    if grad is None:
        return [out, *torch.autograd.grad(out.sum(), list(leaves.values()))]
    return [out, *torch.autograd.grad(out, list(leaves.values()), grad)]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    for got, wanted in zip(found, expected, strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_accuracy(case: Case, accurate, normal, pick) -> None:
    case = pick(case, shrink(case))
    tensors, options = make(case, normal)
    accurate(lambda t: run(t, **options), lambda t: eager(t, **options), tensors)


@pytest.mark.parametrize("dtype", [FLOAT, BF16, HALF], ids=str)
def test_unforced_accuracy(dtype: torch.dtype, accurate, normal, pick) -> None:
    case = Case("", (6, 2), pick((257, 257), (17, 17)), 64, dtype, causal=True)
    tensors, _ = make(case, normal)
    accurate(
        lambda t: attention(t["q"], t["k"], t["v"], causal=True),
        lambda t: eager(t, causal=True),
        tensors,
    )


def test_float64_is_accurate_too(normal, accurate, pick) -> None:
    case = Case("", (4, 2), pick((129, 129), (17, 17)), 64, torch.float64, causal=True)
    tensors, _ = make(case, normal)
    accurate(
        lambda t: attention(t["q"], t["k"], t["v"], causal=True),
        lambda t: eager(t, causal=True),
        tensors,
    )


# ---- rows without keys, and what must not leak -------------------------------------------------


@pytest.mark.parametrize("dtype", [FLOAT, HALF], ids=str)
def test_rows_without_keys(dtype: torch.dtype, normal, pick, device) -> None:
    """More queries than keys under causality, a whole item without keys, and rows masked False."""
    sq, sk = pick((200, 120), (20, 12))
    tensors = {"q": normal(3, 4, sq, 64, dtype=dtype)}
    tensors |= {name: normal(3, 2, sk, 64, dtype=dtype) for name in "kv"}
    mask = torch.ones(sq, sk, dtype=torch.bool, device=device)
    mask[-3:] = False
    lengths = torch.tensor([sk, 0, 5], device=device)
    options: dict[str, Any] = {"mask": mask, "key_lengths": lengths, "causal": True}
    out, dq, dk, dv = gradients(tensors, **options)
    dead = torch.zeros(3, sq, dtype=torch.bool, device=device)
    dead[:, : sq - sk] = dead[:, -3:] = dead[1] = True
    for tensor in (out, dq):
        assert (tensor.movedim(1, 2)[dead] == 0).all()
    assert all(x.isfinite().all() for x in (out, dq, dk, dv))
    assert (dk[1] == 0).all() and (dv[1] == 0).all() and (dk[2, :, 5:] == 0).all()
    with force("triton"):
        _, lse = attention(tensors["q"], tensors["k"], tensors["v"], **options, return_lse=True)
    assert (lse.movedim(1, 2)[dead] == -math.inf).all() and lse.movedim(1, 2)[
        ~dead
    ].isfinite().all()


@pytest.mark.parametrize("junk", [math.nan, math.inf])
def test_junk_past_key_lengths_never_leaks(junk: float, normal, pick, device) -> None:
    s = pick(300, 20)
    tensors = {name: normal(2, 2, s, 64, dtype=HALF) for name in "qkv"}
    lengths = torch.tensor([s, s // 3], device=device)
    grad = normal(2, 2, s, 64, dtype=HALF)
    clean = gradients(tensors, grad, key_lengths=lengths, causal=True)
    for name in "kv":
        tensors[name][1, :, s // 3 :] = junk
    assert_same(gradients(tensors, grad, key_lengths=lengths, causal=True), clean)


@pytest.mark.parametrize("scale", [1e4, 0.0, -0.5])
def test_extreme_scales(scale: float, normal, pick, accurate) -> None:
    case = Case("", (2, 2), pick((257, 257), (17, 17)), 64, FLOAT)
    tensors, _ = make(case, normal)
    with torch.no_grad():
        exact = eager({n: t.double() for n, t in tensors.items()}, scale=scale)
        plain = eager(tensors, scale=scale)
        got = run(tensors, scale=scale)
    allowed = 2 * (plain - exact).abs().max() + 1e-5 * exact.abs().max()
    assert (got - exact).abs().max() <= allowed


# ---- strides -----------------------------------------------------------------------------------


def test_strides_change_no_bit(normal, pick) -> None:
    """Packed, transposed, every second element, and off a 16-byte boundary."""
    b, h, s, d = 2, 4, pick(257, 17), 64
    packed = normal(b, s, 3, h, d, dtype=HALF)
    plain = {name: packed[:, :, i].transpose(1, 2) for i, name in enumerate("qkv")}
    grad = normal(b, h, s, d, dtype=HALF)
    expected = gradients({n: t.contiguous() for n, t in plain.items()}, grad, causal=True)
    doubled = {n: t.repeat_interleave(2, 3)[..., ::2] for n, t in plain.items()}
    shifted = {}
    for name, tensor in plain.items():
        buffer = tensor.new_empty(tensor.numel() + 1)
        shifted[name] = buffer[1:].view(tensor.shape).copy_(tensor)
    for tensors in (plain, doubled, shifted):
        assert_same(gradients(tensors, grad, causal=True), expected)
    slow = grad.transpose(1, 2).contiguous().transpose(1, 2)
    assert_same(gradients(plain, slow, causal=True), expected)


def test_expanded_keys_and_gradients(normal, pick, accurate) -> None:
    """33 keys of stride 0 over the batch, and the stride-0 gradient of a sum."""
    q, kv = normal(4, 6, pick(129, 9), 64), normal(2, 1, 2, 33, 64)
    tensors = {"q": q, "k": kv[0].expand(4, 2, 33, 64), "v": kv[1].expand(4, 2, 33, 64)}
    accurate(run, eager, tensors)
    assert_same(gradients(tensors), gradients(tensors, torch.ones_like(q)))


# ---- the same bits every time ------------------------------------------------------------------


@pytest.mark.parametrize("D", [64, 128])
def test_backward_repeats_bit_for_bit(D: int, normal, pick) -> None:
    s = pick(1025, 17)
    tensors = {"q": normal(2, 6, s, D, dtype=HALF)}
    tensors |= {name: normal(2, 2, s, D, dtype=HALF) for name in "kv"}
    grad = normal(2, 6, s, D, dtype=HALF)
    first = gradients(tensors, grad, causal=True)
    for _ in range(pick(50, 2)):
        assert_same(gradients(tensors, grad, causal=True), first)


def test_dropout_and_bias_repeat_bit_for_bit(normal, pick) -> None:
    case = Case("", (4, 2), (pick(513, 17),) * 2, 64, HALF, True, bias="1HQK", alibi=True,
                options={"dropout_p": 0.2})  # fmt: skip
    tensors, options = make(case, normal)
    grad = normal(*tensors["q"].shape, dtype=HALF)
    first = gradients(tensors, grad, **options)
    for _ in range(pick(50, 2)):
        assert_same(gradients(tensors, grad, **options), first)


def test_no_race_at_a_large_batch(normal, pick) -> None:
    b, h, s = pick((60, 4, 239), (2, 2, 17))
    tensors = {name: normal(b, h, s, 64, dtype=HALF) for name in "qkv"}
    grad = normal(b, h, s, 64, dtype=HALF)
    first = gradients(tensors, grad, causal=True)
    for _ in range(pick(250, 2)):
        assert_same(gradients(tensors, grad, causal=True), first)


def test_inputs_are_not_changed(normal, pick) -> None:
    tensors = {name: normal(2, 2, pick(129, 9), 64, dtype=HALF) for name in "qkv"}
    before = {name: t.clone() for name, t in tensors.items()}
    grad = normal(*tensors["q"].shape, dtype=HALF)
    kept = grad.clone()
    gradients(tensors, grad)
    assert_same([*tensors.values(), grad], [*before.values(), kept])


# ---- sizes that only a GPU reaches -------------------------------------------------------------


def test_more_heads_than_a_grid_dimension(normal, pick) -> None:
    heads, items = pick((1100, 60), (3, 2))  # 66000 programs and more
    tensors = {name: normal(items, heads, 16, 16, dtype=HALF) for name in "qkv"}
    out = run(tensors, causal=True)
    for place in ((0, 0), (items - 1, heads - 1)):
        one = {name: t[place][None, None] for name, t in tensors.items()}
        assert torch.equal(out[place], run(one, causal=True)[0, 0])


def test_strides_past_31_bits(normal, pick, room, device) -> None:
    """The second batch item lies more than 2^31 elements after the first."""
    room(20)
    gap = pick(2**31 + 64, 4096)
    s, expected, far = pick(129, 9), {}, {}
    for name in "qkv":
        expected[name] = normal(2, 1, s, 64, dtype=HALF)
        buffer = torch.empty(gap + s * 64, dtype=HALF, device=device)
        far[name] = buffer.as_strided((2, 1, s, 64), (gap, s * 64, 64, 1)).copy_(expected[name])
    grad = normal(2, 1, s, 64, dtype=HALF)
    assert_same(gradients(far, grad, causal=True), gradients(expected, grad, causal=True))


def test_outputs_past_31_bits(normal, pick, room) -> None:
    """More than 2^31 elements of q, out and dq; the last queries must agree with a small call."""
    room(40)
    sq, tail = pick(2**25 + 128, 160), 64
    q, k, v = normal(1, 1, sq, 64, dtype=HALF), *(normal(1, 1, 16, 64, dtype=HALF) for _ in "kv")
    out, dq, *_ = gradients({"q": q, "k": k, "v": v})
    small = gradients({"q": q[:, :, -tail:], "k": k, "v": v})
    assert_same([out[:, :, -tail:], dq[:, :, -tail:]], small[:2])
