"""Train torch.nn.Transformer on tilewise's ops, without touching the model's code.

    python examples/fuse_torch_transformer.py

The task is to reverse a sequence of digits. fuse() replaces what it knows inside the finished
model; the optimiser, the parameters' names and a checkpoint of theirs stay as they are.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tilewise

START, DIGITS, LENGTH, SIZE = 10, 10, 6, 64


class Reverser(nn.Module):
    """Digits in, the same digits backwards out; nothing in it knows of tilewise."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(DIGITS + 1, SIZE)
        self.positions = nn.Parameter(torch.randn(LENGTH, SIZE) * 0.1)
        self.transformer = nn.Transformer(
            SIZE, 4, 1, 1, 4 * SIZE, dropout=0.0, activation="gelu", batch_first=True
        )
        self.head = nn.Linear(SIZE, DIGITS)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """source [B, LENGTH] and target [B, T], the digits so far behind START, to [B, T, 10]."""
        length = target.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        out = self.transformer(
            self.tokens(source) + self.positions,
            self.tokens(target) + self.positions[:length],
            tgt_mask=mask,
            tgt_is_causal=True,
        )
        return self.head(out)


def shifted(answer: Tensor) -> Tensor:
    """START and all digits but the last: what the decoder reads."""
    return F.pad(answer[:, :-1], (1, 0), value=START)


def main() -> None:
    torch.manual_seed(0)
    model = Reverser()
    names = list(model.state_dict())
    source = torch.randint(0, DIGITS, (2, LENGTH))
    print(tilewise.fuse(model, example=(source, shifted(source.flip(1)))))

    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(121):
        source = torch.randint(0, DIGITS, (64, LENGTH))
        answer = source.flip(1)
        logits = model(source, shifted(answer))
        loss = F.cross_entropy(logits.flatten(0, 1), answer.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 40 == 0:
            right = (logits.argmax(-1) == answer).float().mean()
            print(f"step {step:3d}  loss {loss.item():.3f}  digits right {right.item():.2f}")
    assert list(model.state_dict()) == names


if __name__ == "__main__":
    main()
