"""A bidirectional stack: token ids to hidden states.

Shapes: ids [R, S]; hidden [R, S, E].
"""

import torch
from torch import Tensor, nn

from ..config import ModelConfig
from ..errors import ConfigError
from ..layers import Embedding, LayerNorm, TransformerLayer
from .heads import ModelOutput, initialise
from .inputs import check_ids, padding, refuse


class Encoder(nn.Module):
    """Embeddings, `encoder_layers` layers, and a last norm when the configuration has one."""

    def __init__(self, config: ModelConfig, tokens: nn.Embedding | None = None) -> None:
        super().__init__()
        if config.encoder_layers == 0:
            raise ConfigError("encoder_layers is 0: an Encoder needs at least one layer")
        self.config = config
        own = tokens is None
        tokens = tokens or nn.Embedding(config.vocab_size, config.hidden_size)
        self.embedding = Embedding(config, tokens)
        self.layers = nn.ModuleList(
            TransformerLayer(config, number=i + 1) for i in range(config.encoder_layers)
        )
        last_norm = LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.norm = last_norm if config.final_norm else None
        if own:
            initialise(self, 0.02)

    def run(
        self, x: Tensor, *, mask: Tensor | None = None, key_lengths: Tensor | None = None
    ) -> Tensor:
        """Embeddings [R, S, E] through the layers: [R, S, E]."""
        for layer in self.layers:
            x = layer(x, mask=mask, key_lengths=key_lengths)
        return x if self.norm is None else self.norm(x)

    def encode(
        self, ids: Tensor, attention_mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(hidden [R, S, E], key_lengths, mask): the last two say which positions are real."""
        ids = check_ids("input_ids", ids, self.config.vocab_size, self.config.max_positions)
        key_lengths, mask = padding(attention_mask, ids)
        x = self.embedding(ids, torch.arange(ids.shape[1], device=ids.device))
        return self.run(x, mask=mask, key_lengths=key_lengths), key_lengths, mask

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> ModelOutput:
        """ids [R, S] to last_hidden_state [R, S, E]; where attention_mask [R, S] is 0 is unseen.

        Raises ArgumentError for ids outside the vocabulary or longer than max_positions, and for
        the last three arguments, which other models take.
        """
        refuse(
            self.config.model_type,
            token_type_ids=token_type_ids,
            decoder_input_ids=decoder_input_ids,
            labels=labels,
        )
        hidden, _, _ = self.encode(input_ids, attention_mask)
        return ModelOutput(last_hidden_state=hidden)
