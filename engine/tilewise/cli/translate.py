"""tilewise translate: beam search with a sequence-to-sequence model."""

from typing import Any

import click

from .console import Command, read_texts
from .generate import open_model, report, shared_options

DEFAULT_BEAMS = 4


@click.command(cls=Command)
@click.option(
    "--model",
    default="dates",
    show_default=True,
    metavar="FOLDER|ID",
    help="A checkpoint folder, a hub id, or the English to Japanese dates model.",
)
@click.option(
    "--num-beams",
    type=click.IntRange(1),
    help=f"Beams.  [default: {DEFAULT_BEAMS}, or --n-best when that is more]",
)
@click.option(
    "--n-best",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Translations of each text, each behind its score and a tab.",
)
@shared_options
def translate(
    model: str,
    texts: tuple[str, ...],
    file: str | None,
    dtype: str,
    device: str | None,
    batch_size: int,
    as_json: bool,
    num_beams: int | None,
    n_best: int,
    **options: Any,
) -> None:
    """Translate TEXTS, one line each, in their order.

    Options of the search that are not given are the model's own (generation_config.json),
    else as shown; --num-beams and --n-best are always as shown.

    Without TEXTS or --file, standard input is read. A blank text gives a blank line.
    """  # fmt: skip
    from ..errors import ArgumentError

    lines = read_texts(texts, file)
    opened = open_model(model, device, dtype)
    if not opened.config.is_seq2seq:
        raise ArgumentError(
            f"{model} is no sequence-to-sequence model; to continue texts with a decoder, use "
            "tilewise generate"
        )
    options["num_beams"] = num_beams or max(DEFAULT_BEAMS, n_best)
    options["num_return_sequences"] = n_best
    report(opened, lines, batch_size, options, as_json, scores=n_best > 1)
