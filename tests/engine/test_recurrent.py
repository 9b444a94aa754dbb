"""The recurrent encoder-decoder: a float64 reference from the papers, torch.nn.GRU, generation."""

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tilewise
from tilewise.config import RecurrentConfig
from tilewise.errors import ArgumentError, CheckpointError, ConfigError
from tilewise.generation import generate
from tilewise.layers import AdditiveAttention, GatedRecurrent
from tilewise.models import RecurrentSeq2Seq
from tilewise.scoring import embed, score
from tilewise.text import train_tokenizer

SOURCE_V, TARGET_V, START, END = 11, 9, 1, 2
KINDS = {
    "cho": {"bidirectional": False, "attention": False},
    "bahdanau": {"bidirectional": True, "attention": True, "attention_size": 7},
    "summary": {"bidirectional": True, "attention": False},
    "forward": {"bidirectional": False, "attention": True, "reset": "after"},
}
SEARCHES = [{}, {"num_beams": 4}]
SOURCES = [[3, 5, 4, 8, 10], [7], [9, 3, 3], [4, 6, 10, 7, 5, 9, 3]]


def model(kind: str, **changes: object) -> RecurrentSeq2Seq:
    """A model whose output depends on every parameter, in float64."""
    values: dict = {
        "vocab_size": SOURCE_V,
        "target_vocab_size": TARGET_V,
        "embedding_size": 5,
        "hidden_size": 6,
        "readout_size": 4,
        "pad_token_id": 0,
        "decoder_start_token_id": START,
        "eos_token_id": (END,),
    }
    network = RecurrentSeq2Seq(RecurrentConfig(**(values | KINDS[kind] | changes))).double()
    generator = torch.Generator().manual_seed(3)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.7, generator=generator)
    return network.eval()


def draw(*shape: int, vocab: int = TARGET_V, seed: int = 0) -> Tensor:
    return torch.randint(3, vocab, shape, generator=torch.Generator().manual_seed(seed))


# ---- the equations of the papers, one vector at a time -------------------------------------------


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def unit(w: dict, x: np.ndarray, h: np.ndarray, reset: str) -> np.ndarray:
    """Cho et al. 2014, equations 5 to 8; `after` moves r outside the product."""
    w_r, w_z, w_n = np.split(w["W"], 3)
    u_r, u_z, u_n = np.split(w["U"], 3)
    (a_r, a_z, a_n), (b_r, b_z, b_n) = np.split(w["a"], 3), np.split(w["b"], 3)
    r = sigmoid(w_r @ x + a_r + u_r @ h + b_r)
    z = sigmoid(w_z @ x + a_z + u_z @ h + b_z)
    inner = u_n @ (r * h) + b_n if reset == "before" else r * (u_n @ h + b_n)
    return z * h + (1 - z) * np.tanh(w_n @ x + a_n + inner)


def bahdanau_unit(w: dict, x: np.ndarray, h: np.ndarray) -> np.ndarray:
    """Bahdanau et al. 2015, appendix A.1.1: z and 1 - z exchanged."""
    w_r, w_z, w_n = np.split(w["W"], 3)
    u_r, u_z, u_n = np.split(w["U"], 3)
    z = sigmoid(w_z @ x + u_z @ h)
    r = sigmoid(w_r @ x + u_r @ h)
    return (1 - z) * h + z * np.tanh(w_n @ x + u_n @ (r * h))


def weights_of(layer: GatedRecurrent, suffix: str = "") -> dict:
    names = {"W": "weight_ih_l0", "U": "weight_hh_l0", "a": "bias_ih_l0", "b": "bias_hh_l0"}
    return {k: getattr(layer, name + suffix).detach().numpy() for k, name in names.items()}


def by_hand(
    network: RecurrentSeq2Seq,
    source: list[int],
    target: list[int],
    maps: list[np.ndarray] | None = None,
) -> np.ndarray:
    """Logits [len(target), V] of one pair, in float64; maps: gets each step's attention [N]."""
    config, w = network.config, {k: v.numpy() for k, v in network.state_dict().items()}
    read, zero = w["encoder.tokens.weight"][source], np.zeros(config.hidden_size)
    forward, h = [], zero
    for x in read:
        forward.append(h := unit(weights_of(network.encoder.units), x, h, config.reset))
    states, ends = np.array(forward), forward[-1]
    if config.bidirectional:
        backward, h = [], zero
        for x in read[::-1]:
            both = weights_of(network.encoder.units, "_reverse")
            backward.insert(0, h := unit(both, x, h, config.reset))
        states = np.concatenate([states, backward], 1)
        ends = np.concatenate([ends, backward[0]])
    if config.attention:
        first = ends[-config.hidden_size :]
    else:
        first = np.tanh(w["decoder.summary.weight"] @ ends + w["decoder.summary.bias"])
    s = np.tanh(w["decoder.start.weight"] @ first + w["decoder.start.bias"])
    logits = []
    for token in target:
        e, context = w["decoder.tokens.weight"][token], first
        if config.attention:
            energies = [
                w["decoder.attention.score.weight"][0]
                @ np.tanh(
                    w["decoder.attention.query.weight"] @ s + w["decoder.attention.key.weight"] @ h
                )
                for h in states
            ]
            alpha = np.exp(energies) / np.exp(energies).sum()
            context = alpha @ states
            if maps is not None:
                maps.append(alpha)
        s = unit(weights_of(network.decoder.unit), np.concatenate([e, context]), s, config.reset)
        t = w["decoder.readout.weight"] @ np.concatenate([s, e, context])
        t = np.maximum(*(t + w["decoder.readout.bias"]).reshape(-1, 2).T)
        logits.append(w["decoder.lm_head.weight"] @ t + w["decoder.lm_head.bias"])
    return np.array(logits)


@pytest.mark.feature("logits", "tilewise-recurrent")
@pytest.mark.parametrize("reset", ["before", "after"])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_the_equations(
    kind: str, reset: str, record_property: Callable[[str, object], None]
) -> None:
    network = model(kind, reset=reset)
    target = [START, *draw(5).tolist()]
    for source in SOURCES:
        found = network(torch.tensor([source]), decoder_input_ids=torch.tensor([target])).logits
        expected = by_hand(network, source, target)
        difference = np.abs(found[0].detach().numpy() - expected).max()
        assert difference < 1e-10
        record_property("off", float(difference / np.abs(expected).max()))


@pytest.mark.feature("attention maps", "tilewise-recurrent")
@pytest.mark.parametrize("kind", ["bahdanau", "forward"])
def test_attention_maps_are_those_of_the_equations(kind: str) -> None:
    network, target, maps = model(kind), [START, *draw(5).tolist()], []
    by_hand(network, SOURCES[0], target, maps)
    ids = {"decoder_input_ids": torch.tensor([target]), "output_attentions": True}
    (found,) = network(torch.tensor(SOURCES[:1]), **ids).cross_attentions
    assert np.abs(found[0, 0].detach().numpy() - np.array(maps)).max() < 1e-12


def test_bahdanaus_unit_is_chos_with_negated_update_gate() -> None:
    layer, size = model("bahdanau").encoder.units, 6
    w = weights_of(layer)
    for name in ("bias_ih_l0", "bias_hh_l0"):
        nn.init.zeros_(getattr(layer, name))
    x, h = np.linspace(-1, 1, 5), np.linspace(0.5, -0.3, size)
    expected = bahdanau_unit(w, x, h)
    with torch.no_grad():
        layer.weight_ih_l0[size : 2 * size] *= -1
        layer.weight_hh_l0[size : 2 * size] *= -1
        found = layer.step(torch.tensor(x)[None], torch.tensor(h)[None])[0]
    assert np.abs(found.numpy() - expected).max() < 1e-12


# ---- torch.nn.GRU --------------------------------------------------------------------------------


@pytest.mark.parametrize("bidirectional", [False, True])
def test_reset_after_is_torchs_gru(bidirectional: bool) -> None:
    torch.manual_seed(0)
    theirs = nn.GRU(5, 7, batch_first=True, bidirectional=bidirectional, dtype=torch.float64)
    after, before = (
        GatedRecurrent(5, 7, reset=reset, bidirectional=bidirectional).double()
        for reset in ("after", "before")
    )
    for layer in (after, before):
        layer.load_state_dict(theirs.state_dict())
    x, lengths = torch.randn(3, 6, 5, dtype=torch.float64), torch.tensor([6, 2, 4])
    real = torch.arange(6) < lengths[:, None]
    packed = nn.utils.rnn.pack_padded_sequence(x, lengths, True, enforce_sorted=False)
    expected, _ = nn.utils.rnn.pad_packed_sequence(theirs(packed)[0], True)
    torch.testing.assert_close(after(x, real)[real], expected[real], rtol=0, atol=1e-12)
    torch.testing.assert_close(after(x), theirs(x)[0], rtol=0, atol=1e-12)
    assert (before(x) - theirs(x)[0]).abs().max() > 1e-2
    torch.testing.assert_close(
        after.step(x[:, 0], x.new_zeros(3, 7)), after(x)[:, 0, :7], rtol=0, atol=1e-12
    )
    theirs.load_state_dict(after.state_dict())  # the way back has the same names and shapes


# ---- gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("reset", ["before", "after"])
def test_gradients_of_the_units(reset: str) -> None:
    layer = GatedRecurrent(3, 2, reset=reset, bidirectional=True).double()
    real = torch.tensor([[True, True, False], [False, True, True]])
    x = torch.randn(2, 3, 3, dtype=torch.float64, requires_grad=True)
    parameters = {n: p.detach().normal_().requires_grad_() for n, p in layer.named_parameters()}

    def run(x: Tensor, *values: Tensor) -> Tensor:
        named = dict(zip(parameters, values, strict=True))
        return torch.func.functional_call(layer, named, (x, real))

    assert torch.autograd.gradcheck(run, (x, *parameters.values()))


def test_gradients_of_the_attention() -> None:
    layer = AdditiveAttention(3, 4, 5).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    queries, values = (
        torch.randn(2, rows, size, dtype=torch.float64, requires_grad=True)
        for rows, size in ((3, 3), (4, 4))
    )
    real = torch.tensor([[True, True, True, False], [True, True, False, False]])

    def run(queries: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        return layer(queries, layer.keys(values), values, real)

    assert torch.autograd.gradcheck(run, (queries, values))
    assert (run(queries, values)[1].masked_select(~real[:, None]) == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_loss_reaches_every_parameter(kind: str) -> None:
    network = model(kind).train()
    labels = draw(3, 5)
    labels[1, 3:] = -100
    out = network(draw(3, 4, vocab=SOURCE_V), labels=labels)
    shifted = torch.cat([torch.full((3, 1), START), labels[:, :-1]], 1).clamp(min=0)
    again = network(draw(3, 4, vocab=SOURCE_V), decoder_input_ids=shifted).logits
    expected = nn.functional.cross_entropy(again.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(out.loss, expected)
    out.loss.backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_a_small_model_learns_to_reverse() -> None:
    torch.manual_seed(0)
    config = model("bahdanau", embedding_size=16, hidden_size=32, readout_size=16).config
    network = RecurrentSeq2Seq(config)
    optimiser = torch.optim.Adam(network.parameters(), lr=1e-2)
    for step in range(800):
        ids = draw(32, 4, seed=step)
        loss = network(ids, labels=ids.flip(1)).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    ids = draw(64, 4, seed=1000)
    out = generate(network, ids, max_new_tokens=4, eos_token_id=[])
    assert (out.sequences[:, 1:] == ids.flip(1)).float().mean() > 0.95


# ---- padding -------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_padded_row_equals_the_row_alone(kind: str, side: str) -> None:
    network = model(kind)
    longest = max(len(row) for row in SOURCES)
    target = torch.cat([torch.full((4, 1), START), draw(4, 5)], 1)
    ids, mask = draw(4, longest, vocab=SOURCE_V), torch.zeros(4, longest, dtype=torch.int64)
    for i, row in enumerate(SOURCES):
        place = slice(0, len(row)) if side == "right" else slice(longest - len(row), longest)
        ids[i, place], mask[i, place] = torch.tensor(row), 1
    together = network(ids, mask, decoder_input_ids=target, output_attentions=kind == "bahdanau")
    for i, row in enumerate(SOURCES):
        alone = network(torch.tensor([row]), decoder_input_ids=target[i : i + 1])
        torch.testing.assert_close(together.logits[i], alone.logits[0], rtol=0, atol=1e-12)
        read = together.encoder_last_hidden_state[i, mask[i].bool()]
        torch.testing.assert_close(read, alone.encoder_last_hidden_state[0], rtol=0, atol=1e-12)
    if kind == "bahdanau":
        (maps,) = together.cross_attentions
        assert maps.shape == (4, 1, 6, longest)
        assert (maps[:, 0].masked_select(mask[:, None] == 0) == 0).all()
        torch.testing.assert_close(maps.sum(-1), torch.ones(4, 1, 6, dtype=torch.float64))


# ---- generation, scores, vectors -----------------------------------------------------------------


@pytest.mark.parametrize("search", SEARCHES, ids=["greedy", "beam"])
@pytest.mark.parametrize("kind", KINDS)
def test_cached_equals_uncached_equals_alone(kind: str, search: dict) -> None:
    network, options = model(kind), {"max_new_tokens": 12, **search}
    cached = generate(network, SOURCES, **options)
    uncached = generate(network, SOURCES, use_cache=False, **options)
    assert torch.equal(cached.sequences, uncached.sequences)
    torch.testing.assert_close(cached.sequences_scores, uncached.sequences_scores)
    for i, source in enumerate(SOURCES):
        alone = generate(network, [source], **options)
        length = int(alone.lengths[0])
        assert cached.lengths[i] == length
        assert torch.equal(cached.sequences[i, :length], alone.sequences[0])
        torch.testing.assert_close(cached.sequences_scores[i], alone.sequences_scores[0])
    assert len(cached.sequences_scores.unique()) == len(SOURCES)


@pytest.mark.feature("generate", "tilewise-recurrent")
@pytest.mark.parametrize("kind", KINDS)
def test_a_beam_as_wide_as_the_vocabulary_finds_the_best_of_all(kind: str) -> None:
    """Of two tokens at most it then loses none: every one-token hypothesis runs on."""
    network, k = model(kind), TARGET_V
    every = [[END], *([a, b] for a, b in itertools.product(range(k), repeat=2) if a != END)]
    search = {"num_beams": k, "num_return_sequences": k, "max_new_tokens": 2}
    out = generate(network, SOURCES, **search, length_penalty=0.0, early_stopping="never")
    for i, source in enumerate(SOURCES):
        totals = [each.total for each in score(network, every, [source] * len(every))]
        best = sorted(range(len(every)), key=lambda j: -totals[j])[:k]
        rows = slice(i * k, (i + 1) * k)
        pairs = zip(out.sequences[rows].tolist(), out.lengths[rows].tolist(), strict=True)
        assert [row[1:length] for row, length in pairs] == [every[j] for j in best]
        expected = torch.tensor([totals[j] for j in best], dtype=torch.float32)
        torch.testing.assert_close(out.sequences_scores[rows], expected)


@pytest.mark.parametrize("kind", KINDS)
def test_beams_carry_the_state_of_their_own_past(kind: str) -> None:
    """Each hypothesis' log-probabilities are those of its tokens scored afresh."""
    network, k = model(kind), 5
    search = {"num_beams": k, "num_return_sequences": k, "max_new_tokens": 9}
    out = generate(network, SOURCES, **search)
    pairs = zip(out.sequences.tolist(), out.lengths.tolist(), strict=True)
    texts = [row[1:length] for row, length in pairs]
    sources = [source for source in SOURCES for _ in range(k)]
    for found, text, scored in zip(
        out.token_log_probs, texts, score(network, texts, sources), strict=True
    ):
        assert found[: len(text)].tolist() == pytest.approx(scored.log_probs, abs=1e-5)
    assert len({tuple(text) for text in texts}) > k


@pytest.mark.parametrize("kind", KINDS)
def test_scores_do_not_depend_on_the_batch(kind: str) -> None:
    network = model(kind)
    texts = [[4, 5, 2], [3], [8, 8, 8, 8], [6, 2]]
    for batch_tokens in (1, 1000):
        found = score(network, texts, SOURCES, batch_tokens=batch_tokens)
        for text, source, scored in zip(texts, SOURCES, found, strict=True):
            logits = by_hand(network, source, [START, *text[:-1]])
            log_probs = torch.tensor(logits).log_softmax(-1)[torch.arange(len(text)), text]
            assert scored.log_probs == pytest.approx(log_probs.tolist(), abs=1e-6)


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
@pytest.mark.parametrize("kind", ["cho", "bahdanau"])
def test_vectors_are_of_the_encoders_states(kind: str, pooling: str) -> None:
    network = model(kind)
    found = embed(network, SOURCES, pooling=pooling, normalize=False)
    for i, source in enumerate(SOURCES):
        states = network.encoder(torch.tensor([source]))[0]
        one = {"mean": states.mean(0), "cls": states[0], "last": states[-1]}[pooling]
        torch.testing.assert_close(found[i], one.detach())


# ---- folders and bad input -----------------------------------------------------------------------


@pytest.mark.feature("folder", "tilewise-recurrent")
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_survives_its_folder(kind: str, tmp_path: Path) -> None:
    network = model(kind).float()
    tilewise.Model(network).save(tmp_path)
    again = tilewise.load(tmp_path)
    assert again.config == network.config
    for name, tensor in network.state_dict().items():
        assert torch.equal(again.network.state_dict()[name], tensor), name
    options = {"num_beams": 3, "max_new_tokens": 6}
    found, expected = again.generate(SOURCES, **options), generate(network, SOURCES, **options)
    assert torch.equal(found.sequences, expected.sequences)
    assert again.score([[3, 4]], SOURCES[:1])[0].log_probs
    assert again.embed(SOURCES).shape == (4, network.config.source_size)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_the_tokenizer_survive(dtype: torch.dtype, tmp_path: Path) -> None:
    network = model("bahdanau").float()
    tokenizer = train_tokenizer(["abc"])
    tilewise.Model(network, tokenizer).save(tmp_path)
    tilewise.load(tmp_path, dtype=dtype).save(tmp_path / "half")
    again = tilewise.load(tmp_path / "half", dtype=dtype)
    for name, tensor in network.state_dict().items():
        assert torch.equal(again.network.state_dict()[name], tensor.to(dtype)), name
    assert again.generate(["ab"], max_new_tokens=3).texts is not None
    assert again.tokenizer is not None and again.tokenizer.encode(["ab"]) == tokenizer.encode(
        ["ab"]
    )


def test_a_folder_that_does_not_fit(tmp_path: Path) -> None:
    tilewise.Model(model("bahdanau").float()).save(tmp_path)
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace('"hidden_size": 6', '"hidden_size": 7'))
    with pytest.raises(CheckpointError, match=r"weight_hh_l0.*\[21, 7\]"):
        tilewise.load(tmp_path)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"reset": "never"}, "reset is 'never'; it must be one of before, after"),
        ({"bidirectional": 1}, "bidirectional is 1"),
        ({"embedding_size": 2**30, "hidden_size": 2**30}, "no memory holds"),
        ({"decoder_start_token_id": 11}, "decoder_start_token_id is 11"),
        ({"eos_token_id": 2}, "eos_token_id is 2; it must be a tuple"),
        ({"model_type": "gpt2"}, "model_type is 'gpt2'"),
    ],
)
def test_bad_configurations_are_named(changes: dict, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        model("cho", **changes)


def test_bad_input_is_named() -> None:
    network, ids = model("cho"), torch.tensor([[3, 4]])
    with pytest.raises(ArgumentError, match="a model without attention has no maps"):
        network(ids, decoder_input_ids=ids, output_attentions=True)
    with pytest.raises(ArgumentError, match="input_ids has no column"):
        network(ids[:, :0], decoder_input_ids=ids)
    with pytest.raises(ArgumentError, match="holds the id 9; the vocabulary is 0..8"):
        network(ids, decoder_input_ids=torch.tensor([[9]]))
    with pytest.raises(ArgumentError, match=r"attention_mask has shape \[1, 3\]"):
        network(ids, torch.ones(1, 3), decoder_input_ids=ids)
    with pytest.raises(ArgumentError, match="tilewise-recurrent takes none"):
        network(ids, token_type_ids=ids, decoder_input_ids=ids)
