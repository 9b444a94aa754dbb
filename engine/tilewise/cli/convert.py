"""tilewise convert: a checkpoint folder written again, in another dtype if asked."""

from pathlib import Path

import click

from .console import Command
from .generate import DTYPES
from .info import describe


@click.command(cls=Command, short_help="Write a model to another folder or in another dtype.")
@click.argument("source", metavar="FOLDER|ID")
@click.argument("target", type=click.Path(file_okay=False, path_type=Path))
@click.option(
    "--dtype", type=click.Choice(DTYPES), help="By default the one that most weights have."
)
@click.option("--strict-finite", is_flag=True, help="NaN and infinite weights are an error.")
@click.option("--verify", is_flag=True, help="First compare FOLDER with the sums saved in it.")
def convert(
    source: str, target: Path, dtype: str | None, strict_finite: bool, verify: bool
) -> None:
    """Write the model at FOLDER|ID to the folder TARGET as safetensors.

    transformers reads what it writes of every family that transformers has.
    """
    from ..errors import ArgumentError
    from ..pretrained import load

    if target.exists() and any(target.iterdir()):
        raise ArgumentError(f"{target} is not empty; name a new folder")
    dtype = dtype or stored_dtype(source)
    model = load(source, dtype=dtype, strict_finite=strict_finite, verify=verify)
    model.save(target)
    count = sum(parameter.numel() for parameter in model.parameters())
    click.echo(f"{target}: {model.config.model_type}, {count:,} parameters in {dtype}")


def stored_dtype(source: str) -> str:
    """The dtype that most of a checkpoint's weights have."""
    stored = describe(source)[1]["stored"]
    return max(DTYPES, key=lambda name: stored.get(name, 0))
