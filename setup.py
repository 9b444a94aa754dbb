"""Builds the optional native extension `tilewise_kernels._C`; all metadata is in pyproject.toml.

TILEWISE_BUILD_EXT=0 leaves the extension out, =1 makes it an error when it cannot be built;
otherwise it is built where PyTorch and a C++ compiler are there, and left out loudly where not.
CUDA is compiled in where nvcc and a PyTorch with CUDA of the same major version are there, for
TORCH_CUDA_ARCH_LIST or else for ARCHITECTURES.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from setuptools import Extension, setup

NAME = "tilewise_kernels._C"
ARCHITECTURES = ("80", "90", "100")
CAPABILITIES: dict[str, list[str]] = {"DEFAULT": []}  # the CPU kernels are compiled once for each
if platform.machine() in ("x86_64", "AMD64"):
    CAPABILITIES |= {
        "AVX2": ["-mavx2", "-mfma", "-mf16c"],
        "AVX512": "-mavx512f -mavx512dq -mavx512vl -mavx512bw -mavx2 -mfma -mf16c".split(),
    }
# csrc/X_op.cpp is compiled once; csrc/X.cpp, its kernels, once for each capability.
OPS = sorted(Path("csrc").glob("*_op.cpp"))
CPU_KERNELS = [str(op).replace("_op.cpp", ".cpp") for op in OPS]
OPENMP = ["-fopenmp"] if sys.platform == "linux" else []
# GCC 12 calls its own AVX-512 intrinsics uninitialised.
CXX_FLAGS = ["-O3", "-g0", "-Wno-maybe-uninitialized", "-Wno-uninitialized", *OPENMP]
CXX_FLAGS += ["-fvisibility=hidden"]
# PyTorch's build turns the half types' own conversions off, which csrc uses.
HALF = ("HALF_CONVERSIONS", "BFLOAT16_CONVERSIONS", "HALF_OPERATORS", "HALF2_OPERATORS")
NVCC_FLAGS = ["-O3", *(f"-U__CUDA_NO_{name}__" for name in HALF)]


def shout(message: str) -> None:
    print(f"\n{'*' * 80}\ntilewise: {message}\n{'*' * 80}\n", file=sys.stderr, flush=True)


def nvcc_says(option: str) -> str:
    return subprocess.run(["nvcc", option], capture_output=True, text=True, check=True).stdout


def cuda_build(torch_cuda: str | None) -> tuple[list[str], str] | None:
    """nvcc's flags and the architectures they name, or None where CUDA is left out."""
    if torch_cuda is None:
        return None
    if shutil.which("nvcc") is None:
        shout("nvcc is not on PATH: building without CUDA kernels.")
        return None
    release = re.search(r"release (\d+)", nvcc_says("--version"))
    if release is None or release[1] != torch_cuda.split(".")[0]:
        shout(
            f"nvcc is {release and release[1]} but PyTorch has CUDA {torch_cuda}: building "
            "without CUDA kernels. Put the nvcc of that major version on PATH."
        )
        return None
    if wanted := os.environ.get("TORCH_CUDA_ARCH_LIST"):  # cpp_extension turns it into flags
        return NVCC_FLAGS, wanted
    known = nvcc_says("--list-gpu-arch").split()
    targets = [arch for arch in ARCHITECTURES if f"compute_{arch}" in known]
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in targets]
    flags.append(f"-gencode=arch=compute_{targets[-1]},code=compute_{targets[-1]}")
    return [*NVCC_FLAGS, "--threads=2", *flags], ";".join(targets) + "+PTX"


def native_extension(required: bool) -> dict[str, Any]:
    """setup()'s arguments for the extension; raises ImportError or OSError where it cannot be."""
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None:
        raise OSError(f"there is no C++ compiler: {compiler} is not on PATH")

    class BuildNative(BuildExtension):
        """Adds the CPU kernels to the extension, once per CPU capability."""

        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except (RuntimeError, OSError) as error:
                if required:
                    raise
                shout(f"the native extension did not compile and is left out: {error}")

        def build_extension(self, ext: Extension) -> None:
            # After the ops and in this order: of an inline function in several objects the linker
            # keeps the first, which must not be one for a CPU that may not be there.
            jobs = [(ext, name, kernel) for name in CAPABILITIES for kernel in CPU_KERNELS]
            with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
                ext.extra_objects = list(pool.map(self.compile, *zip(*jobs, strict=True)))
            super().build_extension(ext)

        def compile(self, ext: Extension, capability: str, kernel: str) -> str:
            folder = Path(self.build_temp, capability, Path(kernel).stem)  # build.ninja lies there
            compiled = folder / Path(kernel).with_suffix(".o")
            newest = max(os.path.getmtime(f) for f in (kernel, "setup.py", *ext.depends))
            if not compiled.exists() or compiled.stat().st_mtime < newest:
                define = [f"-DCPU_CAPABILITY={capability}", f"-DCPU_CAPABILITY_{capability}"]
                self.compiler.compile(
                    [kernel],
                    output_dir=str(folder),
                    include_dirs=ext.include_dirs,
                    extra_postargs=[*cxx, *CAPABILITIES[capability], *define],
                    depends=ext.depends,
                )
            return str(compiled)

    cxx, kind = list(CXX_FLAGS), CppExtension
    sources = ["csrc/ops.cpp", *map(str, OPS)]
    if "AVX2" in CAPABILITIES:
        cxx.append("-DTILEWISE_WITH_X86")
    nvcc: list[str] = []
    if cuda := cuda_build(torch.version.cuda):
        nvcc, built_for = cuda
        cxx += ["-DTILEWISE_WITH_CUDA", f'-DTILEWISE_CUDA_ARCHITECTURES="{built_for}"']
        sources += sorted(str(file) for file in Path("csrc").glob("*.cu"))
        kind = CUDAExtension
    extension = kind(
        NAME,
        sources,
        depends=sorted(str(file) for file in Path("csrc").glob("*.h")),
        extra_compile_args={"cxx": cxx, "nvcc": nvcc},
        extra_link_args=OPENMP,
        optional=not required,
    )
    return {"ext_modules": [extension], "cmdclass": {"build_ext": BuildNative}}


def extension_or_nothing() -> dict[str, Any]:
    wish = os.environ.get("TILEWISE_BUILD_EXT", "")
    if wish not in ("", "0", "1"):
        raise SystemExit(f"TILEWISE_BUILD_EXT is {wish!r}; it takes 0, 1 or nothing")
    if wish == "0":
        return {}
    try:
        return native_extension(required=wish == "1")
    except (ImportError, OSError) as error:
        if wish == "1":
            raise
        shout(
            f"the native extension is left out: {error}.\nEverything works without it, slower. For "
            "it, install PyTorch and a C++ compiler\nand use pip install --no-build-isolation."
        )
        return {}


setup(**extension_or_nothing())
