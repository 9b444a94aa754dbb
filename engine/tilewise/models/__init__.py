"""Encoder, decoder and seq2seq models assembled from a configuration."""

from torch import nn

from ..config import AnyConfig, ModelConfig, RecurrentConfig
from ..errors import ConfigError
from .decoder import Decoder
from .encoder import Encoder
from .heads import ModelOutput
from .recurrent import RecurrentDecoder, RecurrentEncoder, RecurrentSeq2Seq
from .seq2seq import Seq2Seq
from .stack import evaluating

__all__ = [
    "AnySeq2Seq",
    "Decoder",
    "Encoder",
    "ModelOutput",
    "RecurrentDecoder",
    "RecurrentEncoder",
    "RecurrentSeq2Seq",
    "Seq2Seq",
    "build",
    "evaluating",
]

AnySeq2Seq = Seq2Seq | RecurrentSeq2Seq


def build(config: AnyConfig) -> nn.Module:
    """The model a configuration describes: by its kind, and which of its two stacks have layers."""
    if isinstance(config, RecurrentConfig):
        return RecurrentSeq2Seq(config)
    if not isinstance(config, ModelConfig):
        raise ConfigError(f"config is {type(config).__name__}; pass a tilewise.ModelConfig")
    if config.is_seq2seq:
        return Seq2Seq(config)
    return Decoder(config) if config.decoder_layers else Encoder(config)
