"""What happens to attention's scores: bias, ALiBi, windows, softcap, dropout, and all at once.

Shapes: q [B, Hq, Sq, D]; k [B, Hkv, Sk, D]; v [B, Hkv, Sk, Dv]. Every way against the formula in
float64, whose dropout mask is rebuilt from the seed with tilewise_kernels.dropout.
"""

import math
import random
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from attention_formula import Named, eager, run, seen
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tilewise_kernels import attention, dropout, force
from tilewise_kernels.attention import OP
from tilewise_kernels.errors import KernelUnavailable

INF = math.inf
F32 = torch.float32
DTYPES = (F32, torch.bfloat16, torch.float16)
WAYS = ("native", "torch", "blocked", "reference")


def ways(dtype: torch.dtype = F32, **options: Any) -> list[str]:
    """The ways that can run a call on the CPU."""
    refusing = {"native"} if dtype in (torch.float16, torch.float64) else set()
    if options.get("softcap") is not None or options.get("dropout_p"):
        refusing.add("torch")
    return [way for way in WAYS if way not in refusing]


def ours(**call: Any) -> tuple[Tensor, Tensor]:
    result = attention(**call, return_lse=True)
    assert isinstance(result, tuple)
    return result


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def qkv(
    heads: tuple[int, int], size: tuple[int, int], D: int = 16, Dv: int | None = None, B: int = 2
) -> tuple[Named, Tensor]:
    """Tensors of a call and an upstream gradient."""
    (hq, hkv), (sq, sk), Dv = heads, size, Dv or D
    tensors = {"q": normal(B, hq, sq, D), "k": normal(B, hkv, sk, D, seed=1)}
    return tensors | {"v": normal(B, hkv, sk, Dv, seed=2)}, normal(B, hq, sq, Dv, seed=3)


@pytest.fixture
def agrees(assert_accurate):
    """agrees(tensors, grad, dtype, **options): every way keeps the accuracy rule."""

    def check(tensors: Named, grad: Tensor, dtype: torch.dtype, **options: Any) -> None:
        low = {n: t if n == "bias" else t.to(dtype) for n, t in tensors.items()}
        grad = grad.to(dtype)
        torch.manual_seed(5)
        seed = dropout.draw_seed(torch.device("cpu")) if options.get("dropout_p") else None
        exact = run(eager, low, torch.float64, grad, **options, seed=seed)
        plain = run(eager, low, dtype, grad, **options, seed=seed)
        for way in ways(dtype, **options):
            torch.manual_seed(5)
            with force(way, "attention"):
                found = run(ours, low, dtype, grad, **options)
            assert_accurate(found, plain, exact)
            for name, tensor in low.items():
                assert found[f"d{name}"].dtype == tensor.dtype, name

    return check


# ---- bias --------------------------------------------------------------------------------------

BIASES = [(17, 33), (1, 4, 17, 33), (2, 1, 1, 33), (2, 4, 1, 1), (17, 1), (4, 1, 33), (), (1,)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", BIASES, ids=str)
def test_bias_and_its_gradient_have_the_bias_shape(shape, causal, dtype, assert_accurate):
    """Unforced (native where it can), and blocked; over keys it is beyond the torch way."""
    tensors, grad = qkv((4, 2), (17, 33))
    tensors = {n: t.to(dtype) for n, t in tensors.items()} | {"bias": normal(*shape, seed=4)}
    grad = grad.to(dtype)
    exact = run(eager, tensors, torch.float64, grad, causal=causal)
    plain = run(eager, tensors, dtype, grad, causal=causal)
    found = run(ours, tensors, dtype, grad, causal=causal)
    assert found["dbias"].shape == shape and found["dbias"].dtype == F32
    assert_accurate(found, plain, exact)
    with force("blocked"):
        assert_accurate(run(ours, tensors, dtype, grad, causal=causal), plain, exact)


@pytest.mark.parametrize("bias_dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_bias_in_a_dtype_of_its_own(bias_dtype):
    tensors, grad = qkv((2, 1), (9, 33))
    bias = normal(2, 9, 33, seed=4).to(bias_dtype)
    found = run(ours, tensors | {"bias": bias}, F32, grad)
    plain = run(ours, tensors | {"bias": bias.float()}, F32, grad)
    assert found["dbias"].dtype == bias_dtype
    torch.testing.assert_close(found["out"], plain["out"])
    torch.testing.assert_close(found["dbias"], plain["dbias"].to(bias_dtype))


@pytest.mark.parametrize("way", WAYS)
def test_bias_that_is_expanded_or_strided(way):
    tensors, grad = qkv((2, 1), (9, 33))
    small = normal(9, 66, seed=4)[:, ::2]
    for bias in (small, small.expand(2, 2, 9, 33), normal(33, 9, seed=4).mT):
        with force(way):
            found = run(ours, tensors | {"bias": bias}, F32, grad)
        exact = run(eager, tensors | {"bias": bias}, torch.float64, grad)
        for name, true in exact.items():
            torch.testing.assert_close(found[name].double(), true, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("trained", ["q", "bias"])
def test_bias_or_the_rest_alone(trained):
    tensors, grad = qkv((2, 1), (9, 33))
    tensors["bias"] = normal(9, 33, seed=4)
    whole = run(ours, tensors, F32, grad)
    leaves = tensors | {trained: tensors[trained].clone().requires_grad_()}
    (alone,) = torch.autograd.grad(attention(**leaves), leaves[trained], grad)
    torch.testing.assert_close(alone, whole[f"d{trained}"])


def test_bias_without_gradient_equals_a_float_mask():
    tensors, _ = qkv((2, 1), (9, 33))
    bias = normal(2, 9, 33, seed=4)
    assert torch.equal(attention(**tensors, bias=bias), attention(**tensors, mask=bias))


@pytest.mark.parametrize("mask_shape", [(2, 1, 1, 33), (17, 33)], ids=str)
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_bias_and_mask_and_lengths(kind, mask_shape, agrees):
    tensors, grad = qkv((4, 2), (17, 33))
    tensors["bias"] = normal(1, 4, 17, 33, seed=4)
    drawn = normal(*mask_shape, seed=5)
    mask = drawn > -0.8 if kind == "bool" else drawn.masked_fill(drawn < -0.8, -INF)
    agrees(tensors, grad, F32, mask=mask, causal=True)
    agrees(tensors, grad, F32, mask=mask, key_lengths=torch.tensor([33, 20]))


# ---- ALiBi -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [
    {}, {"causal": True}, {"window": (9, 3)}, {"key_lengths": torch.tensor([20, 33])},
    {"mask": normal(2, 1, 1, 33, seed=6) > -0.5, "causal": True}, {"scale": -0.5},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("sq", [33, 17, 1, 40])
def test_alibi(sq, options, dtype, agrees):
    tensors, grad = qkv((4, 2), (sq, 33))
    agrees(tensors, grad, dtype, alibi_slopes=torch.tensor([0.5, 0.25, 0.0, -0.1]), **options)


def test_alibi_equals_its_bias_on_long_sequences():
    tensors, _ = qkv((2, 1), (300, 700), D=8, B=1)
    slopes = torch.tensor([0.1, 0.01], dtype=torch.bfloat16)
    distance = (torch.arange(300)[:, None] + 400 - torch.arange(700)).abs()
    bias = -slopes.float()[:, None, None] * distance
    for causal in (False, True):
        expected = attention(**tensors, bias=bias, causal=causal)
        found = attention(**tensors, alibi_slopes=slopes, causal=causal)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-6)


# ---- windows -----------------------------------------------------------------------------------

WINDOWS = [(0, 0), (3, 0), (None, 2), (5, None), (4, 7), (100, 100), (None, None), (2**70, 1)]


@pytest.mark.parametrize("size", [(33, 33), (17, 40), (40, 17), (1, 33)], ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_window(window, causal, size, agrees):
    tensors, grad = qkv((4, 2), size)
    agrees(tensors, grad, F32, window=window, causal=causal)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [
    {"window": (70, 0)},
    {"window": (20, 30), "key_lengths": torch.tensor([600, 77])},
    {"window": (200, 0), "mask": normal(2, 1, 1, 600, seed=6) > -0.5},
    {"window": (40, None), "causal": True, "key_lengths": torch.tensor([0, 500])},
], ids=str)  # fmt: skip
def test_windows_over_several_blocks(options, dtype, agrees):
    tensors, grad = qkv((2, 1), (300, 600), D=8)
    agrees(tensors, grad, dtype, **options)


@pytest.mark.parametrize("options", [{"window": (9, 0)}, {"window": (9, None)}], ids=str)
@pytest.mark.parametrize("way", WAYS[:3])
def test_keys_outside_every_window_are_not_read(way, options):
    """NaN in them would spread."""
    tensors, grad = qkv((2, 1), (5, 600))
    outside = torch.arange(600)[:, None] < 600 - 5 - 9
    spoilt = {n: t if n == "q" else t.masked_fill(outside, math.nan) for n, t in tensors.items()}
    with force(way):
        clean = run(ours, tensors, F32, grad, **options)
        found = run(ours, spoilt, F32, grad, **options)
    assert all(torch.equal(found[name], clean[name]) for name in clean)


@pytest.mark.parametrize("poison", [math.nan, INF])
@pytest.mark.parametrize("way", WAYS)
def test_a_dead_row_has_gradient_0_beside_keys_that_are_not_finite(way, poison):
    tensors, grad = qkv((2, 1), (5, 20))
    for name in "kv":
        tensors[name][0, :, 7:] = poison
    mask = torch.ones(2, 1, 5, 20, dtype=torch.bool)
    mask[0, :, 3] = False
    with force(way):
        found = run(ours, tensors, F32, grad, mask=mask)
    assert (found["out"][0, :, 3] == 0).all() and (found["dq"][0, :, 3] == 0).all()
    assert found["out"][0, :, 2].isnan().all()
    assert all(found[name][1].isfinite().all() for name in ("out", "dq", "dk", "dv"))


def test_rows_whose_window_is_empty():
    """More queries than keys: the first rows look before the first key."""
    tensors, grad = qkv((2, 1), (40, 20))
    for way in WAYS:
        with force(way):
            found = run(ours, tensors, F32, grad, window=(3, 4))
        dead = slice(0, 20 - 4)
        assert (found["out"][:, :, dead] == 0).all() and (found["lse"][:, :, dead] == -INF).all()
        assert (found["dq"][:, :, dead] == 0).all()
        assert found["lse"][:, :, dead.stop :].isfinite().all()
        assert all(found[n].isfinite().all() for n in ("out", "dq", "dk", "dv"))


def test_cost_counts_the_keys_of_a_window():
    def flops(**options: Any) -> int:
        with torch.no_grad():
            return OP.cost(*canonical(**options)).flops

    pairs = seen(17, 40, True, (5, 0), None).sum()
    assert flops(window=(5, 0)) == 2 * 2 * 4 * pairs * (16 + 8)
    assert flops() == 2 * 2 * 4 * 17 * 40 * (16 + 8)


def canonical(**options: Any) -> tuple[Any, ...]:
    """The op's own arguments for a call of attention, Dv = 8."""
    tensors, _ = qkv((4, 2), (17, 40), Dv=8)
    left, right = (-1 if n is None else n for n in options.get("window", (None, None)))
    rest = (None,) * 5 + (False, left, right, 0.0, 1.0, 0.0)
    return *tensors.values(), *rest


# ---- softcap -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("softcap", [0.5, 20.0])
def test_softcap(softcap, dtype, agrees):
    tensors, grad = qkv((4, 2), (17, 33))
    tensors["bias"] = normal(1, 4, 17, 33, seed=4)
    agrees(tensors, grad, dtype, softcap=softcap, scale=1.0, causal=True)


def test_softcap_of_huge_scores():
    tensors, grad = qkv((2, 1), (9, 33))
    found = run(ours, tensors, F32, grad, softcap=10.0, scale=1e6)
    assert all(t.isfinite().all() for t in found.values())
    assert found["lse"].max() <= 10 + math.log(33) + 1e-5


# ---- dropout -----------------------------------------------------------------------------------


def test_dropout_of_nothing_is_no_dropout():
    tensors, grad = qkv((4, 2), (17, 33))
    state = torch.get_rng_state()
    found, plain = (run(ours, tensors, F32, grad, **o) for o in ({"dropout_p": 0.0}, {}))
    assert all(torch.equal(found[name], plain[name]) for name in plain)
    assert torch.equal(torch.get_rng_state(), state), "a seed was drawn"


def test_dropout_of_everything_is_zero():
    tensors, grad = qkv((4, 2), (17, 33))
    found = run(ours, tensors, F32, grad, dropout_p=1, causal=True)
    plain = run(ours, tensors, F32, grad, causal=True)
    assert all((found[name] == 0).all() for name in ("out", "dq", "dk", "dv"))
    torch.testing.assert_close(found["lse"], plain["lse"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [
    {}, {"causal": True}, {"window": (9, 3)}, {"key_lengths": torch.tensor([20, 33])},
    {"softcap": 2.0, "alibi_slopes": torch.tensor([0.5, 0.25, 0.0, 0.1])},
], ids=str)  # fmt: skip
def test_dropout_drops_the_same_elements_forward_and_backward(options, dtype, agrees):
    tensors, grad = qkv((4, 2), (150, 33))
    tensors["bias"] = normal(1, 4, 150, 33, seed=4)
    agrees(tensors, grad, dtype, dropout_p=0.3, **options)


def dropped(p: float = 0.25, heads: int = 2) -> Tensor:
    """Bool [B, heads, Sq, Sk]: which keys dropout drops, read off an identity of values."""
    q, v = torch.zeros(2, heads, 64, 8), torch.eye(64).expand(2, heads, 64, 64)
    out = attention(q, torch.zeros(2, heads, 64, 8), v, dropout_p=p)
    expected = torch.tensor([0.0, 1 / 64 / (1 - p)])
    assert ((out[..., None] - expected).abs().amin(-1) < 1e-7).all()
    return out == 0


def test_dropout_follows_manual_seed_and_differs_by_step_head_and_item():
    torch.manual_seed(1)
    first, second = dropped(), dropped()
    torch.manual_seed(1)
    assert torch.equal(dropped(), first)
    for a, b in ((first, second), (first[:, 0], first[:, 1]), (first[0], first[1])):
        assert 0.3 < (a != b).float().mean() < 0.45  # 2 p (1 - p) = 0.375


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_drops_its_share(p):
    torch.manual_seed(2)
    share = dropped(p, heads=8).double()
    n = share.numel()
    assert abs(share.mean() - p) < 5 * math.sqrt(p * (1 - p) / n)
    for axis in (2, 3):  # of every row and column
        spread = 5.5 * math.sqrt(p * (1 - p) / 64)
        assert (share.mean(axis) - p).abs().max() < spread


@pytest.mark.parametrize("reentrant", [False, True])
def test_dropout_is_the_same_under_checkpoint(reentrant):
    tensors, grad = qkv((4, 2), (17, 33))

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, dropout_p=0.4, causal=True)

    def checkpointed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return checkpoint(call, q, k, v, use_reentrant=reentrant)

    results = []
    for function in (call, checkpointed):
        torch.manual_seed(3)
        leaves = [t.clone().requires_grad_() for t in tensors.values()]
        function(*leaves).backward(grad)
        results.append([t.grad for t in leaves])
    for plain, again in zip(*results, strict=True):
        assert torch.equal(plain, again)


@pytest.mark.parametrize("options", [{}, {"softcap": 2.0, "causal": True}], ids=str)
def test_gradcheck_with_dropout(options):
    tensors, _ = qkv((4, 2), (3, 4), D=2, Dv=3, B=1)
    leaves = [t.double().requires_grad_() for t in (*tensors.values(), normal(4, 1, 4, seed=4))]

    def call(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        torch.manual_seed(3)
        return attention(q, k, v, bias=bias, dropout_p=0.4, **options)

    for way in ways(torch.float64, dropout_p=0.4):
        with force(way):
            assert torch.autograd.gradcheck(call, leaves)


def test_dropout_compiles_and_draws_a_new_mask_at_each_call():
    tensors, grad = qkv((4, 2), (17, 33))
    leaves = [t.clone().requires_grad_() for t in tensors.values()]

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, dropout_p=0.4, softcap=5.0, window=(7, 2))

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    torch.manual_seed(3)
    first, second = compiled(*leaves), compiled(*leaves)
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    plain = call(*leaves)
    torch.testing.assert_close(first, plain)
    found, expected = (torch.autograd.grad(out, leaves, grad) for out in (first, plain))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


# ---- head dims and groups ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dims", [(16, 40), (40, 16), (8, 1), (64, 33)], ids=str)
@pytest.mark.parametrize("options", [
    {}, {"causal": True}, {"window": (9, 3)}, {"key_lengths": torch.tensor([20, 33])},
    {"softcap": 2.0},
], ids=str)  # fmt: skip
def test_values_of_another_head_dim(options, dims, dtype, agrees):
    tensors, grad = qkv((4, 2), (33, 33), *dims)
    agrees(tensors, grad, dtype, **options)


@pytest.mark.parametrize("group", [3, 5, 7])
@pytest.mark.parametrize("options", [
    {"causal": True}, {"window": (5, 0)}, {"softcap": 2.0, "dropout_p": 0.2},
], ids=str)  # fmt: skip
def test_groups(group, options, agrees):
    tensors, grad = qkv((2 * group, 2), (17, 33))
    tensors["bias"] = normal(2 * group, 17, 33, seed=4)
    slopes = torch.rand(2 * group, generator=torch.Generator().manual_seed(7))
    agrees(tensors, grad, F32, alibi_slopes=slopes, **options)


# ---- everything at once --------------------------------------------------------------------------


def draw(chance: random.Random) -> tuple[Named, Tensor, dict[str, Any]]:
    """A small call with any of the options, as likely as not each."""

    def maybe() -> bool:
        return chance.random() < 0.5

    B, hkv, group = chance.randint(1, 3), chance.randint(1, 2), chance.randint(1, 3)
    sq, sk = chance.choice([1, 2, 5, 17, 130, 150]), chance.choice([1, 3, 16, 33, 140])
    D = chance.choice([1, 8, 13])
    Dv = chance.choice([8, 5]) if maybe() else D
    tensors, grad = qkv((hkv * group, hkv), (sq, sk), D, Dv, B)
    whole = (B, hkv * group, sq, sk)

    def shape() -> list[int]:
        return [n if maybe() else 1 for n in whole[:3]] + [sk if chance.random() < 0.9 else 1]

    options: dict[str, Any] = {"causal": maybe()}
    if maybe():
        tensors["bias"] = normal(*shape(), seed=chance.randrange(99))
    if maybe():
        drawn = normal(*shape(), seed=chance.randrange(99))
        options["mask"] = drawn > -1 if maybe() else drawn.masked_fill(drawn < -1, -INF)
    if maybe():
        options["key_lengths"] = torch.tensor([chance.randint(0, sk) for _ in range(B)])
    if maybe():
        bounds = [None, 0, 1, 7, 40, 1000]
        options["window"] = (chance.choice(bounds), chance.choice(bounds))
    if maybe():
        options["alibi_slopes"] = normal(hkv * group, seed=chance.randrange(99)) / 4
    if chance.random() < 0.3:
        options["softcap"] = chance.choice([0.5, 3.0, 50.0])
    if chance.random() < 0.3:
        options["dropout_p"] = chance.choice([0.1, 0.5, 1.0])
    if maybe():
        options["scale"] = chance.choice([-0.7, 0.0, 1.0])
    return tensors, grad, options


@pytest.mark.parametrize("number", range(120))
def test_any_combination(number):
    """float32 against the formula in float64, each way that can run the call."""
    tensors, grad, options = draw(random.Random(number))
    torch.manual_seed(number)
    seed = dropout.draw_seed(torch.device("cpu")) if options.get("dropout_p") else None
    exact = run(eager, tensors, torch.float64, grad, **options, seed=seed)
    terms = [t for t in (tensors.get("bias"), options.get("mask")) if t is not None]
    over_keys = any(t.shape[3] != tensors["k"].shape[2] for t in terms)
    for way in ("", *ways(**options)):
        torch.manual_seed(number)
        with force(way) if way else nullcontext():
            if way == "torch" and over_keys:
                with pytest.raises(KernelUnavailable, match="over keys"):
                    run(ours, tensors, F32, grad, **options)
                continue
            found = run(ours, tensors, F32, grad, **options)
        for name, true in exact.items():
            scale = true[true.isfinite()].abs().max().item() if true.isfinite().any() else 0.0
            torch.testing.assert_close(
                found[name].double(), true, rtol=1e-5, atol=2e-5 * max(scale, 1.0),
                msg=lambda m, name=name, way=way: f"{name}, {way or 'unforced'}: {m}",
            )  # fmt: skip


# ---- the Triton way through the public function ------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, torch.float16], ids=str)
@pytest.mark.parametrize("options", [
    {"bias": (1, 4, 17, 33), "causal": True},
    {"bias": (2, 1, 1, 33), "mask": normal(17, 33, seed=5) > -1},
    {"bias": (2, 4, 1, 1), "alibi_slopes": torch.tensor([0.5, 0.25, 0.0, 0.1])},
    {"bias": (), "window": (9, 3), "key_lengths": torch.tensor([20, 33])},
    {"bias": (17, 1), "softcap": 2.0, "dropout_p": 0.3, "Dv": 8},
], ids=str)  # fmt: skip
def test_triton(options, dtype, assert_accurate):
    """Dropout's elements are those of the formula here too."""
    options = dict(options)
    tensors, grad = qkv((4, 2), (17, 33), Dv=options.pop("Dv", None))
    tensors = {n: t.to(dtype) for n, t in tensors.items()}
    tensors["bias"] = normal(*options.pop("bias"), seed=4)
    grad = grad.to(dtype)
    torch.manual_seed(5)
    seed = dropout.draw_seed(torch.device("cpu"))
    exact = run(eager, tensors, torch.float64, grad, **options, seed=seed)
    plain = run(eager, tensors, dtype, grad, **options, seed=seed)
    torch.manual_seed(5)
    with force("triton"):
        assert_accurate(run(ours, tensors, dtype, grad, **options), plain, exact)
