"""vocab.txt, and vocab.json with merges.txt -> a tokenizer of the `tokenizers` library.

WordPiece: Devlin et al. 2019 (BERT). BPE: Sennrich et al. 2016; on words that end in </w>: Radford
et al. 2018 (GPT-1); on bytes: Radford et al. 2019 (GPT-2), Liu et al. 2019 (RoBERTa).
"""

from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from tilewise.errors import TokenizerError

NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
BERT = {
    "unk_token": "[UNK]",
    "sep_token": "[SEP]",
    "pad_token": "[PAD]",
    "cls_token": "[CLS]",
    "mask_token": "[MASK]",
}
GPT1 = {"unk_token": "<unk>"}
GPT2 = {name: "<|endoftext|>" for name in ("bos_token", "eos_token", "unk_token")}
OPT = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"}
ROBERTA = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "sep_token": "</s>",
    "pad_token": "<pad>",
    "cls_token": "<s>",
    "mask_token": "<mask>",
}
# Padding tokens that classes of transformers have by default, and files so may leave out.
PADDING = {"bert": "[PAD]"} | dict.fromkeys(
    ("roberta", "bart", "mbart", "mbart50", "camembert", "xlm-roberta", "xlmroberta")
    + ("t5", "mt5", "umt5"),
    "<pad>",
)


def word_piece(words: Path, settings: dict[str, Any]) -> tokenizers.Tokenizer:
    """BERT's: cleaned, by default lower-cased and without accents, split at spaces and signs."""
    settings = BERT | settings
    unk = content(settings["unk_token"])
    backend = tokenizers.Tokenizer(models.WordPiece.from_file(str(words), unk_token=unk))
    backend.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=settings.get("tokenize_chinese_chars", True),
        strip_accents=settings.get("strip_accents"),
        lowercase=settings.get("do_lower_case", True),
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(prefix="##")
    add_tokens(backend, settings, BERT)
    cls, sep = content(settings["cls_token"]), content(settings["sep_token"])
    set_template(backend, [cls, "$A", sep], [cls, "$A", sep, "$B:1", f"{sep}:1"], [cls, sep])
    if backend.token_to_id(unk) is None:
        raise TokenizerError(f"the vocabulary has no {unk}, which unknown words become")
    return backend


def byte_pair(
    vocab: Path, merges: Path, settings: dict[str, Any], kind: str
) -> tokenizers.Tokenizer:
    """A BPE of the family `kind`; GPT-2's when it names none that differs."""
    if kind in ("openaigpt", "openai-gpt"):
        return word_end_bpe(vocab, merges, settings)
    backend = tokenizers.Tokenizer(models.BPE.from_file(str(vocab), str(merges)))
    spaced = settings.get("add_prefix_space", False)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=spaced)
    backend.decoder = decoders.ByteLevel()
    if kind in ("roberta", "bart"):
        settings = ROBERTA | settings
        add_tokens(backend, settings, ROBERTA)
        cls, sep = content(settings["cls_token"]), content(settings["sep_token"])
        set_template(backend, [cls, "$A", sep], [cls, "$A", sep, sep, "$B", sep], [cls, sep])
        return backend
    defaults = OPT if kind == "opt" else GPT2
    settings = defaults | settings
    add_tokens(backend, settings, defaults)
    if settings.get("add_bos_token", kind == "opt"):
        bos = content(settings["bos_token"])
        set_template(backend, [bos, "$A"], [bos, "$A", f"{bos}:1", "$B:1"], [bos])
    return backend


def word_end_bpe(vocab: Path, merges: Path, settings: dict[str, Any]) -> tokenizers.Tokenizer:
    settings = GPT1 | settings
    model = models.BPE.from_file(
        str(vocab),
        str(merges),
        unk_token=content(settings["unk_token"]),
        end_of_word_suffix="</w>",
    )
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.BPEDecoder(suffix="</w>")
    add_tokens(backend, settings, GPT1)
    return backend


def add_tokens(
    backend: tokenizers.Tokenizer, settings: dict[str, Any], defaults: dict[str, str]
) -> None:
    """Tokens that are never split: those that files add, and the special ones by their roles.

    A default that the vocabulary lacks is left out, for it would have no embedding.
    """
    added = settings.get("added_tokens_decoder", {})
    for index in sorted(added, key=int):
        token = added_token(added[index])
        backend.add_tokens([token])
        if (got := backend.token_to_id(token.content)) != int(index):
            raise TokenizerError(
                f"the added token {token.content!r} gets the id {got}, not the {index} of its file"
            )
    present = {token.content for token in backend.get_added_tokens_decoder().values()}
    named = [settings.get(name) for name in NAMED]
    extra = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
    for value in [*named, *(extra.values() if isinstance(extra, dict) else extra)]:
        if value is None or content(value) in present:
            continue
        if value in defaults.values() and backend.token_to_id(content(value)) is None:
            continue
        backend.add_special_tokens([added_token(value, special=True)])
        present.add(content(value))
    if (pad := settings.get("pad_token")) is not None:
        pad_with(backend, content(pad))


def pad_with(backend: tokenizers.Tokenizer, token: str) -> None:
    """Names the padding token where a tokenizer.json would, if the vocabulary has it."""
    if (index := backend.token_to_id(token)) is not None:
        backend.enable_padding(pad_id=index, pad_token=token)


def added_token(value: Any, **more: bool) -> AddedToken:
    if isinstance(value, str):
        return AddedToken(value, **more)
    flags = ("lstrip", "rstrip", "single_word", "normalized", "special")
    return AddedToken(content(value), **{k: value[k] for k in flags if k in value} | more)


def content(value: Any) -> str:
    """A special token as files have it: its text, or a table with its text and flags."""
    text = value.get("content") if isinstance(value, dict) else value
    if not isinstance(text, str) or not text:
        raise TokenizerError(f"a special token is {value!r}, which is no text")
    return text


def set_template(
    backend: tokenizers.Tokenizer, single: list[str], pair: list[str], tokens: list[str]
) -> None:
    ids = {token: backend.token_to_id(token) for token in tokens}
    lacking = [token for token, index in ids.items() if index is None]
    if lacking:
        raise TokenizerError(f"the vocabulary has no {lacking[0]}, which begins or ends every text")
    backend.post_processor = processors.TemplateProcessing(
        single=single, pair=pair, special_tokens=list(ids.items())
    )
