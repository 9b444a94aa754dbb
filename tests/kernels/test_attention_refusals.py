"""What attention refuses: bad bias, ALiBi, window, softcap, dropout; what one way cannot take."""

import math
from typing import Any

import pytest
import torch

from tilewise_kernels import attention, explain, force
from tilewise_kernels.errors import ArgumentError, KernelUnavailable

SLOPES = torch.tensor([1.0, 1e39], dtype=torch.float64)  # infinite in float32
BAD: list[tuple[dict[str, Any], str]] = [
    ({"bias": [[0.0]]}, "bias is list"),
    ({"bias": torch.ones(5, 5, dtype=torch.bool)}, "bias is torch.bool"),
    ({"bias": torch.ones(5, 6)}, r"bias is of shape \[5, 6\]"),
    ({"bias": torch.ones(1, 1, 1, 5, 5)}, "bias is of shape"),
    ({"bias": torch.zeros(5, device="meta")}, "bias is on meta"),
    ({"alibi_slopes": [0.5, 0.5]}, "alibi_slopes is list"),
    ({"alibi_slopes": torch.ones(2, dtype=torch.int64)}, "alibi_slopes is torch.int64"),
    ({"alibi_slopes": torch.ones(3)}, r"alibi_slopes is of shape \[3\]"),
    ({"alibi_slopes": torch.ones(2, device="meta")}, "alibi_slopes is on meta"),
    ({"alibi_slopes": torch.ones(2, requires_grad=True)}, "alibi_slopes is one that requires"),
    ({"alibi_slopes": torch.tensor([1.0, math.nan])}, "alibi_slopes is holding nan; pass finite"),
    ({"alibi_slopes": torch.tensor([1.0, -math.inf])}, "alibi_slopes is holding -inf"),
    (
        {"alibi_slopes": SLOPES},
        r"alibi_slopes is holding 1e\+39; pass finite slopes, of at most 3.4",
    ),
    ({"scale": math.nan}, "scale is NaN; pass a finite number"),
    ({"scale": math.inf}, "scale is inf"),
    ({"window": 3}, "window is 3; pass"),
    ({"window": (3,)}, r"window is \(3,\)"),
    ({"window": (-1, 0)}, r"window is \(-1, 0\)"),
    ({"window": (1.5, 0)}, r"window is \(1.5, 0\)"),
    ({"window": (True, 0)}, r"window is \(True, 0\)"),
    ({"softcap": 0.0}, "softcap is 0.0"),
    ({"softcap": 1e-50}, "softcap is 1e-50"),
    ({"softcap": 1e39}, r"softcap is 1e\+39"),
    ({"softcap": -1}, "softcap is -1"),
    ({"softcap": math.nan}, "softcap is NaN"),
    ({"softcap": "1"}, "softcap is '1'"),
    ({"dropout_p": 1.5}, "dropout_p is 1.5"),
    ({"dropout_p": -0.1}, "dropout_p is -0.1"),
    ({"dropout_p": math.nan}, "dropout_p is NaN"),
    ({"dropout_p": None}, "dropout_p is None"),
    ({"v": torch.ones(1, 2, 4, 8)}, "v is of shape"),
]


@pytest.mark.parametrize("change, message", BAD, ids=[message for _, message in BAD])
def test_bad_input(change, message):
    call = {name: torch.ones(1, 2, 5, 8) for name in "qkv"} | change
    state = torch.get_rng_state()
    with pytest.raises(ArgumentError, match=f"attention: {message}"):
        attention(**call)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("options, why", [
    ({"softcap": 1.0}, "softcap"),
    ({"dropout_p": 0.5}, "dropout"),
    ({"bias": torch.zeros(5, 1)}, "bias that is broadcast over keys"),
], ids=str)  # fmt: skip
def test_the_torch_way_says_what_it_cannot_take(options, why):
    q = torch.ones(1, 2, 5, 8)
    assert why in explain(attention, q, q, q, **options).others["torch"]
    with force("torch"), pytest.raises(KernelUnavailable, match=why):
        attention(q, q, q, **options)
