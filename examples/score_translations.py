"""Score translations, and see which words of the source each character was read from.

    python examples/score_translations.py [TEXT ...]

Uses the English to Japanese model of dates that ships with tilewise. Beam search proposes
translations, score() says how likely each is, and attention maps say what the decoder looked at.
"""

import sys

import torch

import tilewise

TEXTS = ["half past three in the afternoon", "May 5th, 2030"]


def pieces(model: tilewise.Model, ids: list[int]) -> list[str]:
    assert model.tokenizer is not None
    return model.tokenizer.decode([[token] for token in ids])


def show_reading(model: tilewise.Model, text: str, translation: str) -> None:
    """Each character of a translation and the piece of the text that it attends to most."""
    assert model.tokenizer is not None
    source, target = model.tokenizer.encode([text, translation])
    with torch.no_grad():
        out = model(torch.tensor([source]), labels=torch.tensor([target]), output_attentions=True)
    assert out.cross_attentions is not None
    last_layer = out.cross_attentions[-1][0]  # [heads, target, source]
    share, place = last_layer.mean(0).max(-1)
    read = pieces(model, source)
    for piece, best, value in zip(pieces(model, target[:-1]), place, share, strict=False):
        print(f"    {piece} <- {read[best].strip() or '(space or end)'}  {value:.2f}")


def main() -> None:
    model = tilewise.load("dates")
    for text in sys.argv[1:] or TEXTS:
        found = model.generate([text], num_beams=4, num_return_sequences=3).texts
        assert found is not None
        scores = model.score(found, [text] * len(found))  # log P(translation | text)
        print(text)
        for translation, score in zip(found, scores, strict=True):
            print(f"  {translation}  {score.total:.2f} nats, perplexity {score.perplexity:.2f}")
        show_reading(model, text, found[0])


if __name__ == "__main__":
    main()
