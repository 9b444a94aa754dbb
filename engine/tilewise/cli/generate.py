"""tilewise generate, and what translate shares with it: options, batches, output."""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import click

from .console import Command, print_json, print_line, progress, read_texts, usable_device

if TYPE_CHECKING:
    from ..pretrained import Model

DTYPES = ["float32", "bfloat16", "float16", "float64"]
EARLY_STOPPING = {"true": True, "false": False, "never": "never"}

SHARED_OPTIONS = (
    click.argument("texts", nargs=-1),
    click.option("--file", type=click.Path(exists=True, dir_okay=False, allow_dash=True),
                 help="Read texts from here, one a line; - is standard input."),
    click.option("--max-new-tokens", type=click.IntRange(1),
                 help="Tokens to generate at most.  [default: 20]"),
    click.option("--min-new-tokens", type=click.IntRange(0),
                 help="Tokens to generate at least.  [default: 0]"),
    click.option("--length-penalty", type=float,
                 help="Hypotheses are ranked by log-probability / length ** this.  [default: 1.0]"),
    click.option("--early-stopping", type=click.Choice(list(EARLY_STOPPING)),
                 help="When a sentence's beams are done; as in transformers.  [default: false]"),
    click.option("--no-repeat-ngram-size", type=click.IntRange(0),
                 help="No sequence of this many tokens twice; 0 = off.  [default: 0]"),
    click.option("--repetition-penalty", type=float, help="Above 1: repeat less.  [default: 1.0]"),
    click.option("--dtype", type=click.Choice(DTYPES), default="float32", show_default=True),
    click.option("--device", metavar="cpu|cuda|cuda:N", help="The GPU when there is one."),
    click.option("--batch-size", type=click.IntRange(1), default=32, show_default=True,
                 help="Texts that run together."),
    click.option("--json", "as_json", is_flag=True, help="One JSON document."),
)  # fmt: skip


def shared_options(function: Callable[..., None]) -> Callable[..., None]:
    """Add SHARED_OPTIONS to a command."""
    for option in reversed(SHARED_OPTIONS):
        function = option(function)
    return function


def answers(
    model: "Model", texts: Sequence[str], batch_size: int, options: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """For each text, in order, {"input", "outputs": best first}; a blank text has no outputs.

    An output has "text", the generated "ids" (without a prompt), "score", and one of
    "token_log_probs" per id, in nats.
    """
    if options.get("early_stopping") is not None:
        options = options | {"early_stopping": EARLY_STOPPING[options["early_stopping"]]}
    for start in range(0, len(texts), batch_size):
        batch = texts[start : start + batch_size]
        spoken = [text for text in batch if text.strip()]
        found = iter(_outputs(model, spoken, options) if spoken else [])
        for text in batch:
            yield {"input": text, "outputs": next(found) if text.strip() else []}


def _outputs(
    model: "Model", texts: list[str], options: dict[str, Any]
) -> list[list[dict[str, Any]]]:
    out = model.generate(texts, **options)
    assert out.texts is not None  # strings went in
    prompts = [1] * len(texts) if model.config.is_seq2seq or model.tokenizer is None else [
        max(len(ids), 1) for ids in model.tokenizer.encode(texts)
    ]  # fmt: skip
    each = len(out.texts) // len(texts)
    rows = []
    for i, text in enumerate(out.texts):
        prompt, length = prompts[i // each], int(out.lengths[i])
        rows.append({
            "text": text,
            "ids": out.sequences[i, prompt:length].tolist(),
            "score": out.sequences_scores[i].item(),
            "token_log_probs": out.token_log_probs[i, : length - prompt].tolist(),
        })  # fmt: skip
    return [rows[i : i + each] for i in range(0, len(rows), each)]


def open_model(source: str, device: str | None, dtype: str) -> "Model":
    """tilewise.load, after the device has been checked."""
    from ..pretrained import load

    return load(source, device=usable_device(device), dtype=dtype)


def report(
    model: "Model",
    texts: list[str],
    batch_size: int,
    options: dict[str, Any],
    as_json: bool,
    scores: bool,
) -> None:
    """Answer the texts: one JSON document, or lines as they come."""
    found = progress(answers(model, texts, batch_size, options), len(texts), "text")
    if as_json:
        print_json(list(found))
        return
    for answer in found:
        if not answer["outputs"]:
            print_line("")
        for output in answer["outputs"]:
            line = output["text"].replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r")
            print_line(f"{output['score']:.4f}\t{line}" if scores else line)


@click.command(cls=Command)
@click.option(
    "--model",
    required=True,
    metavar="FOLDER|ID",
    help="A checkpoint folder, or a Hugging Face hub id.",
)
@click.option("--num-beams", type=click.IntRange(1), help="1 is greedy search.  [default: 1]")
@click.option(
    "--num-return-sequences", type=click.IntRange(1), help="Sequences for each text.  [default: 1]"
)
@click.option(
    "--stop",
    "stop_strings",
    multiple=True,
    metavar="TEXT",
    help="A sequence ends behind this; may be given several times.",
)
@click.option("--scores", is_flag=True, help="A score and a tab before each sequence.")
@shared_options
def generate(
    model: str,
    texts: tuple[str, ...],
    file: str | None,
    dtype: str,
    device: str | None,
    batch_size: int,
    as_json: bool,
    scores: bool,
    stop_strings: tuple[str, ...],
    **options: Any,
) -> None:
    """Continue TEXTS with a model.

    Options of the search that are not given are the model's own (generation_config.json),
    else as shown.

    Prints what was generated, without the text itself, in the order of the texts: one line each
    (line breaks as \\n, backslashes as \\\\), more with --num-return-sequences. A blank text gives
    a blank line. Without TEXTS or --file, standard input is read.
    """  # fmt: skip
    lines = read_texts(texts, file)
    options["stop_strings"] = stop_strings or None
    report(open_model(model, device, dtype), lines, batch_size, options, as_json, scores)
