"""An encoder and a decoder that attends to it: the original Transformer.

Shapes: input ids [R, N]; decoder ids [R, S]; logits [R, S, V].
"""

import torch
from torch import Tensor, nn

from ..config import ModelConfig
from ..errors import ArgumentError, ConfigError
from .decoder import Decoder, check_labels
from .encoder import Encoder
from .heads import IGNORED_LABEL, ModelOutput, initialise, token_loss
from .inputs import check_ids, refuse


class Seq2Seq(nn.Module):
    """Encoder and Decoder over one shared embedding matrix. Source: Vaswani et al. 2017."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if not (config.encoder_layers and config.decoder_layers):
            raise ConfigError(
                f"a Seq2Seq needs both stacks; encoder_layers is {config.encoder_layers} and "
                f"decoder_layers {config.decoder_layers}"
            )
        self.config = config
        shared = nn.Embedding(config.vocab_size, config.hidden_size)
        self.encoder = Encoder(config, shared)
        self.decoder = Decoder(config, shared)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Glorot matrices and unit-variance embeddings, the paper's released initialisation."""
        initialise(self, 0.02)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2 and "embedding" not in name and "lm_head" not in name:
                nn.init.xavier_uniform_(parameter)
        shared = self.encoder.embedding.tokens.weight
        nn.init.normal_(shared, std=self.config.hidden_size**-0.5)

    def shift_right(self, labels: Tensor) -> Tensor:
        """Labels [R, S] to decoder inputs: the start token, then all labels but the last."""
        start = self.config.decoder_start_token_id
        if start is None:
            raise ConfigError("decoder_start_token_id is not set: pass decoder_input_ids yourself")
        shifted = labels.new_full(labels.shape, start)
        shifted[:, 1:] = labels[:, :-1]
        return shifted.masked_fill(shifted == IGNORED_LABEL, self.config.pad_token_id or 0)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> ModelOutput:
        """Source ids [R, N] and target ids [R, S] to logits [R, S, V], and loss with labels.

        decoder_input_ids: the target so far, from the start token on; made from labels when only
        those are given. labels [R, S]: -100 = ignored. Raises ArgumentError before any work.
        """
        config = self.config
        refuse(config.model_type, token_type_ids=token_type_ids)
        if decoder_input_ids is None:
            if labels is None:
                raise ArgumentError("neither decoder_input_ids nor labels was given; pass one")
            decoder_input_ids = self.shift_right(check_labels(labels, labels, config.vocab_size))
        ids = check_ids(
            "decoder_input_ids", decoder_input_ids, config.vocab_size, config.max_positions
        )
        if labels is not None:
            labels = check_labels(labels, ids, config.vocab_size)
        source = check_ids("input_ids", input_ids, config.vocab_size, config.max_positions)
        if len(source) != len(ids):
            raise ArgumentError(
                f"input_ids has {len(source)} rows and decoder_input_ids {len(ids)}; pass as many"
            )
        memory, lengths, mask = self.encoder.encode(source, attention_mask)
        x = self.decoder.embedding(ids, torch.arange(ids.shape[1], device=ids.device))
        hidden = self.decoder.run(x, memory=memory, memory_lengths=lengths, memory_mask=mask)
        logits = self.decoder.lm_head(hidden)
        loss = None if labels is None else token_loss(logits, labels)
        return ModelOutput(logits, hidden, loss, memory)
