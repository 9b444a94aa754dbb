"""Layers against the torch.nn modules whose names and weights they share: outputs and gradients."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tilewise.config import ModelConfig
from tilewise.errors import ArgumentError
from tilewise.layers import (
    Embedding,
    FeedForward,
    LayerCache,
    LayerNorm,
    MultiHeadAttention,
    RMSNorm,
    TransformerLayer,
    sinusoids,
)

SIZE, HEADS, FFN = 24, 4, 40
R, S, N = 3, 7, 5  # rows, length, memory length
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def config(**changes: object) -> ModelConfig:
    values: dict = {
        "model_type": "test",
        "vocab_size": 11,
        "hidden_size": SIZE,
        "num_heads": HEADS,
        "ffn_size": FFN,
        "decoder_layers": 1,
        "max_positions": 32,
    }
    return ModelConfig(**(values | changes))


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter random, norms and biases too, so that a swapped one shows."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        fan_in = parameter.shape[-1] if parameter.dim() > 1 else 4
        with torch.no_grad():
            parameter.normal_(0, fan_in**-0.5, generator=generator)
    return module


def inputs(*shapes: tuple[int, ...], seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def assert_equal_runs(ours, theirs, our_module, their_module, tensors: list[Tensor]) -> None:
    """Outputs, gradients of inputs and gradients of all parameters within 1e-5."""
    results = []
    for function, module in ((ours, our_module), (theirs, their_module)):
        leaves = [t.clone().requires_grad_() for t in tensors]
        module.zero_grad()
        out = function(*leaves)
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
        (out * weight).sum().backward()
        parameters = {name: p.grad for name, p in module.named_parameters()}
        assert all(grad is not None for grad in parameters.values())
        results.append((out.detach(), [leaf.grad for leaf in leaves], parameters))
    (out, grads, parameters), (out2, grads2, parameters2) = results
    torch.testing.assert_close(out, out2, **TOLERANCE)
    torch.testing.assert_close(grads, grads2, **TOLERANCE)
    assert parameters.keys() == parameters2.keys()
    for name, grad in parameters.items():
        scale = max(parameters2[name].abs().max().item(), 1.0)
        torch.testing.assert_close(grad / scale, parameters2[name] / scale, msg=name, **TOLERANCE)


# ---- LayerNorm ---------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
def test_layer_norm_is_torchs(bias: bool) -> None:
    theirs = randomise(nn.LayerNorm(SIZE, eps=1e-3, bias=bias))
    ours = LayerNorm(SIZE, eps=1e-3, bias=bias)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x, residual = inputs((R, S, SIZE), (R, S, SIZE))
    assert_equal_runs(ours, theirs, ours, theirs, [x])
    assert_equal_runs(
        lambda x, r: ours(x, residual=r), lambda x, r: theirs(x + r), ours, theirs, [x, residual]
    )
    y, s = ours.add(x, residual)
    torch.testing.assert_close(s, x + residual, rtol=0, atol=0)
    torch.testing.assert_close(y, theirs(x + residual), **TOLERANCE)


def test_layer_norm_without_affine() -> None:
    x = inputs((R, S, SIZE))[0]
    ours = LayerNorm(SIZE, elementwise_affine=False)
    torch.testing.assert_close(ours(x), nn.functional.layer_norm(x, (SIZE,)), **TOLERANCE)


def test_layer_norm_over_several_dims_is_refused_and_not_wrong() -> None:
    with pytest.raises(ArgumentError, match="last dim"):
        LayerNorm((S, SIZE))
    with pytest.raises(ArgumentError, match="last dim"):
        RMSNorm((S, SIZE))


# ---- RMSNorm -----------------------------------------------------------------------------------


@pytest.mark.parametrize("eps", [1e-3, None])
def test_rms_norm_is_torchs(eps: float | None) -> None:
    theirs, ours = randomise(nn.RMSNorm(SIZE, eps=eps)), RMSNorm(SIZE, eps=eps)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x, residual = inputs((R, S, SIZE), (R, S, SIZE))
    assert_equal_runs(ours, theirs, ours, theirs, [x])
    assert_equal_runs(
        lambda x, r: ours(x, residual=r), lambda x, r: theirs(x + r), ours, theirs, [x, residual]
    )
    y, s = ours.add(x, residual)
    torch.testing.assert_close(s, x + residual, rtol=0, atol=0)
    torch.testing.assert_close(y, theirs(x + residual), **TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_rms_norm_has_torchs_own_eps(dtype: torch.dtype) -> None:
    x = (1e-4 * inputs((R, S, SIZE))[0]).to(dtype)
    ours = RMSNorm(SIZE, elementwise_affine=False)
    torch.testing.assert_close(ours(x), nn.functional.rms_norm(x, (SIZE,)))


# ---- MultiHeadAttention ------------------------------------------------------------------------


def attention_pair(bias: bool = True) -> tuple[MultiHeadAttention, nn.MultiheadAttention]:
    theirs = randomise(nn.MultiheadAttention(SIZE, HEADS, bias=bias, batch_first=True))
    ours = MultiHeadAttention(SIZE, HEADS, bias=bias)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


def test_attention_may_have_a_bias_on_its_output_alone() -> None:
    ours, theirs = attention_pair()
    nn.init.zeros_(ours.in_proj_bias)
    bare = MultiHeadAttention(SIZE, HEADS, qkv_bias=False)
    state = theirs.state_dict()
    del state["in_proj_bias"]
    bare.load_state_dict(state, strict=True)
    x, memory = inputs((R, S, SIZE), (R, N, SIZE))
    assert torch.equal(bare(x, causal=True), ours(x, causal=True))
    assert torch.equal(bare(x, memory), ours(x, memory))
    assert not MultiHeadAttention(SIZE, HEADS, bias=False, qkv_bias=True).state_dict().keys() - {
        "in_proj_weight", "out_proj.weight"
    }  # fmt: skip


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["plain", "causal", "lengths", "causal+lengths", "bool", "float"])
def test_self_attention_is_torchs(kind: str, bias: bool) -> None:
    ours, theirs = attention_pair(bias)
    x = inputs((R, S, SIZE))[0]
    lengths = torch.tensor([S, 3, 1])
    padding = torch.arange(S) >= lengths[:, None]
    ahead = torch.ones(S, S, dtype=torch.bool).triu(1)
    float_mask = inputs((S, S), seed=5)[0]
    own: dict = {}
    their: dict = {}
    if "causal" in kind:
        own["causal"], their["attn_mask"] = True, ahead
    if "lengths" in kind:
        own["key_lengths"], their["key_padding_mask"] = lengths, padding
    if kind == "bool":
        own["mask"], their["key_padding_mask"] = ~padding[:, None, None], padding
    if kind == "float":
        own["mask"], their["attn_mask"] = float_mask, float_mask
    assert_equal_runs(
        lambda x: ours(x, **own),
        lambda x: theirs(x, x, x, need_weights=False, **their)[0],
        ours,
        theirs,
        [x],
    )


@pytest.mark.parametrize("padded", [False, True])
def test_cross_attention_is_torchs(padded: bool) -> None:
    ours, theirs = attention_pair()
    lengths = torch.tensor([N, 2, 1]) if padded else None
    padding = None if lengths is None else torch.arange(N) >= lengths[:, None]
    assert_equal_runs(
        lambda x, m: ours(x, m, key_lengths=lengths),
        lambda x, m: theirs(x, m, m, key_padding_mask=padding, need_weights=False)[0],
        ours,
        theirs,
        inputs((R, S, SIZE), (R, N, SIZE)),
    )


def test_remembered_memory_serves_all_beams_of_a_sentence() -> None:
    ours, theirs = attention_pair()
    x, memory = inputs((2 * R, 1, SIZE), (R, N, SIZE))
    lengths = torch.tensor([N, 2, 1])
    padding = (torch.arange(N) >= lengths[:, None]).repeat_interleave(2, 0)
    expanded = memory.repeat_interleave(2, 0)
    expected = theirs(x, expanded, expanded, key_padding_mask=padding, need_weights=False)[0]
    torch.testing.assert_close(ours(x, ours.remember(memory, lengths)), expected, **TOLERANCE)


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_grouped_heads_equal_expanded_ones(kv_heads: int) -> None:
    """Repeat each key and value head for its group of queries: the same attention with H heads."""
    ours = randomise(MultiHeadAttention(SIZE, HEADS, kv_heads))
    d, group = SIZE // HEADS, HEADS // kv_heads
    full = MultiHeadAttention(SIZE, HEADS)

    def expand(packed: Tensor) -> Tensor:
        q, k, v = packed.split([SIZE, kv_heads * d, kv_heads * d])
        k, v = (t.unflatten(0, (kv_heads, d)).repeat_interleave(group, 0) for t in (k, v))
        return torch.cat([q, k.flatten(0, 1), v.flatten(0, 1)])

    state = ours.state_dict()
    state["in_proj_weight"] = expand(state["in_proj_weight"])
    state["in_proj_bias"] = expand(state["in_proj_bias"])
    full.load_state_dict(state, strict=True)
    x, memory = inputs((R, S, SIZE), (R, N, SIZE))
    torch.testing.assert_close(ours(x, causal=True), full(x, causal=True), **TOLERANCE)
    torch.testing.assert_close(ours(x, memory), full(x, memory), **TOLERANCE)
    x.requires_grad_()
    grads = [torch.autograd.grad(m(x, causal=True).square().sum(), x)[0] for m in (ours, full)]
    torch.testing.assert_close(*grads, **TOLERANCE)


@pytest.mark.parametrize("tokens", [1, 3])
def test_attention_over_a_cache_equals_attention_at_once(tokens: int) -> None:
    """Ragged prompts in one call, then `tokens` more a call, in rows of a cache full of NaN."""
    ours = randomise(MultiHeadAttention(SIZE, HEADS, 2))
    x = inputs((R, S + 6, SIZE))[0]
    prompt = torch.tensor([S, 2, 4])
    keys, values = (torch.full((8, 2, S + 6, SIZE // HEADS), torch.nan) for _ in range(2))
    rows = torch.tensor([5, 0, 3])
    table = rows.to(torch.int32)[:, None].repeat(1, S + 6)
    first = LayerCache(keys, values, rows, prompt, None, True)
    with torch.no_grad():
        out = ours(x[:, :S], causal=True, key_lengths=prompt, cache=first)
        full = [ours(row[None], causal=True)[0] for row in x]
        for r in range(R):
            torch.testing.assert_close(out[r, : prompt[r]], full[r][: prompt[r]], **TOLERANCE)
        for start in range(0, 6, tokens):
            at = prompt[:, None] + start + torch.arange(tokens)
            cache = LayerCache(keys, values, rows, prompt + start + tokens, table, False)
            out = ours(x[torch.arange(R)[:, None], at], cache=cache)
            expected = torch.stack([full[r][at[r]] for r in range(R)])
            torch.testing.assert_close(out, expected, **TOLERANCE)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((SIZE, 5), "heads must divide the size"),
        ((SIZE, 0), "heads"),
        ((SIZE, -4), "heads"),
        ((SIZE, 4, 3), "key heads the heads"),
        ((SIZE, 4, 0), "0 key heads"),
        ((SIZE, 4, -2), "-2 key heads"),
    ],
)
def test_head_counts_that_do_not_fit(arguments: tuple, match: str) -> None:
    with pytest.raises(ArgumentError, match=match):
        MultiHeadAttention(*arguments)


def test_attention_names_what_it_cannot_take() -> None:
    ours = MultiHeadAttention(SIZE, HEADS)
    x, memory = inputs((R, S, SIZE), (R, N, SIZE))
    with pytest.raises(ArgumentError, match=r"shape \[3, 7, 23\]"):
        ours(x[..., :-1])
    for wrong in ((x.tolist(),), (x, memory.tolist())):
        with pytest.raises(ArgumentError, match="x or memory is list"):
            ours(*wrong)
    with pytest.raises(ArgumentError, match=r"shape \[7, 24\]"):
        ours(x[0])
    with pytest.raises(ArgumentError, match=r"shape \[3, 5, 20\]"):
        ours(x, memory[..., :20])
    with pytest.raises(ArgumentError, match="3 rows and memory 2"):
        ours(x, memory[:2])
    with pytest.raises(ArgumentError, match="mask"):
        ours(x, mask=torch.ones(R, 1, 1, S + 1, dtype=torch.bool))
    with pytest.raises(ArgumentError, match="mask"):
        ours(x, mask=torch.ones(S, S, dtype=torch.int64))
    with pytest.raises(ArgumentError, match="key_lengths"):
        ours(x, key_lengths=torch.tensor([S + 1, 1, 1]))
    with pytest.raises(ArgumentError, match="bfloat16"):
        ours(x.bfloat16())


# ---- FeedForward and TransformerLayer ----------------------------------------------------------

ACTIVATIONS = {
    "relu": torch.relu,
    "gelu": nn.functional.gelu,
    "gelu_tanh": lambda x: nn.functional.gelu(x, approximate="tanh"),
    "silu": nn.functional.silu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_feed_forward_is_two_linear_layers(activation: str) -> None:
    ours = randomise(FeedForward(SIZE, FFN, activation))  # type: ignore[arg-type]

    def theirs(x: Tensor) -> Tensor:
        return ours.linear2(ACTIVATIONS[activation](ours.linear1(x)))

    assert_equal_runs(ours, theirs, ours, ours, inputs((R, S, SIZE)))


@pytest.mark.parametrize("pre_norm", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_encoder_layer_is_torchs(pre_norm: bool, activation: str) -> None:
    theirs = nn.TransformerEncoderLayer(
        SIZE, HEADS, FFN, 0.0, activation, batch_first=True, norm_first=pre_norm
    )
    randomise(theirs)
    position = "pre" if pre_norm else "post"
    ours = TransformerLayer(config(norm_position=position, activation=activation))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    lengths = torch.tensor([S, 4, 1])
    padding = torch.arange(S) >= lengths[:, None]
    assert_equal_runs(
        lambda x: ours(x, key_lengths=lengths),
        lambda x: theirs(x, src_key_padding_mask=padding),
        ours,
        theirs,
        inputs((R, S, SIZE)),
    )


@pytest.mark.parametrize("pre_norm", [False, True])
def test_decoder_layer_is_torchs(pre_norm: bool) -> None:
    theirs = nn.TransformerDecoderLayer(
        SIZE, HEADS, FFN, 0.0, batch_first=True, norm_first=pre_norm
    )
    randomise(theirs)
    position = "pre" if pre_norm else "post"
    ours = TransformerLayer(config(norm_position=position), cross_attention=True)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    lengths = torch.tensor([N, 2, 1])
    padding = torch.arange(N) >= lengths[:, None]
    ahead = torch.ones(S, S, dtype=torch.bool).triu(1)
    assert_equal_runs(
        lambda x, m: ours(x, causal=True, memory=m, memory_lengths=lengths),
        lambda x, m: theirs(x, m, tgt_mask=ahead, memory_key_padding_mask=padding),
        ours,
        theirs,
        inputs((R, S, SIZE), (R, N, SIZE)),
    )


def test_cross_attention_without_memory_is_refused_and_the_reverse() -> None:
    x, memory = inputs((R, S, SIZE), (R, N, SIZE))
    with pytest.raises(ArgumentError, match="not given"):
        TransformerLayer(config(), cross_attention=True)(x)
    with pytest.raises(ArgumentError, match="memory is given"):
        TransformerLayer(config())(x, memory=memory)


def test_dropout_is_on_in_training_only() -> None:
    layer = TransformerLayer(config(dropout=0.5))
    x = inputs((R, S, SIZE))[0]
    torch.manual_seed(0)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


# ---- positions ---------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [6, 7])
def test_sinusoids_are_the_papers(size: int) -> None:
    table = sinusoids(50, size)
    assert table.dtype == torch.float32
    for position in (0, 1, 17, 49):
        for column in range(size):
            angle = position / 10000 ** (2 * (column // 2) / size)
            expected = math.sin(angle) if column % 2 == 0 else math.cos(angle)
            assert table[position, column].item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("positions", ["learned", "sinusoidal", "none"])
def test_embedding_adds_scaled_tokens_and_positions(positions: str) -> None:
    c = config(positions=positions, scale_embedding=True)
    embedding = Embedding(c, nn.Embedding(c.vocab_size, SIZE))
    ids, at = torch.tensor([[3, 0, 10], [1, 1, 2]]), torch.tensor([[4, 5, 6], [0, 1, 31]])
    expected = embedding.tokens.weight[ids] * math.sqrt(SIZE)
    if positions == "learned":
        expected = expected + embedding.positions.weight[at]
    elif positions == "sinusoidal":
        expected = expected + sinusoids(32, SIZE)[at]
    torch.testing.assert_close(embedding(ids, at), expected)
    assert "table" not in embedding.state_dict()


# ---- what every module must survive ------------------------------------------------------------


def layers() -> dict[str, tuple[nn.Module, list[Tensor]]]:
    x, memory = inputs((R, S, SIZE), (R, N, SIZE))
    post = config(norm_position="post")
    return {
        "norm": (LayerNorm(SIZE), [x]),
        "rms_norm": (RMSNorm(SIZE), [x]),
        "attention": (MultiHeadAttention(SIZE, HEADS, 2), [x]),
        "feed_forward": (FeedForward(SIZE, FFN), [x]),
        "pre": (TransformerLayer(config(norm_position="pre")), [x]),
        "cross": (TransformerLayer(post, cross_attention=True), [x, memory]),
    }


def call(module: nn.Module, tensors: list[Tensor]) -> Tensor:
    return module(tensors[0]) if len(tensors) == 1 else module(tensors[0], memory=tensors[1])


@pytest.mark.parametrize("name", layers())
def test_deepcopy_and_meta_construction(name: str) -> None:
    module, tensors = layers()[name]
    randomise(module)
    expected = call(module, tensors)
    assert torch.equal(call(copy.deepcopy(module), tensors), expected)
    with torch.device("meta"):
        empty = layers()[name][0]
    assert all(p.is_meta for p in empty.parameters())
    empty.to_empty(device="cpu").load_state_dict(module.state_dict(), strict=True)
    assert torch.equal(call(empty, tensors), expected)


@pytest.mark.parametrize("name", layers())
def test_bfloat16_is_close(name: str) -> None:
    module, tensors = layers()[name]
    randomise(module)
    expected = call(module, tensors)
    got = call(module.to(torch.bfloat16), [t.bfloat16() for t in tensors])
    assert got.dtype == torch.bfloat16
    error = (got.float() - expected).abs().max() / expected.abs().max()
    assert error < 0.05


@pytest.mark.parametrize("name", layers())
def test_compiled_whole_equals_eager(name: str) -> None:
    module, tensors = layers()[name]
    randomise(module)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert_equal_runs(
        lambda *t: call(compiled, list(t)),
        lambda *t: call(module, list(t)),
        module,  # `compiled` shares its parameters
        module,
        tensors,
    )


@pytest.mark.parametrize("name", layers())
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_nothing(name: str, reentrant: bool) -> None:
    module, tensors = layers()[name]
    randomise(module)
    assert_equal_runs(
        lambda *t: checkpoint(lambda *u: call(module, list(u)), *t, use_reentrant=reentrant),
        lambda *t: call(module, list(t)),
        module,
        module,
        tensors,
    )


def test_checkpointing_replays_dropout() -> None:
    module = randomise(TransformerLayer(config(dropout=0.3)))
    x = inputs((R, S, SIZE))[0].requires_grad_()
    torch.manual_seed(3)
    plain = torch.autograd.grad(module(x).square().sum(), x)[0]
    torch.manual_seed(3)
    out = checkpoint(module, x, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(out.square().sum(), x)[0], plain)


def test_empty_and_strided_inputs() -> None:
    module = randomise(TransformerLayer(config())).eval()
    x = inputs((R, S, SIZE))[0]
    assert module(x[:0]).shape == (0, S, SIZE)
    assert module(x[:, :0]).shape == (R, 0, SIZE)
    strided = x.transpose(0, 1).contiguous().transpose(0, 1)
    assert not strided.is_contiguous()
    torch.testing.assert_close(module(strided), module(x), **TOLERANCE)
