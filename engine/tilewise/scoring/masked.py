"""What masked language models answer: the tokens behind masks, and whether a text follows another.

Shapes: ids [R, S]; logits [R, S, V].
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..errors import ArgumentError
from ..models import Encoder, evaluating
from ..models.heads import MaskedHead
from .batches import by_tokens, check_rows, padded


@dataclass
class Filling:
    """One candidate for one mask: its token id, and log P [nats] given everything but the masks."""

    token: int
    log_prob: float


def masked_model(model: nn.Module) -> tuple[Encoder, MaskedHead]:
    """The model with its masked-token head. Raises ArgumentError for one without."""
    if not isinstance(model, Encoder) or model.masked_head is None:
        raise ArgumentError("the model has no masked-token head; load a masked language model")
    return model, model.masked_head


@torch.no_grad()
def fill_mask(
    model: nn.Module,
    rows: Sequence[Sequence[int]],
    mask_token_id: int,
    *,
    top_k: int = 5,
    batch_tokens: int = 4096,
) -> list[list[list[Filling]]]:
    """For each row of ids, for each mask in it, the top_k likeliest tokens, best first.

    Masks of one row are filled independently of each other. Raises ArgumentError for a model
    without a masked-token head, a row without a mask, and a top_k past the vocabulary.
    """
    model, head = masked_model(model)
    vocab = model.config.vocab_size
    if isinstance(top_k, bool) or not isinstance(top_k, int) or not 1 <= top_k <= vocab:
        raise ArgumentError(f"top_k is {top_k!r}; pass a whole number from 1 to {vocab}")
    check_rows("rows", rows, model.config)
    for i, row in enumerate(rows):
        if mask_token_id not in row:
            raise ArgumentError(f"rows[{i}] holds no mask, token {mask_token_id}; put one in")
    device = model.embedding.tokens.weight.device
    found: list[list[list[Filling]]] = [[] for _ in rows]
    pad = model.config.pad_token_id or 0
    with evaluating(model):
        for batch in by_tokens([len(row) for row in rows], batch_tokens):
            ids, lengths = padded([rows[i] for i in batch], device, pad)
            real = torch.arange(ids.shape[1], device=device) < lengths[:, None]
            hidden, _, _ = model.encode(ids, real.long())
            at, column = ((ids == mask_token_id) & real).nonzero().unbind(1)
            log_probs = torch.log_softmax(head(hidden[at, column]).float(), -1)
            values, tokens = (best.tolist() for best in log_probs.topk(top_k))
            for row, *best in zip(at.tolist(), tokens, values, strict=True):
                pairs = zip(*best, strict=True)
                found[batch[row]].append([Filling(token, value) for token, value in pairs])
    return found


def following_model(model: nn.Module) -> tuple[Encoder, nn.Module, nn.Module]:
    """The model with its pooler and next-sentence head. Raises ArgumentError for one without."""
    if not isinstance(model, Encoder) or model.pooler is None or model.next_sentence is None:
        raise ArgumentError("the model has no next-sentence head; load a BertForPreTraining folder")
    return model, model.pooler, model.next_sentence


@torch.no_grad()
def next_sentence(
    model: nn.Module,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    batch_tokens: int = 4096,
) -> list[float]:
    """P that the second text of each pair follows the first; pairs of (ids, token_type_ids).

    batch_tokens: what runs together, padding included. Raises ArgumentError for a model without a
    next-sentence head. Source: Devlin et al. 2019.
    """
    model, pooler, head = following_model(model)
    if not all(isinstance(pair, (tuple, list)) and len(pair) == 2 for pair in pairs):
        raise ArgumentError("pairs holds more or less than (ids, token_type_ids) each; pass both")
    rows, types = [ids for ids, _ in pairs], [types for _, types in pairs]
    check_rows("pairs", rows, model.config)
    for i, (row, own) in enumerate(zip(rows, types, strict=True)):
        if len(row) != len(own):
            raise ArgumentError(f"pairs[{i}] has {len(row)} ids and {len(own)} token_type_ids")
    device = model.embedding.tokens.weight.device
    found = [0.0] * len(rows)
    pad = model.config.pad_token_id or 0
    with evaluating(model):
        for batch in by_tokens([len(row) for row in rows], batch_tokens):
            ids, lengths = padded([rows[i] for i in batch], device, pad)
            kinds, _ = padded([types[i] for i in batch], device)
            real = torch.arange(ids.shape[1], device=device) < lengths[:, None]
            hidden, _, _ = model.encode(ids, real.long(), kinds)
            logits = head(pooler(hidden[:, 0]).tanh())
            values = torch.softmax(logits.float(), -1)[:, 0].tolist()
            for i, value in zip(batch, values, strict=True):
                found[i] = value
    return found
