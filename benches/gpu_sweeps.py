"""Which table entries of configs.py `make gpu` sweeps, and the launches that time them.

A Knob is one entry: how to write a candidate into the table, and a launch that then uses it. The
launch is built on meta tensors to be compiled, and on the GPU to be timed.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tilewise_kernels import attention_triton, configs, linear_act_triton, norm_triton
from tilewise_kernels.attention_backward_triton import backward_launches
from tilewise_kernels.attention_tiles_triton import Call
from tilewise_kernels.launch import Launch

Values = tuple[int, ...]
# of each attention kernel, in the order in which they run
OUTPUTS = {"forward": "out_ptr", "backward_dq": "dq_ptr", "backward_dkv": "dk_ptr"}


class Knob(NamedTuple):
    """One table entry. title, text(values): as configs.py has it. output: an argument's name."""

    title: str
    entry: Values
    candidates: list[Values]
    put: Callable[[Values], None]
    launch: Callable[[str], Launch]
    output: str
    text: Callable[[Values], str]

    def at(self, values: Values, device: str) -> Launch:
        """The launch with `values` in the table, which then gets its entry back."""
        self.put(values)
        launch = self.launch(device)
        self.put(self.entry)
        return launch


def knobs(architecture: int, dry_run: bool) -> Iterator[Knob]:
    """Every entry that is swept, the most important first; architecture 0 is the interpreter."""
    small = architecture == 0 or dry_run
    for head_dim, masked in ((128, False), (64, False), (128, True), (64, True)):
        for kernel in ("forward", "backward_dkv", "backward_dq"):
            yield attention_knob(kernel, architecture, head_dim, masked, small)
    yield linear_knob(architecture, small)
    for columns in (4096, 1024, 8192):
        for kernel in ("forward", "backward"):
            yield norm_knob(kernel, columns, small)


def warm_launches(architecture: int) -> Iterator[tuple[str, Launch]]:
    """What the benches launch and no knob does, on meta tensors."""
    for head_dim, kernel in itertools.product((64, 128), OUTPUTS):
        launch = attention_launch(kernel, "meta", architecture, head_dim, False, False, False)
        yield f"attention {kernel} D{head_dim} full", launch
    for columns, kernel in itertools.product((2048, 16384), ("forward", "backward")):
        yield f"layer_norm {kernel} N{columns}", norm_launch(kernel, "meta", columns, False)


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
        lambda device: attention_launch(kernel, device, arch, head_dim, True, masked, small),
        OUTPUTS[kernel],
        str,
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
    generator = None if device == "meta" else torch.Generator(device).manual_seed(0)
    dtype = torch.float16 if device == "cpu" else torch.bfloat16

    def normal() -> Tensor:
        drawn = torch.randn(b, h, s, head_dim, generator=generator, device=device)
        return drawn.to(dtype)

    q, k, v, grad, out = normal(), normal(), normal(), normal(), normal()
    lse = torch.empty(b, h, s, device=device)
    mask = None
    if masked:
        mask = torch.ones(b, 1, s, s, dtype=torch.bool, device=device).tril().expand(b, h, s, s)
    scale = head_dim**-0.5
    terms = (mask, None, None, None, None)
    call = Call(arch, q, k, v, *terms, causal, -1, -1, 0.0, scale, 0.0)
    gradients: list[Tensor | None] = [torch.empty_like(q) for _ in range(3)]
    launches = attention_triton.forward_launches(call, out, lse)
    launches += backward_launches(call, grad, out, lse, [*gradients, None])
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
        lambda device: norm_launch(kernel, device, columns, small),
        "y_ptr" if kernel == "forward" else "dx_ptr",
        lambda values: str((columns, *values)),
    )


def norm_launch(kernel: str, device: str, columns: int, small: bool) -> Launch:
    norm_triton.load(vars(norm_triton))
    m = 32 if small else 32768
    dtype = torch.float16 if device == "cpu" else torch.bfloat16
    generator = None if device == "meta" else torch.Generator(device).manual_seed(0)
    x, grad = (
        torch.randn(m, columns, generator=generator, device=device).to(dtype) for _ in range(2)
    )
    weight, bias = torch.ones(2, columns, dtype=dtype, device=device)
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
        lambda device: linear_launch(device, arch, small),
        "y_ptr",
        lambda values: f"LinearConfig{values}",
    )


def linear_launch(device: str, arch: int, small: bool) -> Launch:
    linear_act_triton.load(vars(linear_act_triton))
    m, k, n = (64, 64, 64) if small else (8192, 1024, 4096)
    dtype = torch.float16 if device == "cpu" else torch.bfloat16
    generator = None if device == "meta" else torch.Generator(device).manual_seed(0)
    x, w = (torch.randn(rows, k, generator=generator, device=device).to(dtype) for rows in (m, n))
    y = torch.empty(m, n, dtype=dtype, device=device)
    return linear_act_triton.linear_launch(arch, x, w * k**-0.5, w[:, 0], "gelu", y, None)
