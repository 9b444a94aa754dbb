"""Models of the sentencepiece library: ids equal transformers' own, and damage is named."""

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tokenizer_oracle import (
    CORPUS,
    TEXTS,
    assert_same,
    assert_same_padding,
    loaded,
    reloaded,
    write,
)

from tilewise.errors import TokenizerError
from tilewise.text import Tokenizer, load_tokenizer, train_tokenizer

TRAINING = [text * 3 for text in [*CORPUS, "a b c d e f g h i j k l m n o p q r s t u v w x y z"]]
SPECIALS = {
    "t5": {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1},
    "llama": {"unk_id": 0, "bos_id": 1, "eos_id": 2, "byte_fallback": True},
    "mbart": {"unk_id": 0, "bos_id": 1, "eos_id": 2},
}


def train(kind: str, **more: Any) -> bytes:
    spm = pytest.importorskip("sentencepiece", reason="the sentencepiece extra is not installed")
    model = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(TRAINING * 4),
        model_writer=model,
        **{"vocab_size": 90, "hard_vocab_limit": False, "normalization_rule_name": "identity"}
        | {"minloglevel": 2, "character_coverage": 1.0}
        | SPECIALS[kind]
        | more,
    )
    return model.getvalue()


def pieces(model: bytes) -> Any:
    import sentencepiece

    loaded_model = sentencepiece.SentencePieceProcessor()
    loaded_model.LoadFromSerializedProto(model)
    return loaded_model


def scored(model: Any) -> list[tuple[str, float]]:
    return [(model.id_to_piece(i), model.get_score(i)) for i in range(len(model))]


@pytest.mark.parametrize("extra_ids", [100, 3, 0])
def test_t5(tmp_path: Path, extra_ids: int) -> None:
    import transformers

    model = train("t5")
    (tmp_path / "spiece.model").write_bytes(model)
    write(tmp_path, tokenizer_config={"extra_ids": extra_ids, "tokenizer_class": "T5Tokenizer"})
    tokenizer, library = loaded(tmp_path), pieces(model)
    assert tokenizer.encode(TEXTS) == [[*library.encode(text), 1] for text in TEXTS]
    assert tokenizer.vocab_size == len(library) + extra_ids
    extra = [(f"<extra_id_{i}>", 0.0) for i in reversed(range(extra_ids))]
    oracle = transformers.T5Tokenizer(vocab=[*scored(library), *extra], extra_ids=extra_ids)
    texts = [*CORPUS, "", "half <extra_id_0> past<extra_id_2>", "a</s>b"]
    assert_same(tokenizer, oracle, texts)
    ids = tokenizer.encode(["half<extra_id_1> past"])
    assert tokenizer.decode(ids) == oracle.batch_decode(ids, skip_special_tokens=True)
    again = reloaded(tokenizer, tmp_path / "again")
    assert again.encode(texts) == tokenizer.encode(texts)
    assert again.files() == tokenizer.files()


def test_llama(tmp_path: Path) -> None:
    kept = {"model_type": "bpe", "remove_extra_whitespaces": False, "vocab_size": 400}
    model = train("llama", **kept)
    (tmp_path / "tokenizer.model").write_bytes(model)
    tokenizer, library = loaded(tmp_path), pieces(model)
    assert tokenizer.encode(TEXTS) == [[1, *library.encode(text)] for text in TEXTS]
    assert tokenizer.decode(tokenizer.encode(TEXTS)) == TEXTS
    (row,) = tokenizer.encode(["half</s>past"])
    assert row[row.index(2) + 1] == library.piece_to_id("p") or not library.id_to_piece(
        row[row.index(2) + 1]
    ).startswith("\u2581")
    write(tmp_path, tokenizer_config={"add_bos_token": False, "add_eos_token": True})
    assert loaded(tmp_path).encode(["half"]) == [[*library.encode("half"), 2]]
    joined = tokenizer.encode_after(["half past ", ""], ["three \U0001f600", "half"])
    assert [ids for ids, _ in joined] == tokenizer.encode(["half past three \U0001f600", "half"])
    assert [tokenizer.decode([ids[n:]])[0].strip() for ids, n in joined] == [
        "three \U0001f600",
        "half",
    ]


def write_mbart(folder: Path, **settings: Any) -> tuple[Tokenizer, Any]:
    """(ours of the folder's sentencepiece model, transformers' own)."""
    import transformers

    model = train("mbart")
    (folder / "sentencepiece.bpe.model").write_bytes(model)
    write(folder, config={"model_type": "mbart"}, tokenizer_config=settings)
    first = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    codes = transformers.models.mbart.tokenization_mbart.FAIRSEQ_LANGUAGE_CODES
    last = [(code, 0.0) for code in [*codes, "<mask>"]]
    vocab = [*first, *scored(pieces(model))[3:], *last]
    return loaded(folder), transformers.MBartTokenizer(vocab=vocab, **settings)


def test_mbart(tmp_path: Path) -> None:
    tokenizer, oracle = write_mbart(tmp_path, src_lang="ro_RO")
    assert_same(tokenizer, oracle, [*CORPUS, "", "half <mask> past"])
    ids = tokenizer.encode(CORPUS)
    assert all(row[-2:] == [2, tokenizer.token_to_id("ro_RO")] for row in ids)
    assert tokenizer.decode(ids) == oracle.batch_decode(ids, skip_special_tokens=True)
    assert reloaded(tokenizer, tmp_path / "again").encode(TEXTS) == tokenizer.encode(TEXTS)


@pytest.mark.parametrize("form", ["sentencepiece", "tokenizer.json", "mbart50"])
@pytest.mark.parametrize("own", [None, "de_DE"])
def test_targets_of_mbart(tmp_path: Path, form: str, own: str | None) -> None:
    import transformers

    settings = {"src_lang": "ro_RO"} | ({"tgt_lang": own} if own else {})
    tokenizer, oracle = write_mbart(tmp_path, **settings)
    if form == "mbart50":
        vocab = scored(pieces((tmp_path / "sentencepiece.bpe.model").read_bytes()))
        oracle = transformers.MBart50Tokenizer(vocab=vocab, **settings)
    if form != "sentencepiece":
        oracle.save_pretrained(tmp_path / "json")
        tokenizer = loaded(tmp_path / "json")
    texts = [*CORPUS, "", "half <mask> past", "half ro_RO past"]
    assert tokenizer.encode(texts) == oracle(texts)["input_ids"]
    found = tokenizer.encode_targets(texts)
    assert found == oracle(text_target=texts)["input_ids"]
    assert (found == tokenizer.encode(texts)) == (own is None)
    oracle.tgt_lang = "ja_XX"
    assert tokenizer.encode_targets(texts, "ja_XX") == oracle(text_target=texts)["input_ids"]
    assert tokenizer.encode(texts) == oracle(texts)["input_ids"]
    token = tokenizer.token_to_id("ja_XX")
    assert token is not None and tokenizer.language(token) == "ja_XX"
    assert tokenizer.language(2) is None
    for code in ("xx_XX", "half", "</s>"):
        with pytest.raises(TokenizerError, match=f"the target language is '{code}'"):
            tokenizer.encode_targets(texts, code)


def test_xlm_roberta(tmp_path: Path) -> None:
    import transformers

    model = train("mbart")
    (tmp_path / "sentencepiece.bpe.model").write_bytes(model)
    write(tmp_path, config={"model_type": "xlm-roberta"})
    first = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    vocab = [*first, *scored(pieces(model))[3:], ("<mask>", 0.0)]
    oracle = transformers.XLMRobertaTokenizer(vocab=vocab)
    assert_same(loaded(tmp_path), oracle, [*CORPUS, "", "half <mask> past"])
    (found,) = loaded(tmp_path).encode_pairs([("half", "past")])
    assert found[0] == oracle("half", "past")["input_ids"]
    for side in ("left", "right"):
        oracle.truncation_side = side
        tokenizer = loaded(write(tmp_path, tokenizer_config={"truncation_side": side}))
        for pair in (("half", "past"), ("half past", "a"), ("a", "half past"), (CORPUS[0], "a b")):
            for length in range(5, 20):
                (found,) = tokenizer.encode_pairs([pair], max_length=length)
                cut = oracle(*pair, truncation="longest_first", max_length=length)
                assert found == (cut["input_ids"], [0] * len(found[0]))


@pytest.mark.parametrize("language", [None, "gl_ES"])
def test_mbart50(tmp_path: Path, language: str | None) -> None:
    import transformers

    model = train("mbart")
    (tmp_path / "sentencepiece.bpe.model").write_bytes(model)
    named = {"model_type": "mbart", "tokenizer_class": "MBart50Tokenizer"}
    write(tmp_path, config=named, tokenizer_config={"src_lang": language})
    tokenizer = loaded(tmp_path)
    oracle = transformers.MBart50Tokenizer(vocab=scored(pieces(model)), src_lang=language)
    assert_same(tokenizer, oracle, [*CORPUS, "", "half <mask> past"])
    ids = tokenizer.encode(CORPUS)
    first = tokenizer.token_to_id(language or "en_XX")
    assert all(row[0] == first and row[-1] == 2 for row in ids)
    assert tokenizer.vocab_size == len(oracle)
    assert tokenizer.decode(ids) == oracle.batch_decode(ids, skip_special_tokens=True)
    assert reloaded(tokenizer, tmp_path / "again").encode(TEXTS) == tokenizer.encode(TEXTS)


@pytest.mark.parametrize("named", [True, False])
def test_camembert(tmp_path: Path, named: bool) -> None:
    import transformers

    model = train("mbart")
    (tmp_path / "sentencepiece.bpe.model").write_bytes(model)
    if named:
        write(tmp_path, tokenizer_config={"tokenizer_class": "CamembertTokenizer"})
    else:
        write(tmp_path, config={"model_type": "camembert"})
    first = ["<s>NOTUSED", "<pad>", "</s>NOTUSED", "<unk>", "<unk>NOTUSED"]
    scores = [*((token, 0.0) for token in first), *scored(pieces(model))[1:], ("<mask>", 0.0)]
    oracle = transformers.CamembertTokenizer(vocab=scores)
    tokenizer = loaded(tmp_path)
    assert tokenizer.encode(["a"])[0][0] == 5 and tokenizer.encode(["a"])[0][-1] == 6
    assert tokenizer.vocab_size == len(oracle)
    assert_same(tokenizer, oracle, [*CORPUS, "", "half <mask> past"])
    (found,) = tokenizer.encode_pairs([("half", "past")])
    assert found[0] == oracle("half", "past")["input_ids"]
    ids = tokenizer.encode(CORPUS)
    assert tokenizer.decode(ids) == oracle.batch_decode(ids, skip_special_tokens=True)
    assert reloaded(tokenizer, tmp_path / "again").encode(CORPUS) == ids


def write_marian(folder: Path) -> Path:
    source, target = train("mbart"), train("mbart", vocab_size=80, model_type="bpe")
    tokens = [piece for model in (source, target) for piece, _ in scored(pieces(model))[3:]]
    tokens = ["</s>", "<unk>", *dict.fromkeys(tokens), ">>fr<<", "<pad>"]
    (folder / "source.spm").write_bytes(source)
    (folder / "target.spm").write_bytes(target)
    return write(folder, vocab={token: i for i, token in enumerate(tokens)})


def test_marian(tmp_path: Path) -> None:
    import transformers

    write_marian(tmp_path)
    tokenizer = loaded(tmp_path)
    oracle = transformers.MarianTokenizer.from_pretrained(tmp_path)
    texts = [*TEXTS, ">>fr<< half past", ">>fr<<half"]
    assert_same(tokenizer, oracle, texts)
    ids = tokenizer.encode(CORPUS)
    assert tokenizer.decode(ids) == oracle.batch_decode(ids, skip_special_tokens=True)
    assert reloaded(tokenizer, tmp_path / "again").encode(texts) == tokenizer.encode(texts)


def test_targets_of_marian(tmp_path: Path) -> None:
    import transformers

    write_marian(tmp_path)
    tokenizer = loaded(tmp_path)
    oracle = transformers.MarianTokenizer.from_pretrained(tmp_path)
    texts = [*TEXTS, *CORPUS, ">>fr<< half past", ""]
    found = tokenizer.encode_targets(texts)
    assert found == oracle(text_target=texts)["input_ids"]
    assert found != tokenizer.encode(texts), "the two models must split differently"
    with pytest.raises(TokenizerError, match="marks no languages"):
        tokenizer.encode_targets(texts, "ro_RO")


@pytest.mark.parametrize("language", [None, "ja_XX"])
@pytest.mark.parametrize("kind", ["marian", "mbart"])
def test_scores_of_target_texts(tmp_path: Path, kind: str, language: str | None) -> None:
    """The loss of transformers, which is given the same texts as targets."""
    import torch
    import transformers

    import tilewise

    if kind == "marian":
        write_marian(tmp_path)
        oracle: Any = transformers.MarianTokenizer.from_pretrained(tmp_path)
        start, language = oracle.pad_token_id, None
    else:
        oracle = write_mbart(tmp_path, src_lang="ro_RO")[1]
        start = oracle.convert_tokens_to_ids("de_DE")
        oracle.tgt_lang = language or "de_DE"  # what decoding starts with
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 20}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 20}
    named = {"pad_token_id": oracle.pad_token_id, "decoder_start_token_id": start}
    many = 1 + max(oracle.get_vocab().values())
    config = transformers.AutoConfig.for_model(
        kind, vocab_size=many, **sizes, **heads, **named, init_std=0.5, forced_eos_token_id=None
    )
    torch.manual_seed(0)
    theirs = transformers.AutoModelForSeq2SeqLM.from_config(config).eval()
    theirs.save_pretrained(tmp_path)
    texts, sources = CORPUS, CORPUS[::-1]
    ours = tilewise.load(tmp_path)
    found = ours.score(texts, sources, language=language)
    for text, source, each in zip(texts, sources, found, strict=True):
        both = oracle(source, text_target=text, return_tensors="pt")
        with torch.no_grad():
            loss = theirs(input_ids=both["input_ids"], labels=both["labels"]).loss
        assert each.tokens == both["labels"][0].tolist()
        assert each.mean == pytest.approx(-float(loss), abs=1e-5)


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_targets_of_others_are_like_sources(tmp_path: Path, kind: str) -> None:
    if kind == "t5":
        (tmp_path / "spiece.model").write_bytes(train("t5"))
        write(tmp_path, tokenizer_config={"tokenizer_class": "T5Tokenizer"})
        tokenizer: Tokenizer | None = load_tokenizer(tmp_path)
    else:
        tokenizer = train_tokenizer(CORPUS, vocab_size=80)
    assert tokenizer is not None
    texts = [*CORPUS, "", "half <extra_id_0> past"]
    assert tokenizer.encode_targets(texts) == tokenizer.encode(texts)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["t5", "mbart", "marian"])
def test_padding(tmp_path: Path, kind: str, side: str) -> None:
    import transformers

    if kind == "mbart":
        tokenizer, oracle = write_mbart(tmp_path, padding_side=side)
    elif kind == "marian":
        tokenizer = loaded(write(write_marian(tmp_path), tokenizer_config={"padding_side": side}))
        oracle = transformers.MarianTokenizer.from_pretrained(tmp_path)
    else:
        model = train("t5")
        (tmp_path / "spiece.model").write_bytes(model)
        tokenizer = loaded(write(tmp_path, tokenizer_config={"padding_side": side, "extra_ids": 0}))
        oracle = transformers.T5Tokenizer(vocab=scored(pieces(model)), extra_ids=0)
        oracle.padding_side = side
    assert_same_padding(tokenizer, oracle, [*CORPUS, ""])
    assert_same_padding(reloaded(tokenizer, tmp_path / "again"), oracle, [*CORPUS, ""])


def test_llama_has_no_padding_token(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(train("llama", vocab_size=400))
    with pytest.raises(TokenizerError, match="has no padding token: pass pad_token_id"):
        loaded(tmp_path).pad([[1, 2], [3]])
    write(tmp_path, tokenizer_config={"pad_token": "</s>"})
    assert loaded(tmp_path).pad([[1, 5], [3]])[0].tolist() == [[1, 5], [3, 2]]


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    (tmp_path / "spiece.model").write_bytes(b"model")
    with pytest.raises(TokenizerError, match=r"pip install 'tilewise\[sentencepiece\]'"):
        load_tokenizer(tmp_path)


def test_an_unknown_numbering(tmp_path: Path) -> None:
    (tmp_path / "sentencepiece.bpe.model").write_bytes(b"model")
    write(tmp_path, config={"model_type": "albert"})
    with pytest.raises(TokenizerError, match="of albert, whose numbering is not known"):
        load_tokenizer(tmp_path)


DAMAGED = """
import pathlib, sys
from tilewise.errors import TokenizerError
from tilewise.text import load_tokenizer
folder = pathlib.Path(sys.argv[1])
model = (folder / "good").read_bytes()
cases = [model[:n] for n in range(0, len(model), 41)]
cases += [model[:n] + b"\\xff" + model[n + 1 :] for n in range(0, len(model), 37)]
for content in cases:
    (folder / "spiece.model").write_bytes(content)
    try:
        load_tokenizer(folder).encode(["half past"])
    except TokenizerError:
        pass
"""


def test_damaged_models(tmp_path: Path) -> None:
    """In a process of its own: the library is C++, and a crash must fail this test alone."""
    (tmp_path / "good").write_bytes(train("t5"))
    command = [sys.executable, "-c", DAMAGED, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("vocab.json", b'{"</s>": -1, "<unk>": 1}'),
        ("vocab.json", b"[]"),
        ("vocab.json", b'{"</s>": 0}'),
        ("source.spm", b""),
        ("target.spm", b"\xff" * 99),
    ],
)
def test_damaged_marian(tmp_path: Path, name: str, content: bytes) -> None:
    (write_marian(tmp_path) / name).write_bytes(content)
    with pytest.raises(TokenizerError):
        load_tokenizer(tmp_path)


def test_half_a_marian(tmp_path: Path) -> None:
    (write_marian(tmp_path) / "target.spm").unlink()
    with pytest.raises(TokenizerError, match="target.spm is missing"):
        load_tokenizer(tmp_path)
