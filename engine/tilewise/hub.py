"""Checkpoints of the Hugging Face hub: which files of a repository are fetched, and when.

First come the small files that say what the model is; from then on everything is of their commit.
Then come the weights that open_weights would take, no others, or of these the headers alone.
What lies in the cache already is used, and when the hub cannot be reached that is all there is.
"""

import glob
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .checkpoints import TensorInfo
from .checkpoints.manifest import MANIFEST
from .checkpoints.reading import (
    CONFIG,
    CONSOLIDATED,
    GENERATION,
    INDEX,
    PARAMS,
    WEIGHTS,
    check_same_names,
    damaged,
    header_length,
    listed_shards,
    no_weights_message,
    parse_header,
    shown,
)
from .errors import CheckpointError

# All that is read beside weights; a test compares it with the names that tilewise.text has.
SETTINGS = (
    CONFIG, PARAMS, GENERATION, MANIFEST, INDEX,
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "vocab.json", "merges.txt", "vocab.txt", "source.spm", "target.spm",
    "spiece.model", "tokenizer.model", "sentencepiece.bpe.model",
)  # fmt: skip
AT_ONCE = 8  # headers that are fetched at the same time
CHUNK = 2**16  # bytes


def fetch_settings(source: str) -> Path:
    """The folder in the cache, named by its commit, of a repository's newest files but weights."""
    with _reporting(f"{source} is no folder here, and the hub gave none"):
        folder = _fetch(source, None, SETTINGS)
    if not folder.is_dir():  # none of the files is there, as in repositories of GGUF files
        raise CheckpointError(f"{source} has no {CONFIG}: is it a checkpoint?")
    return folder


def fetch_weights(source: str, folder: Path) -> None:
    """Adds to fetch_settings' folder the files that open_weights will read."""
    names = _weight_files(source, folder)
    with _reporting(f"{source}: the hub did not give its weights"):
        _fetch(source, folder.name, [*SETTINGS, *names])
    if names.keys() == {CONSOLIDATED} and not os.path.lexists(folder / CONSOLIDATED):
        raise _no_weights(source, folder.name)


def fetch_headers(source: str, folder: Path) -> dict[str, TensorInfo] | None:
    """What the headers of the weights say, checked as open_weights does but for the library's own
    opinion, no data fetched; None when fetch_settings' folder has the weights already.
    """
    names = _weight_files(source, folder)
    if _all_there(folder, names):
        return None
    with ThreadPoolExecutor(AT_ONCE) as pool:
        found = pool.map(lambda item: _header(source, folder.name, *item), names.items())
        return {tensor: info for header in found for tensor, info in header.items()}


def _fetch(source: str, revision: str | None, names: Iterable[str]) -> Path:
    """huggingface_hub's snapshot of these files of the repository, as far as it has them."""
    from huggingface_hub import snapshot_download

    exact = [glob.escape(name) for name in names]  # an index may put a tensor in "*.safetensors"
    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=exact))
    except (AssertionError, KeyError, RecursionError, TypeError) as error:  # of JSON of any kind
        raise CheckpointError(f"{source}: the answer is not a hub's, {error!r}") from error


def _weight_files(source: str, folder: Path) -> dict[str, set[str] | None]:
    """The files that open_weights takes, and the tensors that an index promises in each."""
    if _all_there(folder, [WEIGHTS]):
        return {WEIGHTS: None}
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError

    with _reporting(f"{source}: the hub did not say which weights it has"):
        try:
            if HfApi().file_exists(source, WEIGHTS, revision=folder.name):
                return {WEIGHTS: None}
        except (HTTPError, OSError):  # out of reach, which is no matter when they are here
            if not _all_there(folder, _other_files(folder)):
                raise
    return _other_files(folder)


def _other_files(folder: Path) -> dict[str, set[str] | None]:
    """The same where there is no model.safetensors: beside one an index is not read."""
    return (
        {**listed_shards(folder / INDEX)} if _all_there(folder, [INDEX]) else {CONSOLIDATED: None}
    )


def _all_there(folder: Path, names: Iterable[str]) -> bool:
    return all(os.path.lexists(folder / name) for name in names)


def _no_weights(source: str, commit: str) -> CheckpointError:
    from huggingface_hub import HfApi

    with _reporting(f"{source} has no weights in the cache, and the hub did not list its files"):
        names = HfApi().list_repo_files(source, revision=commit)
    target = "./" + source.rpartition("/")[2]
    return CheckpointError(no_weights_message(source, [n for n in names if "/" not in n], target))


def _header(
    source: str, commit: str, name: str, promised: set[str] | None
) -> dict[str, TensorInfo]:
    """The checked header of one file on the hub, by two requests that ask for not a byte more."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError

    path = Path(source, name)  # in messages
    with _reporting(f"{path}: the hub did not give its header"):
        url = hf_hub_url(source, name, revision=commit)
        try:
            size, start = _range(path, url, 0, 8)
        except EntryNotFoundError:
            if promised is None:
                raise _no_weights(source, commit) from None
            raise CheckpointError(f"{path} is missing, and {INDEX} lists it") from None
        length = header_length(path, size, start)
        header = parse_header(path, size, _range(path, url, 8, 8 + length)[1])
    if promised is not None:
        check_same_names(path, promised, header.keys())
    return header


def _range(path: Path, url: str, begin: int, end: int) -> tuple[int, bytes]:
    """The size of a file on the hub, and its bytes from begin to end."""
    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    wanted = {"Range": f"bytes={begin}-{end - 1}", "Accept-Encoding": "identity"}
    with get_session().stream(
        "GET",
        url,
        headers=build_hf_headers() | wanted,
        timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
        follow_redirects=True,
    ) as response:
        hf_raise_for_status(response)
        if response.status_code == 206:
            size = _size(path, response.headers.get("Content-Range", "").rpartition("/")[2])
            return size, _first(response, end - begin)
        # A server without ranges sends all of it.
        return _size(path, response.headers.get("Content-Length")), _first(response, end)[begin:]


def _size(path: Path, said: str | None) -> int:
    if said is None or not (said.isascii() and said.isdecimal() and len(said) < 20):
        raise damaged(path, f"the hub gives its size as {shown(str(said))}")
    return int(said)


def _first(response: Any, count: int) -> bytes:
    """The first bytes of an answer, which then is hung up on."""
    found = bytearray()
    for chunk in response.iter_bytes(CHUNK):
        found += chunk
        if len(found) >= count:
            break
    return bytes(found[:count])


@contextmanager
def _reporting(what: str) -> Iterator[None]:
    """Turns what fails on the way to the hub into a CheckpointError of one line."""
    from huggingface_hub.errors import HTTPError

    try:
        yield
    except CheckpointError:
        raise
    except (HTTPError, OSError, ValueError) as error:  # ValueError: no id, or no JSON in an answer
        lines = [line for line in str(error).splitlines() if line.strip()] or [repr(error)]
        raise CheckpointError(f"{what}: {' '.join(lines[:2])}") from error
