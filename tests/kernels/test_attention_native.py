"""What is particular to attention's native kernel: its borders, the order of its sums, its layouts.

Shapes: q [B, Hq, Sq, D]; k [B, Hkv, Sk, D]; v [B, Hkv, Sk, Dv]. Blocks are of 64 queries, tiles of
512 keys, words of two bfloat16; the rest of the contract is tested with the other ways.
"""

import math
import warnings
from collections.abc import Callable
from typing import Any

import attention_formula as formula
import pytest
import torch
from torch import Tensor

from tilewise_kernels import attention, attention_varlen, dropout, explain, force, native

F32, BF16 = torch.float32, torch.bfloat16


@pytest.fixture(params=[F32, BF16], ids=str)
def dtype(request: Any) -> torch.dtype:
    if native.missing() or not native.op("attention_runs")(request.param):
        pytest.skip(f"this CPU or build has no native attention of {request.param}")
    return request.param


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def qkv(
    dtype: torch.dtype, heads: tuple[int, int], size: tuple[int, int], D: int = 16,
    Dv: int | None = None, B: int = 2,
) -> list[Tensor]:  # fmt: skip
    (hq, hkv), (sq, sk) = heads, size
    shapes = (B, hq, sq, D), (B, hkv, sk, D), (B, hkv, sk, Dv or D)
    return [normal(*shape, seed=i).to(dtype) for i, shape in enumerate(shapes)]


def run(tensors: list[Tensor], way: str = "native", **options: Any) -> dict[str, Tensor]:
    """out, lse, dq, dk, dv (and dbias where a fourth tensor is the bias), seeded."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    if len(leaves) > 3:
        options["bias"] = leaves[3]
    torch.manual_seed(5)
    with force(way, "attention"):
        out, lse = attention(*leaves[:3], return_lse=True, **options)
    grad = normal(*out.shape, seed=9).to(out.dtype)
    grads = torch.autograd.grad(out, leaves, grad)
    names = ("dq", "dk", "dv", "dbias")
    return {"out": out, "lse": lse} | dict(zip(names, grads, strict=False))


def ours(**call: Any) -> tuple[Tensor, Tensor]:
    result = attention(**call, return_lse=True)
    assert isinstance(result, tuple)
    return result


@pytest.fixture
def agree(assert_accurate: Callable[..., None]) -> Callable[..., None]:
    """agree(tensors, dtype, **options): the native way of q, k, v (and bias) is accurate."""

    def check(tensors: list[Tensor], dtype: torch.dtype, **options: Any) -> None:
        named = dict(zip(("q", "k", "v", "bias"), tensors, strict=False))
        grad = normal(*tensors[0].shape[:3], tensors[2].shape[3], seed=9).to(dtype)
        torch.manual_seed(5)
        seed = dropout.draw_seed(torch.device("cpu"))
        torch.manual_seed(5)  # the draw of the call
        with force("native", "attention"):
            found = formula.run(ours, named, dtype, grad, **options)
        exact, plain = (
            formula.run(formula.eager, named, kind, grad, **options, seed=seed)
            for kind in (torch.float64, dtype)
        )
        assert_accurate(found, plain, exact)

    return check


@pytest.mark.parametrize("sk", [15, 16, 17, 511, 512, 513, 1030])
@pytest.mark.parametrize("sq", [7, 63, 64, 65])
@pytest.mark.parametrize("causal", [False, True])
def test_borders_of_blocks_and_tiles(sq, sk, causal, dtype, agree):
    agree(qkv(dtype, (1, 1), (sq, sk), B=1), dtype, causal=causal)


@pytest.mark.parametrize("dims", [(1, 1), (15, 17), (31, 33), (33, 7), (65, 130)], ids=str)
def test_odd_widths(dims, dtype, agree):
    agree(qkv(dtype, (2, 1), (33, 47), *dims), dtype, causal=True)


@pytest.mark.parametrize("heads", [(4, 1), (6, 2), (70, 1)], ids=str)
@pytest.mark.parametrize("sq", [1, 5, 21, 64])
def test_heads_of_short_queries_share_a_block(heads, sq, dtype, agree):
    tensors = qkv(dtype, heads, (sq, 40))
    slopes = torch.rand(heads[0], generator=torch.Generator().manual_seed(1))
    agree(tensors, dtype, causal=True, alibi_slopes=slopes)
    agree([*tensors, normal(1, heads[0], sq, 40, seed=4)], dtype)


FEW: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window": (40, 2), "softcap": 3.0},
    "padded": {"key_lengths": torch.tensor([0, 530])},
    "one key": {"key_lengths": torch.tensor([1, 3]), "causal": True},
    "dropout": {"dropout_p": 0.3, "alibi_slopes": torch.tensor([0.1, 0.2, 0.0, -0.1])},
    "mask": {"mask": normal(2, 1, 1, 1030, seed=6) > 0},
    "float mask": {"mask": normal(1030, seed=6)},
}


@pytest.mark.parametrize("options", FEW.values(), ids=FEW)
@pytest.mark.parametrize("sq", [1, 2, 3, 4, 8, 17, 32])
def test_few_queries_read_keys_where_they_lie(options, sq, dtype, agree):
    agree(qkv(dtype, (4, 2), (sq, 1030), D=33, Dv=70), dtype, **options)


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"dropout_p": 0.3}], ids=str)
@pytest.mark.parametrize("sq", [40, 63])
def test_a_block_of_queries_reads_keys_that_lie_anyhow(options, sq, dtype, agree):
    """Keys that are one row, rows that are apart or overlap; more queries than keys."""
    q, k, v = qkv(dtype, (2, 2), (sq, 130), D=32)
    agree([q, k[:, :, :1].expand(k.shape), v.mT.contiguous().mT], dtype, **options)
    flat = normal(4, 130 * 8 + 24, seed=7).to(dtype)
    windows = flat.as_strided((2, 2, 130, 32), (2 * flat.shape[1], flat.shape[1], 8, 1))
    agree([q, windows, v[:, :, ::2].repeat_interleave(2, 2)], dtype, **options)
    agree([q, k[:, :, ::5], v[:, :, ::5]], dtype, **options)


@pytest.mark.parametrize("shape", [
    (2, 4, 3, 37), (1, 4, 3, 37), (2, 1, 3, 37), (3, 37), (3, 1), (2, 4, 1, 37), (1, 1, 1, 37),
], ids=str)  # fmt: skip
def test_gradients_of_a_bias_under_few_queries(shape, dtype, agree):
    agree([*qkv(dtype, (4, 2), (3, 37)), normal(*shape, seed=4)], dtype, softcap=3.0)


@pytest.mark.parametrize("sq", [3, 30])
def test_few_queries_give_the_same_bits_for_any_number_of_threads(sq, dtype):
    bias = [normal(3, 700, seed=4)] if sq == 3 else []
    tensors, threads = [*qkv(dtype, (4, 2), (sq, 700)), *bias], torch.get_num_threads()
    found = []
    try:
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            found.append(run(tensors, causal=True, dropout_p=0.1))
    finally:
        torch.set_num_threads(threads)
    for name, first in found[0].items():
        assert all(torch.equal(first, each[name]) for each in found[1:]), name


@pytest.mark.parametrize("sq", [3, 25])
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_padding_of_few_queries_never_leaks(poison, sq, dtype):
    tensors, lengths = qkv(dtype, (4, 2), (sq, 37)), torch.tensor([0, 20])
    spoilt = [tensors[0], *(t.clone() for t in tensors[1:])]
    for t in spoilt[1:]:
        t[0], t[1, :, 20:] = poison, poison
    clean, found = (run(t, key_lengths=lengths) for t in (tensors, spoilt))
    assert all(torch.equal(clean[name], found[name]) for name in clean)


@pytest.mark.parametrize("options", [
    {"window": (3, 2)}, {"window": (70, 0)}, {"window": (100, None), "causal": True},
    {"window": (0, 0), "key_lengths": torch.tensor([77, 600])},
], ids=str)  # fmt: skip
def test_windows_that_begin_and_end_anywhere(options, dtype, agree):
    agree(qkv(dtype, (2, 2), (300, 600)), dtype, **options)


MASKS = {
    "over queries": lambda m: m[:, :, :1].expand(m.shape),
    "over keys": lambda m: m[..., :1],
    "transposed": lambda m: m.mT.contiguous().mT,
    "every other": lambda m: m.repeat_interleave(2, -1)[..., ::2],
    "one head": lambda m: m[:, :1],
    "one item": lambda m: m[:1],
    "backwards": lambda m: m.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
}


@pytest.mark.parametrize("form", MASKS)
@pytest.mark.parametrize("kind", [torch.bool, F32, BF16, torch.float16], ids=str)
def test_masks_of_every_stride_and_dtype(form, kind, dtype, agree):
    drawn = normal(2, 4, 70, 37, seed=6)
    mask = drawn > -1 if kind == torch.bool else drawn.masked_fill(drawn < -1, -math.inf).to(kind)
    agree(qkv(dtype, (4, 2), (70, 37)), dtype, mask=MASKS[form](mask))


@pytest.mark.parametrize("shape", [
    (2, 4, 300, 37), (1, 4, 300, 37), (2, 1, 300, 37), (300, 37), (300, 1), (2, 4, 1, 37),
    (4, 1, 1), (2, 1, 1, 37), (1, 1, 1, 37), (1,),
], ids=str)  # fmt: skip
def test_gradients_of_a_bias_of_every_shape(shape, dtype, agree):
    """300 queries of two heads are cut in parts, each with sums of its own."""
    agree([*qkv(dtype, (4, 2), (300, 37)), normal(*shape, seed=4)], dtype, softcap=3.0)


@pytest.mark.parametrize("options", [{}, {"causal": True, "softcap": 4.0}], ids=str)
def test_dropout_keeps_the_elements_that_the_reference_keeps(options, dtype, agree):
    tensors = qkv(dtype, (4, 2), (150, 530), Dv=530, B=1)
    tensors[2] = torch.eye(530).to(dtype).expand(1, 2, 530, 530)
    found, exact = (run(tensors, way, dropout_p=0.3, **options) for way in ("native", "reference"))
    assert torch.equal(found["out"] == 0, exact["out"] == 0)
    agree(qkv(dtype, (4, 2), (150, 530)), dtype, dropout_p=0.3, **options)


@pytest.mark.parametrize("bias", [(), (1, 2, 600, 70), (600, 70), (70,)], ids=str)
def test_the_same_bits_for_any_number_of_threads(bias, dtype):
    tensors = qkv(dtype, (4, 2), (600, 70))
    if bias:
        tensors.append(normal(*bias, seed=4) if len(bias) < 4 else normal(1, 4, *bias[2:], seed=4))
    threads, found = torch.get_num_threads(), []
    try:
        for number in (1, 2, 5, 2):
            torch.set_num_threads(number)
            found.append(run(tensors, causal=True, dropout_p=0.1))
    finally:
        torch.set_num_threads(threads)
    for name, first in found[0].items():
        assert all(torch.equal(first, each[name]) for each in found[1:]), name


def test_logits_of_1e4_over_several_tiles(dtype):
    """P comes from the row's own peak: from an lse of 1e4 it would be off by 1e-3."""
    q, k, v = qkv(dtype, (1, 1), (70, 1100), B=1)
    q, k = 50 * q, 50 * k
    found = run([q, k, v], scale=1.0)
    exact = run([q.double(), k.double(), v.double()], "reference", scale=1.0)
    tolerance = 1e-3 if dtype == F32 else 2e-2
    for name in ("out", "dv"):
        error = (found[name].double() - exact[name]).abs()
        assert error.quantile(0.99) < tolerance, name  # two keys that nearly tie are apart


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_dead_row_stays_zero_beside_keys_that_are_not_finite(poison, dtype):
    q, k, v = qkv(dtype, (2, 1), (40, 600), B=1)
    k[:, :, 5] = v[:, :, 5] = poison
    mask = torch.ones(40, 600, dtype=torch.bool)
    mask[3] = False
    q.requires_grad_()
    with force("native"):
        out = attention(q, k, v, mask=mask)
        out.sum().backward()
    with force("torch"):
        assert (attention(q.detach(), k, v, mask=mask)[:, :, 3] == 0).all()
    assert (out[:, :, 3] == 0).all() and (q.grad[:, :, 3] == 0).all()
    assert out[:, :, 4].isnan().all()


@pytest.mark.parametrize("lengths", [[40, 1, 0, 600, 64], [7]], ids=str)
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"dropout_p": 0.2}], ids=str)
def test_packed_sequences_are_those_of_the_reference(lengths, options, dtype):
    total = sum(lengths)
    tensors = [normal(total, h, 16, seed=i).to(dtype) for i, h in enumerate((4, 2, 2))]
    cu = torch.tensor([0, *lengths]).cumsum(0)
    results = []
    for way in ("native", "reference"):
        leaves = [t.clone().requires_grad_() for t in tensors]
        torch.manual_seed(5)
        with force(way, "attention_varlen"):
            out = attention_varlen(*leaves, cu, cu, **options)
        grad = normal(*out.shape, seed=9).to(dtype)
        results.append([out, *torch.autograd.grad(out, leaves, grad)])
    for found, exact in zip(*results, strict=True):
        atol = (2e-5 if dtype == F32 else 2e-2) * exact.abs().max().item()
        torch.testing.assert_close(found, exact, rtol=0, atol=atol)


@pytest.mark.parametrize(
    "edges", [[0, 4, 8], [0, 6, 4], [0, 4, 14], [1, 4, 10], [0, -3, 10]], ids=str
)
@pytest.mark.parametrize("side", ["q", "k"])
def test_bad_cu_seqlens_are_refused_in_a_compiled_graph_too(edges, side, dtype):
    """There the front cannot read the values, and the kernel would write past the end."""
    q = normal(10, 2, 16).to(dtype)
    packed = torch.compile(attention_varlen, backend="aot_eager", fullgraph=True)
    good = torch.tensor([0, 4, 10])
    assert torch.equal(packed(q, q, q, good, good), attention_varlen(q, q, q, good, good))
    cu = {"q": good, "k": good} | {side: torch.tensor(edges)}
    with pytest.raises(ValueError, match=f"cu_seqlens_{side}"):
        packed(q, q, q, cu["q"], cu["k"])


@pytest.mark.parametrize("sq", [3, 40])
def test_backward_without_onednn_that_forward_had(sq, dtype):
    tensors, cu = qkv(dtype, (4, 2), (sq, 40), B=1), torch.tensor([0, 40])
    for packed in (False, True)[: 1 + (sq == 40)]:
        leaves = [t.clone().requires_grad_() for t in tensors]
        torch.manual_seed(5)
        if packed:
            q, k, v = (t[0].transpose(0, 1) for t in leaves)
            out = attention_varlen(q, k, v, cu, cu, causal=True, dropout_p=0.2)
        else:
            out = attention(*leaves, causal=True, dropout_p=0.2)
        grad = normal(*out.shape, seed=9).to(dtype)
        expected = torch.autograd.grad(out, leaves, grad, retain_graph=True)
        with warnings.catch_warnings():  # told once in a process
            warnings.simplefilter("ignore")
            with torch.backends.mkldnn.flags(enabled=False):
                found = torch.autograd.grad(out, leaves, grad)
        for got, true in zip(found, expected, strict=True):
            atol = (2e-5 if dtype == F32 else 2e-2) * true.abs().max().item()
            torch.testing.assert_close(got, true, rtol=0, atol=atol)


def test_it_is_chosen_and_leaves_other_dtypes_silently(dtype, recwarn):
    q = normal(2, 2, 64, 16).to(dtype)
    assert explain(attention, q, q, q).implementation == "native"
    assert explain(attention, q[:, :, :1], q, q).implementation == "native"
    for other in (torch.float16, torch.float64):
        assert explain(attention, *[q.to(other)] * 3).implementation != "native"
    assert not recwarn.list
