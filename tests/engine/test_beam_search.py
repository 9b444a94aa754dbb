"""Beam search against an oracle: the rules of transformers' beam search in plain Python floats.

Both run over the same language models: tables of random log-probabilities of the next token, given
the position and the last one or two tokens (without the position, sequences that take the same
steps in another order would tie). The oracle keeps hypotheses as tuples and knows no tensors.
"""

import itertools
import math
import random

import pytest
import torch
from torch import Tensor

from tilewise.errors import GenerationError
from tilewise.generation.options import GenerationOptions
from tilewise.generation.search import Hypotheses, beam_search, greedy_search

NONE = -1e9  # a place without a hypothesis; scores below GHOST are of no real hypothesis
GHOST = -1e8
Tokens = tuple[int, ...]


class TableModel:
    """log P(next | position, last `order` tokens), float64: a table [positions, V, .., V]."""

    positions = 18

    def __init__(self, vocab: int, order: int, seed: int) -> None:
        self.order = order
        generator = torch.Generator().manual_seed(seed)
        shape = [self.positions] + [vocab] * (order + 1)
        logits = 1.5 * torch.randn(shape, generator=generator, dtype=torch.float64)
        self.table = torch.log_softmax(logits, -1).tolist()

    def __call__(self, tokens: Tokens) -> list[float]:
        row = self.table[len(tokens)]
        for token in (0,) * (self.order - len(tokens)) + tokens[-self.order :]:
            row = row[token]
        return row


class TableSteps:
    """What the search asks of a model, with the whole past of each row in plain lists."""

    def __init__(self, model: TableModel, prompts: list[list[int]], beams: int) -> None:
        self.model, self.beams = model, beams
        self.past = [tuple(prompt) for prompt in prompts]
        self.calls: list[int] = []

    def _logits(self) -> Tensor:
        self.calls.append(len(self.past))
        return torch.tensor([self.model(past) for past in self.past]) + 3.0  # any constant

    def prompt(self) -> Tensor:
        logits = self._logits()
        self.past = [past for past in self.past for _ in range(self.beams)]
        return logits

    def step(self, tokens: Tensor, parents: Tensor) -> Tensor:
        pairs = zip(parents.tolist(), tokens.tolist(), strict=True)
        self.past = [self.past[parent] + (token,) for parent, token in pairs]
        return self._logits()

    def keep(self, sentences: Tensor) -> None:
        self.past = [
            self.past[sentence * self.beams + beam]
            for sentence in sentences.tolist()
            for beam in range(self.beams)
        ]


def oracle(model: TableModel, prompt: Tokens, o: GenerationOptions) -> list[tuple[float, Tokens]]:
    """The k hypotheses of one sentence, best first: (normalised score, generated tokens)."""
    k, limit = o.num_beams, o.max_new_tokens or 1
    running: list[tuple[float, Tokens]] = [(0.0, ())] + [(NONE, ())] * (k - 1)
    stored: list[tuple[float, Tokens, bool]] = [(NONE, (), False)] * k
    improvable = True
    for n in range(1, limit + 1):
        candidates = []
        for score, tokens in running:
            for token, log_prob in enumerate(model(prompt + tokens)):
                banned = n <= o.min_new_tokens and token in o.eos_token_id
                total = -math.inf if banned else score + log_prob
                candidates.append((total, tokens + (token,)))
        candidates.sort(key=lambda c: -c[0])
        candidates = candidates[: max(2, 1 + len(o.eos_token_id)) * k]
        stops = [c[1][-1] in o.eos_token_id or n == limit for c in candidates]
        going = [(c[0] + NONE * stop, c[1]) for c, stop in zip(candidates, stops, strict=True)]
        running = sorted(going, key=lambda c: -c[0])[:k]
        frozen = not improvable or (o.early_stopping is True and all(s[2] for s in stored))
        if not frozen:
            for rank in range(min(k, len(candidates))):
                if stops[rank]:
                    total, tokens = candidates[rank]
                    stored.append((total / n**o.length_penalty, tokens, True))
            stored = sorted(stored, key=lambda s: -s[0])[:k]
        worst = min(s[0] if s[2] else NONE for s in stored)
        far = o.early_stopping == "never" and o.length_penalty > 0
        length = limit if far else n
        improvable = improvable and running[0][0] / length**o.length_penalty > worst
        full = o.early_stopping is True and all(s[2] for s in stored)
        if not improvable or full or all(stops):
            break
    return [(score, tokens) for score, tokens, _ in stored]


def search(model: TableModel, prompts: list[list[int]], o: GenerationOptions) -> Hypotheses:
    return beam_search(TableSteps(model, prompts, o.num_beams), prompts, o)  # type: ignore[arg-type]


def assert_same(found: Hypotheses, row: int, expected: list[tuple[float, Tokens]], o) -> bool:
    """Equal tokens and scores; returns whether the best ended by an end token."""
    for beam, (score, tokens) in enumerate(expected):
        got = found.scores[row, beam].item()
        if score < GHOST or got < GHOST:
            assert score < GHOST and got < GHOST, (score, got)
            continue
        length = int(found.lengths[row, beam])
        assert tuple(found.tokens[row, beam, :length].tolist()) == tokens, (row, beam)
        assert got == pytest.approx(score, rel=1e-5, abs=1e-5)
        total = found.log_probs[row, beam].sum().item()
        assert total / length**o.length_penalty == pytest.approx(score, rel=1e-4, abs=1e-4)
        assert not found.log_probs[row, beam, length:].any()
    return expected[0][1][-1:] != () and expected[0][1][-1] in o.eos_token_id


# early stopping and length penalty in every combination, each with 60 random cases
SETTINGS = list(itertools.product([True, False, "never"], [0.0, 0.6, 1.0, 2.0, -0.5]))


@pytest.mark.parametrize(("early_stopping", "length_penalty"), SETTINGS)
def test_equals_the_oracle(early_stopping, length_penalty: float) -> None:
    ended = 0
    for case in range(60):
        rng = random.Random(f"{early_stopping} {length_penalty} {case}")
        vocab = rng.choice([3, 3, 4, 7, 12])
        model = TableModel(vocab, rng.choice([1, 2]), rng.randrange(10**6))
        limit = rng.randint(1, 9)
        o = GenerationOptions(
            num_beams=rng.randint(2, min(vocab, 6)),
            max_new_tokens=limit,
            min_new_tokens=rng.choice([0, 0, 0, 1, min(3, limit)]),
            length_penalty=length_penalty,
            early_stopping=early_stopping,
            eos_token_id=tuple(rng.sample(range(vocab), rng.choice([0, 1, 1, 2, 3]))),
        )
        if o.min_new_tokens and len(o.eos_token_id) == vocab:
            continue  # nothing could be generated: has a test of its own
        prompts = [
            [rng.randrange(vocab) for _ in range(rng.randint(1, 4))]
            for _ in range(rng.randint(1, 5))
        ]
        found = search(model, prompts, o)
        for row, prompt in enumerate(prompts):
            ended += assert_same(found, row, oracle(model, tuple(prompt), o), o)
    assert ended > 10  # the rules under test are about ending


@pytest.mark.parametrize("eos", [(), (0,), (1, 2)])
@pytest.mark.parametrize("seed", range(4))
def test_wide_beams_that_never_stop_early_are_exhaustive(seed: int, eos: tuple[int, ...]) -> None:
    """V = 4, N = 4, as many beams as there are sequences: the true best ones, in order."""
    vocab, limit, k = 4, 4, 256
    model = TableModel(vocab, 2, seed)
    o = GenerationOptions(
        num_beams=k,
        max_new_tokens=limit,
        length_penalty=0.0,
        early_stopping="never",
        eos_token_id=eos,
    )
    every: list[tuple[float, Tokens]] = []

    def grow(total: float, tokens: Tokens) -> None:
        for token, log_prob in enumerate(model((3,) + tokens)):
            longer = tokens + (token,)
            if token in eos or len(longer) == limit:
                every.append((total + log_prob, longer))
            else:
                grow(total + log_prob, longer)

    grow(0.0, ())
    every.sort(key=lambda h: -h[0])
    assert abs(sum(math.exp(score) for score, _ in every) - 1) < 1e-9
    found = search(model, [[3]], o)
    assert int((found.scores[0] > GHOST).sum()) == len(every)
    assert_same(found, 0, every, o)


def test_better_late_hypothesis_displaces_an_early_one() -> None:
    """Two early ends fill both places; with early_stopping False a longer, better one gets in."""
    model = TableModel(4, 1, 0)
    rows = torch.tensor(
        [
            [0.01, 0.30, 0.35, 0.34],
            [0.90, 0.04, 0.03, 0.03],
            [0.02, 0.03, 0.05, 0.90],
            [0.97, 0.01, 0.01, 0.01],
        ],
        dtype=torch.float64,
    )
    model.table = [rows.log().tolist()] * model.positions
    for early_stopping in (True, False, "never"):
        o = GenerationOptions(
            num_beams=2, max_new_tokens=6, early_stopping=early_stopping, eos_token_id=(0,)
        )
        found = search(model, [[0]], o)
        assert_same(found, 0, oracle(model, (0,), o), o)
        best = found.tokens[0, 0, : int(found.lengths[0, 0])].tolist()
        assert best == [2, 3, 0]


def test_finished_sentences_leave_and_never_come_back() -> None:
    model = TableModel(9, 2, 3)
    o = GenerationOptions(num_beams=3, max_new_tokens=12, early_stopping=True, eos_token_id=(1, 4))
    prompts = [[i % 9, (i * 5) % 9] for i in range(12)]
    steps = TableSteps(model, prompts, 3)
    together = beam_search(steps, prompts, o)  # type: ignore[arg-type]
    assert steps.calls[0] == 12  # one row a sentence, not one a beam
    assert all(a >= b for a, b in itertools.pairwise(steps.calls[1:]))
    assert len(set(steps.calls[1:])) > 2 and all(n % 3 == 0 for n in steps.calls[1:])
    for row, prompt in enumerate(prompts):
        alone = search(model, [prompt], o)
        for mine, theirs in zip(vars(together).values(), vars(alone).values(), strict=True):
            assert torch.equal(mine[row], theirs[0])


def test_every_token_an_end_token() -> None:
    model = TableModel(3, 1, 1)
    o = GenerationOptions(num_beams=3, max_new_tokens=5, eos_token_id=(0, 1, 2))
    found = search(model, [[2]], o)
    expected = sorted(((p, (t,)) for t, p in enumerate(model((2,)))), reverse=True)
    assert_same(found, 0, expected, o)


def test_nothing_left_to_generate_is_an_error() -> None:
    model = TableModel(3, 1, 1)
    for k in (1, 2):
        o = GenerationOptions(
            num_beams=k, max_new_tokens=5, min_new_tokens=2, eos_token_id=(0, 1, 2)
        )
        run = greedy_search if k == 1 else beam_search
        with pytest.raises(GenerationError, match=r"step 0 for rows \[0, 1\]"):
            run(TableSteps(model, [[2], [1]], k), [[2], [1]], o)  # type: ignore[arg-type]


def test_running_dry_keeps_what_had_finished() -> None:
    """no_repeat_ngram_size 1 uses up the vocabulary; hypotheses that ended before are returned."""
    model = TableModel(4, 1, 5)
    o = GenerationOptions(
        num_beams=2, max_new_tokens=9, no_repeat_ngram_size=1, eos_token_id=(3,), length_penalty=0.0
    )
    found = search(model, [[0]], o)
    assert found.lengths[0].max() <= 3 and found.scores[0].isfinite().all()
    for beam in range(2):
        tokens = found.tokens[0, beam, : int(found.lengths[0, beam])].tolist()
        assert len(set(tokens)) == len(tokens) and 0 not in tokens and tokens[-1] == 3


def test_greedy_takes_the_likeliest_token() -> None:
    for seed in range(20):
        model = TableModel(7, 2, seed)
        o = GenerationOptions(max_new_tokens=8, eos_token_id=(seed % 7,), length_penalty=0.7)
        prompts = [[1], [2, 3], [6, 0, 4]]
        found = greedy_search(TableSteps(model, prompts, 1), prompts, o)  # type: ignore[arg-type]
        for row, prompt in enumerate(prompts):
            tokens: Tokens = ()
            total = 0.0
            while len(tokens) < 8 and tokens[-1:] != (seed % 7,):
                log_probs = model(tuple(prompt) + tokens)
                total += max(log_probs)
                tokens += (log_probs.index(max(log_probs)),)
            assert tuple(found.tokens[row, 0, : len(tokens)].tolist()) == tokens
            assert int(found.lengths[row, 0]) == len(tokens)
            score = found.scores[row, 0].item()
            assert score == pytest.approx(total / len(tokens) ** 0.7, rel=1e-5)
