"""GPT-3, the original Transformer's variants and the recurrent model, which transformers lacks.

Gradients against finite differences, bfloat16 against the ops' references, score and embed against
forward passes of single rows, generation against scores. Their logits are compared in files of
their own.
"""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tilewise
from tilewise.config import RecurrentConfig
from tilewise.errors import ArgumentError
from tilewise.families.gpt3 import gpt3
from tilewise.families.transformer import VARIANTS, variant
from tilewise.scoring import Score
from tilewise_kernels import force

Record = Callable[[str, object], None]
V = 29
SIZES: dict[str, Any] = {"vocab_size": V, "hidden_size": 12, "num_heads": 3, "ffn_size": 20}
RECURRENT = {"vocab_size": V, "embedding_size": 5, "hidden_size": 6, "readout_size": 4}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": (2,), "decoder_start_token_id": 1}
CONFIGS = {
    "gpt3": gpt3(
        "125M", **SIZES, decoder_layers=4, max_positions=24, windows=(None, 2) * 2,
        bos_token_id=1, eos_token_id=(2,),
    ),
    **{
        name: variant(name, **(IDS | VARIANTS[name] | SIZES), encoder_layers=2, decoder_layers=2,
                      max_positions=24)
        for name in VARIANTS
    },
    "cho": RecurrentConfig(**RECURRENT, **IDS, bidirectional=False, attention=False),
    "bahdanau": RecurrentConfig(**RECURRENT, **IDS, bidirectional=True, attention=True),
}  # fmt: skip
CASES = [pytest.param(config.to_dict(), id=name) for name, config in CONFIGS.items()]
TEXTS = [[5, 9, 4, 16, 7, 7, 12], [8, 3], [21, 28, 5, 6]]
SOURCES = [[11, 4], [6, 6, 23, 9, 10], [5]]


def made(raw: dict[str, Any], folder: Path) -> tilewise.Model:
    """A model of a folder, every parameter random."""
    (config,) = [config for config in CONFIGS.values() if config.to_dict() == raw]
    network = tilewise.build(config)
    generator = torch.Generator().manual_seed(6)
    for name, parameter in network.named_parameters():
        mean = float("norm" in name and name.endswith("weight"))
        nn.init.normal_(parameter, mean, 0.4, generator=generator)
    tilewise.Model(network).save(folder)
    return tilewise.load(folder)


def logits(model: tilewise.Model, i: int) -> torch.Tensor:
    """What text i is predicted by, alone in its batch: [S - 1, V], or of a target [S, V]."""
    text = torch.tensor(TEXTS[i : i + 1])
    if not model.config.is_seq2seq:
        return model(text).logits[0, :-1]
    start = torch.tensor([[model.config.decoder_start_token_id]])
    target = torch.cat([start, text[:, :-1]], 1)
    return model(torch.tensor(SOURCES[i : i + 1]), decoder_input_ids=target).logits[0]


@pytest.mark.feature("gradients")
@pytest.mark.parametrize("raw", CASES)
def test_gradients(raw: dict[str, Any], tmp_path: Path, record_property: Record) -> None:
    """In float64, along one random direction per parameter, by central differences."""
    model, step = made(raw, tmp_path).double(), 1e-6

    def loss() -> torch.Tensor:
        return logits(model, 0).log_softmax(-1).square().sum()

    loss().backward()
    generator = torch.Generator().manual_seed(1)
    found, expected = [], []
    for parameter in model.parameters():
        assert parameter.grad is not None
        towards = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        found.append(float((parameter.grad * towards).sum()))
        with torch.no_grad():
            here = parameter.clone()
            ends = [loss_at(parameter, here + by * towards, loss) for by in (step, -step)]
            parameter.copy_(here)
        expected.append((ends[0] - ends[1]) / (2 * step))
    largest = max(abs(value) for value in expected)
    off = max(abs(a - b) for a, b in zip(found, expected, strict=True)) / largest
    assert off <= 1e-7
    record_property("off", off)


def loss_at(
    parameter: nn.Parameter, value: torch.Tensor, loss: Callable[[], torch.Tensor]
) -> float:
    parameter.copy_(value)
    return float(loss())


@pytest.mark.feature("bfloat16")
@pytest.mark.parametrize("raw", CASES)
def test_bfloat16_is_no_further_off(
    raw: dict[str, Any], tmp_path: Path, record_property: Record
) -> None:
    """From float64, at most twice as far as the same network on the ops' references."""
    model = made(raw, tmp_path)
    with torch.no_grad():
        exact = logits(model.double(), 0)
        half = model.bfloat16()
        found = torch.linalg.vector_norm(logits(half, 0).double() - exact)
        with force("reference"):
            eager = torch.linalg.vector_norm(logits(half, 0).double() - exact)
    assert 0 < found <= 2 * eager
    record_property("off", float(found / eager))


@pytest.mark.feature("generate")
@pytest.mark.parametrize("raw", CASES)
def test_generation(raw: dict[str, Any], tmp_path: Path) -> None:
    """Greedy: each token the likeliest. A beam as wide as the vocabulary: the best pairs of all."""
    model, end = made(raw, tmp_path), raw["eos_token_id"][0]
    every = [[end], *([a, b] for a, b in itertools.product(range(V), repeat=2) if a != end)]
    width: dict[str, Any] = {"num_beams": V, "length_penalty": 0.0, "early_stopping": "never"}
    for source in SOURCES[:2]:
        first = 1 if model.config.is_seq2seq else len(source)
        row = model.generate([source], max_new_tokens=6, eos_token_id=[]).sequences[0].tolist()
        for t in range(first, first + 6):
            totals = [each.total for each in after(model, source, row[first:t])]
            assert row[t] == totals.index(max(totals))
        found = model.generate([source], max_new_tokens=2, num_return_sequences=3, **width)
        totals = [each.total for each in model.score(every, [source] * len(every))]
        best = sorted(range(len(every)), key=lambda i: -totals[i])[:3]
        for ids, n, i in zip(found.sequences.tolist(), found.lengths.tolist(), best, strict=True):
            assert ids[first:n] == every[i]
        expected = pytest.approx([totals[i] for i in best], abs=1e-4)
        assert found.sequences_scores.tolist() == expected


def after(model: tilewise.Model, source: list[int], begun: list[int]) -> list[Score]:
    """Of what was begun, with each token of the vocabulary as the next."""
    return model.score([[*begun, token] for token in range(V)], [source] * V)


@pytest.mark.feature("score")
@pytest.mark.parametrize("raw", CASES)
def test_score(raw: dict[str, Any], tmp_path: Path) -> None:
    model = made(raw, tmp_path)
    scores = model.score(TEXTS, SOURCES if model.config.is_seq2seq else None)
    for i, found in enumerate(scores):
        with torch.no_grad():
            rows = logits(model, i).log_softmax(-1)
        expected = rows[range(len(rows)), TEXTS[i][-len(rows) :]]
        assert found.log_probs == pytest.approx(expected.tolist(), abs=1e-5)


def states(model: tilewise.Model) -> Iterator[torch.Tensor]:
    """The last hidden states [S, E] of each text alone; an encoder-decoder's encoder's."""
    for text in TEXTS:
        out = model(
            torch.tensor([text]),
            **{"decoder_input_ids": torch.tensor([[1]])} if model.config.is_seq2seq else {},
        )
        whole = out.encoder_last_hidden_state if model.config.is_seq2seq else out.last_hidden_state
        yield whole[0]


@pytest.mark.feature("embed")
@pytest.mark.parametrize("raw", CASES)
def test_embed(raw: dict[str, Any], tmp_path: Path) -> None:
    model = made(raw, tmp_path)
    with torch.no_grad():
        expected = torch.stack([each.mean(0) for each in states(model)])
    found = model.embed(TEXTS, normalize=False)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("raw", CASES)
def test_masks_are_refused(raw: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="no masked-token head"):
        made(raw, tmp_path).fill_mask(TEXTS, mask_token_id=5)
