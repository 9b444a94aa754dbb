"""Copies a checkpoint's tensors into a model's, by a table that a family writes.

Names, shapes and dtypes are compared in full by check_weights before any data is read; then
fill_weights streams the values into a new model, straight into its memory.
"""

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tilewise.checkpoints.reading import TensorInfo, WeightFiles, described, listed, shown
from tilewise.errors import CheckpointError

READERS = 2  # threads: most time goes to mapping the pages of new memory, which they share


@dataclass(frozen=True)
class WeightRule:
    """One line of the table: `target` of the model comes from `source` of the checkpoint.

    `transform` takes the source tensors in order and returns the target's values: a transpose, a
    slice of a fused projection. It also runs on meta tensors, to learn the shape it makes. Without
    it the sources are taken as they are. Several tensors, of sources or in the tuple that it
    returns, are put one below the other: rows of a fused projection. `inverse` gives the sources'
    values, a tuple, from the target's.
    """

    target: str
    source: str | tuple[str, ...]
    transform: Callable[..., Tensor | tuple[Tensor, ...]] | None = None
    inverse: Callable[[Tensor], tuple[Tensor, ...]] | None = None

    @property
    def sources(self) -> tuple[str, ...]:
        return (self.source,) if isinstance(self.source, str) else self.source

    def parts(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The target's values, each part's rows below those of the part before."""
        made = self.transform(*tensors) if self.transform else tensors
        return made if isinstance(made, tuple) else (made,)

    def apply(self, *tensors: Tensor) -> Tensor:
        parts = self.parts(*tensors)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def shape(self, infos: Iterable[TensorInfo]) -> tuple[int, ...]:
        """The shape of what `apply` would make, without torch.cat, which on meta tensors first
        imports torch's compiler: seconds and 150 MB.

        Raises RuntimeError, IndexError or ValueError for tensors that the rule cannot take.
        """
        stand_ins = (torch.empty(i.shape, dtype=i.dtype, device="meta") for i in infos)
        shapes = [part.shape for part in self.parts(*stand_ins)]
        if len(shapes) == 1:
            return shapes[0]
        (rest,) = {shape[1:] for shape in shapes}  # else a ValueError
        return (sum(shape[0] for shape in shapes), *rest)

    def split(self, values: Tensor) -> tuple[Tensor, ...]:
        """The sources' values, in order, of the target's: the way back."""
        return self.inverse(values) if self.inverse else (values,)


def read_copies(
    rules: Iterable[WeightRule], tied: Mapping[str, str], names: Collection[str]
) -> tuple[list[WeightRule], dict[str, str]]:
    """`rules` and `tied` for a file of these names, which may hold one of two tied tensors.

    Some writers drop the embedding and keep the head; what reads the one then reads the other.
    """
    instead = {other: name for name, other in tied.items() if name in names and other not in names}
    table = [replace(r, source=instead[r.source]) if r.source in instead else r for r in rules]
    return table, {name: other for name, other in tied.items() if other not in instead}


def check_weights(
    target: Mapping[str, Tensor],
    weights: WeightFiles,
    rules: Iterable[WeightRule],
    *,
    ignore: Collection[str] = (),
    tied: Mapping[str, str] | None = None,
) -> None:
    """Raises CheckpointError unless the file fits `target`, which may lie on the meta device.

    `target`: the model's tensors, as from state_dict(); one without a rule must share its memory
    with one that has a rule. `ignore`: names the file may hold that the model has no use for.
    `tied`: {name: other} for names that may repeat another one (the head of a tied model); when the
    file has them they must be equal bit for bit. Floating-point values fit every floating-point
    dtype, others their own alone. The error lists up to ten missing, unexpected and unfitting names
    each.
    """
    table = list(rules)
    tied = tied or {}
    repeated = [name for name in tied if name in weights.tensors]
    known = {name for rule in table for name in rule.sources} | set(ignore) | set(repeated)
    problems = [
        *problem("missing", missing(target, weights, table)),
        *problem("unexpected", sorted(map(shown, weights.tensors.keys() - known))),
        *problem("not fitting", [m for rule in table if (m := misfit(target, weights, rule))]),
        *problem("not tied", [m for n in repeated if (m := untied(weights, n, tied[n]))]),
    ]
    if problems:
        raise CheckpointError(
            f"The weights in {weights.folder} do not fit the model that its config describes:\n"
            + "\n".join(problems)
            + "\nPut the config.json and the weights of one and the same model there"
        )


def fill_weights(
    target: Mapping[str, Tensor], weights: WeightFiles, rules: Iterable[WeightRule]
) -> list[str]:
    """Streams the file into `target`, a new model's tensors, which check_weights has passed.

    Floating-point values are cast to the target's dtype. Returns the names, as the file has them,
    of tensors with NaN or infinite values once they are of that dtype. Memory grows, for each of
    READERS, by one piece and by the sources of the largest rule with a transform. Raises
    CheckpointError when reading fails, the target half filled.
    """
    table = [(target[rule.target], rule) for rule in rules]
    sizes = [
        want.itemsize * sum(math.prod(weights.tensors[name].shape) for name in rule.sources)
        for want, rule in table
        if staged(want, rule)
    ]
    most = max(sizes, default=0)
    stages = [torch.empty(most, dtype=torch.uint8, device="cpu") for _ in range(READERS)]

    @torch.no_grad()
    def filled(line: tuple[Tensor, WeightRule]) -> list[str]:
        want, rule = line
        stage = stages.pop()
        try:
            fill(want, weights, rule, stage)
        finally:  # the next line may begin before the error is known
            stages.append(stage)
        return [] if finite(want) else odd_sources(want.dtype, weights, rule)

    with ThreadPoolExecutor(READERS) as pool:
        odd = [name for names in pool.map(filled, table) for name in names]
    return list(dict.fromkeys(odd))


def staged(want: Tensor, rule: WeightRule) -> bool:
    """Whether the target's memory has the sources' values in another order than the file."""
    return rule.transform is not None or not want.is_contiguous()


def fill(want: Tensor, weights: WeightFiles, rule: WeightRule, stage: Tensor) -> None:
    """One line of the table. `stage`: bytes of room for its sources, which the next overwrites."""
    shapes = [weights.tensors[name].shape for name in rule.sources]
    sizes = [math.prod(shape) for shape in shapes]
    moved = staged(want, rule)
    whole = stage[: want.itemsize * sum(sizes)].view(want.dtype) if moved else want.view(-1)
    rooms = whole.split(sizes)
    for name, room in zip(rule.sources, rooms, strict=True):
        weights.read_into(name, room)
    if moved:
        want.copy_(rule.apply(*map(Tensor.view, rooms, shapes)))


def odd_sources(dtype: torch.dtype, weights: WeightFiles, rule: WeightRule) -> list[str]:
    """Which sources of a tensor that is not finite are to blame: they are read once more."""
    return [
        name
        for name in rule.sources
        if not all(finite(piece.to(dtype)) for piece in weights.pieces(name))
    ]


def finite(values: Tensor) -> bool:
    """By the two extremes, which NaN is in too: much cheaper than asking each value."""
    if not values.is_floating_point() or not values.numel():
        return True
    return all(math.isfinite(extreme) for extreme in values.aminmax())


def problem(kind: str, items: list[str], most: int = 10) -> list[str]:
    if not items:
        return []
    more = [f"... and {len(items) - most:,} more"] if len(items) > most else []
    return [f"  {len(items):,} {kind}: " + "; ".join(items[:most] + more)]


def missing(
    target: Mapping[str, Tensor], weights: WeightFiles, table: list[WeightRule]
) -> list[str]:
    """Source names the file lacks, and targets that no rule reaches, not even by shared memory."""
    wanted = dict.fromkeys(name for rule in table for name in rule.sources)
    filled = {memory_of(target[rule.target]) for rule in table if rule.target in target}
    ruled = {rule.target for rule in table}
    absent = [shown(name) for name in wanted if name not in weights.tensors]
    unfilled = [
        f"a source for the model's {shown(name)}"
        for name, tensor in target.items()
        if name not in ruled and memory_of(tensor) not in filled
    ]
    return absent + unfilled


def memory_of(tensor: Tensor) -> int:
    """One number per storage; unlike an address it also tells meta tensors apart."""
    return tensor.untyped_storage()._cdata


def misfit(target: Mapping[str, Tensor], weights: WeightFiles, rule: WeightRule) -> str | None:
    """What is wrong with the shape or dtype that `rule` would give its target, or None."""
    if any(name not in weights.tensors for name in rule.sources):
        return None  # reported as missing
    infos = [weights.tensors[name] for name in rule.sources]
    found = ", ".join(described(info.dtype, info.shape) for info in infos)
    text = f"{listed(rule.sources)} is {found}"
    if rule.target not in target:
        return f"{text}, but the model has no {shown(rule.target)}"
    want = target[rule.target]
    try:
        fits = rule.shape(infos) == want.shape
    except (RuntimeError, IndexError, ValueError):  # the rule met a shape it cannot take
        fits = False
    if fits and all(converts(info.dtype, want.dtype) for info in infos):
        return None
    return f"{text}, but {shown(rule.target)} of the model is {described(want.dtype, want.shape)}"


def converts(have: torch.dtype, want: torch.dtype) -> bool:
    return have == want or (have.is_floating_point and want.is_floating_point)


def untied(weights: WeightFiles, name: str, other: str) -> str | None:
    if other not in weights.tensors:
        return f"{shown(name)} is there and {shown(other)} is not"
    first, second = weights.tensors[name], weights.tensors[other]
    if (first.dtype, first.shape) == (second.dtype, second.shape):
        pairs = zip(weights.pieces(name), weights.pieces(other), strict=True)
        if all(torch.equal(raw_bytes(a), raw_bytes(b)) for a, b in pairs):
            return None
    return f"{shown(name)} differs from {shown(other)}, and the model has one tensor for both"


def raw_bytes(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)
