"""The CUDA source compiles for every target and spills no register, with no GPU around."""

import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
import torch.utils.cpp_extension as cpp_extension

CSRC = Path(__file__).resolve().parents[2] / "csrc"
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")


def resources(architecture: str, folder: Path) -> list[tuple[int, int, int]]:
    """(stack bytes, spill stores, spill loads) of every kernel, as ptxas reports them."""
    command = ["nvcc", "-O3", "-cubin", f"-arch=sm_{architecture}", "-Xptxas=-v", "-I", str(CSRC)]
    done = subprocess.run(
        [*command, str(CSRC / "softmax.cu"), "-o", str(folder / "softmax.cubin")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    pattern = r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
    found = re.findall(pattern, done.stderr)
    return [(int(stack), int(stores), int(loads)) for stack, stores, loads in found]


@needs_nvcc
@pytest.mark.parametrize(
    "architecture",
    ["90", pytest.param("80", marks=pytest.mark.long), pytest.param("100", marks=pytest.mark.long)],
)
def test_kernels_keep_to_their_registers(architecture: str, tmp_path: Path) -> None:
    kernels = resources(architecture, tmp_path)
    assert len(kernels) >= 8, "forward and backward, warp and block, in four dtypes"
    assert set(kernels) == {(0, 0, 0)}


@pytest.mark.long
@pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler")
@pytest.mark.parametrize("source", sorted(CSRC.glob("*op*.cpp")), ids=lambda path: path.name)
def test_cuda_call_path_compiles_against_this_torch(source: Path, tmp_path: Path) -> None:
    includes = [*cpp_extension.include_paths(), sysconfig.get_paths()["include"], str(CSRC)]
    command = ["c++", "-std=c++20", "-fsyntax-only", "-DTILEWISE_WITH_CUDA"]
    command += ['-DTILEWISE_CUDA_ARCHITECTURES="90"', "-DTORCH_EXTENSION_NAME=_C"]
    command += [flag for include in includes for flag in ("-isystem", include)]
    done = subprocess.run([*command, str(source)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
