"""Zero-, one- and few-shot prompts, and choosing the likeliest of several answers.

    python examples/few_shot.py

Trains a small LLaMA to write digits out, "7=siete 2=dos", in one of four languages; which one is
asked for can only be seen from the examples in the prompt. With a checkpoint of your own,
few_shot_prompt and choose are all that you need.
"""

import random

import torch
from torch.nn.utils.rnn import pad_sequence

import tilewise
from tilewise.scoring import choose, few_shot_prompt
from tilewise.text import Tokenizer, train_tokenizer

WORDS = {
    "English": "zero one two three four five six seven eight nine".split(),
    "Spanish": "cero uno dos tres cuatro cinco seis siete ocho nueve".split(),
    "German": "null eins zwei drei vier fuenf sechs sieben acht neun".split(),
    "Finnish": "nolla yksi kaksi kolme nelja viisi kuusi seitseman kahdeksan yhdeksan".split(),
}


def asked(language: str, shots: int) -> tuple[str, int]:
    """A prompt with this many examples of a language, and the digit that it asks for."""
    query, *others = random.sample(range(10), shots + 1)
    examples = [(str(digit), WORDS[language][digit]) for digit in others]
    return few_shot_prompt(str(query), examples, separator=" ", delimiter="="), query


def new_model(tokenizer: Tokenizer) -> tilewise.Model:
    config = tilewise.ModelConfig(
        model_type="llama",
        vocab_size=tokenizer.vocab_size,
        hidden_size=64,
        num_heads=4,
        ffn_size=128,
        decoder_layers=2,
        max_positions=64,
        positions="rotary",
        norm="rms",
        activation="silu",
        gated=True,
        attention_bias=False,
        ffn_bias=False,
    )
    return tilewise.Model(tilewise.build(config), tokenizer)


def train(model: tilewise.Model) -> None:
    assert model.tokenizer is not None
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(301):
        texts = []
        for _ in range(32):
            language = random.choice(list(WORDS))
            prompt, query = asked(language, random.randint(0, 3))
            texts.append(prompt + WORDS[language][query])
        rows = [torch.tensor(ids) for ids in model.tokenizer.encode(texts)]
        labels = pad_sequence(rows, batch_first=True, padding_value=-100)
        loss = model(labels.clamp(min=0), labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0:
            print(f"step {step:3d}  loss {loss.item():.3f}")


def share_right(model: tilewise.Model, shots: int) -> float:
    """How often the right language's word is chosen from among the four."""
    right = 0
    for language in 10 * list(WORDS):
        prompt, query = asked(language, shots)
        answers = [words[query] for words in WORDS.values()]
        right += answers[choose(model.score, prompt, answers).index] == WORDS[language][query]
    return right / (10 * len(WORDS))


def main() -> None:
    torch.manual_seed(0)
    random.seed(0)
    model = new_model(
        train_tokenizer(["0123456789= ", *(w for words in WORDS.values() for w in words)])
    )
    train(model)
    for shots in (0, 1, 3):
        print(f"{shots} shots: {share_right(model, shots):.2f} right")

    prompt = few_shot_prompt("7", [("4", "nelja"), ("1", "yksi")], separator=" ", delimiter="=")
    answers = [words[7] for words in WORDS.values()]
    print(f"{prompt!r}, log P [nats] of {answers}:")
    for normalise in ("sum", "length", "unconditional"):
        choice = choose(model.score, prompt, answers, normalise=normalise, neutral="7=")
        values = ", ".join(f"{value:.2f}" for value in choice.values)
        print(f"{normalise:<14} {values}: {answers[choice.index]}")


if __name__ == "__main__":
    main()
