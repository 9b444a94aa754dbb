"""The attention kernels in Triton's interpreter: float32 and float16 (its bfloat16 dot is wrong).

Every output buffer is poisoned with NaN and fenced with canaries, and every launch is counted.
"""

import math
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from tilewise_kernels import (
    attention_backward_triton,
    attention_tiles_triton,
    attention_triton,
    configs,
    dropout,
)
from tilewise_kernels.attention_tiles_triton import Call
from tilewise_kernels.attention_triton import backward, forward
from tilewise_kernels.launch import Launch

FENCE, CANARY = 256, 1234


@pytest.fixture(autouse=True)
def watched(monkeypatch):
    """Poison and fence what the launchers allocate; yield the names of the kernels that ran."""
    buffers, ran, run = [], [], Launch.run

    def poisoned(*size, **options):
        shape = torch.Size(size[0] if len(size) == 1 else size)
        buffer = torch.full((shape.numel() + 2 * FENCE,), CANARY, **options)
        buffers.append(buffer)
        poison = math.nan if buffer.is_floating_point() else 2**30
        return buffer[FENCE:-FENCE].fill_(poison).view(shape)

    def counted(self, device):
        assert self.grid[0] <= 64, "keep interpreted launches small"
        ran.append(self.kernel.__name__)
        run(self, device)

    namespace = SimpleNamespace(**vars(torch) | {"empty": poisoned})
    for module in (attention_triton, attention_backward_triton, attention_tiles_triton):
        monkeypatch.setattr(module, "torch", namespace)
    monkeypatch.setattr(Launch, "run", counted)
    yield ran
    for buffer in buffers:
        fences = torch.cat([buffer[:FENCE], buffer[-FENCE:]])
        assert (fences == CANARY).all(), "wrote outside"


# ---- against float64 ---------------------------------------------------------------------------


@dataclass
class Case:
    """One call; `mask` is the shape of the mask before it is expanded, `lengths` key_lengths."""

    name: str
    heads: tuple[int, int]  # Hq, Hkv
    lengths: tuple[int, int]  # Sq, Sk
    D: int
    DV: int | None = None
    B: int = 1
    dtype: torch.dtype = torch.float32
    causal: bool = False
    mask: tuple[int, ...] | None = None
    mask_dtype: torch.dtype = torch.bool
    key_lengths: list[int] | None = None
    scale: float | None = None
    bias: tuple[int, ...] | None = None
    window: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    alibi: bool = False
    dropout_p: float = 0.0


HALF, BOOL, FLOAT = torch.float16, torch.bool, torch.float32
CASES = [
    Case("one query, one key", (1, 1), (1, 1), 8),
    Case("two by two, causal", (2, 2), (2, 2), 16, causal=True),
    Case("three by three, odd head", (2, 2), (3, 3), 59, causal=True),
    Case("seventeen", (2, 1), (17, 17), 40, causal=True),
    Case("a tile less one", (1, 1), (63, 63), 64, dtype=HALF, causal=True),
    Case("whole tiles", (1, 1), (64, 64), 64, dtype=HALF, causal=True),
    Case("a tile and one", (1, 1), (65, 65), 64, causal=True),
    Case("long, not causal", (1, 1), (129, 129), 16, dtype=HALF),
    Case("long, causal", (1, 1), (129, 129), 80, causal=True),
    Case("decode: one query, causal", (4, 2), (1, 97), 64, B=2, causal=True),
    Case("more keys than queries, causal", (1, 1), (33, 97), 96, causal=True),
    Case("more queries than keys, causal: rows without keys", (2, 2), (97, 33), 40, causal=True),
    Case("cross attention", (2, 2), (17, 65), 32, B=2, dtype=HALF),
    Case("group of three", (3, 1), (33, 33), 16, B=2, causal=True),
    Case("group of five", (10, 2), (17, 33), 8, dtype=HALF, causal=True),
    Case("narrower values", (2, 1), (33, 65), 40, DV=16),
    Case("wider values", (2, 1), (33, 65), 8, DV=59, causal=True),
    Case("mask [Sq, Sk]", (2, 2), (33, 65), 16, B=2, mask=(33, 65)),
    Case("mask [B, 1, 1, Sk]", (3, 1), (33, 49), 16, B=2, mask=(2, 1, 1, 49), dtype=HALF),
    Case("mask [1, H, Sq, Sk], causal", (2, 2), (33, 33), 40, B=2, mask=(1, 2, 33, 33),
         causal=True),
    Case("float mask [Sq, Sk]", (2, 1), (33, 65), 16, B=2, mask=(33, 65), mask_dtype=FLOAT),
    Case("float16 mask [B, 1, 1, Sk]", (2, 2), (17, 49), 64, B=2, mask=(2, 1, 1, 49),
         mask_dtype=HALF, dtype=HALF),
    Case("float mask [1, H, Sq, Sk], causal", (4, 2), (33, 49), 16, mask=(1, 4, 33, 49),
         mask_dtype=FLOAT, causal=True),
    Case("key lengths", (2, 1), (33, 65), 16, B=3, key_lengths=[65, 20, 0]),
    Case("key lengths, causal, group", (6, 2), (33, 33), 8, B=2, key_lengths=[33, 17],
         causal=True),
    Case("key lengths under a mask", (2, 2), (17, 65), 32, B=2, key_lengths=[64, 3], mask=(17, 65)),
    Case("negative scale", (1, 1), (33, 33), 16, causal=True, scale=-0.7),
    Case("scale 0", (1, 1), (17, 33), 16, scale=0.0),
    Case("bias [1, H, Sq, Sk]", (3, 1), (33, 17), 8, B=2, bias=(1, 3, 33, 17)),
    Case("bias [B, 1, 1, Sk], causal", (2, 2), (33, 49), 16, B=2, bias=(2, 1, 1, 49), causal=True),
    Case("bias [B, H, Sq, 1], lengths", (2, 1), (33, 33), 16, B=2, bias=(2, 2, 33, 1),
         key_lengths=[33, 7]),
    Case("bias [1, 1, 1, 1]", (2, 1), (33, 17), 16, B=2, bias=(1, 1, 1, 1), dtype=HALF),
    Case("bias [1, H, Sq, Sk] of one key", (2, 1), (33, 1), 16, B=2, bias=(1, 2, 33, 1)),
    Case("bias under a bool and a window", (2, 1), (33, 65), 40, bias=(1, 2, 33, 65),
         mask=(33, 65), window=(20, 7)),
    Case("bias under a float mask, causal", (2, 1), (33, 33), 16, bias=(1, 1, 33, 33),
         mask=(1, 2, 33, 33), mask_dtype=FLOAT, causal=True),
    Case("window to the left, causal", (2, 1), (65, 65), 16, window=(20, 0), causal=True),
    Case("window of one key", (1, 1), (65, 65), 8, window=(0, 0)),
    Case("window to both sides", (1, 1), (65, 97), 40, window=(33, 5), dtype=HALF),
    Case("window to the right alone", (2, 1), (33, 65), 16, window=(-1, 3)),
    Case("window to the left alone, more queries", (1, 1), (97, 33), 16, window=(12, -1)),
    Case("wide window, causal, lengths", (1, 1), (65, 97), 16, B=2, window=(64, -1), causal=True,
         key_lengths=[97, 50]),
    Case("window wider than everything", (1, 1), (33, 17), 16, window=(10**9, 10**9)),
    Case("softcap", (5, 1), (17, 33), 16, softcap=1.5, scale=1.0),
    Case("softcap, window, causal, group", (3, 1), (65, 65), 40, softcap=20.0, window=(30, 0),
         causal=True, dtype=HALF),
    Case("softcap, negative scale, bias", (2, 1), (17, 33), 16, softcap=2.0, scale=-0.7,
         bias=(1, 2, 17, 33)),
    Case("alibi", (3, 1), (33, 33), 16, alibi=True),
    Case("alibi, causal, more keys, half", (7, 1), (17, 33), 64, alibi=True, causal=True,
         dtype=HALF),
    Case("alibi, softcap, window, mask", (2, 1), (65, 33), 8, alibi=True, softcap=3.0,
         window=(40, 10), mask=(65, 33)),
    Case("dropout", (2, 1), (33, 33), 16, B=2, dropout_p=0.4),
    Case("dropout, causal, half", (3, 1), (33, 65), 64, DV=40, causal=True, dropout_p=0.1,
         dtype=HALF),
    Case("dropout under a mask, bias", (2, 1), (33, 17), 8, B=2, mask=(2, 1, 1, 17),
         bias=(1, 2, 33, 17), dropout_p=0.3),
    Case("all of it", (2, 1), (33, 33), 16, DV=40, B=2, mask=(1, 1, 33, 33), bias=(1, 2, 33, 33),
         key_lengths=[33, 20], causal=True, window=(20, 2), softcap=4.0, alibi=True, dropout_p=0.2),
]  # fmt: skip


def make(case: Case, seed: int = 0) -> tuple[dict, Tensor]:
    """Arguments of `forward` for a case, and an upstream gradient."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(case.dtype)

    (Hq, Hkv), (Sq, Sk), DV = case.heads, case.lengths, case.DV or case.D
    mask = None
    if case.mask is not None and case.mask_dtype == BOOL:
        mask = torch.rand(case.mask, generator=generator) < 0.6
    elif case.mask is not None:
        mask = (2 * torch.randn(case.mask, generator=generator)).to(case.mask_dtype)
        mask = mask.masked_fill(torch.rand(case.mask, generator=generator) < 0.2, -math.inf)
    arguments = {
        "q": normal(case.B, Hq, Sq, case.D),
        "k": normal(case.B, Hkv, Sk, case.D),
        "v": normal(case.B, Hkv, Sk, DV),
        "mask": None if mask is None else mask.expand(case.B, Hq, Sq, Sk),
        "bias": None if case.bias is None else normal(*case.bias),
        "key_lengths": None if case.key_lengths is None else torch.tensor(case.key_lengths),
        "alibi_slopes": 2.0 ** -torch.arange(1.0, Hq + 1) if case.alibi else None,
        "seed": torch.tensor([-(2**40) - 12345]) if case.dropout_p else None,
        "causal": case.causal,
        "left": case.window[0],
        "right": case.window[1],
        "softcap": case.softcap,
        "scale": case.D**-0.5 if case.scale is None else case.scale,
        "dropout_p": case.dropout_p,
    }
    return arguments, normal(case.B, Hq, Sq, DV)


def kept_of(seed: Tensor, B: int, Hq: int, Sq: int, Sk: int, p: float) -> Tensor:
    """What dropout leaves, over 1 - p: [B, Hq, Sq, Sk]."""
    rows = torch.arange(B * Hq * Sq).view(B, Hq, Sq, 1)
    return dropout.kept(seed, rows, torch.arange(Sk), p) * dropout.scale(p)


def eager(
    q, k, v, mask=None, bias=None, key_lengths=None, alibi_slopes=None, seed=None, causal=False,
    left=-1, right=-1, softcap=0.0, scale=1.0, dropout_p=0.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention as a formula, in the dtype of q: out and lse, 0 and -inf for rows without keys."""
    (B, Hq, Sq, _), Sk, group = q.shape, k.shape[2], q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = q @ k.mT * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias
    ahead = torch.arange(Sk) - torch.arange(Sq)[:, None] - (Sk - Sq)  # keys after the diagonal
    if alibi_slopes is not None:
        scores = scores - alibi_slopes[:, None, None].to(q.dtype) * ahead.abs()
    keep = ahead <= (0 if causal else Sq)
    keep = keep & (ahead <= right) if right >= 0 else keep
    keep = keep & (ahead >= -left) if left >= 0 else keep
    if key_lengths is not None:
        keep = keep & (torch.arange(Sk) < key_lengths[:, None, None, None])
    if mask is not None and mask.dtype == torch.bool:
        keep = keep & mask
    elif mask is not None:
        scores = scores + mask.to(scores.dtype)
        keep = keep & (mask != -math.inf)
    scores = scores.masked_fill(~keep, -math.inf)
    p = torch.softmax(scores, -1).masked_fill(~keep.expand_as(scores).any(-1, keepdim=True), 0)
    if seed is not None:
        p = p * kept_of(seed, B, Hq, Sq, Sk, dropout_p).to(p.dtype)
    return p @ v, torch.logsumexp(scores, -1)


def eager_all(arguments: dict, grad_out: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """out, lse, dq, dk, dv and perhaps dbias of the formula evaluated in `dtype`."""
    names = [n for n in ("q", "k", "v", "bias") if arguments[n] is not None]
    leaves = {n: arguments[n].detach().to(dtype).requires_grad_() for n in names}
    out, lse = eager(**arguments | leaves)
    grads = torch.autograd.grad(out, list(leaves.values()), grad_out.to(dtype))
    return [out.detach(), lse.detach(), *(grad.nan_to_num(0) for grad in grads)]


def triton_all(arguments: dict, grad_out: Tensor) -> list[Tensor]:
    """out, lse, dq, dk, dv and perhaps dbias of the kernels."""
    out, lse = forward(**arguments)
    needs = [True, True, True, arguments["bias"] is not None]
    found = backward(grad_out, out=out, lse=lse, needs=needs, **arguments)
    return [out, lse, *found[: 3 + needs[3]]]


def named(results: list[Tensor]) -> dict[str, Tensor]:
    """The five or six results by name."""
    return dict(zip(["out", "lse", "dq", "dk", "dv", "dbias"], results, strict=False))


def assert_same_bits(a: list[Tensor], b: list[Tensor]) -> None:
    """The same results from two calls, bit for bit."""
    for name, x in named(a).items():
        assert torch.equal(x, named(b)[name]), name


@pytest.fixture
def check(assert_accurate):
    """check(arguments, grad_out): the project's accuracy rule, and what the results look like."""

    def compare(arguments: dict, grad_out: Tensor) -> None:
        exact = named(eager_all(arguments, grad_out, torch.float64))
        plain = named(eager_all(arguments, grad_out, grad_out.dtype))
        ours = named(triton_all(arguments, grad_out))
        assert_accurate(ours, plain, exact)
        for name, tensor in ours.items():
            assert tensor.is_contiguous(), name
            assert tensor.dtype == (torch.float32 if name == "lse" else grad_out.dtype), name

    return compare


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_accuracy(case, watched, check):
    arguments, grad_out = make(case)
    before = {n: x.clone() for n, x in arguments.items() if isinstance(x, Tensor)}
    check(arguments, grad_out)
    listed = ["classify_kernel", "list_kernel"] if case.mask and case.mask_dtype == BOOL else []
    kernels = [*listed, "forward_kernel", *listed, "backward_dq_kernel"]
    kernels += [*listed, "backward_dkv_kernel"] + ["backward_dbias_kernel"] * bool(case.bias)
    assert watched == kernels
    assert all(torch.equal(arguments[n], x) for n, x in before.items()), "an input was changed"


def test_logits_of_1e4():
    """Probabilities are rebuilt from a float32 lse, which at 1e4 resolves 1e-3; where they are 0
    and 1, dq and dk are differences that cancel, times scale."""
    arguments, grad_out = make(Case("", (1, 1), (33, 49), 16, scale=1500.0))
    exact = named(eager_all(arguments, grad_out, torch.float64))
    assert exact["lse"].abs().max() > 1e4
    for name, ours in named(triton_all(arguments, grad_out)).items():
        relative, absolute = (1e-5, 0.0) if name in ("out", "lse") else (3e-3, 1e-5 * 1500.0)
        limit = relative * exact[name].abs().max() + absolute
        assert (ours - exact[name]).abs().max() <= limit, name


# ---- rows and keys that do not exist -----------------------------------------------------------


@pytest.mark.parametrize("how", ["bool", "float", "lengths", "causal"])
def test_rows_without_keys(how, check):
    Sq, Sk = (40, 20) if how == "causal" else (20, 40)
    case = Case(how, (2, 1), (Sq, Sk), 16, B=2, causal=how == "causal")
    arguments, grad_out = make(case)
    dead = torch.zeros(2, 2, Sq, dtype=torch.bool)
    if how == "causal":
        dead[:, :, : Sq - Sk] = True
    elif how == "lengths":
        arguments["key_lengths"] = torch.tensor([0, 40], dtype=torch.int32)
        dead[0] = True
    else:
        dead[1], dead[0, 1, 3:19] = True, True
        mask = (~dead)[..., None].expand(2, 2, Sq, Sk)
        arguments["mask"] = mask if how == "bool" else torch.where(mask, 0.0, -math.inf)
    out, lse, dq, dk, dv = triton_all(arguments, grad_out)
    assert (out[dead] == 0).all() and (lse[dead] == -math.inf).all() and (dq[dead] == 0).all()
    assert lse[~dead].isfinite().all() and (out[~dead] != 0).all()
    loud = torch.where(dead[..., None], 1e4 * grad_out, grad_out)
    _, _, _, dk_loud, dv_loud = triton_all(arguments, loud)
    assert torch.equal(dk, dk_loud) and torch.equal(dv, dv_loud), "a dead row reached a gradient"
    check(arguments, grad_out)


@pytest.mark.parametrize("case", [
    Case("plain", (2, 1), (20, 65), 16, B=3, key_lengths=[65, 33, 5]),
    Case("causal", (1, 1), (65, 65), 40, B=2, key_lengths=[40, 16], causal=True),
    Case("mask", (2, 1), (20, 49), 16, B=2, key_lengths=[47, 5], mask=(20, 49), mask_dtype=FLOAT),
], ids=lambda case: case.name)  # fmt: skip
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_keys_past_key_lengths_never_leak(case, poison):
    arguments, grad_out = make(case)
    clean = triton_all(arguments, grad_out)
    past = (torch.arange(case.lengths[1]) >= arguments["key_lengths"][:, None])[:, None, :, None]
    for name in "kv":
        arguments[name] = arguments[name].masked_fill(past, poison)
    dirty = triton_all(arguments, grad_out)
    assert_same_bits(clean, dirty)
    for grad in dirty[3:5]:
        assert (grad[past.expand_as(grad)] == 0).all()


def test_key_lengths_outside_the_keys_are_clamped():
    case = Case("", (1, 1), (5, 20), 16, B=2)
    arguments, grad_out = make(case)
    arguments["key_lengths"] = torch.tensor([999, -3])
    wild = triton_all(arguments, grad_out)
    arguments["key_lengths"] = torch.tensor([20, 0])
    assert_same_bits(wild, triton_all(arguments, grad_out))


# ---- packed sequences --------------------------------------------------------------------------


PACKED = [
    Case("causal", (2, 1), (0, 0), 8, causal=True),
    Case("softcap, window, dropout", (3, 1), (0, 0), 16, DV=40, softcap=2.0, window=(9, 3),
         dropout_p=0.3),
    Case("alibi, causal, half", (2, 2), (0, 0), 16, causal=True, alibi=True, dtype=HALF),
]  # fmt: skip


@pytest.mark.parametrize("case", PACKED, ids=lambda case: case.name)
def test_packed_sequences_equal_each_by_itself(case):
    """Within the fences of what is allocated, spare slots included; lengths 0 on either side."""
    queries, keys = [5, 0, 40, 3], [33, 4, 40, 0]
    whole, grad_out = make(Case(**vars(case) | {"lengths": (sum(queries), sum(keys))}))
    cu_q, cu_k = (torch.tensor([0, *n]).cumsum(0).to(torch.int32) for n in (queries, keys))
    packed = whole | {n: whole[n].transpose(1, 2).contiguous().transpose(1, 2) for n in "qkv"}
    out, lse = forward(**packed, cu_q=cu_q, cu_k=cu_k)
    flat = grad_out[0].transpose(0, 1).contiguous()
    needs = [True, True, True, False]
    found = backward(flat, out=out, lse=lse, needs=needs, **packed, cu_q=cu_q, cu_k=cu_k)
    assert all(x.is_contiguous() and not x.isnan().any() for x in (out, lse, *found[:3]))
    for b in range(4):
        rows, columns = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
        alone = whole | {"q": whole["q"][:, :, rows]}
        alone |= {n: whole[n][:, :, columns] for n in "kv"}
        if case.dropout_p:
            alone["seed"] = whole["seed"] ^ (b << 32)
        out_b, lse_b, dq, dk, dv = triton_all(alone, grad_out[:, :, rows])
        assert torch.equal(lse[:, rows], lse_b[0])
        pairs = [(out, out_b, rows), (found[0], dq, rows)]
        pairs += [(found[1], dk, columns), (found[2], dv, columns)]
        for mine, expected, where in pairs:
            assert torch.equal(mine[where], expected[0].transpose(0, 1))


# ---- tiles of a mask ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["all True", "all False", "blocks", "one key", "half a tile"])
def test_mask_classes(kind, check):
    """Full, empty and mixed tiles."""
    arguments, grad_out = make(Case("", (2, 1), (65, 97), 16, B=1))
    i, j = torch.arange(65)[:, None], torch.arange(97)
    mask = {
        "all True": (i + j) >= 0,
        "all False": (i + j) < 0,
        "blocks": (i // 32 + j // 32) % 2 == 0,
        "one key": (j == 77).expand(65, 97),
        "half a tile": (i // 16 + j // 8) % 2 == 0,
    }[kind]
    arguments["mask"] = mask.expand(1, 2, 65, 97)
    check(arguments, grad_out)


# ---- dropout and unwanted gradients ------------------------------------------------------------


def test_dropout_of_everything_is_zero_without_nan():
    arguments, grad_out = make(Case("", (2, 1), (33, 17), 16, dropout_p=1.0, bias=(1, 1, 33, 17)))
    out, lse, *gradients = triton_all(arguments, grad_out)
    assert (out == 0).all() and lse.isfinite().all()
    assert all((gradient == 0).all() for gradient in gradients)


def test_dropout_leaves_lse_alone_and_follows_the_seed():
    arguments, _ = make(Case("", (2, 1), (33, 17), 16, dropout_p=0.5))
    out, lse = forward(**arguments)
    plain_out, plain_lse = forward(**arguments | {"seed": None, "dropout_p": 0.0})
    other, _ = forward(**arguments | {"seed": arguments["seed"] + 1})
    assert torch.equal(lse, plain_lse) and not torch.equal(out, plain_out)
    assert not torch.equal(out, other) and torch.equal(out, forward(**arguments)[0])


@pytest.mark.parametrize("wanted", range(4))
def test_only_wanted_gradients_are_made(wanted, watched):
    arguments, grad_out = make(Case("", (2, 1), (33, 17), 16, bias=(1, 2, 33, 17)))
    out, lse, *every = triton_all(arguments, grad_out)
    watched.clear()
    needs = [i == wanted for i in range(4)]
    found = backward(grad_out, out=out, lse=lse, needs=needs, **arguments)
    assert [gradient is not None for gradient in found] == needs and len(watched) == 1
    torch.testing.assert_close(found[wanted], every[wanted])


def test_bias_of_minus_infinity_hides_keys():
    arguments, grad_out = make(Case("", (2, 1), (20, 40), 16, bias=(1, 2, 20, 40)))
    bias = arguments["bias"].masked_fill(torch.rand(1, 2, 20, 40) < 0.3, -math.inf)
    bias[:, 1, 4] = -math.inf
    out, lse, dq, dk, dv, dbias = triton_all(arguments | {"bias": bias}, grad_out)
    assert all(x.isfinite().all() for x in (out, dq, dk, dv, dbias))
    assert (out[:, 1, 4] == 0).all() and (lse[:, 1, 4] == -math.inf).all()
    assert (dbias[bias == -math.inf] == 0).all()


# ---- masks of extreme values -------------------------------------------------------------------


@pytest.mark.parametrize("low", [torch.finfo(torch.float32).min, -1e6, -65504.0, -math.inf])
def test_low_mask_values_hide_keys(low):
    arguments, grad_out = make(Case("", (2, 1), (20, 40), 16, mask=(20, 40)))
    mask = arguments["mask"] | (torch.arange(40) == 7)  # no row without keys
    hard = triton_all(arguments | {"mask": mask}, grad_out)
    arguments["mask"] = torch.where(mask, 0.0, low)
    soft = triton_all(arguments, grad_out)
    for a, b in zip(hard, soft, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_a_row_of_finfo_min_is_the_mean_as_in_eager_and_has_no_gradient():
    arguments, grad_out = make(Case("", (2, 1), (20, 40), 16, mask=(20, 40), mask_dtype=FLOAT))
    mask = arguments["mask"].clone()
    mask[:, :, 4] = torch.finfo(torch.float32).min
    out, lse, dq, dk, dv = triton_all(arguments | {"mask": mask}, grad_out)
    torch.testing.assert_close(out[:, :, 4], arguments["v"].mean(2).expand(1, 2, 16))
    assert lse[:, :, 4].isfinite().all() and (dq[:, :, 4] == 0).all()
    assert all(x.isfinite().all() for x in (out, dq, dk, dv))


# ---- layouts -----------------------------------------------------------------------------------


def packed(arguments):
    qkv = torch.stack([arguments[n].transpose(1, 2) for n in "qkv"], 2)  # [B, S, 3, H, D]
    return dict(zip("qkv", (x.transpose(1, 2) for x in qkv.unbind(2)), strict=True))


def interleaved(arguments):
    return {n: arguments[n].repeat_interleave(2, -1)[..., ::2] for n in "qkv"}


def transposed(arguments):
    return {n: arguments[n].mT.contiguous().mT for n in "qkv"}


def shifted(arguments):
    tensors = {n: arguments[n] for n in "qkv"}
    return {n: torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x) for n, x in tensors.items()}


@pytest.mark.parametrize("layout", [packed, interleaved, transposed, shifted])
def test_layouts_give_the_same_bits(layout):
    arguments, grad_out = make(Case("", (2, 2), (33, 33), 40, B=2, causal=True))
    views = layout(arguments)
    assert all(torch.equal(views[n], arguments[n]) for n in "qkv")
    assert_same_bits(triton_all(arguments, grad_out), triton_all(arguments | views, grad_out))


def test_expanded_keys_and_gradient_give_the_same_bits():
    arguments, grad_out = make(Case("", (4, 2), (17, 33), 16, B=2))
    views = {n: arguments[n][:1, :1].expand(2, 2, -1, -1) for n in "kv"}
    dense = {n: x.contiguous() for n, x in views.items()}
    ones = torch.ones(()).expand_as(grad_out)
    assert ones.stride() == (0, 0, 0, 0)
    expected = triton_all(arguments | dense, ones.contiguous())
    assert_same_bits(expected, triton_all(arguments | views, ones))


def test_offsets_past_two_to_the_31():
    """Rows 2^30 elements apart in one sparse buffer of which only the touched pages exist."""
    far = torch.empty_strided((2**31 + 4096,), (1,), dtype=HALF)
    arguments, grad_out = make(Case("", (1, 1), (3, 3), 16, dtype=HALF, causal=True))
    expected = triton_all(arguments, grad_out)
    tensors = [arguments["q"], arguments["k"], arguments["v"], grad_out]
    views = [far.as_strided((1, 1, 3, 16), (1, 1, 2**30, 1), 64 * i) for i in range(4)]
    for view, tensor in zip(views, tensors, strict=True):
        view.copy_(tensor)
    arguments |= dict(zip("qkv", views, strict=False))
    assert_same_bits(expected, triton_all(arguments, views[3]))


@pytest.mark.parametrize("B, Hq, Sq, Sk", [(0, 2, 3, 4), (2, 2, 0, 4), (2, 2, 3, 0), (2, 0, 3, 4)])
def test_empty(B, Hq, Sq, Sk, watched):
    arguments, grad_out = make(Case("", (Hq, Hq), (Sq, Sk), 16, B=B))
    out, lse, dq, dk, dv = triton_all(arguments, grad_out)
    assert out.shape == (B, Hq, Sq, 16) and (out == 0).all() and (lse == -math.inf).all()
    assert (dq == 0).all() and (dk == 0).all() and (dv == 0).all() and dk.shape == (B, Hq, Sk, 16)
    assert watched == []


def test_ten_runs_give_the_same_bits():
    case = Case("", (2, 1), (33, 20), 16, dtype=HALF, causal=True, key_lengths=[19])
    arguments, grad_out = make(case)
    first = triton_all(arguments, grad_out)
    for _ in range(9):
        assert_same_bits(first, triton_all(arguments, grad_out))


# ---- launch arithmetic and tables --------------------------------------------------------------


def test_grid_is_one_dimensional_and_covers_every_query():
    q = torch.empty(4096, 32, 1000, 64, device="meta", dtype=HALF)
    lse = torch.empty(4096, 32, 1000, device="meta")
    call = Call(90, q, q, q, *[None] * 5, False, -1, -1, 0.0, 1.0, 0.0)
    [launch] = attention_triton.forward_launches(call, q, lse)
    blocks = math.ceil(1000 / launch.arguments["BLOCK_M"])
    assert launch.grid == (blocks * 32 * 4096,) and launch.grid[0] < 2**31


@pytest.mark.parametrize("kernel", ["forward", "backward_dq", "backward_dkv", "backward_dbias"])
@pytest.mark.parametrize("capability", [80, 86, 87, 89, 90, 100, 103, 120])
def test_every_call_has_a_configuration(kernel, capability):
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for head_dim in (1, 8, 16, 17, 40, 59, 64, 80, 96, 111, 128, 192, 256):
            for load in configs.ATTENTION_LOADS:
                config = configs.attention_config(kernel, capability, dtype, head_dim, load)
                assert min(config.block_m, config.block_n) >= 16
                assert config.num_warps in (4, 8) and 1 <= config.num_stages <= 3
