"""What models are assembled from: ModelConfig of every Transformer, RecurrentConfig of the rest."""

import dataclasses
import warnings
from dataclasses import dataclass
from typing import Any, Literal, get_args

from .errors import ConfigError

Activation = Literal["gelu", "gelu_tanh", "relu", "silu", "quick_gelu"]
Positions = Literal["learned", "sinusoidal", "rotary", "alibi", "relative", "none"]
ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu", "quick_gelu")
MAX_MATRIX = 2**56  # elements; their bytes still fit 64 bits
MAX_TABLE = 2**26  # elements of a table of sinusoids, which no checkpoint's size bounds


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes and choices of one Transformer; a family file translates its config.json into this.

    Raises ConfigError when a value is out of range or two values contradict each other.
    """

    model_type: str
    vocab_size: int
    target_vocab_size: int | None = None  # of a seq2seq model's decoder; None: one vocabulary
    hidden_size: int
    num_heads: int
    num_kv_heads: int | None = None  # key and value heads; None: as many as num_heads
    head_dim: int | None = None  # None: hidden_size / num_heads
    ffn_size: int
    encoder_layers: int = 0
    decoder_layers: int = 0
    encoder_heads: int | None = None  # where a seq2seq model's encoder differs from its decoder
    encoder_ffn_size: int | None = None
    max_positions: int

    # A layer
    activation: Activation = "relu"
    gated: bool = False  # the activation multiplies a second linear map (GLU variants)
    norm: Literal["layer", "rms"] = "layer"
    norm_position: Literal["pre", "post"] = "pre"
    norm_eps: float = 1e-5
    norm_weight: bool = True  # False: norms have no parameters at all
    norm_bias: bool = True  # of LayerNorm; RMSNorm has none
    first_norm: bool = True  # False: the first layer attends to the embeddings as they are
    final_norm: bool = True  # a norm after the last layer of each stack
    residual_from_norm: bool = False  # pre-norm residuals carry the normalised input
    parallel_residual: bool = False  # x + attention(norm1(x)) + ffn(norm2(x))
    attention_bias: bool = True
    qkv_bias: bool = True  # False: of attention, the output map alone has a bias
    ffn_bias: bool = True
    attention_scale: float | None = None  # multiplies q k^T; None: 1 / sqrt(head_dim)
    attention_scale_by_layer: bool = False  # divide the scale by the layer's number, from 1
    windows: tuple[int | None, ...] = ()  # per layer: the keys seen on either side; None: all

    # Positions
    positions: Positions = "learned"
    position_offset: int = 0  # the row of the table that the first token takes
    # What counts as a position: every column, what attention_mask holds, or what is not
    # pad_token_id; what does not count takes row position_offset - 1.
    position_count: Literal["columns", "mask", "tokens"] = "columns"
    sinusoid: Literal["interleaved", "halves", "stretched"] = "interleaved"
    rotary_dim: int | None = None  # None: all of head_dim
    rotary_base: float = 10_000.0
    rotary_base_local: float | None = None  # in layers that have a window; None: the same
    rotary_scaling: Literal["none", "linear", "llama3"] = "none"
    rotary_factor: float = 1.0
    rotary_low_factor: float = 1.0
    rotary_high_factor: float = 4.0
    rotary_original_positions: int = 8192
    relative_buckets: int = 32
    relative_distance: int = 128
    relative_by_layer: bool = False  # a table of each layer, else one of each stack

    # Embeddings and the output
    embedding_size: int | None = None  # None: hidden_size; else a linear map leads to it and back
    token_types: int = 0  # kinds of segment, each with an embedding
    embedding_norm: bool = False
    scale_embedding: bool = False  # embeddings times sqrt(hidden_size)
    train_padding: bool = True  # False: pad_token_id as input gives its embedding no gradient
    share_embeddings: bool = True  # encoder and decoder have one matrix
    tie_embeddings: bool = True  # the output projection is the embedding matrix
    output_head: bool = True  # False: a decoder gives hidden states, and no logits
    output_bias: bool = False
    output_scale: float = 1.0  # multiplies the hidden states before the output projection
    masked_head: Activation | None = None  # an encoder's Linear, activation, norm before the output
    masked_head_bias: bool = True
    pooler: bool = False  # an encoder's tanh(Linear(first token))
    next_sentence: bool = False  # two logits of the pooled first token

    dropout: float = 0.0
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: tuple[int, ...] = ()
    decoder_start_token_id: int | None = None
    wrap_labels: bool = False  # a decoder's input from labels starts with their last token

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "num_heads", "ffn_size", "max_positions"):
            _whole(name, getattr(self, name), 1, 2**31 - 1)
        for name in ("encoder_layers", "decoder_layers"):
            _whole(name, getattr(self, name), 0, 1_000)
        if self.encoder_layers + self.decoder_layers == 0:
            raise ConfigError("encoder_layers and decoder_layers are both 0: a model needs layers")
        for name in ("encoder_heads", "encoder_ffn_size", "embedding_size", "target_vocab_size"):
            if getattr(self, name) is not None:
                _whole(name, getattr(self, name), 1, 2**31 - 1)
        self._check_heads()
        for name, choices in _CHOICES.items():
            _one_of(name, getattr(self, name), choices)
        self._check_positions()
        _number("norm_eps", self.norm_eps, 0.0, 1.0)
        _number("dropout", self.dropout, 0.0, 1.0)
        _number("output_scale", self.output_scale, -1e6, 1e6)
        _whole("token_types", self.token_types, 0, 2**20)
        if self.attention_scale is not None:
            _number("attention_scale", self.attention_scale, -1e6, 1e6)
        if self.masked_head is not None:
            _one_of("masked_head", self.masked_head, ACTIVATIONS)
        self._check_combinations()
        self._check_size()
        _check_special_ids(self)

    def _check_heads(self) -> None:
        if self.head_dim is not None:
            _whole("head_dim", self.head_dim, 1, 2**16)
        for heads in (self.num_heads, self.encoder_heads or self.num_heads):
            if self.head_dim is None and self.hidden_size % heads:
                raise ConfigError(
                    f"hidden_size {self.hidden_size} does not divide into {heads} heads"
                )
        if self.num_kv_heads is not None:
            _whole("num_kv_heads", self.num_kv_heads, 1, self.num_heads)
            if self.num_heads % self.num_kv_heads:
                raise ConfigError(
                    f"num_heads {self.num_heads} is no multiple of num_kv_heads {self.num_kv_heads}"
                )

    def _check_positions(self) -> None:
        """Offsets, rotary angles, buckets and windows."""
        _whole("position_offset", self.position_offset, 0, 2**20)
        if self.positions == "sinusoidal":
            rows = self.max_positions + self.position_offset
            if rows * self.hidden_size > MAX_TABLE:
                raise ConfigError(
                    f"max_positions is {self.max_positions}; with hidden_size {self.hidden_size} "
                    f"its sinusoids are more than {MAX_TABLE:,} numbers"
                )
        rotated = self.head_size if self.rotary_dim is None else self.rotary_dim
        if self.positions == "rotary" and (rotated % 2 or not 0 < rotated <= self.head_size):
            raise ConfigError(
                f"rotary_dim is {rotated}; it must be even and at most the head's {self.head_size}"
            )
        for name in ("rotary_base", "rotary_base_local", "rotary_factor", "rotary_low_factor"):
            if getattr(self, name) is not None:
                _number(name, getattr(self, name), 1e-6, 1e15)
        _number("rotary_high_factor", self.rotary_high_factor, 1e-6, 1e15)
        if self.rotary_scaling == "llama3" and self.rotary_high_factor <= self.rotary_low_factor:
            raise ConfigError(
                f"rotary_high_factor is {self.rotary_high_factor}; it must be above "
                f"rotary_low_factor {self.rotary_low_factor}"
            )
        _whole("rotary_original_positions", self.rotary_original_positions, 1, 2**31 - 1)
        _whole("relative_buckets", self.relative_buckets, 4, 2**20)
        _whole("relative_distance", self.relative_distance, self.relative_buckets // 2 + 1, 2**31)
        layers = (0, max(self.encoder_layers, self.decoder_layers))
        if not isinstance(self.windows, tuple) or len(self.windows) not in layers:
            raise ConfigError(
                f"windows is {self.windows!r}; it must be a tuple of one number or None per layer"
            )
        for window in self.windows:
            if window is not None:
                _whole("windows", window, 0, 2**31 - 1)

    def _check_combinations(self) -> None:
        """What the stack does not do together."""
        for name, usual in (
            ("residual_from_norm", False),
            ("parallel_residual", False),
            ("first_norm", True),
        ):
            if getattr(self, name) != usual and self.norm_position == "post":
                raise ConfigError(f"{name} is {getattr(self, name)}; it needs norm_position 'pre'")
        if self.parallel_residual and self.is_seq2seq:
            raise ConfigError("parallel_residual is set; seq2seq models have none")
        if self.target_vocab_size is not None and self.share_embeddings:
            raise ConfigError("target_vocab_size is set; share_embeddings must then be False")
        if self.position_count == "tokens" and self.pad_token_id is None:
            raise ConfigError("position_count is 'tokens'; it needs a pad_token_id")
        heads = self.masked_head is not None or self.pooler or self.next_sentence
        if heads and self.decoder_layers:
            raise ConfigError("masked_head, pooler and next_sentence are for encoders alone")
        if self.next_sentence and not self.pooler:
            raise ConfigError("next_sentence is set; it needs the pooler")

    def _check_size(self) -> None:
        inner = self.head_size * (self.num_heads + 2 * self.kv_heads)
        widest = max(self.largest_vocab_size, self.max_positions, self.ffn_size, inner)
        if widest * max(self.hidden_size, self.embedding_size or 0) > MAX_MATRIX:
            raise ConfigError(
                f"hidden_size {self.hidden_size} makes a matrix of {widest} rows, which no memory "
                "holds; check the sizes"
            )

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @property
    def head_size(self) -> int:
        return self.head_dim or self.hidden_size // self.num_heads

    @property
    def output_vocab_size(self) -> int:
        """Of the decoder, where there is one."""
        return self.target_vocab_size or self.vocab_size

    @property
    def largest_vocab_size(self) -> int:
        return max(self.vocab_size, self.output_vocab_size)

    @property
    def own_output(self) -> bool:
        """Whether the output projection has a matrix of its own."""
        return self.output_head and not self.tie_embeddings

    @property
    def is_seq2seq(self) -> bool:
        return bool(self.encoder_layers and self.decoder_layers)

    @property
    def position_limit(self) -> int | None:
        """The longest input, where a table of positions has an end."""
        return self.max_positions if self.positions in ("learned", "sinusoidal") else None

    @property
    def of_encoder(self) -> "ModelConfig":
        """The same with an encoder's own heads and inner size."""
        heads, ffn_size = self.encoder_heads, self.encoder_ffn_size
        if heads is None and ffn_size is None:
            return self
        return dataclasses.replace(
            self,
            num_heads=heads or self.num_heads,
            ffn_size=ffn_size or self.ffn_size,
            encoder_heads=None,
            encoder_ffn_size=None,
        )

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass(frozen=True, kw_only=True)
class RecurrentConfig:
    """Sizes and choices of one recurrent encoder-decoder (Cho et al. 2014, Bahdanau et al. 2015).

    Raises ConfigError when a value is out of range.
    """

    model_type: str = "tilewise-recurrent"
    vocab_size: int
    target_vocab_size: int | None = None  # None: as large as the source's; never one matrix
    embedding_size: int
    hidden_size: int  # of one direction
    readout_size: int  # maxout units before the output projection, the larger of two each
    bidirectional: bool = True  # the encoder reads the source both ways
    attention: bool = True  # False: the decoder sees one summary of the whole source
    attention_size: int | None = None  # None: hidden_size
    reset: Literal["before", "after"] = "before"  # the recurrent product; after: as cuDNN does

    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: tuple[int, ...] = ()
    decoder_start_token_id: int | None = None

    def __post_init__(self) -> None:
        _one_of("model_type", self.model_type, ("tilewise-recurrent",))
        for name in ("vocab_size", "embedding_size", "hidden_size", "readout_size"):
            _whole(name, getattr(self, name), 1, 2**31 - 1)
        for name in ("target_vocab_size", "attention_size"):
            if getattr(self, name) is not None:
                _whole(name, getattr(self, name), 1, 2**31 - 1)
        _one_of("reset", self.reset, ("before", "after"))
        _one_of("bidirectional", self.bidirectional, _YES_NO)
        _one_of("attention", self.attention, _YES_NO)
        inner = max(self.embedding_size, self.hidden_size, self.readout_size)
        rows = max(self.largest_vocab_size, 3 * inner, self.attention_size or 0)
        if rows * 4 * inner > MAX_MATRIX:
            raise ConfigError(f"sizes of {rows} and {inner} make a matrix that no memory holds")
        _check_special_ids(self)

    @property
    def source_size(self) -> int:
        """Of an encoder's state at one position."""
        return self.hidden_size * (2 if self.bidirectional else 1)

    @property
    def context_size(self) -> int:
        """Of what the decoder reads of the source at each step."""
        return self.source_size if self.attention else self.hidden_size

    @property
    def output_vocab_size(self) -> int:
        """Of the decoder."""
        return self.target_vocab_size or self.vocab_size

    @property
    def largest_vocab_size(self) -> int:
        return max(self.vocab_size, self.output_vocab_size)

    @property
    def is_seq2seq(self) -> bool:
        return True

    @property
    def position_limit(self) -> None:
        """The longest input: there is none."""

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


AnyConfig = ModelConfig | RecurrentConfig
_YES_NO = (True, False)
_CHOICES: dict[str, tuple[str | bool, ...]] = {
    "activation": ACTIVATIONS,
    "norm": ("layer", "rms"),
    "norm_position": ("pre", "post"),
    "positions": get_args(Positions),
    "position_count": ("columns", "mask", "tokens"),
    "sinusoid": ("interleaved", "halves", "stretched"),
    "rotary_scaling": ("none", "linear", "llama3"),
    **{
        field.name: _YES_NO
        for field in dataclasses.fields(ModelConfig)
        if isinstance(field.default, bool)
    },
}


def _whole(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ConfigError(f"{name} is {value!r}; it must be a whole number from {low} to {high}")


def _number(name: str, value: object, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise ConfigError(f"{name} is {value!r}; it must be a number from {low} to {high}")


def _one_of(name: str, value: object, choices: tuple[str | bool, ...]) -> None:
    if type(value) is not type(choices[0]) or value not in choices:
        raise ConfigError(f"{name} is {value!r}; it must be one of {', '.join(map(str, choices))}")


def _check_special_ids(config: AnyConfig) -> None:
    for name in ("pad_token_id", "bos_token_id", "decoder_start_token_id"):
        if getattr(config, name) is not None:
            _whole(name, getattr(config, name), 0, config.largest_vocab_size - 1)
    if not isinstance(config.eos_token_id, tuple):
        raise ConfigError(f"eos_token_id is {config.eos_token_id!r}; it must be a tuple of ids")
    for token in config.eos_token_id:
        _whole("eos_token_id", token, 0, config.largest_vocab_size - 1)


def usable_ids(name: str, value: object, vocab_size: int) -> tuple[int, ...]:
    """The special ids of a config.json (null, one id or a list) that the vocabulary has.

    Small variants of a model often keep the ids of the large one, such as GPT-2's 50256. An id that
    no token has is never generated, so leaving it out, with a warning, changes nothing. Raises
    ConfigError for what is no id at all.
    """
    if name == "pad_token_id" and value == -1:  # none, as sentencepiece and the first LLaMA say it
        return ()
    several = isinstance(value, (list, tuple))
    ids: Any = value if several else () if value is None else (value,)
    for token in ids:
        _whole(name, token, 0, 2**31 - 1)
    absent = [token for token in ids if token >= vocab_size]
    if absent:
        warnings.warn(
            f"{name} {absent} is left out: the vocabulary is 0..{vocab_size - 1}", stacklevel=2
        )
    return tuple(dict.fromkeys(token for token in ids if token < vocab_size))
