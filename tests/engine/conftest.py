"""The models of the generation tests: a Decoder with grouped keys and learned positions, and a
Seq2Seq with sinusoids.

They are pre-norm, untied and drawn so that their greedy output differs from prompt to prompt and
from step to step: random post-norm or tied models soon repeat one token, whatever came before.
"""

from collections.abc import Callable

import pytest
import torch
from torch import nn

import tilewise
from tilewise.config import ModelConfig

pytest.register_assert_rewrite("tokenizer_oracle")  # its failures tell as much as a test's own

SEEDS = {"decoder": 4, "seq2seq": 5}


def _build(kind: str, **changes: object) -> nn.Module:
    decoder = {"num_kv_heads": 2, "positions": "learned"}
    seq2seq = {"encoder_layers": 2, "positions": "sinusoidal"}
    values: dict = {
        "model_type": "tilewise-transformer",
        "vocab_size": 29,
        "hidden_size": 32,
        "num_heads": 4,
        "ffn_size": 48,
        "decoder_layers": 2,
        "max_positions": 40,
        "bos_token_id": 1,
        "decoder_start_token_id": 1,
        "eos_token_id": (15, 19),
        "tie_embeddings": False,
        "dropout": 0.3,
    } | (decoder if kind == "decoder" else seq2seq)
    network = tilewise.build(ModelConfig(**(values | changes)))
    generator = torch.Generator().manual_seed(SEEDS[kind])
    for name, parameter in network.named_parameters():
        mean = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        std = 0.1 if parameter.dim() == 1 else 1.0 if "embedding" in name else 0.35
        nn.init.normal_(parameter, mean, std, generator=generator)
    return network.eval()


@pytest.fixture(scope="session")
def build() -> Callable[..., nn.Module]:
    """build(kind, **changes of the config), kind "decoder" or "seq2seq"."""
    return _build


@pytest.fixture(scope="module")
def models() -> dict[str, nn.Module]:
    return {kind: _build(kind) for kind in SEEDS}
