"""Whole models on a GPU against the same weights on the CPU, in float32 without TF32."""

import copy
from typing import Any

import pytest
import torch

from tilewise.config import ModelConfig
from tilewise.generation import generate
from tilewise.models import build

pytestmark = pytest.mark.gpu
GPT2: dict[str, Any] = {
    "model_type": "gpt2",
    "vocab_size": 301,
    "hidden_size": 128,
    "num_heads": 4,
    "ffn_size": 512,
    "decoder_layers": 4,
    "max_positions": 256,
    "activation": "gelu_tanh",
    "bos_token_id": 300,
    "eos_token_id": (300,),
}
TRANSLATOR: dict[str, Any] = {
    "model_type": "tilewise-transformer",
    "vocab_size": 97,
    "hidden_size": 64,
    "num_heads": 4,
    "ffn_size": 128,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "max_positions": 64,
    "norm_position": "post",
    "positions": "sinusoidal",
    "scale_embedding": True,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": (2,),
    "decoder_start_token_id": 1,
}
PROMPTS = [[5, 17, 80], [9], [33, 4, 8, 15, 16, 23, 42], [60, 61]]


def twins(settings: dict, device: torch.device) -> tuple[torch.nn.Module, torch.nn.Module]:
    """One network of large random weights on the CPU and its copy on `device`."""
    torch.manual_seed(0)
    network = build(ModelConfig(**settings)).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.2)
    return network, copy.deepcopy(network).to(device)


@pytest.mark.parametrize("size", ["small", "GPT-2's own"])
def test_gpt2_logits(size: str, device, pick) -> None:
    settings = dict(GPT2)
    if size != "small":
        wide = {"hidden_size": 768, "num_heads": 12, "ffn_size": 3072, "decoder_layers": 12}
        settings |= pick(wide | {"vocab_size": 50257}, {})
    torch.manual_seed(1)
    here = build(ModelConfig(**settings)).eval()
    there = copy.deepcopy(here).to(device)
    ids = torch.randint(0, 300, (3, pick(200, 17)))
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    with torch.no_grad():
        expected = here(ids, mask).logits
        found = there(ids.to(device), mask.to(device)).logits
    difference = (found.cpu() - expected)[mask.bool()].abs().max()
    assert difference <= 1e-3, f"logits differ by {difference}"


def test_gradients_of_a_training_step(device) -> None:
    here, there = twins(GPT2 | {"decoder_layers": 2}, device)
    ids = torch.randint(0, 300, (2, 33))
    for network, place in ((here, "cpu"), (there, device)):
        network(ids.to(place), labels=ids.to(place)).loss.backward()
    for (name, a), b in zip(here.named_parameters(), there.parameters(), strict=True):
        assert a.grad is not None and b.grad is not None
        error = (a.grad - b.grad.cpu()).norm() / a.grad.norm()
        assert error <= 1e-3, f"{name}: {error}"


@pytest.mark.parametrize("beams", [1, 4])
@pytest.mark.parametrize("settings", [GPT2, TRANSLATOR], ids=["decoder", "seq2seq"])
def test_generation_gives_the_same_tokens(settings: dict, beams: int, device) -> None:
    here, there = twins(settings, device)
    options: dict[str, Any] = {"num_beams": beams, "max_new_tokens": 20, "pad_token_id": 0}
    options |= {"num_return_sequences": min(beams, 2)}
    expected = generate(here, PROMPTS, **options)
    found = generate(there, PROMPTS, **options)
    assert found.sequences.tolist() == expected.sequences.tolist()
    scores = found.sequences_scores.cpu()
    torch.testing.assert_close(scores, expected.sequences_scores, rtol=1e-4, atol=1e-3)


def test_the_dates_model_translates_on_the_gpu(device) -> None:
    """The checkpoint that ships, where it is there."""
    import tilewise
    from tilewise.errors import CheckpointError

    try:
        here, there = tilewise.load("dates"), tilewise.load("dates", device=device)
    except CheckpointError as error:
        pytest.skip(f"no checkpoint: {error}")
    texts = ["the seventeenth of March, 2019", "half past three in the afternoon"]
    assert there.generate(texts, num_beams=4).texts == here.generate(texts, num_beams=4).texts
