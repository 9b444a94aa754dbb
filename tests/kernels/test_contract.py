"""What every op promises, asked of every op in torch.ops.tilewise through one table of samples.

A new op adds its lines to `samples` and `at_length`; until then the first test fails.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from tilewise_kernels import (
    attention,
    attention_varlen,
    cross_entropy,
    decode_attention,
    explain,
    feed_forward,
    force,
    layer_norm,
    linear_act,
    linear_cross_entropy,
    log_softmax,
    log_softmax_topk,
    rms_norm,
    rotary,
    softmax,
)

# Read before any test runs, so that ops which tests define do not count.
OPS = sorted(
    name.removeprefix("tilewise::").split(".")[0]
    for name in torch._C._dispatch_get_all_op_names()
    if name.startswith("tilewise::")
    and not name.startswith("tilewise::adamw_step")  # changes its inputs: test_adamw.py
)
INFERENCE_ONLY = {"linear"}  # most of what follows asks for gradients: their own files test them
# as the torch functions of the same name
FLOAT32_UNDER_AUTOCAST = {
    "softmax",
    "layer_norm",
    "rms_norm",
    "log_softmax",
    "log_softmax_topk",
    "cross_entropy",
}
FLOAT32_LOSS = {"linear_cross_entropy"}  # whose products run in the dtype of autocast

# ---- samples -----------------------------------------------------------------------------------


@dataclass
class Sample:
    """A call of a public function: tensors that may need gradients, and everything else."""

    function: Callable[..., Any]
    name: str
    tensors: dict[str, Tensor]
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.function.__name__}, {self.name}"

    def trained(self, dtype: torch.dtype | None = None) -> "Sample":
        """A copy whose tensors are leaves that require grad, with the same strides."""
        leaves = {}
        for name, tensor in self.tensors.items():
            leaf = tensor.detach() if dtype is None else tensor.detach().to(dtype)
            leaves[name] = leaf.requires_grad_()
        return Sample(self.function, self.name, leaves, self.options)

    def outputs(self) -> tuple[Tensor, ...]:
        result = self.function(**self.tensors, **self.options)
        return result if isinstance(result, tuple) else (result,)

    def gradients(self, upstream: Callable[[Tensor], Tensor] = torch.ones_like) -> list[Tensor]:
        """Of the sum of the differentiable outputs, each weighted by `upstream`."""
        outputs = [y for y in self.outputs() if y.requires_grad]
        weights = [upstream(y) for y in outputs]
        return list(torch.autograd.grad(outputs, list(self.tensors.values()), weights))


def samples(dtype: torch.dtype = torch.float32) -> Iterator[Sample]:
    """At least four per op: plain, empty, strided or odd, with options. At most 64 elements."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    def strided(*shape: int) -> Tensor:
        return normal(*shape[:-1], 2 * shape[-1])[..., ::2]

    causal = {"causal": True}
    bool_mask = torch.tensor([[True, True, False, True, True], [False] * 5, [True] * 5])
    yield Sample(softmax, "plain", {"x": normal(3, 5)})
    yield Sample(softmax, "empty", {"x": normal(2, 0)})
    yield Sample(softmax, "strided, causal", {"x": strided(2, 3, 5)}, causal | {"scale": 0.5})
    yield Sample(softmax, "bool mask", {"x": normal(2, 3, 5)}, {"mask": bool_mask})
    yield Sample(
        softmax, "float mask, dim 0", {"x": normal(3, 5)}, {"dim": 0, "mask": torch.ones(5)}
    )

    yield Sample(log_softmax, "plain", {"x": normal(3, 5)})
    yield Sample(log_softmax, "empty", {"x": normal(2, 0)})
    yield Sample(log_softmax, "strided", {"x": strided(2, 3, 5)})
    yield Sample(log_softmax, "dim 0", {"x": normal(3, 5)}, {"dim": 0})
    yield Sample(log_softmax_topk, "plain", {"x": normal(3, 5)}, {"k": 2})
    yield Sample(log_softmax_topk, "empty", {"x": normal(0, 5)}, {"k": 5})
    yield Sample(log_softmax_topk, "strided, k 1", {"x": strided(2, 3, 5)}, {"k": 1})
    yield Sample(log_softmax_topk, "one row, all of it", {"x": normal(7)}, {"k": 7})

    labels = {"target": torch.tensor([1, -100, 4])}
    every = {"label_smoothing": 0.1, "z_loss": 0.01}
    yield Sample(cross_entropy, "plain", {"logits": normal(3, 5)}, labels)
    yield Sample(cross_entropy, "empty", {"logits": normal(0, 5)}, {"target": torch.ones(0).long()})
    yield Sample(cross_entropy, "strided, smooth, z", {"logits": strided(3, 5)}, labels | every)
    yield Sample(cross_entropy, "one row, sum", {"logits": normal(7)},
                 {"target": torch.tensor(2), "reduction": "sum"})  # fmt: skip
    yield Sample(cross_entropy, "none", {"logits": normal(3, 5)}, labels | {"reduction": "none"})

    def classifier(m: int, make=normal) -> dict[str, Tensor]:
        return {"x": make(m, 4), "weight": make(5, 4)}

    biased = classifier(3, strided) | {"bias": normal(5)}
    yield Sample(linear_cross_entropy, "plain", classifier(3), labels)
    yield Sample(linear_cross_entropy, "empty", classifier(0), {"target": torch.ones(0).long()})
    yield Sample(linear_cross_entropy, "strided, bias, smooth, z", biased, labels | every)
    yield Sample(linear_cross_entropy, "sum", classifier(3), labels | {"reduction": "sum"})
    yield Sample(linear_cross_entropy, "none, bias", biased, labels | {"reduction": "none"})

    def qkv(heads: int, kv_heads: int, sq: int, sk: int, d: int, make=normal) -> dict[str, Tensor]:
        sizes = {"q": (heads, sq), "k": (kv_heads, sk), "v": (kv_heads, sk)}
        return {name: make(1, h, s, d) for name, (h, s) in sizes.items()}

    lengths = {"key_lengths": torch.tensor([3]), "return_lse": True}
    yield Sample(attention, "plain", qkv(2, 2, 3, 5, 4))
    yield Sample(attention, "empty", qkv(2, 2, 0, 5, 4))
    yield Sample(attention, "no keys", qkv(2, 1, 3, 0, 4), {"return_lse": True})
    yield Sample(attention, "strided, group, causal", qkv(2, 1, 5, 3, 3, strided), causal)
    yield Sample(attention, "key lengths, lse", qkv(2, 1, 3, 5, 4), lengths)
    yield Sample(attention, "bool mask", qkv(2, 2, 3, 5, 4), {"mask": bool_mask})
    yield Sample(attention, "mask over keys", qkv(2, 2, 3, 5, 4), {"mask": torch.ones(3, 1)})
    slopes = {"alibi_slopes": torch.tensor([0.5, 0.25])}
    yield Sample(attention, "bias, alibi, window",
                 qkv(2, 1, 5, 3, 4, strided) | {"bias": normal(2, 1, 3)},
                 slopes | {"window": (2, 1)})  # fmt: skip
    yield Sample(attention, "bias, softcap, bool mask, narrow values",
                 qkv(2, 2, 3, 5, 4) | {"v": normal(1, 2, 5, 3), "bias": normal(3, 1)},
                 {"softcap": 2.0, "mask": bool_mask, "return_lse": True})  # fmt: skip

    def packed(tq: int, tk: int, make=normal) -> dict[str, Tensor]:
        return {"q": make(tq, 2, 4), "k": make(tk, 1, 4), "v": make(tk, 1, 3)}

    def cut(queries: list[int], keys: list[int]) -> dict[str, Tensor]:
        sizes = {"cu_seqlens_q": queries, "cu_seqlens_k": keys}
        return {name: torch.tensor([0, *n]).cumsum(0) for name, n in sizes.items()}

    yield Sample(attention_varlen, "plain", packed(5, 6), cut([2, 3], [5, 1]))
    yield Sample(attention_varlen, "empty", packed(0, 5), cut([0, 0], [2, 3]))
    yield Sample(
        attention_varlen, "no keys, lse", packed(3, 0), cut([3], [0]) | {"return_lse": True}
    )
    yield Sample(
        attention_varlen, "strided, causal", packed(6, 6, strided), cut([4, 2], [3, 3]) | causal
    )
    bounds = {"window": (1, 0), "softcap": 2.0, "alibi_slopes": torch.tensor([0.5, 0.25])}
    yield Sample(attention_varlen, "bounds", packed(5, 6), cut([0, 5], [1, 5]) | bounds)

    def cached(rows: int, heads: int, sq: int, t: int, make=normal) -> dict[str, Tensor]:
        caches = {name: make(rows, 1, t, 4) for name in ("k_cache", "v_cache")}
        return {"q": make(rows, heads, sq, 4)} | caches

    beams = torch.tensor([[1, 0, 1, 1], [0, 0, 0, 1]], dtype=torch.int32)
    two = {"lengths": torch.tensor([4, 2])}
    yield Sample(decode_attention, "plain", cached(2, 1, 1, 4), two)
    yield Sample(decode_attention, "empty", cached(0, 1, 1, 4), {"lengths": torch.ones(0).int()})
    yield Sample(decode_attention, "strided, group", cached(2, 2, 2, 5, strided), two)
    yield Sample(decode_attention, "beams", cached(2, 2, 1, 4), two | {"beam_index": beams})
    yield Sample(decode_attention, "bias, window, alibi",
                 cached(2, 2, 2, 4) | {"bias": normal(2, 1, 4)},
                 two | {"window": (1, 0), "alibi_slopes": torch.tensor([0.5, 0.25])})  # fmt: skip
    yield Sample(decode_attention, "pages", cached(2, 1, 1, 2),
                 two | {"block_table": torch.tensor([[1, 0], [0, 1]])})  # fmt: skip

    def norm(*shape: int, make=normal) -> dict[str, Tensor]:
        return {"x": make(*shape), "weight": normal(shape[-1]), "bias": normal(shape[-1])}

    yield Sample(layer_norm, "plain", norm(3, 8))
    yield Sample(layer_norm, "empty", norm(0, 8))
    yield Sample(layer_norm, "strided", norm(2, 3, 7, make=strided))
    yield Sample(layer_norm, "no weight", {"x": normal(3, 8)})
    yield Sample(layer_norm, "residual, prenorm", norm(3, 8) | {"residual": normal(3, 8)},
                 {"prenorm": True})  # fmt: skip

    def rms(*shape: int, make=normal) -> dict[str, Tensor]:
        return {"x": make(*shape), "weight": normal(shape[-1])}

    yield Sample(rms_norm, "plain", rms(3, 8))
    yield Sample(rms_norm, "empty", rms(0, 8))
    yield Sample(rms_norm, "strided", rms(2, 3, 7, make=strided))
    yield Sample(rms_norm, "no weight", {"x": normal(3, 8)})
    yield Sample(rms_norm, "residual, prenorm", rms(3, 8) | {"residual": normal(3, 8)},
                 {"prenorm": True})  # fmt: skip

    def linear(m: int, k: int, n: int, make=normal) -> dict[str, Tensor]:
        return {"x": make(m, k), "weight": make(n, k), "bias": normal(n)}

    yield Sample(linear_act, "plain", linear(3, 4, 5))
    yield Sample(linear_act, "empty", linear(0, 4, 5))
    yield Sample(linear_act, "strided, silu", linear(3, 5, 7, strided), {"activation": "silu"})
    yield Sample(linear_act, "no bias, gelu_tanh", {"x": normal(2, 3, 4), "weight": normal(5, 4)},
                 {"activation": "gelu_tanh"})  # fmt: skip

    def two_layers(m: int, make=normal) -> dict[str, Tensor]:
        first = {"x": make(m, 4), "w1": make(6, 4), "b1": normal(6)}
        return first | {"w2": make(5, 6), "b2": normal(5)}

    yield Sample(feed_forward, "plain", two_layers(3))
    yield Sample(feed_forward, "empty", two_layers(0))
    yield Sample(feed_forward, "strided, silu", two_layers(3, strided), {"activation": "silu"})
    no_biases = {"b1": None, "b2": None, "activation": "relu"}
    weights = {"x": normal(2, 4), "w1": normal(6, 4), "w2": normal(5, 6)}
    yield Sample(feed_forward, "no biases, relu", weights, no_biases)
    gated = {"gate": normal(6, 4)}
    yield Sample(feed_forward, "gate", two_layers(3) | gated)
    yield Sample(feed_forward, "empty, gate", two_layers(0) | gated, {"activation": "silu"})
    yield Sample(feed_forward, "strided gate", two_layers(3, strided) | {"gate": strided(6, 4)},
                 {"activation": "gelu_tanh"})  # fmt: skip

    turns = {"cos": torch.tensor([[0.6, -1.0]] * 3), "sin": torch.tensor([[0.8, 0.0]] * 3)}
    per_token = {name: t[None].expand(2, 3, 2) for name, t in turns.items()}
    yield Sample(rotary, "plain", {"q": normal(1, 2, 3, 4), "k": normal(1, 1, 3, 4)}, turns)
    yield Sample(rotary, "empty", {"q": normal(0, 2, 3, 4), "k": normal(0, 1, 3, 4)}, turns)
    yield Sample(rotary, "strided, part", {"q": strided(1, 2, 3, 5), "k": strided(1, 1, 3, 5)},
                 turns)  # fmt: skip
    yield Sample(rotary, "per token, pairs", {"q": normal(2, 1, 3, 4), "k": normal(2, 1, 3, 4)},
                 per_token | {"interleaved": True})  # fmt: skip


def at_length(function: Callable[..., Any], n: int) -> Sample:
    """A call whose length is n, for compiling one graph for several lengths."""
    generator = torch.Generator().manual_seed(n)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    if function is softmax:
        return Sample(softmax, "", {"x": normal(2, n, n)}, {"causal": True, "scale": 0.5})
    if function is linear_cross_entropy:
        tensors = {"x": normal(2, n, 8), "weight": normal(6, 8), "bias": normal(6)}
        target = torch.arange(2 * n).view(2, n) % 6
        return Sample(linear_cross_entropy, "", tensors, {"target": target})
    if function is cross_entropy:
        target = torch.arange(2 * n).view(2, n) % 6
        return Sample(cross_entropy, "", {"logits": normal(2, n, 6)}, {"target": target})
    if function is log_softmax:
        return Sample(log_softmax, "", {"x": normal(2, n)})
    if function is log_softmax_topk:
        return Sample(log_softmax_topk, "", {"x": normal(2, n)}, {"k": 3})
    if function is attention:
        tensors = {
            "q": normal(2, 4, n, 8),
            "k": normal(2, 2, n + 1, 8),
            "v": normal(2, 2, n + 1, 8),
        }
        tensors["bias"] = normal(4, n, n + 1)
        options = {"causal": True, "key_lengths": torch.tensor([n, 3]), "window": (4, 0)}
        return Sample(attention, "", tensors, options | {"alibi_slopes": torch.tensor([0.5] * 4)})
        return Sample(attention, "", tensors, {"causal": True, "key_lengths": torch.tensor([n, 3])})
    if function is attention_varlen:
        lengths = torch.tensor([0, n - 3, n])
        tensors = {"q": normal(n, 4, 8), "k": normal(n, 2, 8), "v": normal(n, 2, 8)}
        return Sample(
            attention_varlen, "", tensors,
            {"cu_seqlens_q": lengths, "cu_seqlens_k": lengths, "causal": True},
        )  # fmt: skip
    if function is decode_attention:
        tensors = {
            "q": normal(2, 4, 1, 8),
            "k_cache": normal(2, 2, n, 8),
            "v_cache": normal(2, 2, n, 8),
        }
        beams = {"lengths": torch.tensor([n, 3]), "beam_index": torch.ones(2, n, dtype=torch.int32)}
        return Sample(decode_attention, "", tensors, beams)
    if function is layer_norm:
        tensors = {"x": normal(2, n, 8), "weight": normal(8), "residual": normal(2, n, 8)}
        return Sample(layer_norm, "", tensors, {"prenorm": True})
    if function is rms_norm:
        tensors = {"x": normal(2, n, 8), "weight": normal(8), "residual": normal(2, n, 8)}
        return Sample(rms_norm, "", tensors, {"prenorm": True})
    if function is linear_act:
        return Sample(
            linear_act, "", {"x": normal(2, n, 8), "weight": normal(6, 8), "bias": normal(6)}
        )
    if function is rotary:
        tensors = {"q": normal(2, 4, n, 8), "k": normal(2, 2, n, 8)}
        return Sample(rotary, "", tensors, {"cos": normal(n, 3), "sin": normal(n, 3)})
    tensors = {"x": normal(2, n, 8), "w1": normal(6, 8), "w2": normal(4, 6)}
    return Sample(feed_forward, "", tensors, {"b1": None, "b2": None})


SAMPLES = list(samples())
FUNCTIONS = list({sample.function: None for sample in SAMPLES})
every_sample = pytest.mark.parametrize("sample", SAMPLES, ids=str)
every_function = pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)


class Calls(TorchDispatchMode):
    """Records calls of tilewise ops; as a dispatch mode it makes ops take the registered way."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "tilewise":
            self.seen.append((func, args))
        return func(*args, **(kwargs or {}))


def registered_calls(sample: Sample) -> list[tuple[Any, tuple[Any, ...]]]:
    """The registered ops, forward and backward, that a call with gradients ends in."""
    with Calls() as calls:
        sample.trained().gradients()
    return calls.seen


def ways(sample: Sample) -> list[str]:
    """The implementations that can run a sample here, the chosen one first."""
    explanation = explain(sample.function, **sample.tensors, **sample.options)
    behind = [name for name, why in explanation.others.items() if why.endswith("comes first")]
    return [explanation.implementation, *behind]


def same_bits(a: list[Tensor] | tuple[Tensor, ...], b: list[Tensor] | tuple[Tensor, ...]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# ---- registration ------------------------------------------------------------------------------


def test_every_op_has_samples():
    called = [{func._opname for func, _ in registered_calls(sample)} for sample in SAMPLES]
    for op in sorted({*OPS} - INFERENCE_ONLY):
        count = sum(op in names for names in called)
        assert count >= 4, f"tilewise::{op} has {count} samples: add some to samples()"
    assert OPS, "no op is registered"


@every_sample
def test_opcheck(sample):
    """All four checks, of the forward with and without gradients and of the backward."""
    for func, args in registered_calls(sample):
        detached = tuple(a.detach() if isinstance(a, Tensor) else a for a in args)
        torch.library.opcheck(func, detached)
        if not func._opname.endswith("_backward"):
            torch.library.opcheck(func, args)


@every_sample
def test_registered_and_eager_give_the_same_bits(sample):
    eager = sample.trained()
    outputs, gradients = eager.outputs(), eager.gradients()
    with Calls() as calls:
        assert same_bits(eager.outputs(), outputs)
        assert same_bits(eager.gradients(), gradients)
    assert calls.seen


@every_sample
def test_meta_tensors_give_shapes_and_dtypes(sample):
    def to_meta(values: dict[str, Any]) -> dict[str, Any]:
        return {n: v.to("meta") if isinstance(v, Tensor) else v for n, v in values.items()}

    meta = Sample(sample.function, "", to_meta(sample.tensors), to_meta(sample.options))
    for ours, real in zip(meta.outputs(), sample.outputs(), strict=True):
        assert ours.is_meta and ours.shape == real.shape and ours.dtype == real.dtype


# ---- gradients ---------------------------------------------------------------------------------


@pytest.mark.parametrize("sample", list(samples(torch.float64)), ids=str)
def test_gradcheck(sample):
    sample = sample.trained()
    names = list(sample.tensors)

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        call = Sample(sample.function, "", dict(zip(names, tensors, strict=True)), sample.options)
        return tuple(y for y in call.outputs() if y.requires_grad)

    assert all(t.numel() <= 64 for t in sample.tensors.values())
    for way in ways(sample):
        with force(way):
            assert torch.autograd.gradcheck(function, tuple(sample.tensors.values())), way


@pytest.mark.parametrize("mode", [contextlib.nullcontext, Calls])
@every_function
def test_second_derivatives_raise(function, mode):
    """Eagerly and as a registered op: an error, never a wrong number."""
    leaves = at_length(function, 5).trained()
    with mode():
        first = torch.autograd.grad(
            leaves.outputs()[0].square().sum(), list(leaves.tensors.values()), create_graph=True
        )
        with pytest.raises(RuntimeError, match="no second derivative"):
            first[0].square().sum().backward()


@every_sample
def test_only_wanted_gradients(sample):
    whole = dict(zip(sample.tensors, sample.trained().gradients(), strict=True))
    for name, tensor in sample.tensors.items():
        leaf = tensor.detach().requires_grad_()
        alone = Sample(sample.function, "", sample.tensors | {name: leaf}, sample.options)
        outputs = [y for y in alone.outputs() if y.requires_grad]
        (grad,) = torch.autograd.grad(outputs, leaf, [torch.ones_like(y) for y in outputs])
        torch.testing.assert_close(grad, whole[name])


# ---- nothing changes, nothing differs, nothing is kept -------------------------------------------


@every_sample
def test_inputs_and_upstream_gradients_are_not_changed(sample):
    generator = torch.Generator().manual_seed(1)
    given: list[Tensor] = []

    def upstream(y: Tensor) -> Tensor:
        given.append(torch.randn(y.shape, generator=generator))
        return given[-1]

    options = [v for v in sample.options.values() if isinstance(v, Tensor)]
    before = copy.deepcopy([*sample.tensors.values(), *options])
    sample.trained().gradients(upstream)
    assert same_bits([*sample.tensors.values(), *options], before)
    again = torch.Generator().manual_seed(1)
    assert same_bits(given, [torch.randn(g.shape, generator=again) for g in given])


@every_sample
def test_ten_runs_give_the_same_bits(sample):
    trained = sample.trained()
    outputs, gradients = trained.outputs(), trained.gradients()
    for _ in range(9):
        assert same_bits(trained.outputs(), outputs) and same_bits(trained.gradients(), gradients)


@every_sample
def test_upstream_gradients_of_stride_zero_or_transposed(sample):
    trained = sample.trained()
    plain = trained.gradients()
    expanded = trained.gradients(lambda y: torch.ones((), dtype=y.dtype).expand_as(y))
    transposed = trained.gradients(
        lambda y: torch.ones(y.shape[::-1]).permute(tuple(range(y.dim())[::-1]))
    )
    for a, b, c in zip(plain, expanded, transposed, strict=True):
        torch.testing.assert_close(b, a)
        torch.testing.assert_close(c, a)


@every_sample
def test_memory_is_never_read_before_it_is_written(sample):
    """Deterministic mode fills every fresh tensor with NaN; the results must not notice."""
    trained = sample.trained()
    outputs, gradients = trained.outputs(), trained.gradients()
    try:
        torch.use_deterministic_algorithms(True)
        assert torch.empty(3).isnan().all()
        assert same_bits(trained.outputs(), outputs) and same_bits(trained.gradients(), gradients)
    finally:
        torch.use_deterministic_algorithms(False)


@every_sample
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_nothing_is_saved_without_gradients(sample, mode):
    saved: list[Tensor] = []
    trained = sample.trained()
    expected = trained.outputs()
    with saved_tensors_hooks(lambda t: saved.append(t), lambda t: t), mode():
        for calls in (None, Calls()):
            with calls or mode():
                found = trained.outputs()
            assert not any(y.requires_grad or y.grad_fn for y in found)
            for a, b in zip(found, expected, strict=True):
                torch.testing.assert_close(a, b.detach())
    assert not saved


# ---- autocast ----------------------------------------------------------------------------------


@every_sample
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(sample, low):
    """The result of tensors cast beforehand, called either way; gradients in the leaves' dtype."""
    name = sample.function.__name__
    expected_dtype = torch.float32 if name in FLOAT32_UNDER_AUTOCAST else low
    for given in (torch.float32, low):
        trained = sample.trained(given)
        with torch.autocast("cpu", dtype=low):
            outputs, gradients = trained.outputs(), trained.gradients()
            with Calls():
                assert same_bits(trained.outputs(), outputs)
                assert same_bits(trained.gradients(), gradients)
        assert outputs[0].dtype == (torch.float32 if name in FLOAT32_LOSS else expected_dtype)
        assert all(g.dtype == given for g in gradients)
        plain = sample.trained(given)
        plain.tensors = {n: t.to(expected_dtype) for n, t in plain.tensors.items()}
        for a, b in zip(
            plain.outputs(), outputs, strict=True
        ):  # decode's bias is not cast: not bits
            torch.testing.assert_close(a, b, rtol=0.02, atol=0.02)


def test_autocast_leaves_float64_alone():
    for sample in samples(torch.float64):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert sample.outputs()[0].dtype == torch.float64, sample


# ---- torch.compile -----------------------------------------------------------------------------


def compare(compiled: Callable[..., Any], function: Callable[..., Any], n: int) -> None:
    ours, eager = at_length(function, n).trained(), at_length(function, n).trained()
    ours.function = compiled
    for a, b in zip(ours.outputs(), eager.outputs(), strict=True):
        torch.testing.assert_close(a, b)
    for a, b in zip(ours.gradients(), eager.gradients(), strict=True):
        torch.testing.assert_close(a, b)


@every_function
def test_compiles_once_for_all_lengths(function):
    torch._dynamo.reset()
    backend = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=backend)
    for n in (5, 9, 17):
        compare(compiled, function, n)
    assert backend.frame_count <= 3, f"{backend.frame_count - 1} recompiles"


@every_function
def test_inductor(function):
    torch._dynamo.reset()
    with torch._inductor.config.patch(
        force_disable_caches=True
    ):  # a cached graph is another's test
        compare(torch.compile(function, fullgraph=True), function, 9)


@every_function
def test_compiles_without_gradients_and_under_autocast(function):
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    ours, eager = at_length(function, 7), at_length(function, 7)
    ours.function = compiled
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        for a, b in zip(ours.outputs(), eager.outputs(), strict=True):
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b)


@every_function
def test_export(function):
    sample = at_length(function, 6)

    class Module(torch.nn.Module):
        def forward(self, *tensors: Tensor):
            return function(**dict(zip(sample.tensors, tensors, strict=True)), **sample.options)

    program = torch.export.export(Module(), tuple(sample.tensors.values()))
    names = {
        node.target.namespace for node in program.graph.nodes if hasattr(node.target, "namespace")
    }
    assert "tilewise" in names
    found = program.module()(*sample.tensors.values())
    assert same_bits(found if isinstance(found, tuple) else (found,), sample.outputs())
