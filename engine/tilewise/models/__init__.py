"""Encoder, decoder and seq2seq models assembled from one configuration."""

from torch import nn

from ..config import ModelConfig
from ..errors import ConfigError
from .decoder import Decoder
from .encoder import Encoder
from .heads import ModelOutput
from .seq2seq import Seq2Seq
from .stack import evaluating

__all__ = ["Decoder", "Encoder", "ModelOutput", "Seq2Seq", "build", "evaluating"]


def build(config: ModelConfig) -> nn.Module:
    """The model a configuration describes: by which of its two stacks have layers."""
    if not isinstance(config, ModelConfig):
        raise ConfigError(f"config is {type(config).__name__}; pass a tilewise.ModelConfig")
    if config.encoder_layers and config.decoder_layers:
        return Seq2Seq(config)
    return Decoder(config) if config.decoder_layers else Encoder(config)
