"""What every op promises on a GPU, through its public function; decode_attention's accuracy.

Each op has one sample; its float tensors differentiate, unless they are masks.
"""

import contextlib
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from tilewise_kernels import (
    adamw_step,
    attention,
    attention_varlen,
    cross_entropy,
    decode_attention,
    explain,
    feed_forward,
    layer_norm,
    linear_act,
    linear_cross_entropy,
    log_softmax,
    log_softmax_topk,
    rms_norm,
    rotary,
    softmax,
)

pytestmark = pytest.mark.gpu
FLOAT, BF16, HALF = torch.float32, torch.bfloat16, torch.float16
Sample = tuple[Callable[..., Any], dict[str, Tensor], dict[str, Any]]
OPS = (
    "softmax",
    "log_softmax",
    "log_softmax_topk",
    "cross_entropy",
    "linear_cross_entropy",
    "attention",
    "attention_varlen",
    "decode_attention",
    "layer_norm",
    "rms_norm",
    "linear_act",
    "feed_forward",
    "rotary",
    "adamw_step",
)
# On a GPU; None: either of two ways, by the shape.
EXPECTED = {
    "softmax": "native",
    "log_softmax": "triton",
    "log_softmax_topk": "triton",
    "cross_entropy": "triton",
    "linear_cross_entropy": "triton",
    "attention": "triton",
    "attention_varlen": "triton",
    "decode_attention": "reference",
    "layer_norm": "triton",
    "rms_norm": "triton",
    "linear_act": None,
    "feed_forward": None,
    "rotary": "triton",
    "adamw_step": "triton",
}


@pytest.fixture
def sample(normal, pick, device) -> Callable[..., Sample]:
    """sample(op, dtype): the public function, its tensors, and its options."""
    draw = normal

    def make(op: str, dtype: torch.dtype = FLOAT) -> Sample:
        normal = partial(draw, dtype=dtype)
        rows, s, wide = pick(300, 8), pick(97, 9), pick(512, 16)
        if op == "softmax":
            return softmax, {"x": normal(2, 3, s, s)}, {"causal": True, "scale": 0.5}
        if op == "log_softmax":
            return log_softmax, {"x": normal(2, 3, s, s)}, {}
        if op == "log_softmax_topk":
            return best, {"x": normal(3, 40 * s)}, {"k": 4}
        if op == "cross_entropy":
            options = {"target": torch.arange(rows, device=device) % wide, "reduction": "none"}
            return cross_entropy, {"logits": normal(rows, wide)}, options
        if op == "linear_cross_entropy":
            tensors = {"x": normal(rows, wide), "weight": normal(2 * wide, wide, std=wide**-0.5)}
            options = {"target": torch.arange(rows, device=device) % 7, "reduction": "none"}
            return linear_cross_entropy, tensors, options
        if op == "attention":
            q, kv = normal(2, 4, s, 64), normal(2, 2, 2, s, 64)
            lengths = torch.tensor([s, s // 2], device=device)
            options = {"causal": True, "key_lengths": lengths}
            return attention, {"q": q, "k": kv[0], "v": kv[1]}, options
        if op == "attention_varlen":
            ends = torch.tensor([0, s, s + 1, 2 * s], dtype=torch.int32, device=device)
            options = {"cu_seqlens_q": ends, "cu_seqlens_k": ends, "causal": True}
            q, kv = normal(2 * s, 4, 64), normal(2, 2 * s, 2, 64)
            return attention_varlen, {"q": q, "k": kv[0], "v": kv[1]}, options
        if op == "decode_attention":
            caches = {"k_cache": normal(3, 2, s, 64), "v_cache": normal(3, 2, s, 64)}
            beams = torch.tensor([[1], [0], [0]], dtype=torch.int32, device=device).expand(3, s)
            lengths = torch.tensor([s, 1, s // 2], device=device)
            options = {"lengths": lengths, "beam_index": beams}
            return decode_attention, {"q": normal(3, 4, 1, 64)} | caches, options
        if op == "layer_norm":
            tensors = {"x": normal(rows, wide), "residual": normal(rows, wide)}
            return layer_norm, tensors | {"weight": normal(wide), "bias": normal(wide)}, {}
        if op == "rms_norm":
            tensors = {"x": normal(rows, wide), "residual": normal(rows, wide)}
            return rms_norm, tensors | {"weight": normal(wide)}, {}
        if op == "rotary":
            angles = draw(2, s, 32)
            options = {"cos": angles.cos(), "sin": angles.sin()}
            return turned, {"q": normal(2, 4, s, 64), "k": normal(2, 2, s, 64)}, options
        if op == "adamw_step":
            tensors = {name: normal(rows, wide) for name in ("param", "grad", "exp_avg")}
            return moved, tensors | {"exp_avg_sq": normal(rows, wide).square()}, {"step": 3}
        x, w1, b1 = normal(rows, wide), normal(2 * wide, wide, std=wide**-0.5), normal(2 * wide)
        if op == "linear_act":
            return linear_act, {"x": x, "weight": w1, "bias": b1}, {}
        second = {"w2": normal(wide, 2 * wide, std=wide**-0.5), "b2": normal(wide)}
        return feed_forward, {"x": x, "w1": w1, "b1": b1} | second, {}

    return make


def turned(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Both results of rotary in one tensor."""
    return torch.cat(rotary(q, k, cos, sin), 1)


def best(x: Tensor, k: int) -> Tensor:
    """The scores of log_softmax_topk without their ids, which have no gradient."""
    return log_softmax_topk(x, k)[0]


def moved(param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: int) -> Tensor:
    """The parameter after a step of adamw_step on copies, clipped; it has no gradient."""
    p, m, v = (t.detach().clone() for t in (param, exp_avg, exp_avg_sq))
    adamw_step([p], [grad.detach()], [m], [v], step, lr=0.1, max_norm=1.0)
    return p


def trained(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.detach().clone().requires_grad_() for name, t in tensors.items()}


def everything(function: Callable[..., Tensor], tensors: dict[str, Tensor], options: dict) -> list:
    """The output and the gradients, where it has any, of its sum weighted by cosines."""
    leaves = trained(tensors)
    y = function(**leaves, **options)
    if not y.requires_grad:
        return [y]
    weights = torch.arange(y.numel(), device=y.device).cos().view(y.shape).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, list(leaves.values()), weights)]


def assert_close(found: list[Tensor], expected: list[Tensor], share: float) -> None:
    for got, wanted in zip(found, expected, strict=True):
        assert got.dtype == wanted.dtype and got.shape == wanted.shape
        assert (got - wanted).abs().max() <= share * wanted.abs().max()


@pytest.mark.parametrize("op", OPS)
def test_the_fast_way_is_chosen(op: str, sample, gpu_only) -> None:
    gpu_only("GPU implementation to choose")
    function, tensors, options = sample(op, BF16)
    explanation = explain(function, **tensors, **options)
    assert EXPECTED[op] in (None, explanation.implementation), str(explanation)
    assert explanation.implementation != "blocked", str(explanation)


@pytest.mark.parametrize("op", OPS)
def test_nothing_warns_and_the_generator_stands_still(op: str, sample, pick) -> None:
    function, tensors, options = sample(op)
    state = pick(torch.cuda.get_rng_state, torch.get_rng_state)
    before = state()
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        everything(function, tensors, options)
    assert torch.equal(state(), before)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", [FLOAT, BF16], ids=str)
def test_agrees_with_the_cpu(op: str, dtype: torch.dtype, sample) -> None:
    """The same function on the same values there: the difference is rounding."""
    function, tensors, options = sample(op, dtype)
    there = {n: t.cpu() if isinstance(t, Tensor) else t for n, t in options.items()}
    expected = everything(function, {n: t.cpu() for n, t in tensors.items()}, there)
    found = [t.cpu() for t in everything(function, tensors, options)]
    assert_close(found, expected, 1e-4 if dtype == FLOAT else 5e-2)


@pytest.mark.parametrize("op", OPS)
def test_opcheck(op: str, sample) -> None:
    """The registered op, on the arguments that the public function gives it."""
    from tilewise_kernels.op import Op, _observing

    function, tensors, options = sample(op)
    seen: list[tuple[Op, tuple[Any, ...]]] = []
    note = lambda op, args: seen.append((op, args))  # noqa: E731
    _observing.functions.append(note)
    try:
        function(**trained(tensors), **options)
    finally:
        _observing.functions.remove(note)
    [(called, args)] = seen
    torch.library.opcheck(getattr(torch.ops.tilewise, called.name).default, args)


@pytest.mark.parametrize("op", OPS)
def test_another_stream(op: str, sample, gpu_only) -> None:
    """Work goes to the current stream: behind a long job there, the inputs are ready in time."""
    gpu_only("streams")
    function, tensors, options = sample(op)
    expected = everything(function, tensors, options)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        late = {name: torch.zeros_like(t) for name, t in tensors.items()}
        torch.cuda._sleep(50_000_000)
        for name, tensor in tensors.items():
            late[name].copy_(tensor)
        found = everything(function, late, options)
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("op", OPS)
def test_graph_capture_and_replay(op: str, sample, gpu_only) -> None:
    """No call may wait for the device; a replay computes anew from what the inputs hold."""
    gpu_only("CUDA graphs")
    function, tensors, options = sample(op)
    static = {name: torch.zeros_like(t) for name, t in tensors.items()}
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            function(**static, **options)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = function(**static, **options)
    for name, tensor in tensors.items():
        static[name].copy_(tensor)
    graph.replay()
    assert torch.equal(y, function(**tensors, **options))


@pytest.mark.parametrize("op", OPS)
def test_graph_of_a_training_step(op: str, sample, gpu_only) -> None:
    gpu_only("CUDA graphs")
    function, tensors, options = sample(op)

    def step() -> list[Tensor]:
        return everything(function, tensors, options)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            expected = step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("op", OPS)
def test_inductor(op: str, sample, pick) -> None:
    """torch.compile without a graph break, forward and backward (aot_eager in a rehearsal)."""
    function, tensors, options = sample(op)
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend=pick("inductor", "aot_eager"))
    found = everything(compiled, tensors, options)
    assert_close(found, everything(function, tensors, options), 1e-5)


@pytest.mark.parametrize("op", OPS)
def test_autocast(op: str, sample, device, pick) -> None:
    """Products run in the autocast dtype, softmax and norms in float32, as torch's own do."""
    function, tensors, options = sample(op)
    dtype = pick(BF16, HALF)
    with torch.autocast(device.type, dtype=dtype):
        y, *grads = everything(function, tensors, options)
    wide = op in ("softmax", "layer_norm", "rms_norm", "cross_entropy", "adamw_step")
    wide = wide or "log_softmax" in op
    assert y.dtype == (FLOAT if wide or op == "linear_cross_entropy" else dtype)
    assert all(grad.dtype == FLOAT for grad in grads)
    expected = everything(function, tensors, options)
    assert_close([y.float(), *grads], expected, 1e-5 if wide else 5e-2)


@pytest.mark.parametrize("op", OPS)
def test_fifty_repeats_are_bit_equal(op: str, sample, pick) -> None:
    """decode_attention excepted: its gradient adds up rows that share a cache position."""
    if op == "decode_attention":
        context: Any = torch.no_grad()
    else:
        context = contextlib.nullcontext()
    function, tensors, options = sample(op, HALF)
    with context:
        run: Callable[[], list] = partial(everything, function, tensors, options)
        if op == "decode_attention":
            run = lambda: [function(**tensors, **options)]  # noqa: E731
        first = run()
        for _ in range(pick(50, 2)):
            assert all(torch.equal(a, b) for a, b in zip(run(), first, strict=True))


@pytest.mark.parametrize("op", OPS)
def test_empty_inputs_launch_nothing(op: str, sample) -> None:
    function, tensors, options = sample(op)
    first = next(iter(tensors))
    if op in ("attention", "decode_attention", "rotary", "adamw_step"):
        tensors = {name: t[:0] for name, t in tensors.items()}
        options = {n: o[:0] if isinstance(o, Tensor) else o for n, o in options.items()}
    elif op == "attention_varlen":
        tensors = {name: t[:0] for name, t in tensors.items()}
        options = {n: o * 0 if isinstance(o, Tensor) else o for n, o in options.items()}
    elif op in ("layer_norm", "rms_norm"):
        tensors = tensors | {"x": tensors["x"][:0], "residual": tensors["residual"][:0]}
    else:
        tensors = tensors | {first: tensors[first][:0]}
        options = {n: o[:0] if isinstance(o, Tensor) else o for n, o in options.items()}
    y, *grads = everything(function, tensors, options)
    assert y.numel() == 0 and all((grad == 0).all() for grad in grads)


@pytest.mark.parametrize("group", [1, 3, 5, 7])
@pytest.mark.parametrize("dtype", [FLOAT, BF16], ids=str)
def test_decode_accuracy(group: int, dtype: torch.dtype, normal, accurate, device) -> None:
    """Against attention by formula over the lengths; NaN past them must not leak."""
    r, t, lengths = 4, 65, torch.tensor([65, 1, 30, 64], device=device)
    inputs = {"q": normal(r, 2 * group, 1, 64, dtype=dtype)}
    inputs |= {name: normal(r, 2, t, 64, dtype=dtype) for name in "kv"}
    past = (torch.arange(t, device=device) >= lengths[:, None])[:, None, :, None]

    def ours(x: dict[str, Tensor]) -> Tensor:
        k, v = (torch.where(past, torch.nan, x[name]) for name in "kv")
        return decode_attention(x["q"], k, v, lengths)

    def eager(x: dict[str, Tensor]) -> Tensor:
        k, v = (x[name].repeat_interleave(group, 1) for name in "kv")
        scores = x["q"] @ k.mT * 64**-0.5
        return torch.softmax(scores.masked_fill(past.mT, float("-inf")), -1) @ v

    accurate(ours, eager, inputs)


@pytest.mark.parametrize("op", OPS)
def test_the_second_gpu_without_set_device(op: str, sample, gpu_only) -> None:
    """Tensors on a GPU that is not the current one."""
    gpu_only("second GPU")
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    function, tensors, options = sample(op)
    there = {n: t.to("cuda:1") if isinstance(t, Tensor) else t for n, t in options.items()}
    y = function(**{n: t.to("cuda:1") for n, t in tensors.items()}, **there)
    assert torch.equal(y.cpu(), function(**tensors, **options).cpu())
