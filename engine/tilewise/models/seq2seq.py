"""Models from a source to a target, and the original Transformer among them.

Shapes: input ids [R, N]; decoder ids [R, S]; logits [R, S, V].
"""

import torch
from torch import Tensor, nn

from ..config import AnyConfig, ModelConfig
from ..errors import ArgumentError, ConfigError
from .decoder import Decoder
from .encoder import Encoder
from .heads import IGNORED_LABEL, ModelOutput, initialise, token_loss
from .inputs import check_ids, check_labels, check_output, refuse
from .stack import Maps, token_embedding


class SourceToTarget(nn.Module):
    """What every model with an encoder and a decoder takes and returns; `run` is its own."""

    def __init__(self, config: AnyConfig, encoder: nn.Module, decoder: nn.Module) -> None:
        super().__init__()
        self.config, self.encoder, self.decoder = config, encoder, decoder

    def run(
        self,
        source: Tensor,
        attention_mask: Tensor | None,
        ids: Tensor,
        output_attentions: bool,
        *,
        logits: bool = True,
    ) -> ModelOutput:
        """All but the loss, of checked source ids [R, N] and target ids [R, S].

        logits: False leaves them out, for who needs few of them at a time.
        """
        raise NotImplementedError

    def shift_right(self, labels: Tensor) -> Tensor:
        """Labels [R, S] to decoder inputs: the start token, then all labels but the last.

        With wrap_labels the start token is each row's last label that is no padding, a language.
        """
        padding, start = self.config.pad_token_id or 0, self.config.decoder_start_token_id
        ids = labels.masked_fill(labels == IGNORED_LABEL, padding)
        wrap = isinstance(self.config, ModelConfig) and self.config.wrap_labels
        if wrap and labels.shape[1]:
            last = ids.ne(padding).sum(1, keepdim=True) - 1
            return torch.cat([ids.gather(1, last.clamp(min=0)), ids[:, :-1]], 1)
        if start is None:
            raise ConfigError("decoder_start_token_id is not set: pass decoder_input_ids yourself")
        shifted = torch.full_like(ids, start)
        shifted[:, 1:] = ids[:, :-1]
        return shifted

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
        """Source ids [R, N] and target ids [R, S] to logits [R, S, V], and loss with labels.

        decoder_input_ids: the target so far, from the start token on; made from labels when only
        those are given. labels [R, S]: -100 = ignored. Raises ArgumentError before any work.
        """
        config = self.config
        refuse(config.model_type, token_type_ids=token_type_ids)
        if labels is not None:
            check_output(config)
        vocab_size = config.output_vocab_size
        if decoder_input_ids is None:
            if labels is None:
                raise ArgumentError("neither decoder_input_ids nor labels was given; pass one")
            decoder_input_ids = self.shift_right(check_labels(labels, labels, vocab_size))
        limit = config.position_limit
        ids = check_ids("decoder_input_ids", decoder_input_ids, vocab_size, limit)
        if labels is not None:
            labels = check_labels(labels, ids, vocab_size)
        source = check_ids("input_ids", input_ids, config.vocab_size, limit)
        if len(source) != len(ids):
            raise ArgumentError(
                f"input_ids has {len(source)} rows and decoder_input_ids {len(ids)}; pass as many"
            )
        out = self.run(source, attention_mask, ids, output_attentions)
        if labels is not None and out.logits is not None:
            out.loss = token_loss(out.logits, labels)
        return out


class Seq2Seq(SourceToTarget):
    """Encoder and Decoder, usually over one embedding matrix. Source: Vaswani et al. 2017."""

    config: ModelConfig
    encoder: Encoder
    decoder: Decoder

    def __init__(self, config: ModelConfig) -> None:
        if not config.is_seq2seq:
            raise ConfigError(
                f"a Seq2Seq needs both stacks; encoder_layers is {config.encoder_layers} and "
                f"decoder_layers {config.decoder_layers}"
            )
        source = token_embedding(config)
        target = source if config.share_embeddings else token_embedding(config, target=True)
        super().__init__(config, Encoder(config, source), Decoder(config, target))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Glorot matrices and unit-variance embeddings, the paper's released initialisation."""
        initialise(self, 0.02)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2 and "embedding" not in name and "lm_head" not in name:
                nn.init.xavier_uniform_(parameter)
        for stack in (self.encoder, self.decoder):
            nn.init.normal_(stack.embedding.tokens.weight, std=self.config.hidden_size**-0.5)

    def run(
        self,
        source: Tensor,
        attention_mask: Tensor | None,
        ids: Tensor,
        output_attentions: bool,
        *,
        logits: bool = True,
    ) -> ModelOutput:
        read, written = (Maps(), Maps()) if output_attentions else (None, None)
        memory, lengths, mask = self.encoder.encode(source, attention_mask, maps=read)
        x = self.decoder.embedding(ids, self.decoder.embedding.counted(ids, None))
        hidden = self.decoder.run(
            x, memory=memory, memory_lengths=lengths, memory_mask=mask, maps=written
        )
        out = ModelOutput(last_hidden_state=hidden, encoder_last_hidden_state=memory)
        if logits and self.config.output_head:
            out.logits = self.decoder.logits(hidden)
        if read is not None and written is not None:
            out.encoder_attentions = tuple(read.own)
            out.attentions, out.cross_attentions = tuple(written.own), tuple(written.memory)
        return out
