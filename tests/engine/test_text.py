"""Tokenizers: files in, ids and text out, and back again."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tilewise.errors import TokenizerError
from tilewise.text import Tokenizer, load_tokenizer, train_tokenizer

CORPUS = ["the seventeenth of March, 2019", "half past three", "two hundred  \n\t na\u00efve six"]
PAIRS = [
    "half past three in the afternoon",
    "\u5348\u5f8c3\u664230\u5206",
    "17 March",
    "2019\u5e743\u670817\u65e5",
]


def write_gpt2_files(folder: Path) -> Path:
    """vocab.json and merges.txt of a tiny byte-level BPE, with GPT-2's special token."""
    from tokenizers import ByteLevelBPETokenizer

    trainer = ByteLevelBPETokenizer()
    trainer.train_from_iterator(
        CORPUS * 4, vocab_size=320, special_tokens=["<|endoftext|>"], show_progress=False
    )
    folder.mkdir(exist_ok=True)
    trainer.save_model(str(folder))
    return folder


@pytest.fixture(scope="module")
def gpt2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gpt2_files(tmp_path_factory.mktemp("gpt2"))


@pytest.fixture(scope="module")
def gpt2(gpt2_folder: Path) -> Tokenizer:
    tokenizer = load_tokenizer(gpt2_folder)
    assert tokenizer is not None
    return tokenizer


def reloaded(tokenizer: Tokenizer, folder: Path) -> Tokenizer:
    folder.mkdir(exist_ok=True)
    for name, content in tokenizer.files().items():
        (folder / name).write_bytes(content)
    again = load_tokenizer(folder)
    assert again is not None
    return again


def write_json(folder: Path, **changes: Any) -> Path:
    """A sound tokenizer.json with some of its parts replaced."""
    parts = json.loads(train_tokenizer(PAIRS).files()["tokenizer.json"])
    (folder / "tokenizer.json").write_text(json.dumps(parts | changes))
    return folder


# Byte-level BPE


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.text())
@example("\0\r\n  \u00a0e\u0301 \U0001f600\u200d\uffff")
def test_byte_level_bpe_round_trips_any_text(gpt2: Tokenizer, text: str) -> None:
    (ids,) = gpt2.encode([text])
    assert gpt2.decode([ids], skip_special_tokens=False) == [text]
    assert all(0 <= i < gpt2.vocab_size for i in ids)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(texts=st.lists(st.text(st.sampled_from("the of\u00e9 \n19'stre,")), max_size=5))
@example(texts=["a<|endoftext|> b"])
def test_ids_are_those_of_transformers(
    gpt2: Tokenizer, gpt2_folder: Path, texts: list[str], oracle: Any
) -> None:
    assert gpt2.encode(texts) == [oracle(text)["input_ids"] for text in texts]


@pytest.fixture(scope="module")
def oracle(gpt2_folder: Path) -> Any:
    import transformers

    return transformers.GPT2Tokenizer.from_pretrained(gpt2_folder, local_files_only=True)


def test_bpe_merges_and_special_token(gpt2: Tokenizer, gpt2_folder: Path) -> None:
    (ids,) = gpt2.encode(["the seventeenth<|endoftext|>"])
    assert len(ids) < 10 and ids[-1] == gpt2.token_to_id("<|endoftext|>") == 0
    assert gpt2.decode([ids]) == ["the seventeenth"]
    assert gpt2.decode([ids], skip_special_tokens=False) == ["the seventeenth<|endoftext|>"]
    assert gpt2.vocab_size == len(json.loads((gpt2_folder / "vocab.json").read_text()))
    assert gpt2.token_to_id("no such token") is None


def test_bpe_is_written_as_tokenizer_json(gpt2: Tokenizer, tmp_path: Path) -> None:
    again = reloaded(gpt2, tmp_path)
    texts = [*CORPUS, "", "\u5348\u5f8c <|endoftext|>"]
    assert again.encode(texts) == gpt2.encode(texts)
    assert again.decode(gpt2.encode(texts)) == gpt2.decode(gpt2.encode(texts))


def test_tokenizer_json_goes_before_the_pair(tmp_path: Path) -> None:
    write_gpt2_files(tmp_path)
    assert reloaded(train_tokenizer(["ab"]), tmp_path).vocab_size == 6


# Character tokenizer


def test_character_ids() -> None:
    tokenizer = train_tokenizer(["ba", "b \u5e74"])
    specials = ["<pad>", "<s>", "</s>", "<unk>"]
    assert [tokenizer.token_to_id(token) for token in specials] == [0, 1, 2, 3]
    assert tokenizer.vocab_size == 8
    assert tokenizer.encode(["ab \u5e74", "", "xa"]) == [[5, 6, 4, 7, 2], [2], [3, 5, 2]]
    assert tokenizer.decode([[1, 5, 6, 4, 7, 2, 0, 0], []]) == ["ab \u5e74", ""]
    assert tokenizer.decode([[3, 5, 2]], skip_special_tokens=False) == ["<unk>a</s>"]


@settings(max_examples=300, deadline=None, derandomize=True)
@given(texts=st.lists(st.text(), min_size=1, max_size=4))
@example(texts=[" \n\t a  b ", "\u5e74\u3000\u00a0", "\0e\u0301\u1e9b\u0323", "\u200d\U0001f600"])
def test_known_characters_round_trip(texts: list[str]) -> None:
    tokenizer = train_tokenizer(texts)
    assert tokenizer.decode(tokenizer.encode(texts)) == texts
    rows = tokenizer.encode(texts)
    assert [len(row) for row in rows] == [len(text) + 1 for text in texts]
    assert all(row[-1] == 2 and 3 not in row for row in rows)


def test_trained_tokenizer_is_read_back_and_by_transformers(tmp_path: Path) -> None:
    import transformers

    tokenizer = train_tokenizer(iter(PAIRS))
    again = reloaded(tokenizer, tmp_path)
    texts = [*PAIRS, "zzz 3", "", "a</s>b"]
    assert again.encode(texts) == tokenizer.encode(texts)
    assert again.files() == tokenizer.files()
    oracle = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    assert oracle(texts)["input_ids"] == tokenizer.encode(texts)
    assert train_tokenizer(reversed(PAIRS)).files() == tokenizer.files()


def test_a_file_cannot_cut_or_pad_texts(tmp_path: Path) -> None:
    truncation = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    padding = {
        "strategy": {"Fixed": 9},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<pad>",
    }
    tokenizer = load_tokenizer(write_json(tmp_path, truncation=truncation, padding=padding))
    assert tokenizer is not None
    assert [len(row) for row in tokenizer.encode(["", "half past"])] == [1, 10]


# Bad input


@pytest.mark.parametrize("texts", ["text", b"text", None, 3, {"a"}, iter(["a"])])
def test_texts_must_be_a_list(gpt2: Tokenizer, texts: Any) -> None:
    with pytest.raises(TokenizerError, match="texts must be a list of strings, not"):
        gpt2.encode(texts)


@pytest.mark.parametrize("item", [None, 3, b"x", ["a"], ("a", "b")])
def test_every_text_must_be_a_string(gpt2: Tokenizer, item: Any) -> None:
    with pytest.raises(TokenizerError, match=r"texts\[1\] must be a string, not"):
        gpt2.encode(["a", item])
    with pytest.raises(TokenizerError, match=r"texts\[0\] must be a string, not"):
        train_tokenizer([item])


@pytest.mark.parametrize(
    ("text", "where"),
    [("\ud800", "D800 at character 0"), ("\u5e74\u00e9\udfff\ud83d\ude00", "DFFF at character 2")],
)
def test_lone_surrogates(gpt2: Tokenizer, text: str, where: str) -> None:
    with pytest.raises(TokenizerError, match=rf"texts\[1\] has the lone surrogate U\+{where}"):
        gpt2.encode(["fine", text])
    with pytest.raises(TokenizerError, match=rf"texts\[1\] .*{where}"):
        train_tokenizer(["fine", text])


@pytest.mark.parametrize("token", [-1, 2**32, 1.0, True, "1", None])
def test_bad_ids(gpt2: Tokenizer, token: Any) -> None:
    with pytest.raises(TokenizerError, match=r"ids\[1\]\[2\] is"):
        gpt2.decode([[1], [0, 1, token]])


@pytest.mark.parametrize("pairs", [[("a",)], [("a", "b"), ("a",)], ["ab"], [("a", 2)], [None]])
def test_pairs_must_be_two_texts(gpt2: Tokenizer, pairs: Any) -> None:
    with pytest.raises(TokenizerError, match="pass two texts|must be a string"):
        gpt2.encode_pairs(pairs)


@pytest.mark.parametrize("ids", [[1, 2], ["12"], [None]])
def test_ids_must_be_lists_of_lists(gpt2: Tokenizer, ids: Any) -> None:
    with pytest.raises(TokenizerError, match=r"ids\[0\] must be a list of integers"):
        gpt2.decode(ids)


def test_ids_past_the_vocabulary_decode_to_nothing(gpt2: Tokenizer) -> None:
    (ids,) = gpt2.encode(["half"])
    assert gpt2.decode([[*ids, gpt2.vocab_size, 2**32 - 1]]) == ["half"]


def test_a_long_text(gpt2: Tokenizer) -> None:
    text = "half past three, " * 62_000  # 1 MiB
    assert gpt2.decode(gpt2.encode([text])) == [text]


# Damaged files


def test_no_files_no_tokenizer(tmp_path: Path) -> None:
    assert load_tokenizer(tmp_path) is None


@pytest.mark.parametrize("missing", ["vocab.json", "merges.txt"])
def test_half_a_pair(tmp_path: Path, missing: str) -> None:
    (write_gpt2_files(tmp_path) / missing).unlink()
    with pytest.raises(TokenizerError, match="alone; a tokenizer takes vocab.json and merges.txt"):
        load_tokenizer(tmp_path)


def test_truncated_tokenizer_json(tmp_path: Path) -> None:
    content = train_tokenizer(["ab"]).files()["tokenizer.json"]
    for length in range(0, len(content) - 1, 7):
        (tmp_path / "tokenizer.json").write_bytes(content[:length])
        with pytest.raises(TokenizerError, match="tokenizer.json does not work"):
            load_tokenizer(tmp_path)


BROKEN_TEMPLATE = {
    "type": "TemplateProcessing",
    "pair": [],
    "special_tokens": {},
    "single": [{"SpecialToken": {"id": "</s>", "type_id": 0}}],
}


@pytest.mark.parametrize(
    "changes",
    [
        {"model": None},
        {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]}},
        {"model": {"type": "WordLevel", "vocab": {"b": 0}, "unk_token": "gone"}},
        {"model": {"type": "Unigram", "vocab": [], "unk_id": 5}},
        {"model": {"type": "Pickle"}},
        {"post_processor": BROKEN_TEMPLATE},  # a Rust panic, and only when encoding
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},  # a Rust panic
        {
            "pre_tokenizer": {
                "type": "Split",
                "pattern": {"Regex": "("},
                "behavior": "Isolated",
                "invert": False,
            }
        },
        {"version": "9.0"},
    ],
    ids=str,
)
def test_broken_tokenizer_json(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(TokenizerError, match="tokenizer.json does not work"):
        load_tokenizer(write_json(tmp_path, **changes))


@pytest.mark.parametrize("content", [b"\xff\xfe", b"[]", b"{}{}", b"[" * 5000, b'{"a": 1'])
def test_tokenizer_json_of_something_else(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(TokenizerError, match="tokenizer.json does not work"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("vocab.json", b"{"),
        ("vocab.json", b'{"a": "b"}'),
        ("vocab.json", b'{"a": -1}'),
        ("vocab.json", b"\xff"),
        ("merges.txt", b"zz qq"),
        ("merges.txt", b"one\ntwo three four"),
        ("merges.txt", b"\xff\xfe"),
    ],
)
def test_broken_pair(tmp_path: Path, name: str, content: bytes) -> None:
    (write_gpt2_files(tmp_path) / name).write_bytes(content)
    with pytest.raises(TokenizerError, match="vocab.json with .*merges.txt does not work"):
        load_tokenizer(tmp_path)


def link_out(path: Path) -> None:
    (path.parent.parent / "secret").write_text("{}")
    path.symlink_to("../secret")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (os.mkfifo, "is not a regular file"),
        (Path.mkdir, "is not a regular file"),
        (lambda p: p.symlink_to("/dev/zero"), "outside the checkpoint"),
        (lambda p: p.symlink_to("nowhere"), "cannot be read"),
        (link_out, "outside the checkpoint"),
    ],
)
@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.json", "tokenizer_config.json"])
def test_only_regular_files_of_the_folder_are_opened(
    tmp_path: Path, name: str, make: Any, message: str
) -> None:
    folder = write_gpt2_files(tmp_path / "m")
    (folder / name).unlink(missing_ok=True)
    make(folder / name)
    with pytest.raises(TokenizerError, match=f"{name} .*{message}"):
        load_tokenizer(folder)


def test_links_of_hugging_faces_cache_are_followed(tmp_path: Path) -> None:
    folder = write_gpt2_files(tmp_path / "m")
    snapshot = tmp_path / "models--me--tiny" / "snapshots" / "0a1b"
    for place in (snapshot, snapshot.parent.parent / "blobs"):
        place.mkdir(parents=True)
    for file in list(folder.iterdir()):
        file.rename(snapshot.parent.parent / "blobs" / f"hash-{file.name}")
        (snapshot / file.name).symlink_to(f"../../blobs/hash-{file.name}")
    found = load_tokenizer(snapshot)
    assert found is not None and found.decode(found.encode(["a b"])) == ["a b"]


def test_a_giant_file_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").touch()
    os.truncate(tmp_path / "tokenizer.json", 1 << 30)  # sparse
    with pytest.raises(TokenizerError, match="1,073,741,824 bytes; at most 200,000,000 are read"):
        load_tokenizer(tmp_path)
