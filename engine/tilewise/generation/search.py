"""Greedy and beam search over a decoder's steps.

Shapes: B sentences, A of them still open, k beams, V vocabulary, N tokens to generate at most, K
candidates; running and finished tokens [A, k, N]; scores [A, k], summed log-probabilities [nats].
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tilewise_kernels import cross_entropy, log_softmax_topk

from ..errors import GenerationError
from .cache import Steps
from .options import GenerationOptions
from .processors import process, untouched
from .stopping import Stops

WORST = -1e9  # the score of a hypothesis that is not there, as in transformers


@dataclass
class Hypotheses:
    """The k best hypotheses of each sentence, best first.

    tokens [B, k, N]; lengths [B, k], generated tokens; log_probs [B, k, N], one per token;
    scores [B, k], sum(log_probs) / lengths ** length_penalty, or -1e9 where there is none.
    """

    tokens: Tensor
    lengths: Tensor
    log_probs: Tensor
    scores: Tensor

    def select(self, rows: Tensor) -> "Hypotheses":
        return Hypotheses(*(t[rows] for t in vars(self).values()))

    def store(self, rows: Tensor, other: "Hypotheses") -> None:
        for mine, theirs in zip(vars(self).values(), vars(other).values(), strict=True):
            mine[rows] = theirs

    def pick(self, at: Tensor) -> "Hypotheses":
        """Of each sentence [A], the hypotheses numbered `at` [A, k]."""
        wide = at[..., None].expand(-1, -1, self.tokens.shape[2])
        return Hypotheses(
            self.tokens.gather(1, wide),
            self.lengths.gather(1, at),
            self.log_probs.gather(1, wide),
            self.scores.gather(1, at),
        )

    def join(self, other: "Hypotheses") -> "Hypotheses":
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return Hypotheses(*(torch.cat(pair, 1) for pair in pairs))


def nothing(sentences: int, beams: int, tokens: int, device: torch.device) -> Hypotheses:
    """No hypothesis yet in any place."""
    return Hypotheses(
        torch.zeros(sentences, beams, tokens, dtype=torch.int64, device=device),
        torch.zeros(sentences, beams, dtype=torch.int64, device=device),
        torch.zeros(sentences, beams, tokens, dtype=torch.float32, device=device),
        torch.full((sentences, beams), WORST, dtype=torch.float32, device=device),
    )


def beam_search(
    steps: Steps, prompts: list[list[int]], options: GenerationOptions, stops: Stops | None = None
) -> Hypotheses:
    """Beam search with transformers' semantics: ids and scores of its `generate`.

    Each step keeps the best K = max(2, 1 + end tokens) * k continuations. Those among the first k
    that end become hypotheses, ranked with the stored ones by normalised score, so that a better
    one displaces a worse. The best k that do not end run on. A sentence closes by the rule of
    `early_stopping` and leaves the batch. `stops` says which sequences end beside those that an end
    token ends. Raises GenerationError when a score is NaN.
    """
    k, limit = options.num_beams, options.max_new_tokens or 1
    candidates = max(2, 1 + len(options.eos_token_id)) * k
    logits = steps.prompt()
    device, vocab = logits.device, logits.shape[1]
    result = nothing(len(prompts), k, limit, device)
    sentences = torch.arange(len(prompts), device=device)
    finished, running = result.select(sentences), result.select(sentences)
    running.scores[:, 0] = 0.0
    full = torch.zeros(len(prompts), k, dtype=torch.bool, device=device)
    ends = torch.tensor(options.eos_token_id, dtype=torch.int64, device=device)
    past = _left_padded(prompts, device).repeat_interleave(k, 0)
    logits = logits.repeat_interleave(k, 0)
    for step in range(limit):
        history = torch.cat([past, running.tokens[:, :, :step].flatten(0, 1)], 1)
        log_probs, ids = _continuations(logits, min(candidates, vocab), history, step, options)
        totals = log_probs.unflatten(0, (-1, k)) + running.scores[..., None]
        totals = totals.flatten(1)
        scores, flat = totals.topk(min(candidates, totals.shape[1]))
        exhausted = scores[:, 0].isneginf() & ~full.any(1)
        _check_scores(scores.isnan().any(1) | exhausted, sentences, step)
        beams, tokens = flat // ids.shape[1], ids.unflatten(0, (-1, k)).flatten(1).gather(1, flat)
        chosen = _extended(running, beams, tokens, scores, step)
        ended = torch.isin(tokens, ends) | (step + 1 == limit)
        if stops:
            prompt = past.unflatten(0, (-1, k))[:, :1].expand(-1, ended.shape[1], -1)
            rows = torch.cat([prompt, chosen.tokens[:, :, : step + 1]], 2)
            ended |= stops(rows.flatten(0, 1)).view_as(ended)

        next_scores = scores + ended.float() * WORST
        best = next_scores.topk(k)[1]
        running, parents = chosen.pick(best), beams.gather(1, best)
        running.scores = next_scores.gather(1, best)

        closing = ended & (torch.arange(flat.shape[1], device=device) < k)
        chosen.scores = scores / (step + 1) ** options.length_penalty + (~closing).float() * WORST
        merged, merged_full = finished.join(chosen), torch.cat([full, closing], 1)
        best = merged.scores.topk(k)[1]
        finished, full = merged.pick(best), merged_full.gather(1, best)

        closed = ~_can_improve(running.scores, finished.scores, full, step + 1, options)
        if options.early_stopping is True:
            closed = closed | full.all(1)
        if step + 1 == limit:
            break
        if bool(closed.any()):
            result.store(sentences[closed], finished.select(closed))
            going = (~closed).nonzero()[:, 0]
            if not len(going):
                return result
            steps.keep(going)
            sentences, full, parents = sentences[going], full[going], parents[going]
            finished, running = finished.select(going), running.select(going)
            past = past.unflatten(0, (-1, k))[going].flatten(0, 1)
        first_rows = torch.arange(len(parents), device=device)[:, None] * k
        logits = steps.step(running.tokens[:, :, step].flatten(), (parents + first_rows).flatten())
    result.store(sentences, finished)
    return result


def _continuations(
    logits: Tensor, count: int, history: Tensor, step: int, options: GenerationOptions
) -> tuple[Tensor, Tensor]:
    """The `count` best next tokens of each row [R, V]: log-probabilities and ids [R, count]."""
    if untouched(step, options):
        best, ids = log_softmax_topk(logits, count)
        return best.float(), ids
    log_probs = process(torch.log_softmax(logits.float(), -1), history, step, options)
    scores, ids = log_probs.topk(count)
    return scores, ids


def _extended(
    running: Hypotheses, beams: Tensor, tokens: Tensor, scores: Tensor, step: int
) -> Hypotheses:
    """The hypotheses `beams` [A, K] with one token more."""
    chosen = running.pick(beams)
    chosen.tokens[:, :, step] = tokens
    chosen.log_probs[:, :, step] = scores - chosen.scores
    chosen.lengths = torch.full_like(chosen.lengths, step + 1)
    chosen.scores = scores
    return chosen


def _can_improve(
    running: Tensor, finished: Tensor, full: Tensor, length: int, options: GenerationOptions
) -> Tensor:
    """[A]: whether the best running score might still beat the worst finished one."""
    limit = options.max_new_tokens or 1
    if options.early_stopping == "never" and options.length_penalty > 0:
        length = limit
    best = running[:, :1] / length**options.length_penalty
    worst = torch.where(full, finished.min(1, keepdim=True)[0], WORST)
    return (best > worst).any(-1)


def greedy_search(
    steps: Steps, prompts: list[list[int]], options: GenerationOptions, stops: Stops | None = None
) -> Hypotheses:
    """The likeliest token at every step; a sentence that ends leaves the batch.

    `stops` says which sequences end beside those that an end token ends.
    Rules act on logits, as in transformers; log_probs are those of the untouched distribution.
    """
    limit = options.max_new_tokens or 1
    logits = steps.prompt()
    device = logits.device
    result = nothing(len(prompts), 1, limit, device)
    result.scores.zero_()
    sentences = torch.arange(len(prompts), device=device)
    ends = torch.tensor(options.eos_token_id, dtype=torch.int64, device=device)
    past = _left_padded(prompts, device)
    for step in range(limit):
        history = torch.cat([past, result.tokens[sentences, 0, :step]], 1)
        best, tokens, log_probs = _likeliest(logits, history, step, options)
        _check_scores(~best.isfinite(), sentences, step)
        result.tokens[sentences, 0, step] = tokens
        result.log_probs[sentences, 0, step] = log_probs
        result.lengths[sentences, 0] = step + 1
        result.scores[sentences, 0] += log_probs
        ended = torch.isin(tokens, ends)
        if stops:
            ended |= stops(torch.cat([history, tokens[:, None]], 1))
        going = (~ended).nonzero()[:, 0]
        if step + 1 == limit or not len(going):
            break
        if len(going) < len(sentences):
            steps.keep(going)
            sentences, past, tokens = sentences[going], past[going], tokens[going]
        logits = steps.step(tokens, torch.arange(len(tokens), device=device))
    result.scores /= result.lengths ** float(options.length_penalty)
    return result


def _likeliest(
    logits: Tensor, history: Tensor, step: int, options: GenerationOptions
) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row [R, V]: the best score by the rules, its token, that one's log-probability."""
    if untouched(step, options):
        found, tokens = log_softmax_topk(logits, 1)
        log_probs = found[:, 0].float()
        return log_probs, tokens[:, 0], log_probs
    best, tokens = process(logits.float(), history, step, options).max(-1)
    return best, tokens, -cross_entropy(logits, tokens, reduction="none").float()


def _left_padded(prompts: list[list[int]], device: torch.device) -> Tensor:
    longest = max(len(prompt) for prompt in prompts)
    rows = [[-1] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    return torch.tensor(rows, dtype=torch.int64, device=device)


def _check_scores(wrong: Tensor, sentences: Tensor, step: int) -> None:
    """GenerationError naming the `wrong` sentences [A]: they would silently pick any token."""
    if bool(wrong.any()):
        rows = sentences[wrong].tolist()
        raise GenerationError(
            f"no finite score is left at step {step} for rows {rows[:10]}: check the weights and "
            "the dtype (float16 may overflow: try bfloat16 or float32), or ban fewer tokens"
        )
