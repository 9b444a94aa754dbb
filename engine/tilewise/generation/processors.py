"""Rules that change scores before a token is chosen, in the order transformers applies them.

Shapes: scores [R, V], log-probabilities under beams and logits when greedy; history [R, L], the
prompt and what was generated, padded on the left with -1.
"""

import torch
from torch import Tensor

from .options import GenerationOptions


def untouched(step: int, options: GenerationOptions) -> bool:
    """Whether `process` would return the scores of this step as they are."""
    return not (
        options.repetition_penalty != 1.0
        or options.no_repeat_ngram_size
        or options.bad_words_ids
        or options.suppress_tokens
        or (step < options.min_new_tokens and options.eos_token_id)
        or (options.forced_bos_token_id is not None and step == 0)
        or (options.forced_eos_token_id is not None and step + 1 == options.max_new_tokens)
    )


def process(scores: Tensor, history: Tensor, step: int, options: GenerationOptions) -> Tensor:
    """Scores after every rule the options ask for; `step` tokens were generated before this one."""
    if options.repetition_penalty != 1.0:
        scores = _penalise_repeats(scores, history, options.repetition_penalty)
    if options.no_repeat_ngram_size:
        scores = _ban_ngrams(scores, history, options.no_repeat_ngram_size)
    if options.bad_words_ids:
        scores = _ban_words(scores, history, options)
    if step < options.min_new_tokens and options.eos_token_id:
        scores = _ban(scores, options.eos_token_id)
    if options.forced_bos_token_id is not None and step == 0:
        starting = (history >= 0).sum(1, keepdim=True) == 1  # only the start token so far
        scores = torch.where(starting, _only(scores, options.forced_bos_token_id), scores)
    if options.forced_eos_token_id is not None and step + 1 == options.max_new_tokens:
        scores = _only(scores, options.forced_eos_token_id)
    if options.suppress_tokens:
        scores = _ban(scores, options.suppress_tokens)
    return scores


def _ban(scores: Tensor, tokens: tuple[int, ...]) -> Tensor:
    at = torch.tensor(tokens, dtype=torch.int64, device=scores.device)
    return scores.index_fill(1, at, -torch.inf)


def _ban_words(scores: Tensor, history: Tensor, options: GenerationOptions) -> Tensor:
    """Ban every token that would complete a word that stands at the end of the row but for it."""
    words, ends = options.bad_words_ids, options.eos_token_id
    scores = _ban(scores, tuple(w[0] for w in words if len(w) == 1 and w[0] not in ends))
    for *before, last in (word for word in words if len(word) > 1):
        if len(before) <= history.shape[1]:
            tail = history[:, -len(before) :]
            begun = (tail == torch.tensor(before, device=tail.device)).all(1)
            scores[begun, last] = -torch.inf
    return scores


def _only(scores: Tensor, token: int) -> Tensor:
    kept = torch.full_like(scores, -torch.inf)
    kept[:, token] = 0.0
    return kept


def _penalise_repeats(scores: Tensor, history: Tensor, penalty: float) -> Tensor:
    """Each token seen before: its score divided by the penalty when positive, else multiplied.

    Source: Keskar et al. 2019 (CTRL), section 4.1.
    """
    seen = torch.zeros_like(scores, dtype=torch.bool)
    real = history >= 0
    rows = torch.arange(len(history), device=history.device)[:, None].expand_as(history)
    seen[rows[real], history[real]] = True
    punished = torch.where(scores < 0, scores * penalty, scores / penalty)
    return torch.where(seen, punished, scores)


def _ban_ngrams(scores: Tensor, history: Tensor, size: int) -> Tensor:
    """Ban every token that would complete an n-gram of `size` tokens seen before in the row.

    Source: Paulus et al. 2017, section 2.5.
    """
    length = history.shape[1]
    if length < size:
        return scores
    windows = history.unfold(1, size, 1)  # [R, L - size + 1, size]
    tail = history[:, length - size + 1 :]
    repeats = (windows[:, :, :-1] == tail[:, None]).all(-1) & (windows >= 0).all(-1)
    row, at = repeats.nonzero(as_tuple=True)
    scores = scores.clone()
    scores[row, windows[row, at, -1]] = -torch.inf
    return scores
