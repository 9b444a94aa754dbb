"""tilewise score, embed, fill-mask, convert and info MODEL: the same numbers as in Python."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file

import tilewise
from tilewise.cli import main
from tilewise.config import ModelConfig
from tilewise.text import train_tokenizer

TEXTS = ["half past three", "two hundred and six", "the first of May"]


def run(*arguments: str, stdin: str | bytes = "") -> Result:
    return CliRunner().invoke(main, arguments, input=stdin)


def lines_of(done: Result) -> list[dict]:
    assert done.exit_code == 0, done.output
    return [json.loads(line) for line in done.stdout.splitlines()]


def made(folder: Path, **changes: object) -> Path:
    torch.manual_seed(0)
    tokenizer = train_tokenizer(TEXTS)
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
    return made(tmp_path_factory.mktemp("models") / "masked", encoder_layers=1, masked_head="gelu")


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


def test_fill_mask(masked: Path, decoder: Path, tmp_path: Path) -> None:
    tokenizer = json.loads((masked / "tokenizer.json").read_text())
    assert "[MASK]" not in json.dumps(tokenizer)
    done = run("fill-mask", "--model", str(masked), "half past three")
    assert done.exit_code == 1 and "no [MASK] or <mask> token" in done.stderr
    done = run("fill-mask", "--model", str(decoder), "half")
    assert done.exit_code == 1


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


def test_info_of_a_model(decoder: Path) -> None:
    done = run("info", str(decoder), "--json")
    told = json.loads(done.stdout)
    count = sum(p.numel() for p in tilewise.load(decoder).parameters())
    assert told["stored"] == {"float32": count}
    assert told["config"]["hidden_size"] == 16 and told["config"]["decoder_layers"] == 1
    assert "hidden_size" in run("info", str(decoder)).stdout


@pytest.mark.parametrize(
    ("stdin", "words"),
    [
        ('{"text": 5}', "line 1 of -"),
        ('ok\n{"texts": "x"}', "line 2 of -"),
        ('{"text": "a", "other": "b"}', "line 1 of -"),
        ("{broken", "is not JSON"),
        (b"\xff\xfe", "not UTF-8"),
    ],
)
def test_bad_lines_are_named(decoder: Path, stdin: str | bytes, words: str) -> None:
    done = run("score", "--model", str(decoder), stdin=stdin)
    assert done.exit_code != 0 and words in done.stderr
