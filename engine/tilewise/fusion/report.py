"""What fuse() says it did, and the way back."""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple


class Replaced(NamedTuple):
    """A module that now runs our ops; its class before and after."""

    path: str
    old: str
    new: str


class Skipped(NamedTuple):
    """A module that could have run our ops but was left as it is."""

    path: str
    type: str
    reason: str


@dataclass
class FusionReport:
    """What fuse() did. max_difference: the largest over the example's outputs, None without one."""

    replaced: list[Replaced] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    max_difference: float | None = None
    undo: list[Callable[[], None]] = field(default_factory=list, repr=False)

    def revert(self) -> None:
        """Make every replaced module what it was. Weights stay as they are now."""
        while self.undo:
            self.undo.pop()()

    def __str__(self) -> str:
        lines = [f"{len(self.replaced)} modules replaced, {len(self.skipped)} skipped; "]
        if not (self.replaced or self.skipped):
            lines[0] += "nothing in this model is known to fuse(), see help(tilewise.fusion)"
        elif self.max_difference is None:
            lines[0] += "outputs not compared: no example was given"
        else:
            lines[0] += f"outputs differ by at most {self.max_difference:.1e}"
        done = [(_pattern(r.path), r.old, f"-> {r.new}") for r in self.replaced]
        left = [(_pattern(s.path), s.type, f"skipped: {s.reason}") for s in self.skipped]
        rows = [(str(n), *row) for row, n in Counter(done + left).items()]
        if rows:
            rows.insert(0, ("n", "module, with * for any number", "its class", "what it is now"))
        widths = [max((len(row[i]) for row in rows), default=0) for i in range(3)]
        for count, *texts in rows:
            cells = [text.ljust(width) for text, width in zip(texts, widths[1:], strict=False)]
            lines.append(f"{count.rjust(widths[0])}  {'  '.join([*cells, texts[2]])}")
        return "\n".join(lines)


def _pattern(path: str) -> str:
    """A path with its layer numbers as stars; the model itself is (model)."""
    return re.sub(r"(^|\.)\d+", r"\1*", path) or "(model)"
