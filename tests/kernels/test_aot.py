"""Ahead-of-time compilation for GPUs that are not here; the rule is the one of benches/aot.py."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

AOT = Path(__file__).parents[2] / "benches" / "aot.py"


def compile_table(tmp_path: Path, *options: str) -> list[dict]:
    """Run the compiler in a process of its own, without interpreter; print and return its table."""
    file = tmp_path / "aot.json"
    command = [sys.executable, str(AOT), "--json", str(file), *options]
    result = subprocess.run(command, capture_output=True, text=True)
    print(result.stdout)
    assert file.exists(), result.stderr
    rows = json.loads(file.read_text())
    broken = [row for row in rows if row["verdict"] not in ("ok", "report")]
    assert not broken and result.returncode == 0, broken or result.stderr
    return rows


def test_chosen_configurations_compile_clean(tmp_path):
    rows = compile_table(tmp_path, "--quick")
    assert {row["target"] for row in rows} >= {"sm_80", "sm_90", "sm_100"}
    assert all(row["verdict"] == "ok" and row["stack"] == 0 for row in rows)


@pytest.mark.long
def test_every_configuration_compiles_clean(tmp_path):
    rows = compile_table(tmp_path)
    assert {row["target"] for row in rows} == {"sm_80", "sm_86", "sm_90", "sm_100"}
