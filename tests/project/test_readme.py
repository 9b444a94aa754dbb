"""The README's code blocks run as printed, in an empty folder; make itself is left to CI."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def environment() -> dict[str, str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "HF_HUB_OFFLINE": "1", "TRITON_INTERPRET": "0"}


@pytest.mark.parametrize("number", range(len(blocks("python"))))
def test_python_block(number: int, tmp_path: Path) -> None:
    code = blocks("python")[number]
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip(), "each block prints what it made"


def shell_lines() -> list[str]:
    lines = [line.split("#")[0].strip() for block in blocks("bash") for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith("make ")]


@pytest.mark.parametrize("line", shell_lines())
def test_shell_line(line: str, tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", "-c", line], cwd=tmp_path, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_the_files_it_links_exist() -> None:
    text = (ROOT / "README.md").read_text()
    for target in re.findall(r"\]\(([^)#]+)\)", text) + re.findall(
        r"`((?:examples|benches)/\S+)`", text
    ):
        assert (ROOT / target).exists(), target


@pytest.mark.parametrize("table", ["op_table.py", "family_table.py"])
def test_a_table_lists_what_there_is(table: str) -> None:
    command = [sys.executable, str(ROOT / "benches" / table), "--check"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
