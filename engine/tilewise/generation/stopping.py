"""Stop strings: texts that end a sequence once its newest token completes one of them.

Shapes: R rows; rows [R, L], prompt and generated tokens, padded on the left with -1.
"""

import os
from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import ArgumentError
from ..text import Tokenizer

Stops = Callable[[Tensor], Tensor]


def stop_at(strings: tuple[str, ...], tokenizer: Tokenizer | None) -> Stops | None:
    """A function of rows [R, L] that says which of them [R] end; None when none ever does.

    As in transformers a stop string may begin in the prompt, and the newest token may go on behind
    it. Special tokens count as the text they are written as. Raises ArgumentError without a
    tokenizer.
    """
    if not strings:
        return None
    if tokenizer is None:
        raise ArgumentError(
            "stop_strings need a tokenizer, which the model does not have: pass [] for none"
        )
    if not isinstance(tokenizer, Tokenizer):
        raise ArgumentError(f"tokenizer is {type(tokenizer).__name__}; pass that of a Model")
    # A token is a byte at least; one before the string keeps the space that starts a word.
    reach = max(len(text.encode()) for text in strings) + 1

    def ended(rows: Tensor) -> Tensor:
        tails = [[token for token in row if token >= 0] for row in rows[:, -reach:].tolist()]
        before = tokenizer.decode([row[:-1] for row in tails], skip_special_tokens=False)
        after = tokenizer.decode(tails, skip_special_tokens=False)
        found = [_completed(*texts, strings) for texts in zip(before, after, strict=True)]
        return torch.tensor(found, device=rows.device)

    return ended


def _completed(before: str, after: str, strings: tuple[str, ...]) -> bool:
    """Whether a string ends in what the last token added, or changed, of the text."""
    old = len(os.path.commonprefix([before, after]))
    return any(after.find(text, max(old - len(text) + 1, 0)) >= 0 for text in strings)
