"""The one configuration that every model here is assembled from."""

import dataclasses
import warnings
from dataclasses import dataclass
from typing import Any, Literal

from .errors import ConfigError

Activation = Literal["gelu", "gelu_tanh", "relu", "silu", "quick_gelu"]
ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu", "quick_gelu")
MAX_MATRIX = 2**56  # elements; their bytes still fit 64 bits


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes and choices of one Transformer; a family file translates its config.json into this.

    Raises ConfigError when a value is out of range or two values contradict each other.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int | None = None  # key and value heads; None: as many as num_heads
    ffn_size: int
    encoder_layers: int = 0
    decoder_layers: int = 0
    max_positions: int
    activation: Activation = "relu"
    norm_position: Literal["pre", "post"] = "pre"
    norm_eps: float = 1e-5
    final_norm: bool = True  # a norm after the last layer of each stack
    positions: Literal["learned", "sinusoidal", "none"] = "learned"
    scale_embedding: bool = False  # embeddings times sqrt(hidden_size)
    tie_embeddings: bool = True  # one matrix for every embedding and the output projection
    attention_scale: float | None = None  # multiplies q k^T; None: 1 / sqrt(head size)
    attention_scale_by_layer: bool = False  # divide the scale by the layer's number, from 1
    dropout: float = 0.0
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: tuple[int, ...] = ()
    decoder_start_token_id: int | None = None

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "num_heads", "ffn_size", "max_positions"):
            _whole(name, getattr(self, name), 1, 2**31 - 1)
        for name in ("encoder_layers", "decoder_layers"):
            _whole(name, getattr(self, name), 0, 1_000)
        if self.encoder_layers + self.decoder_layers == 0:
            raise ConfigError("encoder_layers and decoder_layers are both 0: a model needs layers")
        widest = max(self.vocab_size, self.max_positions, self.ffn_size, 3 * self.hidden_size)
        if widest * self.hidden_size > MAX_MATRIX:
            raise ConfigError(
                f"hidden_size {self.hidden_size} makes a matrix of {widest} rows, which no memory "
                "holds; check the sizes"
            )
        if self.hidden_size % self.num_heads:
            raise ConfigError(
                f"hidden_size {self.hidden_size} does not divide into {self.num_heads} heads"
            )
        if self.num_kv_heads is not None:
            _whole("num_kv_heads", self.num_kv_heads, 1, self.num_heads)
            if self.num_heads % self.num_kv_heads:
                raise ConfigError(
                    f"num_heads {self.num_heads} is no multiple of num_kv_heads {self.num_kv_heads}"
                )
        _one_of("activation", self.activation, ACTIVATIONS)
        _one_of("norm_position", self.norm_position, ("pre", "post"))
        _one_of("positions", self.positions, ("learned", "sinusoidal", "none"))
        for name in ("final_norm", "scale_embedding", "tie_embeddings", "attention_scale_by_layer"):
            _one_of(name, getattr(self, name), (True, False))
        if self.positions == "sinusoidal":
            _whole("max_positions", self.max_positions, 1, 2**28 // self.hidden_size)
        _number("norm_eps", self.norm_eps, 0.0, 1.0)
        _number("dropout", self.dropout, 0.0, 1.0)
        if self.attention_scale is not None:
            _number("attention_scale", self.attention_scale, -1e6, 1e6)
        for name in ("pad_token_id", "bos_token_id", "decoder_start_token_id"):
            if getattr(self, name) is not None:
                _whole(name, getattr(self, name), 0, self.vocab_size - 1)
        if not isinstance(self.eos_token_id, tuple):
            raise ConfigError(f"eos_token_id is {self.eos_token_id!r}; it must be a tuple of ids")
        for token in self.eos_token_id:
            _whole("eos_token_id", token, 0, self.vocab_size - 1)

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_heads

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def _whole(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ConfigError(f"{name} is {value!r}; it must be a whole number from {low} to {high}")


def _number(name: str, value: object, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise ConfigError(f"{name} is {value!r}; it must be a number from {low} to {high}")


def _one_of(name: str, value: object, choices: tuple[str | bool, ...]) -> None:
    if type(value) is not type(choices[0]) or value not in choices:
        raise ConfigError(f"{name} is {value!r}; it must be one of {', '.join(map(str, choices))}")


def usable_ids(name: str, value: object, vocab_size: int) -> tuple[int, ...]:
    """The special ids of a config.json (null, one id or a list) that the vocabulary has.

    Small variants of a model often keep the ids of the large one, such as GPT-2's 50256. An id that
    no token has is never generated, so leaving it out, with a warning, changes nothing. Raises
    ConfigError for what is no id at all.
    """
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
