"""The tokenizer, on the `tokenizers` library, which does the work in Rust.

It comes from files (files.py), or is trained here on texts. Written is tokenizer.json, with the
tokenizer_config.json and the chat_template.jinja that it was read with.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import tokenizers
import torch
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor

from tilewise.errors import TokenizerError

from .vocabularies import content, pad_with

TOKENIZER, CONFIG, CHAT = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
SIDES = ("left", "right")
LANGUAGE = re.compile("[a-z]{2}_[A-Z]{2}")  # mBART's codes
TRAINED_SPECIALS = ("<pad>", "<s>", "</s>", "<unk>")  # ids 0 to 3


class Tokenizer:
    """Encodes and decodes batches of text. Made by load_tokenizer or train_tokenizer.

    padding_side, truncation_side: "left" or "right", as its tokenizer_config.json says.
    chat_template: its chat_template.jinja, kept for whoever saves it, and never rendered.
    """

    chat_template: bytes | None = None

    def __init__(
        self, backend: tokenizers.Tokenizer, origin: str, settings: Mapping[str, Any] | None = None
    ) -> None:
        padding = backend.padding or {}
        backend.no_truncation()  # a tokenizer.json may ask for either; that is for callers
        backend.no_padding()
        self._backend = backend
        self._keep(origin, settings, padding.get("pad_token"), padding.get("direction"))

    def _keep(
        self,
        origin: str,
        settings: Mapping[str, Any] | None,
        pad_token: str | None,
        padding_side: str | None = None,
    ) -> None:
        """Keep the settings, and with them what they leave out of padding."""
        self._origin = origin
        self._settings = dict(settings or {})
        for name, value in (("pad_token", pad_token), ("padding_side", padding_side)):
            if value is not None and self._settings.get(name) is None:
                self._settings[name] = value
        self.padding_side = side("padding_side", self._settings.get("padding_side") or "right")
        self.truncation_side = side(
            "truncation_side", self._settings.get("truncation_side") or "right"
        )

    @cached_property
    def vocab_size(self) -> int:
        """The number of rows an embedding needs: the highest token id + 1."""
        return 1 + max(self._backend.get_vocab().values(), default=-1)

    def token_to_id(self, token: str) -> int | None:
        """The id of a token such as "</s>", None when the vocabulary lacks it."""
        return self._backend.token_to_id(token)

    def special_token_id(self, role: str) -> int | None:
        """The id of the token with a role such as "pad_token" or "mask_token" in
        tokenizer_config.json; None when it names none, or one that the vocabulary lacks. Raises
        TokenizerError for one that is no text.
        """
        token = self._settings.get(role)
        with reporting(self._origin):
            return None if token is None else self.token_to_id(content(token))

    def pad(
        self, rows: Sequence[Sequence[int]], *, pad_token_id: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Lists of ids of any lengths as (input_ids, attention_mask), int64 [R, longest] each.

        Shorter rows get padding at padding_side, where the mask is 0. pad_token_id: what stands
        there; None: the tokenizer's padding token. Raises TokenizerError when it has none.
        """
        check_ids(rows)
        pad = self.special_token_id("pad_token") if pad_token_id is None else pad_token_id
        if pad is None:
            raise TokenizerError(f"{self._origin} has no padding token: pass pad_token_id")
        if type(pad) is not int or not 0 <= pad < 2**32:
            raise TokenizerError(f"pad_token_id is {pad!r}; token ids are integers from 0")
        longest = max(map(len, rows), default=0)
        ids = torch.full((len(rows), longest), pad)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            at = slice(longest - len(row), None) if self.padding_side == "left" else slice(len(row))
            ids[i, at] = torch.tensor(row, dtype=torch.int64)
            mask[i, at] = 1
        return ids, mask

    def encode(
        self,
        texts: Sequence[str],
        *,
        max_length: int | None = None,
        truncation_side: str | None = None,
    ) -> list[list[int]]:
        """One list of ids per text, with the special tokens that the tokenizer adds.

        Special tokens written out in a text become those tokens, as in Hugging Face. max_length:
        longer texts lose tokens at truncation_side ("left" or "right"; None: the tokenizer's own),
        never the special tokens that are added. Raises TokenizerError for anything but a list of
        strings, for text that is not valid Unicode, and for a max_length without room for text.
        """
        check_texts(texts)
        if max_length is None:
            with reporting(self._origin):
                return [encoding.ids for encoding in self._backend.encode_batch(list(texts))]
        end = side("truncation_side", truncation_side or self.truncation_side)
        room = room_for_text(max_length, self._backend.num_special_tokens_to_add(False))
        with reporting(self._origin):  # the library's own setting would outlast this call
            bare = self._backend.encode_batch(list(texts), add_special_tokens=False)
            for encoding in bare:
                encoding.truncate(room, direction=end)
            return [self._backend.post_process(encoding).ids for encoding in bare]

    def encode_targets(
        self,
        texts: Sequence[str],
        language: str | None = None,
        *,
        add_special_tokens: bool = True,
    ) -> list[list[int]]:
        """Like encode, but as a seq2seq model's targets, where those differ from its sources.

        Marian has a sentencepiece model of its own for them. mBART adds their language, "ro_RO"
        for one; None: tgt_lang of tokenizer_config.json, else the language of its sources. Raises
        TokenizerError, also for a language that the tokenizer lacks.
        """
        check_texts(texts)
        with reporting(self._origin):
            encodings = self._backend.encode_batch(
                list(texts), add_special_tokens=add_special_tokens
            )
        target = self._target_language(language)
        if target is None:
            return [encoding.ids for encoding in encodings]
        return [
            [
                target if added and LANGUAGE.fullmatch(token) else index
                for index, token, added in zip(e.ids, e.tokens, e.special_tokens_mask, strict=True)
            ]
            for e in encodings
        ]

    def language(self, token: int) -> str | None:
        """The language whose code this token id is, such as "ro_RO"; None when it is no code."""
        (text,) = self.decode([[token]], skip_special_tokens=False)
        return text if LANGUAGE.fullmatch(text) and self.token_to_id(text) == token else None

    def _target_language(self, language: str | None) -> int | None:
        """The id of the targets' language; None: they have none, or that of the sources."""
        code = language or self._settings.get("tgt_lang")
        if not code:
            return None
        (alone,) = self.encode([""])
        if not any(self.language(token) for token in alone):
            if language is None:
                return None
            raise TokenizerError(f"language is {language!r}; this tokenizer marks no languages")
        token = self.token_to_id(code) if isinstance(code, str) else None
        if token is None or self.language(token) is None:
            raise TokenizerError(
                f"the target language is {code!r}, which the tokenizer lacks; pass a code such as "
                "en_XX"
            )
        return token

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

    def encode_pairs(
        self, pairs: Sequence[tuple[str, str]], *, max_length: int | None = None
    ) -> list[tuple[list[int], list[int]]]:
        """Two texts as one sequence, by the tokenizer's template: (ids, token_type_ids).

        max_length: longer pairs lose tokens at truncation_side, the longer text first, never the
        special tokens that are added. Raises TokenizerError for anything but a list of pairs of
        strings, and for a max_length without room for text.
        """
        check_pairs(pairs)
        with reporting(self._origin):
            encodings = self._backend.encode_batch([tuple(pair) for pair in pairs])
            added = self._backend.num_special_tokens_to_add(True)
        if max_length is None:
            return [(e.ids, e.type_ids) for e in encodings]
        room = room_for_text(max_length, added)
        return [self._shortened(encoding, room) for encoding in encodings]

    def _shortened(self, pair: tokenizers.Encoding, room: int) -> tuple[list[int], list[int]]:
        """Ids and types of a pair, of whose texts `room` tokens are left."""
        of = pair.sequence_ids  # 0 and 1: the texts; None: a token that the template adds
        first, second = ([i for i, text in enumerate(of) if text == which] for which in (0, 1))
        lengths = pair_lengths(len(first), len(second), room)
        kept = [i for i, text in enumerate(of) if text is None]
        kept += cut(first, lengths[0], self.truncation_side)
        kept += cut(second, lengths[1], self.truncation_side)
        return [pair.ids[i] for i in sorted(kept)], [pair.type_ids[i] for i in sorted(kept)]

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
        return {TOKENIZER: self._backend.to_str(pretty=True).encode()} | self._side_files()

    def _side_files(self) -> dict[str, bytes]:
        config = {CONFIG: json.dumps(self._settings, indent=2).encode()} if self._settings else {}
        return config | ({} if self.chat_template is None else {CHAT: self.chat_template})


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
    pad_with(backend, "<pad>")
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


def side(name: str, value: object) -> str:
    if value not in SIDES:
        raise TokenizerError(f"{name} is {value!r}; takes left or right")
    return str(value)


def cut(row: list[int], length: int, end: str) -> list[int]:
    """What is left of a row that loses its tokens past `length` at an end, "left" or "right"."""
    return row[:length] if end == "right" else row[max(len(row) - length, 0) :]


def pair_lengths(first: int, second: int, room: int) -> tuple[int, int]:
    """How many of `room` tokens each of two texts keeps, the longer being cut first.

    Of equally long ones the second keeps the odd token, as in the `tokenizers` library.
    """
    if first + second <= room:
        return first, second
    short = min(first, second, room // 2)
    return (room - short, short) if first > second else (short, room - short)


def room_for_text(max_length: int, added: int) -> int:
    if type(max_length) is not int or max_length <= added:
        raise TokenizerError(
            f"max_length is {max_length!r}; the special tokens alone are {added}, so pass a whole "
            f"number from {added + 1}"
        )
    return max_length - added


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


def check_pairs(pairs: Sequence[tuple[str, str]]) -> None:
    if isinstance(pairs, (str, bytes)) or not isinstance(pairs, Sequence):
        raise TokenizerError(f"pairs must be a list of pairs, not {type(pairs).__name__}")
    for row, pair in enumerate(pairs):
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise TokenizerError(f"pairs[{row}] is {pair!r}; pass two texts, (first, second)")
    for texts in zip(*pairs, strict=True):
        check_texts(texts)


def check_ids(ids: Sequence[Sequence[int]]) -> None:
    if isinstance(ids, (str, bytes)) or not isinstance(ids, Sequence):
        raise TokenizerError(
            f"ids must be a list of lists, not {type(ids).__name__}; of a tensor: tensor.tolist()"
        )
    for row, tokens in enumerate(ids):
        if isinstance(tokens, (str, bytes)) or not isinstance(tokens, Sequence):
            raise TokenizerError(
                f"ids[{row}] must be a list of integers, not {type(tokens).__name__}. "
                "Give a list of lists: tensor.tolist()"
            )
        for position, token in enumerate(tokens):
            if type(token) is not int or not 0 <= token < 2**32:
                raise TokenizerError(
                    f"ids[{row}][{position}] is {token!r}; token ids are integers from 0"
                )
