"""The manifest of a saved folder: the SHA-256 of every file that was saved with it.

It finds damage: a bit that flipped, a file of another save. It is no signature, for whoever can
change a file can change the manifest.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from tilewise.checkpoints.reading import CONFIG, MAX_CONFIG_BYTES, WEIGHTS, read_json, shown
from tilewise.errors import CheckpointError
from tilewise.folders import existing_folder, find_file, is_plain_name, reading

MANIFEST = "sha256.json"


def digests(folder: Path, names: Iterable[str]) -> str:
    """The text of a manifest, an object {file name: SHA-256 in hex}."""
    return json.dumps({name: digest(folder / name) for name in names}, indent=2, sort_keys=True)


def digest(path: Path) -> str:
    with reading(path), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify_folder(folder: Path) -> None:
    """Raises CheckpointError unless the folder's files are those that its manifest was made of."""
    root = existing_folder(folder)
    path = find_file(root, MANIFEST)
    if path is None:
        raise CheckpointError(
            f"{root} has no {MANIFEST}, which saving with tilewise writes: there is nothing to "
            "verify its files by"
        )
    recorded = read_json(path, MAX_CONFIG_BYTES)
    wrong = [
        shown(name) for name in {CONFIG, WEIGHTS, *recorded} if not matches(root, name, recorded)
    ]
    if wrong:
        raise CheckpointError(
            f"{root}: not as they were saved, by {MANIFEST}: {', '.join(sorted(wrong))}. "
            "Fetch or save the folder again"
        )


def matches(root: Path, name: str, recorded: dict[str, object]) -> bool:
    found = find_file(root, name) if is_plain_name(name) else None
    return found is not None and recorded.get(name) == digest(found)
