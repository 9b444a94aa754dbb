"""What every model checks before any work, and the two forms a padding mask can take.

Shapes: ids [R, S]; attention_mask [R, S], 1 = real token.
"""

import torch
from torch import Tensor

from ..errors import ArgumentError


def check_ids(name: str, ids: object, vocab_size: int, max_length: int) -> Tensor:
    """ids as a LongTensor [R, S] with every id in the vocabulary; ArgumentError otherwise."""
    if not isinstance(ids, Tensor):
        raise ArgumentError(f"{name} is {type(ids).__name__}; pass a LongTensor [rows, length]")
    if ids.dtype not in (torch.int64, torch.int32):
        raise ArgumentError(f"{name} is {ids.dtype}; pass token ids as int64")
    if ids.dim() != 2:
        raise ArgumentError(f"{name} has shape {list(ids.shape)}; pass [rows, length]")
    if ids.shape[1] > max_length:
        raise ArgumentError(
            f"{name} is {ids.shape[1]} tokens long; the model has {max_length} positions: "
            "shorten the input"
        )
    if ids.numel() and not torch.compiler.is_compiling():
        low, high = (int(n) for n in torch.aminmax(ids))
        if low < 0 or high >= vocab_size:
            wrong = low if low < 0 else high
            raise ArgumentError(
                f"{name} holds the id {wrong}; the vocabulary is 0..{vocab_size - 1}: is this the "
                "model's own tokenizer?"
            )
    return ids.long()


def padding(
    attention_mask: Tensor | None, like: Tensor, name: str = "attention_mask"
) -> tuple[Tensor | None, Tensor | None]:
    """(key_lengths [R], mask [R, 1, 1, S]) of a 0/1 mask; at most one of them is not None.

    Padding on the right becomes lengths, which cost nothing; any other pattern a bool mask.
    """
    if attention_mask is None:
        return None, None
    if not isinstance(attention_mask, Tensor) or attention_mask.shape != like.shape:
        got = getattr(attention_mask, "shape", type(attention_mask).__name__)
        raise ArgumentError(f"{name} is {got}; pass a tensor of shape {list(like.shape)}")
    if attention_mask.device != like.device:
        raise ArgumentError(f"{name} is on {attention_mask.device}; move it to {like.device}")
    real = attention_mask != 0
    lengths = real.sum(1)
    right = torch.arange(like.shape[1], device=like.device) < lengths[:, None]
    if torch.compiler.is_compiling():
        return None, real[:, None, None]
    if bool(real.all()):
        return None, None
    if bool((real == right).all()):
        return lengths, None
    return None, real[:, None, None]
