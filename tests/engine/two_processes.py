"""Run by test_integration.py in two processes of one gloo group: DDP and FSDP2 over our layers.

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


def main() -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(0)
    alone, x = Stack(), torch.randn(4, 6, 16)
    mine = x[2 * rank : 2 * rank + 2]
    replicated = DistributedDataParallel(copy.deepcopy(alone))
    sharded, half = copy.deepcopy(alone), copy.deepcopy(alone)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for model, options in ((sharded, {}), (half, {"mp_policy": policy})):
        for layer in model.layers:
            fully_shard(layer, **options)
        fully_shard(model, **options)
    expected = train(alone, x)
    train(replicated, mine)
    assert_same_weights(replicated, alone, "DDP")
    train(sharded, mine)
    assert_same_weights(sharded, alone, "FSDP2")
    found = train(half, mine)
    total = torch.stack(found)
    dist.all_reduce(total)
    torch.testing.assert_close(total / 2, torch.stack(expected), rtol=0.05, atol=0.05)
    if rank == 0:
        print("DDP and FSDP2 agree with one process")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
