"""A causal stack with an output projection: a language model, or the decoder of a seq2seq model.

Shapes: ids [R, S]; hidden [R, S, E]; logits [R, S, V].
"""

from typing import cast

from torch import Tensor, nn

from ..config import ModelConfig
from ..errors import ConfigError
from ..layers import Memory, TransformerLayer
from .heads import ModelOutput, OutputProjection, initialise, token_loss
from .inputs import check_ids, check_labels, check_output, padding, refuse
from .stack import Maps, Stack, token_embedding


class Decoder(Stack):
    """Embeddings, `decoder_layers` causal layers, a last norm, and the map to the vocabulary.

    With output_head False there is no such map, and so no logits.
    """

    def __init__(self, config: ModelConfig, tokens: nn.Embedding | None = None) -> None:
        if config.decoder_layers == 0:
            raise ConfigError("decoder_layers is 0: a Decoder needs at least one layer")
        own, tokens = tokens is None, tokens or token_embedding(config)
        super().__init__(
            config,
            tokens,
            layers=config.decoder_layers,
            causal=True,
            cross_attention=config.encoder_layers > 0,
        )
        self.lm_head = OutputProjection(config, tokens) if config.output_head else None
        if own:
            initialise(self, 0.02)

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., E] to [..., V]; raises ArgumentError where there is no output projection."""
        check_output(self.config)
        assert self.lm_head is not None
        return self.lm_head(hidden)

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
        *,
        output_attentions: bool = False,
    ) -> ModelOutput:
        """Language model: ids [R, S] to logits [R, S, V], last_hidden_state, and loss with labels.

        labels [R, S]: the ids themselves, -100 where nothing is to be predicted; position t is
        trained to give label t + 1. attention_mask [R, S]: 0 = unseen. Positions count from 0 at
        the left of every row, or as position_count says. Raises ArgumentError before any work for
        ids out of range, a mask of another shape, or arguments that a language model does not take.
        """
        config = self.config
        refuse(
            config.model_type, token_type_ids=token_type_ids, decoder_input_ids=decoder_input_ids
        )
        ids = check_ids("input_ids", input_ids, config.vocab_size, config.position_limit)
        if labels is not None:
            check_output(config)
            labels = check_labels(labels, ids, config.vocab_size)
        key_lengths, mask = padding(attention_mask, ids)
        maps = Maps() if output_attentions else None
        positions = self.embedding.counted(ids, attention_mask)
        counted = None if mask is None else positions
        x = self.embedding(ids, positions)
        hidden = self.run(x, counted=counted, mask=mask, key_lengths=key_lengths, maps=maps)
        out = ModelOutput(last_hidden_state=hidden)
        if config.output_head:
            out.logits = self.logits(hidden)
            out.loss = None if labels is None else token_loss(out.logits[:, :-1], labels[:, 1:])
        out.attentions = None if maps is None else tuple(maps.own)
        return out
