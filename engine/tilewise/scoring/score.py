"""Log-probabilities of given texts, token by token.

    log P(text | context) = sum over t of log P(text_t | context, text_<t)

Shapes: ids [R, S]; hidden [N, E] of the N tokens that are predicted.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tilewise_kernels import cross_entropy

from ..errors import ArgumentError
from ..models import AnySeq2Seq, Decoder, RecurrentDecoder, evaluating
from ..models.inputs import check_output
from .batches import by_tokens, check_rows, check_tokens, padded

LOGITS = 2**25  # elements that are held at a time


@dataclass
class Score:
    """tokens: the ids that were scored; log_probs: one for each [nats].

    greedy: whether each was the likeliest, when that was asked for.
    """

    tokens: list[int]
    log_probs: list[float]
    greedy: list[bool] = field(default_factory=list)

    @property
    def total(self) -> float:
        """log P of all tokens [nats]."""
        return math.fsum(self.log_probs)

    @property
    def mean(self) -> float:
        """log P per token [nats]; 0 of no token."""
        return self.total / max(len(self.log_probs), 1)

    @property
    def perplexity(self) -> float:
        """exp(-mean), infinite past the largest float."""
        return exp_or_inf(-self.mean)


def perplexity(scores: Sequence[Score]) -> float:
    """exp of the mean negative log-probability per token over all texts; raises without a token."""
    count = sum(len(score.log_probs) for score in scores)
    if not count:
        raise ArgumentError("scores hold no token; a text without context needs at least two")
    return exp_or_inf(-math.fsum(score.total for score in scores) / count)


def exp_or_inf(value: float) -> float:
    """e ** value, infinite past the largest float."""
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


class _Part(NamedTuple):
    """A stretch of one text: ids, of which the model reads all but the last, and from where on
    they are scored."""

    text: int
    ids: list[int]
    first: int


@torch.no_grad()
def score(
    model: nn.Module,
    texts: Sequence[Sequence[int]],
    contexts: Sequence[Sequence[int]] | None = None,
    *,
    batch_tokens: int = 4096,
    stride: int | None = None,
    wrap: bool = False,
    greedy: bool = False,
) -> list[Score]:
    """Score every text (token ids), in order.

    A Decoder scores texts behind their contexts, which may be empty; without anything before it a
    first token has no probability and is left out. A Seq2Seq scores texts as targets of their
    contexts, its sources, from decoder_start_token_id on, or with `wrap` each from its own last
    token, which names its language. batch_tokens: what runs together, padding included. stride:
    texts longer than the model's positions are scored in windows, each this many tokens further;
    None: half the positions. greedy: also say of each token whether it is the likeliest. Raises
    ArgumentError.
    """
    if not isinstance(model, Decoder | AnySeq2Seq):
        raise ArgumentError(f"{type(model).__name__} has no next token to score; use fill_mask")
    check_output(model.config)
    if contexts is None:
        if isinstance(model, AnySeq2Seq):
            raise ArgumentError("contexts is not given; a seq2seq model scores targets of sources")
        contexts = [[] for _ in texts]
    if len(contexts) != len(texts):
        raise ArgumentError(f"contexts has {len(contexts)} rows and texts {len(texts)}; as many")
    with evaluating(model):
        if isinstance(model, AnySeq2Seq):
            return _score_targets(model, texts, contexts, batch_tokens, wrap, greedy)
        return _score_continuations(model, texts, contexts, batch_tokens, stride, greedy)


def _score_continuations(
    model: Decoder,
    texts: Sequence[Sequence[int]],
    contexts: Sequence[Sequence[int]],
    batch_tokens: int,
    stride: int | None,
    greedy: bool,
) -> list[Score]:
    if stride is not None and (isinstance(stride, bool) or not isinstance(stride, int)):
        raise ArgumentError(f"stride is {stride!r}; pass a whole number of tokens")
    check_tokens("contexts", contexts, model.config.vocab_size)
    check_tokens("texts", texts, model.config.vocab_size)
    parts = []
    for i, (context, text) in enumerate(zip(contexts, texts, strict=True)):
        parts += _windows(model, i, [*context, *text], max(len(context), 1), stride)
    device = model.embedding.tokens.weight.device
    found = [Score([], []) for _ in parts]
    for batch in by_tokens([len(part.ids) - 1 for part in parts], batch_tokens):
        ids, lengths = padded([parts[i].ids[:-1] for i in batch], device)
        x = model.embedding(ids, model.embedding.counted(ids, None))
        hidden = model.run(x, key_lengths=lengths)
        for row, i in enumerate(batch):
            first, end = parts[i].first, len(parts[i].ids)
            targets = parts[i].ids[first:]
            found[i] = scored(model, hidden[row, first - 1 : end - 1], targets, greedy)
    scores = [Score([], []) for _ in texts]
    for part, each in zip(parts, found, strict=True):
        scores[part.text].tokens += each.tokens
        scores[part.text].log_probs += each.log_probs
        scores[part.text].greedy += each.greedy
    return scores


def _windows(
    model: Decoder, text: int, ids: list[int], first: int, stride: int | None
) -> list[_Part]:
    """One part, or several overlapping ones where ids are longer than the model's positions."""
    positions = model.config.position_limit or len(ids)
    limit = positions + 1  # the last is predicted only
    if len(ids) <= limit:
        return [_Part(text, ids, first)] if first < len(ids) else []
    step = max(positions // 2, 1) if stride is None else stride
    if not 1 <= step <= positions:
        raise ArgumentError(f"stride is {step}; pass 1 to {positions}, the model's positions")
    parts = [_Part(text, ids[:limit], first)] if first < limit else []
    done = max(limit, first)
    while done < len(ids):
        end = min(done + step, len(ids))
        parts.append(_Part(text, ids[end - limit : end], limit - (end - done)))
        done = end
    return parts


def _score_targets(
    model: AnySeq2Seq,
    texts: Sequence[Sequence[int]],
    sources: Sequence[Sequence[int]],
    batch_tokens: int,
    wrap: bool,
    greedy: bool,
) -> list[Score]:
    check_rows("contexts", sources, model.config)
    check_rows("texts", texts, model.config, model.config.output_vocab_size)
    start = model.config.decoder_start_token_id
    if start is None and not wrap:
        raise ArgumentError("decoder_start_token_id is not set in the model; scoring needs it")
    starts = [text[-1] if start is None or wrap else start for text in texts]
    device = next(model.parameters()).device
    scores = [Score([], []) for _ in texts]
    sizes = [len(s) + len(t) for s, t in zip(sources, texts, strict=True)]
    for batch in by_tokens(sizes, batch_tokens):
        source, source_lengths = padded([sources[i] for i in batch], device)
        target, lengths = padded([[starts[i], *texts[i]] for i in batch], device)
        real = torch.arange(source.shape[1], device=device) < source_lengths[:, None]
        out = model.run(source, real.long(), target[:, :-1], False, logits=False)
        states: Tensor = out.last_hidden_state  # type: ignore[assignment]
        for row, i in enumerate(batch):
            hidden = states[row, : int(lengths[row]) - 1]
            scores[i] = scored(model.decoder, hidden, texts[i], greedy)
    return scores


def scored(
    decoder: Decoder | RecurrentDecoder, hidden: Tensor, tokens: Sequence[int], greedy: bool
) -> Score:
    """The Score of N tokens, each from its hidden state [N, E]; few logits at a time."""
    rows = max(LOGITS // decoder.config.output_vocab_size, 1)
    targets, score = torch.tensor(tokens, device=hidden.device), Score(list(tokens), [])
    head = decoder.logits if isinstance(decoder, Decoder) else decoder.lm_head
    for h, t in zip(hidden.split(rows), targets.split(rows), strict=True):
        logits = head(h)
        score.log_probs += [-loss for loss in cross_entropy(logits, t, reduction="none").tolist()]
        if greedy:
            score.greedy += (logits.argmax(-1) == t).tolist()
    return score
