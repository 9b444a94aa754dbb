"""The recurrent encoder-decoder, with one summary of the source or attention to all of it.

Shapes: source ids [M, N]; target ids [R, S], R = M * k where a source has k hypotheses; states
[R, H]; context [R, C]; readout [R, S, L]; logits [R, S, V].
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..config import RecurrentConfig
from ..errors import ArgumentError
from ..layers import AdditiveAttention, GatedRecurrent, Linear
from .heads import ModelOutput
from .inputs import real_positions
from .seq2seq import SourceToTarget


class Source(NamedTuple):
    """What a decoder reads of M sources.

    start [M, H]: the first state. values: summaries [M, C], or with attention the encoder's states
    [M, N, C], with keys [M, N, A] and real [M, N], False = padding, None = none is.
    """

    start: Tensor
    values: Tensor
    keys: Tensor | None = None
    real: Tensor | None = None

    def select(self, sources: Tensor) -> "Source":
        """These of the sources [A] only."""
        keys = None if self.keys is None else self.keys[sources]
        real = None if self.real is None else self.real[sources]
        return Source(self.start[sources], self.values[sources], keys, real)


class RecurrentEncoder(nn.Module):
    """Embeddings and gated units that read the source forward (Cho) or both ways (Bahdanau)."""

    def __init__(self, config: RecurrentConfig) -> None:
        super().__init__()
        self.config, self.output_size = config, config.source_size
        self.tokens = nn.Embedding(config.vocab_size, config.embedding_size)
        self.units = GatedRecurrent(
            config.embedding_size,
            config.hidden_size,
            reset=config.reset,
            bidirectional=config.bidirectional,
        )

    def forward(self, ids: Tensor, real: Tensor | None = None) -> Tensor:
        """ids [M, N] to states [M, N, source_size]; where real is False the state stays."""
        return self.units(self.tokens(ids), real)


class RecurrentDecoder(nn.Module):
    """From a source and the target so far to the next token.

        s_i = unit([e(y_i-1), c_i], s_i-1)
        t_i = max over two of each of O [s_i, e(y_i-1), c_i]        logits = G t_i

    c_i: with attention the mean of the encoder's states that s_i-1 weighs, and s_0 = tanh(W h_1) of
    the backward states (the last where there are none); else c = tanh(V h_N), s_0 = tanh(W c). The
    start token stands for y_0. Source: Cho et al. 2014, appendix A.1, but that its decoder's
    candidate has the reset gate outside; Bahdanau et al. 2015, equation 4 and appendix A.2.
    """

    def __init__(self, config: RecurrentConfig) -> None:
        super().__init__()
        self.config = config
        hidden, context = config.hidden_size, config.context_size
        self.tokens = nn.Embedding(config.output_vocab_size, config.embedding_size)
        self.summary: nn.Linear | None = None
        self.attention: AdditiveAttention | None = None
        if config.attention:
            size = config.attention_size or hidden
            self.attention = AdditiveAttention(hidden, context, size)
        else:
            self.summary = Linear(config.source_size, hidden)
        self.start = Linear(hidden, hidden)
        self.unit = GatedRecurrent(config.embedding_size + context, hidden, reset=config.reset)
        inner = hidden + config.embedding_size + context
        self.readout = Linear(inner, 2 * config.readout_size)
        self.lm_head = Linear(config.readout_size, config.output_vocab_size)

    def read(self, states: Tensor, real: Tensor | None) -> Source:
        """The encoder's states [M, N, source_size], and which of them are no padding, as a Source.

        Padding carries states on, so both ends of a row hold the last state of each direction.
        """
        hidden = self.config.hidden_size
        forward, backward = states[:, -1, :hidden], states[:, 0, hidden:]
        if self.attention is not None:
            start = self.start(backward if self.config.bidirectional else forward).tanh()
            return Source(start, states, self.attention.keys(states), real)
        assert self.summary is not None
        summary = self.summary(torch.cat([forward, backward], -1)).tanh()
        return Source(self.start(summary).tanh(), summary)

    def step(self, ids: Tensor, state: Tensor, source: Source) -> tuple[Tensor, Tensor]:
        """(readout [R, L], the new state [R, H]) of the last tokens [R] and the state so far."""
        embedded = self.tokens(ids)
        context, _ = self._context(state, source)
        state = self.unit.step(torch.cat([embedded, context], -1), state)
        return self._maxout(state, embedded, context), state

    def run(self, ids: Tensor, source: Source) -> tuple[Tensor, Tensor | None]:
        """(readouts [R, S, L], attention [R, S, N] or None) of targets [R, S], as many as sources.

        The same as `step` by `step`, but that the readout is one product.
        """
        embedded, state = self.tokens(ids), source.start
        states, contexts, maps = [], [], []
        for word in embedded.unbind(1):
            context, weights = self._context(state, source)
            state = self.unit.step(torch.cat([word, context], -1), state)
            states.append(state)
            contexts.append(context)
            maps.append(weights)
        if not states:
            return embedded.new_zeros(*ids.shape, self.config.readout_size), None
        found = self._maxout(torch.stack(states, 1), embedded, torch.stack(contexts, 1))
        return found, torch.stack(maps, 1) if self.attention is not None else None  # type: ignore[arg-type]

    def _context(self, state: Tensor, source: Source) -> tuple[Tensor, Tensor | None]:
        """(context [R, C], attention [R, N] or None) of the states so far [R, H]."""
        sources = len(source.values)
        each = len(state) // max(sources, 1)
        if self.attention is None:
            return source.values.repeat_interleave(each, 0), None
        assert source.keys is not None
        queries = state.reshape(sources, each, state.shape[1])
        found = self.attention(queries, source.keys, source.values, source.real)
        return found[0].flatten(0, 1), found[1].flatten(0, 1)

    def _maxout(self, state: Tensor, embedded: Tensor, context: Tensor) -> Tensor:
        """Goodfellow et al. 2013, of neighbouring pairs: [..., 2 L] to [..., L]."""
        pairs = self.readout(torch.cat([state, embedded, context], -1))
        return pairs.unflatten(-1, (-1, 2)).amax(-1)


class RecurrentSeq2Seq(SourceToTarget):
    """Encoder and decoder of gated units, from RecurrentConfig."""

    encoder: RecurrentEncoder
    decoder: RecurrentDecoder

    def __init__(self, config: RecurrentConfig) -> None:
        super().__init__(config, RecurrentEncoder(config), RecurrentDecoder(config))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Matrices from N(0, 0.01), biases 0; recurrent and attention ones as their layers say."""
        for part in self.modules():
            if isinstance(part, (nn.Linear, nn.Embedding)):
                nn.init.normal_(part.weight, std=0.01)
            if isinstance(part, nn.Linear) and part.bias is not None:
                nn.init.zeros_(part.bias)
        for part in self.modules():
            if isinstance(part, (GatedRecurrent, AdditiveAttention)):
                part.reset_parameters()

    def read(self, ids: Tensor, real: Tensor | None) -> Source:
        """Source ids [M, N], False in real [M, N] at padding, as what the decoder reads of them."""
        return self.decoder.read(self.encoder(ids, real), real)

    def run(
        self,
        source: Tensor,
        attention_mask: Tensor | None,
        ids: Tensor,
        output_attentions: bool,
        *,
        logits: bool = True,
    ) -> ModelOutput:
        if output_attentions and self.decoder.attention is None:
            raise ArgumentError("output_attentions is set; a model without attention has no maps")
        if not source.shape[1]:
            raise ArgumentError("input_ids has no column; pass at least one token")
        real = real_positions(attention_mask, source)
        states = self.encoder(source, real)
        hidden, maps = self.decoder.run(ids, self.decoder.read(states, real))
        out = ModelOutput(last_hidden_state=hidden, encoder_last_hidden_state=states)
        if logits:
            out.logits = self.decoder.lm_head(hidden)
        if output_attentions and maps is not None:
            out.cross_attentions = (maps[:, None],)
        return out
