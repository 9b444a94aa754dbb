"""What every model checks before any work, and the two forms a padding mask can take.

Shapes: ids [R, S]; attention_mask [R, S], 1 = real token.
"""

import torch
from torch import Tensor

from ..config import AnyConfig, ModelConfig
from ..errors import ArgumentError
from .heads import IGNORED_LABEL


def check_ids(name: str, ids: object, vocab_size: int, max_length: int | None = None) -> Tensor:
    """ids as a LongTensor [R, S] with every id in the vocabulary; ArgumentError otherwise."""
    if not isinstance(ids, Tensor):
        raise ArgumentError(f"{name} is {type(ids).__name__}; pass a LongTensor [rows, length]")
    if ids.dtype not in (torch.int64, torch.int32):
        raise ArgumentError(f"{name} is {ids.dtype}; pass token ids as int64")
    _check_dense(name, ids)
    if ids.dim() != 2:
        raise ArgumentError(f"{name} has shape {list(ids.shape)}; pass [rows, length]")
    if max_length is not None and ids.shape[1] > max_length:
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


def check_mask(name: str, mask: object, like: Tensor) -> None:
    """ArgumentError unless mask is a tensor of like's shape."""
    if not isinstance(mask, Tensor):
        raise ArgumentError(f"{name} is {type(mask).__name__}; pass a tensor {list(like.shape)}")
    _check_dense(name, mask)
    if mask.shape != like.shape:
        raise ArgumentError(f"{name} has shape {list(mask.shape)}; pass {list(like.shape)}")


def _check_dense(name: str, tensor: Tensor) -> None:
    if tensor.layout is not torch.strided or tensor.is_nested:
        raise ArgumentError(f"{name} is sparse or nested; pass a dense tensor")


def check_labels(labels: Tensor, like: Tensor, vocab_size: int) -> Tensor:
    """labels as a LongTensor of like's shape, ids or -100; ArgumentError otherwise."""
    ids = labels.masked_fill(labels == IGNORED_LABEL, 0) if isinstance(labels, Tensor) else labels
    check_ids("labels", ids, vocab_size)
    if labels.shape != like.shape:
        raise ArgumentError(f"labels have shape {list(labels.shape)}; pass {list(like.shape)}")
    return labels.long()


def check_types(token_type_ids: Tensor | None, like: Tensor, config: ModelConfig) -> Tensor | None:
    """token_type_ids as a LongTensor of like's shape; ArgumentError where the model takes none."""
    if token_type_ids is None:
        return None
    if not config.token_types:
        raise ArgumentError(f"token_type_ids was given; {config.model_type} takes none")
    types = check_ids("token_type_ids", token_type_ids, config.token_types)
    if types.shape != like.shape:
        raise ArgumentError(
            f"token_type_ids have shape {list(types.shape)}; pass {list(like.shape)}"
        )
    return types


def check_output(config: AnyConfig) -> None:
    """ArgumentError where a model gives hidden states only."""
    if isinstance(config, ModelConfig) and not config.output_head:
        raise ArgumentError(
            f"this {config.model_type} has no output matrix, as its folder was saved from a base "
            "model: it embeds; load one with a language model head"
        )


def refuse(model_type: str, **arguments: object) -> None:
    """ArgumentError naming the first of these arguments that was given: the model takes none."""
    for name, value in arguments.items():
        if value is not None:
            raise ArgumentError(f"{name} was given; {model_type} takes none")


def real_positions(attention_mask: Tensor | None, like: Tensor) -> Tensor | None:
    """The mask as bool [R, S]; None when it is None. ArgumentError unless it has like's shape."""
    if attention_mask is None:
        return None
    check_mask("attention_mask", attention_mask, like)
    if attention_mask.device != like.device:
        raise ArgumentError(
            f"attention_mask is on {attention_mask.device}; move it to {like.device}"
        )
    return attention_mask != 0


def padding(attention_mask: Tensor | None, like: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """(key_lengths [R], mask [R, 1, 1, S]) of a 0/1 mask; at most one of them is not None.

    Padding on the right becomes lengths, which cost nothing; any other pattern a bool mask.
    """
    real = real_positions(attention_mask, like)
    if real is None:
        return None, None
    lengths = real.sum(1)
    right = torch.arange(like.shape[1], device=like.device) < lengths[:, None]
    if torch.compiler.is_compiling():
        return None, real[:, None, None]
    if bool(real.all()):
        return None, None
    if bool((real == right).all()):
        return lengths, None
    return None, real[:, None, None]
