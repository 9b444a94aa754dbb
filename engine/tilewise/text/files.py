"""Tokenizer files of a checkpoint folder -> tokenizer.

tokenizer.json describes a tokenizer of any kind in full and goes before all others. Older folders
have vocab.txt (WordPiece), vocab.json with merges.txt (BPE), or models of the sentencepiece
library, and say in tokenizer_config.json, special_tokens_map.json and added_tokens.json what those
files leave out.
"""

import json
import os
from pathlib import Path
from typing import Any

import tokenizers

from tilewise.errors import CheckpointError, TokenizerError
from tilewise.folders import existing_folder, find_file

from .pieces import MARIAN, MODELS, load_pieces
from .tokenizer import CHAT, CONFIG, TOKENIZER, Tokenizer, reporting
from .vocabularies import PADDING, byte_pair, content, pad_with, word_piece

VOCAB, MERGES, WORDS = "vocab.json", "merges.txt", "vocab.txt"
MAX_FILE_BYTES = 200_000_000
MAX_CHAT_BYTES = 1_000_000  # it stays in memory; those of large models have some 10,000


def load_tokenizer(folder: str | os.PathLike[str]) -> Tokenizer | None:
    """The tokenizer of a checkpoint folder, None when the folder has no tokenizer files.

    Raises TokenizerError naming the file that is damaged or missing, and when a sentencepiece model
    is there without the sentencepiece package.
    """
    root = Path(folder)
    there = {
        name
        for name in (TOKENIZER, VOCAB, MERGES, WORDS, *MARIAN, *MODELS)
        if os.path.lexists(root / name)  # a broken link is an error, not an absent file
    }
    if not there:
        return None
    tokenizer = from_files(root, there)
    if os.path.lexists(root / CHAT):
        tokenizer.chat_template = readable(root / CHAT, MAX_CHAT_BYTES).read_bytes()
    return tokenizer


def from_files(root: Path, there: set[str]) -> Tokenizer:
    config = read_settings(root / CONFIG)
    if "added_tokens_decoder" not in config:
        config |= special_tokens(root)
    if TOKENIZER in there:
        path = readable(root / TOKENIZER)
        with reporting(str(path)):
            backend = tokenizers.Tokenizer.from_buffer(path.read_bytes())
            unnamed = backend.padding is None and "pad_token" not in config
            if unnamed and (kind := kind_of(root, config)) in PADDING:
                pad_with(backend, PADDING[kind])
            return checked(backend, str(path), config)
    if there & {*MARIAN, *MODELS}:
        names = MARIAN if there & {*MARIAN} else [name for name in MODELS if name in there][:1]
        wanted = [*names, VOCAB] if names == MARIAN else names
        found = {name: readable(root / name).read_bytes() for name in wanted}
        return load_pieces(found, folder_settings(root, config), kind_of(root, config), str(root))
    return from_vocabulary(root, there, config)


def from_vocabulary(root: Path, there: set[str], config: dict[str, Any]) -> Tokenizer:
    settings, kind = folder_settings(root, config), kind_of(root, config)
    if {VOCAB, MERGES} <= there:
        vocab, merges = readable(root / VOCAB), readable(root / MERGES)
        origin = f"{vocab} with {merges}"
        with reporting(origin):
            return checked(byte_pair(vocab, merges, settings, kind), origin, config)
    if WORDS in there:
        words = readable(root / WORDS)
        with reporting(str(words)):
            return checked(word_piece(words, settings), str(words), config)
    raise TokenizerError(
        f"{root} has {min(there)} alone; a tokenizer takes {VOCAB} and {MERGES}, or "
        f"{TOKENIZER}. Fetch the missing file"
    )


def folder_settings(root: Path, config: dict[str, Any]) -> dict[str, Any]:
    """tokenizer_config.json, completed by the files that it took the place of."""
    if "added_tokens_decoder" in config:
        return config
    added = read_settings(root / "added_tokens.json")
    special = special_tokens(root).values()
    if odd := [token for token, index in added.items() if type(index) is not int]:
        raise TokenizerError(
            f"{root / 'added_tokens.json'} gives {odd[0]!r} the id {added[odd[0]]!r}, which is no "
            "integer. Fetch the file again"
        )
    known = {content(value) for value in special if isinstance(value, (str, dict))}
    tokens = {
        index: {"content": token, "special": token in known, "normalized": token not in known}
        for token, index in added.items()
    }
    return config | {"added_tokens_decoder": tokens}


def special_tokens(root: Path) -> dict[str, Any]:
    """special_tokens_map.json as tokenizer_config.json would have it."""
    found = read_settings(root / "special_tokens_map.json")
    mark = {"__type": "AddedToken"}
    return {
        name: value | mark if isinstance(value, dict) else value for name, value in found.items()
    }


def kind_of(root: Path, config: dict[str, Any]) -> str:
    """The class that wrote the files, without "Tokenizer"; else config.json's model_type.

    Either file may name the class: mBART-50's is in config.json.
    """
    model = read_settings(root / "config.json")
    named = str(config.get("tokenizer_class") or model.get("tokenizer_class") or "")
    named = named.removesuffix("Fast").removesuffix("Tokenizer").removesuffix("TokenizersBackend")
    if named and named != "PreTrained":
        return named.lower()
    return str(model.get("model_type", "")).lower()


def read_settings(path: Path) -> dict[str, Any]:
    if not os.path.lexists(path):
        return {}
    with reporting(str(path)):
        found = json.loads(readable(path).read_bytes())
        if not isinstance(found, dict):
            raise TokenizerError(f"{path} holds no JSON object. Fetch the file again")
        return found


def checked(backend: tokenizers.Tokenizer, origin: str, config: dict[str, Any]) -> Tokenizer:
    """Runs the tokenizer once: some damage, such as in its template, shows only then."""
    tokenizer = Tokenizer(backend, origin, config)
    tokenizer.decode(tokenizer.encode(["a"]))
    return tokenizer


def readable(path: Path, most: int = MAX_FILE_BYTES) -> Path:
    """The path, once it is found safe to read: a link may lead where those of weights may."""
    try:
        found = find_file(existing_folder(path.parent), path.name)
    except CheckpointError as error:  # a folder, a device, a pipe, a broken link or one that leaves
        raise TokenizerError(str(error)) from error
    if found is None:
        raise TokenizerError(f"{path} is missing. Put the tokenizer's file there")
    if (size := found.stat().st_size) > most:
        raise TokenizerError(f"{path} has {size:,} bytes; at most {most:,} are read")
    return path
