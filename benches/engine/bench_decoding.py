"""Tokens per second of greedy and beam search, on random models of a usable size.

tilewise with its cache, tilewise computing every step anew, and transformers' generate where it is
installed, on the same weights and prompts. Every sequence has NEW tokens: there is no end token.
"""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import tilewise
from tilewise.config import ModelConfig

LAYERS, WIDTH, HEADS, VOCAB = 6, 512, 8, 8192
ROWS, PROMPT, NEW = 2, 16, 32
ROUNDS = {"tilewise": 5, "tilewise uncached": 2, "transformers": 5}
CONTENDERS = ["tilewise", "tilewise uncached", "transformers"]
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "num_heads": HEADS,
    "ffn_size": 4 * WIDTH,
    "max_positions": 128,
}


def decoder() -> tilewise.Model:
    config = ModelConfig(model_type="gpt2", decoder_layers=LAYERS, activation="gelu_tanh", **SIZES)
    return tilewise.Model(tilewise.build(config)).eval()


def seq2seq() -> tilewise.Model:
    config = ModelConfig(
        model_type="tilewise-transformer", encoder_layers=LAYERS, decoder_layers=LAYERS,
        norm_position="post", final_norm=False, positions="sinusoidal", scale_embedding=True,
        decoder_start_token_id=1, pad_token_id=0, **SIZES,
    )  # fmt: skip
    return tilewise.Model(tilewise.build(config)).eval()


def theirs_decoder(folder: Path, ours: tilewise.Model) -> Any:
    """The same GPT-2 opened by transformers."""
    from transformers import GPT2LMHeadModel

    ours.save(folder)
    return GPT2LMHeadModel.from_pretrained(folder).eval()


def theirs_seq2seq(folder: Path, ours: tilewise.Model) -> Any:
    """A Marian of the same sizes: the same work; its weights are its own."""
    from transformers import MarianConfig, MarianMTModel

    config = MarianConfig(
        vocab_size=VOCAB, d_model=WIDTH, encoder_layers=LAYERS, decoder_layers=LAYERS,
        encoder_attention_heads=HEADS, decoder_attention_heads=HEADS, encoder_ffn_dim=4 * WIDTH,
        decoder_ffn_dim=4 * WIDTH, max_position_embeddings=128, activation_function="relu",
        scale_embedding=True, decoder_start_token_id=1, pad_token_id=0, eos_token_id=None,
        forced_eos_token_id=None,
    )  # fmt: skip
    model = MarianMTModel(config).eval()
    model.generation_config.forced_eos_token_id = None
    model.generation_config.bad_words_ids = None
    return model


MODELS = {"decoder": (decoder, theirs_decoder), "seq2seq": (seq2seq, theirs_seq2seq)}


def search_call(kind: str, beams: int, contender: str, folder: Path) -> Callable[[], torch.Tensor]:
    """A function that generates NEW tokens for ROWS prompts and returns the sequences."""
    torch.manual_seed(0)
    make, make_theirs = MODELS[kind]
    ours = make()
    prompts = torch.randint(2, VOCAB, (ROWS, PROMPT))
    options: dict[str, Any] = {"num_beams": beams, "max_new_tokens": NEW}
    if contender == "transformers":
        model = make_theirs(folder, ours)
        return lambda: model.generate(
            prompts, attention_mask=torch.ones_like(prompts), do_sample=False, pad_token_id=0,
            eos_token_id=None, **options,
        )  # fmt: skip
    options |= {"use_cache": contender == "tilewise"}
    return lambda: ours.generate(prompts, **options).sequences


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("beams", [1, 4])
@pytest.mark.parametrize("kind", list(MODELS))
def bench_decoding(benchmark: Any, tmp_path: Path, kind: str, beams: int, contender: str) -> None:
    if contender == "transformers" and importlib.util.find_spec("transformers") is None:
        pytest.skip("transformers is not installed")
    call = search_call(kind, beams, contender, tmp_path)
    made = call()  # also the warm-up
    assert made.shape[1] == NEW + (PROMPT if kind == "decoder" else 1)
    benchmark.group = f"{kind} beams={beams}"
    benchmark.pedantic(call, rounds=ROUNDS[contender])
    benchmark.extra_info |= {
        "kind": "decoding",
        "model": f"{kind}, {LAYERS} layers of {WIDTH}, {ROWS} x {NEW} tokens",
        "search": "greedy" if beams == 1 else f"beam {beams}",
        "contender": contender,
        "tokens": ROWS * NEW,
    }
