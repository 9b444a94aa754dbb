"""Writes a checkpoint folder so that neither a crash nor an error ever costs what was there.

All files are first written to a hidden folder on the same filesystem, flushed and fsynced.
- A new folder then appears by one rename: it is there complete or not at all.
- In a folder that exists, the files to be replaced are moved aside, weights first, and the new ones
  moved in, weights last. A kill in between leaves no weights file, which loading reports, and never
  a mixture that loads; the previous files are then in .tilewise-*.previous inside the folder. Other
  files of the folder stay as they are.
"""

import json
import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from tilewise.checkpoints.manifest import MANIFEST, digests
from tilewise.checkpoints.reading import (
    CONFIG,
    CONSOLIDATED,
    DTYPES,
    INDEX,
    WEIGHTS,
    check_name,
    shown,
)
from tilewise.errors import CheckpointError
from tilewise.folders import is_plain_name

RESERVED = (CONFIG, WEIGHTS, MANIFEST)


def write_folder(
    folder: str | os.PathLike[str],
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    extra_files: Mapping[str, bytes | Path] | None = None,
) -> None:
    """Writes config.json, model.safetensors and the extra files (content, or a file to copy), and
    the SHA-256 of each in a manifest.

    Tensors may be on any device and of any strides; each is stored once, so two names for one and
    the same tensor are an error. Modes are 0666 & ~umask. Raises CheckpointError, with nothing left
    behind and the folder's previous content unchanged.
    """
    try:
        if not (named := os.fsdecode(folder)):
            raise ValueError("it is empty")  # and realpath would make it the working directory
        root = Path(os.path.realpath(named))
    except (TypeError, ValueError) as error:  # no path at all, or one with a NUL
        raise CheckpointError(f"{folder!r} names no folder: {error}") from error
    stored = storable(tensors)
    try:
        files = {name: content(name, source) for name, source in (extra_files or {}).items()}
        files[CONFIG] = config_bytes(config)
        root.parent.mkdir(parents=True, exist_ok=True)
        exists = root.is_dir()
        staging = hidden_folder(root if exists else root.parent, "tmp")
        try:
            fill(staging, files, stored)
            if exists:
                replace_files(staging, root)
            else:
                os.replace(staging, root)
                sync_folder(root.parent)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{root} could not be written: {error}. What it held before is unchanged"
        ) from error


def storable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, each contiguous in memory of its own."""
    stored: dict[str, Tensor] = {}
    owner: dict[int, str] = {}
    for name, tensor in tensors.items():
        check_name("write_folder", name)
        if tensor.layout != torch.strided or tensor.is_meta or tensor.dtype not in DTYPES.values():
            raise CheckpointError(
                f"{shown(name)} is a {tensor.layout} tensor of {tensor.dtype} on {tensor.device}; "
                "a checkpoint takes dense tensors with values, of real dtypes"
            )
        data = tensor.detach().contiguous()
        if data.untyped_storage().nbytes() != data.nbytes:
            data = data.clone()  # a part of something larger, which may have other parts here
        first = owner.setdefault(data.data_ptr(), name) if data.numel() else name
        if first != name:
            raise CheckpointError(
                f"{shown(first)} and {shown(name)} are one and the same tensor, and a checkpoint "
                "stores a tensor once. Leave one of the names out"
            )
        stored[name] = data
    return {name: data.cpu() for name, data in stored.items()}


def config_bytes(config: Mapping[str, Any]) -> bytes:
    try:
        return (json.dumps(dict(config), indent=2, sort_keys=True) + "\n").encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"The config cannot be written as JSON: {error}") from error


def content(name: str, source: bytes | Path) -> bytes:
    if not is_plain_name(name) or name in RESERVED:
        raise CheckpointError(
            f"An extra file cannot be called {shown(name)}: give a plain file name other than "
            + ", ".join(RESERVED)
        )
    return source.read_bytes() if isinstance(source, Path) else source


def hidden_folder(parent: Path, suffix: str) -> Path:
    path = parent / f".tilewise-{secrets.token_hex(6)}.{suffix}"
    path.mkdir()
    return path


def fill(staging: Path, files: Mapping[str, bytes], tensors: dict[str, Tensor]) -> None:
    for name, data in files.items():
        with open(staging / name, "xb") as file:
            file.write(data)
    save_file(tensors, staging / WEIGHTS, metadata={"format": "pt"})  # transformers wants "pt"
    # safetensors makes its file 0600; config.json has the mode that the umask asks for.
    os.chmod(staging / WEIGHTS, (staging / CONFIG).stat().st_mode)
    (staging / MANIFEST).write_text(digests(staging, [*files, WEIGHTS]))
    for name in [*files, WEIGHTS, MANIFEST]:
        sync(staging / name)
    sync_folder(staging)


def replace_files(staging: Path, root: Path) -> None:
    """Moves the staged files into `root`; on any failure every move is undone."""
    names = sorted(os.listdir(staging), key=lambda name: (name == WEIGHTS, name))
    previous = hidden_folder(root, "previous")
    aside = [(root / n, previous / n) for n in reversed(names) if os.path.lexists(root / n)]
    # Meanwhile older weights under another name would load with the new config.json.
    hidden = [(root / n, previous / n) for n in (INDEX, CONSOLIDATED) if os.path.lexists(root / n)]
    back = [(there, here) for here, there in hidden]
    moves = hidden + aside + [(staging / n, root / n) for n in names] + back
    try:
        for source, destination in moves:
            os.replace(source, destination)
        sync_folder(root)
    except BaseException:
        undo(moves, previous)
        raise
    shutil.rmtree(previous, ignore_errors=True)


def undo(moves: list[tuple[Path, Path]], previous: Path) -> None:
    try:
        for source, destination in reversed(moves):
            if not os.path.lexists(source):
                os.replace(destination, source)
        previous.rmdir()
    except OSError as error:
        raise CheckpointError(
            f"Saving failed, and so did putting the previous files back ({error}). "
            f"They are in {previous}: move them to {previous.parent}"
        ) from error


def sync(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
