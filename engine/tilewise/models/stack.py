"""What an encoder and a decoder have in common: embeddings, layers, positions, a last norm.

Shapes: ids [R, S]; hidden [R, S, E].
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Lock
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..config import ModelConfig
from ..layers import (
    Embedding,
    LayerCache,
    Linear,
    Memory,
    StackPositions,
    TransformerLayer,
    norm_of,
)


@dataclass
class Maps:
    """Attention probabilities asked for, one [R, H, S, keys] per layer: to itself, to a memory."""

    own: list[Tensor] = field(default_factory=list)
    memory: list[Tensor] = field(default_factory=list)


class Stack(nn.Module):
    """Embeddings and the layers of one side of a model."""

    def __init__(
        self,
        config: ModelConfig,
        tokens: nn.Embedding,
        *,
        layers: int,
        causal: bool,
        cross_attention: bool = False,
    ) -> None:
        super().__init__()
        self.config, self.causal = config, causal
        self.embedding = Embedding(config, tokens)
        self.position_terms = StackPositions(config, causal=causal)
        self.layers = nn.ModuleList(
            TransformerLayer(config, number=i + 1, cross_attention=cross_attention)
            for i in range(layers)
        )
        self.norm = norm_of(config) if config.final_norm else None
        self.project: nn.Linear | None = None
        if causal and config.embedding_size not in (None, config.hidden_size):
            self.project = Linear(config.hidden_size, config.embedding_size, bias=False)

    @property
    def output_size(self) -> int:
        """The last dim of what `run` gives."""
        return self.config.hidden_size if self.project is None else self.project.out_features

    def run(
        self,
        x: Tensor,
        positions: Tensor | None = None,
        *,
        counted: Tensor | None = None,
        mask: Tensor | None = None,
        key_lengths: Tensor | None = None,
        memory: Tensor | Sequence[Memory] | None = None,
        memory_mask: Tensor | None = None,
        memory_lengths: Tensor | None = None,
        cache: Sequence[LayerCache] | None = None,
        maps: Maps | None = None,
    ) -> Tensor:
        """Embeddings [R, S, E] through the layers: [R, S, E], or embedding_size from a decoder.

        positions [S] or [R, S]: the columns that x stands at; None: 0 to S - 1. counted: see
        StackPositions. memory: the encoder's output [M, N, E], or each layer's keys and values of
        it. maps: filled in order.
        """
        keys = x.shape[1]
        if positions is None:
            positions = torch.arange(keys, device=x.device)
        elif cache is not None and not cache[0].prompt:
            index = cache[0].beam_index
            keys = cache[0].keys.shape[2] if index is None else index.shape[1]
        terms = self.position_terms(positions, keys, x.dtype, counted)
        for i, layer in enumerate(self.layers):
            x = layer(
                x,
                mask=mask,
                causal=self.causal,
                key_lengths=key_lengths,
                memory=memory if memory is None or isinstance(memory, Tensor) else memory[i],
                memory_mask=memory_mask,
                memory_lengths=memory_lengths,
                cache=None if cache is None else cache[i],
                terms=terms,
                maps=None if maps is None else maps.own,
                memory_maps=None if maps is None else maps.memory,
            )
        x = x if self.norm is None else self.norm(x)
        return x if self.project is None else self.project(x)


def token_embedding(config: ModelConfig, *, target: bool = False) -> nn.Embedding:
    """The embedding matrix of a model, or of the second vocabulary of a seq2seq model."""
    rows = config.output_vocab_size if target else config.vocab_size
    padding = None if config.train_padding else config.pad_token_id
    if padding is not None and padding >= rows:  # the other vocabulary's
        padding = None
    return nn.Embedding(rows, config.embedding_size or config.hidden_size, padding_idx=padding)


_modes = Lock()
_inside: WeakKeyDictionary[nn.Module, tuple[int, list[nn.Module]]] = WeakKeyDictionary()


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode inside the block; afterwards each part is in the mode it was in.

    Threads can be inside together: the first one in sets the mode, the last one out restores it.
    """
    with _modes:
        count, training = _inside.get(module, (0, []))
        if not count:
            training = [part for part in module.modules() if part.training]
            module.eval()
        _inside[module] = count + 1, training
    try:
        yield
    finally:
        with _modes:
            count, training = _inside.pop(module)
            if count > 1:
                _inside[module] = count - 1, training
            else:
                for part in training:
                    part.training = True
