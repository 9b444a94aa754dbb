"""Which table entries of configs.py `make gpu` sweeps, and the launches that time them.

A Knob is one entry: how to write a candidate into the table, and the launches that then use it.
They are built on meta tensors to be compiled, and on the GPU to be timed.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tilewise_kernels import (
    activation_triton,
    adamw_triton,
    attention_triton,
    configs,
    cross_entropy_triton,
    decode_attention_triton,
    linear_act_triton,
    log_softmax_triton,
    norm_triton,
    rotary_triton,
)
from tilewise_kernels.attention_backward_triton import backward_launches
from tilewise_kernels.attention_tiles_triton import Call
from tilewise_kernels.launch import Launch

Values = tuple[int, ...]
# of each attention kernel, in the order in which they run
OUTPUTS = {
    "forward": "out_ptr",
    "backward_dq": "dq_ptr",
    "backward_dkv": "dk_ptr",
    "backward_dbias": "dbias_ptr",
}


class Knob(NamedTuple):
    """One table entry. title, text(values): as configs.py has it. output: the name of an argument
    of the last launch, or of a tensor that it reaches through a table."""

    title: str
    entry: Values
    candidates: list[Values]
    put: Callable[[Values], None]
    launches: Callable[[str], list[Launch]]
    output: str
    text: Callable[[Values], str] = str

    def at(self, values: Values, device: str) -> list[Launch]:
        """The launches with `values` in the table, which then gets its entry back."""
        self.put(values)
        launches = self.launches(device)
        self.put(self.entry)
        return launches

    def found(self, launches: list[Launch]) -> Tensor:
        """The output, once all the launches have run."""
        last = launches[-1]
        tensors = last.tensors if isinstance(last, Stepping) else last.arguments
        return tensors[self.output]


def table_knob(
    title: str, table: Any, key: Any, around: Iterator[Values], output: str,
    launches: Callable[[str], list[Launch]],
) -> Knob:  # fmt: skip
    """The entry table[key] of a table of plain tuples; around: its candidates, and itself."""
    entry = table[key]
    candidates = [values for values in around if values != entry]
    return Knob(title, entry, candidates, lambda v: table.__setitem__(key, v), launches, output)


def knobs(architecture: int, dry_run: bool) -> Iterator[Knob]:
    """Every entry that is swept, the most important first; architecture 0 is the interpreter."""
    small = architecture == 0 or dry_run
    for head_dim, masked in ((128, False), (64, False), (128, True), (64, True)):
        for kernel in ("forward", "backward_dkv", "backward_dq"):
            yield attention_knob(kernel, architecture, head_dim, masked, small)
    for columns in (4096, 1024, 8192):
        for kernel in ("forward", "backward"):
            yield norm_knob(kernel, columns, small)
    for head_dim in (128, 64):
        yield decode_knob(architecture, head_dim, small)
    for kernel in ("losses", "dlogits", "forward", "backward"):
        yield walk_knob(kernel, small)
    yield linear_knob(architecture, small)
    yield rotary_knob(small)
    for kernel in ("forward", "backward"):
        yield activation_knob(kernel, small)
    yield topk_knob(small)
    yield adamw_knob(small)
    yield attention_knob("backward_dbias", architecture, 64, True, small)


def warm_launches(architecture: int) -> Iterator[tuple[str, Launch]]:
    """What the benches launch and no knob does, on meta tensors."""
    for head_dim, kernel in itertools.product((64, 128), OUTPUTS):
        launch = attention_launch(kernel, "meta", architecture, head_dim, False, False, False)
        yield f"attention {kernel} D{head_dim} full", launch
    for columns, kernel in itertools.product((2048, 16384), ("forward", "backward")):
        yield f"layer_norm {kernel} N{columns}", norm_launch(kernel, "meta", columns, False)


def drawing(device: str) -> Callable[..., Tensor]:
    """normal(*shape): from N(0, 1), the same each time; float16 where the interpreter runs."""
    generator = None if device == "meta" else torch.Generator(device).manual_seed(0)
    dtype = torch.float16 if device == "cpu" else torch.bfloat16
    return lambda *shape: torch.randn(shape, generator=generator, device=device).to(dtype)


# -- attention -----------------------------------------------------------------------------------


def attention_knob(kernel: str, arch: int, head_dim: int, masked: bool, small: bool) -> Knob:
    table_arch = 90 if arch == 90 else 100 if 100 <= arch < 120 else 80
    load = "heavy" if masked else "plain"
    column = configs.ATTENTION_LOADS.index(load)

    def put(values: Values) -> None:
        tile = configs.AttentionConfig(*values)
        if arch == 0:
            configs.ATTENTION_INTERPRETED[kernel] = tile
            return
        table = configs.ATTENTION[kernel, table_arch, "half"]
        row = list(table[head_dim])
        row[column] = tile
        table[head_dim] = (row[0], row[1], row[2])

    entry = configs.attention_config(kernel, arch, torch.bfloat16, head_dim, load)
    return Knob(
        f'ATTENTION["{kernel}", {table_arch}, "half"][{head_dim}][{column}]',
        tuple(entry),
        list(tiles_around(entry, most_changes=1 if masked else 2)),
        put,
        lambda device: [attention_launch(kernel, device, arch, head_dim, True, masked, small)],
        OUTPUTS[kernel],
    )


def tiles_around(entry: configs.AttentionConfig, most_changes: int) -> Iterator[Values]:
    """Half and double tiles, both numbers of warps, one stage more and less."""
    m, n, warps, stages = entry
    shapes = [(1, 1), (0.5, 1), (2, 1), (1, 0.5), (1, 2), (2, 0.5), (0.5, 2)]
    for (fm, fn), w, s in itertools.product(shapes, (4, 8), (stages, stages - 1, stages + 1)):
        tile = (int(m * fm), int(n * fn), w, s)
        changes = sum(a != b for a, b in zip(tile, entry, strict=True))
        if 0 < changes <= most_changes and s >= 1 and all(16 <= side <= 256 for side in tile[:2]):
            yield tile


def attention_launch(
    kernel: str, device: str, arch: int, head_dim: int, causal: bool, masked: bool, small: bool
) -> Launch:
    """One kernel on [B, H, S, D]; on a real device those before it have run."""
    b, h, s = (1, 2, 64) if small else (4, 2048 // head_dim, 4096)
    normal = drawing(device)
    q, k, v, grad, out = (normal(b, h, s, head_dim) for _ in range(5))
    lse = torch.empty(b, h, s, device=device)
    mask = None
    if masked:
        mask = torch.ones(b, 1, s, s, dtype=torch.bool, device=device).tril().expand(b, h, s, s)
    scale = head_dim**-0.5
    bias = normal(1, h, s, s) if kernel == "backward_dbias" else None
    terms = (mask, bias, None, None, None)
    call = Call(arch, q, k, v, *terms, causal, -1, -1, 0.0, scale, 0.0)
    gradients: list[Tensor | None] = [torch.empty_like(q) for _ in range(3)]
    launches = attention_triton.forward_launches(call, out, lse)
    gradients.append(None if bias is None else torch.empty_like(bias))
    launches += backward_launches(call, grad, out, lse, gradients)
    names = [launch.kernel.__name__ for launch in launches]
    place = names.index(f"{kernel}_kernel")
    if device != "meta":
        for launch in launches[:place]:
            launch.run(q.device)
    return launches[place]


# -- layer_norm ----------------------------------------------------------------------------------


def norm_knob(kernel: str, columns: int, small: bool) -> Knob:
    table = configs.NORM[kernel]
    rows, _, warps = configs.norm_config(kernel, columns)
    around = itertools.product((rows, rows * 2, rows // 2), (warps, warps * 2, warps // 2))
    candidates: list[Values] = [
        (r, w) for r, w in around if (r, w) != (rows, warps) and r >= 1 and 1 <= w <= 32
    ]

    def put(values: Values) -> None:
        rest = tuple(line for line in table if line[0] != columns)
        configs.NORM[kernel] = tuple(sorted((*rest, (columns, *values))))  # type: ignore[assignment]

    return Knob(
        f'NORM["{kernel}"], {columns} columns',
        (rows, warps),
        candidates,
        put,
        lambda device: [norm_launch(kernel, device, columns, small)],
        "y_ptr" if kernel == "forward" else "dx_ptr",
        lambda values: str((columns, *values)),
    )


def norm_launch(kernel: str, device: str, columns: int, small: bool) -> Launch:
    norm_triton.load(vars(norm_triton))
    m = 32 if small else 32768
    normal = drawing(device)
    x, grad = normal(m, columns), normal(m, columns)
    weight, bias = torch.ones(2, columns, dtype=x.dtype, device=device)
    y, dx = torch.empty_like(x), torch.empty_like(x)
    mean, rstd = torch.zeros(m, 1, device=device), torch.ones(m, 1, device=device)
    if kernel == "forward":
        outputs = (y, x.new_empty(0), mean, rstd)
        return norm_triton.forward_launch(
            x, None, weight, bias, None, 1e-5, 0.0, outputs, rms=False
        )
    programs = 264 if device == "meta" else norm_triton.partial_rows(m, columns, x.device)
    partial: list[Any] = list(torch.empty(2, programs, columns, device=device))
    return next(
        norm_triton.backward_launches(
            grad, None, x, weight, mean, rstd, None, 0.0, dx, None, partial
        )
    )


# -- linear_act ----------------------------------------------------------------------------------


def linear_knob(arch: int, small: bool) -> Knob:
    table_arch = max(known for known in configs.LINEAR if known <= arch)
    entry = configs.LINEAR[table_arch]["half"]

    def put(values: Values) -> None:
        configs.LINEAR[table_arch]["half"] = configs.LinearConfig(*values)

    sides = ((128, 128), (128, 256), (256, 128), (64, 256))
    tried = itertools.product(sides, ((64, 4), (64, 3), (32, 4)), (8, 4))
    candidates: list[Values] = [(m, n, k, 8, w, s) for (m, n), (k, s), w in tried]
    return Knob(
        f'LINEAR[{table_arch}]["half"]',
        tuple(entry),
        [c for c in candidates if c != tuple(entry)],
        put,
        lambda device: [linear_launch(device, arch, small)],
        "y_ptr",
        lambda values: f"LinearConfig{values}",
    )


def linear_launch(device: str, arch: int, small: bool) -> Launch:
    linear_act_triton.load(vars(linear_act_triton))
    m, k, n = (64, 64, 64) if small else (8192, 1024, 4096)
    normal = drawing(device)
    x, w = normal(m, k), normal(n, k)
    y = torch.empty(m, n, dtype=x.dtype, device=device)
    return linear_act_triton.linear_launch(arch, x, w * k**-0.5, w[:, 0], "gelu", y, None)


# -- decode_attention ----------------------------------------------------------------------------


def decode_knob(arch: int, head_dim: int, small: bool) -> Knob:
    return table_knob(
        f'DECODE["half"][{head_dim}]',
        configs.DECODE["half"],
        head_dim,
        itertools.product((32, 64, 128), (4, 8), (2, 3), (2, 4)),
        "out_ptr",
        lambda device: decode_launches(device, arch, head_dim, small),
    )


def decode_launches(device: str, arch: int, head_dim: int, small: bool) -> list[Launch]:
    """Groups of 4 queries on caches [R, Hkv, T, D]."""
    decode_attention_triton.load(vars(decode_attention_triton))
    r, hkv, t = (1, 2, 96) if small else (16, 8, 8192)
    normal = drawing(device)
    q = normal(r, 4 * hkv, 1, head_dim)
    k, v = normal(r, hkv, t, head_dim), normal(r, hkv, t, head_dim)
    lengths = torch.full((r,), t, device=device)
    processors = 132 if device == "meta" else decode_attention_triton.multiprocessors(q.device)
    terms = (None, None, head_dim**-0.5, None, -1, None)
    call = decode_attention_triton.Call(arch, processors, q, k, v, lengths, *terms)
    out = torch.empty_like(q)
    splits = decode_attention_triton.split_positions(call)[0]
    part = torch.empty(r * hkv, splits, 4, head_dim, device=device)
    lse = torch.empty(r * hkv, splits, 4, device=device)
    return [
        decode_attention_triton.split_launch(call, out, part, lse),
        decode_attention_triton.combine_launch(part, lse, out),
    ]


# -- log_softmax, cross_entropy ------------------------------------------------------------------


WALKS = {
    "forward": ("log_softmax", "y_ptr"),
    "backward": ("log_softmax", "dx_ptr"),
    "losses": ("cross_entropy", "losses_ptr"),
    "dlogits": ("cross_entropy", "dlogits_ptr"),
}


def walk_knob(kernel: str, small: bool) -> Knob:
    op, output = WALKS[kernel]
    return table_knob(
        f'WALK["{op} {kernel}", True]',
        configs.WALK,
        (f"{op} {kernel}", True),
        itertools.product((2048, 4096, 8192), (4, 8, 16)),
        output,
        lambda device: [walk_launch(kernel, device, small)],
    )


def walk_launch(kernel: str, device: str, small: bool) -> Launch:
    """One of the four kernels on [M, V]."""
    for module in (log_softmax_triton, cross_entropy_triton):
        module.load(vars(module))
    m, v = (4, 5000) if small else (8192, 32000)
    normal = drawing(device)
    x, y = normal(m, v), normal(m, v)
    target = torch.arange(m, device=device)
    losses, weight = torch.empty(m, device=device), torch.ones((), device=device)
    statistics = torch.ones(m, 2, device=device)
    options = (-100, 0.0, 0.0)
    if kernel == "forward":
        return log_softmax_triton.forward_launch(x, y)
    if kernel == "backward":
        return log_softmax_triton.backward_launch(x, y, torch.empty_like(x))
    if kernel == "losses":
        return cross_entropy_triton.losses_launch(x, target, losses, statistics, *options)
    return cross_entropy_triton.dlogits_launch(weight, x, target, statistics, y, *options)


def topk_knob(small: bool) -> Knob:
    return table_knob(
        'TOPK["piece"]',
        configs.TOPK,
        "piece",
        itertools.product((1024, 2048, 4096), (2, 4, 8)),
        "scores_ptr",
        lambda device: topk_launches(device, small),
    )


def topk_launches(device: str, small: bool) -> list[Launch]:
    log_softmax_triton.load(vars(log_softmax_triton))
    m, v, k = (2, 5000, 8) if small else (256, 50257, 8)
    x = drawing(device)(m, v)
    scores = torch.empty(m, k, device=device)
    ids = torch.empty(m, k, dtype=torch.int64, device=device)
    return list(log_softmax_triton.topk_launches(x, k, scores, ids))


# -- rotary, activation --------------------------------------------------------------------------


def rotary_knob(small: bool) -> Knob:
    return table_knob(
        "ROTARY[False]",
        configs.ROTARY,
        False,
        itertools.product((2048, 4096, 8192), (1, 4, 8), (4, 8)),
        "yq_ptr",
        lambda device: [rotary_launch(device, small)],
    )


def rotary_launch(device: str, small: bool) -> Launch:
    """[B, S, H, D] as a projection leaves it, four queries to a key head."""
    rotary_triton.load(vars(rotary_triton))
    b, s, h = (1, 16, 4) if small else (8, 4096, 32)
    normal = drawing(device)
    q, k = (normal(b, s, heads, 128).transpose(1, 2) for heads in (h, h // 4))
    cos, sin = normal(1, s, 64), normal(1, s, 64)
    outputs = torch.empty_like(q), torch.empty_like(k)
    return rotary_triton.rotary_launch(q, k, cos, sin, False, False, outputs)


def activation_knob(kernel: str, small: bool) -> Knob:
    return table_knob(
        f'ACTIVATION["{kernel}"]',
        configs.ACTIVATION,
        kernel,
        itertools.product((512, 1024, 2048, 4096), (4, 8)),
        "a_ptr" if kernel == "forward" else "dh_ptr",
        lambda device: [activation_launch(kernel, device, small)],
    )


def activation_launch(kernel: str, device: str, small: bool) -> Launch:
    """A gated SiLU on [M, F]."""
    activation_triton.load(vars(activation_triton))
    normal = drawing(device)
    m, f = (4, 1100) if small else (8192, 11008)
    h, g, da = normal(m, f), normal(m, f), normal(m, f)
    outputs = {f"{name}_ptr": torch.empty_like(h) for name in ("a", "dh", "dg")}
    if kernel == "forward":
        pointers = {"g_ptr": g, "a_ptr": outputs["a_ptr"]}
        return activation_triton.activation_launch(pointers, h, None, "silu", 0.0)
    return activation_triton.activation_launch(
        {"da_ptr": da, "g_ptr": g} | outputs, h, None, "silu", 0.0
    )


# -- adamw ---------------------------------------------------------------------------------------


class Stepping(Launch):
    """A launch whose kernel finds its tensors by the addresses in a table; they live as long."""

    tensors: dict[str, Tensor]


def adamw_knob(small: bool) -> Knob:
    return table_knob(
        "ADAMW",
        vars(adamw_triton),
        "ADAMW",
        itertools.product((1024, 2048, 4096), (4, 8, 16)),
        "param",
        lambda device: [adamw_launch(device, small)],
    )


def adamw_launch(device: str, small: bool) -> Stepping:
    """One float32 parameter of N elements."""
    adamw_triton.load(vars(adamw_triton))
    n = 5000 if small else 1 << 27
    normal = drawing(device)
    names = ("param", "grad", "exp_avg", "exp_avg_sq")
    tensors = {name: normal(n).float().abs() for name in names}
    kind = adamw_triton.Kind(torch.float32, torch.float32, False, True)
    coefficients = torch.tensor([0.1, 0.5, 1.0], dtype=torch.float64, device=device)
    programs = -(-n // adamw_triton.ADAMW[0])
    row = (*(t.data_ptr() for t in tensors.values()), 0, n, 0, programs)
    places = torch.tensor(row, device=device)
    owners = torch.zeros(programs, dtype=torch.int64, device=device)
    hyper = (0.9, 0.999, 1e-8, 1e-3)
    launch = Stepping(*adamw_triton.adamw_launch(places, owners, coefficients, kind, *hyper))
    launch.tensors = tensors
    return launch
