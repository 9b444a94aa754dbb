"""The lists of score tiles that a bool mask leaves to the Triton kernels, in the interpreter.

Tiles are 32 queries by 16 keys (configs.ATTENTION_INTERPRETED).
"""

import pytest
import torch
from torch import Tensor

from tilewise_kernels import attention_tiles_triton
from tilewise_kernels.attention_tiles_triton import Call
from tilewise_kernels.launch import Launch


def tiles_of(mask: Tensor, by_keys: bool, **options) -> list[list[tuple[list[int], list[int]]]]:
    """(starts of the full tiles, of the partial ones) per row of tiles, per item of the lists."""
    B, Hq, Sq, Sk = mask.shape
    q, k = torch.zeros(B, Hq, Sq, 16), torch.zeros(B, Hq, Sk, 16)
    options = {"key_lengths": None, "causal": False, "left": -1, "right": -1} | options
    call = Call(
        0, q, k, k, mask, None, options["key_lengths"], None, None, options["causal"],
        options["left"], options["right"], 0.0, 1.0, 0.0,
    )  # fmt: skip
    arguments, _ = attention_tiles_triton.common_arguments("forward", call)
    for launch in attention_tiles_triton.tile_lists(call, arguments, by_keys):
        launch.run(q.device)
    lists = arguments["tiles_ptr"].flatten(0, 1).tolist()
    return [[(r[2 : 2 + r[0]], r[2 + r[0] : 2 + r[1]]) for r in rows] for rows in lists]


@pytest.mark.parametrize("by_keys", [False, True])
def test_tiles_are_full_partial_or_left_out(by_keys):
    """97 x 49 with ragged last tiles: one tile full, one with a hole, one with a single True."""
    mask = torch.zeros(1, 1, 97, 49, dtype=torch.bool)
    mask[..., :32, 16:32] = True  # full
    mask[..., 32:64, :16] = True
    mask[..., 50, 3] = False  # partial
    mask[..., 64, 32] = True  # partial
    mask[..., 96, :] = True  # the ragged last row of tiles: full but for its ragged last tile
    [rows] = tiles_of(mask, by_keys)
    if by_keys:
        assert rows == [([96], [32]), ([0, 96], []), ([96], [64]), ([], [96])]
    else:
        assert rows == [([16], []), ([], [0]), ([], [32]), ([0, 16, 32], [48])]


def test_lists_belong_to_what_the_mask_was_made_for():
    mask = torch.ones(2, 1, 1, 40, dtype=torch.bool)
    mask[1, ..., 16:] = False
    found = tiles_of(mask.expand(2, 3, 33, 40), False)
    assert found == [[([0, 16], [32])] * 2, [([0], [])] * 2]
    lengths = torch.tensor([40, 20])
    everywhere = torch.ones(1, 1, 1, 1, dtype=torch.bool).expand(2, 3, 33, 40)
    found = tiles_of(everywhere, False, key_lengths=lengths)
    assert found == [[([0, 16], [32])] * 2, [([0], [16])] * 2]


def test_diagonals_rule_tiles_out_of_the_lists():
    mask = torch.ones(1, 1, 64, 64, dtype=torch.bool)
    assert tiles_of(mask, False, causal=True) == [[([], [0, 16]), ([0, 16], [32, 48])]]
    assert tiles_of(mask, False, left=15, right=0)[0][1] == ([], [16, 32, 48])


def test_more_tiles_than_a_chunk():
    """300 tiles of keys in one row: the list is made of two chunks."""
    mask = torch.rand(1, 1, 1, 4800, generator=torch.Generator().manual_seed(0)) < 0.05
    mask[..., 160:320] = True
    classes = torch.zeros(300, dtype=torch.int32)
    counts = mask.view(300, 16).sum(1)
    classes[counts > 0], classes[counts == 16] = 1, 2
    tiles = torch.empty(1, 302, dtype=torch.int32)
    lists = {"classes_ptr": classes, "tiles_ptr": tiles, "blocks": 300, "STEP": 16, "CHUNK": 256}
    attention_tiles_triton.load(vars(attention_tiles_triton))
    Launch(attention_tiles_triton.list_kernel, (1,), lists, {}).run(tiles.device)
    full, both = tiles[0, :2].tolist()
    assert tiles[0, 2 : 2 + full].tolist() == ((classes == 2).nonzero() * 16).flatten().tolist()
    assert (
        tiles[0, 2 + full : 2 + both].tolist() == ((classes == 1).nonzero() * 16).flatten().tolist()
    )
