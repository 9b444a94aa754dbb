"""tilewise convert: a checkpoint folder written again, in another dtype if asked."""

from pathlib import Path

import click

from .console import Command
from .generate import DTYPES


@click.command(cls=Command, short_help="Write a model to another folder or in another dtype.")
@click.argument("source", metavar="FOLDER|ID")
@click.argument("target", type=click.Path(file_okay=False, path_type=Path))
@click.option("--dtype", type=click.Choice(DTYPES), default="float32", show_default=True)
def convert(source: str, target: Path, dtype: str) -> None:
    """Write the model at FOLDER|ID to the folder TARGET as safetensors that transformers reads."""
    from ..errors import ArgumentError
    from ..pretrained import load

    if target.exists() and any(target.iterdir()):
        raise ArgumentError(f"{target} is not empty; name a new folder")
    model = load(source, dtype=dtype)
    model.save(target)
    count = sum(parameter.numel() for parameter in model.parameters())
    click.echo(f"{target}: {model.config.model_type}, {count:,} parameters in {dtype}")
