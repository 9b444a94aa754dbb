"""The options of one generate call, checked before any work."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from ..config import AnyConfig
from ..errors import ArgumentError

DEFAULT_NEW_TOKENS = 20
MOST_POSITIONS = 2**31 - 1  # where no table of positions ends earlier


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """Options with the names and meanings of transformers' generate (dialect "hf").

    max_new_tokens counts generated tokens, the end token included; max_length counts the decoder
    prompt too and gives way to max_new_tokens. early_stopping: True ends a sentence once it has
    num_beams hypotheses; False when the best running score over its own length can no longer win;
    "never" when not even the longest continuation could. Hypotheses are ranked by their summed
    log-probability [nats] over (generated tokens) ** length_penalty. min_length counts the decoder
    prompt, as max_length does. bad_words_ids are sequences that are never generated (an end token
    alone is no bad word); suppress_tokens are tokens that never are. A sequence ends with the token
    that completes one of stop_strings, which it keeps.
    """

    num_beams: int = 1
    max_new_tokens: int | None = None
    max_length: int | None = None
    min_new_tokens: int = 0
    min_length: int = 0
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    num_return_sequences: int = 1
    no_repeat_ngram_size: int = 0
    repetition_penalty: float = 1.0
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    suppress_tokens: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    forced_bos_token_id: int | None = None
    forced_eos_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: tuple[int, ...] = ()
    pad_token_id: int | None = None
    decoder_start_token_id: int | None = None
    use_cache: bool = True
    dialect: Literal["hf"] = "hf"


def resolve(
    given: Mapping[str, Any], defaults: Mapping[str, Any], config: AnyConfig, prompt_length: int
) -> GenerationOptions:
    """Options from the call, else from the checkpoint's generation defaults, else our own.

    given: keyword arguments of the call (None = not given); prompt_length: tokens of the longest
    decoder prompt. Raises ArgumentError naming the option, what it got and what it takes.
    """
    names = {field.name for field in fields(GenerationOptions)}
    unknown = sorted(set(given) - names)
    if unknown:
        raise ArgumentError(f"generate takes no {', '.join(unknown)}; it takes {sorted(names)}")
    own = {name: getattr(config, name) for name in names if hasattr(config, name)}
    merged = {name: value for name, value in own.items() if value is not None}
    merged |= {k: v for k, v in defaults.items() if k in names and v is not None}
    merged |= {name: value for name, value in given.items() if value is not None}
    eos = merged.get("eos_token_id", ())
    merged["eos_token_id"] = tuple(eos) if isinstance(eos, (list, tuple)) else (eos,)
    if given.get("max_new_tokens") is None and given.get("max_length") is not None:
        merged.pop("max_new_tokens", None)
    if isinstance(texts := merged.get("stop_strings"), (str, list)):
        merged["stop_strings"] = (texts,) if isinstance(texts, str) else tuple(texts)
    if isinstance(merged.get("suppress_tokens"), list):
        merged["suppress_tokens"] = tuple(merged["suppress_tokens"])
    if isinstance(merged.get("bad_words_ids"), (list, tuple)):
        words = merged["bad_words_ids"]
        merged["bad_words_ids"] = tuple(tuple(w) if isinstance(w, list) else w for w in words)
    options = GenerationOptions(**merged)
    _check(options, config)
    return _with_length(options, config, prompt_length)


def _with_length(
    options: GenerationOptions, config: AnyConfig, prompt_length: int
) -> GenerationOptions:
    limit = config.position_limit or MOST_POSITIONS
    room = limit - prompt_length
    new = options.max_new_tokens
    if new is None and options.max_length is not None:
        new = options.max_length - prompt_length
        if new < 1:
            raise ArgumentError(
                f"max_length is {options.max_length}, but the prompt alone has {prompt_length} "
                "tokens; raise it or pass max_new_tokens"
            )
    if new is None:
        new = min(DEFAULT_NEW_TOKENS, max(room, 1))
    if new > room:
        raise ArgumentError(
            f"the prompt has {prompt_length} tokens and max_new_tokens is {new}, but the model has "
            f"{limit} positions; shorten the prompt or ask for at most {room}"
        )
    if options.min_new_tokens > new:
        raise ArgumentError(
            f"min_new_tokens is {options.min_new_tokens} and max_new_tokens {new}; "
            "the minimum cannot exceed the maximum"
        )
    least = max(options.min_new_tokens, min(options.min_length - prompt_length, new))
    return replace(options, max_new_tokens=new, min_new_tokens=least)


def _check(options: GenerationOptions, config: AnyConfig) -> None:
    vocab = config.output_vocab_size
    _whole("num_beams", options.num_beams, 1, vocab, "the vocabulary")
    _whole("num_return_sequences", options.num_return_sequences, 1, options.num_beams, "num_beams")
    for name in ("max_new_tokens", "max_length"):
        if getattr(options, name) is not None:
            _whole(name, getattr(options, name), 1, 2**31 - 1, "any practical length")
    _whole("min_new_tokens", options.min_new_tokens, 0, 2**31 - 1, "any practical length")
    _whole("min_length", options.min_length, 0, 2**31 - 1, "any practical length")
    _whole("no_repeat_ngram_size", options.no_repeat_ngram_size, 0, 2**31 - 1, "any length")
    _real("length_penalty", options.length_penalty, -100)
    _real("repetition_penalty", options.repetition_penalty, 0)
    if options.repetition_penalty == 0:
        raise ArgumentError("repetition_penalty is 0; pass a number above 0 (1 = none)")
    if not isinstance(options.early_stopping, bool) and options.early_stopping != "never":
        raise ArgumentError(
            f'early_stopping is {options.early_stopping!r}; pass True, False or "never"'
        )
    if options.dialect != "hf":
        raise ArgumentError(f'dialect is {options.dialect!r}; there is "hf"')
    if not isinstance(options.use_cache, bool):
        raise ArgumentError(f"use_cache is {options.use_cache!r}; pass True or False")
    for name in (
        "forced_bos_token_id",
        "forced_eos_token_id",
        "bos_token_id",
        "pad_token_id",
        "decoder_start_token_id",
    ):
        if getattr(options, name) is not None:
            _whole(name, getattr(options, name), 0, vocab - 1, "the vocabulary")
    for token in options.eos_token_id:
        _whole("eos_token_id", token, 0, vocab - 1, "the vocabulary")
    _tokens("suppress_tokens", options.suppress_tokens, vocab)
    if not isinstance(options.bad_words_ids, tuple):
        raise ArgumentError(f"bad_words_ids is {options.bad_words_ids!r}; pass a list of id lists")
    for word in options.bad_words_ids:
        _tokens("bad_words_ids", word or None, vocab)
    texts = options.stop_strings
    if not isinstance(texts, tuple) or not all(_is_text(text) for text in texts):
        raise ArgumentError(
            f"stop_strings is {texts!r}; pass a list of texts that are not empty, nor have lone "
            "surrogates"
        )
    if len(set(options.eos_token_id)) != len(options.eos_token_id):
        raise ArgumentError(f"eos_token_id is {options.eos_token_id}; name each id once")


def _is_text(value: object) -> bool:
    """Whether it is a string that is not empty and that UTF-8 can say."""
    if not isinstance(value, str) or not value:
        return False
    return not any("\ud800" <= character <= "\udfff" for character in value)


def _tokens(name: str, ids: object, vocab: int) -> None:
    if not isinstance(ids, tuple):
        raise ArgumentError(f"{name} is or holds {ids!r}; pass a list of ids there")
    for token in ids:
        _whole(name, token, 0, vocab - 1, "the vocabulary")


def _whole(name: str, value: object, low: int, high: int, bound: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ArgumentError(
            f"{name} is {value!r}; pass a whole number from {low} to {high} ({bound})"
        )


def _real(name: str, value: object, low: int, high: int = 100) -> None:
    """The bounds keep length ** penalty a float; NaN lies within none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise ArgumentError(f"{name} is {value!r}; pass a number from {low} to {high}")
