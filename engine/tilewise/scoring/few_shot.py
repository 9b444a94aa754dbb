"""Few-shot prompts, and choosing among answers by their probability.

Source: Brown et al. 2020, section 2.4.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from ..errors import ArgumentError
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
    answer by `delimiter`, with which the prompt ends. Raises ArgumentError for examples that are no
    pairs of texts.
    """
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
    away how common an answer is by itself. Raises ArgumentError.
    """
    if normalise not in ("sum", "length", "unconditional"):
        raise ArgumentError(f"normalise is {normalise!r}; pass sum, length or unconditional")
    if not answers:
        raise ArgumentError("answers is empty; pass the texts to choose from")
    scores = score(list(answers), [prompt] * len(answers))
    if normalise == "length":
        values = [each.mean for each in scores]
    elif normalise == "unconditional":
        alone = score(list(answers), [neutral] * len(answers))
        values = [a.total - b.total for a, b in zip(scores, alone, strict=True)]
    else:
        values = [each.total for each in scores]
    return Choice(values.index(max(values)), values)
