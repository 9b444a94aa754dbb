"""Run by test_integration.py in two processes of one gloo group: DDP and FSDP2 over our layers
and over a model that fuse() changed.

    torchrun --nproc-per-node 2 tests/engine/two_processes.py

Each process trains on its half of a batch; gradients, and weights after steps, must be those of one
process with the whole batch.
"""

import copy

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import tilewise
from tilewise.config import ModelConfig
from tilewise.layers import TransformerLayer

STEPS = 3


class Stack(nn.Module):
    """Two layers, each attending to a memory, so that every layer of ours is in it."""

    def __init__(self) -> None:
        super().__init__()
        config = ModelConfig(
            model_type="gpt2", vocab_size=11, hidden_size=16, num_heads=4, ffn_size=32,
            decoder_layers=2, max_positions=8,
        )  # fmt: skip
        self.layers = nn.ModuleList(TransformerLayer(config, cross_attention=True) for _ in "ab")

    def forward(self, x: Tensor) -> Tensor:
        memory = x.flip(1)
        for layer in self.layers:
            x = layer(x, causal=True, memory=memory)
        return x


def train(model: nn.Module, x: Tensor) -> list[Tensor]:
    """The losses of some steps of SGD on x [B, S, E]."""
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for _ in range(STEPS):
        optimiser.zero_grad()
        loss = model(x).float().square().mean()
        loss.backward()
        optimiser.step()
        losses.append(loss.detach())
    return losses


def whole(parameter: Tensor) -> Tensor:
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def assert_same_weights(model: nn.Module, alone: nn.Module, kind: str) -> None:
    for (name, ours), theirs in zip(model.named_parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(whole(ours), theirs, msg=lambda m, n=name: f"{kind} {n}: {m}")


def fused() -> nn.Module:
    """Somebody else's encoder, fused, in training mode; without dropout."""
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    report = tilewise.fuse(model)
    assert report.replaced and model.training
    return model


def shard(model: nn.Module, **options: MixedPrecisionPolicy) -> None:
    for layer in model.layers:
        fully_shard(layer, **options)
    fully_shard(model, **options)


def check(alone: nn.Module, x: Tensor, kind: str) -> None:
    """alone: layers in `layers`, on x [B, S, E]; the two processes have half of x each."""
    mine = x.chunk(2)[dist.get_rank()]
    replicated = DistributedDataParallel(copy.deepcopy(alone))
    sharded, half = copy.deepcopy(alone), copy.deepcopy(alone)
    shard(sharded)
    half_types = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    shard(half, mp_policy=half_types)
    expected = train(alone, x)
    train(replicated, mine)
    assert_same_weights(replicated, alone, f"{kind}, DDP")
    train(sharded, mine)
    assert_same_weights(sharded, alone, f"{kind}, FSDP2")
    total = torch.stack(train(half, mine))
    dist.all_reduce(total)
    torch.testing.assert_close(total / 2, torch.stack(expected), rtol=0.05, atol=0.05)


def main() -> None:
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    x = torch.randn(4, 6, 16)
    check(Stack(), x, "ours")
    check(fused(), x, "fused")
    if dist.get_rank() == 0:
        print("DDP and FSDP2 agree with one process")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
