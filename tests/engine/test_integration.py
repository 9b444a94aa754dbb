"""Every layer under what users wrap round it: compile, autocast, checkpointing, copies, the meta
device, and two processes with DDP and FSDP2. CUDA graphs are in tests/gpu.
"""

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tilewise.config import ModelConfig
from tilewise.layers import FeedForward, LayerNorm, MultiHeadAttention, RMSNorm, TransformerLayer

CONFIG = ModelConfig(
    model_type="gpt2", vocab_size=11, hidden_size=16, num_heads=4, ffn_size=32, decoder_layers=1,
    max_positions=8,
)  # fmt: skip
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "LayerNorm": lambda: LayerNorm(16),
    "RMSNorm": lambda: RMSNorm(16),
    "MultiHeadAttention": lambda: MultiHeadAttention(16, 4, 2),
    "FeedForward": lambda: FeedForward(16, 32, "gelu"),
    "TransformerLayer": lambda: TransformerLayer(CONFIG),
}
every_layer = pytest.mark.parametrize("name", LAYERS)


def made(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return LAYERS[name](), torch.randn(2, 5, 16)


def gradients(layer: nn.Module, call: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
    leaf = x.clone().requires_grad_()
    return list(torch.autograd.grad(call(leaf).square().sum(), [leaf, *layer.parameters()]))


@every_layer
def test_compile(name: str) -> None:
    layer, x = made(name)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (5, 7):
        longer = torch.randn(2, length, 16)
        torch.testing.assert_close(compiled(longer), layer(longer))
        ours, plain = gradients(layer, compiled, longer), gradients(layer, layer, longer)
        for a, b in zip(ours, plain, strict=True):
            torch.testing.assert_close(a, b)


@every_layer
def test_autocast(name: str) -> None:
    layer, x = made(name)
    expected, plain = layer(x), gradients(layer, layer, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(layer(x).float(), expected, rtol=0.1, atol=0.1)
        low = gradients(layer, layer, x)
    for a, b in zip(low, plain, strict=True):
        assert a.dtype == torch.float32
        assert (a - b).norm() <= 0.1 * b.norm() + 1e-3


@every_layer
def test_activation_checkpointing(name: str) -> None:
    layer, x = made(name)
    again = gradients(layer, lambda t: checkpoint(layer, t, use_reentrant=False), x)
    for a, b in zip(again, gradients(layer, layer, x), strict=True):
        assert torch.equal(a, b)


@every_layer
def test_copies_and_the_meta_device(name: str) -> None:
    layer, x = made(name)
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x), layer(x))
    with torch.device("meta"):
        hollow = LAYERS[name]()
    assert all(p.is_meta for p in hollow.parameters())
    assert hollow(x.to("meta")).shape == x.shape
    hollow.to_empty(device="cpu").load_state_dict(layer.state_dict())
    assert torch.equal(hollow(x), layer(x))


@every_layer
def test_no_gradient_of_a_frozen_layer_is_kept(name: str) -> None:
    layer, x = made(name)
    layer.requires_grad_(False)
    leaf = x.clone().requires_grad_()
    layer(leaf).sum().backward()
    assert leaf.grad is not None and all(p.grad is None for p in layer.parameters())


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch has no distributed")
def test_ddp_and_fsdp_on_two_processes() -> None:
    script = Path(__file__).with_name("two_processes.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    command += ["--master-addr=127.0.0.1", "--master-port=0", "--standalone", str(script)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "DDP and FSDP2 agree with one process" in done.stdout
