"""A causal stack with an output projection: a language model, or the decoder of a seq2seq model.

Shapes: ids [R, S]; hidden [R, S, E]; logits [R, S, V].
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from ..config import ModelConfig
from ..errors import ArgumentError, ConfigError
from ..layers import Embedding, LayerCache, LayerNorm, Memory, TransformerLayer
from .heads import IGNORED_LABEL, ModelOutput, initialise, output_projection, token_loss
from .inputs import check_ids, padding, refuse


class Decoder(nn.Module):
    """Embeddings, `decoder_layers` causal layers, a last norm, and the map to the vocabulary."""

    def __init__(self, config: ModelConfig, tokens: nn.Embedding | None = None) -> None:
        super().__init__()
        if config.decoder_layers == 0:
            raise ConfigError("decoder_layers is 0: a Decoder needs at least one layer")
        self.config = config
        own = tokens is None
        tokens = tokens or nn.Embedding(config.vocab_size, config.hidden_size)
        self.embedding = Embedding(config, tokens)
        self.layers = nn.ModuleList(
            TransformerLayer(config, number=i + 1, cross_attention=config.encoder_layers > 0)
            for i in range(config.decoder_layers)
        )
        last_norm = LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.norm = last_norm if config.final_norm else None
        self.lm_head = output_projection(config, tokens)
        if own:
            initialise(self, 0.02)

    def run(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        key_lengths: Tensor | None = None,
        memory: Tensor | Sequence[Memory] | None = None,
        memory_mask: Tensor | None = None,
        memory_lengths: Tensor | None = None,
        cache: Sequence[LayerCache] | None = None,
    ) -> Tensor:
        """Embeddings [R, S, E] through the layers: [R, S, E].

        memory: the encoder's output [M, N, E], or each layer's keys and values of it.
        """
        for i, layer in enumerate(self.layers):
            x = layer(
                x,
                mask=mask,
                causal=True,
                key_lengths=key_lengths,
                memory=memory if memory is None or isinstance(memory, Tensor) else memory[i],
                memory_mask=memory_mask,
                memory_lengths=memory_lengths,
                cache=None if cache is None else cache[i],
            )
        return x if self.norm is None else self.norm(x)

    def remember(self, memory: Tensor, lengths: Tensor | None) -> list[Memory]:
        """Each layer's keys and values of an encoder's output [M, N, E]."""
        attentions = [cast(TransformerLayer, layer).multihead_attn for layer in self.layers]
        return [each.remember(memory, lengths) for each in attentions if each is not None]

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> ModelOutput:
        """Language model: ids [R, S] to logits [R, S, V], last_hidden_state, and loss with labels.

        labels [R, S]: the ids themselves, -100 where nothing is to be predicted; position t is
        trained to give label t + 1. attention_mask [R, S]: 0 = unseen. Positions count from 0 at
        the left of every row. Raises ArgumentError before any work for ids out of range, a mask of
        another shape, or arguments that a language model does not take.
        """
        refuse(
            self.config.model_type,
            token_type_ids=token_type_ids,
            decoder_input_ids=decoder_input_ids,
        )
        ids = check_ids("input_ids", input_ids, self.config.vocab_size, self.config.max_positions)
        if labels is not None:
            labels = check_labels(labels, ids, self.config.vocab_size)
        key_lengths, mask = padding(attention_mask, ids)
        x = self.embedding(ids, torch.arange(ids.shape[1], device=ids.device))
        hidden = self.run(x, mask=mask, key_lengths=key_lengths)
        logits = self.lm_head(hidden)
        loss = None if labels is None else token_loss(logits[:, :-1], labels[:, 1:])
        return ModelOutput(logits=logits, last_hidden_state=hidden, loss=loss)


def check_labels(labels: Tensor, like: Tensor, vocab_size: int) -> Tensor:
    """labels as a LongTensor of like's shape, ids or -100; ArgumentError otherwise."""
    ids = labels.masked_fill(labels == IGNORED_LABEL, 0) if isinstance(labels, Tensor) else labels
    check_ids("labels", ids, vocab_size)
    if labels.shape != like.shape:
        raise ArgumentError(f"labels have shape {list(labels.shape)}; pass {list(like.shape)}")
    return labels.long()
