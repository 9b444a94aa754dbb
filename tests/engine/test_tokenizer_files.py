"""Vocabulary files: ids equal transformers' own, and damage is named."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizer_oracle import (
    CORPUS,
    TEXTS,
    assert_same,
    assert_same_padding,
    assert_same_pairs,
    loaded,
    reloaded,
    write,
)

import tilewise
from tilewise.errors import TokenizerError
from tilewise.text import Tokenizer, load_tokenizer, train_tokenizer

BERT_WORDS = (
    "[PAD] [UNK] [CLS] [SEP] [MASK] the half past three ##s ##eenth sevent of march March two cafe "
    "caf\u00e9 naive in after ##noon , % ! ' - a \u5348 \u5e74 3 ##0 2 x ##x"
).split()


# vocab.txt


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    (tmp_path / "vocab.txt").write_text("\n".join(BERT_WORDS) + "\n")
    return tmp_path


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"do_lower_case": False},
        {"do_lower_case": False, "strip_accents": True},
        {"do_lower_case": True, "strip_accents": False},
        {"tokenize_chinese_chars": False},
        {"mask_token": {"content": "[MASK]", "lstrip": True, "__type": "AddedToken"}},
        {"additional_special_tokens": ["<new>"], "padding_side": "left"},
    ],
    ids=str,
)
def test_bert(bert: Path, config: dict[str, Any], tmp_path: Path) -> None:
    import transformers

    write(bert, tokenizer_config=config | {"tokenizer_class": "BertTokenizer"})
    tokenizer = loaded(bert)
    oracle = transformers.BertTokenizer.from_pretrained(bert)
    texts = [*TEXTS, "the [MASK] of [SEP]", "half <new> three"]
    assert_same(tokenizer, oracle, texts)
    assert_same_pairs(tokenizer, oracle)
    again = reloaded(tokenizer, tmp_path / "again")
    assert again.encode(texts) == tokenizer.encode(texts)
    assert again.padding_side == tokenizer.padding_side == config.get("padding_side", "right")


def test_bert_decodes(bert: Path) -> None:
    tokenizer = loaded(bert)
    (ids,) = tokenizer.encode(["The Seventeenth of March"])
    assert tokenizer.decode([ids]) == ["the seventeenth of march"]


def test_bert_added_tokens(bert: Path) -> None:
    import transformers

    count = len(BERT_WORDS)
    write(
        bert,
        added_tokens={"<b>": count + 1, "<a>": count},
        special_tokens_map={"pad_token": "<a>", "mask_token": {"content": "[MASK]"}},
    )
    tokenizer = loaded(bert)
    assert [tokenizer.token_to_id(token) for token in ("<a>", "<b>")] == [count, count + 1]
    oracle = transformers.BertTokenizer.from_pretrained(bert)
    assert_same(tokenizer, oracle, [*TEXTS, "the<b>half <a> [MASK]"])


def test_bert_added_tokens_decoder(bert: Path) -> None:
    import transformers

    decoder = {
        "4": {"content": "[MASK]", "lstrip": True, "special": True},
        str(len(BERT_WORDS)): {"content": "Half Past", "normalized": True, "single_word": True},
    }
    write(bert, tokenizer_config={"added_tokens_decoder": decoder})
    texts = [*TEXTS, "the  [MASK] half past three", "half pasts"]
    assert_same(loaded(bert), transformers.BertTokenizer.from_pretrained(bert), texts)


# vocab.json and merges.txt


def write_byte_level(folder: Path, specials: list[str]) -> Path:
    from tokenizers import ByteLevelBPETokenizer

    trainer = ByteLevelBPETokenizer()
    trainer.train_from_iterator(
        CORPUS * 4, vocab_size=320, special_tokens=specials, show_progress=False
    )
    trainer.save_model(str(folder))
    return folder


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"add_bos_token": True},
        {"add_prefix_space": True},
        {"add_bos_token": True, "add_prefix_space": True, "pad_token": "<pad>"},
    ],
    ids=str,
)
def test_gpt2(tmp_path: Path, config: dict[str, Any]) -> None:
    import transformers

    write_byte_level(tmp_path, ["<|endoftext|>"])
    write(tmp_path, tokenizer_config=config | {"tokenizer_class": "GPT2Tokenizer"})
    oracle = transformers.GPT2Tokenizer.from_pretrained(tmp_path)
    assert_same(loaded(tmp_path), oracle, [*TEXTS, "half<|endoftext|> past"])


@pytest.mark.parametrize("named", [True, False])
def test_opt(tmp_path: Path, named: bool) -> None:
    import transformers

    write_byte_level(tmp_path, ["<s>", "<pad>", "</s>", "<unk>"])
    names = {name: "</s>" for name in ("bos_token", "eos_token", "unk_token")}
    config = names | {"pad_token": "<pad>", "add_bos_token": True}
    write(tmp_path, tokenizer_config=config | {"tokenizer_class": "GPT2Tokenizer"})
    oracle = transformers.GPT2Tokenizer.from_pretrained(tmp_path)
    if not named:
        write(tmp_path, config={"model_type": "opt"})
        (tmp_path / "tokenizer_config.json").unlink()
    tokenizer = loaded(tmp_path)
    assert tokenizer.encode(["a"])[0][0] == tokenizer.token_to_id("</s>")
    assert_same(tokenizer, oracle)


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config": {"tokenizer_class": "RobertaTokenizer"}},
        {"tokenizer_config": {"tokenizer_class": "BartTokenizerFast", "add_prefix_space": True}},
        {"config": {"model_type": "roberta"}},
        {
            "config": {"model_type": "bart"},
            "special_tokens_map": {"mask_token": {"content": "<mask>", "lstrip": True}},
        },
    ],
    ids=str,
)
def test_roberta_and_bart(tmp_path: Path, files: dict[str, Any]) -> None:
    import transformers

    write_byte_level(tmp_path, ["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    write(tmp_path, **files)
    oracle = transformers.RobertaTokenizer.from_pretrained(tmp_path)
    tokenizer = loaded(tmp_path)
    assert_same(tokenizer, oracle, [*TEXTS, "half <mask> past"])
    assert_same_pairs(tokenizer, oracle)


@pytest.mark.parametrize("whole", [True, False], ids=["tokenizer.json", "vocab.json"])
def test_special_tokens_of_old_folders_are_saved(tmp_path: Path, whole: bool) -> None:
    import transformers

    write_byte_level(tmp_path, ["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    mask = {"content": "<mask>", "lstrip": True, "rstrip": False, "normalized": False}
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "mask_token": mask}
    write(tmp_path, special_tokens_map=tokens, config={"model_type": "gpt2"})
    if whole:
        (tmp_path / "tokenizer.json").write_bytes(loaded(tmp_path).files()["tokenizer.json"])
        (tmp_path / "vocab.json").unlink()
    again = tmp_path / "again"
    reloaded(loaded(tmp_path), again)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(again)
    found = [theirs.bos_token, theirs.eos_token, theirs.pad_token, theirs.mask_token]
    assert found == ["<s>", "</s>", "<pad>", "<mask>"]
    assert theirs(["half <mask>"])["input_ids"] == loaded(again).encode(["half <mask>"])


def test_gpt1(tmp_path: Path) -> None:
    import transformers

    vocab = ["<unk>", *"abcdefghijklmnoprstuvwxyz,3", *(f"{c}</w>" for c in "aefhnrst,3")]
    merges = [("t", "h"), ("th", "e</w>"), ("r", "e"), ("a", "l")]
    write(tmp_path, vocab={token: i for i, token in enumerate([*vocab, *map("".join, merges)])})
    lines = "".join(f"{a} {b}\n" for a, b in merges)
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + lines)
    write(tmp_path, config={"model_type": "openai-gpt"})
    tokenizer = loaded(tmp_path)
    assert_same(tokenizer, transformers.OpenAIGPTTokenizer.from_pretrained(tmp_path))
    assert tokenizer.decode(tokenizer.encode(["The  stra"])) == ["the stra"]


def test_any_bytes_round_trip(byte_level: Tokenizer) -> None:
    draw = random.Random(0)
    rows = [draw.randbytes(draw.randrange(25)) for _ in range(10_000)]
    # As they are, as text of every byte's own character, and as any characters at all.
    texts = [row.decode(errors="replace") for row in rows]
    texts += [row.decode("latin-1") for row in rows]
    texts += [row.decode("utf-32", errors="replace") for row in rows]
    assert byte_level.decode(byte_level.encode(texts)) == texts


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return loaded(write_byte_level(tmp_path_factory.mktemp("bytes"), ["<|endoftext|>"]))


# Cutting


PAIRS = [
    (first, second)
    for first in ("a", "the half past three", CORPUS[0], "x" * 30)
    for second in ("of", "half past three", "in the afternoon", CORPUS[2])
]
PAIRED: dict[str, dict[str, Any]] = {
    "BertTokenizer": {},
    "RobertaTokenizer": {},
    "GPT2Tokenizer": {},  # no template: the types are the library's own
    "GPT2Tokenizer-bos": {"add_bos_token": True},
}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", PAIRED)
def test_pairs_are_cut_longest_first(tmp_path: Path, kind: str, side: str) -> None:
    import transformers

    name = kind.partition("-")[0]
    if name == "BertTokenizer":
        (tmp_path / "vocab.txt").write_text("\n".join(BERT_WORDS))
    else:
        specials = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
        write_byte_level(tmp_path, specials if name[0] == "R" else ["<|endoftext|>"])
    settings = PAIRED[kind] | {"truncation_side": side, "tokenizer_class": name}
    write(tmp_path, tokenizer_config=settings)
    tokenizer, oracle = loaded(tmp_path), getattr(transformers, name).from_pretrained(tmp_path)
    longest = max(len(ids) for ids, _ in tokenizer.encode_pairs(PAIRS))
    added = len(tokenizer.encode_pairs([("", "")])[0][0])
    assert longest > 30 > added
    for length in range(added + 1, longest + 2):
        found = tokenizer.encode_pairs(PAIRS, max_length=length)
        for pair, (ids, types) in zip(PAIRS, found, strict=True):
            expected = oracle(
                *pair, truncation="longest_first", max_length=length, return_token_type_ids=True
            )
            assert (ids, types) == (expected["input_ids"], expected["token_type_ids"]), length


def test_no_room_for_pairs(bert: Path) -> None:
    tokenizer = loaded(bert)
    assert [len(ids) for ids, _ in tokenizer.encode_pairs([("a", ""), ("", "")])] == [4, 3]
    half = BERT_WORDS.index("half")  # between [CLS], 2, and [SEP], 3
    found = tokenizer.encode_pairs([("half past", "a")], max_length=4)
    assert found == [([2, half, 3, 3], [0, 0, 0, 1])]
    for length in (0, 3, 4.0, True):
        with pytest.raises(TokenizerError, match="max_length is .* from 4"):
            tokenizer.encode_pairs([("a", "a")], max_length=length)


@pytest.mark.parametrize("length", [0, 2, -1, 2.0, True, "9"])
def test_no_room_for_text(bert: Path, length: Any) -> None:
    with pytest.raises(TokenizerError, match="max_length is .* from 3"):
        loaded(bert).encode(["a"], max_length=length)


def test_sides_come_from_the_file(bert: Path) -> None:
    write(bert, tokenizer_config={"truncation_side": "left", "padding_side": "left"})
    tokenizer = loaded(bert)
    assert (tokenizer.truncation_side, tokenizer.padding_side) == ("left", "left")
    assert tokenizer.encode(["half past"], max_length=3) == tokenizer.encode(["past"])
    assert len(tokenizer.encode(["half past three"])[0]) == 5
    with pytest.raises(TokenizerError, match="truncation_side is 'top'; takes left or right"):
        tokenizer.encode(["a"], max_length=5, truncation_side="top")


# Padding


PADDED = {
    "BertTokenizer": {},
    "BertTokenizer-named": {"pad_token": {"content": "[UNK]", "__type": "AddedToken"}},
    "RobertaTokenizer": {},
    "GPT2Tokenizer": {"pad_token": "<|endoftext|>"},
    "GPT2Tokenizer-added": {"pad_token": "<new>"},
}


@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("whole", [True, False], ids=["tokenizer.json", "vocabulary"])
@pytest.mark.parametrize("kind", PADDED)
def test_padding(tmp_path: Path, kind: str, whole: bool, side: str | None) -> None:
    import transformers

    name = kind.partition("-")[0]
    if name == "BertTokenizer":
        (tmp_path / "vocab.txt").write_text("\n".join(BERT_WORDS))
    else:
        specials = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
        write_byte_level(tmp_path, specials if name[0] == "R" else ["<|endoftext|>"])
    sides = {} if side is None else {"padding_side": side}
    write(tmp_path, tokenizer_config=PADDED[kind] | sides | {"tokenizer_class": name})
    oracle = getattr(transformers, name).from_pretrained(tmp_path)
    if whole:
        tmp_path = tmp_path / "whole"
        oracle.save_pretrained(tmp_path)
    tokenizer = loaded(tmp_path)
    assert tokenizer.padding_side == side or side is None
    assert_same_padding(tokenizer, oracle)
    assert_same_padding(reloaded(tokenizer, tmp_path / "again"), oracle)


@pytest.mark.parametrize("config", [{}, {"padding_side": "right"}, {"pad_token": "[CLS]"}], ids=str)
def test_padding_that_tokenizer_json_asks_for(bert: Path, config: dict[str, Any]) -> None:
    import tokenizers
    import transformers

    backend = tokenizers.Tokenizer.from_str(loaded(bert).files()["tokenizer.json"].decode())
    backend.enable_padding(direction="left", pad_id=4, pad_token="[MASK]", length=99)
    (bert / "whole").mkdir()
    backend.save(str(bert / "whole" / "tokenizer.json"))
    write(bert / "whole", tokenizer_config=config)
    tokenizer = loaded(bert / "whole")
    oracle = transformers.PreTrainedTokenizerFast.from_pretrained(bert / "whole")
    assert tokenizer.padding_side == oracle.padding_side == config.get("padding_side", "left")
    assert_same_padding(tokenizer, oracle)
    assert_same_padding(reloaded(tokenizer, bert / "again"), oracle)
    assert [len(row) for row in tokenizer.encode(["half", "half past"])] == [3, 4]


@pytest.mark.parametrize("named", ["model_type", "tokenizer_class"])
@pytest.mark.parametrize("kind", ["bert", "roberta", "gpt2"])
def test_padding_that_goes_without_saying(tmp_path: Path, kind: str, named: str) -> None:
    """As in the first folders of BERT and RoBERTa: tokenizer.json, and no file names a role."""
    import transformers

    if kind == "bert":
        (tmp_path / "vocab.txt").write_text("\n".join(BERT_WORDS))
    else:
        write_byte_level(tmp_path, ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "<|endoftext|>"])
    write(tmp_path, config={"model_type": kind})
    whole = loaded(tmp_path).files()["tokenizer.json"]
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "tokenizer.json").write_bytes(whole)
    name = {"bert": "BertTokenizer", "roberta": "RobertaTokenizer", "gpt2": "GPT2Tokenizer"}[kind]
    if named == "model_type":
        write(tmp_path / "m", config={"model_type": kind}, tokenizer_config={"model_max_length": 9})
    else:
        write(tmp_path / "m", tokenizer_config={"tokenizer_class": f"{name}Fast"})
    tokenizer = loaded(tmp_path / "m")
    oracle = getattr(transformers, name).from_pretrained(tmp_path / "m")
    if kind == "gpt2":
        assert oracle.pad_token is None
        with pytest.raises(TokenizerError, match="has no padding token"):
            tokenizer.pad([[1]])
        return
    assert_same_padding(tokenizer, oracle)
    write(tmp_path / "m", tokenizer_config={"pad_token": None})
    with pytest.raises(TokenizerError, match="has no padding token"):
        loaded(tmp_path / "m").pad([[1]])


def test_padding_without_a_token(byte_level: Tokenizer, bert: Path) -> None:
    with pytest.raises(TokenizerError, match="has no padding token: pass pad_token_id"):
        byte_level.pad([[1, 2], [3]])
    (bert / "whole").mkdir()
    files = loaded(bert).files()
    (bert / "whole" / "tokenizer.json").write_bytes(files["tokenizer.json"])
    write(bert / "whole", tokenizer_config={"pad_token": "gone"})
    with pytest.raises(TokenizerError, match="tokenizer.json has no padding token"):
        loaded(bert / "whole").pad([[1, 2], [3]])
    ids, mask = byte_level.pad([[1, 2], [], [3]], pad_token_id=7)
    assert ids.tolist() == [[1, 2], [7, 7], [3, 7]] and mask.tolist() == [[1, 1], [0, 0], [1, 0]]
    ids, mask = byte_level.pad([], pad_token_id=7)
    assert ids.shape == mask.shape == (0, 0)
    for wrong in (-1, 2**64, 1.0, True, "7"):
        with pytest.raises(TokenizerError, match="pad_token_id is .*; token ids are integers"):
            byte_level.pad([[1]], pad_token_id=wrong)
    for rows in (5, [5], ["ab"], [b"ab"], b"ab", {(1, 2): 3}, [[1], [-1]], [[1.0]]):
        with pytest.raises(TokenizerError, match="ids.* (must be a list|token ids are integers)"):
            byte_level.pad(rows, pad_token_id=7)
    for function in (byte_level.pad, byte_level.decode):
        with pytest.raises(TokenizerError, match="ids must be a list of lists, not generator"):
            function(row for row in [[1], [2, 3]])
        with pytest.raises(TokenizerError, match="not Tensor; of a tensor: tensor.tolist()"):
            function(torch.tensor([[1, 2]]))
    write(bert / "whole", tokenizer_config={"pad_token": "\ud800", "mask_token": 3})
    tokenizer = loaded(bert / "whole")
    for role in ("pad_token", "mask_token"):
        with pytest.raises(TokenizerError, match="surrogates not allowed|3, which is no text"):
            tokenizer.special_token_id(role)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["decoder_layers", "encoder_layers"])
def test_models_take_padded_texts(tmp_path: Path, side: str, kind: str) -> None:
    tokenizer = train_tokenizer(TEXTS)
    tokenizer.padding_side = side
    torch.manual_seed(0)
    values = {"model_type": "tilewise-transformer", "vocab_size": tokenizer.vocab_size,
              "hidden_size": 16, "num_heads": 2, "ffn_size": 32, "max_positions": 160}  # fmt: skip
    layers = {"decoder_layers": 0, "positions": "rotary"} | {kind: 2}
    network = tilewise.build(tilewise.ModelConfig(**values | layers))  # type: ignore[arg-type]
    tilewise.Model(network, tokenizer).save(tmp_path / "m")
    model = tilewise.load(tmp_path / "m")
    assert model.tokenizer is not None and model.tokenizer.padding_side == "right"
    model.tokenizer.padding_side = side
    rows = model.tokenizer.encode(TEXTS)
    ids, mask = model.tokenizer.pad(rows)
    assert (ids[mask == 0] == 0).all() and (mask == 0).any()
    found = model(ids, mask).last_hidden_state
    for row, states, real in zip(rows, found, mask.bool(), strict=True):
        alone = model(torch.tensor([row])).last_hidden_state[0]
        torch.testing.assert_close(states[real], alone, rtol=1e-5, atol=1e-5)


# Chat templates


TEMPLATE = b"{% for m in messages %}{{ m['content'] }}\xe5\xb9\xb4\r\n{% endfor %}"


@pytest.mark.parametrize("config", [{}, {"chat_template": "{{ messages }}"}], ids=str)
def test_chat_templates_are_carried_along(bert: Path, config: dict[str, Any]) -> None:
    import transformers

    write(bert, tokenizer_config=config)
    assert loaded(bert).chat_template is None and "chat_template.jinja" not in loaded(bert).files()
    (bert / "chat_template.jinja").write_bytes(TEMPLATE)
    again = reloaded(loaded(bert), bert / "again")
    assert (bert / "again" / "chat_template.jinja").read_bytes() == again.chat_template == TEMPLATE
    oracle = transformers.BertTokenizer.from_pretrained(bert / "again")
    chat = [{"role": "user", "content": "half"}]
    assert oracle.apply_chat_template(chat, tokenize=False) == "half\u5e74\n"
    settings = json.loads((bert / "again" / "tokenizer_config.json").read_text())
    assert settings.get("chat_template") == config.get("chat_template")


def test_hostile_chat_templates(bert: Path) -> None:
    template = bert / "chat_template.jinja"
    template.write_bytes(b"\xff{" * 500_000)  # no UTF-8 and no template, and carried all the same
    assert loaded(bert).files()["chat_template.jinja"] == template.read_bytes()
    template.write_bytes(b"x" * 1_000_001)
    with pytest.raises(TokenizerError, match="1,000,001 bytes; at most 1,000,000 are read"):
        load_tokenizer(bert)
    template.unlink()
    template.symlink_to("/etc/passwd")
    with pytest.raises(TokenizerError, match="chat_template.jinja is a link to .*, outside"):
        load_tokenizer(bert)


# Damage


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("vocab.txt", b"", "has no \\[CLS\\]|does not work"),
        ("vocab.txt", b"\xff\xfe", "vocab.txt does not work"),
        ("vocab.txt", b"[CLS]\n[SEP]\na\n", "has no .UNK."),
        ("tokenizer_config.json", b"[" * 5000, "tokenizer_config.json does not work"),
        ("tokenizer_config.json", b"[]", "holds no JSON object"),
        ("tokenizer_config.json", b'{"do_lower_case": "yes"}', "does not work"),
        ("tokenizer_config.json", b'{"padding_side": "up"}', "padding_side is"),
        ("tokenizer_config.json", b'{"unk_token": 3}', "a special token is 3"),
        ("tokenizer_config.json", b'{"cls_token": "\\ud800"}', "does not work"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": [1]}', "does not work"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"x": "a"}}', "does not work"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"999": "q"}}', "gets the id"),
        ("tokenizer_config.json", b'{"extra_special_tokens": 4}', "does not work"),
        ("special_tokens_map.json", b'{"cls_token": {"content": []}}', "a special token is"),
        ("added_tokens.json", b'{"q": "w"}', "gives 'q' the id 'w', which is no integer"),
        ("added_tokens.json", b'{"q": 1e400}', "the id inf, which is no integer"),
        ("added_tokens.json", b'{"q": [1]}', r"the id \[1\], which is no integer"),
        ("added_tokens.json", b'{"q": true}', "the id True, which is no integer"),
        ("added_tokens.json", b"\x00", "added_tokens.json does not work"),
    ],
)
def test_damaged_files(bert: Path, name: str, content: bytes, message: str) -> None:
    (bert / name).write_bytes(content)
    with pytest.raises(TokenizerError, match=message):
        load_tokenizer(bert)


def test_code_in_settings_does_nothing(bert: Path) -> None:
    plain = loaded(bert).encode(TEXTS)
    template = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    write(bert, tokenizer_config={"auto_map": {"AutoTokenizer": "evil.Tok"}, "vocab_file": "/etc/x",
                                  "chat_template": template})  # fmt: skip
    assert loaded(bert).encode(TEXTS) == plain


@pytest.mark.parametrize("name", ["vocab.txt", "tokenizer_config.json", "added_tokens.json"])
def test_only_regular_files(bert: Path, name: str) -> None:
    (bert / name).unlink(missing_ok=True)
    (bert / name).symlink_to("/dev/zero")
    with pytest.raises(TokenizerError, match=f"{name} is a link to /dev/zero, outside"):
        load_tokenizer(bert)
