"""tilewise score, embed, fill-mask, convert and info MODEL: the same numbers as in Python."""

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file
from transformers import BertConfig, BertForMaskedLM

import tilewise
from tilewise.cli import main
from tilewise.config import ModelConfig
from tilewise.text import Tokenizer, train_tokenizer

TEXTS = ["half past three", "two hundred and six", "the first of May"]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b"]


def run(*arguments: str, stdin: str | bytes = "") -> Result:
    return CliRunner().invoke(main, arguments, input=stdin)


def lines_of(done: Result) -> list[dict]:
    assert done.exit_code == 0, done.output
    return [json.loads(line) for line in done.stdout.splitlines()]


def made(folder: Path, *special: str, **changes: object) -> Path:
    torch.manual_seed(0)
    backend = tokenizers.Tokenizer.from_str(
        train_tokenizer(TEXTS).files()["tokenizer.json"].decode()
    )
    backend.add_special_tokens(list(special))
    tokenizer = Tokenizer(backend, "the test's tokenizer")
    values = {"model_type": "tilewise-transformer", "vocab_size": tokenizer.vocab_size,
              "hidden_size": 16, "num_heads": 2, "ffn_size": 32, "max_positions": 64}  # fmt: skip
    config = ModelConfig(**(values | changes))  # type: ignore[arg-type]
    tilewise.Model(tilewise.build(config), tokenizer).save(folder)
    return folder


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("models") / "decoder", decoder_layers=1)


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "masked"
    return made(folder, "[MASK]", encoder_layers=1, masked_head="gelu", max_positions=20)


def test_score(decoder: Path, tmp_path: Path) -> None:
    expected = tilewise.load(decoder).score(TEXTS)
    (tmp_path / "lines.txt").write_text("\n".join(TEXTS))
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
    model = ("--model", str(decoder))
    for done in (
        run("score", *model, *TEXTS),
        run("score", *model, "--file", str(tmp_path / "lines.txt")),
        run("score", *model, "--file", str(tmp_path / "lines.jsonl")),
        run("score", *model, stdin="\n".join(TEXTS)),
    ):
        found = lines_of(done)
        assert [line["text"] for line in found] == TEXTS
        for line, score in zip(found, expected, strict=True):
            assert line["log_prob"] == pytest.approx(score.total, abs=1e-5)
            assert line["perplexity"] == pytest.approx(score.perplexity, rel=1e-5)
            assert line["tokens"] == len(score.tokens)
        assert "of 3 texts" in done.stderr


def test_score_behind_a_context(decoder: Path) -> None:
    expected = tilewise.load(decoder).score([" three"], ["half past"])[0]
    shared = run("score", "--model", str(decoder), "--tokens", "--context", "half past", " three")
    own = run("score", "--model", str(decoder),
              stdin=json.dumps({"text": " three", "context": "half past"}))  # fmt: skip
    for done in (shared, own):
        assert lines_of(done)[0]["log_prob"] == pytest.approx(expected.total, abs=1e-5)
    assert lines_of(shared)[0]["ids"] == expected.tokens


@pytest.mark.parametrize("options", [(), ("--pooling", "cls", "--no-normalize")])
def test_embed(decoder: Path, options: tuple[str, ...]) -> None:
    model = tilewise.load(decoder)
    given = {"pooling": "cls", "normalize": False} if options else {}
    expected = model.embed(TEXTS, **given)
    found = lines_of(run("embed", "--model", str(decoder), *options, *TEXTS))
    vectors = torch.tensor([line["embedding"] for line in found])
    torch.testing.assert_close(vectors, expected)


def test_fill_mask(masked: Path) -> None:
    model = tilewise.load(masked)
    texts = ["half [MASK]ast", "[MASK]wo hundred an[MASK] six"]
    found = lines_of(run("fill-mask", "--model", str(masked), "--top-k", "3", *texts))
    assert [line["text"] for line in found] == texts
    for line, masks in zip(found, model.fill_mask(texts, top_k=3), strict=True):
        assert [len(mask) for mask in line["masks"]] == [3] * len(masks)
        for told, expected in zip(sum(line["masks"], []), sum(masks, []), strict=True):
            assert told["id"] == expected.token
            assert told["probability"] == pytest.approx(math.exp(expected.log_prob), rel=1e-4)
            assert model.tokenizer is not None
            named = model.tokenizer.decode([[expected.token]], skip_special_tokens=False)
            assert [told["token"]] == named


def test_fill_mask_without_masks(masked: Path, decoder: Path) -> None:
    done = run("fill-mask", "--model", str(decoder), "half past three")
    assert done.exit_code == 1 and "no masked-token head" in done.stderr
    done = run("fill-mask", "--model", str(masked), "half")
    assert done.exit_code == 1 and "holds no mask" in done.stderr


NAMED: dict[str, Any] = {
    "text": {"tokenizer_config": {"mask_token": "<blank>"}},
    "table": {"tokenizer_config": {"mask_token": {"content": "<blank>", "__type": "AddedToken"}}},
    "old": {"special_tokens_map": {"mask_token": {"content": "<blank>", "lstrip": True}}},
    "lacking": {"tokenizer_config": {"mask_token": "<gone>"}},
    "null": {"tokenizer_config": {"mask_token": None}},
}


@pytest.mark.parametrize("named", NAMED)
def test_fill_mask_by_the_name_in_the_files(tmp_path: Path, named: str) -> None:
    """A folder with <blank> and <mask>, of which <blank> is the mask where a file says so."""
    folder = made(tmp_path / "m", "<blank>", "<mask>", encoder_layers=1, masked_head="gelu")
    for name, content in NAMED[named].items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    mask, other = ("<mask>", "<blank>") if named in ("lacking", "null") else ("<blank>", "<mask>")
    model = tilewise.load(folder)
    assert model.tokenizer is not None
    token = model.tokenizer.token_to_id(mask)
    found = lines_of(run("fill-mask", "--model", str(folder), f"half {mask}ast {other}"))
    (expected,) = model.fill_mask([f"half {mask}ast {other}"], mask_token_id=token)
    ids = [[filling.token for filling in each] for each in expected]
    assert [[each["id"] for each in best] for best in found[0]["masks"]] == ids and len(ids) == 1
    done = run("fill-mask", "--model", str(folder), f"half {other}ast")
    assert done.exit_code == 1 and f"holds no mask, token {token}" in done.stderr


def test_what_fill_mask_needs_is_named(tmp_path: Path) -> None:
    folder = made(tmp_path / "m", encoder_layers=1, masked_head="gelu")
    done = run("fill-mask", "--model", str(folder), "half")
    assert done.exit_code == 1
    assert "name one of its tokens as mask_token in tokenizer_config.json, or in" in done.stderr
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink(missing_ok=True)
    for command in ("fill-mask", "embed"):
        done = run(command, "--model", str(folder), "half")
        assert done.exit_code == 1 and "add them, or in Python pass token ids" in done.stderr


@pytest.mark.parametrize("command", ["embed", "fill-mask"])
def test_long_texts_are_cut_when_asked(masked: Path, command: str) -> None:
    text = "[MASK]" + "half past three" * 4
    done = run(command, "--model", str(masked), text)
    assert done.exit_code == 1 and "--truncate" in done.stderr
    found = lines_of(run(command, "--model", str(masked), "--truncate", text))
    assert [line["text"] for line in found] == [text]


def test_lines_are_read_as_they_are_answered(
    decoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two at a time, in order, the third line unread while the first two are scored."""
    monkeypatch.setattr("tilewise.cli.scoring.TOGETHER", 2)
    texts = ["three", "half past three", "six", "may", "two hundred"]
    stream, read = io.BytesIO("\n".join(texts).encode()), []
    score = tilewise.Model.score

    def watched(model: tilewise.Model, *arguments: Any, **options: Any) -> Any:
        read.append(stream.tell())
        return score(model, *arguments, **options)

    monkeypatch.setattr(tilewise.Model, "score", watched)
    done = CliRunner().invoke(main, ["score", "--model", str(decoder)], input=stream)
    assert [line["text"] for line in lines_of(done)] == texts
    assert read == [22, 30, 41]


def test_windows_over_a_long_text(decoder: Path) -> None:
    text = "half past three" * 6
    model = ("--model", str(decoder))
    near, far = (lines_of(run("score", *model, *how, text))[0] for how in (("--stride", "1"), ()))
    expected = tilewise.load(decoder).score([text], stride=1)[0]
    assert near["log_prob"] == pytest.approx(expected.total, abs=1e-4)
    assert abs(near["log_prob"] - far["log_prob"]) > 1e-4


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "bert"
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(vocab_size=7, **sizes, intermediate_size=20, max_position_embeddings=8)
    BertForMaskedLM(config).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    return folder


def test_special_tokens_behind_masks_are_named(bert: Path) -> None:
    done = run("fill-mask", "--model", str(bert), "--top-k", "7", "a [MASK] b")
    (mask,) = lines_of(done)[0]["masks"]
    assert {each["token"] for each in mask} == set(WORDS)


@pytest.mark.parametrize("command", [("score", "half", "--model"), ("info",), ("convert",)])
def test_an_empty_folder_name_is_not_the_working_directory(
    decoder: Path, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
) -> None:
    monkeypatch.chdir(decoder)
    more = ("new",) if command == ("convert",) else ()
    done = run(*command, "", *more)
    assert done.exit_code == 1 and "source is empty" in done.stderr


def test_a_seq2seq_model_needs_sources(tmp_path: Path) -> None:
    model = made(tmp_path / "m", encoder_layers=1, decoder_layers=1, decoder_start_token_id=1)
    done = run("score", "--model", str(model), "half")
    assert done.exit_code == 1 and "'half' has no context" in done.stderr
    expected = tilewise.load(model).score(["half"], [""])[0].total
    found = lines_of(run("score", "--model", str(model), "--context", "", "half"))
    assert found[0]["log_prob"] == pytest.approx(expected, abs=1e-5)


def test_errors_say_how_many_texts_went_before(bert: Path) -> None:
    done = run("embed", "--model", str(bert), stdin="a\n" * 520 + "a " * 9)
    assert done.exit_code == 1 and len(done.stdout.splitlines()) == 512
    assert "error: after 512 texts: rows[8] is 11 tokens long" in done.stderr


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_convert(decoder: Path, tmp_path: Path, dtype: str) -> None:
    done = run("convert", str(decoder), str(tmp_path / "new"), "--dtype", dtype)
    assert done.exit_code == 0 and dtype in done.stdout
    before = load_file(decoder / "model.safetensors")
    after = load_file(tmp_path / "new" / "model.safetensors")
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor.to(getattr(torch, dtype)))
    again = run("convert", str(decoder), str(tmp_path / "new"))
    assert again.exit_code == 1 and "is not empty" in again.stderr
    kept = run("convert", str(tmp_path / "new"), str(tmp_path / "kept"))
    assert kept.exit_code == 0 and f"in {dtype}" in kept.stdout
    stored = load_file(tmp_path / "kept" / "model.safetensors")
    assert all(torch.equal(stored[name], tensor) for name, tensor in after.items())


def test_info_of_a_model(decoder: Path) -> None:
    done = run("info", str(decoder), "--json")
    told = json.loads(done.stdout)
    count = sum(p.numel() for p in tilewise.load(decoder).parameters())
    assert told["stored"] == {"float32": count}
    assert told["config"]["hidden_size"] == 16 and told["config"]["decoder_layers"] == 1
    text = run("info", str(decoder)).stdout
    assert "hidden_size" in text and "rotary_base" not in text
    assert told["config"]["rotary_base"] == 10_000


@pytest.mark.filterwarnings("ignore:.* has weights that are NaN")
@pytest.mark.parametrize("command", ["score", "embed"])
def test_a_model_that_gives_nan_is_an_error(decoder: Path, tmp_path: Path, command: str) -> None:
    model = tilewise.load(decoder)
    with torch.no_grad():
        model.network.norm.weight.fill_(math.nan)
    model.save(tmp_path / "nan")
    done = run(command, "--model", str(tmp_path / "nan"), TEXTS[0])
    assert done.exit_code == 1 and isinstance(done.exception, SystemExit)
    assert "gives NaN or inf for 'half past three'" in done.stderr and not done.stdout
    strict = run("convert", str(tmp_path / "nan"), str(tmp_path / "new"), "--strict-finite")
    assert strict.exit_code == 1 and "NaN or infinite" in strict.stderr
    assert not (tmp_path / "new").exists()


def test_convert_keeps_a_chat_template(decoder: Path, tmp_path: Path) -> None:
    tilewise.load(decoder).save(tmp_path / "old")
    (tmp_path / "old" / "chat_template.jinja").write_text("{{ messages }}")
    done = run("convert", str(tmp_path / "old"), str(tmp_path / "new"))
    assert done.exit_code == 0
    assert (tmp_path / "new" / "chat_template.jinja").read_text() == "{{ messages }}"
    assert "chat_template.jinja" in (tmp_path / "new" / "sha256.json").read_text()


def test_convert_of_a_folder_that_was_changed(decoder: Path, tmp_path: Path) -> None:
    tilewise.load(decoder).save(tmp_path / "mine")
    for target, code in (("first", 0), ("second", 1)):
        done = run("convert", str(tmp_path / "mine"), str(tmp_path / target), "--verify")
        assert done.exit_code == code, done.stderr
        (tmp_path / "mine" / "config.json").write_text("{}")
    assert "config.json" in done.stderr and not (tmp_path / "second").exists()


@pytest.mark.parametrize(
    ("stdin", "words"),
    [
        ('{"text": 5}', "line 1 of -"),
        ('ok\n{"texts": "x"}', "line 2 of -"),
        ('{"text": "a", "context": 3}', 'line 1 of -: "context" is 3'),
        ('{"text": "a", "id": NaN}', "line 1 of - is not JSON: NaN"),
        ('{"text": "a", "id": -1e999}', "line 1 of - is not JSON: -1e999 is no finite number"),
        ("{broken", "is not JSON"),
        (b"\xff\xfe", "not UTF-8"),
    ],
)
def test_bad_lines_are_named(decoder: Path, stdin: str | bytes, words: str) -> None:
    done = run("score", "--model", str(decoder), stdin=stdin)
    assert done.exit_code != 0 and words in done.stderr


def test_other_fields_of_a_line_are_printed_again(decoder: Path) -> None:
    given = {"id": 7, "tags": ["\u00e9", None, {"x": 1.5}], "text": "b a", "perplexity": "old"}
    (line,) = lines_of(run("score", "--model", str(decoder), stdin=json.dumps(given)))
    (plain,) = lines_of(run("score", "--model", str(decoder), "b a"))
    assert line == given | plain and line["perplexity"] != "old"
