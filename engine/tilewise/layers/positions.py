"""Where a token stands: added to its embedding, turned into queries and keys, or into the scores.

Shapes: ids, positions [R, S] (positions also [S]); embeddings [R, S, E]; K keys.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import ModelConfig
from .linear import Linear
from .norm import norm_of

# -- added to embeddings ---------------------------------------------------------------------------


def sinusoids(length: int, size: int, form: str = "interleaved") -> Tensor:
    """The table [length, size] of Vaswani et al. 2017, section 3.5, in the form of

    "interleaved", the paper: column 2i is sin(position / 10000^(2i / size)), 2i + 1 its cosine;
    "halves", Marian: all sines, then all cosines; "stretched", tensor2tensor and fairseq: halves
    with exponent i / (size / 2 - 1), an odd last column 0.
    """
    position = torch.arange(length, dtype=torch.float64)[:, None]
    pairs = size // 2 if form == "stretched" else (size + 1) // 2
    last = max(size / 2 if form != "stretched" else size // 2 - 1, 1)
    angle = position * torch.exp(-torch.arange(pairs) * math.log(10000.0) / last)
    sines, cosines = angle.sin().float(), angle.cos().float()
    if form == "interleaved":
        table = torch.stack([sines, cosines], -1).flatten(1)[:, :size]
    else:
        table = torch.cat([sines, cosines[:, : size - pairs]], 1)
    return F.pad(table, (0, size - table.shape[1]))


class Embedding(nn.Module):
    """Embeddings of tokens, of their positions and segments; then norm and dropout.

    Tokens are scaled when the configuration says so, and mapped to the hidden size where their
    embeddings have another.
    """

    def __init__(self, config: ModelConfig, tokens: nn.Embedding) -> None:
        super().__init__()
        size = config.hidden_size
        self.config = config
        self.tokens = tokens
        self.scale = math.sqrt(size) if config.scale_embedding else 1.0
        self.project: nn.Linear | None = None
        if config.embedding_size is not None and config.embedding_size != size:
            self.project = Linear(config.embedding_size, size, bias=False)
        self.positions: nn.Embedding | None = None
        self.table: Tensor | None
        self.register_buffer("table", None)
        rows = config.max_positions + config.position_offset
        if config.positions == "learned":
            fixed = config.position_count == "tokens" and not config.train_padding
            padding = config.position_offset - 1 if fixed else None
            self.positions = nn.Embedding(rows, size, padding_idx=padding)
        elif config.positions == "sinusoidal":
            on_meta = torch.get_default_device().type == "meta"  # then shapes are all there is
            table = torch.empty(rows, size) if on_meta else sinusoids(rows, size, config.sinusoid)
            self.register_buffer("table", table, persistent=False)
        self.token_types = nn.Embedding(config.token_types, size) if config.token_types else None
        self.norm = norm_of(config) if config.embedding_norm else None
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, ids: Tensor, positions: Tensor, token_type_ids: Tensor | None = None
    ) -> Tensor:
        """ids and their positions [R, S] (or [S]) to embeddings [R, S, E].

        token_type_ids [R, S]: each token's segment; None: all 0.
        """
        x = self.tokens(ids)
        if self.scale != 1.0:
            x = x * self.scale
        if self.project is not None:
            x = self.project(x)
        offset = self.config.position_offset
        if self.positions is not None:
            x = x + self.positions(positions + offset if offset else positions)
        elif self.table is not None:
            x = x + self.table[positions + offset].to(x.dtype)
        if self.token_types is not None:
            kinds = torch.zeros_like(ids) if token_type_ids is None else token_type_ids
            x = x + self.token_types(kinds)
        return self.dropout(x if self.norm is None else self.norm(x))

    def counted(self, ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """The positions of ids [R, S]: [S], or [R, S] where only some columns count."""
        how = self.config.position_count
        if how == "tokens":
            counts = ids.ne(self.config.pad_token_id or 0)
        elif how == "columns" or attention_mask is None:
            return torch.arange(ids.shape[1], device=ids.device)
        else:
            counts = attention_mask.ne(0)
        return counts.cumsum(1) * counts - 1


# -- turned into queries and keys, or scores -------------------------------------------------------


class PositionTerms(NamedTuple):
    """What the layers of a stack make of positions, computed once for all of them.

    rotary, local_rotary: (cos, sin), each [S, rotary_dim / 2] or [R, S, rotary_dim / 2]; the second
    is for layers with a window. bias [1 or R, H, S, K]: added to scores; in its place buckets
    [1 or R, S, K]: rows of each layer's own table. alibi_slopes [H].
    """

    rotary: tuple[Tensor, Tensor] | None = None
    local_rotary: tuple[Tensor, Tensor] | None = None
    bias: Tensor | None = None
    buckets: Tensor | None = None
    alibi_slopes: Tensor | None = None


class StackPositions(nn.Module):
    """The position terms of one stack: rotary angles, ALiBi slopes, relative bias, or none."""

    def __init__(self, config: ModelConfig, *, causal: bool) -> None:
        super().__init__()
        self.config, self.causal = config, causal
        self.relative = None
        if config.positions == "relative" and not config.relative_by_layer:
            self.relative = nn.Embedding(config.relative_buckets, config.num_heads)
        self.kept: dict[str, Tensor] = {}  # constants in float32, by name; no state, never cast

    def forward(
        self, positions: Tensor, keys: int, dtype: torch.dtype, counted: Tensor | None = None
    ) -> PositionTerms:
        """Terms of queries at positions [S] or [R, S] and keys at 0..keys - 1; rotary in dtype.

        counted [R, keys]: where ALiBi's keys stand when some columns do not count; what a query
        would add to its whole row of scores, softmax takes away.
        """
        config, kind = self.config, self.config.positions
        if kind == "rotary":
            angles = self._turned(positions, config.rotary_base, dtype)
            local = angles
            if config.rotary_base_local is not None:
                local = self._turned(positions, config.rotary_base_local, dtype)
            return PositionTerms(rotary=angles, local_rotary=local)
        if kind == "alibi":
            slopes = self._constant("slopes", positions.device, config.num_heads)
            if counted is not None and counted.dim() == 2:
                return PositionTerms(
                    bias=(slopes[:, None, None] * counted[:, None, None]).to(dtype)
                )
            return PositionTerms(alibi_slopes=slopes)
        if kind == "relative":
            key_at = torch.arange(keys, device=positions.device)
            distance = key_at - (positions if positions.dim() == 2 else positions[None])[..., None]
            buckets = self._buckets(distance)
            if self.relative is None:
                return PositionTerms(buckets=buckets)
            return PositionTerms(bias=self.relative(buckets).permute(0, 3, 1, 2))
        return PositionTerms()

    def _turned(self, positions: Tensor, base: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        angles = positions[..., None].float() * self._constant("angles", positions.device, base)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        return angles.to(wide).cos().to(dtype), angles.to(wide).sin().to(dtype)

    def _constant(self, name: str, device: torch.device, value: float) -> Tensor:
        key = f"{name} {value} {device}"
        if key not in self.kept:
            make = alibi_slopes(int(value)) if name == "slopes" else frequencies(self.config, value)
            self.kept[key] = make.to(device)
        return self.kept[key]

    def _buckets(self, distance: Tensor) -> Tensor:
        """Raffel et al. 2020, section 2.1: half the buckets one distance each, the rest by its log.

        distance: key minus query position. Bidirectional stacks halve the buckets by direction;
        causal ones know no key ahead.
        """
        count, ahead = self.config.relative_buckets, torch.zeros_like(distance)
        if self.causal:
            distance = (-distance).clamp(min=0)
        else:
            count //= 2
            ahead, distance = (distance > 0) * count, distance.abs()
        exact = count // 2
        ratio = torch.log(distance.clamp(min=1).float() / exact)
        ratio = ratio / math.log(self.config.relative_distance / exact)
        far = (exact + (ratio * (count - exact)).long()).clamp(max=count - 1)
        return ahead + torch.where(distance < exact, distance, far)


def frequencies(config: ModelConfig, base: float) -> Tensor:
    """Radians per position of each pair of rotated columns: float32 [rotary_dim / 2].

    base^(-2j / rotary_dim) (Su et al. 2021). "linear" scaling divides all by the factor; "llama3"
    those with fewer than low_factor turns in the original context, and less and less up to
    high_factor turns (Llama 3 herd of models 2024).
    """
    size = config.head_size if config.rotary_dim is None else config.rotary_dim
    plain = 1.0 / base ** (torch.arange(0, size, 2, dtype=torch.float32, device="cpu") / size)
    if config.rotary_scaling == "none":
        return plain
    if config.rotary_scaling == "linear":
        return plain / config.rotary_factor
    low, high = config.rotary_low_factor, config.rotary_high_factor
    turns = config.rotary_original_positions * plain / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)  # 1: as it is, 0: divided
    return plain * (kept + (1 - kept) / config.rotary_factor)


def alibi_slopes(heads: int) -> Tensor:
    """float32 [heads]: 2^(-8 (h + 1) / n) for n, the largest power of two in heads; the heads past
    it take every second one of 2n. Source: Press et al. 2022 and its released code.
    """
    whole = 2 ** (heads.bit_length() - 1)
    first = [2.0 ** (-8 * (h + 1) / whole) for h in range(whole)]
    rest = [2.0 ** (-4 * (2 * h + 1) / whole) for h in range(heads - whole)]
    return torch.tensor(first + rest, dtype=torch.float32, device="cpu")
