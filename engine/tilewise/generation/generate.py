"""From prompts of any form to generated sequences.

Shapes: B prompts, n sequences returned for each; sequences [B * n, L].
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..config import AnyConfig
from ..errors import ArgumentError
from ..models import AnySeq2Seq, Decoder, RecurrentSeq2Seq, Seq2Seq, evaluating
from ..models.inputs import check_ids, check_mask, check_output
from ..text import Tokenizer
from .cache import (
    CachedSteps,
    RecurrentSteps,
    Steps,
    UncachedRecurrentSteps,
    UncachedSteps,
    pad_right,
)
from .options import GenerationOptions, resolve
from .search import beam_search, greedy_search
from .stopping import Stops, stop_at

Prompts = Tensor | Sequence[Sequence[int]]


@dataclass
class GenerationOutput:
    """What generate returns; row i * n + j is the j-th best sequence of prompt i.

    sequences [B * n, L]: token ids, the decoder prompt included, padded on the right.
    lengths [B * n]: how many of them are real. sequences_scores [B * n]: the summed log-probability
    [nats] over (generated tokens) ** length_penalty. token_log_probs [B * n, new tokens]: one per
    generated token, 0 in the padding. texts: the generated text, when prompts were strings.
    """

    sequences: Tensor
    lengths: Tensor
    sequences_scores: Tensor
    token_log_probs: Tensor
    texts: list[str] | None = None


@torch.no_grad()
def generate(
    model: nn.Module,
    input_ids: Prompts,
    *,
    attention_mask: Tensor | None = None,
    defaults: Mapping[str, Any] | None = None,
    tokenizer: Tokenizer | None = None,
    **options: Any,
) -> GenerationOutput:
    """Generate from token ids with greedy (num_beams = 1) or beam search.

    input_ids: LongTensor [B, S] (attention_mask [B, S] marks real tokens; padding on either side)
    or a list of id lists of any lengths; they are prompts of a Decoder, sources of others.
    options: see GenerationOptions; `defaults` gives way to them. tokenizer: of the model, for
    stop_strings. Each prompt runs once, cross keys are kept once per sentence, finished sentences
    leave the batch. The model is put in eval mode meanwhile. Raises ArgumentError for bad input
    before any work, GenerationError for NaN.
    """
    if not isinstance(model, Decoder | AnySeq2Seq):
        raise ArgumentError(f"{type(model).__name__} does not generate; it takes a decoder")
    config: AnyConfig = model.config
    check_output(config)
    rows = _ragged("input_ids", input_ids, attention_mask, config)
    longest = max((len(row) for row in rows), default=1)
    seq2seq = isinstance(model, AnySeq2Seq)
    chosen = resolve(options, defaults or {}, config, 1 if seq2seq else max(longest, 1))
    stops = stop_at(chosen.stop_strings, tokenizer)
    prompts = _decoder_prompts(rows, chosen, seq2seq)
    if not rows:
        ids = torch.zeros(0, 0, dtype=torch.int64)
        return GenerationOutput(ids, ids.sum(1), torch.zeros(0), torch.zeros(0, 0))
    with evaluating(model):
        return _search(model, rows, prompts, chosen, stops)


def _search(
    model: Decoder | AnySeq2Seq,
    rows: list[list[int]],
    prompts: list[list[int]],
    options: GenerationOptions,
    stops: Stops | None,
) -> GenerationOutput:
    steps = _steps(model, rows, prompts, options)
    search = greedy_search if options.num_beams == 1 else beam_search
    found = search(steps, prompts, options, stops)

    count = options.num_return_sequences
    new_lengths = found.lengths[:, :count].flatten()
    used = int(new_lengths.max())
    prompt_rows = [prompt for prompt in prompts for _ in range(count)]
    padding = options.pad_token_id
    if padding is None:
        padding = options.eos_token_id[0] if options.eos_token_id else 0
    width = max(len(p) + int(n) for p, n in zip(prompt_rows, new_lengths, strict=True))
    sequences = torch.full((len(prompt_rows), width), padding, dtype=torch.int64)
    tokens = found.tokens[:, :count].flatten(0, 1).cpu()
    for i, prompt in enumerate(prompt_rows):
        new = int(new_lengths[i])
        sequences[i, : len(prompt)] = torch.tensor(prompt)
        sequences[i, len(prompt) : len(prompt) + new] = tokens[i, :new]
    device = found.scores.device
    prompt_lengths = torch.tensor([len(prompt) for prompt in prompt_rows], device=device)
    return GenerationOutput(
        sequences=sequences.to(device),
        lengths=prompt_lengths + new_lengths,
        sequences_scores=found.scores[:, :count].flatten(),
        token_log_probs=found.log_probs[:, :count].flatten(0, 1)[:, :used],
    )


def _steps(
    model: Decoder | AnySeq2Seq,
    rows: list[list[int]],
    prompts: list[list[int]],
    options: GenerationOptions,
) -> Steps:
    """The model ready to be fed, its sources read."""
    if isinstance(model, RecurrentSeq2Seq):
        source, lengths = pad_right(rows, model.decoder.lm_head.weight.device)
        real = torch.arange(source.shape[1], device=source.device) < lengths[:, None]
        recurrent = RecurrentSteps if options.use_cache else UncachedRecurrentSteps
        return recurrent(model.decoder, prompts, options.num_beams, model.read(source, real))
    memories = None
    decoder = model.decoder if isinstance(model, Seq2Seq) else model
    if isinstance(model, Seq2Seq):
        source, lengths = pad_right(rows, decoder.embedding.tokens.weight.device)
        x = model.encoder.embedding(source, torch.arange(source.shape[1], device=source.device))
        memories = decoder.remember(model.encoder.run(x, key_lengths=lengths), lengths)
    kind = CachedSteps if options.use_cache else UncachedSteps
    return kind(decoder, prompts, options.num_beams, options.max_new_tokens or 1, memories)


def _ragged(
    name: str, ids: Prompts, attention_mask: Tensor | None, config: AnyConfig
) -> list[list[int]]:
    """Prompts as lists of ids, checked against the vocabulary and the context."""
    if isinstance(ids, Tensor):
        if attention_mask is None:
            check_ids(name, ids, config.vocab_size, config.position_limit)
            return ids.tolist()
        check_ids(name, ids, config.vocab_size, ids.shape[-1] if ids.dim() else 0)
        check_mask("attention_mask", attention_mask, ids)
        pairs = zip(ids.tolist(), (attention_mask != 0).tolist(), strict=True)
        ids = [[i for i, real in zip(row, mask, strict=True) if real] for row, mask in pairs]
        attention_mask = None
    if attention_mask is not None:
        raise ArgumentError("attention_mask was given with lists of ids, which need none")
    if isinstance(ids, str) or not isinstance(ids, Sequence):
        raise ArgumentError(f"{name} is {type(ids).__name__}; pass a LongTensor or lists of ids")
    rows = []
    for i, row in enumerate(ids):
        if isinstance(row, str) or not isinstance(row, Sequence):
            raise ArgumentError(f"{name}[{i}] is {type(row).__name__}; pass a list of ids")
        for token in row:
            if isinstance(token, bool) or not isinstance(token, int):
                raise ArgumentError(f"{name}[{i}] holds {token!r}; pass whole numbers")
            if not 0 <= token < config.vocab_size:
                raise ArgumentError(
                    f"{name}[{i}] holds the id {token}; the vocabulary is "
                    f"0..{config.vocab_size - 1}"
                )
        limit = config.position_limit
        if limit is not None and len(row) > limit:
            raise ArgumentError(
                f"{name}[{i}] is {len(row)} tokens long; the model has {limit} "
                "positions: shorten it"
            )
        rows.append(list(row))
    return rows


def _decoder_prompts(
    rows: list[list[int]], options: GenerationOptions, seq2seq: bool
) -> list[list[int]]:
    """What the decoder starts from: the prompts themselves, or the start token of each source."""
    if seq2seq:
        start = options.decoder_start_token_id
        if start is None:
            start = options.bos_token_id
        if start is None:
            raise ArgumentError("decoder_start_token_id is not set in the model: pass it")
        if any(not row for row in rows):
            raise ArgumentError("input_ids holds an empty source; leave it out of the batch")
        return [[start] for _ in rows]
    if any(not row for row in rows):
        if options.bos_token_id is None:
            raise ArgumentError(
                "input_ids holds an empty prompt and the model has no bos_token_id to start from; "
                "pass at least one token"
            )
        return [row or [options.bos_token_id] for row in rows]
    return rows
