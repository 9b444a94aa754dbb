"""Models of the sentencepiece library -> tokenizer (Kudo and Richardson 2018).

The library splits text into pieces; a family's own numbering makes ids of them:
  T5     a piece's place in the model; <extra_id_99> to <extra_id_0> behind them; A </s>
  LLaMA  a piece's place in the model; <s> A
  mBART  fairseq's four special tokens, the pieces, language codes, <mask>; A </s> en_XX
  mBART-50  the same with more codes; en_XX A </s>
  XLM-R  fairseq's four special tokens, the pieces, <mask>; <s> A </s>
  CamemBERT  five of fairseq's of which two serve, the pieces without <unk>, <mask>; <s> A </s>
  Marian the number that vocab.json gives a piece; two models, for source and target; A </s>
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tilewise.errors import TokenizerError

from .tokenizer import (
    CONFIG,
    Tokenizer,
    check_ids,
    check_pairs,
    check_texts,
    cut,
    pair_lengths,
    reporting,
    room_for_text,
    side,
)

MARIAN = ["source.spm", "target.spm"]
MODELS = ["spiece.model", "tokenizer.model", "sentencepiece.bpe.model"]
VOCAB = "vocab.json"
SPACE = "\u2581"  # what the library writes for a space
# Merged into a model by being written behind it: normalizer_spec { add_dummy_prefix: false }.
NO_PREFIX = b"\x1a\x02\x18\x00"
LANGUAGES = (
    "ar_AR cs_CZ de_DE en_XX es_XX et_EE fi_FI fr_XX gu_IN hi_IN it_IT ja_XX kk_KZ ko_KR lt_LT "
    "lv_LV my_MM ne_NP nl_XX ro_RO ru_RU si_LK tr_TR vi_VN zh_CN"
).split()
LANGUAGES_50 = (
    LANGUAGES
    + (
        "af_ZA az_AZ bn_IN fa_IR he_IL hr_HR id_ID ka_GE km_KH mk_MK ml_IN mn_MN mr_IN pl_PL ps_AF "
        "pt_XX sv_SE sw_KE ta_IN te_IN th_TH tl_XX uk_UA ur_PK xh_ZA gl_ES sl_SI"
    ).split()
)


@dataclass
class Numbering:
    """ids: {token: id} of pieces and special tokens; specials: those never split, and not text.

    prefix, suffix: what stands around one text; between: what stands between two, which the suffix
    then closes. prefixed_once: only a text's first stretch gets the library's leading space.
    """

    ids: dict[str, int]
    specials: list[str]
    prefix: list[str]
    suffix: list[str]
    between: list[str]
    unknown: str = "<unk>"
    prefixed_once: bool = False


class PieceTokenizer(Tokenizer):
    """A tokenizer whose pieces come from the sentencepiece library."""

    def __init__(
        self,
        models: Sequence[bytes],
        numbering: Numbering,
        files: Mapping[str, bytes],
        settings: Mapping[str, Any],
        origin: str,
    ) -> None:
        self._keep(origin, settings, "<pad>" if "<pad>" in numbering.specials else None)
        self._files = dict(files)
        self._numbering = numbering
        self._first, self._writer = processor(models[0]), processor(models[-1])
        later = models[0] + NO_PREFIX if numbering.prefixed_once else models[0]
        self._later = processor(later)
        both = len(models) > 1
        self._targets = (self._writer,) * 2 if both else (self._first, self._later)
        self._tokens = {index: token for token, index in numbering.ids.items()}
        longest_first = sorted(numbering.specials, key=len, reverse=True)
        self._special = re.compile(f"({'|'.join(map(re.escape, longest_first))})")

    @cached_property
    def vocab_size(self) -> int:
        return 1 + max(self._tokens, default=-1)

    def token_to_id(self, token: str) -> int | None:
        return self._numbering.ids.get(token)

    def encode(
        self,
        texts: Sequence[str],
        *,
        max_length: int | None = None,
        truncation_side: str | None = None,
    ) -> list[list[int]]:
        check_texts(texts)
        prefix, suffix = self._ids(self._numbering.prefix), self._ids(self._numbering.suffix)
        end = side("truncation_side", truncation_side or self.truncation_side)
        rows = [self._pieces(text) for text in texts]
        if max_length is not None:
            room = room_for_text(max_length, len(prefix) + len(suffix))
            rows = [cut(row, room, end) for row in rows]
        return [[*prefix, *row, *suffix] for row in rows]

    def encode_targets(
        self,
        texts: Sequence[str],
        language: str | None = None,
        *,
        add_special_tokens: bool = True,
    ) -> list[list[int]]:
        check_texts(texts)
        rows = [self._pieces(text, *self._targets) for text in texts]
        if not add_special_tokens:
            return rows
        prefix, suffix = self._ids(self._numbering.prefix), self._ids(self._numbering.suffix)
        if (target := self._target_language(language)) is not None:
            prefix = [target if self.language(index) else index for index in prefix]
            suffix = [target if self.language(index) else index for index in suffix]
        return [[*prefix, *row, *suffix] for row in rows]

    def encode_after(
        self, contexts: Sequence[str], texts: Sequence[str]
    ) -> list[tuple[list[int], int]]:
        check_texts(contexts)
        check_texts(texts)
        prefix, suffix = self._ids(self._numbering.prefix), self._ids(self._numbering.suffix)
        found = []
        for context, text in zip(contexts, texts, strict=True):
            ids, ends = [], []
            for token, end in self._placed(context + text):
                ids += self._ids([token])
                ends.append(end)
            first = next((i for i, end in enumerate(ends) if end > len(context)), len(ends))
            found.append(([*prefix, *ids, *suffix], len(prefix) + first))
        return found

    def encode_pairs(
        self, pairs: Sequence[tuple[str, str]], *, max_length: int | None = None
    ) -> list[tuple[list[int], list[int]]]:
        check_pairs(pairs)
        prefix, suffix = self._ids(self._numbering.prefix), self._ids(self._numbering.suffix)
        between = self._ids(self._numbering.between)
        found = []
        for first, second in ((self._pieces(a), self._pieces(b)) for a, b in pairs):
            if max_length is not None:
                room = room_for_text(max_length, len(prefix) + len(between) + len(suffix))
                lengths = pair_lengths(len(first), len(second), room)
                first = cut(first, lengths[0], self.truncation_side)
                second = cut(second, lengths[1], self.truncation_side)
            found.append([*prefix, *first, *between, *second, *suffix])
        return [(row, [0] * len(row)) for row in found]

    def decode(self, ids: Sequence[Sequence[int]], skip_special_tokens: bool = True) -> list[str]:
        check_ids(ids)
        with reporting(self._origin):
            return [self._text(row, skip_special_tokens) for row in ids]

    def files(self) -> dict[str, bytes]:
        return self._files | self._side_files()

    def _ids(self, tokens: Sequence[str]) -> list[int]:
        ids, unknown = self._numbering.ids, self._numbering.ids[self._numbering.unknown]
        return [ids.get(token, unknown) for token in tokens]

    def _stretches(self, text: str) -> Iterator[tuple[str, int, bool]]:
        """(stretch, where it begins, whether it is a special token)."""
        begin = 0
        for i, stretch in enumerate(self._special.split(text)):
            if stretch:
                yield stretch, begin, i % 2 == 1
            begin += len(stretch)

    def _pieces(self, text: str, first: Any = None, later: Any = None) -> list[int]:
        """Ids by the model of a text's first stretch and that of later ones; None: sources'."""
        first, later = first or self._first, later or self._later
        found: list[str] = []
        for stretch, begin, special in self._stretches(text):
            model = later if begin else first
            found += [stretch] if special else model.encode(stretch, out_type=str)
        return self._ids(found)

    def _placed(self, text: str) -> Iterator[tuple[str, int]]:
        """Tokens and where in the text they end."""
        for stretch, begin, special in self._stretches(text):
            if special:
                yield stretch, begin + len(stretch)
                continue
            model = self._later if begin else self._first
            found = model.encode(stretch, return_type="offset_mapping")
            for piece, (_, end) in zip(found["pieces"], found["offsets"], strict=True):
                yield piece, begin + end

    def _text(self, row: Sequence[int], skip_special_tokens: bool) -> str:
        tokens = [self._tokens[index] for index in row if index in self._tokens]
        specials, found = set(self._numbering.specials), ""
        if skip_special_tokens:
            return self._joined([token for token in tokens if token not in specials])
        run: list[str] = []
        for token in [*tokens, ""]:
            if token and token not in specials:
                run.append(token)
                continue
            space = " " if found and run and run[0].startswith(SPACE) else ""
            found += space + self._joined(run) + token
            run = []
        return found

    def _joined(self, tokens: list[str]) -> str:
        """Text of pieces; those that only Marian's other model knows keep their sign of a space."""
        return self._writer.decode(tokens).removeprefix(SPACE).replace(SPACE, " ") if tokens else ""


def load_pieces(
    files: Mapping[str, bytes], settings: dict[str, Any], kind: str, origin: str
) -> Tokenizer:
    """The tokenizer of sentencepiece models {name: content}, numbered as the family `kind` does."""
    models = [content for name, content in files.items() if name != VOCAB]
    with reporting(origin):
        if VOCAB in files:
            kind, numbering = "marian", marian(json.loads(files[VOCAB]), settings)
        else:
            (name,) = files
            kind = kind if kind in FAMILIES else DEFAULTS.get(name, kind)
            if kind not in FAMILIES:
                raise TokenizerError(
                    f"{origin} has {name} of {kind or 'an unnamed family'}, whose numbering is not "
                    f"known here; fetch its tokenizer.json, or name one of {', '.join(CLASSES)} "
                    f"as tokenizer_class in {CONFIG}"
                )
            numbering = FAMILIES[kind](pieces_of(models[0]), settings)
        known = {"tokenizer_class": CLASSES[kind]}
        tokenizer = PieceTokenizer(models, numbering, files, settings | known, origin)
        tokenizer.decode(tokenizer.encode(["a"]))
        return tokenizer


def processor(model: bytes) -> Any:
    try:
        import sentencepiece
    except ImportError as error:
        raise TokenizerError(
            "this tokenizer is a sentencepiece model: pip install 'tilewise[sentencepiece]', or "
            "fetch a tokenizer.json"
        ) from error
    loaded = sentencepiece.SentencePieceProcessor()
    if not model:
        raise TokenizerError("the sentencepiece model is empty")
    loaded.LoadFromSerializedProto(model)
    return loaded


def pieces_of(model: bytes) -> list[str]:
    loaded = processor(model)
    return [loaded.id_to_piece(i) for i in range(loaded.get_piece_size())]


def t5(pieces: list[str], settings: Mapping[str, Any]) -> Numbering:
    count = settings.get("extra_ids", 100)
    if type(count) is not int or not 0 <= count <= 10_000:
        raise TokenizerError(f"extra_ids is {count!r}; takes a whole number to 10,000")
    extra = [f"<extra_id_{i}>" for i in reversed(range(count))]
    ids = numbered([*pieces, *(token for token in extra if token not in pieces)])
    specials = ["<pad>", "</s>", "<unk>", *extra]
    return Numbering(ids, specials, [], ["</s>"], between=["</s>"])


def llama(pieces: list[str], settings: Mapping[str, Any]) -> Numbering:
    prefix = ["<s>"] if settings.get("add_bos_token", True) else []
    suffix = ["</s>"] if settings.get("add_eos_token", False) else []
    ids, specials = numbered(pieces), ["<unk>", "<s>", "</s>"]
    once = not settings.get("legacy", False)
    return Numbering(ids, specials, prefix, suffix, [*suffix, *prefix], prefixed_once=once)


def mbart(pieces: list[str], settings: Mapping[str, Any]) -> Numbering:
    language = source_language(settings, LANGUAGES)
    ids, specials = fairseq(pieces, [*LANGUAGES, "<mask>"])
    return Numbering(ids, specials, [], ["</s>", language], between=[])


def mbart50(pieces: list[str], settings: Mapping[str, Any]) -> Numbering:
    language = source_language(settings, LANGUAGES_50)
    ids, specials = fairseq(pieces, [*LANGUAGES_50, "<mask>"])
    return Numbering(ids, specials, [language], ["</s>"], between=[])


def source_language(settings: Mapping[str, Any], known: list[str]) -> str:
    language = settings.get("src_lang") or "en_XX"
    if language not in known:
        raise TokenizerError(f"src_lang is {language!r}; takes one of {', '.join(known)}")
    return language


def xlm_roberta(pieces: list[str], settings: Mapping[str, Any]) -> Numbering:
    ids, specials = fairseq(pieces, ["<mask>"])
    return Numbering(ids, specials, ["<s>"], ["</s>"], between=["</s>", "</s>"])


def camembert(pieces: list[str], settings: Mapping[str, Any]) -> Numbering:
    first = ["<s>NOTUSED", "<pad>", "</s>NOTUSED", "<unk>", "<unk>NOTUSED"]
    ids = numbered([*first, *pieces[1:], "<mask>"])
    specials = [*first, "<s>", "</s>", "<mask>"]
    return Numbering(ids, specials, ["<s>"], ["</s>"], between=["</s>", "</s>"])


def fairseq(pieces: list[str], last: list[str]) -> tuple[dict[str, int], list[str]]:
    """The model's own <unk>, <s>, </s> give way to fairseq's four."""
    first = ["<s>", "<pad>", "</s>", "<unk>"]
    return numbered([*first, *pieces[3:], *last]), [*first, *last]


def marian(vocab: Any, settings: Mapping[str, Any]) -> Numbering:
    if not isinstance(vocab, dict) or not all(
        type(index) is int and 0 <= index < 2**32 for index in vocab.values()
    ):
        raise TokenizerError(f"{VOCAB} is no table of tokens and their ids")
    if settings.get("separate_vocabs"):
        raise TokenizerError("separate_vocabs is true; only one shared vocab.json is read")
    languages = [token for token in vocab if token.startswith(">>") and token.endswith("<<")]
    specials = ["</s>", "<unk>", "<pad>", *languages]
    return Numbering(dict(vocab), specials, [], ["</s>"], between=[])


def numbered(tokens: list[str]) -> dict[str, int]:
    return {token: index for index, token in enumerate(tokens)}


FAMILIES: dict[str, Callable[[list[str], Mapping[str, Any]], Numbering]] = {
    "t5": t5, "mt5": t5, "umt5": t5, "llama": llama, "mbart": mbart,
    "mbart50": mbart50, "camembert": camembert,
    "xlm-roberta": xlm_roberta, "xlmroberta": xlm_roberta,
}  # fmt: skip
CLASSES = {
    "t5": "T5Tokenizer", "mt5": "T5Tokenizer", "umt5": "T5Tokenizer", "llama": "LlamaTokenizer",
    "mbart": "MBartTokenizer", "mbart50": "MBart50Tokenizer", "camembert": "CamembertTokenizer",
    "xlm-roberta": "XLMRobertaTokenizer",
    "xlmroberta": "XLMRobertaTokenizer", "marian": "MarianTokenizer",
}  # fmt: skip
DEFAULTS = {"spiece.model": "t5", "tokenizer.model": "llama"}
