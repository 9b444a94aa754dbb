"""The fused ops as functions, in a plain nn.Module that trains a few steps.

    python examples/ops_in_a_module.py

A decoder block of today: pre-norm with RMSNorm, rotary positions, grouped-query causal attention,
SwiGLU. Each op is one call on ordinary tensors and parameters; run with a GPU, the same calls run
Triton kernels. The task is to continue a pattern that repeats every four tokens.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tilewise_kernels import attention, explain, feed_forward, rms_norm, rotary

VOCABULARY, SIZE, HEADS, KV_HEADS, HEAD_SIZE, LENGTH = 32, 64, 4, 2, 16, 24


class Block(nn.Module):
    """x + attention(norm(x)), then x + swiglu(norm(x)): [B, S, SIZE] to the same."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(SIZE, (HEADS + 2 * KV_HEADS) * HEAD_SIZE, bias=False)
        self.out = nn.Linear(HEADS * HEAD_SIZE, SIZE, bias=False)
        self.up = nn.Linear(SIZE, 4 * SIZE, bias=False)
        self.gate = nn.Linear(SIZE, 4 * SIZE, bias=False)
        self.down = nn.Linear(4 * SIZE, SIZE, bias=False)
        self.norm1, self.norm2 = (nn.Parameter(torch.ones(SIZE)) for _ in range(2))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        heads = self.qkv(rms_norm(x, self.norm1)).unflatten(-1, (-1, HEAD_SIZE)).transpose(1, 2)
        q, k, v = heads.split([HEADS, KV_HEADS, KV_HEADS], dim=1)
        q, k = rotary(q, k, cos, sin)
        step = self.out(attention(q, k, v, causal=True).transpose(1, 2).flatten(2))
        inner, x = rms_norm(step, self.norm2, residual=x, prenorm=True)  # norm(x + step), x + step
        weights = (self.gate.weight, None, self.down.weight, None)
        return x + feed_forward(inner, *weights, activation="silu", gate=self.up.weight)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, SIZE)
        nn.init.normal_(self.tokens.weight, std=0.1)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.norm = nn.Parameter(torch.ones(SIZE))

    def forward(self, ids: Tensor) -> Tensor:
        """[B, S] token ids to logits [B, S, VOCABULARY]."""
        rate = 10000.0 ** (-torch.arange(0, HEAD_SIZE, 2) / HEAD_SIZE)
        angles = torch.arange(ids.shape[1])[:, None] * rate
        x = self.tokens(ids)
        for block in self.blocks:
            x = block(x, angles.cos(), angles.sin())
        return F.linear(rms_norm(x, self.norm), self.tokens.weight)


def batch(rows: int) -> Tensor:
    """Rows that repeat a random pattern of four tokens."""
    return torch.randint(0, VOCABULARY, (rows, 4)).repeat(1, LENGTH // 4 + 1)[:, : LENGTH + 1]


def main() -> None:
    torch.manual_seed(0)
    model = Model()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(121):
        ids = batch(32)
        logits = model(ids[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 40 == 0:
            print(f"step {step:3d}  loss {loss.item():.3f}")
    q = torch.randn(1, HEADS, LENGTH, HEAD_SIZE)
    print(explain(attention, q, q, q, causal=True))


if __name__ == "__main__":
    main()
