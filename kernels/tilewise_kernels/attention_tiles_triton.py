"""What the attention kernels share: which score tiles a program visits, and what hides in a tile.

    score = scale q k^T, bent to softcap tanh(score / softcap) if there is a softcap,
            + bias + float mask - slope |i + shift - j|            with shift = Sk - Sq
    query i attends key j where  j < key_length, the bool mask is True,
                                 i + shift - left <= j <= i + shift + right

Shapes as in attention_triton.py. Causality is right = 0; an unbounded side, like every feature that
a call does not use, is None and leaves no trace in the compiled code.

Which tiles. Without a bool mask the visited tiles of a row of tiles are one run, of which a middle
part needs no comparison at all. Under a bool mask two small kernels make a list per row of tiles:
first the tiles where every query attends every key, which cost what a plain tile costs, then those
where some do; the others are never visited. A list belongs to a batch item or head only where the
mask (or key_lengths) does.

Packed sequences. With cu_q the tensors are [1, heads, total, width] and sequence b is rows cu_q[b]
to cu_q[b + 1] of it; a program finds its sequence by itself, so that no length reaches the host.
"""

# mypy: allow-untyped-defs
# (Triton kernels have no Python types)

from __future__ import annotations  # tl.constexpr below is not evaluated at import

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import dropout
from .configs import attention_config
from .dropout import kept_at, mixed_rows
from .launch import Launch, padded, strides
from .lazy_triton import jit, load

tl: Any = None  # triton.language once load() has run


# ---- tiles in memory ---------------------------------------------------------------------------


@jit
def load_tile(
    ptr, rows, row_end, stride_row, stride_col,
    WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr, CHECK_ROWS: tl.constexpr,
):  # fmt: skip
    """Tile [rows, BLOCK_WIDTH]; rows from row_end on (if checked) and columns past WIDTH are 0."""
    cols = tl.arange(0, BLOCK_WIDTH)
    ptrs = ptr + rows.to(tl.int64)[:, None] * stride_row + cols.to(tl.int64)[None, :] * stride_col
    if CHECK_ROWS:
        if WIDTH == BLOCK_WIDTH:
            tile = tl.load(ptrs, mask=rows[:, None] < row_end, other=0.0)
        else:
            keep = (rows[:, None] < row_end) & (cols[None, :] < WIDTH)
            tile = tl.load(ptrs, mask=keep, other=0.0)
    else:
        if WIDTH == BLOCK_WIDTH:
            tile = tl.load(ptrs)
        else:
            tile = tl.load(ptrs, mask=cols[None, :] < WIDTH, other=0.0)
    return tile


@jit
def store_tile(
    ptr, tile, rows, row_end, batch, head, heads, start,
    WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Write rows below row_end into one head of a contiguous [B, heads, row_end, WIDTH] tensor, or
    of [total, heads, WIDTH] when sequences are packed, where this one begins at row `start`."""
    cols = tl.arange(0, BLOCK_WIDTH)
    if PACKED:
        ptr += (start * heads + head) * WIDTH
        ptrs = ptr + rows.to(tl.int64)[:, None] * (heads * WIDTH) + cols[None, :]
    else:
        ptr += (batch * heads + head) * row_end * WIDTH
        ptrs = ptr + rows.to(tl.int64)[:, None] * WIDTH + cols[None, :]
    keep = (rows[:, None] < row_end) & (cols[None, :] < WIDTH)
    tl.store(ptrs, tile.to(ptr.dtype.element_ty), mask=keep)


# ---- where a program works ---------------------------------------------------------------------


@jit
def cut(cu_ptr, item, total, exists):
    """(first row, number of rows) of packed sequences; what cu_seqlens says is held to 0..total."""
    first = tl.minimum(tl.maximum(tl.load(cu_ptr + item, mask=exists, other=0), 0), total)
    end = tl.minimum(tl.maximum(tl.load(cu_ptr + item + 1, mask=exists, other=0), first), total)
    return first.to(tl.int64), (end - first).to(tl.int32)


@jit
def locate(
    cu_q_ptr, cu_k_ptr, sequences, heads, Sq, Sk,
    BLOCK: tl.constexpr, OVER_KEYS: tl.constexpr, SEQUENCES: tl.constexpr,
):  # fmt: skip
    """(block, blocks, head, batch, first query row, Sq, first key row, Sk) of this program.

    Grid: blocks of one head (fastest), heads, batch. With packed sequences: block slots of all
    sequences one after the other, then heads; slots that are left over get lengths 0.
    """
    if cu_q_ptr is not None:
        total = Sk if OVER_KEYS else Sq
        slots = tl.cdiv(total, BLOCK) + sequences
        slot = tl.program_id(0) % slots
        head = (tl.program_id(0) // slots).to(tl.int64)
        items = tl.arange(0, SEQUENCES)
        _, lengths = cut(cu_k_ptr if OVER_KEYS else cu_q_ptr, items, total, items < sequences)
        tiles = tl.cdiv(lengths, BLOCK)
        before = tl.cumsum(tiles, 0) - tiles
        mine = (before <= slot) & (slot < before + tiles)
        found = tl.sum(mine.to(tl.int32), 0) > 0
        batch = tl.sum(tl.where(mine, items, 0), 0).to(tl.int64)
        block = tl.sum(tl.where(mine, slot - before, 0), 0)
        blocks = tl.maximum(tl.sum(tl.where(mine, tiles, 0), 0), 1)  # a spare slot: block 0 of 1
        q_start, Sq = cut(cu_q_ptr, batch, Sq, found)
        k_start, Sk = cut(cu_k_ptr, batch, Sk, found)
    else:
        blocks = tl.cdiv(Sk if OVER_KEYS else Sq, BLOCK)
        block = tl.program_id(0) % blocks
        head = (tl.program_id(0) // blocks % heads).to(tl.int64)
        batch = (tl.program_id(0) // blocks // heads).to(tl.int64)
        q_start = batch * 0
        k_start = batch * 0
    return block, blocks, head, batch, q_start, Sq, k_start, Sk


@jit
def first_row(batch, head, heads, start, length, total, PACKED: tl.constexpr):
    """Where a head's rows begin in lse and delta."""
    if PACKED:
        row = head * total + start
    else:
        row = (batch * heads + head) * length
    return row


@jit
def dropout_rows(seed_ptr, batch, head, heads, length, queries, PACKED: tl.constexpr):
    """mixed_rows of these queries, which dropout numbers (batch heads + head) length + query, or
    batch 2^32 + head length + query when packed: the other sequences do not matter."""
    if PACKED:
        row = (batch << 32) + head * length
    else:
        row = (batch * heads + head) * length
    return mixed_rows(tl.load(seed_ptr), row + queries)


@jit
def count_keys(lengths_ptr, batch, stride_lengths, Sk):
    """Number of keys that exist for this batch item."""
    key_end = Sk
    if lengths_ptr is not None:
        length = tl.load(lengths_ptr + batch * stride_lengths)
        key_end = tl.minimum(tl.maximum(length, 0), Sk).to(tl.int32)
    return key_end


@jit
def key_range(
    first_query, key_end, shift, left, right,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PLAIN: tl.constexpr,
):  # fmt: skip
    """(first, plain_start, plain_end, end): the keys to visit, and those that need no comparison.

    All begin a tile or are `end`. Without PLAIN every tile has something to evaluate.
    """
    first = 0
    plain_start = 0
    plain_end = key_end
    end = key_end
    if right is not None:
        diagonal = first_query + shift + right
        end = tl.minimum(key_end, tl.maximum(diagonal + BLOCK_M, 0))
        plain_end = tl.minimum(key_end, tl.maximum(diagonal + 1, 0))
    if left is not None:
        diagonal = first_query + shift - left
        first = tl.maximum(diagonal, 0) // BLOCK_N * BLOCK_N
        plain_start = tl.cdiv(tl.maximum(diagonal + BLOCK_M - 1, 0), BLOCK_N) * BLOCK_N
        plain_start = tl.minimum(plain_start, end)
    plain_end = plain_end // BLOCK_N * BLOCK_N
    if left is not None:
        plain_end = tl.maximum(plain_end, plain_start)
    if not PLAIN:
        plain_start = first
        plain_end = first
    return first, plain_start, plain_end, end


@jit
def query_range(
    first_key, Sq, key_end, shift, left, right, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """[first, last): the queries that may attend one of BLOCK_N keys; `first` begins a tile."""
    first = 0
    last = tl.where(first_key < key_end, Sq, 0)
    if right is not None:
        first = tl.maximum(first_key - shift - right, 0) // BLOCK_M * BLOCK_M
    if left is not None:
        last = tl.minimum(last, tl.maximum(first_key + BLOCK_N - shift + left, 0))
    return first, last


# ---- scores ------------------------------------------------------------------------------------


@jit
def bend(products, scale_log2, softcap_log2):
    """Scores in log2 units: scaled, and bent by the softcap if there is one."""
    scores = products * scale_log2
    if softcap_log2 is not None:  # tanh(x) = 1 - 2 / (exp(2 x) + 1)
        power = tl.exp2(scores * (2.8853900817779268 / softcap_log2))
        scores = softcap_log2 - 2.0 * softcap_log2 / (power + 1.0)
    return scores


@jit
def lean(scores, slope_log2, queries, keys, shift):
    """Scores less the ALiBi slope times the distance from the diagonal."""
    if slope_log2 is not None:
        scores -= slope_log2 * tl.abs(queries + shift - keys).to(tl.float32)
    return scores


@jit
def hide(
    scores, mask_ptr, bias_ptr, queries, keys, Sq, key_end, shift, left, right, mask_matters,
    stride_mask_q, stride_mask_k, stride_bias_q, stride_bias_k, MASK: tl.constexpr,
):  # fmt: skip
    """Scores (log2 units) plus float mask and bias, -inf where the query may not attend the key.

    `queries` and `keys` are index tensors that broadcast to the shape of `scores`. A bool mask is
    read where mask_matters, and True elsewhere.
    """
    keep = keys < key_end
    if right is not None:
        keep = keep & (keys <= queries + (shift + right))
    if left is not None:
        keep = keep & (keys >= queries + (shift - left))
    inside = (queries < Sq) & (keys < key_end)
    if MASK != "none":
        mask_ptr += queries.to(tl.int64) * stride_mask_q + keys.to(tl.int64) * stride_mask_k
    if MASK == "bool":
        keep = keep & tl.load(mask_ptr, mask=inside & mask_matters, other=1).to(tl.int1)
    if MASK == "float" or bias_ptr is not None:
        added = tl.zeros_like(scores)
        if MASK == "float":
            added += tl.load(mask_ptr, mask=inside, other=0.0).to(tl.float32)
        if bias_ptr is not None:
            bias_ptr += queries.to(tl.int64) * stride_bias_q + keys.to(tl.int64) * stride_bias_k
            added += tl.load(bias_ptr, mask=inside, other=0.0).to(tl.float32)
        keep = keep & (added != float("-inf"))
        # finfo.min times log2(e) would overflow to -inf and turn a finite mask into a hard one
        scores += tl.maximum(added, -2.3e38) * 1.4426950408889634
    return tl.where(keep, scores, float("-inf"))


@jit
def drop(tile, mixed, keys, threshold):
    """The tile with dropped elements zeroed; the factor 1 / (1 - p) is applied elsewhere."""
    if mixed is not None:
        tile = tl.where(kept_at(mixed, keys, threshold), tile, 0.0)
    return tile


# ---- lists of the tiles that a bool mask leaves ------------------------------------------------


@jit
def classify_kernel(
    mask_ptr, lengths_ptr, classes_ptr, heads, Sq, Sk, left, right, row_blocks,
    stride_mask_b, stride_mask_h, stride_mask_q, stride_mask_k, stride_lengths,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BY_KEYS: tl.constexpr,
):  # fmt: skip
    """Class of one tile: 2 every query attends every key, 1 some do, 0 none does.

    Grid: tiles of a row (fastest), rows, heads, batch; a row of tiles shares its queries, or its
    keys with BY_KEYS. classes: int32 in the order of the grid.
    """
    blocks = tl.cdiv(Sq, BLOCK_M) if BY_KEYS else tl.cdiv(Sk, BLOCK_N)
    column = tl.program_id(0) % blocks
    row = tl.program_id(0) // blocks % row_blocks
    head = (tl.program_id(0) // blocks // row_blocks % heads).to(tl.int64)
    batch = (tl.program_id(0) // blocks // row_blocks // heads).to(tl.int64)
    queries = ((column if BY_KEYS else row) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    keys = ((row if BY_KEYS else column) * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    key_end = count_keys(lengths_ptr, batch, stride_lengths, Sk)
    mask_ptr += batch * stride_mask_b + head * stride_mask_h
    seen = hide(
        tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32), mask_ptr, None, queries, keys, Sq, key_end,
        Sk - Sq, left, right, True, stride_mask_q, stride_mask_k, 0, 0, "bool",
    ) == 0.0  # fmt: skip
    exists = queries < Sq
    some = tl.max(tl.max((seen & exists).to(tl.int32), 1), 0)
    every = tl.min(tl.min((seen | (queries >= Sq)).to(tl.int32), 1), 0)
    tl.store(classes_ptr + tl.program_id(0), some + some * every)


@jit
def list_kernel(classes_ptr, tiles_ptr, blocks, STEP: tl.constexpr, CHUNK: tl.constexpr):
    """One row of tiles: (number of full, of full and partial, the starts of full, of partial)."""
    row = tl.program_id(0).to(tl.int64)
    classes_ptr += row * blocks
    tiles_ptr += row * (blocks + 2)
    count = 0
    for wanted in tl.static_range(2, 0, -1):
        for first in range(0, blocks, CHUNK):
            block = first + tl.arange(0, CHUNK)
            found = tl.load(classes_ptr + block, mask=block < blocks, other=0) == wanted
            place = count + tl.cumsum(found.to(tl.int32), 0) - 1
            tl.store(tiles_ptr + 2 + place, block * STEP, mask=found)
            count += tl.sum(found.to(tl.int32), 0)
        tl.store(tiles_ptr + 2 - wanted, count)


# ---- launches ----------------------------------------------------------------------------------


class Call(NamedTuple):
    """What every kernel needs to know; the arguments of attention_triton.forward, after `arch`.

    With cu_q and cu_k (int32 or int64 [sequences + 1]) q, k, v are packed: [1, heads, total, dim].
    """

    arch: int
    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    bias: Tensor | None
    key_lengths: Tensor | None
    alibi_slopes: Tensor | None
    seed: Tensor | None
    causal: bool
    left: int
    right: int
    softcap: float
    scale: float
    dropout_p: float
    cu_q: Tensor | None = None
    cu_k: Tensor | None = None

    def bounds(self) -> tuple[int | None, int | None]:
        """Keys to the left and to the right of the diagonal that a query attends; None: all."""
        reach = self.q.shape[2] + self.k.shape[2]  # no bound lies further than that
        left = None if self.left < 0 else min(self.left, reach)
        right = None if self.right < 0 else min(self.right, reach)
        return left, 0 if self.causal else right


def mask_kind(call: Call) -> str:
    """The constexpr MASK."""
    return "none" if call.mask is None else "bool" if call.mask.dtype == torch.bool else "float"


def load_kind(call: Call) -> str:
    """Which column of the table of tiles serves a call."""
    if call.cu_q is not None:
        return "packed"
    heavy = (call.mask, call.bias, call.seed, call.alibi_slopes)
    if call.softcap or call.left >= 0 or any(tensor is not None for tensor in heavy):
        return "heavy"
    return "plain"


def common_arguments(kernel: str, call: Call) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments that the attention kernels share, and the launch options."""
    q, k, v = call.q, call.k, call.v
    D, DV = q.shape[3], v.shape[3]
    config = attention_config(kernel, call.arch, q.dtype, max(D, DV), load_kind(call))
    left, right = call.bounds()
    sequences = 0 if call.cu_q is None else call.cu_q.numel() - 1
    arguments = {
        "q_ptr": q, "k_ptr": k, "v_ptr": v, "mask_ptr": call.mask, "bias_ptr": call.bias,
        "lengths_ptr": call.key_lengths, "slopes_ptr": call.alibi_slopes, "seed_ptr": call.seed,
        "cu_q_ptr": call.cu_q, "cu_k_ptr": call.cu_k, "sequences": sequences,
        "left": left, "right": right, "scale_log2": call.scale * math.log2(math.e),
        "softcap_log2": call.softcap * math.log2(math.e) if call.softcap else None,
        "threshold": dropout.threshold(call.dropout_p),
        "dropout_scale": dropout.scale(call.dropout_p), "Hq": q.shape[1],
        "group": q.shape[1] // k.shape[1], "Sq": q.shape[2], "Sk": k.shape[2],
        **strides("q", "bhmd", q), **strides("k", "bhnd", k), **strides("v", "bhnd", v),
        **strides("mask_", "bhqk", call.mask), **strides("bias_", "bhqk", call.bias),
        "stride_lengths": 0 if call.key_lengths is None else call.key_lengths.stride(0),
        "stride_slopes": 0 if call.alibi_slopes is None else call.alibi_slopes.stride(0),
        "D": D, "DV": DV, "BLOCK_D": padded(D), "BLOCK_DV": padded(DV),
        "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "MASK": mask_kind(call),
        "SEQUENCES": padded(sequences),
    }  # fmt: skip
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return arguments, options | {"enable_fp_fusion": True}


def blocks_of(arguments: dict[str, Any], length: int, block: int, batch: int) -> int:
    """Programs per head: blocks of every batch item, or slots for those of packed sequences."""
    if arguments["cu_q_ptr"] is not None:
        return -(-length // block) + arguments["sequences"]
    return -(-length // block) * batch


def tile_lists(call: Call, arguments: dict[str, Any], by_keys: bool) -> list[Launch]:
    """Launches that list the tiles of a bool mask; without one none. Adds the list's arguments."""
    arguments |= {"tiles_ptr": None} | strides("tiles_", "bhm", None)
    if call.mask is None or call.mask.dtype != torch.bool:
        return []
    load(globals())
    names: tuple[str, ...] = (
        "mask_ptr",
        "lengths_ptr",
        "Sq",
        "Sk",
        "left",
        "right",
        "stride_lengths",
    )
    names += ("BLOCK_M", "BLOCK_N", *strides("mask_", "bhqk", None))
    chosen = {name: arguments[name] for name in names}
    q_blocks = -(-chosen["Sq"] // chosen["BLOCK_M"])
    k_blocks = -(-chosen["Sk"] // chosen["BLOCK_N"])
    rows, columns = (k_blocks, q_blocks) if by_keys else (q_blocks, k_blocks)
    step = chosen["BLOCK_M" if by_keys else "BLOCK_N"]
    batch = call.q.shape[0] if chosen["stride_mask_b"] or call.key_lengths is not None else 1
    heads = call.q.shape[1] if chosen["stride_mask_h"] else 1
    size = (batch, heads, rows, columns)
    classes = torch.empty(size, dtype=torch.int32, device=call.q.device)
    tiles = torch.empty((*size[:3], columns + 2), dtype=torch.int32, device=call.q.device)
    arguments |= {"tiles_ptr": tiles} | strides("tiles_", "bhm", tiles[..., 0])
    chosen |= {"classes_ptr": classes, "heads": heads, "row_blocks": rows, "BY_KEYS": by_keys}
    lists = {"classes_ptr": classes, "tiles_ptr": tiles, "blocks": columns}
    lists |= {"STEP": step, "CHUNK": min(256, padded(columns))}
    return [
        Launch(classify_kernel, (classes.numel(),), chosen, {"num_warps": 4}),
        Launch(list_kernel, (batch * heads * rows,), lists, {"num_warps": 4}),
    ]
