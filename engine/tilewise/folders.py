"""Files of a checkpoint folder that are safe to open: regular, and inside it whatever links say."""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath

from tilewise.errors import CheckpointError


def existing_folder(folder: str | os.PathLike[str]) -> Path:
    """The real path of a folder; CheckpointError where there is none."""
    if not Path(folder).is_dir():
        raise CheckpointError(f"{os.fspath(folder)!r} is not a folder. Give a checkpoint's folder")
    return Path(os.path.realpath(folder))


def find_file(root: Path, name: str) -> Path | None:
    """The real path of root/name, None when it does not exist; raises when it is out of bounds."""
    path = root / name
    if not os.path.lexists(path):
        return None
    with reading(path):
        real = Path(os.path.realpath(path, strict=True))
        regular = stat.S_ISREG(real.stat().st_mode)  # before open(): opening a FIFO would block
    if not any(real.is_relative_to(allowed) for allowed in readable_roots(root)):
        raise CheckpointError(
            f"{path} is a link to {real}, outside the checkpoint. Copy the file into the folder"
        )
    if not regular:
        raise CheckpointError(f"{path} is not a regular file. Put the checkpoint's file there")
    return real


def readable_roots(root: Path) -> list[Path]:
    """The folder itself; for <cache>/models--a--b/snapshots/<revision> the cache's blobs as well.

    The Hugging Face cache links each snapshot file to ../../blobs, and that on to a store which
    all repositories share, <cache>/blobs.
    """
    repository = root.parent.parent
    if root.parent.name == "snapshots" and repository.name.startswith("models--"):
        return [root, repository / "blobs", repository.parent / "blobs"]
    return [root]


def is_plain_name(name: str) -> bool:
    """Whether `name` names a file of the folder itself, on every system."""
    return (
        name not in ("", ".", "..")
        and name.isprintable()
        and name == PurePosixPath(name).name == PureWindowsPath(name).name
    )


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns an OSError into a CheckpointError that names the file."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
