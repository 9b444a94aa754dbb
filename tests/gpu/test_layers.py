"""Every layer on a GPU: the CPU's results, and its step captured in a CUDA graph and replayed."""

import copy

import pytest
import torch
from torch import nn

from tilewise.config import ModelConfig
from tilewise.layers import FeedForward, LayerNorm, MultiHeadAttention, RMSNorm, TransformerLayer

pytestmark = pytest.mark.gpu
CONFIG = ModelConfig(
    model_type="gpt2", vocab_size=11, hidden_size=64, num_heads=4, ffn_size=128, decoder_layers=1,
    max_positions=64,
)  # fmt: skip
LAYERS = {
    "LayerNorm": lambda: LayerNorm(64),
    "RMSNorm": lambda: RMSNorm(64),
    "MultiHeadAttention": lambda: MultiHeadAttention(64, 4, 2),
    "FeedForward": lambda: FeedForward(64, 128, "gelu"),
    "TransformerLayer": lambda: TransformerLayer(CONFIG),
}


def step(layer: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    leaves = [x, *layer.parameters()]
    return list(torch.autograd.grad(layer(x).float().square().mean(), leaves))


@pytest.mark.parametrize("name", LAYERS)
def test_the_cpus_results(name: str, device: torch.device, pick) -> None:
    torch.manual_seed(0)
    layer, x = LAYERS[name](), torch.randn(2, pick(50, 7), 64)
    ours = copy.deepcopy(layer).to(device)
    torch.testing.assert_close(ours(x.to(device)).cpu(), layer(x), rtol=1e-4, atol=1e-4)
    got = step(ours, x.to(device).requires_grad_())
    for a, b in zip(got, step(layer, x.requires_grad_()), strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", LAYERS)
def test_a_training_step_in_a_graph(name: str, device: torch.device, gpu_only) -> None:
    gpu_only("CUDA graphs")
    torch.manual_seed(0)
    layer = LAYERS[name]().to(device, torch.bfloat16)
    x = torch.randn(2, 50, 64, device=device, dtype=torch.bfloat16).requires_grad_()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):  # compiles and warms up outside the capture
            step(layer, x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(layer, x)
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
    graph.replay()
    for a, b in zip(captured, step(layer, x), strict=True):
        assert torch.equal(a, b)
