"""decode_attention on a GPU: every dtype, head dim and feature, long caches, the same bits.

Shapes: q [R, Hq, Sq, D]; caches [C, Hkv, T, D]; lengths [R]; beam_index [R, T]; block_table [R, N].
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from tilewise_kernels import decode_attention, explain, force

pytestmark = pytest.mark.gpu
HALF, BF16, FLOAT = torch.float16, torch.bfloat16, torch.float32
Tensors = dict[str, Tensor]

# R, Hq, Hkv, Sq, T, D: every head dim and group once or more, at lengths round the tile sizes.
SHAPES = [
    (3, 4, 4, 1, 1023, 64),
    (2, 6, 2, 1, 1025, 128),
    (4, 32, 8, 1, 4096, 128),
    (2, 7, 1, 3, 129, 80),
    (2, 8, 1, 8, 257, 59),
    (1, 40, 1, 4, 513, 128),
    (1, 2, 1, 1, 8192, 256),
    (5, 12, 12, 1, 63, 40),
]


def make(normal, pick, shape: tuple[int, ...], dtype: torch.dtype) -> Tensors:
    r, hq, hkv, sq, t, d = shape
    t = pick(t, 40)
    hq, hkv = pick((hq, hkv), (hq // hkv, 1))
    lengths = torch.tensor([t - 3 * i * t // (4 * r) for i in range(r)])
    q = normal(r, hq, sq, d, dtype=dtype)
    caches = {n: normal(r, hkv, t, d, dtype=dtype) for n in ("k_cache", "v_cache")}
    return {"q": q, "lengths": lengths.to(q.device)} | caches


def forced(way: str, t: Tensors, **options: Any) -> Tensor:
    with force(way):
        return decode_attention(**t, **options)


def features(t: Tensors, normal) -> dict[str, dict[str, Any]]:
    """Options to add to a call, by name."""
    (r, hq, _, _), width = t["q"].shape, t["k_cache"].shape[2]
    beams = torch.randint(r, (r, width), generator=torch.Generator().manual_seed(1)).int()
    slopes = 2.0 ** -torch.arange(1, hq + 1, dtype=FLOAT)
    single = {
        "plain": {},
        "beams": {"beam_index": beams.to(t["q"].device)},
        "window": {"window": (width // 3, 0)},
        "alibi": {"alibi_slopes": slopes.to(t["q"].device)},
        "bias": {"bias": normal(hq, 1, width, dtype=t["q"].dtype)},
    }
    return single | {
        "everything": {k: v for options in single.values() for k, v in options.items()}
    }


@pytest.mark.parametrize("dtype", [FLOAT, BF16, HALF], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_accuracy(shape, dtype, accurate, normal, pick):
    dtype = pick(dtype, HALF if dtype == BF16 else dtype)
    tensors = make(normal, pick, shape, dtype)
    accurate(lambda t: forced("triton", t), lambda t: forced("reference", t), tensors)


@pytest.mark.parametrize("name", ["beams", "window", "alibi", "bias", "everything"])
@pytest.mark.parametrize("dtype", [FLOAT, BF16], ids=str)
def test_features(name, dtype, accurate, normal, pick):
    dtype = pick(dtype, HALF if dtype == BF16 else dtype)
    tensors = make(normal, pick, (3, 6, 2, 2, 1025, 128), dtype)
    options = features(tensors, normal)[name]

    def wide(t: Tensors) -> dict[str, Any]:
        like = t["q"].dtype
        return {n: x.to(like) if n == "bias" else x for n, x in options.items()}

    accurate(
        lambda t: forced("triton", t, **wide(t)),
        lambda t: forced("reference", t, **wide(t)),
        tensors,
    )


@pytest.mark.parametrize("page", [16, 64, 100])
def test_pages_are_the_contiguous_cache(page, normal, pick):
    pages = pick(20, 2)
    tensors = make(normal, lambda real, small: real, (2, 4, 2, 1, page * pages, 64), HALF)
    order = torch.randperm(2 * pages, generator=torch.Generator().manual_seed(2))
    paged = {}
    for name in ("k_cache", "v_cache"):
        cut = tensors[name].unflatten(2, (pages, page)).transpose(1, 2).flatten(0, 1)
        paged[name] = torch.empty_like(cut)
        paged[name][order.to(cut.device)] = cut
    table = order.view(2, pages).int().to(tensors["q"].device)
    found = forced("triton", tensors | paged, block_table=table)
    assert torch.equal(found, forced("triton", tensors))


def test_stale_positions_never_leak(normal, pick):
    tensors = make(normal, pick, (4, 8, 2, 1, 3000, 128), HALF)
    clean = forced("triton", tensors)
    for name in ("k_cache", "v_cache"):
        past = torch.arange(tensors[name].shape[2], device=clean.device)
        past = past >= tensors["lengths"][:, None]
        tensors[name] = tensors[name].masked_fill(past[:, None, :, None], float("nan"))
    assert torch.equal(forced("triton", tensors), clean)


def test_rows_without_positions_give_zero(normal, pick):
    tensors = make(normal, pick, (3, 4, 2, 1, 2000, 64), HALF)
    tensors["lengths"][1] = 0
    out = forced("triton", tensors)
    assert (out[1] == 0).all() and out.isfinite().all()


@pytest.mark.parametrize("name", ["plain", "everything"])
def test_repeats_give_the_same_bits(name, normal, pick):
    tensors = make(normal, pick, (2, 8, 2, 1, 8192, 128), HALF)
    options = features(tensors, normal)[name]
    first = forced("triton", tensors, **options)
    for _ in range(pick(50, 2)):
        assert torch.equal(forced("triton", tensors, **options), first)


def test_no_wait_for_the_device(normal, pick, gpu_only):
    """The host never reads lengths or tables, so that a step can be captured and replayed."""
    gpu_only("CUDA graph")
    tensors = make(normal, pick, (4, 8, 2, 1, 2048, 128), BF16)
    options = features(tensors, normal)["beams"]
    assert explain(decode_attention, **tensors, **options).implementation == "triton"
    decode_attention(**tensors, **options)  # compile before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = decode_attention(**tensors, **options)
    tensors["lengths"] -= 100
    graph.replay()
    assert torch.equal(out, decode_attention(**tensors, **options))


def test_offsets_past_31_bits(normal, pick, room):
    room(20)
    small = make(normal, lambda real, small: real, (2, 2, 1, 1, 40, 64), HALF)
    far = {}
    for name in ("k_cache", "v_cache"):
        strides = (2**31 + 64, 40 * 64, 64, 1)
        far[name] = torch.empty_strided(
            (2, 1, 40, 64), strides, dtype=HALF, device=small["q"].device
        )
        far[name].copy_(small[name])
    assert torch.equal(forced("triton", small | far), forced("triton", small))
