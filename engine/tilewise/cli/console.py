"""How the commands talk: exit codes, errors in one line, one JSON document, texts in and out."""

import json
import math
import os
import re
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NoReturn

import click

RUNTIME_ERROR, INTERRUPTED = 1, 130


class Program(click.Group):
    """A click group whose exit codes are those of this package's docstring."""

    def main(self, args: Sequence[str] | None = None, *more: Any, **extra: Any) -> NoReturn:
        """Run a command line (sys.argv when args is None) and exit."""
        _open_closed_streams()
        _never_fail_to_print()
        extra["standalone_mode"] = False
        try:
            code = super().main(args, *more, **extra)
            sys.stdout.flush()
        except click.Abort:
            code = INTERRUPTED
        except click.ClickException as error:
            error.show()
            code = error.exit_code
        except BrokenPipeError:  # the reader left; nothing more may go to stdout, at exit neither
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            code = RUNTIME_ERROR
        except OSError as error:  # a full disk, a folder that cannot be written to
            click.echo(f"error: {error}", err=True)
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            code = RUNTIME_ERROR
        sys.exit(code if isinstance(code, int) else 0)


class Command(click.Command):
    """A command that turns errors on purpose, and memory running out, into one line on stderr."""

    def invoke(self, ctx: click.Context) -> Any:
        import torch

        from ..errors import TilewiseError

        try:
            return super().invoke(ctx)
        except (TilewiseError, torch.OutOfMemoryError, MemoryError) as error:
            problem = " ".join(str(error).split())
        except RuntimeError as error:  # torch has no type of its own for the CPU's memory
            if "DefaultCPUAllocator" not in str(error):
                raise
            problem = "out of memory: pass something smaller"
        click.echo(f"error: {problem}", err=True)
        ctx.exit(RUNTIME_ERROR)


def _open_closed_streams() -> None:
    """Streams that the shell closed (<&-) are empty ones; Python has None in their place."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))


def _never_fail_to_print() -> None:
    """Characters that the terminal's encoding lacks are escaped; warnings take one line."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        click.echo(f"warning: {' '.join(str(message).split())}", err=True)

    warnings.showwarning = show


def print_json(document: Any) -> None:
    """One JSON document on stdout, as readable as stdout's encoding allows."""
    readable = (sys.stdout.encoding or "").lower().startswith("utf")
    click.echo(json.dumps(document, ensure_ascii=not readable, allow_nan=False, indent=2))


def progress(items: Iterable[Any], total: int | None, unit: str) -> Any:
    """The items, with a progress bar on stderr when that is a terminal."""
    from tqdm import tqdm

    return tqdm(items, total=total, unit=unit, disable=not sys.stderr.isatty(), leave=False)


def print_line(line: str) -> None:
    """A line on stdout; a progress bar on the same terminal makes room for it."""
    from tqdm import tqdm

    with tqdm.external_write_mode():
        click.echo(line)


def read_texts(arguments: Sequence[str], file: str | None) -> list[str]:
    """The texts to work on: the arguments, or the lines of a file, or those of stdin ("-").

    Raises UsageError when there is no or more than one source, and ClickException when the bytes
    are not UTF-8.
    """
    _check_source(arguments, file)
    if arguments:
        return list(arguments)
    name = "-" if file is None else file
    with click.open_file(name, "rb") as stream:
        content = stream.read()
    try:
        lines = content.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        where = "standard input" if name == "-" else name
        raise click.ClickException(f"{where} is not UTF-8 text (byte {error.start})") from error
    if lines[-1] == "":
        lines.pop()
    return [line.removesuffix("\r") for line in lines]


def read_records(
    arguments: Sequence[str], file: str | None, fields: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """{"text": ...} of each argument, line of a file, or line of stdin ("-"), one at a time.

    Lines of a .jsonl file, and lines of stdin that start with a brace, are JSON objects with a
    "text"; those of the named fields that they have are strings, and others are kept as they are.
    Blank lines are left out. Raises UsageError when there is no or more than one source,
    ClickException naming the line that is neither.
    """
    _check_source(arguments, file)
    if arguments:
        return ({"text": text} for text in arguments)
    return _records("-" if file is None else file, fields)


def _check_source(arguments: Sequence[str], file: str | None) -> None:
    if arguments and file is not None:
        raise click.UsageError("give texts or --file, not both")
    if not arguments and file is None and sys.stdin.isatty():
        raise click.UsageError("give texts, --file FILE, or lines on standard input")


def _records(name: str, fields: Sequence[str]) -> Iterator[dict[str, Any]]:
    with click.open_file(name, "rb") as stream:
        for number, raw in enumerate(stream, 1):
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise click.ClickException(f"line {number} of {name} is not UTF-8 text") from error
            is_json = name.endswith(".jsonl") or (name == "-" and line.startswith("{"))
            if line.strip():
                yield (
                    _record(line, f"line {number} of {name}", fields) if is_json else {"text": line}
                )


def _finite(number: str) -> float:
    """A number of JSON, or one of the constants that Python adds to it."""
    value = float(number)
    if not math.isfinite(value):
        raise ValueError(f"{number[:80]} is no finite number")
    return value


def _record(line: str, where: str, fields: Sequence[str]) -> dict[str, Any]:
    try:
        found = json.loads(line, parse_float=_finite, parse_constant=_finite)
    except (ValueError, RecursionError) as error:
        raise click.ClickException(f"{where} is not JSON: {error}") from error
    if not isinstance(found, dict) or "text" not in found:
        raise click.ClickException(f'{where} must be a JSON object with a "text"')
    for name in fields:
        if not isinstance(found.get(name, ""), str):
            given = repr(found[name])[:80]
            raise click.ClickException(f'{where}: "{name}" is {given}; it must be a string')
    return found


def usable_device(name: str | None) -> str:
    """The device to work on: the one named, else the GPU when there is one.

    Raises UsageError for what is no device, ArgumentError for one that this machine lacks.
    """
    import torch

    from ..errors import ArgumentError

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:[0-9]{1,3})?", name):
        raise click.UsageError(f"--device is {name!r}; pass cpu, cuda or cuda:NUMBER")
    here = torch.cuda.device_count() if torch.cuda.is_available() else 0
    index = int(name.partition(":")[2] or 0)
    if name != "cpu" and index >= here:
        raise ArgumentError(f"--device is {name}, but torch sees {here} GPUs here; pass cpu")
    return name
