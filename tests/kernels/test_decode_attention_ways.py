"""decode_attention's native and Triton kernels, each pinned: every feature alone and together.

Triton runs in its interpreter, its buffers poisoned with NaN and fenced with canaries. Cached
positions that no query sees hold NaN throughout.

Shapes: q [R, Hq, Sq, D]; caches [C, Hkv, T, D]; lengths [R]; beam_index [R, T]; block_table [R, N].
"""

import math
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tilewise_kernels import decode_attention, decode_attention_triton, explain, force, native
from tilewise_kernels.decode_attention import OP
from tilewise_kernels.decode_attention_triton import divide
from tilewise_kernels.errors import ArgumentError, KernelUnavailable
from tilewise_kernels.launch import Launch

FENCE, CANARY = 256, 1234.0
FLOAT, BF16, HALF = torch.float32, torch.bfloat16, torch.float16
built = pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))
NATIVE = pytest.param("native", marks=built)
either = pytest.mark.parametrize("way", [NATIVE, "triton"])


@pytest.fixture(autouse=True)
def launched(monkeypatch):
    """Poison and fence what the Triton launcher allocates; the names of the kernels that ran."""
    buffers, ran, run = [], [], Launch.run

    def poisoned(shape, **options):
        shape = torch.Size(shape)
        buffer = torch.full((shape.numel() + 2 * FENCE,), CANARY, **options)
        buffers.append(buffer)
        return buffer[FENCE:-FENCE].fill_(math.nan).view(shape)

    def counted(self, device):
        assert self.grid[0] <= 64, "keep interpreted launches small"
        ran.append(self.kernel.__name__)
        run(self, device)

    namespace = SimpleNamespace(**vars(torch) | {"empty": poisoned})
    monkeypatch.setattr(decode_attention_triton, "torch", namespace)
    monkeypatch.setattr(Launch, "run", counted)
    yield ran
    for buffer in buffers:
        fences = torch.cat([buffer[:FENCE], buffer[-FENCE:]])
        assert (fences == CANARY).all(), "wrote outside"


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ---- against float64 ---------------------------------------------------------------------------


@dataclass
class Case:
    """One call. pages: a page holds this many positions; beams: each reads from random rows."""

    heads: tuple[int, int]  # Hq, Hkv
    lengths: list[int]
    capacity: int
    D: int
    Sq: int = 1
    beams: bool = False
    pages: int = 0
    alibi: bool = False
    bias: tuple[int, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)

    def call(self, dtype: torch.dtype) -> dict[str, Any]:
        """The arguments, with NaN wherever no query looks."""
        (hq, hkv), r = self.heads, len(self.lengths)
        rows, width = r, self.capacity
        call: dict[str, Any] = {"lengths": torch.tensor(self.lengths)}
        generator = torch.Generator().manual_seed(5)
        if self.beams:
            rows = r + 2
            index = torch.randint(rows, (r, width), generator=generator)
            call["beam_index"] = index.int()
        elif self.pages:
            rows, width = r * self.capacity // self.pages + 1, self.pages
            index = torch.randperm(rows, generator=generator)[: r * self.capacity // self.pages]
            call["block_table"] = index.view(r, -1).int()
        if self.alibi:
            call["alibi_slopes"] = normal(hq, seed=6).abs()
        if self.bias:
            call["bias"] = normal(*self.bias, seed=7).to(dtype)
        caches = {"k_cache": normal(rows, hkv, width, self.D, seed=1).to(dtype)}
        caches["v_cache"] = normal(rows, hkv, width, self.D, seed=2).to(dtype)
        call |= self.options | caches
        unread = ~self.read(call).any(1)
        for cache in caches.values():
            cache.masked_fill_(unread.unflatten(0, (rows, width))[:, None, :, None], math.nan)
        return call | {"q": normal(r, hq, self.Sq, self.D, seed=0).to(dtype)}

    def read(self, call: dict[str, Any]) -> Tensor:
        """Bool [rows * width of the cache, R]: which row's queries see a place."""
        places = located(call)
        read = torch.zeros(call["k_cache"][:, 0, :, 0].numel(), len(self.lengths), dtype=bool)
        for r, n in enumerate(self.lengths):
            left = (self.options.get("window") or (None,))[0]
            first = 0 if left is None else max(0, n - self.Sq - left)
            read[places[r, first:n], r] = True
        return read


def located(call: dict[str, Any]) -> Tensor:
    """Where position t of row r lies in the cache [C * T]: [R, capacity]."""
    r, t = call["lengths"].shape[0], call["k_cache"].shape[2]
    if "block_table" in call:
        return (call["block_table"].long()[:, :, None] * t + torch.arange(t)).flatten(1)
    if "beam_index" in call:
        width = call["beam_index"].shape[1]
        return call["beam_index"].long() * t + torch.arange(width)
    return torch.arange(r * t).view(r, t)


def gathered(cache: Tensor, call: dict[str, Any]) -> Tensor:
    """[R, Hkv, capacity, D], each row's cache in one piece."""
    return cache.transpose(1, 2).flatten(0, 1)[located(call)].transpose(1, 2)


def plain(call: dict[str, Any], dtype: torch.dtype) -> Tensor:
    """The definition, eagerly, in one dtype."""
    q = call["q"].to(dtype)
    (_, hq, sq, d), hkv = q.shape, call["k_cache"].shape[1]
    keys, values = (gathered(call[n].to(dtype), call) for n in ("k_cache", "v_cache"))
    k, v = (t.nan_to_num(0.0).repeat_interleave(hq // hkv, 1) for t in (keys, values))
    at = call["lengths"][:, None] - sq + torch.arange(sq)
    distance = (at[:, :, None] - torch.arange(k.shape[2]))[:, None]
    scores = q @ k.mT * call.get("scale", d**-0.5)
    if "alibi_slopes" in call:
        scores = scores - call["alibi_slopes"].to(dtype)[:, None, None] * distance.to(dtype)
    if "bias" in call:
        scores = scores + call["bias"].to(dtype)
    left = (call.get("window") or (None,))[0]
    seen = (distance >= 0) & (distance <= (2**31 if left is None else left))
    scores = scores.masked_fill(~seen, -math.inf)
    return torch.softmax(scores, -1).masked_fill(~seen.any(-1, keepdim=True), 0) @ v


ALL = {"alibi": True, "bias": (6, 2, 40), "options": {"window": (17, 0), "scale": -0.3}}
CASES = {
    "one position": Case((1, 1), [1], 1, 1),
    "odd length": Case((4, 4), [37, 5, 1], 37, 64),
    "nothing cached": Case((2, 2), [0, 9, 0], 9, 8),
    "group of 3, head dim 80": Case((6, 2), [21, 40], 41, 80),
    "group of 7, 3 queries": Case((7, 1), [33, 2], 33, 40, Sq=3),
    "64 to a key": Case((8, 1), [29, 30], 30, 24, Sq=8),
    "head dim 111": Case((2, 1), [20], 23, 111),
    "head dim 256": Case((1, 1), [19], 20, 256),
    "several chunks": Case((4, 2), [600, 513, 256, 0], 600, 16),
    "several chunks, 2 queries": Case((2, 2), [257, 512, 1], 515, 33, Sq=2),
    "more queries than positions": Case((2, 1), [2, 8], 9, 16, Sq=5),
    "beams": Case((4, 2), [40, 17, 3], 40, 64, beams=True),
    "beams, several chunks": Case((2, 2), [300, 290], 300, 32, beams=True),
    "pages": Case((4, 2), [40, 17, 3], 40, 64, pages=5),
    "pages, several chunks": Case((2, 2), [300, 290], 304, 32, pages=16),
    "window": Case((4, 2), [40, 17, 3], 40, 64, Sq=2, options={"window": (9, 0)}),
    "window past several chunks": Case((2, 2), [600, 300], 600, 16, options={"window": (20, 0)}),
    "alibi": Case((4, 2), [40, 17, 3], 40, 64, Sq=2, alibi=True),
    "bias per head": Case((4, 2), [40, 17, 3], 40, 64, Sq=2, bias=(4, 1, 40)),
    "bias per row and query": Case((4, 2), [40, 17, 3], 40, 64, Sq=2, bias=(3, 1, 2, 40)),
    "beams and everything": Case((6, 2), [40, 17, 3], 40, 48, Sq=2, beams=True, **ALL),
    "pages and everything": Case((6, 2), [40, 17, 3], 40, 48, Sq=2, pages=8, **ALL),
}


def pinned(way: str, call: dict[str, Any]) -> Tensor:
    with force(way):
        return decode_attention(**call)


@pytest.mark.parametrize(
    "way, dtype",
    [pytest.param("native", dtype, marks=built) for dtype in (FLOAT, BF16, HALF)]
    + [("triton", FLOAT), ("triton", HALF)],  # the interpreter's bfloat16 product is wrong
    ids=str,
)
@pytest.mark.parametrize("name", CASES)
def test_accuracy(name, way, dtype, assert_accurate):
    call = CASES[name].call(dtype)
    ours = {"out": pinned(way, call)}
    assert ours["out"].dtype == dtype and ours["out"].is_contiguous()
    assert_accurate(ours, {"out": plain(call, dtype)}, {"out": plain(call, torch.float64)})


def test_more_queries_than_a_triton_tile_holds(assert_accurate, launched):
    call = Case((36, 1), [30, 7], 33, 16, Sq=2).call(FLOAT)
    ours = {"out": pinned("triton", call)}
    assert_accurate(ours, {"out": plain(call, FLOAT)}, {"out": plain(call, torch.float64)})
    assert launched


def test_both_triton_forms_run(launched):
    pinned("triton", CASES["one position"].call(FLOAT))
    assert launched == ["split_kernel"]
    pinned("triton", CASES["several chunks"].call(FLOAT))
    assert launched == ["split_kernel", "split_kernel", "combine_kernel"]


# ---- the same bits -----------------------------------------------------------------------------


@either
@pytest.mark.parametrize("name", [n for n, case in CASES.items() if case.beams or case.pages])
@pytest.mark.parametrize("dtype", [FLOAT, HALF], ids=str)
def test_reading_in_place_is_reading_a_gathered_cache(way, name, dtype):
    call = CASES[name].call(dtype)
    whole = {n: gathered(call[n], call).contiguous() for n in ("k_cache", "v_cache")}
    rest = {n: x for n, x in call.items() if n not in ("beam_index", "block_table")}
    assert torch.equal(pinned(way, call), pinned(way, rest | whole))


@either
@pytest.mark.parametrize("name", ["beams, several chunks", "pages and everything"])
def test_repeats_give_the_same_bits(way, name):
    call = CASES[name].call(HALF)
    first = pinned(way, call)
    assert all(torch.equal(pinned(way, call), first) for _ in range(2 if way == "triton" else 20))


@built
@pytest.mark.parametrize("dtype", [FLOAT, BF16, HALF], ids=str)
def test_any_number_of_threads_gives_the_same_bits(dtype):
    call = Case((12, 4), [700, 31, 256, 512] * 4, 700, 64).call(dtype)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(pinned("native", call))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@built
def test_a_row_alone_gives_the_bits_of_the_batch():
    call = CASES["several chunks"].call(BF16)
    whole = pinned("native", call)
    for r in range(4):
        row = {n: x[r : r + 1] for n, x in call.items()}
        assert torch.equal(pinned("native", row), whole[r : r + 1])


# ---- memory ------------------------------------------------------------------------------------


@either
def test_layouts(way):
    call = Case((4, 2), [21, 9], 24, 40, beams=True).call(FLOAT)
    expected = pinned(way, call)

    def by_position(cache: Tensor) -> Tensor:
        return cache.transpose(1, 2).contiguous().transpose(1, 2)

    def part_of_more(cache: Tensor) -> Tensor:
        return torch.cat([cache, cache], 3)[..., : cache.shape[3]]

    def off_by_one(cache: Tensor) -> Tensor:
        return torch.cat([cache.new_zeros(1), cache.flatten()])[1:].view(cache.shape)

    every_other = call["q"].repeat_interleave(2, -1)[..., ::2]
    long = call["beam_index"].long().repeat_interleave(2, 1)[:, ::2]
    lengths = call["lengths"].int().repeat_interleave(3)[::3]
    for layout in (by_position, part_of_more, off_by_one):
        views = {n: layout(call[n]) for n in ("k_cache", "v_cache")}
        views |= {"q": every_other, "beam_index": long, "lengths": lengths}
        assert torch.equal(pinned(way, call | views), expected)


@pytest.mark.parametrize("way", [NATIVE, "torch", "reference", "triton"])
@pytest.mark.parametrize("beams", [False, True])
def test_queries_that_lie_apart(way, beams):
    """What lies between their numbers is never read."""
    call = Case((6, 2), [21, 9], 24, 40, beams=beams).call(FLOAT)
    apart = torch.full((*call["q"].shape[:3], 80), torch.nan)
    apart[..., ::2] = call["q"]
    found = pinned(way, call | {"q": apart[..., ::2]})
    assert torch.equal(found, pinned(way, call))


@pytest.mark.parametrize("how", ["beam_index", "block_table"])
def test_without_the_native_way_an_empty_table_gives_zero(how, monkeypatch):
    """torch's kernel would divide by its number of keys, and end the process."""
    others = {name: way for name, way in OP.implementations.items() if name != "native"}
    monkeypatch.setattr(OP, "implementations", others)
    call = Case((2, 1), [9, 4], 9, 16).call(FLOAT)
    call |= {"lengths": torch.tensor([0, 0]), how: torch.zeros(2, 0, dtype=torch.int32)}
    with force("torch"), pytest.raises(KernelUnavailable, match="empty"):
        decode_attention(**call)
    with force("reference"):
        assert (decode_attention(**call) == 0).all()
    assert (decode_attention(**call) == 0).all()


@either
def test_one_cache_row_for_all(way):
    call = Case((2, 1), [9, 5], 9, 16).call(FLOAT)
    shared = {n: call[n][:1].expand(2, -1, -1, -1) for n in ("k_cache", "v_cache")}
    copied = {n: t.contiguous() for n, t in shared.items()}
    assert torch.equal(pinned(way, call | shared), pinned(way, call | copied))


@either
def test_offsets_past_31_bits(way):
    small = Case((2, 1), [5, 3], 5, 16).call(HALF)
    far = {}
    for name in ("k_cache", "v_cache"):
        far[name] = torch.empty_strided((2, 1, 5, 16), (2**31 + 16, 80, 16, 1), dtype=HALF)
        far[name].copy_(small[name])
    assert torch.equal(pinned(way, small | far), pinned(way, small))


# ---- values ------------------------------------------------------------------------------------


@either
def test_nan_in_a_key_in_use_stays_in_its_row(way):
    call = Case((2, 2), [9, 20, 20], 20, 16).call(FLOAT)
    clean = pinned(way, call)
    call["k_cache"][1, 0, 3] = math.nan
    dirty = pinned(way, call)
    assert dirty[1, 0].isnan().all()
    dirty[1, 0] = clean[1, 0]
    assert torch.equal(dirty, clean)


@pytest.mark.parametrize("way", [NATIVE, "triton", "reference"])
def test_a_row_that_the_bias_hides_gives_zero(way):
    call = Case((2, 1), [9, 9], 9, 16, bias=(2, 1, 1, 9)).call(FLOAT)
    call["bias"][0] = -math.inf
    call["bias"][1] = torch.finfo(FLOAT).min
    out = pinned(way, call)
    assert (out[0] == 0).all()
    mean = call["v_cache"][1].mean(1, keepdim=True).expand(2, 1, 16)
    torch.testing.assert_close(out[1], mean, rtol=1e-5, atol=1e-6)


@either
def test_huge_scores(way):
    call = Case((2, 1), [300, 40], 300, 16).call(FLOAT)
    call["q"] *= 1e4
    torch.testing.assert_close(pinned(way, call), plain(call, torch.float64).float())


# ---- bad input and the choice ------------------------------------------------------------------


@pytest.mark.parametrize("way", [NATIVE, "torch", "reference"])
@pytest.mark.parametrize("change, message", [
    ({"lengths": torch.tensor([10, 2])}, "lengths is 2..10; keep it within 0..9"),
    ({"lengths": torch.tensor([3, -1])}, "lengths is -1..3; keep it within 0..9"),
    ({"lengths": torch.tensor([2**40, 1])}, "lengths is 1..1099511627776; keep it within 0..9"),
    ({"beam_index": torch.tensor([[0, 1], [1, 2]]), "lengths": torch.tensor([2, 2])},
     "beam_index is 0..2; keep it within 0..1"),
    ({"beam_index": torch.tensor([[0, 1], [1, -3]]).int(), "lengths": torch.tensor([2, 2])},
     "beam_index is -3..1; keep it within 0..1"),
    ({"beam_index": torch.tensor([[0, 1], [1, 0]]), "lengths": torch.tensor([2, 3])},
     "lengths is 2..3; keep it within 0..2"),
    ({"block_table": torch.tensor([[0, 2**32], [1, 0]])},
     "block_table is 0..4294967296; keep it within 0..1"),
    ({"block_table": torch.tensor([[0, 1], [1, 0]]), "lengths": torch.tensor([19, 1])},
     "lengths is 1..19; keep it within 0..18"),
])  # fmt: skip
def test_every_way_names_what_is_out_of_range(way, change, message):
    call = Case((2, 1), [9, 4], 9, 16).call(FLOAT) | change
    with pytest.raises(ArgumentError, match=f"^decode_attention: {message}$"):
        pinned(way, call)


def test_triton_stays_within_the_cache():
    """A GPU's lengths and tables are not read by the host: the kernel clamps what is outside."""
    call = Case((2, 1), [9, 4], 9, 16).call(FLOAT)
    long = call | {"lengths": torch.tensor([90, -4])}
    exact = call | {"lengths": torch.tensor([9, 0])}
    assert torch.equal(pinned("triton", long), pinned("triton", exact))
    call = Case((2, 1), [9, 4], 9, 16, beams=True).call(FLOAT)
    call["beam_index"][0, 3], call["beam_index"][1, 0] = 2**30, -5
    inside = call | {"beam_index": call["beam_index"].clamp(0, 3)}
    assert torch.equal(pinned("triton", call), pinned("triton", inside))


@built
def test_the_native_way_comes_first_and_says_what_it_cannot_take():
    call = Case((2, 1), [9, 4], 9, 16).call(FLOAT)
    assert explain(decode_attention, **call).implementation == "native"
    double = {n: x.double() if x.is_floating_point() else x for n, x in call.items()}
    apart = {n: call[n].repeat_interleave(2, -1)[..., ::2] for n in ("k_cache", "v_cache")}
    many = call | {"q": normal(2, 65, 1, 16, seed=0)}
    for refused, why in (
        (double, "sums are float32"),
        (call | apart, "lie together"),
        (many, "64 queries"),
    ):
        assert explain(decode_attention, **refused).implementation != "native"
        with pytest.raises(KernelUnavailable, match=why):
            pinned("native", refused)


def test_splits_fill_the_chip_and_cover_the_cache():
    for capacity in (1, 16, 63, 64, 65, 1000, 8192, 8200, 131072):
        for programs in (1, 8, 32, 128, 1000):
            splits, size = divide(capacity, 64, programs, 132 * 4)
            assert 1 <= splits <= 64 and size % 64 == 0
            assert (splits - 1) * size < capacity <= splits * size
    assert divide(64, 64, 1, 528)[0] == 1  # a single tile is not cut
    assert divide(8192, 64, 4096, 528)[0] == 1  # nor is anything where the chip is full
    assert divide(8192, 64, 128, 528) == (4, 2048)  # one wave
    assert divide(8192, 64, 8, 528) == (64, 128)
