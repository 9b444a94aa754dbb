"""What generation promises of random models: invariants, work done once, lengths, dtypes."""

import copy
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tilewise.errors import ArgumentError
from tilewise.generation import GenerationOptions, GenerationOutput, generate
from tilewise.generation.cache import CachedSteps
from tilewise.generation.search import beam_search, greedy_search
from tilewise.layers import LayerCache, MultiHeadAttention

V, LENGTH = 29, 40
START, EOS = 1, (15, 19)
SOON: dict = {"eos_token_id": [1, 3, 25], "early_stopping": True}  # ends most sequences early
KINDS = ["decoder", "seq2seq"]
SEARCHES = [{}, {"num_beams": 4}]  # greedy and beam


def prompts(count: int, seed: int = 0, longest: int = 9) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(V) for _ in range(rng.randint(1, longest))] for _ in range(count)]


def rows_of(out: GenerationOutput) -> list[list[int]]:
    return [row[:n] for row, n in zip(out.sequences.tolist(), out.lengths.tolist(), strict=True)]


def decoder_of(network: nn.Module) -> nn.Module:
    return getattr(network, "decoder", network)


def next_log_probs(network: nn.Module, source: list[int], so_far: list[int]) -> Tensor:
    """[len(so_far), V]: log-probabilities after each token, by one full forward of one row."""
    ids = torch.tensor([so_far])
    with torch.no_grad():
        if hasattr(network, "decoder"):
            logits = network(torch.tensor([source]), decoder_input_ids=ids).logits
        else:
            logits = network(ids).logits
    return torch.log_softmax(logits[0], -1)


def assert_same(a: GenerationOutput, b: GenerationOutput) -> None:
    assert rows_of(a) == rows_of(b)
    torch.testing.assert_close(a.sequences_scores, b.sequences_scores, rtol=1e-5, atol=1e-5)


# ---- invariants --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("search", [{}, {"num_beams": 3}, {"num_beams": 5, "early_stopping": True}])
def test_cached_equals_uncached(models, kind: str, search: dict) -> None:
    more = search | {"max_new_tokens": 12, "num_return_sequences": search.get("num_beams", 1)}
    for length_penalty in (0.0, 1.0):
        both = [
            generate(
                models[kind], prompts(9), use_cache=cached, length_penalty=length_penalty, **more
            )
            for cached in (True, False)
        ]
        assert_same(*both)
        torch.testing.assert_close(
            both[0].token_log_probs, both[1].token_log_probs, rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("cached", [True, False])
def test_batch_equals_one_by_one(models, kind: str, search: dict, cached: bool) -> None:
    inputs = prompts(32)
    more = search | {"max_new_tokens": 10, "use_cache": cached}
    together = generate(models[kind], inputs, **more)
    rows, ended = rows_of(together), 0
    for i, prompt in enumerate(inputs):
        alone = generate(models[kind], [prompt], **more)
        assert rows_of(alone) == [rows[i]], f"prompt {i}"
        torch.testing.assert_close(
            alone.sequences_scores[0], together.sequences_scores[i], rtol=1e-5, atol=1e-5
        )
        ended += rows[i][-1] in EOS
    assert 5 < ended < 32  # some leave the batch early, some do not
    assert len({tuple(row) for row in rows}) > 20


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("search", SEARCHES)
def test_order_and_padding_of_the_batch_change_nothing(models, kind: str, search: dict) -> None:
    inputs, more = prompts(10, seed=1), search | {"max_new_tokens": 8}
    expected = generate(models[kind], inputs, **more)
    order = random.Random(0).sample(range(10), 10)
    shuffled = generate(models[kind], [inputs[i] for i in order], **more)
    assert rows_of(shuffled) == [rows_of(expected)[i] for i in order]
    longest = max(map(len, inputs))
    for side in ("left", "right"):
        ids, mask = torch.full((2, 10, longest), 5)
        mask = torch.zeros_like(ids)
        for i, prompt in enumerate(inputs):
            at = slice(longest - len(prompt), None) if side == "left" else slice(len(prompt))
            ids[i, at], mask[i, at] = torch.tensor(prompt), 1
        for given in (ids, ids.int(), ids.t().contiguous().t()):
            assert_same(generate(models[kind], given, attention_mask=mask, **more), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_one_beam_equals_greedy_equals_an_argmax_loop(models, kind: str) -> None:
    network, inputs = models[kind], prompts(8, seed=2)
    out = generate(network, inputs, num_beams=1, max_new_tokens=9, length_penalty=0.5)
    for i, source in enumerate(inputs):
        tokens = [START] if kind == "seq2seq" else list(source)
        began, total = len(tokens), 0.0
        while len(tokens) < began + 9 and (len(tokens) == began or tokens[-1] not in EOS):
            log_probs = next_log_probs(network, source, tokens)[-1]
            tokens.append(int(log_probs.argmax()))
            total += float(log_probs.max())
        assert rows_of(out)[i] == tokens
        expected = total / (len(tokens) - began) ** 0.5
        assert out.sequences_scores[i].item() == pytest.approx(expected, rel=1e-4)


def test_beam_search_of_one_beam_is_greedy_search(models) -> None:
    network, inputs = models["decoder"], prompts(8, seed=3)
    o = GenerationOptions(max_new_tokens=8, eos_token_id=EOS)
    with torch.no_grad():
        beam, greedy = (
            search(CachedSteps(network, inputs, 1, 8, None), inputs, o)
            for search in (beam_search, greedy_search)
        )
    assert torch.equal(beam.tokens, greedy.tokens)
    assert torch.equal(beam.lengths, greedy.lengths)
    torch.testing.assert_close(beam.scores, greedy.scores, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("alpha", [0.0, 1.0, 2.0, -0.5, -1, 3])
def test_scores_are_those_of_a_full_forward(models, kind: str, alpha: float) -> None:
    network, inputs = models[kind], prompts(6, seed=4)
    for search in ({}, {"num_beams": 4, "num_return_sequences": 4}):
        out = generate(network, inputs, max_new_tokens=8, length_penalty=alpha, **search)
        each = search.get("num_return_sequences", 1)
        for row, tokens in enumerate(rows_of(out)):
            source = inputs[row // each]
            began = 1 if kind == "seq2seq" else len(source)
            log_probs = next_log_probs(network, source, tokens[:-1])[began - 1 :]
            chosen = log_probs.gather(1, torch.tensor(tokens[began:])[:, None])[:, 0]
            n = len(chosen)
            torch.testing.assert_close(out.token_log_probs[row, :n], chosen, rtol=1e-4, atol=1e-4)
            assert not out.token_log_probs[row, n:].any()
            expected = chosen.sum().item() / n**alpha
            assert out.sequences_scores[row].item() == pytest.approx(expected, rel=1e-4)


def test_best_sequences_come_first(models) -> None:
    inputs = prompts(5, seed=5)
    many = generate(
        models["decoder"], inputs, num_beams=6, num_return_sequences=6, max_new_tokens=7
    )
    scores = many.sequences_scores.view(5, 6)
    assert (scores[:, :-1] >= scores[:, 1:]).all() and (scores > -1e8).all()
    two = generate(models["decoder"], inputs, num_beams=6, num_return_sequences=2, max_new_tokens=7)
    assert rows_of(two) == [rows_of(many)[6 * i + j] for i in range(5) for j in range(2)]
    for i in range(5):
        assert len({tuple(row) for row in rows_of(many)[6 * i : 6 * i + 6]}) == 6


def test_output_shapes_and_padding(models) -> None:
    inputs = [[4], [5, 6, 7]]
    out = generate(
        models["decoder"],
        inputs,
        num_beams=3,
        num_return_sequences=2,
        max_new_tokens=6,
        pad_token_id=0,
    )
    new = out.lengths - torch.tensor([1, 1, 3, 3])
    assert out.sequences.shape == (4, int(out.lengths.max()))
    assert out.token_log_probs.shape == (4, int(new.max()))
    assert out.sequences.dtype == out.lengths.dtype == torch.int64
    for i, row in enumerate(out.sequences):
        assert row[: len(inputs[i // 2])].tolist() == inputs[i // 2]
        assert not row[out.lengths[i] :].any()


# ---- work done once ----------------------------------------------------------------------------


@contextmanager
def watching(network: nn.Module) -> Iterator[list[tuple[str, int, int]]]:
    """(module, rows, length) of every call of a layer, encoder and decoder, and of the lm_head."""
    seen: list[tuple[str, int, int]] = []

    def note(name: str) -> Callable:
        return lambda _, args: seen.append((name, args[0].shape[0], args[0].shape[1]))

    hooks = [
        module.register_forward_pre_hook(note(name))
        for name, module in network.named_modules()
        if hasattr(module, "self_attn") or name.endswith("lm_head")
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("beams", [1, 4])
def test_prompts_run_once_per_sentence_and_steps_shrink(models, beams: int) -> None:
    inputs = prompts(12, seed=6)
    with watching(models["decoder"]) as seen:
        out = generate(models["decoder"], inputs, num_beams=beams, max_new_tokens=12, **SOON)
    longest = max(map(len, inputs))
    layers = [(rows, length) for name, rows, length in seen if name == "layers.0"]
    assert layers == [(r, n) for name, r, n in seen if name == "layers.1"]
    assert layers[0] == (12, longest)
    steps = [rows for rows, _ in layers[1:]]
    assert {length for _, length in layers[1:]} == {1}
    assert steps == sorted(steps, reverse=True) and len(set(steps)) > 2
    assert all(rows % beams == 0 for rows in steps) and steps[0] <= 12 * beams
    assert len(steps) <= 11  # the twelfth token is never fed back
    heads = [rows for name, rows, _ in seen if name == "lm_head"]
    assert heads == [12, *steps]  # logits of the last prompt token only
    if beams == 1:
        new = [len(row) - len(p) for row, p in zip(rows_of(out), inputs, strict=True)]
        assert steps == [sum(n > t for n in new) for t in range(1, max(new))]


@pytest.mark.parametrize("cached", [True, False])
def test_sources_run_once_per_sentence(models, monkeypatch, cached: bool) -> None:
    remembered: list[int] = []
    remember = MultiHeadAttention.remember

    def counted(self, memory, lengths=None):
        remembered.append(len(memory))
        return remember(self, memory, lengths)

    monkeypatch.setattr(MultiHeadAttention, "remember", counted)
    with watching(models["seq2seq"]) as seen:
        generate(models["seq2seq"], prompts(7), num_beams=4, use_cache=cached, **SOON)
    assert remembered == [7, 7]  # once for each of two decoder layers
    assert [rows for name, rows, _ in seen if name == "encoder.layers.0"] == [7]
    first, *rest = [(r, n) for name, r, n in seen if name == "decoder.layers.0"]
    assert first == (7, 1) and rest[0][0] in range(4, 29, 4)


class CacheWatch(TorchDispatchMode):
    """Every operator that reads or writes the storages that new_empty made for the cache."""

    def __init__(self, sizes: tuple[int, int]) -> None:
        super().__init__()
        self.sizes = sizes  # heads and head size of the cache
        self.storages: list[Tensor] = []
        self.operators: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function is torch.ops.aten.new_empty.default and out.dim() == 4:
            assert tuple(out.shape[2:]) == self.sizes
            self.storages.append(out)
            return out
        mine = {t.untyped_storage().data_ptr() for t in self.storages}
        flat = [a for arg in args for a in (arg if isinstance(arg, (list, tuple)) else [arg])]
        if any(isinstance(a, Tensor) and a.untyped_storage().data_ptr() in mine for a in flat):
            self.operators.add(str(function))
        return out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("beams", [1, 4])
def test_cache_is_written_in_place_and_never_moved(
    models, monkeypatch, kind: str, beams: int
) -> None:
    inputs, network = prompts(8, seed=7), models[kind]
    expected = generate(network, inputs, num_beams=beams, max_new_tokens=9, **SOON)
    written: set[int] = set()
    write = LayerCache.write

    def noted(self, keys, values):
        written.update(t.untyped_storage().data_ptr() for t in (self.keys, self.values))
        return write(self, keys, values)

    monkeypatch.setattr(LayerCache, "write", noted)
    config = network.config
    with CacheWatch((config.kv_heads, config.head_size)) as watch:
        out = generate(network, inputs, num_beams=beams, max_new_tokens=9, **SOON)
    assert_same(out, expected)
    assert len(out.lengths.unique()) > 1  # some left early, so the batch was cut
    assert len(watch.storages) == 4  # keys and values of two layers, allocated once
    assert written == {t.untyped_storage().data_ptr() for t in watch.storages}
    longest = max(map(len, inputs)) if kind == "decoder" else 1
    assert {t.shape[0] for t in watch.storages} == {8 * beams}
    assert {t.shape[1] for t in watch.storages} == {longest + 8}
    names = {name.removeprefix("aten.").split(".")[0] for name in watch.operators}
    assert names <= {"slice", "alias", "index_put_", "tilewise", "detach", "transpose"}, names
    assert any("decode_attention" in name for name in watch.operators)


def test_unwritten_cache_is_never_read(models, monkeypatch) -> None:
    """Fresh memory full of NaN reaches no result: what was not written is not read."""
    inputs = prompts(8, seed=8)
    expected = generate(models["decoder"], inputs, num_beams=3, max_new_tokens=9, **SOON)
    new_empty = Tensor.new_empty

    def poisoned(self, *args, **kwargs):
        out = new_empty(self, *args, **kwargs)
        return out.fill_(torch.nan) if out.is_floating_point() else out

    monkeypatch.setattr(Tensor, "new_empty", poisoned)
    out = generate(models["decoder"], inputs, num_beams=3, max_new_tokens=9, **SOON)
    assert_same(out, expected)


# ---- ends, lengths, empty things ---------------------------------------------------------------


def first_tokens(network: nn.Module, inputs: list[list[int]]) -> list[int]:
    out = generate(network, inputs, max_new_tokens=1, eos_token_id=())
    return [row[-1] for row in rows_of(out)]


@pytest.mark.parametrize("search", SEARCHES)
def test_end_token_at_the_first_step(models, search: dict) -> None:
    inputs = prompts(6, seed=9)
    firsts = sorted(set(first_tokens(models["decoder"], inputs)))
    with watching(models["decoder"]) as seen:
        out = generate(models["decoder"], inputs, max_new_tokens=9, eos_token_id=firsts)
    assert [len(row) - len(p) for row, p in zip(rows_of(out), inputs, strict=True)] == [1] * 6
    assert len(seen) == 3  # two layers and the head, for the prompts alone
    everything = generate(
        models["decoder"], inputs, max_new_tokens=9, eos_token_id=list(range(V)), **search
    )
    assert (everything.token_log_probs.shape[1]) == 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("search", SEARCHES)
def test_batch_of_none(models, kind: str, search: dict) -> None:
    for nothing in ([], torch.zeros(0, 4, dtype=torch.int64), torch.zeros(0, 0, dtype=torch.int64)):
        with watching(models[kind]) as seen:
            out = generate(models[kind], nothing, **search)
        assert not seen and len(out.sequences) == len(out.lengths) == len(out.sequences_scores) == 0
    with pytest.raises(ArgumentError, match="num_beams"):
        generate(models[kind], [], num_beams=0)


@pytest.mark.parametrize("search", SEARCHES)
def test_empty_prompts_start_from_bos(models, build, search: dict) -> None:
    out = generate(models["decoder"], [[], [7, 8], []], max_new_tokens=6, **search)
    alone = generate(models["decoder"], [[START], [7, 8]], max_new_tokens=6, **search)
    assert rows_of(out) == [rows_of(alone)[i] for i in (0, 1, 0)]
    masked = generate(
        models["decoder"],
        torch.tensor([[4, 5]]),
        attention_mask=torch.zeros(1, 2),
        max_new_tokens=6,
        **search,
    )
    assert rows_of(masked) == rows_of(alone)[:1]
    silent = build("decoder", bos_token_id=None)
    with watching(silent) as seen, pytest.raises(ArgumentError, match="no bos_token_id"):
        generate(silent, [[], [7]], **search)
    with watching(models["seq2seq"]) as more, pytest.raises(ArgumentError, match="empty source"):
        generate(models["seq2seq"], [[4], []], **search)
    assert not seen and not more


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("search", SEARCHES)
def test_mixed_lengths_up_to_the_whole_context(models, kind: str, search: dict) -> None:
    new = 3
    longest = LENGTH - new if kind == "decoder" else LENGTH
    rng = random.Random(10)
    inputs = [[rng.randrange(V) for _ in range(n)] for n in (1, longest, 2, 17)]
    together = generate(models[kind], inputs, max_new_tokens=new, **search)
    for i, prompt in enumerate(inputs):
        alone = generate(models[kind], [prompt], max_new_tokens=new, **search)
        assert rows_of(alone) == [rows_of(together)[i]]
    if kind == "decoder":
        with pytest.raises(ArgumentError, match="at most 3"):
            generate(models[kind], inputs, max_new_tokens=new + 1, **search)


def test_length_options(models) -> None:
    network, inputs = models["decoder"], [[4, 5, 6], [7]]
    never = {"eos_token_id": ()}
    assert generate(network, inputs, max_new_tokens=1, **never).lengths.tolist() == [4, 2]
    assert generate(network, inputs, max_length=8, **never).lengths.tolist() == [8, 6]
    both = generate(network, inputs, max_length=8, max_new_tokens=2, **never)
    assert both.lengths.tolist() == [5, 3]
    assert generate(network, inputs, **never).lengths.tolist() == [23, 21]
    near = generate(network, [[4] * 35], **never)
    assert near.lengths.tolist() == [LENGTH]
    defaults = {"max_new_tokens": 5, "num_beams": 2, "do_sample": True}
    out = generate(network, inputs, defaults=defaults, **never)
    assert out.lengths.tolist() == [8, 6]
    out = generate(network, inputs, defaults=defaults, max_length=5, **never)
    assert out.lengths.tolist() == [5, 3]
    whole = generate(models["seq2seq"], inputs, max_new_tokens=LENGTH - 1, **never)
    assert whole.lengths.tolist() == [LENGTH, LENGTH]


# ---- what a training model, and one in half precision, may expect -----------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("search", SEARCHES)
def test_generation_leaves_a_training_model_as_it_was(models, kind: str, search: dict) -> None:
    """Dropout is off meanwhile; a part that was frozen in eval mode stays so."""
    network = copy.deepcopy(models[kind]).train()
    decoder_of(network).layers[1].eval()
    flags = {name: module.training for name, module in network.named_modules()}
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    torch.manual_seed(21)
    before = torch.get_rng_state()
    out = generate(network, prompts(4), max_new_tokens=6, **search)
    assert torch.equal(torch.get_rng_state(), before)
    assert {name: module.training for name, module in network.named_modules()} == flags
    assert all(torch.equal(state[name], t) for name, t in network.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in network.parameters())
    assert not out.sequences_scores.requires_grad
    assert_same(out, generate(models[kind], prompts(4), max_new_tokens=6, **search))


def test_same_call_same_bits(models) -> None:
    outs = [generate(models["seq2seq"], prompts(6), num_beams=4) for _ in range(3)]
    for out in outs[1:]:
        assert torch.equal(out.sequences, outs[0].sequences)
        assert torch.equal(out.sequences_scores, outs[0].sequences_scores)


def test_the_default_dtype_changes_nothing(models) -> None:
    """Scores are float32 whatever torch makes new tensors of."""
    for more in ({}, {"num_beams": 3}):
        expected = generate(models["decoder"], prompts(5), max_new_tokens=6, **more)
        torch.set_default_dtype(torch.float64)
        try:
            found = generate(models["decoder"], prompts(5), max_new_tokens=6, **more)
        finally:
            torch.set_default_dtype(torch.float32)
        assert torch.equal(found.sequences, expected.sequences)
        assert torch.equal(found.sequences_scores, expected.sequences_scores)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("search", SEARCHES)
def test_other_dtypes_generate(models, dtype: torch.dtype, search: dict) -> None:
    network = copy.deepcopy(models["decoder"]).to(dtype)
    out = generate(network, prompts(5), max_new_tokens=6, **search)
    assert out.sequences_scores.dtype == torch.float32 and out.sequences_scores.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("search", SEARCHES)
def test_autocast_generates_with_its_own_cache(models, kind: str, search: dict) -> None:
    """float32 weights under autocast: keys come in bfloat16, and the cache holds them so."""
    more = search | {"max_new_tokens": 6}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        both = [generate(models[kind], prompts(5), use_cache=c, **more) for c in (True, False)]
    for out in both:
        assert out.sequences_scores.isfinite().all()
    exact = generate(models[kind], prompts(5), **more)
    close = (both[0].token_log_probs[:, 0] - exact.token_log_probs[:, 0]).abs() < 0.3
    assert close.sum() >= 4
