"""decode_attention against attention row by row in float64, and every edge of its contract.

Shapes: q [R, Hq, Sq, D]; caches [C, Hkv, T, D]; lengths [R]; beam_index [R, T]; block_table [R, N].
"""

import math

import pytest
import torch
from torch import Tensor

from tilewise_kernels import attention, decode_attention
from tilewise_kernels.errors import ArgumentError

INF, NAN = math.inf, math.nan
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def eager(q, k, v, lengths, *, beam_index=None, block_table=None, scale=None, alibi_slopes=None,
          window=None, bias=None):  # fmt: skip
    """One row and one query at a time, as the definition says, in the dtype of q."""
    rows = []
    for r in range(q.shape[0]):
        n, sq, group = int(lengths[r]), q.shape[2], q.shape[1] // k.shape[1]
        keys, values = [], []
        for t in range(n):
            at = (r, slice(None), t)
            if beam_index is not None:
                at = (int(beam_index[r, t]), slice(None), t)
            elif block_table is not None:
                page = k.shape[2]
                at = (int(block_table[r, t // page]), slice(None), t % page)
            keys.append(k[at].repeat_interleave(group, 0))
            values.append(v[at].repeat_interleave(group, 0))
        outs = []
        for i in range(sq):
            last = n - sq + i
            first = max(0, last - window[0]) if window and window[0] is not None else 0
            if last < 0:
                outs.append(torch.zeros_like(q[r, :, i]))
                continue
            seen = range(first, last + 1)
            scores = torch.stack([(q[r, :, i] * keys[t]).sum(-1) for t in seen], -1)
            scores = scores * (q.shape[3] ** -0.5 if scale is None else scale)
            if alibi_slopes is not None:
                far = torch.tensor([float(last - t) for t in seen], dtype=q.dtype)
                scores = scores - alibi_slopes[:, None].to(q.dtype) * far
            if bias is not None:
                whole = bias.expand(*q.shape[:3], bias.shape[-1])
                scores = scores + whole[r, :, i, first : last + 1]
            p = torch.softmax(scores, -1)
            outs.append((p[..., None] * torch.stack([values[t] for t in seen], 1)).sum(1))
        rows.append(torch.stack(outs, 1))
    return torch.stack(rows)


TENSORS = ("q", "k", "v", "bias")


def run(function, dtype, arguments, grad):
    """out and the gradients of everything that has one, by name."""
    call = dict(arguments)
    leaves = {n: call[n].detach().to(dtype).requires_grad_() for n in TENSORS if n in call}
    call |= leaves
    out = function(call.pop("q"), call.pop("k"), call.pop("v"), call.pop("lengths"), **call)
    grads = torch.autograd.grad(out, list(leaves.values()), grad.to(dtype))
    return {"out": out} | {f"d{n}": g for n, g in zip(leaves, grads, strict=True)}


def call(
    r: int, hq: int, hkv: int, sq: int, t: int, d: int, lengths: list[int], c: int | None = None
):
    q, k, v = (
        normal(r, hq, sq, d),
        normal(c or r, hkv, t, d, seed=1),
        normal(c or r, hkv, t, d, seed=2),
    )
    return {"q": q, "k": k, "v": v, "lengths": torch.tensor(lengths)}


BEAMS = torch.tensor([[0, 1, 2, 2, 1], [2, 2, 2, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.int32)
CASES = {
    "one row, one key": call(1, 1, 1, 1, 1, 8, [1]),
    "one query": call(3, 2, 2, 1, 9, 40, [9, 5, 1]),
    "three queries, group of 3": call(2, 6, 2, 3, 9, 16, [9, 3]),
    "one key head, head dim 111": call(2, 5, 1, 1, 7, 111, [7, 2]),
    "head dim 320": call(1, 2, 1, 2, 7, 320, [6]),
    "more queries than positions": call(2, 2, 1, 4, 6, 8, [2, 6]),
    "length 0": call(3, 2, 1, 2, 6, 8, [0, 6, 1]),
    "beams": call(3, 4, 2, 1, 5, 8, [5, 4, 2]) | {"beam_index": BEAMS},
    "beams over part of the cache": call(3, 2, 2, 2, 9, 8, [5, 4, 2]) | {"beam_index": BEAMS},
    "beams, more cache rows": call(3, 2, 2, 1, 5, 8, [5, 4, 2], c=7)
    | {"beam_index": BEAMS.long() + 4},
    "pages": call(2, 4, 2, 2, 4, 8, [11, 5], c=6)
    | {"block_table": torch.tensor([[5, 0, 3], [1, 2, 1]], dtype=torch.int32)},
    "window": call(2, 2, 1, 3, 9, 8, [9, 4]) | {"window": (2, 0)},
    "window of the token itself": call(2, 2, 1, 2, 9, 8, [9, 4]) | {"window": (0, None)},
    "unbounded window, scale": call(2, 2, 1, 2, 9, 8, [9, 4])
    | {"window": (None, None), "scale": -0.7},
    "alibi": call(2, 4, 2, 2, 9, 8, [9, 4]) | {"alibi_slopes": torch.tensor([0.5, 0.25, 0.1, 2.0])},
    "bias [Hq, 1, T]": call(2, 4, 2, 2, 9, 8, [9, 4]) | {"bias": normal(4, 1, 9, seed=3)},
    "bias [R, 1, Sq, T]": call(2, 4, 2, 2, 9, 8, [9, 4]) | {"bias": normal(2, 1, 2, 9, seed=3)},
    "everything": call(3, 4, 2, 2, 5, 8, [5, 4, 2])
    | {"beam_index": BEAMS, "bias": normal(4, 2, 5, seed=3), "window": (3, 0), "scale": 0.3,
       "alibi_slopes": torch.tensor([0.5, 0.25, 0.1, 2.0])},
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_accuracy(name, dtype, assert_accurate):
    case = {n: t.to(dtype) if n in TENSORS else t for n, t in CASES[name].items()}
    grad = normal(*case["q"].shape, seed=4).to(dtype)
    kept = {n: t.clone() for n, t in case.items() if isinstance(t, Tensor)}
    ours = run(decode_attention, dtype, case, grad)
    assert_accurate(ours, run(eager, dtype, case, grad), run(eager, torch.float64, case, grad))
    assert ours["out"].dtype == dtype
    assert all(torch.equal(case[n], t) for n, t in kept.items()), "an input was changed"


def test_a_full_cache_is_causal_attention():
    q, k, v = normal(2, 4, 3, 16), normal(2, 2, 9, 16, seed=1), normal(2, 2, 9, 16, seed=2)
    expected = attention(q, k, v, causal=True)
    torch.testing.assert_close(decode_attention(q, k, v, torch.tensor([9, 9])), expected)


def test_token_by_token_is_all_at_once():
    q, k, v = normal(2, 4, 7, 16), normal(2, 2, 7, 16, seed=1), normal(2, 2, 7, 16, seed=2)
    steps = [decode_attention(q[:, :, t : t + 1], k, v, torch.full((2,), t + 1)) for t in range(7)]
    torch.testing.assert_close(torch.cat(steps, 2), attention(q, k, v, causal=True))


def test_paged_is_contiguous():
    case = call(2, 4, 2, 2, 12, 8, [11, 5])
    pages = {n: case[n].unflatten(2, (3, 4)).transpose(1, 2).flatten(0, 1) for n in ("k", "v")}
    table = torch.arange(6, dtype=torch.int32).view(2, 3)
    paged = decode_attention(case["q"], pages["k"], pages["v"], case["lengths"], block_table=table)
    torch.testing.assert_close(paged, decode_attention(*case.values()), rtol=0, atol=0)


def test_a_row_of_a_batch_is_the_row_alone():
    case = call(3, 4, 2, 1, 9, 8, [9, 5, 1])
    whole = decode_attention(*case.values())
    for r in range(3):
        torch.testing.assert_close(
            decode_attention(*(t[r : r + 1] for t in case.values())), whole[r : r + 1]
        )


@pytest.mark.parametrize("poison", [NAN, INF, -INF])
@pytest.mark.parametrize("how", ["plain", "beams", "pages"])
def test_stale_positions_never_leak(how, poison):
    """NaN in every position that no row has in use, and in cache rows that no beam reads."""
    options: dict = {}
    case = call(2, 2, 1, 1, 5, 8, [3, 2])
    if how == "beams":
        case = call(2, 2, 1, 1, 5, 8, [3, 2], c=4)
        options["beam_index"] = torch.tensor([[2, 2, 0, 3, 3], [0, 2, 1, 1, 1]], dtype=torch.int32)
        used = {(2, 0), (2, 1), (0, 2), (0, 0)}
    elif how == "pages":
        case = call(2, 2, 1, 1, 2, 8, [3, 2], c=4)
        options["block_table"] = torch.tensor([[1, 0], [3, 2]], dtype=torch.int32)
        used = {(1, 0), (1, 1), (0, 0), (3, 0), (3, 1)}
    else:
        used = {(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)}
    stale = torch.ones(case["k"].shape[0], case["k"].shape[2], dtype=torch.bool)
    for row, position in used:
        stale[row, position] = False
    spoilt = {n: case[n].masked_fill(stale[:, None, :, None], poison) for n in ("k", "v")}
    grad = normal(*case["q"].shape, seed=4)
    clean = run(decode_attention, torch.float32, case | options, grad)
    dirty = run(decode_attention, torch.float32, case | spoilt | options, grad)
    for name in clean:
        assert torch.equal(clean[name], dirty[name]), name
    for name in ("dk", "dv"):
        assert (dirty[name].movedim(1, 2)[stale] == 0).all()


@pytest.mark.parametrize("table", ["beam_index", "block_table"])
def test_gradients_of_what_many_rows_read_repeat_bit_for_bit(table):
    """Every row reads one ancestor, or one page twice: the sums have one order."""
    rows, t = 8, 256
    shared = {
        "beam_index": torch.zeros(rows, t, dtype=torch.int32),
        "block_table": torch.tensor([[0, 1, 0, 2]] * rows, dtype=torch.int32),
    }[table]
    page = t if table == "beam_index" else t // shared.shape[1]
    q, lengths = normal(rows, 8, 1, 64), torch.full((rows,), t)
    caches = [normal(rows, 8, page, 64, seed=seed).requires_grad_() for seed in (1, 2)]
    grad = normal(rows, 8, 1, 64, seed=3)

    def gradients() -> list[Tensor]:
        out = decode_attention(q, *caches, lengths, **{table: shared})
        return list(torch.autograd.grad(out, caches, grad))

    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        first = gradients()
        for _ in range(25):
            assert all(torch.equal(a, b) for a, b in zip(gradients(), first, strict=True))
    finally:
        torch.set_num_threads(threads)


def test_rows_of_length_zero_give_zero_and_take_no_gradient():
    case = call(2, 2, 1, 2, 5, 8, [0, 1])  # row 1's first query has no key either
    found = run(decode_attention, torch.float32, case, torch.full_like(case["q"], 1e4))
    assert (found["out"][0] == 0).all() and (found["out"][1, :, 0] == 0).all()
    assert (found["dq"][0] == 0).all() and (found["dk"][0] == 0).all()
    assert all(t.isfinite().all() for t in found.values())


@pytest.mark.parametrize("layout", [
    lambda t: t.repeat_interleave(2, -1)[..., ::2],
    lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    lambda t: t.mT.contiguous().mT,
    lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape),
    lambda t: torch.cat([t, t], 2)[:, :, : t.shape[2]],
], ids=["every other", "BSHD", "last dim strided", "off by one", "longer cache"])  # fmt: skip
def test_layouts(layout):
    case = CASES["three queries, group of 3"]
    views = {n: layout(t) if n in TENSORS else t for n, t in case.items()}
    grad = normal(*case["q"].shape, seed=4)
    plain = run(decode_attention, torch.float32, case, grad)
    found = run(decode_attention, torch.float32, views, layout(grad))
    for name in plain:
        torch.testing.assert_close(found[name], plain[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("lengths", [torch.int32, torch.int64])
@pytest.mark.parametrize("sizes", [(0, 2, 1, 1, 5, 8), (2, 0, 1, 1, 5, 8), (2, 2, 1, 0, 5, 8),
                                   (2, 2, 1, 1, 0, 8), (2, 2, 1, 1, 5, 0)])  # fmt: skip
def test_empty(sizes, lengths):
    r, hq, hkv, sq, t, d = sizes
    case = call(*sizes, lengths=[min(2, t)] * r) | {
        "lengths": torch.full((r,), min(2, t), dtype=lengths)
    }
    found = run(decode_attention, torch.float32, case, torch.ones(r, hq, sq, d))
    assert found["out"].shape == (r, hq, sq, d)
    assert all(x.isfinite().all() for x in found.values())
    assert t or (found["out"] == 0).all()


def test_a_window_past_every_length_is_none():
    expected = decode_attention(Q, K, K, L)
    torch.testing.assert_close(decode_attention(Q, K, K, L, window=(10**30, None)), expected)


def test_huge_logits():
    case = call(1, 1, 1, 1, 9, 8, [9])
    case["q"] = case["q"] * 1e4
    torch.testing.assert_close(decode_attention(*case.values()), eager(*case.values()))


# ---- bad input -----------------------------------------------------------------------------------

Q, K = normal(2, 4, 1, 8), normal(2, 2, 5, 8, seed=1)
L = torch.tensor([5, 3])
PAGES = torch.tensor([[0, 1], [1, 0]])
BAD: list[tuple[dict, str]] = [
    ({"q": Q.tolist()}, "q is list"),
    ({"q": Q[0]}, "q is of shape"),
    ({"q": Q[None]}, "q is 5-dimensional"),
    ({"q": Q.int()}, "q is torch.int32"),
    ({"k_cache": K.half()}, "k_cache is torch.float16"),
    ({"v_cache": K.to("meta")}, "v_cache is on meta"),
    ({"k_cache": K[..., :7], "v_cache": K[..., :7]}, "k_cache is of shape"),
    ({"v_cache": K[:, :, :4]}, "v_cache is of shape"),
    ({"q": Q[:, :3]}, "k_cache is of 2 heads"),
    ({"k_cache": K[:1], "v_cache": K[:1]}, "k_cache is of 1 rows"),
    ({"lengths": [5, 3]}, "lengths is"),
    ({"lengths": L.float()}, "lengths is"),
    ({"lengths": L[:1]}, "lengths is of shape"),
    ({"lengths": L.to("meta")}, "lengths is on meta"),
    ({"lengths": torch.tensor([6, 3])}, "lengths is 3..6"),
    ({"lengths": torch.tensor([-1, 3])}, "lengths is -1..3"),
    ({"beam_index": torch.zeros(2, 5)}, "beam_index is"),
    ({"beam_index": torch.zeros(3, 5, dtype=torch.int32)}, "beam_index is of shape"),
    ({"beam_index": torch.zeros(5, dtype=torch.int32)}, "beam_index is of shape"),
    ({"beam_index": torch.full((2, 5), 2)}, "beam_index is 2..2"),
    ({"beam_index": torch.full((2, 5), -1)}, "beam_index is -1..-1"),
    ({"beam_index": torch.zeros(2, 6).int()}, "beam_index is 6 wide"),
    ({"beam_index": torch.zeros(2, 4).int()}, "lengths is 3..5"),
    ({"beam_index": torch.zeros(2, 5).int().to("meta")}, "beam_index is on meta"),
    ({"block_table": PAGES.float()}, "block_table is"),
    ({"block_table": PAGES + 1}, "block_table is 1..2"),
    ({"block_table": PAGES - 1}, "block_table is -1..0"),
    ({"block_table": PAGES[0]}, "block_table is of shape"),
    ({"block_table": PAGES, "beam_index": PAGES}, "block_table is given with beam_index"),
    ({"scale": NAN}, "scale is NaN"),
    ({"alibi_slopes": torch.ones(3)}, "alibi_slopes is of shape"),
    ({"alibi_slopes": torch.tensor([1.0, 2.0, 3.0, torch.nan])}, "alibi_slopes is holding nan"),
    ({"alibi_slopes": [1.0] * 4}, "alibi_slopes is list"),
    ({"alibi_slopes": torch.ones(4, device="meta")}, "alibi_slopes is on meta"),
    ({"alibi_slopes": torch.ones(4, requires_grad=True)}, "alibi_slopes is one that requires grad"),
    ({"window": (-1, 0)}, "window is"),
    ({"window": (1, 2, 3)}, "window is"),
    ({"window": 3}, "window is 3"),
    ({"bias": torch.ones(4, 1, 6)}, "bias is of shape"),
    ({"bias": torch.ones(5, dtype=torch.bool)}, "bias is torch.bool"),
    ({"bias": torch.ones(5, device="meta")}, "bias is on meta"),
]  # fmt: skip


@pytest.mark.parametrize("change, message", BAD, ids=[message for _, message in BAD])
def test_bad_input(change, message):
    before = Q.clone(), K.clone(), L.clone()
    arguments = {"q": Q, "k_cache": K, "v_cache": K, "lengths": L} | change
    with pytest.raises(ArgumentError, match=f"decode_attention: {message}"):
        decode_attention(**arguments)
    assert all(torch.equal(a, b) for a, b in zip(before, (Q, K, L), strict=True))
