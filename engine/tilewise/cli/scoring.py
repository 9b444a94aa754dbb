"""tilewise score, embed and fill-mask: what a model makes of texts, one JSON object a line."""

import json
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import click

from .console import Command, print_line, progress, read_records
from .generate import DTYPES, open_model

Record = dict[str, Any]

SHARED_OPTIONS = (
    click.argument("texts", nargs=-1),
    click.option("--model", required=True, metavar="FOLDER|ID",
                 help="A checkpoint folder, or a Hugging Face hub id."),
    click.option("--file", type=click.Path(exists=True, dir_okay=False, allow_dash=True),
                 help="Read from here, a text a line, or JSON objects (.jsonl); - is stdin."),
    click.option("--dtype", type=click.Choice(DTYPES), default="float32", show_default=True),
    click.option("--device", metavar="cpu|cuda|cuda:N", help="The GPU when there is one."),
    click.option("--batch-tokens", type=click.IntRange(1), default=4096, show_default=True,
                 help="Tokens that run together, padding included."),
)  # fmt: skip
truncate_option = click.option(
    "--truncate", is_flag=True, help="Cut texts longer than the model's positions."
)
TOGETHER = 512  # lines that are read, sorted by length and answered at a time


def shared_options(function: Callable[..., None]) -> Callable[..., None]:
    """Add SHARED_OPTIONS to a command."""
    for option in reversed(SHARED_OPTIONS):
        function = option(function)
    return function


def print_answers(
    records: Iterable[Record], answer: Callable[[list[Record]], Iterable[dict[str, Any]]]
) -> None:
    """One line of JSON per record, in order, as the answers come; any number of records.

    Raises ClickException for a number that JSON has not.
    """
    for found in progress(_answers(iter(records), answer), None, "text"):
        try:
            line = json.dumps(found, ensure_ascii=True, allow_nan=False)
        except ValueError as error:
            raise click.ClickException(
                f"the model gives NaN or inf for {found['text'][:80]!r}: are its weights sound?"
            ) from error
        print_line(line)


def _answers(
    records: Iterator[Record], answer: Callable[[list[Record]], Iterable[dict[str, Any]]]
) -> Iterator[dict[str, Any]]:
    from ..errors import TilewiseError

    done = 0
    while batch := list(islice(records, TOGETHER)):
        try:
            yield from answer(batch)
        except TilewiseError as error:
            raise type(error)(f"after {done} texts: {error}" if done else str(error)) from error
        done += len(batch)


@click.command(cls=Command)
@shared_options
@click.option("--context", help="Score each text behind this one, or as its translation.")
@click.option("--tokens", is_flag=True, help="Also every token's id and log-probability.")
@click.option("--stride", type=click.IntRange(1),
              help="Tokens between the windows over a text longer than the model.")  # fmt: skip
def score(
    texts: tuple[str, ...],
    model: str,
    file: str | None,
    dtype: str,
    device: str | None,
    batch_tokens: int,
    context: str | None,
    tokens: bool,
    stride: int | None,
) -> None:
    """Log-probabilities [nats] of TEXTS.

    Prints {"text", "log_prob", "tokens", "perplexity"} for each, and all texts' perplexity on
    stderr. JSON lines may carry a "context" of their own, and other fields, which are printed
    again. Without TEXTS or --file, standard input is read.
    """
    from ..errors import ArgumentError
    from ..scoring.score import exp_or_inf

    given = read_records(texts, file, ("text", "context"))
    opened = open_model(model, device, dtype)
    texts_scored, tokens_scored, total = 0, 0, 0.0  # of files of any size: sums, no lists

    def answer(batch: list[Record]) -> Iterator[dict[str, Any]]:
        nonlocal texts_scored, tokens_scored, total
        contexts = [record.get("context", context) for record in batch]
        if opened.config.is_seq2seq and None in contexts:
            raise ArgumentError(
                f"{batch[contexts.index(None)]['text'][:50]!r} has no context, whose translation "
                'it could be: give --context, or a "context" in each JSON line'
            )
        found = opened.score(
            [record["text"] for record in batch],
            [each or "" for each in contexts]
            if any(contexts) or opened.config.is_seq2seq
            else None,
            batch_tokens=batch_tokens,
            stride=stride,
        )
        for record, each in zip(batch, found, strict=True):
            texts_scored += 1
            tokens_scored += len(each.log_probs)
            total += each.total
            line = record | {"log_prob": each.total, "tokens": len(each.tokens)}
            line["perplexity"] = each.perplexity
            if tokens:
                line |= {"ids": each.tokens, "token_log_probs": each.log_probs}
            yield line

    print_answers(given, answer)
    if tokens_scored:
        all_of_them = exp_or_inf(-total / tokens_scored)
        click.echo(f"perplexity {all_of_them:.4f} of {texts_scored} texts", err=True)


@click.command(cls=Command)
@shared_options
@click.option("--pooling", type=click.Choice(["mean", "cls", "last"]), default="mean",
              show_default=True, help="Which tokens' states make the vector.")  # fmt: skip
@click.option("--normalize/--no-normalize", default=True, show_default=True,
              help="Vectors of length 1.")  # fmt: skip
@truncate_option
def embed(
    texts: tuple[str, ...],
    model: str,
    file: str | None,
    dtype: str,
    device: str | None,
    batch_tokens: int,
    pooling: str,
    normalize: bool,
    truncate: bool,
) -> None:
    """One vector for each of TEXTS.

    Prints {"text", "embedding"} for each, and other fields of JSON lines again. Without TEXTS or
    --file, standard input is read.
    """
    given = read_records(texts, file, ("text",))
    opened = open_model(model, device, dtype)

    def answer(batch: list[Record]) -> Iterator[dict[str, Any]]:
        vectors = opened.embed(
            [record["text"] for record in batch],
            pooling=pooling,
            normalize=normalize,
            truncate=truncate,
            batch_tokens=batch_tokens,
        )
        for record, vector in zip(batch, vectors.tolist(), strict=True):
            yield record | {"embedding": vector}

    print_answers(given, answer)


@click.command(cls=Command, name="fill-mask", short_help="The likeliest words behind masks.")
@shared_options
@click.option("--top-k", type=click.IntRange(1), default=5, show_default=True,
              help="Candidates for each mask.")  # fmt: skip
@truncate_option
def fill_mask(
    texts: tuple[str, ...],
    model: str,
    file: str | None,
    dtype: str,
    device: str | None,
    batch_tokens: int,
    top_k: int,
    truncate: bool,
) -> None:
    """The likeliest words behind the mask tokens in TEXTS.

    A mask token is what the tokenizer's files call mask_token, else [MASK] or <mask>.

    Prints {"text", "masks"} for each, with a list of {"token", "id", "probability"} for each mask,
    and other fields of JSON lines again. Without TEXTS or --file, standard input is read.
    """
    import math

    given = read_records(texts, file, ("text",))
    opened = open_model(model, device, dtype)

    def answer(batch: list[Record]) -> Iterator[dict[str, Any]]:
        found = opened.fill_mask(
            [record["text"] for record in batch],
            top_k=top_k,
            truncate=truncate,
            batch_tokens=batch_tokens,
        )
        assert opened.tokenizer is not None  # texts went in
        for record, masks in zip(batch, found, strict=True):
            words = [
                opened.tokenizer.decode([[each.token] for each in mask], skip_special_tokens=False)
                for mask in masks
            ]
            filled = [
                [
                    {"token": word, "id": each.token, "probability": math.exp(each.log_prob)}
                    for word, each in zip(names, mask, strict=True)
                ]
                for names, mask in zip(words, masks, strict=True)
            ]
            yield record | {"masks": filled}

    print_answers(given, answer)
