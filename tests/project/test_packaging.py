"""The wheel: what is in it, and that it works elsewhere, with and without its extension."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
USE = """
import sys, warnings, torch
warnings.simplefilter("ignore")
# This environment's own editable install would lend the wheel the extension it lacks.
sys.meta_path = [f for f in sys.meta_path if "Editable" not in getattr(f, "__name__", "")]
import tilewise, tilewise_kernels
assert tilewise.__file__.startswith(sys.argv[1]), tilewise.__file__
assert tilewise_kernels.__file__.startswith(sys.argv[1]), tilewise_kernels.__file__
x = torch.randn(3, 5)
assert torch.allclose(tilewise_kernels.softmax(x), torch.softmax(x, -1), atol=1e-6)
print(tilewise_kernels.explain(tilewise_kernels.softmax, x).implementation)
print(tilewise.load("dates").generate("May 5th, 2030", num_beams=4, max_new_tokens=20).texts[0])
"""


def run(arguments: list[str], cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        arguments,
        cwd=cwd,
        env={**os.environ, "TRITON_INTERPRET": "0", **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def copied_sources(folder: Path) -> Path:
    """The repository's files below `folder`: building leaves files beside the sources."""
    sources = folder / "sources"
    files = run(["git", "ls-files", "-co", "--exclude-standard"], ROOT).splitlines()
    for name in files:
        if (ROOT / name).is_file():
            (sources / name).parent.mkdir(parents=True, exist_ok=True)
            (sources / name).write_bytes((ROOT / name).read_bytes())
    return sources


def build_wheel(folder: Path, extension: str) -> Path:
    sources = copied_sources(folder)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    run([*pip, "-w", str(folder), str(sources)], folder, TILEWISE_BUILD_EXT=extension)
    (wheel,) = folder.glob("tilewise-*.whl")
    return wheel


def install_and_use(wheel: Path, folder: Path) -> list[str]:
    site = folder / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site)]
    run([*pip, str(wheel)], folder)
    lines = run([sys.executable, "-c", USE, str(site)], folder, PYTHONPATH=str(site)).splitlines()
    return lines


def top_level(wheel: Path) -> set[str]:
    names = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    return {name for name in names if not name.endswith(".dist-info")}


def test_pure_wheel(tmp_path: Path) -> None:
    wheel = build_wheel(tmp_path, "0")
    names = zipfile.ZipFile(wheel).namelist()
    assert top_level(wheel) == {"tilewise", "tilewise_kernels"}
    for part in ("tilewise/py.typed", "tilewise_kernels/py.typed", "tilewise/cli/__init__.py"):
        assert part in names
    assert "tilewise/assets/dates/model.safetensors" in names
    weights = zipfile.ZipFile(wheel).getinfo("tilewise/assets/dates/model.safetensors")
    assert weights.file_size <= 4_000_000
    assert not any(name.endswith(".so") for name in names)
    assert install_and_use(wheel, tmp_path) == ["reference", "2030年5月5日"]


def test_sdist_holds_every_native_source(tmp_path: Path) -> None:
    """Also where it is made without the extension, whose sources setuptools would add."""
    sources = copied_sources(tmp_path)
    build = [sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", str(tmp_path)]
    run(build, sources, TILEWISE_BUILD_EXT="0")
    (archive,) = tmp_path.glob("tilewise-*.tar.gz")
    with tarfile.open(archive) as opened:
        found = {name.partition("/")[2] for name in opened.getnames()}
    native = {f"csrc/{file.name}" for file in (ROOT / "csrc").iterdir()}
    assert any(name.endswith(".cu") for name in native) and native <= found, native - found


@pytest.mark.long
def test_wheel_with_extension(tmp_path: Path) -> None:
    wheel = build_wheel(tmp_path, "1")
    assert top_level(wheel) == {"tilewise", "tilewise_kernels"}
    assert any("tilewise_kernels/_C." in name for name in zipfile.ZipFile(wheel).namelist())
    assert install_and_use(wheel, tmp_path) == ["native", "2030年5月5日"]


def cpu_seconds(code: str) -> float:
    """The least processor time that running `code` took in three tries."""
    timed = f"import time\n{code}\nprint(time.process_time())"
    return min(float(run([sys.executable, "-c", timed], ROOT)) for _ in range(3))


def test_import_costs_little_above_torch() -> None:
    torch_alone = cpu_seconds("import torch")
    both = cpu_seconds("import torch, tilewise, tilewise_kernels")
    # 0.3 s where importing torch takes about a second; the ratio carries it to other machines.
    assert both - torch_alone <= max(0.3, 0.3 * torch_alone)


def test_import_needs_no_triton_no_extension_no_network(tmp_path: Path) -> None:
    code = """
import builtins, socket, sys, importlib.util
def closed(*args, **kwargs): raise OSError("no network in this test")
socket.socket.connect = closed
find = importlib.util.find_spec
hidden = ("triton", "tilewise_kernels._C")
importlib.util.find_spec = lambda name, *a: None if name.startswith(hidden) else find(name, *a)
import tilewise, tilewise_kernels, torch
assert "triton" not in sys.modules and "tilewise_kernels._C" not in sys.modules
import warnings
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    x = torch.randn(3, 5)
    tilewise_kernels.softmax(x); tilewise_kernels.softmax(x)
assert len(seen) == 1 and "native extension is not built" in str(seen[0].message), seen
print("fine")
"""
    assert run([sys.executable, "-c", code], tmp_path).strip() == "fine"


def test_help_and_version_of_the_command() -> None:
    command = Path(sys.executable).parent / "tilewise"
    out = run([str(command), "--help"], ROOT)
    for name in ("info", "bench", "generate", "translate"):
        assert name in out
