"""The short examples run as they are printed, and say what they promise to."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def output_of(name: str, folder: Path) -> list[str]:
    environment = {**os.environ, "TRITON_INTERPRET": "0", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name)],
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
