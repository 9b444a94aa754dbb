"""One vector per text from a model's last hidden states.

Shapes: ids [R, S]; hidden [R, S, E]; vectors [R, E].
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..errors import ArgumentError
from ..models import AnySeq2Seq, Decoder, Encoder, RecurrentEncoder, evaluating
from .batches import by_tokens, check_rows, padded

POOLINGS = ("mean", "cls", "last")


@torch.no_grad()
def embed(
    model: nn.Module,
    rows: Sequence[Sequence[int]],
    *,
    pooling: str = "mean",
    normalize: bool = True,
    batch_tokens: int = 4096,
) -> Tensor:
    """Vectors [R, E] of token ids of any lengths, in the model's dtype, on its device.

    pooling: "mean" of all tokens' states, "cls" the first token's, "last" the last token's. A
    seq2seq model gives its encoder's states. normalize: to length 1. batch_tokens: what runs
    together, padding included. Raises ArgumentError. Source: mean pooling, Reimers and Gurevych
    2019.
    """
    if pooling not in POOLINGS:
        raise ArgumentError(f"pooling is {pooling!r}; pass one of {', '.join(POOLINGS)}")
    stack = model.encoder if isinstance(model, AnySeq2Seq) else model
    if not isinstance(stack, (Encoder, Decoder, RecurrentEncoder)):
        raise ArgumentError(f"{type(model).__name__} has no hidden states to pool")
    check_rows("rows", rows, stack.config)
    embedding = stack if isinstance(stack, RecurrentEncoder) else stack.embedding
    weight = embedding.tokens.weight
    vectors = weight.new_empty(len(rows), stack.output_size)
    pad = stack.config.pad_token_id or 0
    with evaluating(model):
        for batch in by_tokens([len(row) for row in rows], batch_tokens):
            ids, lengths = padded([rows[i] for i in batch], weight.device, pad)
            real = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
            if isinstance(stack, RecurrentEncoder):
                hidden = stack(ids, real)
            else:
                x = stack.embedding(ids, stack.embedding.counted(ids, real))
                hidden = stack.run(x, key_lengths=lengths)
            vectors[torch.tensor(batch)] = pooled(hidden, lengths, pooling).to(weight.dtype)
    if normalize:
        vectors = torch.nn.functional.normalize(vectors.float(), dim=-1).to(weight.dtype)
    return vectors


def pooled(hidden: Tensor, lengths: Tensor, pooling: str) -> Tensor:
    """[R, S, E] to [R, E], of each row's first lengths[r] states; sums in float32."""
    if pooling == "cls":
        return hidden[:, 0]
    if pooling == "last":
        return hidden[torch.arange(len(hidden), device=hidden.device), lengths - 1]
    real = torch.arange(hidden.shape[1], device=hidden.device) < lengths[:, None]
    wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    return wide.masked_fill(~real[..., None], 0).sum(1) / lengths[:, None]
