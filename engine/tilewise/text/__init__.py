"""Text to token ids and back. Knows no model."""

from .files import load_tokenizer
from .tokenizer import Tokenizer, train_tokenizer

__all__ = ["Tokenizer", "load_tokenizer", "train_tokenizer"]
