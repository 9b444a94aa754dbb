"""attention on the CPU, each way of it, against float64 torch; and every edge of its contract.

Shapes: q [B, Hq, Sq, D]; k, v [B, Hkv, Sk, D]. The Triton kernels have a test file of their own;
here they run a few small calls through the public function, in the interpreter.
"""

import math
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from tilewise_kernels import attention, explain, force
from tilewise_kernels.errors import ArgumentError, KernelUnavailable

INF, NAN = math.inf, math.nan
WAYS = ("native", "torch", "blocked", "reference")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=WAYS)
def way(request):
    """Runs the test once in each implementation that takes its dtype."""
    dtype = request.node.callspec.params.get("dtype")
    if request.param == "native" and dtype == torch.float16:
        pytest.skip("the native way has no float16")
    with force(request.param, "attention"):
        yield request.param


# ---- accuracy ----------------------------------------------------------------------------------


def allowed(q: Tensor, k: Tensor, mask: Tensor | None, key_lengths: Tensor | None, causal: bool):
    """Bool, broadcastable to [B, Hq, Sq, Sk]: which keys each query may attend to."""
    sq, sk = q.shape[2], k.shape[2]
    keep = torch.ones(sq, sk, dtype=torch.bool).tril(sk - sq if causal else sk)
    if key_lengths is not None:
        keep = keep & (torch.arange(sk) < key_lengths[:, None, None, None])
    if mask is not None:
        keep = keep & (mask if mask.dtype == torch.bool else mask > -INF)
    return keep


def eager(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, causal: bool = False,
    key_lengths: Tensor | None = None, scale: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What one writes in eager torch, in the dtype of q; dead rows give out 0 and lse -inf."""
    keep = allowed(q, k, mask, key_lengths, causal)
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = q @ k.mT * (q.shape[3] ** -0.5 if scale is None else scale)
    if mask is not None and mask.dtype != torch.bool:
        scores = scores + mask.masked_fill(mask == -INF, 0).to(scores.dtype)
    scores = scores.masked_fill(~keep, -INF)
    dead = ~keep.expand_as(scores).any(-1, keepdim=True)
    p = torch.softmax(scores.masked_fill(dead, 0), -1).masked_fill(dead, 0)
    return p @ v, torch.logsumexp(scores, -1)


def run(function, tensors: tuple[Tensor, ...], dtype: torch.dtype, grad: Tensor, **options):
    """out, lse, dq, dk, dv by name."""
    leaves = [t.detach().to(dtype).requires_grad_() for t in tensors]
    out, lse = function(*leaves, **options)
    dq, dk, dv = torch.autograd.grad(out, leaves, grad.to(dtype))
    return {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}


def ours(q: Tensor, k: Tensor, v: Tensor, **options) -> tuple[Tensor, Tensor]:
    result = attention(q, k, v, return_lse=True, **options)
    assert isinstance(result, tuple)
    return result


@dataclass
class Case:
    """One call; mask is the shape of the mask and its dtype, lengths the key_lengths."""

    name: str
    heads: tuple[int, int]  # Hq, Hkv
    size: tuple[int, int]  # Sq, Sk
    D: int = 16
    B: int = 2
    mask: tuple[int, ...] | None = None
    mask_dtype: torch.dtype = torch.bool
    lengths: list[int] | None = None
    options: dict = field(default_factory=dict)
    spread: float = 1.0  # standard deviation of q and k


CAUSAL = {"causal": True}
F32 = torch.float32
CASES = [
    Case("one query, one key", (1, 1), (1, 1), 8),
    Case("one key", (2, 2), (5, 1), 8, options=CAUSAL),
    Case("decode", (4, 4), (1, 97), 64, options=CAUSAL),
    Case("two, causal", (2, 2), (2, 2), 40, options=CAUSAL),
    Case("three", (2, 2), (3, 3), 59),
    Case("17, causal", (2, 2), (17, 17), 96, options=CAUSAL),
    Case("127 and 129, causal", (1, 1), (127, 129), 111, options=CAUSAL, B=1),
    Case("129 and 127, causal: dead rows", (1, 1), (129, 127), 16, options=CAUSAL),
    Case("many more queries than keys, causal", (2, 1), (40, 7), 16, options=CAUSAL),
    Case("many more keys than queries, causal", (2, 1), (7, 113), 16, options=CAUSAL),
    Case("cross attention", (2, 2), (97, 33), 192, B=1),
    Case("head dim 256", (1, 1), (17, 33), 256, options=CAUSAL),
    Case("head dim 320", (1, 1), (17, 33), 320, options=CAUSAL),
    Case("more than two query blocks", (2, 1), (300, 260), 16, B=1, options=CAUSAL),
    Case("1025 keys", (1, 1), (5, 1025), 16, B=1, options=CAUSAL),
    Case("group of 3, causal", (6, 2), (17, 17), options=CAUSAL),
    Case("group of 5", (10, 2), (9, 33)),
    Case("one key head for 7, lengths", (7, 1), (9, 33), lengths=[33, 4]),
    Case("mask [Sq, Sk]", (2, 2), (17, 33), mask=(17, 33)),
    Case("mask [Sk]", (2, 1), (17, 33), mask=(33,)),
    Case("mask [B, 1, 1, Sk], group of 3", (3, 1), (17, 33), mask=(2, 1, 1, 33)),
    Case("mask [1, H, Sq, Sk], group of 2, causal", (4, 2), (33, 33), mask=(1, 4, 33, 33),
         options=CAUSAL),
    Case("mask [B, 1, Sq, Sk], causal, more keys", (2, 2), (17, 40), mask=(2, 1, 17, 40),
         options=CAUSAL),
    Case("float mask [Sq, Sk]", (2, 1), (17, 33), mask=(17, 33), mask_dtype=F32),
    Case("float mask [B, 1, 1, Sk], causal, more queries", (2, 2), (40, 17), mask=(2, 1, 1, 17),
         mask_dtype=F32, options=CAUSAL),
    Case("half mask [1, H, 1, Sk]", (4, 2), (17, 33), mask=(1, 4, 1, 33),
         mask_dtype=torch.float16),
    Case("float64 mask", (2, 1), (17, 33), mask=(17, 33), mask_dtype=torch.float64),
    Case("lengths", (2, 1), (17, 33), B=4, lengths=[33, 5, 5, 0]),
    Case("lengths, causal, square", (2, 2), (33, 33), B=3, lengths=[33, 20, 0], options=CAUSAL),
    Case("lengths, causal, more keys", (2, 2), (9, 33), B=3, lengths=[33, 20, 26], options=CAUSAL),
    Case("lengths, causal, more queries", (2, 2), (33, 9), B=3, lengths=[9, 3, 1], options=CAUSAL),
    Case("lengths under a mask [Sq, Sk]", (2, 2), (17, 33), lengths=[30, 3], mask=(17, 33)),
    Case("lengths under a mask [B, 1, 1, Sk]", (4, 2), (17, 33), lengths=[30, 9],
         mask=(2, 1, 1, 33)),
    Case("lengths under a float mask, causal", (4, 2), (17, 33), lengths=[30, 30], options=CAUSAL,
         mask=(1, 4, 17, 33), mask_dtype=F32),
    Case("long lengths", (2, 1), (9, 600), lengths=[600, 77]),
    Case("long lengths, all alike", (2, 2), (9, 600), lengths=[77, 77]),
    Case("long lengths, causal", (2, 1), (140, 600), 8, lengths=[600, 77], options=CAUSAL),
    Case("long lengths under a mask [1, 1, 1, Sk]", (2, 1), (9, 600), lengths=[555, 600],
         mask=(1, 1, 1, 600)),
    Case("scale 0", (2, 1), (9, 33), options={"scale": 0.0}),
    Case("scale 0 under a mask, causal", (2, 1), (17, 17), mask=(17,),
         options={"scale": 0.0, "causal": True}),
    Case("a scale that float32 rounds to 0", (2, 1), (9, 9), mask=(9,), mask_dtype=F32,
         options={"scale": -1e-60, "causal": True}),
    Case("negative scale", (2, 1), (17, 17), options={"scale": -0.7, "causal": True}),
    Case("batch of 5, a head each", (1, 1), (5, 5), B=5),
]  # fmt: skip


def make(case: Case, dtype: torch.dtype):
    """((q, k, v), upstream gradient, options of attention)."""
    generator = torch.Generator().manual_seed(0)
    (hq, hkv), (sq, sk) = case.heads, case.size

    def normal(heads: int, length: int, spread: float = 1.0) -> Tensor:
        shape = (case.B, heads, length, case.D)
        return (spread * torch.randn(shape, generator=generator)).to(dtype)

    q, k, v = normal(hq, sq, case.spread), normal(hkv, sk, case.spread), normal(hkv, sk)
    options = dict(case.options)
    if case.mask is not None:
        mask = torch.rand(case.mask, generator=generator) < 0.7
        if case.mask_dtype != torch.bool:
            added = 2 * torch.randn(case.mask, generator=generator)
            mask = added.masked_fill(~mask, -INF).to(case.mask_dtype)
        options["mask"] = mask
    if case.lengths is not None:
        options["key_lengths"] = torch.tensor(case.lengths, dtype=torch.int32)
    return (q, k, v), normal(hq, sq), options


LOGITS_OF_1E4 = Case("", (2, 1), (17, 33), options={"scale": 1.0}, spread=50.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_of_1e4(dtype, way, assert_accurate):
    """The torch way has P = exp(score - lse) backward: in float32 P is off as lse is coarse."""
    tensors, grad, options = make(LOGITS_OF_1E4, dtype)
    found = run(ours, tensors, dtype, grad, **options)
    exact = run(eager, tensors, torch.float64, grad, **options)
    plain = run(eager, tensors, dtype, grad, **options)
    if way == "torch":
        coarse = 4 * torch.finfo(F32).eps * exact["lse"].abs().max() * exact["dv"].abs().max()
        for name in ("dq", "dk", "dv"):
            limit = coarse + 3 * (plain[name] - exact[name]).abs().max()
            assert (found.pop(name) - exact.pop(name)).abs().max() <= limit
    assert_accurate(found, plain, exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_accuracy(case, dtype, way, assert_accurate):
    tensors, grad, options = make(case, dtype)
    inputs = [*tensors, grad, *(t for t in options.values() if isinstance(t, Tensor))]
    kept = [t.clone() for t in inputs]
    found = run(ours, tensors, dtype, grad, **options)
    exact = run(eager, tensors, torch.float64, grad, **options)
    assert_accurate(found, run(eager, tensors, dtype, grad, **options), exact)
    assert found["out"].dtype == found["dk"].dtype == dtype and found["lse"].dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(kept, inputs, strict=True)), "an input was changed"


@pytest.mark.parametrize("way", WAYS[1:], indirect=True)  # native has no such dtype
def test_float64_is_float64_throughout(way):
    tensors, grad, options = make(CASES[5], torch.float64)
    found, exact = (run(f, tensors, torch.float64, grad, **options) for f in (ours, eager))
    for name, true in exact.items():
        assert found[name].dtype == torch.float64
        torch.testing.assert_close(found[name], true, rtol=1e-11, atol=1e-12)


def test_sdpa_agrees_where_the_two_mean_the_same():
    (q, k, v), _, _ = make(Case("", (4, 2), (17, 17)), F32)
    expected = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=True
    )
    torch.testing.assert_close(attention(q, k, v, causal=True), expected)


# ---- rows with nothing to attend to --------------------------------------------------------------


@pytest.mark.parametrize("sk", [20, 600])
@pytest.mark.parametrize("how", ["bool", "-inf", "-inf, causal", "lengths", "causal"])
def test_dead_rows(how, sk, way):
    sq = sk + 7 if how == "causal" else 20
    (q, k, v), grad, _ = make(Case("", (2, 1), (sq, sk), 8), F32)
    dead = torch.zeros(2, 2, sq, dtype=torch.bool)
    options: dict = {"causal": "causal" in how}
    if how == "lengths":
        options["key_lengths"], dead[0] = torch.tensor([0, sk]), True
    elif how == "causal":
        dead[:, :, :7] = True
    else:
        dead[1] = dead[0, 1, 3:19] = True
        keep = (~dead)[..., None].expand(2, 2, sq, sk)
        options["mask"] = (
            keep if how == "bool" else torch.zeros(keep.shape).masked_fill(~keep, -INF)
        )
    found = run(ours, (q, k, v), F32, grad, **options)
    assert (found["out"][dead] == 0).all() and (found["lse"][dead] == -INF).all()
    assert (found["dq"][dead] == 0).all() and found["lse"][~dead].isfinite().all()
    loud = torch.where(dead[..., None], 1e4 * grad, grad)
    again = run(ours, (q, k, v), F32, loud, **options)
    for name in ("dq", "dk", "dv"):
        assert found[name].isfinite().all()
        assert torch.equal(found[name], again[name]), f"a dead row reached {name}"


def test_a_causal_limit_that_meets_a_mask_kills_the_row(way):
    """Row i sees keys 0..i, and the mask hides the first four: rows 0..3 have nothing."""
    (q, k, v), grad, _ = make(Case("", (2, 2), (9, 9), 8), F32)
    for mask in (torch.arange(9) >= 4, torch.zeros(9).masked_fill(torch.arange(9) < 4, -INF)):
        found = run(ours, (q, k, v), F32, grad, mask=mask, causal=True)
        assert (found["out"][:, :, :4] == 0).all() and (found["lse"][:, :, :4] == -INF).all()
        assert (found["dq"][:, :, :4] == 0).all() and (found["dk"][:, :, :4] == 0).all()
        assert all(t.isfinite().all() for n, t in found.items() if n != "lse")


# ---- what masks mean -----------------------------------------------------------------------------


@pytest.mark.parametrize("low", [torch.finfo(F32).min, -1e6, -65504.0, -INF])
def test_low_values_of_a_float_mask_hide_keys(low, way):
    tensors, grad, options = make(Case("", (2, 1), (17, 33), mask=(17, 33)), F32)
    options["mask"][:, 7] = True  # no dead row
    hard = run(ours, tensors, F32, grad, **options)
    soft = run(ours, tensors, F32, grad, mask=torch.where(options["mask"], 0.0, low))
    for name in hard:
        torch.testing.assert_close(soft[name], hard[name], rtol=1e-5, atol=1e-6)


def test_a_row_of_finfo_min_is_the_mean_as_in_eager_and_has_no_gradient(way):
    (q, k, v), grad, _ = make(Case("", (2, 1), (9, 33)), F32)
    mask = torch.zeros(9, 33)
    mask[4] = torch.finfo(F32).min
    found = run(ours, (q, k, v), F32, grad, mask=mask)
    torch.testing.assert_close(found["out"][:, :, 4], v.mean(2).expand(2, 2, 16))
    loud = grad.clone()
    loud[:, :, 4] *= 1e4
    again = run(ours, (q, k, v), F32, loud, mask=mask)
    assert (found["dq"][:, :, 4] == 0).all()
    assert all(torch.equal(found[n], again[n]) for n in ("dq", "dk", "dv"))


MASKS = {
    "[Sq, Sk]": lambda m: m[0, 0],
    "[Sk] expanded": lambda m: m[0, 0, 0].expand(2, 4, 9, 33),
    "[B, 1, 1, Sk] expanded": lambda m: m[:, :1, :1].expand(2, 4, 9, 33),
    "[B, 1, Sq, Sk] expanded over heads": lambda m: m[:, :1].expand(2, 4, 9, 33),
    "[1, H, Sq, Sk] expanded over the batch": lambda m: m[:1].expand(2, 4, 9, 33),
    "not contiguous": lambda m: m.mT.contiguous().mT,
    "every other key of a wider one": lambda m: m.repeat_interleave(2, -1)[..., ::2],
    "the start of a wider one": lambda m: torch.cat([m, m], -1)[..., :33],
    "broadcast over keys [Sq, 1]": lambda m: m[0, 0, :, :1],
    "broadcast over keys [B, H, Sq, 1] expanded": lambda m: m[..., :1].expand(2, 4, 9, 33),
    "one element": lambda m: m[0, 0, 0, :1],
}


@pytest.mark.parametrize("form", MASKS)
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_every_form_of_a_mask_means_the_whole_mask(form, kind):
    """Without force: where a way cannot take the form, another one must."""
    (q, k, v), grad, options = make(Case("", (4, 2), (9, 33), mask=(2, 4, 9, 33)), F32)
    mask = options["mask"]
    mask[..., 0, 0] = True
    if kind == "float":
        mask = torch.where(
            mask, torch.randn(mask.shape, generator=torch.Generator().manual_seed(1)), -INF
        )
    mask = MASKS[form](mask)
    whole = mask.expand(2, 4, 9, 33).contiguous()
    kept = mask.clone()
    found = run(ours, (q, k, v), F32, grad, mask=mask, key_lengths=torch.tensor([33, 20]))
    with force("reference"):
        plain = run(ours, (q, k, v), F32, grad, mask=whole, key_lengths=torch.tensor([33, 20]))
    for name in plain:
        torch.testing.assert_close(found[name], plain[name], rtol=1e-5, atol=2e-6)
    assert torch.equal(mask, kept)


def test_the_torch_way_says_what_it_cannot_take():
    (q, k, v), _, _ = make(Case("", (2, 1), (9, 33)), F32)
    mask = torch.zeros(9, 1)
    assert "over keys" in explain(attention, q, k, v, mask=mask).others["torch"]
    with force("torch"), pytest.raises(KernelUnavailable, match="over keys"):
        attention(q, k, v, mask=mask)


# ---- keys past key_lengths -----------------------------------------------------------------------


@pytest.mark.parametrize("poison", [NAN, INF, -INF])
@pytest.mark.parametrize("case", [
    Case("short", (4, 2), (9, 33), B=3, lengths=[33, 20, 0]),
    Case("short, causal", (2, 2), (33, 33), lengths=[20, 11], options=CAUSAL),
    Case("short, mask", (2, 2), (9, 33), lengths=[20, 11], mask=(9, 33), mask_dtype=F32),
    Case("long", (4, 2), (9, 600), lengths=[600, 77]),
    Case("long, causal", (2, 2), (140, 600), 8, lengths=[77, 77], options=CAUSAL),
], ids=lambda case: case.name)  # fmt: skip
def test_nothing_past_key_lengths_leaks(case, poison, way):
    (q, k, v), grad, options = make(case, F32)
    clean = run(ours, (q, k, v), F32, grad, **options)
    past = (torch.arange(case.size[1]) >= options["key_lengths"][:, None])[:, None, :, None]
    bad = run(
        ours, (q, k.masked_fill(past, poison), v.masked_fill(past, poison)), F32, grad, **options
    )
    for name in clean:
        assert torch.equal(clean[name], bad[name]), name
    for name in ("dk", "dv"):
        assert (bad[name][past.expand_as(bad[name])] == 0).all()


def test_nan_in_one_query_or_batch_item_stays_there(way):
    (q, k, v), _, _ = make(Case("", (2, 1), (9, 33)), F32)
    clean = attention(q, k, v)
    q[0, 1, 4, 2] = k[1, 0, 5, 3] = NAN
    spoilt = torch.zeros(2, 2, 9, dtype=torch.bool)
    spoilt[0, 1, 4] = spoilt[1] = True
    out = attention(q, k, v)
    assert out[spoilt].isnan().all() and torch.equal(out[~spoilt], clean[~spoilt])


# ---- layouts -----------------------------------------------------------------------------------


def packed(tensors):
    """Views of one [B, S, 3, H, D] projection."""
    whole = torch.stack([t.transpose(1, 2) for t in tensors], 2)
    return [t.transpose(1, 2) for t in whole.unbind(2)]


LAYOUTS = {
    "packed": packed,
    "every other": lambda tensors: [t.repeat_interleave(2, -1)[..., ::2] for t in tensors],
    "last dim strided": lambda tensors: [t.mT.contiguous().mT for t in tensors],
    "BSHD": lambda tensors: [t.transpose(1, 2).contiguous().transpose(1, 2) for t in tensors],
    "off by one": lambda tensors: [
        torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape) for t in tensors
    ],
    "backwards in memory": lambda tensors: [
        t.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0) for t in tensors
    ],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("options", [{}, CAUSAL, {"key_lengths": torch.tensor([17, 9])}], ids=str)
def test_layouts_give_the_same_result(layout, options, way):
    tensors, grad, _ = make(Case("", (2, 2), (17, 17), 40), F32)
    views = LAYOUTS[layout](tensors)
    assert all(torch.equal(a, b) for a, b in zip(views, tensors, strict=True))
    plain = run(ours, tensors, F32, grad, **options)
    found = run(ours, views, F32, LAYOUTS[layout]([grad] * 3)[0], **options)
    for name in plain:
        torch.testing.assert_close(found[name], plain[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sk", [33, 544])
def test_expanded_keys_and_values(sk, way):
    (q, k, v), grad, _ = make(Case("", (4, 1), (9, sk), B=2), F32)
    k, v = (t[:1].expand(2, 2, -1, -1) for t in (k, v))
    plain = run(ours, (q, k.contiguous(), v.contiguous()), F32, grad)
    found = run(ours, (q, k, v), F32, grad)
    for name in plain:
        torch.testing.assert_close(found[name], plain[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("heads", [(2, 2), (4, 2)])
def test_upstream_gradients_of_any_stride(heads, way):
    (q, k, v), grad, _ = make(Case("", heads, (17, 17)), F32)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    out = attention(*leaves, causal=True)
    upstream = {
        "sum": torch.ones(()).expand_as(out),
        "one per head": grad[:1, :, :1, :1].expand_as(out),
        "transposed": grad.mT.contiguous().mT,
        "every other": grad.repeat_interleave(2, -1)[..., ::2],
    }
    for name, given in upstream.items():
        kept = given.clone()
        found = torch.autograd.grad(out, leaves, given, retain_graph=True)
        plain = torch.autograd.grad(out, leaves, given.contiguous(), retain_graph=True)
        assert torch.equal(given, kept), name
        for a, b in zip(found, plain, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=name)


def test_heads_merge_without_a_copy(way):
    (q, k, v), _, _ = make(Case("", (4, 2), (9, 33)), F32)
    q = q.transpose(1, 2).contiguous().transpose(1, 2)  # as a projection lays it out
    assert attention(q, k, v).transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("trained", ["q", "k", "v"])
def test_only_the_gradients_that_are_wanted(trained, way):
    tensors = dict(zip("qkv", make(Case("", (4, 2), (9, 33)), F32)[0], strict=True))
    tensors[trained].requires_grad_()
    attention(*tensors.values(), causal=True).square().sum().backward()
    assert {n for n, t in tensors.items() if t.grad is not None} == {trained}


@pytest.mark.parametrize("empty", ["B", "Sq", "Sk", "D", "Hq"])
@pytest.mark.parametrize("lengths", [False, True])
def test_empty(empty, lengths):
    """Without force: no keys means out 0 and lse -inf; nothing else to compute must not fail."""
    sizes = {"B": 2, "Hq": 4, "Sq": 5, "Sk": 7, "D": 8} | {empty: 0}
    q = torch.randn([sizes[n] for n in ("B", "Hq", "Sq", "D")], requires_grad=True)
    k, v = (torch.randn(sizes["B"], 2, sizes["Sk"], sizes["D"], requires_grad=True) for _ in "kv")
    key_lengths = torch.full((sizes["B"],), min(3, sizes["Sk"])) if lengths else None
    for name in ("", *WAYS):
        if name:
            with force(name):
                out, lse = ours(q, k, v, key_lengths=key_lengths)
        else:
            out, lse = ours(q, k, v, key_lengths=key_lengths)
        assert out.shape == q.shape and lse.shape == q.shape[:3]
        if empty == "Sk":
            assert (out == 0).all() and (lse == -INF).all()
        grads = torch.autograd.grad(out.sum(), (q, k, v))
        assert all(
            g.shape == t.shape and g.isfinite().all() for g, t in zip(grads, (q, k, v), strict=True)
        )


@pytest.mark.parametrize("options", [
    {"window": (3, 1)}, {"alibi_slopes": torch.ones(4)}, {"window": (0, 0), "causal": True},
], ids=str)  # fmt: skip
def test_no_queries_and_no_keys(options, way):
    q, k = torch.ones(2, 4, 0, 8, requires_grad=True), torch.ones(2, 2, 0, 8)
    out, lse = ours(q, k, k, **options)
    assert out.shape == q.shape and lse.shape == (2, 4, 0)
    assert torch.autograd.grad(out.sum(), q)[0].shape == q.shape


# ---- values ------------------------------------------------------------------------------------


def test_all_logits_equal_gives_the_mean(way):
    v = torch.randn(1, 1, 33, 8, generator=torch.Generator().manual_seed(2))
    q, k = torch.full((1, 1, 5, 8), 100.0), torch.full((1, 1, 33, 8), 100.0)
    torch.testing.assert_close(attention(q, k, v), v.mean(2, keepdim=True).expand(1, 1, 5, 8))


def test_one_key_that_outweighs_all_others(way):
    q, k, v = (
        torch.randn(1, 1, 9, 8, generator=torch.Generator().manual_seed(i)) for i in range(3)
    )
    mask = torch.zeros(9)
    mask[4] = 1e6
    found = run(ours, (q, k, v), F32, torch.ones_like(q), mask=mask)
    assert torch.equal(found["out"], v[:, :, 4:5].expand_as(q))
    assert (found["dq"].abs() < 1e-5).all() and found["dv"][0, 0, 4].eq(9).all()


@pytest.mark.parametrize("way", WAYS[1:], indirect=True)  # native has no such dtype
def test_half_scores_past_65504_do_not_overflow(way):
    """q.k is 409600, which float16 cannot hold; scores stay in float32."""
    q = torch.full((1, 1, 3, 64), 80.0, dtype=torch.float16)
    k = torch.cat([q, -q, q], 2)
    v = torch.randn(1, 1, 9, 64, generator=torch.Generator().manual_seed(3)).half()
    out, lse = ours(q, k, v, scale=1.0)
    mean = v[:, :, [0, 1, 2, 6, 7, 8]].float().mean(2, keepdim=True)
    torch.testing.assert_close(out.float(), mean.expand(1, 1, 3, 64), rtol=2e-3, atol=1e-3)
    assert (lse - 409600 - math.log(6)).abs().max() < 0.1


# ---- deterministic ------------------------------------------------------------------------------


@pytest.mark.parametrize("case, dtype", [
    (Case("", (4, 2), (65, 65), 32, options=CAUSAL), F32),
    (Case("", (2, 2), (65, 520), lengths=[520, 100]), torch.bfloat16),
    (Case("", (2, 2), (65, 65), 32, mask=(2, 1, 1, 65)), torch.float16),
], ids=["group, causal", "lengths", "mask"])  # fmt: skip
def test_the_torch_way_gives_the_same_bits_fifty_times(case, dtype):
    tensors, grad, options = make(case, dtype)
    with force("torch"):
        first = run(ours, tensors, dtype, grad, **options)
        for _ in range(50):
            again = run(ours, tensors, dtype, grad, **options)
            assert all(torch.equal(first[name], again[name]) for name in first)


# ---- the Triton way through the public function ------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, torch.float16], ids=str)
@pytest.mark.parametrize("case", [
    Case("causal, group of 2", (4, 2), (17, 33), 16, B=1, options=CAUSAL),
    Case("mask [B, 1, 1, Sk]", (2, 2), (9, 20), 40, mask=(2, 1, 1, 20)),
    Case("lengths, float mask [Sq, Sk]", (2, 1), (9, 20), 8, lengths=[20, 3], mask=(9, 20),
         mask_dtype=F32),
    Case("mask over keys", (2, 1), (9, 20), 8, mask=(9, 1)),
], ids=lambda case: case.name)  # fmt: skip
def test_triton(case, dtype, assert_accurate):
    tensors, grad, options = make(case, dtype)
    with force("triton"):
        found = run(ours, tensors, dtype, grad, **options)
    exact = run(eager, tensors, torch.float64, grad, **options)
    assert_accurate(found, run(eager, tensors, dtype, grad, **options), exact)


def test_triton_refuses_float64_and_wide_heads():
    for q, why in ((torch.ones(1, 1, 2, 8).double(), "float64"), (torch.ones(1, 1, 2, 320), "320")):
        with force("triton"), pytest.raises(KernelUnavailable, match=why):
            attention(q, q, q)


# ---- bad input -----------------------------------------------------------------------------------

Q, K = (torch.randn(2, heads, 5, 8, generator=torch.Generator().manual_seed(4)) for heads in (4, 2))
BAD: list[tuple[dict, str]] = [
    ({"q": Q.tolist()}, "q is list"),
    ({"q": Q[0]}, r"q is of shape \[4, 5, 8\]"),
    ({"k": K[None]}, "k is 5-dimensional"),
    ({"q": Q.int()}, "q is torch.int32"),
    ({"q": Q.to_sparse()}, "q is torch.sparse_coo"),
    ({"k": K.half()}, "k is torch.float16"),
    ({"v": K.double()}, "v is torch.float64"),
    ({"k": K.to("meta")}, "k is on meta"),
    ({"v": K.to("meta")}, "v is on meta"),
    ({"k": K[:1], "v": K[:1]}, "k is of shape"),
    ({"k": K[..., :7], "v": K[..., :7]}, "k is of shape"),
    ({"v": K[:, :, :4]}, "v is of shape"),
    ({"q": Q[:, :3]}, "k is of 2 heads"),
    ({"k": K[:, :0], "v": K[:, :0]}, "k is of 0 heads"),
    ({"mask": [[True]]}, "mask is list"),
    ({"mask": torch.ones(5, 5, dtype=torch.int64)}, "mask is torch.int64"),
    ({"mask": torch.ones(5, 6)}, r"mask is of shape \[5, 6\]"),
    ({"mask": torch.ones(2, 2, 5, 5)}, "mask is of shape"),
    ({"mask": torch.ones(1, 1, 1, 5, 5)}, "mask is of shape"),
    ({"mask": torch.zeros(5, requires_grad=True)}, "mask is one that requires grad"),
    ({"mask": torch.zeros(5, device="meta")}, "mask is on meta"),
    ({"key_lengths": [5, 5]}, "key_lengths is list"),
    ({"key_lengths": torch.tensor([5.0, 5.0])}, "key_lengths is torch.float32"),
    ({"key_lengths": torch.tensor([True, True])}, "key_lengths is torch.bool"),
    ({"key_lengths": torch.tensor([5, 6])}, r"key_lengths is 5..6"),
    ({"key_lengths": torch.tensor([-1, 5])}, r"key_lengths is -1..5"),
    ({"key_lengths": torch.tensor([5])}, r"key_lengths is of shape \[1\]"),
    ({"key_lengths": torch.tensor([[5], [5]])}, "key_lengths is of shape"),
    ({"key_lengths": torch.tensor([5, 5]).to("meta")}, "key_lengths is on meta"),
    ({"scale": NAN}, "scale is NaN"),
    ({"scale": "1"}, "scale is '1'"),
]


@pytest.mark.parametrize("change, message", BAD, ids=[message for _, message in BAD])
def test_bad_input(change, message):
    before = Q.clone(), K.clone()
    arguments = {"q": Q, "k": K, "v": K} | change
    q, k, v = (arguments.pop(name) for name in "qkv")
    with pytest.raises(ArgumentError, match=f"attention: {message}"):
        attention(q, k, v, **arguments)
    assert torch.equal(before[0], Q) and torch.equal(before[1], K)
