"""What a model makes of given text: probabilities, vectors, the words behind masks."""

from .batches import as_ids
from .embed import embed
from .few_shot import Choice, choose, few_shot_prompt
from .masked import Filling, fill_mask, following_model, masked_model, next_sentence
from .score import Score, perplexity, score

__all__ = [
    "Choice",
    "Filling",
    "Score",
    "as_ids",
    "choose",
    "embed",
    "few_shot_prompt",
    "fill_mask",
    "following_model",
    "masked_model",
    "next_sentence",
    "perplexity",
    "score",
]
