"""tilewise info: what is installed, what the machine can do, which implementation each op uses."""

import dataclasses
import math
import platform
import warnings
from typing import TYPE_CHECKING, Any

import click

from .console import Command, print_json

if TYPE_CHECKING:
    from ..config import AnyConfig

FLAGS = ("avx2", "avx512_f", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16")
DTYPES = {"cpu": ("float32", "bfloat16", "float16", "float64"),
          "cuda": ("float32", "bfloat16", "float16")}  # fmt: skip


def _installed(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def versions() -> dict[str, Any]:
    """Versions, and why triton's kernels cannot run where they cannot."""
    import torch

    from tilewise_kernels import lazy_triton

    return {
        "tilewise": _installed("tilewise") or "not installed: run from its sources",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _installed("triton"),
        "triton_missing": lazy_triton.missing(),
    }


def cpu() -> dict[str, Any]:
    """The processor, what torch's kernels use of it, and its threads."""
    import torch

    from tilewise_kernels.measure import machine

    known: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return {
        "name": machine("cpu"),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "flags": [flag for flag in FLAGS if known.get(flag)],
        "threads": torch.get_num_threads(),
    }


def gpus() -> list[dict[str, Any]]:
    """Name, memory [bytes] and compute capability of each GPU that torch sees."""
    import torch

    found = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        of = torch.cuda.get_device_properties(index)
        capability = f"{of.major}.{of.minor}"
        found.append({"name": of.name, "memory": of.total_memory, "capability": capability})
    return found


def ops(device: str) -> list[dict[str, Any]]:
    """What each op would run at its benchmark's shape, by dtype, and why nothing else."""
    import torch

    from tilewise_kernels import explain
    from tilewise_kernels.bench_cases import CASES
    from tilewise_kernels.errors import ArgumentError
    from tilewise_kernels.op import Explanation

    found = []
    for case in CASES.values():
        made = case.make(case.shape, case.options, device, torch.float32)
        for dtype in DTYPES[device]:
            kind = getattr(torch, dtype)
            inputs = {
                name: value.to(kind)
                if isinstance(value, torch.Tensor) and value.is_floating_point()
                else value
                for name, value in made.items()
            }
            with torch.no_grad(), warnings.catch_warnings(action="ignore"):
                try:
                    told = explain(case.ours, inputs, case.options)
                except ArgumentError as error:  # a dtype that the op does not take
                    told = Explanation(case.op, "nothing", {"any": str(error)})
            found.append({
                "op": case.op, "device": device, "dtype": dtype,
                "implementation": told.implementation, "others": told.others,
            })  # fmt: skip
    return found


def _text(document: dict[str, Any]) -> str:
    v, c, native = document["versions"], document["cpu"], document["native"]
    triton = v["triton_missing"] or v["triton"]
    lines = [
        f"tilewise  {v['tilewise']}  (python {v['python']}, torch {v['torch']})",
        f"triton    {triton}",
        f"cpu       {c['name']}, {c['threads']} threads, torch uses {c['capability']}"
        f" ({', '.join(c['flags']) or 'no flags known'})",
    ]
    lines += [
        f"gpu       {g['name']}, {g['memory'] / 2**30:.0f} GiB, capability {g['capability']}"
        for g in document["gpus"]
    ] or ["gpu       none"]
    built = ", ".join(f"{name} {value}" for name, value in native["build"].items() if value)
    lines += [f"native    {native['missing'] or built}", ""]
    return "\n".join(lines + _op_lines(document["ops"]))


def _op_lines(told: list[dict[str, Any]]) -> list[str]:
    """One line per op, device and answer, with the dtypes that share it; reasons below."""
    shared: dict[tuple[str, str], list[str]] = {}
    for op in told:
        answer = f"{op['op']:<17} {op['device']:<5} {op['implementation']:<10} "
        reasons = "".join(f"\n    not {name}: {why}" for name, why in op["others"].items())
        shared.setdefault((answer, reasons), []).append(op["dtype"])
    return [answer + " ".join(dtypes) + why for (answer, why), dtypes in shared.items()]


def describe(source: str) -> tuple["AnyConfig", dict[str, Any]]:
    """What a checkpoint is: family, configuration, parameters by dtype; see pretrained.inspect."""
    from ..pretrained import inspect

    config, tensors = inspect(source)
    counts: dict[str, int] = {}
    for found in tensors.values():
        name = str(found.dtype).removeprefix("torch.")
        counts[name] = counts.get(name, 0) + math.prod(found.shape)
    return config, {"model": source, "config": config.to_dict(), "tensors": len(tensors),
                    "stored": counts}  # fmt: skip


def _said(config: "AnyConfig") -> dict[str, Any]:
    """The fields of a configuration that are not as by default."""
    values = {field: getattr(config, field.name) for field in dataclasses.fields(config)}
    return {field.name: value for field, value in values.items() if value != field.default}


@click.command(cls=Command, short_help="Versions and the machine, or what a model is.")
@click.argument("model", required=False, metavar="[MODEL]")
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
def info(model: str | None, as_json: bool) -> None:
    """Versions, the machine, and which implementation each op uses; or what MODEL is.

    MODEL is a checkpoint folder or a Hugging Face hub id, of whose weights the headers alone are
    fetched. Of its configuration the fields that differ from the defaults are shown; --json has
    all.
    """
    if model is not None:
        config, told = describe(model)
        if as_json:
            print_json(told)
            return
        stored = ", ".join(f"{count:,} {dtype}" for dtype, count in told["stored"].items())
        click.echo(f"{model}: {told['tensors']} tensors, {stored} values")
        for name, value in _said(config).items():
            click.echo(f"  {name:<26} {value}")
        return
    from tilewise_kernels import native

    found = gpus()
    document = {
        "versions": versions(),
        "cpu": cpu(),
        "gpus": found,
        "native": {"build": native.build_info(), "missing": native.missing()},
        "ops": [entry for device in ("cpu", *["cuda"][: len(found)]) for entry in ops(device)],
    }
    if as_json:
        print_json(document)
    else:
        click.echo(_text(document))
