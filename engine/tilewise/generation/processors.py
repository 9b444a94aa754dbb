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
    if step < options.min_new_tokens and options.eos_token_id:
        scores = _ban(scores, options.eos_token_id)
    if options.forced_bos_token_id is not None and step == 0:
        starting = (history >= 0).sum(1, keepdim=True) == 1  # only the start token so far
        scores = torch.where(starting, _only(scores, options.forced_bos_token_id), scores)
    if options.forced_eos_token_id is not None and step + 1 == options.max_new_tokens:
        scores = _only(scores, options.forced_eos_token_id)
    return scores


def _ban(scores: Tensor, tokens: tuple[int, ...]) -> Tensor:
    return scores.index_fill(1, torch.tensor(tokens, device=scores.device), -torch.inf)


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
