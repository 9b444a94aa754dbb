"""Train a small BERT to fill in sums, then ask it for what is behind [MASK].

    python examples/fill_mask.py --out sums

Every sentence is like "two plus three is five", one word of it hidden. What is written is a BERT
folder as any other (config.json, model.safetensors, vocab.txt): transformers opens it too, and

    tilewise fill-mask --model sums "two plus [MASK] is five"
"""

import argparse
import math
from pathlib import Path

import torch

import tilewise
from tilewise.text import load_tokenizer

DIGITS = "zero one two three four five six seven eight nine".split()
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "plus", "is", *DIGITS]
MASK, IGNORED = WORDS.index("[MASK]"), -100


def new_model(folder: Path) -> tilewise.Model:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    config = tilewise.ModelConfig(
        model_type="bert",
        vocab_size=len(WORDS),
        hidden_size=64,
        num_heads=4,
        ffn_size=128,
        encoder_layers=2,
        max_positions=16,
        activation="gelu",
        token_types=2,
        norm_position="post",
        final_norm=False,
        embedding_norm=True,
        masked_head="gelu",
        output_bias=True,
        pad_token_id=0,
    )
    return tilewise.Model(tilewise.build(config), load_tokenizer(folder))


def train(model: tilewise.Model, steps: int) -> None:
    assert model.tokenizer is not None
    sums = [(a, b) for a in range(10) for b in range(10 - a)]
    texts = [f"{DIGITS[a]} plus {DIGITS[b]} is {DIGITS[a + b]}" for a, b in sums]
    ids = torch.tensor(model.tokenizer.encode(texts))  # [CLS] a plus b is c [SEP]
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(steps + 1):
        place = torch.tensor([1, 3, 5])[torch.randint(3, (len(ids),))]
        hidden = torch.arange(ids.shape[1]) == place[:, None]
        labels = ids.masked_fill(~hidden, IGNORED)
        loss = model(ids.masked_fill(hidden, MASK), labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0:
            print(f"step {step:3d}  loss {loss.item():.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("sums"), help="folder for the checkpoint")
    parser.add_argument("--steps", type=int, default=300)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model = new_model(arguments.out)
    train(model, arguments.steps)
    model.save(arguments.out)

    model = tilewise.load(arguments.out)
    for text in (
        "two plus [MASK] is five",
        "[MASK] plus four is four",
        "[MASK] plus one is [MASK]",
    ):
        print(text)
        for candidates in model.fill_mask([text], top_k=3)[0]:
            words = (f"{WORDS[c.token]} {math.exp(c.log_prob):.2f}" for c in candidates)
            print("   ", ", ".join(words))


if __name__ == "__main__":
    main()
