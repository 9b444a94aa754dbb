"""Kernels run in Triton's interpreter here: the choice must be made before any of them is built.

Also the one statement of the accuracy rule that every op is held to.
"""

import os
from collections.abc import Callable

import pytest
import torch

os.environ["TRITON_INTERPRET"] = "1"

Tensors = dict[str, torch.Tensor]


# ---- the accuracy rule -------------------------------------------------------------------------


def _largest(tensor: torch.Tensor) -> float:
    return tensor.abs().max().item() if tensor.numel() else 0.0


def _compare(ours: Tensors, eager: Tensors, exact: Tensors) -> None:
    """Names that begin with "d" are gradients: 3x eager's error; the others are outputs: 2x.

    exact is float64 throughout. To either comes 1e-5 of the scale: the largest exact value of that
    tensor or of the first output, whichever is larger (gradients may cancel to nothing).
    """
    first = _largest(next(iter(exact.values())))
    for name, true in exact.items():
        got, plain = ours[name].detach().double(), eager[name].detach().double()
        assert got.shape == true.shape, f"{name}: shape {got.shape}, not {true.shape}"
        infinite = torch.isinf(true)
        assert torch.equal(got[infinite], true[infinite].double()), f"{name}: infinities differ"
        finite = ~infinite
        error = _largest(got[finite] - true[finite])
        eager_error = _largest(plain[finite] - true[finite])
        factor = 3 if name.startswith("d") else 2
        limit = factor * eager_error + 1e-5 * max(_largest(true[finite]), first)
        assert error <= limit, (
            f"{name}: error {error:.3g} above {limit:.3g} (eager {eager_error:.3g})"
        )


@pytest.fixture(scope="session")
def assert_accurate() -> Callable[[Tensors, Tensors, Tensors], None]:
    """assert_accurate(ours, eager, exact): the project's accuracy rule, on tensors by name."""
    return _compare
