"""Token embeddings and the two absolute position codes of the first Transformers.

Shapes: ids, positions [R, S]; embeddings [R, S, E].
"""

import math

import torch
from torch import Tensor, nn

from ..config import ModelConfig


def sinusoids(length: int, size: int) -> Tensor:
    """The table [length, size] of Vaswani et al. 2017, section 3.5.

    Column 2i is sin(position / 10000^(2i / size)), column 2i + 1 its cosine (interleaved).
    """
    position = torch.arange(length, dtype=torch.float64)[:, None]
    column = torch.arange(size)
    angle = position * torch.exp(-(column // 2) * 2 * math.log(10000.0) / size)
    return torch.where(column % 2 == 0, angle.sin(), angle.cos()).float()


class Embedding(nn.Module):
    """Token embeddings, scaled when the configuration says so, plus position codes and dropout."""

    def __init__(self, config: ModelConfig, tokens: nn.Embedding) -> None:
        super().__init__()
        self.tokens = tokens
        self.scale = math.sqrt(config.hidden_size) if config.scale_embedding else 1.0
        self.dropout = nn.Dropout(config.dropout)
        self.positions: nn.Embedding | None = None
        self.table: Tensor | None
        self.register_buffer("table", None)
        if config.positions == "learned":
            self.positions = nn.Embedding(config.max_positions, config.hidden_size)
        elif config.positions == "sinusoidal":
            shape = (config.max_positions, config.hidden_size)
            on_meta = torch.get_default_device().type == "meta"  # then shapes are all there is
            table = torch.empty(shape) if on_meta else sinusoids(*shape)
            self.register_buffer("table", table, persistent=False)

    def forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        """ids and their absolute positions [R, S] (or [S]) to embeddings [R, S, E]."""
        x = self.tokens(ids)
        if self.scale != 1.0:
            x = x * self.scale
        if self.positions is not None:
            x = x + self.positions(positions)
        elif self.table is not None:
            x = x + self.table[positions].to(x.dtype)
        return self.dropout(x)
