"""Feeding a model token by token, so that nothing of the past is computed or moved twice.

Rows: B sentences times k beams. Beam j of sentence b owns cache row b * k + j for as long as the
sentence is open. A prompt is computed once and written in row b * k; every beam reads it there.
When beams change hypotheses only `beam_index`, a table of row numbers, is gathered anew.

Shapes: tokens, parents [R]; logits [R, V]; cache keys and values [B * k, Hkv, T, D] per layer;
beam_index [R, T].
"""

import torch
from torch import Tensor

from tilewise_kernels.op import autocast_dtype

from ..layers import LayerCache, Memory
from ..models import Decoder
from ..models.recurrent import RecurrentDecoder, Source


def pad_right(rows: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Ragged ids as one tensor [B, longest], 0 in the empty places, and the lengths [B]."""
    lengths = torch.tensor([len(row) for row in rows], device=device)
    padded = torch.zeros(len(rows), max(len(row) for row in rows), dtype=torch.int64)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = torch.tensor(row)
    return padded.to(device), lengths


class CachedSteps:
    """Steps of a decoder with the keys and values of the past kept.

    memories: each layer's keys and values of the encoder, one row per sentence, or None.
    """

    def __init__(
        self,
        decoder: Decoder,
        prompts: list[list[int]],
        beams: int,
        new_tokens: int,
        memories: list[Memory] | None,
    ) -> None:
        weight = decoder.embedding.tokens.weight
        config = decoder.config
        self.decoder, self.beams, self.memories = decoder, beams, memories
        self.prompts, self.prompt_lengths = pad_right(prompts, weight.device)
        self.longest = self.prompts.shape[1]
        capacity = self.longest + new_tokens - 1  # the last token is never fed back
        # Stored by position, so that what a beam reads of one is a single run of memory.
        shape = (len(prompts) * beams, capacity, config.kv_heads, config.head_size)
        dtype = autocast_dtype(weight.device) or weight.dtype  # of the keys the layers will make
        self.stored = [
            (
                weight.new_empty(shape, dtype=dtype).transpose(1, 2),
                weight.new_empty(shape, dtype=dtype).transpose(1, 2),
            )
            for _ in decoder.layers
        ]
        first = torch.arange(len(prompts), device=weight.device) * beams
        self.rows = torch.arange(shape[0], device=weight.device)
        self.lengths = self.prompt_lengths.repeat_interleave(beams)
        self.beam_index: Tensor | None = None
        if beams > 1:
            owner = first.repeat_interleave(beams).to(torch.int32)
            self.beam_index = owner[:, None].repeat(1, capacity)

    def prompt(self) -> Tensor:
        """Logits [B, V] of the token after each prompt."""
        rows = self.rows[:: self.beams]
        cache = self._layers(rows, self.prompt_lengths, None, prompt=True)
        positions = torch.arange(self.longest, device=rows.device)
        hidden = self.decoder.run(
            self.decoder.embedding(self.prompts, positions),
            positions,
            memory=self.memories,
            cache=cache,
        )
        last = hidden[torch.arange(len(rows), device=rows.device), self.prompt_lengths - 1]
        return self.decoder.logits(last)

    def step(self, tokens: Tensor, parents: Tensor) -> Tensor:
        """Append tokens[r] to the hypothesis of row parents[r]: logits [R, V] of what follows."""
        positions = self.lengths[parents]
        self.lengths = positions + 1
        self.longest += 1
        if self.beam_index is not None:
            self.beam_index = self.beam_index[parents]
            own = self.rows.to(torch.int32)[:, None]
            self.beam_index.scatter_(1, positions[:, None], own)
        cache = self._layers(self.rows, self.lengths, self.beam_index, prompt=False)
        hidden = self.decoder.run(
            self.decoder.embedding(tokens[:, None], positions[:, None]),
            positions[:, None],
            memory=self.memories,
            cache=cache,
        )
        return self.decoder.logits(hidden[:, 0])

    def keep(self, sentences: Tensor) -> None:
        """Go on with these of the open sentences only [A]; the others leave the batch."""
        rows = sentences[:, None] * self.beams + torch.arange(self.beams, device=sentences.device)
        rows = rows.flatten()
        if self.beam_index is None:  # from here on row r no longer reads cache row r
            capacity = self.stored[0][0].shape[2]
            self.beam_index = self.rows.to(torch.int32)[:, None].repeat(1, capacity)
        self.rows, self.lengths = self.rows[rows], self.lengths[rows]
        self.beam_index = self.beam_index[rows]
        if self.memories is not None:
            self.memories = [memory.select(sentences) for memory in self.memories]

    def _layers(
        self, rows: Tensor, lengths: Tensor, beam_index: Tensor | None, prompt: bool
    ) -> list[LayerCache]:
        if beam_index is not None:
            index = beam_index[:, : self.longest]
            return [LayerCache(*kept, rows, lengths, index, prompt) for kept in self.stored]
        used = slice(0, self.longest)
        return [
            LayerCache(keys[:, :, used], values[:, :, used], rows, lengths, None, prompt)
            for keys, values in self.stored
        ]


class UncachedSteps:
    """The same steps with the whole past computed again each time: slow, and simple to trust."""

    def __init__(
        self,
        decoder: Decoder,
        prompts: list[list[int]],
        beams: int,
        new_tokens: int,
        memories: list[Memory] | None,
    ) -> None:
        device = decoder.embedding.tokens.weight.device
        self.decoder, self.beams, self.memories = decoder, beams, memories
        self.past, self.lengths = pad_right(prompts, device)

    def prompt(self) -> Tensor:
        """Logits [B, V] of the token after each prompt."""
        logits = self._last_logits()
        self.past = self.past.repeat_interleave(self.beams, 0)
        self.lengths = self.lengths.repeat_interleave(self.beams, 0)
        return logits

    def step(self, tokens: Tensor, parents: Tensor) -> Tensor:
        """Append tokens[r] to the hypothesis of row parents[r]: logits [R, V] of what follows."""
        past = self.past[parents]
        self.past = torch.cat([past, past.new_zeros(len(past), 1)], 1)
        self.past.scatter_(1, self.lengths[:, None], tokens[:, None])
        self.lengths = self.lengths + 1
        return self._last_logits()

    def keep(self, sentences: Tensor) -> None:
        """Go on with these of the open sentences only [A]."""
        rows = sentences[:, None] * self.beams + torch.arange(self.beams, device=sentences.device)
        self.past, self.lengths = self.past[rows.flatten()], self.lengths[rows.flatten()]
        if self.memories is not None:
            self.memories = [memory.select(sentences) for memory in self.memories]

    def _last_logits(self) -> Tensor:
        positions = torch.arange(self.past.shape[1], device=self.past.device)
        x = self.decoder.embedding(self.past, positions)
        hidden = self.decoder.run(x, key_lengths=self.lengths, memory=self.memories)
        last = hidden[torch.arange(len(hidden), device=hidden.device), self.lengths - 1]
        return self.decoder.logits(last)


class RecurrentSteps:
    """Steps of a recurrent decoder: all of the past is one state [R, H], moved with its beam.

    prompts: the start token of each source.
    """

    def __init__(
        self, decoder: RecurrentDecoder, prompts: list[list[int]], beams: int, source: Source
    ) -> None:
        self.decoder, self.beams, self.source = decoder, beams, source
        self.tokens = torch.tensor(prompts, device=source.start.device)
        self.state = source.start

    def prompt(self) -> Tensor:
        """Logits [B, V] of the token after each start token."""
        readout, state = self.decoder.step(self.tokens[:, 0], self.state, self.source)
        self.state = state.repeat_interleave(self.beams, 0)
        return self.decoder.lm_head(readout)

    def step(self, tokens: Tensor, parents: Tensor) -> Tensor:
        """Append tokens[r] to the hypothesis of row parents[r]: logits [R, V] of what follows."""
        readout, self.state = self.decoder.step(tokens, self.state[parents], self.source)
        return self.decoder.lm_head(readout)

    def keep(self, sentences: Tensor) -> None:
        """Go on with these of the open sentences only [A]."""
        self.state = self.state.unflatten(0, (-1, self.beams))[sentences].flatten(0, 1)
        self.source = self.source.select(sentences)


class UncachedRecurrentSteps(RecurrentSteps):
    """The same with the whole past read again each time; here `state` is the ids [R, L] so far."""

    def prompt(self) -> Tensor:
        """Logits [B, V] of the token after each start token."""
        logits = self._last_logits(self.tokens, 1)
        self.state = self.tokens.repeat_interleave(self.beams, 0)
        return logits

    def step(self, tokens: Tensor, parents: Tensor) -> Tensor:
        """Append tokens[r] to the hypothesis of row parents[r]: logits [R, V] of what follows."""
        self.state = torch.cat([self.state[parents], tokens[:, None]], 1)
        return self._last_logits(self.state, self.beams)

    def _last_logits(self, ids: Tensor, beams: int) -> Tensor:
        rows = torch.arange(len(ids), device=ids.device) // beams
        readouts, _ = self.decoder.run(ids, self.source.select(rows))
        return self.decoder.lm_head(readouts[:, -1])


Steps = CachedSteps | UncachedSteps | RecurrentSteps
