"""Reads a checkpoint folder: config.json, and weights from safetensors files.

A checkpoint is data from a stranger. Each file must be a regular file inside the folder (or in the
Hugging Face cache the folder belongs to), and each safetensors header is checked here in full
before a single tensor is allocated: the library itself lets duplicate keys, odd names and some
impossible shapes through. Only safetensors and JSON are read, so loading never runs code.

A safetensors file is: 8 bytes, the header's length N, little-endian; N bytes of JSON, an object
{name: {"dtype", "shape", "data_offsets": [begin, end]}}; then the data, with no gap anywhere.
"""

import json
import os
import shlex
import weakref
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open

from tilewise.errors import CheckpointError
from tilewise.folders import existing_folder, find_file, is_plain_name, reading

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONSOLIDATED = "consolidated.safetensors"  # Meta's name for weights in one file
PARAMS = "params.json"  # and for config.json
GENERATION = "generation_config.json"

MAX_CONFIG_BYTES = 10_000_000
MAX_HEADER_BYTES = 100_000_000  # the format's own limit; the index, which lists as much, shares it
MAX_TENSORS = 100_000
MAX_NAME_BYTES = 512
MAX_TENSOR_BYTES = 2**48  # more than any address space holds
MAX_DIMENSIONS = 64
PIECE = 2**20  # bytes; few enough that a piece is still in the cache when it is converted

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}


@dataclass(frozen=True)
class TensorInfo:
    """What a header says of one tensor. `begin` and `end` are bytes after the header.

    file: where it lies; for a header that was read on the hub "owner/name/file".
    """

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


class WeightFile:
    """One safetensors file, its header checked, and open until the last read from it.

    Data is read, never mapped: a mapped file that is truncated meanwhile kills the process
    (SIGBUS).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with reading(path):
            self._file = open(path, "rb", buffering=0)
            weakref.finalize(self, self._file.close)
            self._stamp = self._now()
            self._start, self.tensors = read_header(path, self._file)
        agree(path)

    def _now(self) -> tuple[int, int]:
        found = os.fstat(self._file.fileno())
        return found.st_size, found.st_mtime_ns

    def read_into(self, begin: int, room: torch.Tensor) -> None:
        """Fills `room`, contiguous on the CPU, from byte `begin` of the data on."""
        left, at = room.view(-1).view(torch.uint8).numpy().data, self._start + begin
        with reading(self.path):
            while left and (count := os.preadv(self._file.fileno(), [left], at)):
                left, at = left[count:], at + count
            if left or self._now() != self._stamp:
                raise CheckpointError(f"{self.path} changed while loading. Load again")


class WeightFiles:
    """The weights of one folder: every header already checked, data read when it is asked for."""

    def __init__(self, folder: Path, files: Iterable[WeightFile]) -> None:
        self.folder = folder
        self._files = {file.path: file for file in files}
        self.tensors = {name: i for f in self._files.values() for name, i in f.tensors.items()}

    def read(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The named tensor in memory of its own on the CPU, as `dtype` or as stored.

        Raises CheckpointError when the folder has no such tensor, or its file changed or failed
        since the folder was opened.
        """
        info = self._info(name)
        tensor = torch.empty(info.shape, dtype=dtype or info.dtype, device="cpu")
        self.read_into(name, tensor.view(-1))
        return tensor

    def read_into(self, name: str, room: torch.Tensor) -> None:
        """Fills `room`, flat and of as many values, of any dtype and device: in place where the
        file has its dtype, else piece by piece. Raises as read does.
        """
        info = self._info(name)
        if room.dtype == info.dtype and room.device.type == "cpu":
            self._files[info.file].read_into(info.begin, room)
            return
        for piece in self.pieces(name):
            room[: len(piece)].copy_(piece)
            room = room[len(piece) :]

    def pieces(self, name: str) -> Iterator[torch.Tensor]:
        """The named tensor's values, flat and in order, PIECE bytes at a time.

        Each piece is overwritten by the next. Raises as read does.
        """
        info = self._info(name)
        room = torch.empty(min(PIECE, info.end - info.begin), dtype=torch.uint8, device="cpu")
        for begin in range(info.begin, info.end, PIECE):
            piece = room[: info.end - begin].view(info.dtype)
            self._files[info.file].read_into(begin, piece)
            yield piece

    def _info(self, name: str) -> TensorInfo:
        if name not in self.tensors:
            raise CheckpointError(
                f"{self.folder} has no tensor {shown(name)}. It holds {listed(self.tensors)}"
            )
        return self.tensors[name]


def agree(path: Path) -> None:
    """Raises CheckpointError unless the library takes the header too: a second opinion."""
    try:
        safe_open(path, "pt", backend="pread")
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise damaged(path, f"the safetensors library says: {error}") from error


def read_config(folder: str | os.PathLike[str], name: str = CONFIG) -> dict[str, Any]:
    """The folder's config.json, or another JSON object file of it; CheckpointError without one."""
    root = existing_folder(folder)
    path = find_file(root, name)
    if path is None:
        raise CheckpointError(f"{root} has no {name}: is it the folder of a checkpoint?")
    return read_json(path, MAX_CONFIG_BYTES)


def open_weights(folder: str | os.PathLike[str]) -> WeightFiles:
    """Checks every header of the folder's weights and returns them, no data read yet.

    Takes model.safetensors or, without it, the shards of model.safetensors.index.json, or without
    either consolidated.safetensors. Raises CheckpointError naming the file and what is wrong.
    """
    root = existing_folder(folder)
    if single := find_file(root, WEIGHTS):
        return WeightFiles(root, [WeightFile(single)])
    if index := find_file(root, INDEX):
        return WeightFiles(root, read_shards(root, index))
    if single := find_file(root, CONSOLIDATED):
        return WeightFiles(root, [WeightFile(single)])
    raise CheckpointError(no_weights_message(str(root), os.listdir(root), str(root)))


def no_weights_message(source: str, names: Iterable[str], target: str) -> str:
    """Of a source that has files of these names, which transformers could convert into `target`."""
    message = f"{source} has no {WEIGHTS} and no {INDEX}"
    pickles = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    if not pickles:
        return f"{message}: is it a checkpoint?"
    here, there = (json.dumps(place, ensure_ascii=False) for place in (source, target))
    code = (  # JSON's strings are Python literals too
        "from transformers import AutoModelForCausalLM; "
        f"AutoModelForCausalLM.from_pretrained({here})"
        f".save_pretrained({there}, safe_serialization=True)"
    )
    return (
        f"{message}, only {listed(pickles)}: pickle can run code and is never read here. "
        f"If you trust its source, convert it with\n  python -c {shlex.quote(code)}"
    )


# JSON


def read_json(path: Path, max_bytes: int) -> dict[str, Any]:
    with reading(path):
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > max_bytes:
                raise CheckpointError(f"{path} has {size:,} bytes; at most {max_bytes:,} are read")
            return parse_object(path, file.read(max_bytes))


def parse_object(path: Path, raw: bytes) -> dict[str, Any]:
    """Parses UTF-8 JSON that must be an object and may hold no key twice."""
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:  # covers Unicode and JSON errors
        raise damaged(path, f"its JSON cannot be read ({error})") from error
    if not isinstance(value, dict):
        raise damaged(path, f"its JSON is of type {type(value).__name__}, not an object")
    return value


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys: set[str] = set()
    for key, _ in pairs:
        if key in keys:
            raise ValueError(f"key {shown(key)} appears twice")
        keys.add(key)
    return dict(pairs)


# Headers


def read_header(path: Path, file: BinaryIO) -> tuple[int, dict[str, TensorInfo]]:
    """Where the data starts, and the tensors, from a header that is checked in full."""
    size = os.fstat(file.fileno()).st_size
    length = header_length(path, size, file.read(8))
    return 8 + length, parse_header(path, size, file.read(length))


def header_length(path: Path, size: int, start: bytes) -> int:
    """Bytes of the header, from the file's size and first 8 bytes."""
    length = int.from_bytes(start, "little")
    if size < 8 or not 2 <= length <= min(size - 8, MAX_HEADER_BYTES):
        raise damaged(
            path,
            f"it has {size:,} bytes and says that its header has {length:,}, where "
            f"2 to {min(max(size - 8, 0), MAX_HEADER_BYTES):,} are possible",
        )
    return length


def parse_header(path: Path, size: int, raw: bytes) -> dict[str, TensorInfo]:
    """The tensors of a file of `size` bytes whose header is `raw`."""
    if not raw.startswith(b"{"):
        raise damaged(path, f"its header starts with {raw[:1]!r}, not with '{{'")
    header = parse_object(path, raw)
    check_metadata(path, header.pop("__metadata__", {}))
    if len(header) > MAX_TENSORS:
        raise CheckpointError(f"{path} holds {len(header):,} tensors; {MAX_TENSORS:,} is the most")
    tensors = {name: tensor_info(path, name, entry) for name, entry in header.items()}
    check_layout(path, tensors, size - 8 - len(raw))
    return tensors


def check_metadata(path: Path, metadata: Any) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise damaged(path, "its __metadata__ is not an object of strings")


def tensor_info(path: Path, name: str, entry: Any) -> TensorInfo:
    check_name(path, name)
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise damaged(path, f"{shown(name)} is not given by dtype, shape and data_offsets alone")
    kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(kind, str) or kind not in DTYPES:
        raise CheckpointError(
            f"{path}: {shown(name)} has dtype {shown(str(kind))}; readable are {', '.join(DTYPES)}"
        )
    if not is_counts(shape) or len(shape) > MAX_DIMENSIONS:
        raise damaged(path, f"the shape of {shown(name)} is not a short list of integers >= 0")
    if not is_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise damaged(path, f"the data_offsets of {shown(name)} are not [begin, end]")
    begin, end = offsets
    size = checked_size(path, name, shape, DTYPES[kind].itemsize)
    if end - begin != size:
        raise damaged(
            path,
            f"{shown(name)} of {described(DTYPES[kind], shape)} takes {size} bytes, "
            f"and its data_offsets give it {shown(str(end - begin))}",
        )
    return TensorInfo(path, DTYPES[kind], tuple(shape), begin, end)


def check_name(where: Path | str, name: str) -> None:
    """Raises CheckpointError unless a checkpoint may hold a tensor of this name."""
    try:
        size = len(name.encode())
    except UnicodeEncodeError:  # a lone surrogate has no encoding
        size = 0
    if not 1 <= size <= MAX_NAME_BYTES or "\0" in name:
        raise CheckpointError(
            f"{where}: a tensor is called {shown(name)}, which is not 1 to {MAX_NAME_BYTES} bytes "
            "of UTF-8 without NUL. Rename it where the file is made"
        )


def is_counts(value: Any) -> bool:
    return isinstance(value, list) and all(
        type(item) is int and 0 <= item < 2**63 for item in value
    )


def checked_size(path: Path, name: str, shape: list[int], itemsize: int) -> int:
    """Bytes of a tensor. A zero hides no impossible dimension: [0, 2**62] is refused too."""
    largest = itemsize
    for dimension in shape:
        largest *= max(dimension, 1)
        if largest > MAX_TENSOR_BYTES:
            raise damaged(path, f"the shape {shape} of {shown(name)} is beyond any memory")
    return 0 if 0 in shape else largest


def check_layout(path: Path, tensors: dict[str, TensorInfo], data_size: int) -> None:
    """The tensors must fill the data exactly: no overlap, no hole, nothing left over."""
    position = 0
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if info.begin != position:
            raise damaged(
                path, f"{shown(name)} starts at byte {info.begin} of the data, not at {position}"
            )
        position = info.end
    if position != data_size:
        raise damaged(path, f"its tensors end at byte {position} of {data_size} bytes of data")


# Shards


def read_shards(root: Path, index: Path) -> Iterator[WeightFile]:
    """Every shard; index and shards must tell the same story."""
    for shard, names in listed_shards(index).items():
        path = find_file(root, shard)
        if path is None:
            raise CheckpointError(f"{index} lists {shown(shard)}, which is missing: fetch it")
        file = WeightFile(path)
        check_same_names(root / shard, names, file.tensors.keys())
        yield file


def listed_shards(index: Path) -> dict[str, set[str]]:
    """{file: its tensors} as an index has it; every file's name is a plain one."""
    weight_map = read_json(index, MAX_HEADER_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise damaged(index, "its weight_map is missing, empty or not an object")
    if len(weight_map) > MAX_TENSORS:
        raise CheckpointError(f"{index} lists {len(weight_map):,} tensors; {MAX_TENSORS:,} may be")
    promised: dict[str, set[str]] = {}
    for name, shard in weight_map.items():
        check_shard_name(index, name, shard)
        promised.setdefault(shard, set()).add(name)
    return dict(sorted(promised.items()))


def check_shard_name(index: Path, name: str, shard: Any) -> None:
    if not isinstance(shard, str) or not is_plain_name(shard):
        raise damaged(
            index, f"it puts {shown(name)} in {shown(str(shard))}, not a file name of this folder"
        )
    if not shard.endswith(".safetensors"):
        raise CheckpointError(
            f"{index} puts {shown(name)} in {shown(shard)}; only .safetensors files are read"
        )


def check_same_names(shard: Path, promised: Collection[str], found: Collection[str]) -> None:
    if absent := set(promised) - set(found):
        raise damaged(shard, f"the index promises {listed(absent)}, which it does not hold")
    if extra := set(found) - set(promised):
        raise damaged(shard, f"it holds {listed(extra)}, which the index does not place there")


# Words


def damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path} is damaged: {what}. Fetch or save the file again")


def shown(name: str) -> str:
    """A name from a file, quoted, escaped and short enough for a message."""
    return repr(name if len(name) <= 80 else name[:77] + "...")


def listed(names: Collection[str], most: int = 10) -> str:
    some = sorted(names)[:most]
    rest = f" and {len(names) - most:,} more" if len(names) > most else ""
    return (", ".join(map(shown, some)) or "nothing") + rest


def described(dtype: torch.dtype, shape: Collection[int]) -> str:
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"
