"""Tile sizes of the Triton kernels, as tables to read and to change."""

from typing import NamedTuple

import torch

# -- attention -----------------------------------------------------------------------------------


class AttentionConfig(NamedTuple):
    """Queries and keys of a tile, warps of a program and depth of the load pipeline."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# What a score tile has to bear: one diagonal and lengths at most; a mask, bias, window, softcap,
# ALiBi or dropout; either of these in packed sequences.
ATTENTION_LOADS = ("plain", "heavy", "packed")

# (kernel, architecture, "half" | "float32") -> padded head dim -> a tile for each load.
# They began as the defaults PyTorch's own templates use on an H100 and were shrunk until ahead-of-
# time compilation showed no spilled register and the right tensor-core instruction (benches/aot.py
# repeats that): a heavy tile takes registers, so the columns differ. Two exceptions: float32
# above head dim 64 spills, and on sm_100 the heavy dk, dv row at 256 spills up to 64 bytes.
# 80 serves every chip without wgmma or tcgen05 and stays within the 99 KB of the small ones.
Tile = tuple[int, int, int, int]
ATTENTION: dict[tuple[str, int, str], dict[int, tuple[Tile, Tile, Tile]]] = {
    ("forward", 80, "half"): {
        32: ((128, 64, 4, 3), (128, 64, 8, 3), (128, 64, 4, 3)),
        64: ((128, 64, 4, 3), (128, 64, 8, 2), (128, 64, 8, 3)),
        128: ((128, 64, 8, 2), (64, 64, 8, 2), (128, 64, 8, 2)),
        256: ((64, 64, 8, 1), (64, 32, 8, 2), (64, 64, 8, 1)),
    },
    ("backward_dq", 80, "half"): {
        32: ((128, 64, 8, 3), (128, 64, 8, 3), (128, 64, 8, 3)),
        64: ((128, 64, 8, 3), (64, 32, 4, 3), (128, 64, 8, 3)),
        128: ((128, 32, 8, 2), (64, 64, 8, 2), (128, 32, 8, 2)),
        256: ((64, 32, 8, 1), (64, 16, 8, 2), (64, 32, 8, 1)),
    },
    ("backward_dkv", 80, "half"): {
        32: ((64, 128, 8, 3), (32, 128, 8, 2), (32, 128, 8, 2)),
        64: ((32, 128, 8, 3), (32, 64, 8, 2), (32, 128, 8, 2)),
        128: ((16, 128, 8, 2), (32, 64, 8, 2), (32, 64, 8, 2)),
        256: ((16, 64, 8, 1), (32, 32, 8, 2), (32, 32, 8, 2)),
    },
    ("forward", 90, "half"): {
        32: ((128, 128, 8, 3), (128, 128, 8, 3), (128, 128, 8, 3)),
        64: ((128, 128, 8, 3), (128, 64, 8, 3), (128, 128, 8, 3)),
        128: ((128, 128, 8, 2), (128, 64, 8, 3), (128, 64, 8, 3)),
        256: ((128, 64, 8, 2), (128, 64, 8, 2), (64, 64, 8, 2)),
    },
    ("backward_dq", 90, "half"): {
        32: ((128, 64, 8, 3), (128, 64, 8, 3), (128, 64, 8, 3)),
        64: ((128, 64, 8, 3), (128, 64, 8, 3), (128, 64, 8, 3)),
        128: ((128, 64, 8, 3), (128, 64, 8, 3), (128, 64, 8, 3)),
        256: ((64, 64, 8, 2), (64, 32, 8, 2), (64, 64, 8, 2)),
    },
    ("backward_dkv", 90, "half"): {
        32: ((64, 128, 8, 3), (64, 128, 8, 3), (64, 128, 8, 3)),
        64: ((64, 128, 8, 3), (64, 128, 8, 2), (32, 128, 8, 3)),
        128: ((32, 128, 8, 3), (32, 128, 8, 2), (32, 64, 8, 2)),
        256: ((16, 64, 8, 2), (32, 32, 8, 2), (32, 32, 8, 2)),
    },
    ("forward", 100, "half"): {
        32: ((128, 128, 8, 3), (128, 128, 8, 3), (128, 128, 8, 3)),
        64: ((128, 128, 8, 3), (128, 64, 8, 3), (128, 64, 8, 3)),
        128: ((128, 128, 8, 2), (128, 64, 8, 3), (128, 64, 8, 2)),
        256: ((128, 64, 8, 2), (128, 32, 8, 2), (128, 64, 8, 2)),
    },
    ("backward_dq", 100, "half"): {
        32: ((128, 64, 8, 3), (128, 64, 4, 2), (128, 64, 8, 3)),
        64: ((128, 64, 8, 3), (128, 32, 8, 3), (64, 128, 8, 3)),
        128: ((128, 64, 8, 3), (128, 64, 8, 3), (128, 64, 8, 3)),
        256: ((64, 64, 8, 1), (64, 64, 8, 1), (64, 64, 8, 1)),
    },
    ("backward_dkv", 100, "half"): {
        32: ((64, 128, 8, 3), (64, 128, 8, 3), (64, 128, 8, 3)),
        64: ((64, 128, 8, 2), (32, 128, 8, 3), (64, 64, 8, 2)),
        128: ((64, 128, 8, 1), (64, 128, 8, 1), (64, 128, 8, 1)),
        256: ((32, 64, 8, 1), (16, 64, 8, 1), (16, 64, 8, 1)),
    },
    ("forward", 80, "float32"): {
        32: ((128, 32, 4, 3), (128, 32, 8, 3), (128, 32, 4, 3)),
        64: ((128, 32, 8, 3), (64, 32, 8, 1), (128, 32, 8, 3)),
        128: ((32, 32, 8, 1), (32, 32, 8, 1), (32, 32, 8, 1)),
        256: ((16, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1)),
    },
    ("backward_dq", 80, "float32"): {
        32: ((64, 32, 8, 2), (64, 32, 4, 2), (64, 32, 8, 2)),
        64: ((64, 16, 4, 2), (64, 16, 8, 2), (64, 16, 4, 2)),
        128: ((32, 16, 8, 1), (32, 16, 8, 1), (32, 16, 8, 1)),
        256: ((16, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1)),
    },
    ("backward_dkv", 80, "float32"): {
        32: ((16, 64, 4, 2), (16, 64, 8, 2), (32, 64, 8, 1)),
        64: ((32, 32, 8, 2), (32, 32, 8, 1), (32, 32, 8, 1)),
        128: ((16, 32, 8, 1), (16, 32, 8, 1), (16, 32, 8, 1)),
        256: ((16, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1)),
    },
    ("forward", 90, "float32"): {
        32: ((128, 32, 4, 3), (128, 32, 4, 3), (128, 32, 4, 3)),
        64: ((128, 32, 8, 3), (128, 32, 8, 3), (128, 32, 8, 3)),
        128: ((64, 32, 8, 1), (64, 32, 8, 1), (64, 32, 8, 1)),
        256: ((64, 16, 8, 1), (64, 16, 8, 1), (64, 16, 8, 1)),
    },
    ("backward_dq", 90, "float32"): {
        32: ((64, 64, 8, 2), (64, 64, 8, 2), (64, 64, 8, 2)),
        64: ((64, 32, 4, 2), (64, 32, 4, 2), (64, 32, 4, 2)),
        128: ((64, 16, 8, 1), (64, 16, 8, 1), (64, 16, 8, 1)),
        256: ((16, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1)),
    },
    ("backward_dkv", 90, "float32"): {
        32: ((32, 64, 4, 2), (32, 64, 8, 2), (32, 64, 4, 2)),
        64: ((32, 64, 8, 2), (16, 128, 8, 1), (16, 64, 4, 1)),
        128: ((16, 64, 8, 1), (16, 64, 8, 1), (16, 64, 8, 1)),
        256: ((16, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1)),
    },
    ("forward", 100, "float32"): {
        32: ((128, 32, 4, 3), (128, 32, 8, 3), (128, 32, 4, 3)),
        64: ((128, 32, 8, 3), (64, 64, 8, 2), (128, 32, 8, 3)),
        128: ((64, 32, 8, 1), (64, 32, 8, 1), (64, 32, 8, 1)),
        256: ((64, 16, 8, 1), (64, 16, 8, 1), (64, 16, 8, 1)),
    },
    ("backward_dq", 100, "float32"): {
        32: ((64, 64, 8, 2), (64, 64, 8, 2), (64, 64, 8, 2)),
        64: ((64, 64, 8, 2), (64, 64, 8, 2), (64, 64, 8, 2)),
        128: ((64, 16, 8, 1), (64, 16, 8, 1), (64, 16, 8, 1)),
        256: ((16, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1)),
    },
    ("backward_dkv", 100, "float32"): {
        32: ((64, 64, 8, 2), (64, 64, 8, 2), (64, 64, 8, 2)),
        64: ((32, 64, 8, 2), (32, 64, 8, 1), (32, 64, 8, 1)),
        128: ((16, 64, 8, 1), (16, 64, 8, 1), (16, 64, 8, 1)),
        256: ((16, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1)),
    },
    ("backward_dbias", 80, "half"): {
        32: ((64, 64, 4, 2), (64, 64, 4, 2), (64, 64, 4, 2)),
        64: ((128, 32, 8, 2), (128, 32, 8, 2), (128, 32, 8, 2)),
        128: ((64, 32, 8, 2), (64, 32, 8, 2), (64, 32, 8, 2)),
        256: ((32, 64, 8, 1), (32, 64, 8, 1), (32, 64, 8, 1)),
    },
    ("backward_dbias", 80, "float32"): {
        32: ((32, 32, 4, 2), (32, 32, 4, 2), (32, 32, 4, 2)),
        64: ((32, 32, 4, 2), (32, 32, 4, 2), (32, 32, 4, 2)),
        128: ((32, 32, 8, 1), (32, 32, 8, 1), (32, 32, 8, 1)),
        256: ((16, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1)),
    },
    ("backward_dbias", 90, "half"): {
        32: ((64, 64, 4, 2), (64, 64, 4, 2), (64, 64, 4, 2)),
        64: ((64, 64, 4, 2), (64, 64, 4, 2), (64, 64, 4, 2)),
        128: ((64, 64, 8, 2), (64, 64, 8, 2), (64, 64, 8, 2)),
        256: ((32, 64, 8, 1), (32, 64, 8, 1), (32, 64, 8, 1)),
    },
    ("backward_dbias", 90, "float32"): {
        32: ((32, 32, 4, 2), (32, 32, 4, 2), (32, 32, 4, 2)),
        64: ((32, 32, 4, 2), (32, 32, 4, 2), (32, 32, 4, 2)),
        128: ((32, 32, 8, 1), (32, 32, 8, 1), (32, 32, 8, 1)),
        256: ((16, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1)),
    },
    ("backward_dbias", 100, "half"): {
        32: ((64, 64, 4, 2), (64, 64, 4, 2), (64, 64, 4, 2)),
        64: ((64, 64, 4, 2), (64, 64, 4, 2), (64, 64, 4, 2)),
        128: ((64, 64, 8, 2), (64, 64, 8, 2), (64, 64, 8, 2)),
        256: ((32, 64, 8, 1), (32, 64, 8, 1), (32, 64, 8, 1)),
    },
    ("backward_dbias", 100, "float32"): {
        32: ((32, 32, 4, 2), (32, 32, 4, 2), (32, 32, 4, 2)),
        64: ((32, 32, 4, 2), (32, 32, 4, 2), (32, 32, 4, 2)),
        128: ((32, 32, 8, 1), (32, 32, 8, 1), (32, 32, 8, 1)),
        256: ((16, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1)),
    },
}

# the interpreter is slow and needs no large tile; these make short tensors span several
ATTENTION_INTERPRETED: dict[str, Tile] = {
    "forward": (32, 16, 4, 1),
    "backward_dq": (32, 16, 4, 1),
    "backward_dkv": (16, 32, 4, 1),
    "backward_dbias": (16, 32, 4, 1),
}


def attention_config(
    kernel: str, capability: int, dtype: torch.dtype, head_dim: int, load: str
) -> AttentionConfig:
    """The tile of one attention kernel.

    kernel: "forward", "backward_dq", "backward_dkv" or "backward_dbias". capability: 10 * major +
    minor, 80 or more, or 0 for Triton's interpreter. head_dim: 1 to 256, the wider of keys and
    values. load: one of ATTENTION_LOADS.
    """
    if capability == 0:
        return AttentionConfig(*ATTENTION_INTERPRETED[kernel])
    architecture = 90 if capability == 90 else 100 if 100 <= capability < 120 else 80
    precision = "float32" if dtype == torch.float32 else "half"
    width = max(32, 1 << (head_dim - 1).bit_length())
    tiles = ATTENTION[kernel, architecture, precision][width]
    return AttentionConfig(*tiles[ATTENTION_LOADS.index(load)])


# -- decode_attention ----------------------------------------------------------------------------


class DecodeConfig(NamedTuple):
    """Queries and positions of a tile, warps, pipeline depth, programs a multiprocessor holds."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    programs: int


# "half" | "float32" -> padded head dim -> (positions, warps, stages, programs). Tiles are such that
# ahead-of-time compilation spills no register (but 24 bytes of the fullest float32 row at 256, on
# sm_80), programs such that their 37 to 68 KB of shared memory fit an sm_90 or sm_100
# multiprocessor side by side. Not swept on a GPU.
DECODE: dict[str, dict[int, tuple[int, int, int, int]]] = {
    "half": {32: (128, 4, 3, 4), 64: (64, 4, 3, 4), 128: (64, 4, 2, 4), 256: (32, 4, 2, 4)},
    "float32": {32: (64, 4, 3, 4), 64: (32, 4, 3, 4), 128: (32, 8, 2, 4), 256: (16, 8, 2, 3)},
}
DECODE_INTERPRETED = (32, 4, 1, 2)
# of the kernel that adds up the splits of a query: splits of a step, warps
DECODE_COMBINE = (16, 4)


def decode_config(capability: int, dtype: torch.dtype, head_dim: int, queries: int) -> DecodeConfig:
    """The tile of the split kernel; `queries` share a key head. capability: 0 interprets."""
    block_m = min(64, max(16, 1 << (queries - 1).bit_length()))
    if capability == 0:
        return DecodeConfig(block_m, *DECODE_INTERPRETED)
    width = max(32, 1 << (head_dim - 1).bit_length())
    return DecodeConfig(block_m, *DECODE["float32" if dtype == torch.float32 else "half"][width])


# -- layer_norm ----------------------------------------------------------------------------------


class NormConfig(NamedTuple):
    """Rows and columns of a tile, and warps, of one normalisation kernel."""

    rows: int
    block_n: int
    num_warps: int


# kernel -> (longest padded row, rows per tile, warps), the first that fits. Short rows share a
# tile, so that a program has enough loads in flight; backward also holds two float32 sums.
NORM = {
    "forward": ((256, 16, 4), (512, 8, 4), (1024, 4, 4), (2048, 2, 4), (4096, 1, 4),
                (8192, 1, 8), (16384, 1, 32)),
    "backward": ((256, 16, 8), (512, 8, 8), (1024, 4, 8), (2048, 2, 8), (4096, 1, 8),
                 (8192, 1, 16)),
}  # fmt: skip
# the kernels that walk over their rows, or down a strip of columns, in blocks
NORM_BLOCKS = {
    "forward_long": NormConfig(1, 8192, 16),
    "backward_long": NormConfig(1, 8192, 16),
    "weight": NormConfig(16, 256, 8),
}


def norm_config(kernel: str, columns: int) -> NormConfig:
    """The tile for rows of `columns` elements: whole rows, padded to a power of two, for "forward"
    (up to 16384) and "backward" (up to 8192); blocks of columns for the other kernels."""
    if kernel in NORM_BLOCKS:
        return NORM_BLOCKS[kernel]
    block = max(16, 1 << (columns - 1).bit_length())
    rows, warps = next(entry[1:] for entry in NORM[kernel] if block <= entry[0])
    return NormConfig(rows, block, warps)


# -- linear_act ----------------------------------------------------------------------------------


class LinearConfig(NamedTuple):
    """Tile, order and launch parameters of the matrix product with epilogue."""

    block_m: int
    block_n: int
    block_k: int
    group_m: int
    num_warps: int
    num_stages: int


# architecture -> kind of product; an architecture that is not listed uses the one below it. Where
# K is not a multiple of BLOCK_K every load has a mask, and a large tile would spill.
LINEAR = {
    0: {  # the interpreter
        "half": LinearConfig(32, 32, 32, 2, 4, 1),
        "half, ragged": LinearConfig(32, 32, 32, 2, 4, 1),
        "float32": LinearConfig(32, 32, 32, 2, 4, 1),
    },
    80: {
        "half": LinearConfig(128, 128, 32, 8, 8, 3),
        "half, ragged": LinearConfig(128, 128, 32, 8, 8, 3),
        "float32": LinearConfig(64, 64, 32, 8, 4, 3),
    },
    90: {
        "half": LinearConfig(128, 128, 64, 8, 8, 4),
        "half, ragged": LinearConfig(128, 128, 32, 8, 8, 3),
        "float32": LinearConfig(64, 64, 32, 8, 4, 3),
    },
}


def linear_config(capability: int, dtype: torch.dtype, K: int) -> LinearConfig:
    """The tile for a GPU of `capability` (90 for sm_90; 0 for the interpreter), dtype and depth."""
    table = LINEAR[max(arch for arch in LINEAR if arch <= capability)]
    if dtype == torch.float32:
        return table["float32"]
    return table["half, ragged" if K % table["half"].block_k else "half"]


# -- adamw ---------------------------------------------------------------------------------------

ADAMW = (2048, 16)  # elements and warps of a program


# -- between two products ------------------------------------------------------------------------

# kernel -> elements and warps of a program
ACTIVATION = {"forward": (1024, 4), "backward": (1024, 4)}


# -- rotary --------------------------------------------------------------------------------------


class RotaryConfig(NamedTuple):
    """Tokens of a tile, heads that a program turns one after another, and warps."""

    tokens: int
    heads: int
    num_warps: int


# whether pairs lie side by side -> elements of a tile at most (a thread then holds 32 of them),
# heads, warps
ROTARY = {False: (4096, 4, 4), True: (4096, 4, 4)}


def rotary_config(tokens: int, width: int, interleaved: bool) -> RotaryConfig:
    """The tile for sequences of `tokens` and rows of `width` columns."""
    elements, heads, warps = ROTARY[interleaved]
    most = max(1, 1 << (elements // width).bit_length() - 1)
    return RotaryConfig(min(most, 1 << max(tokens - 1, 0).bit_length()), heads, warps)


# -- log_softmax, cross_entropy ------------------------------------------------------------------


class WalkConfig(NamedTuple):
    """Rows of a tile, columns of a step along them, and warps."""

    rows: int
    block_n: int
    num_warps: int


# (kernel, whether a row needs several steps) -> elements of a tile, warps. Rows that fit a tile
# share it.
WALK = {
    ("log_softmax forward", False): (2048, 4),
    ("log_softmax forward", True): (4096, 8),
    ("log_softmax backward", False): (2048, 4),
    ("log_softmax backward", True): (4096, 8),
    ("cross_entropy losses", False): (2048, 4),
    ("cross_entropy losses", True): (4096, 8),
    ("cross_entropy dlogits", False): (2048, 4),
    ("cross_entropy dlogits", True): (4096, 8),
}


def walk_config(kernel: str, columns: int) -> WalkConfig:
    """The tile of a kernel that walks along whole rows of `columns` elements."""
    width = max(16, 1 << (columns - 1).bit_length())
    elements, warps = WALK[kernel, False]
    if width <= elements:
        return WalkConfig(elements // width, width, warps)
    elements, warps = WALK[kernel, True]
    return WalkConfig(1, min(width, elements), warps)


# The k largest of rows that are cut into pieces. Of a piece: columns at least, warps (twice as
# many for larger ones); of the kernel that joins the pieces: their most, warps.
TOPK = {"piece": (2048, 4), "join": (64, 4)}
