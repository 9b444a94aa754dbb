"""Few-shot prompts, and choosing among answers by their probability.

Source: Brown et al. 2020, section 2.4.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from ..errors import ArgumentError, GenerationError
from .score import Score

Normalise = Literal["sum", "length", "unconditional"]


def few_shot_prompt(
    query: str,
    examples: Sequence[tuple[str, str]] = (),
    description: str = "",
    *,
    separator: str = "\n\n",
    delimiter: str = "\n",
) -> str:
    """description, k examples (question, answer) and the query, ready to be continued.

    Without examples it is a zero-shot prompt. Parts are joined by `separator`, a question and its
    answer by `delimiter`, with which the prompt ends. Raises ArgumentError for what is no text, and
    examples that are no pairs of texts.
    """
    given = {
        "query": query, "description": description, "separator": separator, "delimiter": delimiter
    }  # fmt: skip
    for name, value in given.items():
        if not isinstance(value, str):
            raise ArgumentError(f"{name} is {value!r}; pass a text")
    if not isinstance(examples, Sequence):
        raise ArgumentError(f"examples is {examples!r}; pass a list of (question, answer) texts")
    for i, example in enumerate(examples):
        is_pair = isinstance(example, (tuple, list)) and len(example) == 2
        if not is_pair or not all(isinstance(part, str) for part in example):
            raise ArgumentError(f"examples[{i}] is {example!r}; pass (question, answer) texts")
    parts = [description] if description else []
    parts += [question + delimiter + answer for question, answer in examples]
    return separator.join([*parts, query]) + delimiter


@dataclass
class Choice:
    """index: of the best answer; values: each answer's normalised log-probability [nats]."""

    index: int
    values: list[float]


def choose(
    score: Callable[[Sequence[str], Sequence[str]], list[Score]],
    prompt: str,
    answers: Sequence[str],
    *,
    normalise: Normalise = "sum",
    neutral: str = "Answer:",
) -> Choice:
    """The likeliest of several answers to one prompt; the first of equals.

    score(texts, contexts) gives Score of each, such as a Model's. normalise: "sum", log P(answer |
    prompt); "length", that per token; "unconditional", minus log P(answer | neutral), which takes
    away how common an answer is by itself. Raises ArgumentError, also for an answer without a token
    to score, and GenerationError where a model gives NaN.
    """
    if normalise not in ("sum", "length", "unconditional"):
        raise ArgumentError(f"normalise is {normalise!r}; pass sum, length or unconditional")
    if isinstance(answers, (str, bytes)) or not isinstance(answers, Sequence):
        raise ArgumentError(f"answers is {type(answers).__name__}; pass a list of texts")
    if not answers:
        raise ArgumentError("answers is empty; pass the texts to choose from")
    scores = _scores(score, answers, prompt)
    if normalise == "length":
        values = [each.mean for each in scores]
    elif normalise == "unconditional":
        alone = _scores(score, answers, neutral)
        values = [a.total - b.total for a, b in zip(scores, alone, strict=True)]
    else:
        values = [each.total for each in scores]
    return Choice(values.index(max(values)), values)


def _scores(
    score: Callable[[Sequence[str], Sequence[str]], list[Score]],
    answers: Sequence[str],
    prompt: str,
) -> list[Score]:
    """Each answer's Score behind the prompt; nothing would be the likeliest of all."""
    scores = score(list(answers), [prompt] * len(answers))
    for i, each in enumerate(scores):
        if not each.log_probs:
            raise ArgumentError(
                f"answers[{i}], {answers[i]!r}, has no token to score behind {prompt!r}; leave it "
                "out, or pass a prompt that is not empty"
            )
        if math.isnan(each.total):
            raise GenerationError(f"the score of answers[{i}] is NaN: look at the model's weights")
    return scores
