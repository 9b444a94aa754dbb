"""The command line: tilewise info, bench, generate, translate, score, embed, fill-mask, convert.

Results go to stdout, everything else to stderr. Exit codes: 0 done, 1 an error of ours or of the
machine, 2 wrong usage, 130 interrupted. The modules here import torch and the engine only once a
command runs, so that --help and usage errors answer at once.
"""

import click

from .bench import bench
from .console import Program
from .convert import convert
from .generate import generate
from .info import info
from .scoring import embed, fill_mask, score
from .translate import translate

__all__ = ["main"]


@click.group(cls=Program, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="tilewise", message="%(package)s %(version)s")
def main() -> None:
    """Fused Transformer kernels, and the models that run on them."""


for _command in (info, bench, generate, translate, score, embed, fill_mask, convert):
    main.add_command(_command)
