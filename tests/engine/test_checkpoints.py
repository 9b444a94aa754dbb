"""Reading checkpoint folders: sound ones load equal, damaged and hostile ones raise one error."""

import json
import os
import pickle
import shlex
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from tilewise.checkpoints import (
    open_weights,
    read_config,
    reading,
    write_folder,
)
from tilewise.checkpoints.reading import DTYPES
from tilewise.errors import CheckpointError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def raw_file(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def write_weights(folder: Path, content: bytes, name: str = WEIGHTS) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(content)
    return folder


def some_tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "a.weight": torch.randn(9, 11, generator=generator),
        "a.bias": torch.randn(11, generator=generator),
        "step": torch.tensor(7),
        "empty": torch.zeros(0, 5),
    }


# Reading


def test_every_dtype_survives_a_round_trip(tmp_path: Path) -> None:
    tensors = {code: torch.tensor([[0, 1, 1], [1, 0, 1]]).to(d) for code, d in DTYPES.items()}
    write_folder(tmp_path / "m", {"model_type": "x", "limit": float("inf")}, tensors)
    weights = open_weights(tmp_path / "m")
    assert weights.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        info = weights.tensors[name]
        assert (info.dtype, info.shape) == (tensor.dtype, (2, 3))
        assert weights.read(name).dtype == tensor.dtype
        assert torch.equal(weights.read(name, torch.float64), tensor.to(torch.float64))
    assert read_config(tmp_path / "m") == {"model_type": "x", "limit": float("inf")}


def test_a_file_cut_anywhere_is_an_error(tmp_path: Path) -> None:
    save_file(some_tensors() | {"big": torch.ones(300)}, tmp_path / "whole")
    content = (tmp_path / "whole").read_bytes()
    assert 1800 < len(content) < 2600
    path = write_weights(tmp_path / "m", content) / WEIGHTS
    assert open_weights(tmp_path / "m").read("big").sum() == 300
    for length in reversed(range(len(content))):
        os.truncate(path, length)
        with pytest.raises(CheckpointError, match="model.safetensors is damaged"):
            open_weights(tmp_path / "m")


def entry(**changes: Any) -> dict[str, Any]:
    return {"a": F32 | changes}


def pair(first: list[int], second: list[int]) -> dict[str, Any]:
    return {"a": F32 | {"data_offsets": first}, "b": F32 | {"data_offsets": second}}


HOSTILE = {
    "empty file": (b"", "header"),
    "seven bytes": (b"\x02\0\0\0\0\0\0", "header"),
    "header of no bytes": (raw_file(b""), "header has 0"),
    "header past the end": (raw_file(b"{}", length=3), "header has 3"),
    "header over the cap": (raw_file(b"{}", length=100_000_001), "header has 100,000,001"),
    "header 2**63": (raw_file(b"{}", length=2**63), "header has 9,223"),
    "header 2**64 - 1": (raw_file(b"{}", length=2**64 - 1), "header has 18,446"),
    "not UTF-8": (raw_file(b'{"\xff": 1}'), "utf-8"),
    "not JSON": (raw_file(b'{"a": }'), "JSON"),
    "array": (raw_file(b"[]"), "starts with"),
    "leading space": (raw_file(b" {}"), "starts with"),
    "something after the object": (raw_file(b"{}{}"), "Extra data"),
    "trailing byte": (raw_file(entry(), bytes(9)), "end at byte 8 of 9"),
    "depth 5,000": (raw_file(b'{"a":' + b"[" * 5000 + b"]" * 5000 + b"}"), "damaged"),
    "number of 5,000 digits": (raw_file(b'{"a":' + b"1" * 5000 + b"}"), "damaged"),
    "entry is a number": (raw_file({"a": 1}), "'a' is not given by"),
    "entry lacks a key": (raw_file({"a": {"dtype": "F32", "shape": []}}), "'a' is not given by"),
    "entry has a further key": (raw_file(entry(code="x"), bytes(8)), "'a' is not given by"),
    "only the library objects": (
        raw_file(b'{"a":{"dtype":"F32","shape":[-0],"data_offsets":[0,0]}}'),
        "library says",
    ),
    "metadata not strings": (raw_file({"__metadata__": {"a": 1}}), "__metadata__"),
    "metadata an array": (raw_file({"__metadata__": []}), "__metadata__"),
    "unknown dtype": (raw_file(entry(dtype="F31"), bytes(8)), "'a' has dtype 'F31'"),
    "dtype a list": (raw_file(entry(dtype=["F32"]), bytes(8)), "'a' has dtype"),
    "negative dimension": (raw_file(entry(shape=[-2]), bytes(8)), "shape of 'a'"),
    "boolean dimension": (raw_file(entry(shape=[2, True]), bytes(8)), "shape of 'a'"),
    "float dimension": (raw_file(entry(shape=[2.0]), bytes(8)), "shape of 'a'"),
    "NaN dimension": (raw_file(entry(shape=[float("nan")]), bytes(8)), "shape of 'a'"),
    "shape a string": (raw_file(entry(shape="2"), bytes(8)), "shape of 'a'"),
    "1,000 dimensions": (raw_file(entry(shape=[1] * 1000), bytes(4)), "shape of 'a'"),
    "overflowing shape": (raw_file(entry(shape=[2**40, 2**40]), bytes(8)), "beyond any memory"),
    "overflow beside a zero": (
        raw_file(entry(shape=[0, 2**62], data_offsets=[0, 0])),
        "beyond any memory",
    ),
    "size is not shape x dtype": (raw_file(entry(shape=[3]), bytes(8)), "takes 12 bytes"),
    "one offset": (raw_file(entry(data_offsets=[0]), bytes(8)), "data_offsets of 'a'"),
    "negative offset": (raw_file(entry(data_offsets=[-8, 0]), bytes(8)), "data_offsets of 'a'"),
    "reversed offsets": (raw_file(entry(data_offsets=[8, 0]), bytes(8)), "data_offsets of 'a'"),
    "offsets past the end": (raw_file(pair([0, 8], [8, 16]), bytes(8)), "end at byte 16 of 8"),
    "overlap": (raw_file(pair([0, 8], [4, 12]), bytes(12)), "'b' starts at byte 4"),
    "same place twice": (raw_file(pair([0, 8], [0, 8]), bytes(8)), "'b' starts at byte 0"),
    "hole": (raw_file(pair([0, 8], [16, 24]), bytes(24)), "'b' starts at byte 16"),
    "hole at the start": (raw_file(entry(data_offsets=[4, 12]), bytes(12)), "starts at byte 4"),
    "duplicate key, same bytes": (
        raw_file(f'{{"a":{json.dumps(F32)},"a":{json.dumps(F32)}}}'.encode(), bytes(8)),
        "'a' appears twice",
    ),
    "duplicate key, other shape": (
        raw_file(
            f'{{"a":{json.dumps(F32)},"a":{json.dumps(F32 | {"shape": [1, 2]})}}}'.encode(),
            bytes(8),
        ),
        "'a' appears twice",
    ),
    "duplicate dtype": (raw_file(b'{"a":{"dtype":"F32","dtype":"F64"}}'), "appears twice"),
    "empty name": (raw_file({"": F32}, bytes(8)), "called ''"),
    "NUL in a name": (raw_file({"a\0b": F32}, bytes(8)), "NUL"),
    "lone surrogate in a name": (raw_file({"a\ud800": F32}, bytes(8)), "ud800"),
    "name of 10 KiB": (raw_file({"n" * 10240: F32}, bytes(8)), "called 'nnn.*1 to 512 bytes"),
    "name of 513 bytes": (raw_file({"\u00e9" * 256 + "n": F32}, bytes(8)), "1 to 512 bytes"),
    "pickle": (pickle.dumps({"weight": [1.0] * 100}), "damaged"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_header(tmp_path: Path, kind: str) -> None:
    content, message = HOSTILE[kind]
    with pytest.raises(CheckpointError, match=message) as caught:
        open_weights(write_weights(tmp_path / "m", content))
    assert str(tmp_path / "m" / WEIGHTS) in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_tensor_count_is_capped(tmp_path: Path) -> None:
    none = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
    most = raw_file({str(i): none for i in range(100_000)})
    assert len(open_weights(write_weights(tmp_path / "m", most)).tensors) == 100_000
    more = raw_file({str(i): none for i in range(100_001)})
    with pytest.raises(CheckpointError, match="100,001 tensors"):
        open_weights(write_weights(tmp_path / "m", more))


def test_odd_but_sound_headers_are_read(tmp_path: Path) -> None:
    header = json.dumps({"__metadata__": {"k": "v"}, "../x": F32}).encode() + b"   "
    weights = open_weights(write_weights(tmp_path / "m", raw_file(header, bytes(8))))
    assert torch.equal(weights.read("../x"), torch.zeros(2))  # a name is no path here
    assert open_weights(write_weights(tmp_path / "n", raw_file({}))).tensors == {}


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.data())
def test_mutated_files_load_equal_or_raise(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    save_file(some_tensors(), folder / WEIGHTS)
    content = bytearray((folder / WEIGHTS).read_bytes())
    header_end = 8 + int.from_bytes(content[:8], "little")
    for _ in range(data.draw(st.integers(1, 3))):
        position = data.draw(st.integers(0, header_end - 1))
        content[position] = data.draw(st.integers(0, 255))
    (folder / WEIGHTS).write_bytes(bytes(content))
    try:
        weights = open_weights(folder)
    except CheckpointError:
        return
    expected = load_file(folder / WEIGHTS)  # what we accept, the library accepts, and alike
    assert weights.tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert weights.read(name).numpy(force=True).tobytes() == tensor.numpy().tobytes()


def test_pickle_is_never_run(tmp_path: Path) -> None:
    sentinel = tmp_path / "ran"

    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.system, (f"touch {sentinel}",)

    for protocol in (0, 2, 5):
        payload = pickle.dumps(Payload(), protocol=protocol)
        with pytest.raises(CheckpointError, match="damaged"):
            open_weights(write_weights(tmp_path / "renamed", payload))
    torch.save(Payload(), tmp_path / "renamed" / WEIGHTS)
    with pytest.raises(CheckpointError, match="damaged"):
        open_weights(tmp_path / "renamed")
    torch.save(Payload(), write_weights(tmp_path / "bin", b"", "x.pt") / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pickle can run code"):
        open_weights(tmp_path / "bin")
    assert not sentinel.exists()
    pickle.loads(pickle.dumps(Payload()))  # the payload is a live one
    assert sentinel.exists()


def test_a_file_replaced_between_check_and_opening_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_weights(tmp_path / "m", raw_file(entry(), bytes(8)))
    open_file = reading.safe_open

    def swapped(*args: Any, **options: Any) -> Any:
        write_weights(folder, raw_file(entry(shape=[4], data_offsets=[0, 16]), bytes(16)))
        return open_file(*args, **options)

    monkeypatch.setattr(reading, "safe_open", swapped)
    with pytest.raises(CheckpointError, match="changed while loading"):
        open_weights(folder).read("a")


def test_a_file_renamed_over_after_opening_changes_nothing(tmp_path: Path) -> None:
    folder = write_weights(tmp_path / "m", raw_file(entry(), bytes(8)))
    weights = open_weights(folder)
    write_folder(folder, {}, {"a": torch.ones(5)})
    assert torch.equal(weights.read("a"), torch.zeros(2))
    with pytest.raises(CheckpointError, match="no tensor 'z'. It holds 'a'"):
        weights.read("z")


def test_truncation_while_reading_does_not_kill(tmp_path: Path) -> None:
    size = 4 << 20
    header = entry(dtype="U8", shape=[size], data_offsets=[0, size])
    weights = open_weights(write_weights(tmp_path / "m", raw_file(header, bytes(size))))
    tensor = weights.read("a")
    os.truncate(tmp_path / "m" / WEIGHTS, 4096)
    assert int(tensor.sum()) == 0  # memory of its own: a mapped file would raise SIGBUS here
    with pytest.raises(CheckpointError, match="changed while loading"):
        weights.read("a")


# Config


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "JSON cannot be read"),
        (b"[1]", "of type list"),
        (b'{"a": 1, "a": 2}', "'a' appears twice"),
        (b'{"a": "\xff"}', "JSON cannot be read"),
        (b'{"a":' * 200_000, "JSON cannot be read"),
        (b"[" * 200_000 + b"]" * 200_000, "JSON|list"),
        (b" " * 10_000_001, "at most 10,000,000"),
    ],
)
def test_bad_config(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        read_config(write_weights(tmp_path / "m", content, "config.json"))
    assert str(tmp_path / "m" / "config.json") in str(caught.value)


def test_unknown_config_keys_are_kept_and_ignored(tmp_path: Path) -> None:
    config = {"auto_map": {"AutoModel": "x.Y"}, "trust_remote_code": True, "n": [1, {"m": None}]}
    write_weights(tmp_path / "m", json.dumps(config).encode(), "config.json")
    assert read_config(tmp_path / "m") == config


def test_missing_folder_and_files(tmp_path: Path) -> None:
    for folder in (tmp_path / "none", str(tmp_path / "a\0b")):
        with pytest.raises(CheckpointError, match="not a folder"):
            read_config(folder)
        with pytest.raises(CheckpointError, match="not a folder"):
            open_weights(folder)
    with pytest.raises(CheckpointError, match="has no config.json"):
        read_config(tmp_path)
    with pytest.raises(CheckpointError, match="has no model.safetensors and no"):
        open_weights(tmp_path)


# Shards and links


def sharded(folder: Path, weight_map: Any, *shards: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    for i, shard in enumerate(shards):
        save_file({f"t{i}": torch.full((3,), float(i))}, folder / shard)
    return folder


def test_shards_are_read_as_one(tmp_path: Path) -> None:
    sharded(
        tmp_path / "m",
        {"t0": "x.safetensors", "t1": "y.safetensors"},
        "x.safetensors",
        "y.safetensors",
    )
    weights = open_weights(tmp_path / "m")
    assert [float(weights.read(f"t{i}").sum()) for i in range(2)] == [0.0, 3.0]
    assert weights.tensors["t1"].file.name == "y.safetensors"


@pytest.mark.parametrize(
    "shard",
    [
        "/etc/passwd",
        "../x.safetensors",
        "..\\x.safetensors",
        "C:x.safetensors",
        "",
        ".",
        "..",
        "\\\\host\\share\\x.safetensors",
        "sub/x.safetensors",
        "x\0.safetensors",
        "x\n.safetensors",
        "/dev/zero",
        7,
        None,
        ["x.safetensors"],
    ],
)
def test_index_may_only_name_files_of_its_folder(tmp_path: Path, shard: Any) -> None:
    save_file({"t0": torch.zeros(1)}, tmp_path / "x.safetensors")  # ../x does exist
    with pytest.raises(CheckpointError, match="not a file name of this folder"):
        open_weights(sharded(tmp_path / "m", {"t0": shard}))


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"t0": "x.bin"}, "only .safetensors"),
        ({"t0": "x.safetensors", "t1": "z.safetensors"}, "lists 'z.safetensors', which is missing"),
        (
            {"t0": "x.safetensors"} | {f"n{i}": "x.safetensors" for i in range(10_000)},
            "promises 'n0', .* and 9,990 more, which it does not hold",
        ),
        ({"t0": "x.safetensors", "t9": "y.safetensors"}, "promises 't9'"),
        ({"t0": "x.safetensors", "t1": "x.safetensors"}, "promises 't1'"),
        ({}, "weight_map"),
        ([], "weight_map"),
        (None, "weight_map"),
        ({str(i): "x.safetensors" for i in range(100_001)}, "100,001 tensors"),
    ],
)
def test_bad_index(tmp_path: Path, weight_map: Any, message: str) -> None:
    folder = sharded(tmp_path / "m", weight_map, "x.safetensors", "y.safetensors", "x.bin")
    with pytest.raises(CheckpointError, match=message):
        open_weights(folder)


def test_shard_with_tensors_the_index_lacks_or_places_elsewhere(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "m", {"a": "x.safetensors", "b": "y.safetensors"})
    save_file({"a": torch.zeros(1)}, folder / "x.safetensors")
    save_file({"a": torch.ones(1), "b": torch.ones(1)}, folder / "y.safetensors")
    with pytest.raises(CheckpointError, match="y.safetensors is damaged: it holds 'a'"):
        open_weights(folder)


def test_duplicate_and_oversized_index(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "m", {}, "x.safetensors")
    (folder / INDEX).write_text('{"weight_map": {"t0": "x.safetensors", "t0": "x.safetensors"}}')
    with pytest.raises(CheckpointError, match="'t0' appears twice"):
        open_weights(folder)
    os.truncate(folder / INDEX, 200 << 20)  # sparse
    with pytest.raises(CheckpointError, match="at most 100,000,000"):
        open_weights(folder)


def link_out(path: Path) -> None:
    save_file({"t0": torch.zeros(1)}, path.parent.parent / "secret.safetensors")
    path.symlink_to("../secret.safetensors")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (link_out, "outside the checkpoint"),
        (lambda path: path.symlink_to("/dev/zero"), "outside the checkpoint"),
        (lambda path: path.symlink_to(path.name), "cannot be read"),
        (lambda path: path.symlink_to("nowhere"), "cannot be read"),
        (lambda path: path.mkdir(), "not a regular file"),
        (os.mkfifo, "not a regular file"),
    ],
    ids=["link out", "link to a device", "link loop", "broken link", "folder", "FIFO"],
)
@pytest.mark.parametrize("name", ["x.safetensors", WEIGHTS, INDEX, "config.json"])
def test_only_regular_files_of_the_folder(
    tmp_path: Path, name: str, make: Callable[[Path], None], message: str
) -> None:
    folder = sharded(tmp_path / "m", {"t0": "x.safetensors"})
    (folder / name).unlink(missing_ok=True)
    make(folder / name)
    with pytest.raises(CheckpointError, match=message):
        read_config(folder) if name == "config.json" else open_weights(folder)


def test_hugging_face_cache_layouts_load(tmp_path: Path) -> None:
    cache, repository = tmp_path / "hub", tmp_path / "hub" / "models--me--tiny"
    snapshot_folder = repository / "snapshots" / "0a1b"
    for folder in (snapshot_folder, repository / "blobs", cache / "blobs" / "ab"):
        folder.mkdir(parents=True)
    save_file({"t0": torch.ones(2)}, cache / "blobs" / "ab" / "abcd")
    (repository / "blobs" / "w").symlink_to("../../blobs/ab/abcd")  # store shared by repositories
    (repository / "blobs" / "c").write_text("{}")
    (snapshot_folder / WEIGHTS).symlink_to("../../blobs/w")
    (snapshot_folder / "config.json").symlink_to("../../blobs/c")
    assert read_config(snapshot_folder) == {}
    assert torch.equal(open_weights(snapshot_folder).read("t0"), torch.ones(2))
    (tmp_path / "alias").symlink_to(snapshot_folder)
    assert open_weights(tmp_path / "alias").tensors.keys() == {"t0"}
    (repository / "refs").write_text("{}")
    (snapshot_folder / "config.json").unlink()
    (snapshot_folder / "config.json").symlink_to("../../refs")
    with pytest.raises(CheckpointError, match="outside the checkpoint"):
        read_config(snapshot_folder)
    (plain := repository / "elsewhere" / "0a1b").mkdir(parents=True)  # no snapshot
    (plain / "config.json").symlink_to("../../blobs/c")
    with pytest.raises(CheckpointError, match="outside the checkpoint"):
        read_config(plain)


def test_links_within_the_folder_load(tmp_path: Path) -> None:
    write_weights(tmp_path / "m", raw_file(entry(), bytes(8)), "real.safetensors")
    (tmp_path / "m" / WEIGHTS).symlink_to("real.safetensors")
    assert open_weights(tmp_path / "m").tensors.keys() == {"a"}


# Other people's checkpoints


@pytest.fixture(scope="module")
def gpt2() -> Any:
    import transformers

    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=33, n_positions=20)
    return transformers.GPT2LMHeadModel(config)


@pytest.mark.parametrize("shard_size", ["5GB", "8KB"])
def test_a_transformers_folder_reads_equal(tmp_path: Path, gpt2: Any, shard_size: str) -> None:
    gpt2.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (tmp_path / INDEX).exists() == (shard_size == "8KB")
    weights = open_weights(tmp_path)
    expected = {k: v for k, v in gpt2.state_dict().items() if k != "lm_head.weight"}
    assert weights.tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(weights.read(name), tensor)
    assert read_config(tmp_path)["n_embd"] == 16


def test_transformers_reads_what_we_write(tmp_path: Path, gpt2: Any) -> None:
    tensors = gpt2.state_dict()
    del tensors["lm_head.weight"]
    write_folder(tmp_path / "m", gpt2.config.to_dict(), tensors)
    back = type(gpt2).from_pretrained(tmp_path / "m", local_files_only=True)
    for name, tensor in gpt2.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor)


def test_the_printed_conversion_works(tmp_path: Path, gpt2: Any) -> None:
    folder = tmp_path / 'it\'s "quoted" \U0001f600'
    folder.mkdir()
    gpt2.config.save_pretrained(folder)
    torch.save(gpt2.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pytorch_model.bin") as caught:
        open_weights(folder)
    program, option, code = shlex.split(str(caught.value).splitlines()[-1])
    assert (program, option) == ("python", "-c")
    offline = os.environ | {"HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, option, code], check=True, env=offline, capture_output=True)
    weights = open_weights(folder)
    wte = "transformer.wte.weight"
    assert torch.equal(weights.read(wte), gpt2.state_dict()[wte])
