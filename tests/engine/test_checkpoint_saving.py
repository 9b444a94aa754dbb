"""Checkpoint weights into models, and models into folders, all of it or nothing."""

import os
import resource
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tilewise.checkpoints import (
    WeightRule,
    check_weights,
    fill_weights,
    open_weights,
    read_config,
    write_folder,
)
from tilewise.errors import CheckpointError

WEIGHTS = "model.safetensors"


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# Copying


class Small(torch.nn.Module):
    """A model with a fused projection, a transposed one, a tied head and a counter."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(5, 4)
        self.query = torch.nn.Linear(4, 4, bias=False)
        self.key = torch.nn.Linear(4, 4, bias=False)
        self.fused = torch.nn.Linear(4, 8, bias=False)
        self.head = torch.nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("count", torch.tensor([3]))


RULES = [
    WeightRule("embed.weight", "wte"),
    WeightRule("query.weight", "qk", lambda w: w[:, :4].t()),
    WeightRule("key.weight", "qk", lambda w: w[:, 4:].t()),
    WeightRule("fused.weight", ("k", "v"), lambda k, v: torch.cat([k, v])),
    WeightRule("count", "count"),
]


def source_tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = {"wte": (5, 4), "qk": (4, 8), "k": (4, 4), "v": (4, 4)}
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return tensors | {"count": torch.tensor([9])}


@pytest.mark.parametrize("model_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("file_dtype", [torch.float32, torch.float16])
def test_copying_by_table(
    tmp_path: Path, model_dtype: torch.dtype, file_dtype: torch.dtype
) -> None:
    source = source_tensors()
    floats = {k: v.to(file_dtype) for k, v in source.items() if v.is_floating_point()}
    head = {"lm_head": floats["wte"].clone(), "attn.mask": torch.ones(3)}
    write_folder(tmp_path / "m", {}, source | floats | head)
    model = Small().to(model_dtype)
    target, weights = model.state_dict(), open_weights(tmp_path / "m")
    tied = {"lm_head": "wte", "absent": "wte"}
    check_weights(target, weights, RULES, ignore=["attn.mask"], tied=tied)
    assert fill_weights(target, weights, RULES) == []
    fused = torch.cat([floats["k"], floats["v"]])
    assert torch.equal(model.embed.weight, floats["wte"].to(model_dtype))
    assert model.head.weight is model.embed.weight
    assert torch.equal(model.query.weight, floats["qk"][:, :4].t().to(model_dtype))
    assert torch.equal(model.key.weight, floats["qk"][:, 4:].t().to(model_dtype))
    assert torch.equal(model.fused.weight, fused.to(model_dtype))
    assert model.count.tolist() == [9]
    assert model.embed.weight.requires_grad


def changed(**tensors: Tensor | None) -> dict[str, Tensor]:
    return {k: v for k, v in (source_tensors() | tensors).items() if v is not None}


MISFITS: dict[str, tuple[dict[str, Tensor], str]] = {
    "missing": (changed(k=None), "1 missing: 'k'"),
    "unexpected": (changed(zz=torch.ones(1)), "1 unexpected: 'zz'"),
    "twelve unexpected": (
        changed(**{f"z{i:02}": torch.ones(1) for i in range(12)}),
        "12 unexpected: 'z00'; .*'z09'; ... and 2 more",
    ),
    "transposed": (changed(wte=torch.ones(4, 5)), r"float32 \[4, 5\].*'embed.weight'.*\[5, 4\]"),
    "mis-shaped for a transform": (changed(qk=torch.ones(4, 8, 2)), "2 not fitting: 'qk' is"),
    "short for a slice": (changed(qk=torch.ones(4, 7)), "1 not fitting: 'qk' is"),
    "integers for floats": (changed(wte=torch.ones(5, 4, dtype=torch.int8)), "int8 .*float32"),
    "floats for integers": (changed(count=torch.ones(1)), "float32 .*int64"),
    "narrower integers": (changed(count=torch.ones(1, dtype=torch.int32)), "int32 .*int64"),
    "wrong tie": (changed(lm_head=torch.ones(5, 4)), "'lm_head' differs from 'wte'"),
    "tie of another shape": (changed(lm_head=torch.ones(4, 5)), "'lm_head' differs from 'wte'"),
    "all at once": (
        changed(k=None, zz=torch.ones(1), wte=torch.ones(3)),
        r"(?s)1 missing: 'k'.*1 unexpected: 'zz'.*1 not fitting: 'wte' is float32 \[3\]",
    ),
}


@pytest.mark.parametrize("kind", MISFITS)
def test_a_misfit_is_found_before_any_data_is_read(tmp_path: Path, kind: str) -> None:
    tensors, message = MISFITS[kind]
    write_folder(tmp_path / "m", {}, tensors)
    with torch.device("meta"):
        target = Small().state_dict()
    with pytest.raises(CheckpointError, match=message):
        check_weights(target, open_weights(tmp_path / "m"), RULES, tied={"lm_head": "wte"})


def test_a_file_that_shrinks_meanwhile_is_found(tmp_path: Path) -> None:
    write_folder(tmp_path / "m", {}, source_tensors())
    weights = open_weights(tmp_path / "m")
    last = max(info.end for info in weights.tensors.values())
    path = tmp_path / "m" / WEIGHTS
    os.truncate(path, path.stat().st_size - last // 2)
    with pytest.raises(CheckpointError, match="changed while loading"):
        fill_weights(Small().state_dict(), weights, RULES)


def test_a_table_with_gaps_is_reported(tmp_path: Path) -> None:
    write_folder(tmp_path / "m", {}, source_tensors())
    target, weights = Small().state_dict(), open_weights(tmp_path / "m")
    with pytest.raises(CheckpointError, match="1 missing: a source for the model's 'count'"):
        check_weights(target, weights, RULES[:-1], ignore=["count"])
    with pytest.raises(CheckpointError, match="the model has no 'nothing'"):
        check_weights(target, weights, [*RULES, WeightRule("nothing", "k")])


# Writing


def test_layouts_are_stored_contiguous_and_once(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    tensors = {
        "transposed": base.t(),
        "rows": base[1:3],
        "expanded": torch.ones(1).expand(5),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "none": torch.zeros(0),
        "nothing": torch.zeros(0),
    }
    write_folder(tmp_path / "m", {}, tensors)
    stored = load_file(tmp_path / "m" / WEIGHTS)
    assert all(torch.equal(stored[name], tensor) for name, tensor in tensors.items())
    assert (tmp_path / "m" / WEIGHTS).stat().st_size < 1000


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"a": torch.ones(2, device="meta")}, "'a' is a torch.strided tensor .* on meta"),
        ({"a": torch.ones(2).to_sparse()}, "'a' is a torch.sparse_coo tensor"),
        ({"a": torch.ones(2, dtype=torch.complex64)}, "complex64"),
        ({"": torch.ones(2)}, "called ''"),
        ({"a\0": torch.ones(2)}, "NUL"),
    ],
)
def test_what_cannot_be_stored(tmp_path: Path, tensors: dict[str, Tensor], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        write_folder(tmp_path / "m", {}, tensors)
    assert list(tmp_path.iterdir()) == []


def test_tied_tensors_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="'embed.weight' and 'head.weight' are one and the"):
        write_folder(tmp_path / "m", {}, Small().state_dict())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("config", [{"a": object()}, {"a": {1, 2}}, {("a",): 1}])
def test_a_config_that_is_no_json(tmp_path: Path, config: dict[Any, Any]) -> None:
    with pytest.raises(CheckpointError, match="cannot be written as JSON"):
        write_folder(tmp_path / "m", config, {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["config.json", WEIGHTS, "../x", "/x", "a/b", "", "..", "C:x"])
def test_extra_files_have_plain_names(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match="extra file cannot be called"):
        write_folder(tmp_path / "m", {}, {}, {name: b""})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("exists", [False, True], ids=["new folder", "existing folder"])
def test_modes_follow_the_umask(tmp_path: Path, exists: bool) -> None:
    old = os.umask(0o027)
    try:
        if exists:
            write_folder(tmp_path / "deep" / "m", {}, {"a": torch.ones(1)})
        write_folder(tmp_path / "deep" / "m", {}, {"a": torch.ones(1)}, {"x.txt": b"x"})
    finally:
        os.umask(old)
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "deep" / "m").iterdir()}
    names = ("config.json", "sha256.json", WEIGHTS, "x.txt")
    assert modes == dict.fromkeys(names, 0o640)
    assert stat.S_IMODE((tmp_path / "deep" / "m").stat().st_mode) == 0o750


def old_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "m"
    write_folder(folder, {"age": "old"}, {"a": torch.zeros(3)}, {"tokenizer.json": b"old"})
    (folder / "notes").mkdir()
    (folder / "notes" / "mine.txt").write_text("keep me")
    return folder


def save_new(folder: Path) -> None:
    write_folder(folder, {"age": "new"}, {"a": torch.ones(3)}, {"tokenizer.json": b"new"})


def test_saving_again_replaces_files_and_keeps_the_rest(tmp_path: Path) -> None:
    folder = old_folder(tmp_path)
    inode = folder.stat().st_ino
    (tmp_path / "copied.txt").write_text("copied")
    save_new(folder)
    write_folder(folder, {"age": "newer"}, {"a": torch.ones(2)}, {"c": tmp_path / "copied.txt"})
    assert read_config(folder) == {"age": "newer"}
    assert torch.equal(open_weights(folder).read("a"), torch.ones(2))
    names = {"config.json", WEIGHTS, "sha256.json", "tokenizer.json", "c", "notes/mine.txt"}
    assert snapshot(folder).keys() == names
    assert (folder / "c").read_text() == "copied" and folder.stat().st_ino == inode
    assert {p.name for p in tmp_path.iterdir()} == {"m", "copied.txt"}


class FailsOnce:
    """Stands in for a function of `os`: the call with this number raises, all others go through."""

    def __init__(self, function: Callable[..., Any], number: int) -> None:
        self.function, self.left = function, number

    def __call__(self, *args: Any) -> Any:
        self.left -= 1
        if self.left == 0:
            raise OSError(28, "No space left on device")
        return self.function(*args)


# Calls of one save: fsync of 4 files and 1 folder (+ 1 after the moves); 1 rename, or 4 out + 4 in.
FAILURES = [("fsync", n, n < 7) for n in range(1, 8)] + [
    ("replace", n, n < 9) for n in range(1, 10)
]


@pytest.mark.parametrize(("function", "number", "fails"), FAILURES)
def test_a_failed_save_leaves_the_old_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, number: int, fails: bool
) -> None:
    folder = old_folder(tmp_path)
    before = snapshot(folder)
    monkeypatch.setattr(os, function, FailsOnce(getattr(os, function), number))
    if fails:
        with pytest.raises(CheckpointError, match="No space left .* is unchanged"):
            save_new(folder)
        assert snapshot(folder) == before
    else:  # one call more than a save makes: nothing failed, so every call has been covered
        save_new(folder)
        assert read_config(folder) == {"age": "new"}
    names = {"config.json", WEIGHTS, "sha256.json", "tokenizer.json", "notes"}
    assert {p.name for p in folder.iterdir()} == names
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize(("function", "number"), [("fsync", 1), ("fsync", 4), ("replace", 1)])
def test_a_failed_first_save_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, number: int
) -> None:
    monkeypatch.setattr(os, function, FailsOnce(getattr(os, function), number))
    with pytest.raises(CheckpointError, match="could not be written"):
        save_new(tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_when_putting_back_fails_too_the_error_says_where_the_files_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = old_folder(tmp_path)
    calls = iter([os.replace, os.replace])  # two files moved aside, then the disk is gone
    monkeypatch.setattr(os, "replace", lambda *a: next(calls, FailsOnce(os.rename, 1))(*a))
    with pytest.raises(CheckpointError, match="They are in .*previous: move them to") as caught:
        save_new(folder)
    previous = Path(str(caught.value).split("They are in ")[1].split(":")[0])
    assert {p.name for p in previous.iterdir()} == {WEIGHTS, "tokenizer.json"}
    assert (previous / "tokenizer.json").read_bytes() == b"old"


def test_ctrl_c_while_saving_puts_everything_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = old_folder(tmp_path)
    before = snapshot(folder)
    replace, calls = os.replace, iter(range(1, 100))

    def interrupted(source: Path, destination: Path) -> None:
        replace(source, destination)
        if next(calls) == 4:  # after the move has happened
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_new(folder)
    assert snapshot(folder) == before


@pytest.mark.parametrize("number", range(1, 9))
def test_a_kill_between_moves_never_leaves_a_mixture(tmp_path: Path, number: int) -> None:
    folder = old_folder(tmp_path)
    before = snapshot(folder)
    child = os.fork()
    if child == 0:
        replace, calls = os.replace, iter(range(1, 100))

        def killed(source: Path, destination: Path) -> None:
            if next(calls) == number:
                os._exit(9)
            replace(source, destination)

        os.replace = killed  # type: ignore[assignment]
        save_new(folder)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    if number == 1:
        assert float(open_weights(folder).read("a").sum()) == 0
        assert read_config(folder) == {"age": "old"}
    else:
        with pytest.raises(CheckpointError, match="no model.safetensors"):
            open_weights(folder)
    for name, content in before.items():  # nothing old is lost
        places = [folder / name, *(p / name for p in folder.glob(".tilewise-*.previous"))]
        assert any(p.exists() and p.read_bytes() == content for p in places)


@pytest.mark.parametrize("number", range(1, 10))
def test_a_save_over_shards_never_leaves_a_mixture(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "m"
    write_folder(folder, {"age": "old"}, {"a": torch.zeros(3)})
    (folder / WEIGHTS).rename(folder / "part.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "part.safetensors"}}')
    before, states = snapshot(folder), []
    replace = FailsOnce(os.replace, number)

    def watched(source: Path, destination: Path) -> None:
        replace(source, destination)
        states.append((read_age(folder), read_sum(folder)))

    monkeypatch.setattr(os, "replace", watched)
    if number == 9:  # out: the index and 2 files; in: 4; back: the index
        save_new(folder)
    else:
        with pytest.raises(CheckpointError, match="No space left"):
            save_new(folder)
    assert {state for state in states if None not in state} <= {("old", 0.0), ("new", 3.0)}
    kept = {name: before[name] for name in (index.name, "part.safetensors")}
    assert snapshot(folder) == before or number == 9
    assert kept.items() <= snapshot(folder).items()


def read_age(folder: Path) -> str | None:
    return read_config(folder)["age"] if (folder / "config.json").exists() else None


def read_sum(folder: Path) -> float | None:
    try:
        return float(open_weights(folder).read("a").sum())
    except CheckpointError:
        return None


def test_a_full_disk(tmp_path: Path) -> None:
    folder = old_folder(tmp_path)
    before = snapshot(folder)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(CheckpointError, match="could not be written"):
            write_folder(folder, {"age": "new"}, {"a": torch.ones(10_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert snapshot(folder) == before
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_targets_that_are_no_path() -> None:
    for target in (None, 5, "a\0b", ""):
        with pytest.raises(CheckpointError, match="names no folder"):
            save_new(target)  # type: ignore[arg-type]


def test_awkward_targets(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for target in (tmp_path / "file", tmp_path / "file" / "m"):
        with pytest.raises(CheckpointError, match="could not be written"):
            save_new(target)
    assert (tmp_path / "file").read_text() == "mine"
    with pytest.raises(CheckpointError, match="could not be written"):
        write_folder(tmp_path / "m", {}, {}, {"x": tmp_path / "absent"})
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    (tmp_path / "link").symlink_to("real")
    save_new(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and read_config(tmp_path / "real") == {"age": "new"}
    (tmp_path / "blank").mkdir()
    save_new(tmp_path / "blank")
    assert read_config(tmp_path / "blank") == {"age": "new"}
