"""Imports flow one way through the two packages; the syntax trees are held to it."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ENGINE, KERNELS = ROOT / "engine" / "tilewise", ROOT / "kernels" / "tilewise_kernels"

# A part may import from parts of a lower rank, and from itself.
RANK = {
    "errors": 0,
    "config": 1,
    "folders": 1,
    "checkpoints": 2,
    "text": 2,
    "data": 2,
    "layers": 3,
    "fusion": 3,
    "models": 4,
    "families": 5,
    "generation": 6,
    "hub": 6,
    "scoring": 6,
    "training": 6,
    "pretrained": 7,
    "adapters": 8,
    "alignment": 8,
    "harness": 8,
    "__init__": 9,
    "cli": 10,
}
# These know no model: of the engine they may use the errors, and what finds files, alone.
LEAVES = {"checkpoints", "text", "data"}
ORACLES = {"transformers", "peft", "trl", "ctranslate2", "liger_kernel"}


def imported(file: Path, package: str, root: Path) -> list[str]:
    """Dotted names of every module that `file` imports, relative ones made absolute."""
    names = []
    inside = [package, *file.relative_to(root).with_suffix("").parts]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.append(node.module or "")
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(inside[: len(inside) - node.level])
            if node.module:
                names.append(f"{base}.{node.module}")
            else:
                names += [f"{base}.{alias.name}" for alias in node.names]
    return names


def part_of(name: str) -> str:
    pieces = name.split(".")
    return pieces[1] if len(pieces) > 1 else "__init__"


def engine_files() -> list[Path]:
    return sorted(ENGINE.rglob("*.py"))


@pytest.mark.parametrize("file", engine_files(), ids=lambda f: str(f.relative_to(ENGINE)))
def test_engine_imports_point_down(file: Path) -> None:
    own = part_of(".".join(["tilewise", *file.relative_to(ENGINE).with_suffix("").parts]))
    for name in imported(file, "tilewise", ENGINE):
        if name.split(".")[0] in ORACLES:
            pytest.fail(f"{file} imports {name}, which is a test oracle only")
        if name.split(".")[0] != "tilewise":
            continue
        target = part_of(name)
        if target == own:
            continue
        assert RANK[target] < RANK[own], f"{file} ({own}) imports {name} ({target})"
        if own in LEAVES:
            assert target in {"errors", "folders"}, f"{file}: {own} imports {name}"


@pytest.mark.parametrize("file", sorted(KERNELS.rglob("*.py")), ids=lambda f: f.name)
def test_kernels_import_nothing_of_the_engine_and_triton_lazily(file: Path) -> None:
    for name in imported(file, "tilewise_kernels", KERNELS):
        assert name.split(".")[0] not in {"tilewise", *ORACLES}, f"{file} imports {name}"
    top_level = [
        alias.name
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.Import)
        for alias in node.names
    ]
    assert not any(name.split(".")[0] == "triton" for name in top_level), f"{file}: import lazily"


def test_every_part_has_a_rank() -> None:
    parts = {
        part_of(".".join(["tilewise", *f.relative_to(ENGINE).with_suffix("").parts]))
        for f in engine_files()
    }
    assert parts <= set(RANK), f"give {parts - set(RANK)} a rank above"


def test_no_module_reads_pickles_or_runs_text() -> None:
    """The words themselves are forbidden in the packages."""
    for file in [*engine_files(), *KERNELS.rglob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                assert name not in {"eval", "exec", "torch.load", "pickle.load", "pickle.loads"}, (
                    f"{file}:{node.lineno} calls {name}"
                )


def test_files_stay_readable() -> None:
    long = {
        str(f.relative_to(ROOT)): n
        for f in [*engine_files(), *KERNELS.rglob("*.py"), *(ROOT / "csrc").glob("*")]
        if (n := len(f.read_text().splitlines())) > 650
    }
    assert not long, f"split these: {long}"
