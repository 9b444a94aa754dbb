"""Batches bounded by their tokens, padding included, from texts or ids of any lengths.

Shapes: ids [R, S], padded on the right; lengths [R].
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..config import AnyConfig
from ..errors import ArgumentError
from ..text import Tokenizer


def by_tokens(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Row numbers in batches of at most `budget` tokens (or of one row), longest rows first."""
    if isinstance(budget, bool) or not isinstance(budget, int) or budget < 1:
        raise ArgumentError(f"batch_tokens is {budget!r}; pass a whole number from 1")
    batch: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and (len(batch) + 1) * lengths[batch[0]] > budget:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def padded(
    rows: Sequence[Sequence[int]], device: torch.device, pad: int = 0
) -> tuple[Tensor, Tensor]:
    """(ids [R, longest], lengths [R]) of rows of ids."""
    longest = max(len(row) for row in rows)
    ids = torch.tensor([[*row, *[pad] * (longest - len(row))] for row in rows])
    return ids.to(device), torch.tensor([len(row) for row in rows]).to(device)


def as_ids(
    name: str,
    inputs: Sequence[str] | Sequence[Sequence[int]],
    tokenizer: Tokenizer | None,
    max_length: int | None = None,
) -> list[list[int]]:
    """Texts or lists of ids as lists of ids; ArgumentError naming what is neither.

    max_length: texts are cut to it by the tokenizer, which keeps its special tokens.
    """
    if isinstance(inputs, (str, bytes)) or not isinstance(inputs, Sequence):
        raise ArgumentError(f"{name} is {type(inputs).__name__}; pass a list of texts or of ids")
    if inputs and all(isinstance(each, str) for each in inputs):
        if tokenizer is None:
            raise ArgumentError(
                f"{name} are texts, and the model's folder has no tokenizer files; add them, or in "
                "Python pass token ids"
            )
        return tokenizer.encode(inputs, max_length=max_length)  # type: ignore[arg-type]
    for i, row in enumerate(inputs):
        if isinstance(row, (str, bytes)) or not isinstance(row, Sequence):
            raise ArgumentError(f"{name}[{i}] is {type(row).__name__}; pass all texts or all ids")
    return [list(row) for row in inputs]  # type: ignore[arg-type]


def check_tokens(name: str, rows: Sequence[Sequence[int]], vocab_size: int) -> None:
    """ArgumentError unless all are ids of the vocabulary; a tokenizer's may be of another."""
    for i, row in enumerate(rows):
        for token in row:
            if isinstance(token, bool) or not isinstance(token, int):
                raise ArgumentError(f"{name}[{i}] holds {token!r}; pass whole numbers")
            if not 0 <= token < vocab_size:
                raise ArgumentError(
                    f"{name}[{i}] holds the id {token}; the vocabulary is 0..{vocab_size - 1}"
                )


def check_rows(
    name: str, rows: Sequence[Sequence[int]], config: AnyConfig, vocab_size: int | None = None
) -> None:
    """ArgumentError unless every row has a token, fits the model's positions, and holds ids."""
    check_tokens(name, rows, vocab_size or config.vocab_size)
    for i, row in enumerate(rows):
        if not row:
            raise ArgumentError(f"{name}[{i}] is empty; leave it out")
        if config.position_limit is not None and len(row) > config.position_limit:
            raise ArgumentError(
                f"{name}[{i}] is {len(row)} tokens long; the model has {config.position_limit} "
                "positions: shorten it, or pass truncate=True (--truncate) where it is taken"
            )
