"""Tokenizer files -> tokenizer, on the `tokenizers` library, which does the work in Rust.

Two kinds of files are read: tokenizer.json, which describes a tokenizer of any kind in full, and
the older pair vocab.json + merges.txt of GPT-2, a byte-level BPE (Radford et al. 2019; BPE:
Sennrich et al. 2016). A character tokenizer can be made from texts. Written is tokenizer.json.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from tilewise.errors import TokenizerError

TOKENIZER, VOCAB, MERGES = "tokenizer.json", "vocab.json", "merges.txt"
MAX_FILE_BYTES = 200_000_000
END_OF_TEXT = "<|endoftext|>"  # GPT-2's only special token
TRAINED_SPECIALS = ("<pad>", "<s>", "</s>", "<unk>")  # ids 0 to 3


class Tokenizer:
    """Encodes and decodes batches of text. Made by load_tokenizer or train_tokenizer."""

    def __init__(self, backend: tokenizers.Tokenizer, origin: str) -> None:
        backend.no_truncation()  # a tokenizer.json may ask for either; cutting text is for callers
        backend.no_padding()
        self._backend = backend
        self._origin = origin

    @cached_property
    def vocab_size(self) -> int:
        """The number of rows an embedding needs: the highest token id + 1."""
        return 1 + max(self._backend.get_vocab().values(), default=-1)

    def token_to_id(self, token: str) -> int | None:
        """The id of a token such as "</s>", None when the vocabulary lacks it."""
        return self._backend.token_to_id(token)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """One list of ids per text, with the special tokens that the tokenizer adds.

        Special tokens written out in a text become those tokens, as in Hugging Face. Raises
        TokenizerError for anything but a list of strings, and for text that is not valid Unicode.
        """
        check_texts(texts)
        with reporting(self._origin):
            return [encoding.ids for encoding in self._backend.encode_batch(list(texts))]

    def encode_after(
        self, contexts: Sequence[str], texts: Sequence[str]
    ) -> list[tuple[list[int], int]]:
        """Each context with its text behind it, as ids, and where the text begins in them.

        The two are encoded as one; a token that reaches over the border belongs to the text.
        """
        check_texts(contexts)
        check_texts(texts)
        joined = [context + text for context, text in zip(contexts, texts, strict=True)]
        with reporting(self._origin):
            encodings = self._backend.encode_batch(joined)
        found = []
        for encoding, context in zip(encodings, contexts, strict=True):
            ends = [end for _, end in encoding.offsets]
            first = next((i for i, end in enumerate(ends) if end > len(context)), len(ends))
            found.append((encoding.ids, first))
        return found

    def encode_pairs(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
        """Two texts as one sequence, by the tokenizer's template: (ids, token_type_ids)."""
        for side in zip(*pairs, strict=True):
            check_texts(side)
        with reporting(self._origin):
            return [(e.ids, e.type_ids) for e in self._backend.encode_batch(list(pairs))]

    def decode(self, ids: Sequence[Sequence[int]], skip_special_tokens: bool = True) -> list[str]:
        """One text per list of ids. Ids that no token has, such as those of padded embedding rows,
        decode to nothing. Raises TokenizerError for anything but lists of integers >= 0.
        """
        check_ids(ids)
        with reporting(self._origin):
            return self._backend.decode_batch(
                [list(row) for row in ids], skip_special_tokens=skip_special_tokens
            )

    def files(self) -> dict[str, bytes]:
        """{name: content} of what load_tokenizer needs to make this tokenizer again."""
        return {TOKENIZER: self._backend.to_str(pretty=True).encode()}


def load_tokenizer(folder: str | os.PathLike[str]) -> Tokenizer | None:
    """The tokenizer of a checkpoint folder, None when the folder has no tokenizer files.

    Raises TokenizerError naming the file that is damaged, or missing from the GPT-2 pair.
    """
    root = Path(folder)
    if os.path.lexists(root / TOKENIZER):
        path = readable(root / TOKENIZER)
        with reporting(str(path)):
            return checked(tokenizers.Tokenizer.from_buffer(path.read_bytes()), str(path))
    present = [name for name in (VOCAB, MERGES) if os.path.lexists(root / name)]
    if not present:
        return None
    if len(present) == 1:
        raise TokenizerError(
            f"{root} has {present[0]} alone; a tokenizer takes {VOCAB} and {MERGES}, or "
            f"{TOKENIZER}. Fetch the missing file"
        )
    vocab, merges = readable(root / VOCAB), readable(root / MERGES)
    origin = f"{vocab} with {merges}"
    with reporting(origin):
        return checked(byte_level_bpe(vocab, merges), origin)


def train_tokenizer(texts: Iterable[str], vocab_size: int | None = None) -> Tokenizer:
    """A tokenizer for the words of `texts`: single characters, or byte pairs up to `vocab_size`.

    Without vocab_size every character of the texts is a token, in code point order. With it the
    texts are lower-cased, each digit stands alone, a space belongs to the word behind it, and
    frequent pairs are merged (Sennrich et al. 2016). Ids 0 to 3 are <pad>, <s>, </s>, <unk>; each
    encoded text ends with </s>; text of known characters decodes to itself (lower-cased with
    vocab_size), spaces included; other characters become <unk>.
    """
    texts = list(texts)
    check_texts(texts)
    backend = characters(texts) if vocab_size is None else byte_pairs(texts, vocab_size)
    backend.add_special_tokens(list(TRAINED_SPECIALS))
    backend.decoder = decoders.Fuse()  # without a decoder, tokens would be joined by spaces
    backend.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", TRAINED_SPECIALS.index("</s>"))]
    )
    return Tokenizer(backend, "the trained tokenizer")


def characters(texts: list[str]) -> tokenizers.Tokenizer:
    alphabet = sorted(set().union(*texts))
    vocab = {token: i for i, token in enumerate([*TRAINED_SPECIALS, *alphabet])}
    backend = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return backend


def byte_pairs(texts: list[str], vocab_size: int) -> tokenizers.Tokenizer:
    least = len(TRAINED_SPECIALS) + len(set("".join(texts).lower()))
    if vocab_size < least:
        raise TokenizerError(
            f"vocab_size is {vocab_size}; the characters of the texts alone need {least}"
        )
    backend = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.Split(" ", "merged_with_next"),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(TRAINED_SPECIALS), show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    return backend


def byte_level_bpe(vocab: Path, merges: Path) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE.from_file(str(vocab), str(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if backend.token_to_id(END_OF_TEXT) is not None:
        backend.add_special_tokens([END_OF_TEXT])
    return backend


def checked(backend: tokenizers.Tokenizer, origin: str) -> Tokenizer:
    """Runs the tokenizer once: some damage, such as in its template, shows only then."""
    tokenizer = Tokenizer(backend, origin)
    tokenizer.decode(tokenizer.encode(["a"]))
    return tokenizer


def readable(path: Path) -> Path:
    if not path.is_file():  # a folder, a device, a pipe or a broken link
        raise TokenizerError(f"{path} is not a regular file. Put the tokenizer's file there")
    if (size := path.stat().st_size) > MAX_FILE_BYTES:
        raise TokenizerError(f"{path} has {size:,} bytes; at most {MAX_FILE_BYTES:,} are read")
    return path


@contextmanager
def reporting(origin: str) -> Iterator[None]:
    """Turns the library's errors into TokenizerError.

    It raises plain Exception for a damaged file, and lets Rust panics through as a BaseException
    of a type that cannot be imported, so the two that must pass are named instead.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit, TokenizerError):
        raise
    except BaseException as error:
        raise TokenizerError(f"{origin} does not work: {error}. Fetch the file again") from error


def check_texts(texts: Sequence[str]) -> None:
    if isinstance(texts, (str, bytes)) or not isinstance(texts, Sequence):
        raise TokenizerError(f"texts must be a list of strings, not {type(texts).__name__}")
    for row, text in enumerate(texts):
        if not isinstance(text, str):
            raise TokenizerError(f"texts[{row}] must be a string, not {type(text).__name__}")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise TokenizerError(
                f"texts[{row}] has the lone surrogate U+{ord(text[error.start]):04X} at character "
                f"{error.start}, which no encoding has. Decode the text's bytes as UTF-8 first"
            ) from error


def check_ids(ids: Sequence[Sequence[int]]) -> None:
    for row, tokens in enumerate(ids):
        if not isinstance(tokens, Sequence) or isinstance(tokens, str):
            raise TokenizerError(
                f"ids[{row}] must be a list of integers, not {type(tokens).__name__}. "
                "Give a list of lists: tensor.tolist()"
            )
        for position, token in enumerate(tokens):
            if type(token) is not int or not 0 <= token < 2**32:
                raise TokenizerError(
                    f"ids[{row}][{position}] is {token!r}; token ids are integers from 0"
                )
