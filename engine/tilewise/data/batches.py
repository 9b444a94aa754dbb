"""Batches of token ids of similar length, so that little of a batch is padding.

Shapes: ids [R, S], padded on the right; mask [R, S], 1 = real token.
"""

from collections.abc import Iterator, Sequence
from itertools import islice
from random import Random
from typing import NamedTuple

import torch
from torch import Tensor


class Seq2SeqBatch(NamedTuple):
    """source [R, N] with its mask, and labels [R, S] with -100 in the padding."""

    source: Tensor
    source_mask: Tensor
    labels: Tensor


def pad(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """Ragged ids as one LongTensor [R, longest], `value` in the empty places."""
    longest = max(len(row) for row in rows)
    return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows])


def seq2seq_batches(
    pairs: Iterator[tuple[Sequence[int], Sequence[int]]],
    batch_size: int,
    pad_token_id: int,
    seed: int,
    pool: int = 16,
) -> Iterator[Seq2SeqBatch]:
    """Batches of `batch_size` (source ids, target ids), of similar source length.

    `pool` batches are drawn at a time, sorted by length and returned in random order; the last,
    smaller pool of a finite iterator comes out too. Deterministic for a seed.
    """
    rng = Random(seed)
    while drawn := list(islice(pairs, batch_size * pool)):
        drawn.sort(key=lambda pair: (len(pair[0]), len(pair[1])))
        starts = list(range(0, len(drawn), batch_size))
        rng.shuffle(starts)
        for start in starts:
            rows = drawn[start : start + batch_size]
            source = pad([row[0] for row in rows], pad_token_id)
            lengths = torch.tensor([len(row[0]) for row in rows])
            mask = (torch.arange(source.shape[1]) < lengths[:, None]).long()
            yield Seq2SeqBatch(source, mask, pad([row[1] for row in rows], -100))
