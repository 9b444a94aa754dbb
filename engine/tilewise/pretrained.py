"""A model with its tokenizer, its generation defaults and its folder: what `load` returns."""

import json
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from . import scoring
from .checkpoints import (
    TensorInfo,
    check_weights,
    fill_weights,
    open_weights,
    read_config,
    verify_folder,
    write_folder,
)
from .checkpoints.copying import read_copies, untied
from .checkpoints.reading import CONFIG, GENERATION, PARAMS, WeightFiles, listed
from .config import AnyConfig, ModelConfig, usable_ids
from .errors import ArgumentError, CheckpointError, ConfigError, TokenizerError
from .families import family_of, tensors_to
from .generation import GenerationOutput, generate
from .hub import fetch_headers, fetch_settings, fetch_weights
from .models import ModelOutput, build
from .scoring import Score
from .text import Tokenizer, load_tokenizer


class Model(nn.Module):
    """A network of tilewise.models joined with text and generation.

    network: the nn.Module itself; tokenizer: None when the folder had none; raw_config: the
    config.json it came from, unknown keys included; generation_defaults: options that its folder
    sets for generate.
    """

    def __init__(
        self,
        network: nn.Module,
        tokenizer: Tokenizer | None = None,
        raw_config: Mapping[str, Any] | None = None,
        generation_defaults: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.tokenizer = tokenizer
        self.raw_config = dict(raw_config or {})
        self.generation_defaults = dict(generation_defaults or {})

    @property
    def config(self) -> AnyConfig:
        return self.network.config  # type: ignore[return-value]

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **more: Any
    ) -> ModelOutput:
        """The network's forward: see Decoder, Encoder and Seq2Seq."""
        return self.network(input_ids, attention_mask, **more)

    def generate(
        self,
        inputs: str | Sequence[str] | Tensor | Sequence[Sequence[int]],
        *,
        attention_mask: Tensor | None = None,
        **options: Any,
    ) -> GenerationOutput:
        """Generate from strings, token ids [B, S], or lists of ids of any lengths.

        options: those of GenerationOptions (transformers' names). Given strings, the output's
        `texts` holds the generated text without special tokens, for decoders without the prompt.
        Raises TokenizerError for strings without a tokenizer, ArgumentError, GenerationError.
        """
        texts = [inputs] if isinstance(inputs, str) else inputs
        own: dict[str, Any] = {"defaults": self.generation_defaults, "tokenizer": self.tokenizer}
        if twice := sorted(own.keys() & options.keys()):
            raise ArgumentError(f"generate was given {', '.join(twice)}; it uses the model's own")
        if not _are_strings(texts):
            return generate(self.network, inputs, attention_mask=attention_mask, **own, **options)  # type: ignore[arg-type]
        tokenizer = self._need_tokenizer()
        if attention_mask is not None:
            raise ArgumentError("attention_mask was given with texts, which need none")
        prompts = tokenizer.encode(texts)  # type: ignore[arg-type]
        out = generate(self.network, prompts, **own, **options)
        each = len(out.lengths) // max(len(prompts), 1)
        # A seq2seq model's start token, or the one that an empty prompt gets, is no text either.
        start = [1 if self.config.is_seq2seq else max(len(prompt), 1) for prompt in prompts]
        skip = [start[i // each] for i in range(len(out.lengths))]
        rows = zip(out.sequences.tolist(), skip, out.lengths.tolist(), strict=True)
        out.texts = tokenizer.decode([row[start:stop] for row, start, stop in rows])
        return out

    def score(
        self,
        texts: Sequence[str] | Sequence[Sequence[int]],
        contexts: Sequence[str] | Sequence[Sequence[int]] | None = None,
        *,
        language: str | None = None,
        **options: Any,
    ) -> list[Score]:
        """Log-probabilities of texts, each behind its context (a seq2seq model: its source).

        texts, contexts: strings, or lists of token ids. A string and its context are encoded as
        one text; a seq2seq model's as target and source. language: of mBART's target strings,
        such as "ro_RO"; None: the one that decoding starts with, else the tokenizer's. options:
        batch_tokens, stride; see tilewise.scoring.score. Raises ArgumentError, TokenizerError.
        """
        if self.config.is_seq2seq and _are_strings(texts):
            texts, options["wrap"] = self._targets(texts, language)  # type: ignore[arg-type]
        elif language is not None:
            raise ArgumentError("language is of a seq2seq model's target strings; leave it out")
        together = contexts is not None and not self.config.is_seq2seq
        if not (together and _are_strings(texts) and _are_strings(contexts)):
            ids = self._ids("texts", texts)
            given = None if contexts is None else self._ids("contexts", contexts)
            return scoring.score(self.network, ids, given, **options)
        if len(contexts) != len(texts):  # type: ignore[arg-type]
            raise ArgumentError(
                f"contexts has {len(contexts)} rows and texts {len(texts)}; as many"  # type: ignore[arg-type]
            )
        found = self._need_tokenizer().encode_after(contexts, texts)  # type: ignore[arg-type]
        before, after = [ids[:n] for ids, n in found], [ids[n:] for ids, n in found]
        return scoring.score(self.network, after, before, **options)

    def _targets(self, texts: Sequence[str], language: str | None) -> tuple[list[list[int]], bool]:
        """Ids of a seq2seq model's targets, and whether their last says how decoding starts."""
        tokenizer, config = self._need_tokenizer(), self.config
        wrap = isinstance(config, ModelConfig) and config.wrap_labels
        if language is None and wrap and config.decoder_start_token_id is not None:
            language = tokenizer.language(config.decoder_start_token_id)
        return tokenizer.encode_targets(texts, language), wrap

    def embed(
        self,
        texts: Sequence[str] | Sequence[Sequence[int]],
        *,
        truncate: bool = False,
        **options: Any,
    ) -> Tensor:
        """One vector per text [R, E]. truncate: strings longer than the model's positions are cut
        by the tokenizer. options: pooling, normalize, batch_tokens; see tilewise.scoring.embed.
        Raises ArgumentError, TokenizerError.
        """
        return scoring.embed(self.network, self._ids("texts", texts, truncate=truncate), **options)

    def fill_mask(
        self,
        texts: Sequence[str] | Sequence[Sequence[int]],
        *,
        mask_token_id: int | None = None,
        truncate: bool = False,
        **options: Any,
    ) -> list[list[list[scoring.Filling]]]:
        """For each text, for each mask token written in it, the likeliest tokens, best first.

        mask_token_id: None: the mask_token of the tokenizer's files, else [MASK] or <mask>.
        truncate: strings longer than the model's positions are cut by the tokenizer. options:
        top_k, batch_tokens; see tilewise.scoring.fill_mask. Raises ArgumentError, TokenizerError.
        """
        scoring.masked_model(self.network)
        if mask_token_id is None:
            mask_token_id = self._mask_token_id(texts)
        ids = self._ids("texts", texts, truncate=truncate)
        return scoring.fill_mask(self.network, ids, mask_token_id, **options)

    def _mask_token_id(self, texts: object) -> int:
        if self.tokenizer is None and not _are_strings(texts):
            raise ArgumentError("mask_token_id is not given, and no tokenizer names it: pass it")
        tokenizer = self._need_tokenizer()
        found = [tokenizer.special_token_id("mask_token")]
        found += [tokenizer.token_to_id(name) for name in ("[MASK]", "<mask>")]
        known = [token for token in found if token is not None]
        if not known:
            raise ArgumentError(
                "the tokenizer has no mask token: name one of its tokens as mask_token in "
                "tokenizer_config.json, or in Python pass mask_token_id"
            )
        return known[0]

    def next_sentence(
        self, pairs: Sequence[tuple[str, str]], *, truncate: bool = False, **options: Any
    ) -> list[float]:
        """P that the second text of each pair follows the first.

        truncate: pairs longer than the model's positions are cut by the tokenizer, the longer text
        first. options: batch_tokens; see tilewise.scoring.next_sentence. Raises ArgumentError,
        TokenizerError.
        """
        scoring.following_model(self.network)
        longest = self.config.position_limit if truncate else None
        found = self._need_tokenizer().encode_pairs(pairs, max_length=longest)
        return scoring.next_sentence(self.network, found, **options)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write config.json, model.safetensors, tokenizer and generation defaults, all or nothing.

        The folder is one that `load` reads back, and transformers too where it has the family.
        Raises CheckpointError when it cannot be written; an existing checkpoint then stays.
        """
        family = family_of({"model_type": self.config.model_type})
        state = self.network.state_dict()
        extra = {} if self.tokenizer is None else self.tokenizer.files()
        if self.generation_defaults:
            extra[GENERATION] = json.dumps(self.generation_defaults, indent=2).encode()
        kept = {name: value for name, value in self.raw_config.items() if name != "torch_dtype"}
        stored = {"dtype": str(next(iter(state.values())).dtype).removeprefix("torch.")}
        write_folder(
            folder,
            kept | stored | family.config_to(self.config),
            tensors_to(self.config, state),
            extra,
        )

    def _ids(self, name: str, inputs: Any, truncate: bool = False) -> list[list[int]]:
        longest = self.config.position_limit if truncate else None
        return scoring.as_ids(name, inputs, self.tokenizer, longest)

    def _need_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise TokenizerError(
                "text was given, but the model's folder has no tokenizer files (tokenizer.json, "
                "vocab.txt, vocab.json with merges.txt, or a sentencepiece model); add them, or "
                "in Python pass token ids"
            )
        return self.tokenizer


def _are_strings(inputs: object) -> bool:
    return (
        isinstance(inputs, Sequence)
        and len(inputs) > 0
        and all(isinstance(text, str) for text in inputs)
    )


def load(
    source: str | os.PathLike[str],
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str = torch.float32,
    strict_finite: bool = False,
    verify: bool = False,
) -> Model:
    """Open a checkpoint folder, or a Hugging Face hub id, as a Model in eval mode.

    source: a folder with config.json (or Meta's params.json) and model.safetensors (or an index of
    shards, or Meta's consolidated.safetensors), and tokenizer files when there are any; "dates" is
    the English to Japanese model that ships with tilewise. Anything else is taken for a hub id:
    huggingface_hub fetches these files of its newest commit into its cache, no others, and honours
    HF_HUB_OFFLINE. dtype: what the weights are converted to, piece by piece on their way into the
    model, so that loading takes little more memory than the model. Weights with NaN or infinite
    values give a warning that names them, with strict_finite an error. verify: first compare every
    file with the manifest that `save` wrote, which reads them once more. Nothing is ever unpickled
    and no code of the folder runs. Raises CheckpointError, ConfigError, TokenizerError.
    """
    wanted, place = _dtype(dtype), _device(device)
    folder, hub_id = _folder(source)
    if hub_id is not None:
        family_of(_config(folder))  # no weights are fetched for a model that cannot be read
        fetch_weights(hub_id, folder)
    if verify:
        verify_folder(folder)
    raw = _config(folder)
    family, weights = family_of(raw), open_weights(folder)
    names = set(weights.tensors)
    config = _configuration(raw, weights)
    tokenizer = load_tokenizer(folder)
    if tokenizer is not None and not _fits(tokenizer, config.vocab_size):
        raise TokenizerError(
            f"the tokenizer in {folder} has {tokenizer.vocab_size} tokens and the model only "
            f"{config.vocab_size} embeddings; put the model's own tokenizer there"
        )
    tied = family.tied(config, names)
    rules, tied = read_copies(family.rules(config, names), tied, names)
    more = {"ignore": family.ignored(config, names), "tied": tied}
    with _Uninitialised(wanted, place):
        with torch.device("meta"):  # a config that asks too much is found before it is allocated
            check_weights(build(config).state_dict(), weights, rules, **more)
        network = build(config).to(place, wanted)  # what is no parameter, such as tables
    odd = fill_weights(network.state_dict(), weights, rules)
    if odd:
        _report_odd(folder, odd, wanted, strict_finite)
    defaults = _generation_defaults(folder, raw, config.output_vocab_size)
    return Model(network, tokenizer, raw, defaults).eval()


def _fits(tokenizer: Tokenizer, rows: int) -> bool:
    """Whether all tokens have an embedding, but for a few special ones that texts do not hold.

    bart-large-cnn has 50264, and a tokenizer whose <mask> is token 50264.
    """
    past = range(rows, tokenizer.vocab_size)
    return not past or (len(past) <= 100 and not any(tokenizer.decode([[t] for t in past])))


def _configuration(raw: Mapping[str, Any], weights: WeightFiles) -> AnyConfig:
    """What config.json and the weights together ask for."""
    family, names = family_of(raw), set(weights.tensors)
    config = family.config_from(raw, names)
    if _has_other_head(family.tied(config, names), weights):
        return replace(config, tie_embeddings=False)
    return config


def _has_other_head(tied: Mapping[str, str], weights: WeightFiles) -> bool:
    """Whether the file has a head of its own for a model whose config.json says that it is tied.

    The head is then used as it is, as transformers does. Copies of the embedding inside a stack
    must be copies.
    """
    for name, tokens in tied.items():
        is_head = name.endswith(".weight") and ".embed" not in name
        if not is_head or not {name, tokens} <= weights.tensors.keys():
            continue
        if differ := untied(weights, name, tokens):
            warnings.warn(f"{differ} by config.json; both are used as they are", stacklevel=4)
            return True
    return False


def inspect(
    source: str | os.PathLike[str],
) -> tuple[AnyConfig, Mapping[str, TensorInfo]]:
    """A checkpoint's configuration, as `load` uses it, and what its files say of each tensor.

    source: as of `load`, whose errors it raises for what cannot be read. Only headers are read, and
    two tensors where the weights hold a head of their own for a model that is tied by config.json:
    whether it differs decides. Of a hub id whose weights are not in the cache the headers alone are
    fetched, and config.json is taken at its word.
    """
    folder, hub_id = _folder(source)
    raw = _config(folder)
    family = family_of(raw)
    if hub_id is not None and (tensors := fetch_headers(hub_id, folder)) is not None:
        return family.config_from(raw, set(tensors)), tensors
    weights = open_weights(folder)
    return _configuration(raw, weights), weights.tensors


class _Uninitialised(TorchFunctionMode):
    """New parameters keep what memory holds; no random number is drawn for weights to come.

    They are made in `dtype` on `device` at once. Unlike a default dtype this leaves alone the
    tables that a module computes, and the other threads.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self._made = {"dtype": dtype, "device": device}

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if getattr(function, "__module__", None) == "torch.nn.init" or function in _FILLING:
            return args[0] if args else (kwargs or {})["tensor"]
        given = kwargs or {}
        if function is torch.empty:
            given = self._made | {name: v for name, v in given.items() if v is not None}
        return function(*args, **given)


def _report_odd(folder: Path, names: list[str], dtype: torch.dtype, strict: bool) -> None:
    text = (
        f"{folder} has weights that are NaN or infinite as {str(dtype).removeprefix('torch.')}: "
        f"{listed(names)}"
    )
    if strict:
        raise CheckpointError(f"{text}. Fetch or train it again, or load it in a wider dtype")
    warnings.warn(text, stacklevel=3)


_CHANGES_OUTPUT = {  # temperature and its like only when do_sample is set
    "begin_suppress_tokens", "do_sample", "encoder_no_repeat_ngram_size", "sequence_bias",
}  # fmt: skip
_FILLING = {Tensor.normal_, Tensor.uniform_, Tensor.zero_, Tensor.fill_}


def _folder(source: str | os.PathLike[str]) -> tuple[Path, str | None]:
    """The source's folder; for a hub id one that may lack weights, and the id."""
    if not isinstance(source, (str, os.PathLike)):
        raise ArgumentError(f"source is {type(source).__name__}; pass a folder or a hub id")
    if not os.fspath(source):  # an unset variable of a script, not the working directory
        raise ArgumentError("source is empty; pass a folder or a hub id")
    path = Path(source)
    if source == "dates":  # a folder of that name is "./dates"
        return Path(__file__).parent / "assets" / "dates", None
    if os.path.isdir(path):  # unlike Path.is_dir it takes a name that is too long for none
        return path, None
    is_path = os.path.exists(path) or path.is_absolute() or str(source).startswith(".")
    if is_path or str(source).count("/") > 1:
        raise CheckpointError(f"there is no folder {source}; pass a checkpoint folder or a hub id")
    return fetch_settings(str(source)), str(source)


def _config(folder: Path) -> dict[str, Any]:
    """config.json, or in its place params.json, which only LLaMA has and so names no model_type."""
    if os.path.lexists(folder / CONFIG) or not os.path.lexists(folder / PARAMS):
        return read_config(folder)
    return {"model_type": "llama", **read_config(folder, PARAMS)}


def _dtype(dtype: torch.dtype | str) -> torch.dtype:
    named = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if named not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        raise ArgumentError(f"dtype is {dtype!r}; pass float32, bfloat16, float16 or float64")
    return named


def _device(device: str | torch.device) -> torch.device:
    try:
        place = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, TypeError, ValueError, ImportError) as error:  # torch's
        reason = str(error).splitlines()[0]
        raise ArgumentError(f"device is {device!r}, which this machine lacks: {reason}") from error
    if place.type == "meta":
        raise ArgumentError("device is 'meta', which holds no weights; pass cpu or cuda")
    return place


def _generation_defaults(folder: Path, raw: Mapping[str, Any], vocab_size: int) -> dict[str, Any]:
    """Options from generation_config.json, else those old folders keep in config.json."""
    origin = GENERATION
    if os.path.lexists(folder / GENERATION):  # a broken link is an error, not an absent file
        found = read_config(folder, GENERATION)
    else:
        origin, names = CONFIG, (*_KEPT, *sorted(_CHANGES_OUTPUT))
        found = {name: raw[name] for name in names if name in raw}
    lost = sorted(_CHANGES_OUTPUT & {name for name, value in found.items() if value})
    if lost:
        warnings.warn(
            f"{origin} sets {', '.join(lost)}, which tilewise does not have: its output "
            "will differ",
            stacklevel=3,
        )
    return _usable(found, vocab_size)


_KEPT = (
    "num_beams", "num_return_sequences", "length_penalty", "early_stopping", "repetition_penalty",
    "no_repeat_ngram_size", "max_length", "max_new_tokens", "min_length", "min_new_tokens",
    "forced_bos_token_id", "forced_eos_token_id", "bad_words_ids", "suppress_tokens",
)  # fmt: skip


def _usable(found: dict[str, Any], vocab_size: int) -> dict[str, Any]:
    """The same options without the ids that the vocabulary lacks."""
    one = ("bos_token_id", "pad_token_id", "forced_bos_token_id", "forced_eos_token_id")
    for name in (*one, "eos_token_id", "suppress_tokens"):
        ids = usable_ids(name, found.pop(name, None), vocab_size)
        if ids:
            found[name] = ids[0] if name in one else list(ids)
    words = found.pop("bad_words_ids", None) or []
    if not isinstance(words, list) or not all(isinstance(word, list) and word for word in words):
        raise ConfigError(f"bad_words_ids is {words!r}; it must be a list of lists of ids")
    kept = [w for w in words if len(usable_ids("bad_words_ids", w, vocab_size)) == len(set(w))]
    return found | ({"bad_words_ids": kept} if kept else {})
