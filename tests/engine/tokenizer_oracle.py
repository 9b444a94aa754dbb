"""What the tests of tokenizers share: texts, folders of files, and comparing with transformers."""

import json
from pathlib import Path
from typing import Any

import torch

from tilewise.text import Tokenizer, load_tokenizer

CORPUS = [
    "the seventeenth of March, 2019",
    "half past three in the Afternoon",
    "two hundred na\u00efve caf\u00e9s, 30% off!",
    "\u5348\u5f8c3\u664230\u5206 \u5e74",
]
TEXTS = [
    *CORPUS,
    "",
    " ",
    "a",
    "  two  spaces\tand\na line \u00a0",
    "\u00c9cole na\u0131ve e\u0301 \u1e9b\u0323",
    "\U0001f600\u200d\U0001f469 emoji",
    "1234567890 3.14",
    "don't stop -- it's",
    "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35 \u0645\u0631\u062d\u0628\u0627",
    "zzz \ufffd \u0007 \u200b",
    "x" * 150,
]


def write(folder: Path, **files: Any) -> Path:
    """Tables as NAME.json."""
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def loaded(folder: Path) -> Tokenizer:
    tokenizer = load_tokenizer(folder)
    assert tokenizer is not None
    return tokenizer


def reloaded(tokenizer: Tokenizer, folder: Path) -> Tokenizer:
    folder.mkdir()
    for name, content in tokenizer.files().items():
        (folder / name).write_bytes(content)
    return loaded(folder)


def assert_same(tokenizer: Tokenizer, oracle: Any, texts: list[str] = TEXTS) -> None:
    assert tokenizer.encode(texts) == [oracle(text)["input_ids"] for text in texts]
    for side in ("left", "right"):
        oracle.truncation_side = side
        cut = [oracle(text, truncation=True, max_length=6)["input_ids"] for text in texts]
        assert tokenizer.encode(texts, max_length=6, truncation_side=side) == cut


def assert_same_pairs(tokenizer: Tokenizer, oracle: Any) -> None:
    real = [text for text in TEXTS if text]  # transformers takes an empty second text for none
    pairs = list(zip(real, real[1:], strict=False))
    for (ids, types), pair in zip(tokenizer.encode_pairs(pairs), pairs, strict=True):
        expected = oracle(*pair, return_token_type_ids=True)
        assert (ids, types) == (expected["input_ids"], expected["token_type_ids"])


def assert_same_padding(tokenizer: Tokenizer, oracle: Any, texts: list[str] = TEXTS) -> None:
    expected = oracle(texts, padding=True, return_tensors="pt")
    ids, mask = tokenizer.pad(tokenizer.encode(texts))
    assert torch.equal(ids, expected["input_ids"]) and ids.dtype == torch.int64
    assert torch.equal(mask, expected["attention_mask"]) and mask.dtype == torch.int64
