"""attention_varlen, each way of it, against the formula on every sequence by itself.

Shapes: q [Tq, Hq, D]; k [Tk, Hkv, D]; v [Tk, Hkv, Dv]; lengths are lists, cu_seqlens made of them.
"""

import math
import warnings
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from tilewise_kernels import attention, attention_varlen, explain, force, op
from tilewise_kernels.errors import ArgumentError, KernelUnavailable

INF, NAN = math.inf, math.nan
WAYS = ("native", "torch", "blocked", "reference", "triton")


@pytest.fixture(params=WAYS)
def way(request):
    """Runs the test once in each implementation."""
    if request.param == "triton":
        pytest.importorskip("triton", reason="triton is not installed")
    with force(request.param, "attention_varlen"):
        yield request.param


@dataclass
class Case:
    """One call: lengths of the queries and of the keys of each sequence."""

    name: str
    queries: list[int]
    keys: list[int]
    heads: tuple[int, int] = (2, 1)
    D: int = 8
    DV: int | None = None
    options: dict = field(default_factory=dict)


CAUSAL = {"causal": True}
CASES = [
    Case("one sequence", [17], [17], options=CAUSAL),
    Case("self", [3, 33, 1, 17], [3, 33, 1, 17], options=CAUSAL),
    Case("cross, group of 3", [5, 33, 2], [40, 3, 16], (3, 1), DV=16),
    Case("cross, causal: some rows see nothing", [5, 33, 9], [17, 20, 2], options=CAUSAL),
    Case("empty sequences", [0, 5, 0, 4, 3], [4, 0, 0, 20, 3], (2, 2), options=CAUSAL),
    Case("nothing at all", [0, 0], [0, 0]),
    Case("equal lengths", [16, 16, 16], [20, 20, 20], D=40),
    Case("window", [33, 9], [33, 30], options={"window": (4, 2)}),
    Case("softcap", [20, 9], [33, 7], options={"softcap": 1.5, "scale": 1.0}),
    Case("alibi, window, causal", [33, 5], [40, 5], (3, 3),
         options=CAUSAL | {"window": (9, None), "alibi_slopes": 2.0 ** -torch.arange(3.0)}),
    Case("negative scale", [17, 3], [17, 9], options=CAUSAL | {"scale": -0.4}),
]  # fmt: skip


def cut(lengths: list[int], dtype: torch.dtype = torch.int32) -> Tensor:
    """cu_seqlens of lengths."""
    return torch.tensor([0, *lengths]).cumsum(0).to(dtype)


def make(case: Case, dtype: torch.dtype = torch.float32) -> tuple[tuple[Tensor, ...], Tensor]:
    """(q, k, v) and an upstream gradient."""
    generator = torch.Generator().manual_seed(0)
    (hq, hkv), dv = case.heads, case.DV or case.D

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    q, total = normal(sum(case.queries), hq, case.D), sum(case.keys)
    tensors = (q, normal(total, hkv, case.D), normal(total, hkv, dv))
    return tensors, normal(q.shape[0], hq, dv)


def formula(
    q: Tensor, k: Tensor, v: Tensor, causal=False, window=None, softcap=None, alibi_slopes=None,
    scale=None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One sequence [T, H, D] in the dtype of q: out and lse [H, T]."""
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[0] // k.shape[0], 0) for x in (k, v))
    scores = q @ k.mT * (q.shape[2] ** -0.5 if scale is None else scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    sq, sk = scores.shape[1:]
    ahead = torch.arange(sk) - torch.arange(sq)[:, None] - (sk - sq)
    if alibi_slopes is not None:
        scores = scores - alibi_slopes[:, None, None].to(q.dtype) * ahead.abs()
    left, right = window or (None, None)
    keep = ahead <= (0 if causal else sk + sq if right is None else right)
    keep = keep if left is None else keep & (ahead >= -left)
    scores = scores.masked_fill(~keep, -INF)
    p = torch.softmax(scores, -1).masked_fill(~keep.any(-1, keepdim=True), 0)
    return (p @ v).transpose(0, 1), torch.logsumexp(scores, -1) if sk else scores.new_full(
        (q.shape[0], sq), -INF
    )


def each(case: Case, tensors: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """The formula on every sequence, packed again."""
    rows = [x.split(n) for x, n in zip(tensors, (case.queries, case.keys, case.keys), strict=True)]
    parts = [formula(*sequence, **case.options) for sequence in zip(*rows, strict=True)]
    return torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts], 1)


def ours(case: Case, tensors: tuple[Tensor, ...], **options) -> tuple[Tensor, Tensor]:
    lengths = cut(case.queries), cut(case.keys)
    result = attention_varlen(*tensors, *lengths, return_lse=True, **case.options, **options)
    assert isinstance(result, tuple)
    return result


def run(function, case: Case, tensors, dtype: torch.dtype, grad: Tensor, **options):
    """out, lse, dq, dk, dv by name."""
    leaves = tuple(t.detach().to(dtype).requires_grad_() for t in tensors)
    out, lse = function(case, leaves, **options)
    gradients = torch.autograd.grad(out, leaves, grad.to(dtype))
    gradients = [gradient.nan_to_num(0) if function is each else gradient for gradient in gradients]
    return dict(zip(["out", "lse", "dq", "dk", "dv"], [out, lse, *gradients], strict=True))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_accuracy(case, way, assert_accurate):
    try:
        tensors, grad = make(case)
        found = run(ours, case, tensors, torch.float32, grad)
    except KernelUnavailable:
        assert way == "torch" and {"softcap", "window", "alibi_slopes"} & set(case.options)
        return
    exact = run(each, case, tensors, torch.float64, grad)
    assert_accurate(found, run(each, case, tensors, torch.float32, grad), exact)
    assert all(x.is_contiguous() for name, x in found.items() if name != "lse")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtypes_of_the_chosen_way(dtype, assert_accurate):
    case = CASES[1]
    tensors, grad = make(case, dtype)
    found = run(ours, case, tensors, dtype, grad)
    exact = run(each, case, tensors, torch.float64, grad)
    assert_accurate(found, run(each, case, tensors, dtype, grad), exact)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert found["out"].dtype == found["dk"].dtype == dtype and found["lse"].dtype == wide


def test_rows_equal_padded_attention(assert_accurate):
    case = Case("", [5, 17, 9], [7, 30, 12], (4, 2))
    tensors, _ = make(case)
    out, lse = ours(case, tensors)
    padded = [torch.full((3, h, n, 8), NAN) for h, n in ((4, 17), (2, 30), (2, 30))]
    for whole, x, lengths in zip(
        padded, tensors, (case.queries, case.keys, case.keys), strict=True
    ):
        for b, part in enumerate(x.split(lengths)):
            whole[b, :, : lengths[b]] = part.transpose(0, 1)
    lengths = torch.tensor(case.keys)
    expected, expected_lse = attention(*padded, key_lengths=lengths, return_lse=True)
    for b, (rows, row_lse) in enumerate(
        zip(out.split(case.queries), lse.split(case.queries, 1), strict=True)
    ):
        n = case.queries[b]
        torch.testing.assert_close(rows, expected[b, :, :n].transpose(0, 1))
        torch.testing.assert_close(row_lse, expected_lse[b, :, :n])


@pytest.mark.parametrize("poison", [NAN, INF])
def test_neighbours_never_leak(way, poison):
    case = Case("", [17, 5, 20], [20, 3, 33], options=CAUSAL)
    tensors, grad = make(case)
    clean = run(ours, case, tensors, torch.float32, grad)
    q, k, v = (t.clone() for t in tensors)
    q[17:22], k[20:23], v[20:23], grad[17:22] = poison, poison, poison, poison
    dirty = run(ours, case, (q, k, v), torch.float32, grad)
    others = {"q": torch.ones(42, dtype=torch.bool), "k": torch.ones(56, dtype=torch.bool)}
    others["q"][17:22], others["k"][20:23] = False, False
    for name in ("out", "dq"):
        assert torch.equal(clean[name][others["q"]], dirty[name][others["q"]]), name
    for name in ("dk", "dv"):
        assert torch.equal(clean[name][others["k"]], dirty[name][others["k"]]), name
    assert torch.equal(clean["lse"][:, others["q"]], dirty["lse"][:, others["q"]])


def test_any_stride_and_lengths_dtype_give_the_same_bits(way):
    case = Case("", [5, 17], [5, 17], (2, 2), options=CAUSAL)
    tensors, grad = make(case)
    expected = run(ours, case, tensors, torch.float32, grad)
    packed = torch.stack(tensors, 1)  # [T, 3, H, D]
    views = packed.unbind(1)
    for lengths in (cut([5, 17], torch.int64), cut([5, 17]).repeat_interleave(2)[::2]):
        leaves = tuple(t.detach().requires_grad_() for t in views)
        out = attention_varlen(*leaves, lengths, lengths, causal=True)
        dq, dk, dv = torch.autograd.grad(out, leaves, grad)
        found = {"out": out, "dq": dq, "dk": dk, "dv": dv}
        assert all(torch.equal(x, expected[name]) for name, x in found.items())


def test_dropout_is_that_of_each_sequence_alone(way):
    """The same elements as in other ways, none at p = 1, and gradients of the same mask."""
    case = Case("", [9, 3, 1], [20, 3, 17], (2, 1))
    tensors, grad = make(case)
    results = []
    for name in (way, "reference"):
        torch.manual_seed(3)
        try:
            with force(name, "attention_varlen"):
                results.append(run(ours, case, tensors, torch.float32, grad, dropout_p=0.4))
        except KernelUnavailable:
            assert way == "torch"
            return
    for name, found in results[0].items():
        torch.testing.assert_close(found, results[1][name], atol=2e-5, rtol=2e-5)
    without = run(ours, case, tensors, torch.float32, grad)
    assert not torch.equal(without["out"], results[0]["out"])
    torch.testing.assert_close(without["lse"], results[0]["lse"])
    gone = run(ours, case, tensors, torch.float32, grad, dropout_p=1.0)
    assert all((gone[name] == 0).all() for name in ("out", "dq", "dk", "dv"))


def test_repeats_give_the_same_bits(way):
    case = Case("", [17, 5], [17, 9], options=CAUSAL)
    tensors, grad = make(case)
    first = run(ours, case, tensors, torch.float32, grad)
    for _ in range(2 if way == "triton" else 9):  # the interpreter is slow
        again = run(ours, case, tensors, torch.float32, grad)
        assert all(torch.equal(x, again[name]) for name, x in first.items())


def test_seqlens_that_lie_are_clamped_by_the_kernels():
    """What a GPU cannot check beforehand: no access out of bounds, other sequences unharmed."""
    attention_triton = pytest.importorskip("tilewise_kernels.attention_triton")
    case = Case("", [17, 10], [17, 10])
    q, k, v = (x.transpose(0, 1)[None] for x in make(case)[0])
    scoring = (None, None, None, None, None, False, -1, -1, 0.0, 0.3, 0.0)
    wild = torch.tensor([0, 17, 2**30]), torch.tensor([-5, 17, 999])
    good = torch.tensor([0, 17, 27]), torch.tensor([0, 17, 27])
    for a, b in zip(
        attention_triton.forward(q, k, v, *scoring, *wild),
        attention_triton.forward(q, k, v, *scoring, *good),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_rows_of_no_sequence_are_zero():
    attention_triton = pytest.importorskip("tilewise_kernels.attention_triton")
    q, k, v = (x.transpose(0, 1)[None] for x in make(Case("", [20], [20]))[0])
    scoring = (None, None, None, None, None, False, -1, -1, 0.0, 0.3, 0.0)
    lengths = torch.tensor([0, 5, 9])
    out, lse = attention_triton.forward(q, k, v, *scoring, lengths, lengths)
    assert (out[9:] == 0).all() and (lse[:, 9:] == -INF).all() and (out[:9] != 0).all()
    gradients = attention_triton.backward(
        out, q, k, v, out, lse, *scoring, [True] * 3 + [False], lengths, lengths
    )
    assert all(x is None or (x[9:] == 0).all() for x in gradients)


def test_unwanted_gradients_are_not_made(way):
    case = Case("", [9, 5], [9, 5])
    (q, k, v), grad = make(case)
    every = run(ours, case, (q, k, v), torch.float32, grad)
    k.requires_grad_()
    out, _ = ours(case, (q, k, v))
    (dk,) = torch.autograd.grad(out, k, grad)
    torch.testing.assert_close(dk, every["dk"])


def test_explain_and_cost():
    from tilewise_kernels.attention_varlen import OP

    case = Case("", [3, 2], [3, 4], (2, 1))
    tensors, _ = make(case)
    lengths = cut(case.queries), cut(case.keys)
    found = explain(attention_varlen, *tensors, *lengths, causal=True)
    assert found.op == "attention_varlen" and "triton" in found.others
    cost = OP.cost(*tensors, *lengths, None, None, True, -1, -1, 0.0, 1.0, 0.0)
    assert cost.flops == 2 * 2 * (6 + 3 + 4) * 16


# ---- bad input ---------------------------------------------------------------------------------

GOOD = {
    "q": torch.zeros(5, 4, 8), "k": torch.zeros(7, 2, 8), "v": torch.zeros(7, 2, 6),
    "cu_seqlens_q": torch.tensor([0, 2, 5]), "cu_seqlens_k": torch.tensor([0, 7, 7]),
}  # fmt: skip


@pytest.mark.parametrize("options", [{"softcap": 1.0}, {"dropout_p": 0.5}], ids=str)
def test_what_a_caller_cannot_change_warns_nobody(options, monkeypatch):
    """The torch way cannot take them; force() still says so."""
    monkeypatch.setattr(op, "_warned", set())
    q, ends = torch.ones(1, 2, 5, 8), torch.tensor([0, 5])
    packed = (*[q[0].transpose(0, 1)] * 3, ends, ends)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attention(q, q, q, **options)
        attention_varlen(*packed, **options)
    with force("torch"), pytest.raises(KernelUnavailable, match="its kernel has no"):
        attention_varlen(*packed, **options)


@pytest.mark.parametrize("name, value, message", [
    ("q", torch.zeros(5, 8), "needs 3 or more dims"),
    ("q", torch.zeros(1, 5, 4, 8), "4-dimensional; pass \\[total, heads, dim\\]"),
    ("q", torch.zeros(5, 3, 8), "of 2 heads; q has 3"),
    ("q", torch.zeros(5, 4, 8).half(), "q is torch.float16; cast"),
    ("k", torch.zeros(7, 2, 9), "k is of shape"),
    ("k", torch.zeros(7, 0, 8), "of shape|of 0 heads"),
    ("v", torch.zeros(6, 2, 6), "rows and heads of k"),
    ("v", [1.0], "v is list"),
    ("cu_seqlens_q", [0, 2, 5], "pass an int32 or int64"),
    ("cu_seqlens_q", torch.tensor([0.0, 5.0]), "torch.float32; pass int32"),
    ("cu_seqlens_q", torch.tensor([[0, 5]]), "must be \\[sequences \\+ 1\\]"),
    ("cu_seqlens_q", torch.tensor([], dtype=torch.int64), "must be \\[sequences \\+ 1\\]"),
    ("cu_seqlens_q", torch.tensor([1, 2, 5]), "begins with 1"),
    ("cu_seqlens_q", torch.tensor([0, 6, 5]), "falling from 6 to 5 at entry 2"),
    ("cu_seqlens_q", torch.tensor([0, 2, 4]), "ends with 4; it must end with 5, the rows of q"),
    ("cu_seqlens_k", torch.tensor([0, 2, 9]), "ends with 9; it must end with 7"),
    ("cu_seqlens_k", torch.tensor([0, 7]), "cu_seqlens_q has 3"),
    ("cu_seqlens_k", torch.zeros(3, dtype=torch.int64, device="meta"), "on meta; move it"),
    ("max_seqlen_q", 2, "has a sequence of 3"),
    ("max_seqlen_k", -1, "pass a number >= 0"),
    ("max_seqlen_k", 7.0, "pass a number >= 0"),
    ("causal", 1, "pass True or False"),
    ("return_lse", None, "pass True or False"),
    ("window", 3, "pass \\(left, right\\)"),
    ("window", (1, -2), "pass \\(left, right\\)"),
    ("softcap", 0.0, "1e-30 to 1e30"),
    ("softcap", NAN, "finite"),
    ("scale", INF, "finite"),
    ("dropout_p", 1.5, "probability"),
    ("alibi_slopes", torch.ones(3), "heads of q"),
    ("alibi_slopes", torch.full((4,), torch.nan), "holding nan; pass finite slopes"),
    ("alibi_slopes", torch.ones(4, requires_grad=True), "no gradient"),
])  # fmt: skip
def test_bad_input(name, value, message):
    with pytest.raises(ArgumentError, match=message) as error:
        attention_varlen(**GOOD | {name: value})
    assert str(error.value).startswith("attention_varlen: ")


@pytest.mark.parametrize("edges", [[0, 4, 8], [0, 6, 4], [0, 4, 14], [1, 4, 10]], ids=str)
def test_a_compiled_graph_refuses_bad_edges_in_every_way_of_a_cpu(edges):
    q = torch.randn(10, 2, 16, dtype=torch.float64)
    packed = torch.compile(attention_varlen, backend="aot_eager", fullgraph=True)
    good = torch.tensor([0, 4, 10])
    packed(q, q, q, good, good)
    with pytest.raises(ValueError, match="cu_seqlens_k"):
        packed(q, q, q, good, torch.tensor(edges))
