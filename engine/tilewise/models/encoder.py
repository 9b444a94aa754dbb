"""A bidirectional stack: token ids to hidden states, and what a masked language model adds.

Shapes: ids [R, S]; hidden [R, S, E]; logits [R, S, V].
"""

from torch import Tensor, nn

from ..config import ModelConfig
from ..errors import ConfigError
from ..layers import Linear
from .heads import MaskedHead, ModelOutput, initialise, token_loss
from .inputs import check_ids, check_labels, check_types, padding, refuse
from .stack import Maps, Stack, token_embedding


class Encoder(Stack):
    """`encoder_layers` layers over embeddings; a masked-token head and a pooler when configured."""

    def __init__(self, config: ModelConfig, tokens: nn.Embedding | None = None) -> None:
        if config.encoder_layers == 0:
            raise ConfigError("encoder_layers is 0: an Encoder needs at least one layer")
        own, tokens = tokens is None, tokens or token_embedding(config)
        super().__init__(config.of_encoder, tokens, layers=config.encoder_layers, causal=False)
        size = config.hidden_size
        self.masked_head = None if config.masked_head is None else MaskedHead(config, tokens)
        self.pooler = Linear(size, size) if config.pooler else None
        self.next_sentence = Linear(size, 2) if config.next_sentence else None
        if own:
            initialise(self, 0.02)

    def encode(
        self,
        ids: Tensor,
        attention_mask: Tensor | None,
        token_type_ids: Tensor | None = None,
        maps: Maps | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(hidden [R, S, E], key_lengths, mask): the last two say which positions are real."""
        config = self.config
        ids = check_ids("input_ids", ids, config.vocab_size, config.position_limit)
        types = check_types(token_type_ids, ids, config)
        key_lengths, mask = padding(attention_mask, ids)
        x = self.embedding(ids, self.embedding.counted(ids, attention_mask), types)
        return self.run(x, mask=mask, key_lengths=key_lengths, maps=maps), key_lengths, mask

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
        """ids [R, S] to last_hidden_state [R, S, E]; where attention_mask [R, S] is 0 is unseen.

        With a masked-token head also logits [R, S, V], and loss with labels [R, S] (the ids behind
        the masked tokens, -100 elsewhere). Raises ArgumentError for ids outside the vocabulary,
        longer than the positions, and arguments that this model does not take.
        """
        refuse(self.config.model_type, decoder_input_ids=decoder_input_ids)
        if self.masked_head is None:
            refuse(self.config.model_type, labels=labels)
        elif labels is not None:
            labels = check_labels(labels, input_ids, self.config.vocab_size)
        maps = Maps() if output_attentions else None
        hidden, _, _ = self.encode(input_ids, attention_mask, token_type_ids, maps)
        out = ModelOutput(last_hidden_state=hidden)
        if maps is not None:
            out.attentions = tuple(maps.own)
        if self.masked_head is not None:
            out.logits = self.masked_head(hidden)
            out.loss = None if labels is None else token_loss(out.logits, labels)
        if self.pooler is not None:
            out.pooler_output = self.pooler(hidden[:, 0]).tanh()
            if self.next_sentence is not None:
                out.next_sentence_logits = self.next_sentence(out.pooler_output)
        return out
