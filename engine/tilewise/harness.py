"""Models under EleutherAI's lm-eval harness, which the extra `harness` installs:

    lm_eval.simple_evaluate(model=HarnessModel(tilewise.load(folder)), tasks=["lambada_openai"])

The harness asks for log P(text | context), for log P(text) of long texts, and for greedy
continuations. As in its own Hugging Face model a decoder reads context and text as one, spaces
between them being the text's, and of a context that is too long the end. Long texts are scored in
windows of all positions, each behind one token of the one before, the last behind as much as fits:
every token is scored once, and a document costs one pass, not one per token.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from tqdm import tqdm

from .config import ModelConfig
from .errors import ArgumentError, TokenizerError
from .models import AnySeq2Seq, Decoder
from .pretrained import Model

try:
    from lm_eval.api.model import LM
except ImportError as error:
    raise ImportError(
        "tilewise.harness answers the lm-eval harness: pip install 'tilewise[harness]'"
    ) from error

# What the model reads first (a source, or what is before the text), and the text.
Part = tuple[list[int], list[int]]
NEW_TOKENS = 256  # the harness' own default
TOGETHER = 512  # requests that are sorted by length and scored at a time
SAMPLING = ("temperature", "top_k", "top_p", "min_p")


class HarnessModel(LM):
    """A decoder or seq2seq Model that answers the harness' requests (Instance.args) in order.

    batch_tokens: what is scored together, padding included; batch_size: prompts that are continued
    together; max_length: tokens that the model reads, None: as many as it was made for. Raises
    TokenizerError for a model without a tokenizer, ArgumentError for a max_length past its
    positions.
    """

    def __init__(
        self,
        model: Model,
        *,
        batch_tokens: int = 4096,
        batch_size: int = 8,
        max_length: int | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(model, Model):
            raise ArgumentError(f"model is {type(model).__name__}; pass what tilewise.load gives")
        if not isinstance(model.network, Decoder | AnySeq2Seq):
            raise ArgumentError(f"a {model.config.model_type} has no next token, as the tasks need")
        if model.tokenizer is None:
            raise TokenizerError("the harness asks in texts, and the model has no tokenizer")
        config = model.config
        made_for = config.max_positions if isinstance(config, ModelConfig) else 2**31 - 1
        longest = config.position_limit or 2**31 - 1
        self.max_length = made_for if max_length is None else max_length
        if not _is_whole(self.max_length) or not 1 <= self.max_length <= longest:
            raise ArgumentError(f"max_length is {max_length!r}; the model takes 1 to {longest}")
        for name, value in (("batch_size", batch_size), ("batch_tokens", batch_tokens)):
            if not _is_whole(value) or value < 1:
                raise ArgumentError(f"{name} is {value!r}; pass a whole number from 1")
        self._model, self._tokenizer = model, model.tokenizer
        self._batch_tokens, self._batch_size = batch_tokens, batch_size

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Of each (context, text): log P(text | context) [nats], and whether it is greedy.

        An empty context is the first token that the tokenizer adds, else the model's bos or eos.
        A seq2seq model scores the text as target of its context, without the tokens that end it,
        as the harness wants. A text without tokens has log P = 0.
        """
        pairs = [_spaces_moved(*request.args) for request in requests]
        bar = tqdm(range(0, len(pairs), TOGETHER), desc="tilewise scores", disable=None)
        return [each for i in bar for each in self._scored(pairs[i : i + TOGETHER])]

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """Of each (text,): log P(text) [nats], in windows where it is longer than max_length.

        What a tokenizer adds before a text is context and not scored (the harness' own Hugging
        Face model scores it as well); a seq2seq model's source is an empty text.
        """
        pairs = [("", *request.args) for request in requests]
        bar = tqdm(range(0, len(pairs), TOGETHER), desc="tilewise scores", disable=None)
        return [total for i in bar for total, _ in self._scored(pairs[i : i + TOGETHER])]

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Of each (context, options): its continuation up to the first of options["until"].

        options: until (a text or a list of texts), max_gen_toks (256), and those of
        Model.generate. Contexts lose what does not fit from their beginning. Raises ArgumentError
        for options that generate does not take, sampling among them.
        """
        prompts = [request.args[0] for request in requests]
        options = [request.args[1] for request in requests]
        for given in options:
            _check_options(given)
        order = sorted(range(len(prompts)), key=lambda i: (repr(options[i]), -len(prompts[i])))
        batches: list[list[int]] = []
        for i in order:
            fits = batches and len(batches[-1]) < self._batch_size
            if not (fits and options[batches[-1][0]] == options[i]):
                batches.append([])
            batches[-1].append(i)
        found = [""] * len(prompts)
        for batch in tqdm(batches, desc="tilewise generates", disable=None):
            texts = self._continued([prompts[i] for i in batch], options[batch[0]])
            for i, text in zip(batch, texts, strict=True):
                found[i] = text
        return found

    def _scored(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        owners, contexts, texts = [], [], []
        for i, encoded in enumerate(self._encoded(pairs)):
            for context, text in self._windows(*encoded):
                owners.append(i)
                contexts.append(context)
                texts.append(text)
        totals, greedy = [0.0] * len(pairs), [True] * len(pairs)
        scores = self._model.score(texts, contexts, greedy=True, batch_tokens=self._batch_tokens)
        for i, score in zip(owners, scores, strict=True):
            totals[i] += score.total
            greedy[i] &= all(score.greedy)
        return list(zip(totals, greedy, strict=True))

    def _encoded(self, pairs: Sequence[tuple[str, str]]) -> Iterator[Part]:
        contexts, texts = [context for context, _ in pairs], [text for _, text in pairs]
        if self._model.config.is_seq2seq:
            targets = self._tokenizer.encode_targets(texts, add_special_tokens=False)
            yield from zip(self._prompts(contexts, self.max_length), targets, strict=True)
            return
        for ids, first in self._tokenizer.encode_after(contexts, texts):
            if first == 0 and ids[:1] != self._start:
                ids = [*self._start, *ids]
            yield ids[: max(first, 1)], ids[max(first, 1) :]

    def _windows(self, context: list[int], text: list[int]) -> Iterator[Part]:
        """Parts that fit, max_length tokens read and one predicted; each token is scored once."""
        most = self.max_length
        if self._model.config.is_seq2seq:  # each window starts anew behind the whole source
            yield from ((context, text[i : i + most]) for i in range(0, len(text), most))
            return
        ids, done = [*context, *text], len(context)
        while done < len(ids):
            end = min(done + most, len(ids))
            yield ids[max(end - most - 1, 0) : done], ids[done:end]
            done = end

    def _continued(self, prompts: list[str], given: dict[str, Any]) -> list[str]:
        options = dict(given)
        until, new = options.pop("until", None) or [], options.pop("max_gen_toks", NEW_TOKENS)
        sampling = {name: options.pop(name, None) for name in SAMPLING}
        if options.pop("do_sample", bool(sampling["temperature"])):
            raise ArgumentError(
                f"the task asks for sampling ({given}); only greedy and beam search"
            )
        new = options.setdefault("max_new_tokens", new)
        is_seq2seq = self._model.config.is_seq2seq
        room = self.max_length if is_seq2seq else self.max_length - new
        if room < 1:
            raise ArgumentError(
                f"max_gen_toks is {new}, which leaves no room for a prompt in {self.max_length} "
                "tokens; ask for fewer, as gen_kwargs"
            )
        rows = self._prompts(prompts, room)
        until = [until] if isinstance(until, str) else until
        stops = [text for text in until if text]
        early = stops if is_seq2seq else self._not_begun(stops, rows)
        options.setdefault("stop_strings", early)
        out = self._model.generate(rows, **options)
        starts = [1 if is_seq2seq else len(row) for row in rows]
        found = zip(out.sequences.tolist(), starts, out.lengths.tolist(), strict=True)
        texts = self._tokenizer.decode([row[start:end] for row, start, end in found])
        return [_cut(text, stops) for text in texts]

    def _not_begun(self, stops: list[str], rows: list[list[int]]) -> list[str]:
        """Those at which generate may end: it counts one that a prompt begins, the harness none."""
        prompts = self._tokenizer.decode(rows, skip_special_tokens=False)
        begun = {
            stop
            for stop in stops
            for n in range(1, len(stop))
            if any(prompt.endswith(stop[:n]) for prompt in prompts)
        }
        return [stop for stop in stops if stop not in begun]

    def _prompts(self, texts: list[str], room: int) -> list[list[int]]:
        """Ids of contexts, their ends where they are longer than `room`; an empty one starts."""
        rows = self._tokenizer.encode(texts, max_length=room, truncation_side="left")
        return [row or self._start for row in rows]

    @property
    def _start(self) -> list[int]:
        """The token that stands for an empty context."""
        config = self._model.config
        start = [config.bos_token_id] if config.bos_token_id is not None else config.eos_token_id
        if not start:
            raise ArgumentError("a context is empty, and the model has no bos or eos token for it")
        return list(start[:1])


def _spaces_moved(context: str, text: str) -> tuple[str, str]:
    """Spaces that end a context belong to the text, whose first token they are part of."""
    kept = context.rstrip()
    return kept, context[len(kept) :] + text


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_options(given: object) -> None:
    if not isinstance(given, dict):
        raise ArgumentError(f"options of generate_until are {given!r}; pass a dict")
    for name in ("max_gen_toks", "max_new_tokens"):
        new = given.get(name, NEW_TOKENS)
        if not _is_whole(new) or new < 1:
            raise ArgumentError(f"{name} is {new!r}; pass a whole number from 1")
    until = given.get("until") or []
    texts = [until] if isinstance(until, str) else until
    if not isinstance(texts, Sequence) or not all(isinstance(text, str) for text in texts):
        raise ArgumentError(f"until is {until!r}; pass a text or a list of texts")


def _cut(text: str, until: Sequence[str]) -> str:
    for stop in until:
        text = text.split(stop)[0]
    return text
