"""The rules that generation lays on scores: by hand, and within greedy and beam search."""

import random

import pytest
import torch

from tilewise.generation import GenerationOptions, GenerationOutput, generate
from tilewise.generation.processors import process

V, INF = 29, float("inf")
START, EOS = 1, (15, 19)
KINDS = ["decoder", "seq2seq"]


def prompts(count: int, seed: int = 0, longest: int = 9) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(V) for _ in range(rng.randint(1, longest))] for _ in range(count)]


def rows_of(out: GenerationOutput) -> list[list[int]]:
    return [row[:n] for row, n in zip(out.sequences.tolist(), out.lengths.tolist(), strict=True)]


def rules(scores: list, history: list, step: int = 0, **options: object) -> list[list[float]]:
    o = GenerationOptions(**options)
    before = torch.tensor(scores)
    after = process(before.clone(), torch.tensor(history), step, o)
    return after.tolist()


def test_rules_by_hand() -> None:
    row = [-1.0, 2.0, -3.0, 0.0]
    assert rules([row], [[1, 3]]) == [row]
    # tokens seen, once or twice: negative times 2, positive over 2
    assert rules([row], [[0, 1, 1]], repetition_penalty=2.0) == [[-2.0, 1.0, -3.0, 0.0]]
    assert rules([row] * 2, [[-1, 2], [2, 0]], repetition_penalty=0.5) == [
        [-1.0, 2.0, -1.5, 0.0],
        [-0.5, 2.0, -1.5, 0.0],
    ]
    # 1 3 1 -> 3 would repeat the pair; the padding on the left is no token
    assert rules([row], [[1, 3, 1]], no_repeat_ngram_size=2) == [[-1.0, 2.0, -3.0, -INF]]
    assert rules([row], [[-1, -1, -1]], no_repeat_ngram_size=2) == [row]
    assert rules([row], [[0, 2]], no_repeat_ngram_size=1) == [[-INF, 2.0, -INF, 0.0]]
    assert rules([row], [[0, 1, 2, 0, 1]], no_repeat_ngram_size=3) == [[-1.0, 2.0, -INF, 0.0]]
    assert rules([row], [[0, 1]], no_repeat_ngram_size=3) == [row]
    # end tokens only once two tokens are there
    ends = {"min_new_tokens": 2, "eos_token_id": (1, 3)}
    assert rules([row], [[0, 0]], 1, **ends) == [[-1.0, -INF, -3.0, -INF]]
    assert rules([row], [[0, 0, 0]], 2, **ends) == [row]
    # the forced first token follows the start token alone, the forced last one is the limit's
    forced = [[-INF, -INF, 0.0, -INF]]
    assert rules([row], [[0]], forced_bos_token_id=2) == forced
    assert rules([row, row], [[-1, 0], [0, 0]], forced_bos_token_id=2) == [*forced, row]
    assert rules([row], [[0, 2]], 1, forced_bos_token_id=2) == [row]
    assert rules([row], [[0]], 4, forced_eos_token_id=2, max_new_tokens=5) == forced
    assert rules([row], [[0]], 3, forced_eos_token_id=2, max_new_tokens=5) == [row]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.7},
        {"no_repeat_ngram_size": 2},
        {"min_new_tokens": 5},
        {"forced_bos_token_id": 11, "forced_eos_token_id": 12},
        {"repetition_penalty": 0.8, "no_repeat_ngram_size": 3, "min_new_tokens": 3},
    ],
)
def test_rules_in_greedy_search(models, kind: str, options: dict) -> None:
    """Against a loop that runs the whole sequence each time and applies the rules itself."""
    network, inputs = models[kind], prompts(6, seed=11)
    o = GenerationOptions(**options)
    out = generate(network, inputs, max_new_tokens=8, **options)
    for i, source in enumerate(inputs):
        tokens = [START] if kind == "seq2seq" else list(source)
        began = len(tokens)
        while len(tokens) < began + 8 and (len(tokens) == began or tokens[-1] not in EOS):
            ids = torch.tensor([tokens])
            with torch.no_grad():
                if kind == "seq2seq":
                    logits = network(torch.tensor([source]), decoder_input_ids=ids).logits
                else:
                    logits = network(ids).logits
            scores, step = logits[0, -1].tolist(), len(tokens) - began
            for t in set(tokens):
                factor = o.repetition_penalty
                scores[t] = scores[t] * factor if scores[t] < 0 else scores[t] / factor
            n = o.no_repeat_ngram_size
            for at in range(len(tokens) - n + 1 if n else 0):
                if tokens[at : at + n - 1] == tokens[len(tokens) - n + 1 :]:
                    scores[tokens[at + n - 1]] = -INF
            if step < o.min_new_tokens:
                for end in EOS:
                    scores[end] = -INF
            if len(tokens) == 1 and o.forced_bos_token_id is not None:
                tokens.append(o.forced_bos_token_id)
            elif step == 7 and o.forced_eos_token_id is not None:
                tokens.append(o.forced_eos_token_id)
            else:
                tokens.append(max(range(V), key=lambda t: scores[t]))
        assert rows_of(out)[i] == tokens


def test_rules_in_beam_search(models) -> None:
    inputs = prompts(6, seed=12)
    more = {"num_beams": 4, "num_return_sequences": 4, "max_new_tokens": 9}
    out = generate(
        models["seq2seq"],
        inputs,
        no_repeat_ngram_size=2,
        min_new_tokens=4,
        forced_bos_token_id=11,
        forced_eos_token_id=3,
        eos_token_id=[3],
        **more,
    )
    for row in rows_of(out):
        pairs = list(zip(row[:-1], row[1:], strict=True))
        assert len(set(pairs[:-1])) == len(pairs[:-1])
        assert row[1] == 11 and row[-1] == 3 and 3 not in row[1:5] and len(row) <= 10
    assert (out.sequences_scores > -1e8).all()
