"""Write the table of README.md: what is proved of every checkpoint family, and how closely.

    python benches/family_table.py [--readme FILE] [--check]

Runs the tests that are marked feature(name); a family's cell holds the worst figure that they
recorded, or yes. Nothing is written when one of them fails. A dash means that there is no such
test, which is so only where the feature makes no sense. --check runs none: it compares the rows,
columns and dashes with the families and tests there are; exit code 1 when they differ.
"""

import argparse
import contextlib
import io
import sys
from pathlib import Path
from types import ModuleType

import pytest
from report import BEGIN, END, table, write_between_markers

from tilewise.families import FAMILIES

ROOT = Path(__file__).parents[1]
HEADS = {  # a feature's name in the tests, and above its column
    "logits": "logits off by",
    "gradients": "gradients off by",
    "bfloat16": "bfloat16 error",
    "folder": "saved for",
    "generate": "`generate`",
    "score": "`score`",
    "embed": "`embed`",
    "fill_mask": "`fill_mask`",
    "next_sentence": "`next_sentence`",
    "attention maps": "attention maps",
}
ONLY_SOME = ("generate", "score", "fill_mask", "next_sentence")  # all else makes sense everywhere
FORMATS = {"logits": "{:.0e}", "gradients": "{:.0e}", "bfloat16": "{:.2f}x"}
Cell = tuple[str, str]  # family, feature


class Evidence:
    """A pytest plugin: which tests prove which cell, and what they recorded."""

    def __init__(self) -> None:
        self.cell_of: dict[str, Cell] = {}
        self.figures: dict[Cell, list[float]] = {}

    def pytest_collection_modifyitems(self, items: list[pytest.Function]) -> None:
        for item in items:
            if (mark := item.get_closest_marker("feature")) is not None:
                feature, *kinds = mark.args
                kind = kinds[0] if kinds else item.callspec.params["raw"]["model_type"]
                self.cell_of[item.nodeid] = name_of(FAMILIES[kind]), feature

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" and report.passed:
            found = self.figures.setdefault(self.cell_of[report.nodeid], [])
            found += [value for name, value in report.user_properties if name == "off"]


def name_of(family: ModuleType) -> str:
    """The model types that a family opens: a row's first cell."""
    return ", ".join(f"`{kind}`" for kind in family.MODEL_TYPES)


def gathered(*options: str) -> Evidence:
    """What pytest finds and, unless options say otherwise, what its tests measure."""
    files = [str(f) for f in (ROOT / "tests/engine").glob("test_*.py")
             if "pytest.mark.feature" in f.read_text()]  # fmt: skip
    evidence, told = Evidence(), io.StringIO()
    with contextlib.redirect_stdout(told):
        code = pytest.main(
            [*files, "-q", "-m", "feature", "--rootdir", str(ROOT), *options], [evidence]
        )
    if code:
        raise SystemExit(f"{told.getvalue()}\nno table: the tests do not pass")
    return evidence


def text(feature: str, family: ModuleType, figures: list[float] | None) -> str:
    """One cell."""
    if figures is None:
        return "-"
    if feature == "folder":
        return "transformers" if family.EXAMPLES else "tilewise"
    return FORMATS[feature].format(max(figures)) if feature in FORMATS else "yes"


def rows(figures: dict[Cell, list[float]]) -> list[list[str]]:
    """A row per family, in the order of their files."""
    families = dict.fromkeys(FAMILIES.values())
    return [
        [name_of(f), *(text(feature, f, figures.get((name_of(f), feature))) for feature in HEADS)]
        for f in families
    ]


def wrong(lines: list[list[str]], cells: set[Cell]) -> list[str]:
    """What of a table's cells (the heads first) is not as the families and their tests say."""
    heads, *body = lines
    found = [] if heads == ["family", *HEADS.values()] else [f"the heads are {heads}"]
    names = [row[0] for row in body]
    every = [name_of(family) for family in dict.fromkeys(FAMILIES.values())]
    found += [] if names == every else [f"the families are {names}, not {every}"]
    for name, *row in body:
        for feature, cell in zip(HEADS, row, strict=True):
            if not cell or (cell == "-") == ((name, feature) in cells):
                found.append(f"{name} {feature} is {cell!r}")
            if cell == "-" and feature not in ONLY_SOME:
                found.append(f"{name} has no test of {feature}")
    return found


def split(markdown: str) -> list[list[str]]:
    """The cells of the table between the markers, without its rule."""
    lines = markdown.partition(BEGIN)[2].partition(END)[0].strip().splitlines()
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in lines
        if line.startswith("|") and not line.startswith("| ---")
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    evidence = gathered(*["--collect-only"] * arguments.check)
    if not arguments.check:
        written = table(["family", *HEADS.values()], rows(evidence.figures))
        write_between_markers(arguments.readme, written)
    lines = split(arguments.readme.read_text())
    differ = wrong(lines, set(evidence.cell_of.values())) if lines else ["there is no table"]
    for each in differ:
        print(f"{arguments.readme}: {each}")
    return int(bool(differ))


if __name__ == "__main__":
    sys.exit(main())
