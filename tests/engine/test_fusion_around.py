"""fuse() beside what else is done to a model: global hooks, parametrizations, autocast, reports."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrizations, parametrize

import tilewise
from tilewise.errors import ArgumentError

E = 8


def feed_forward() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.LayerNorm(E), nn.Linear(E, 16), nn.GELU(), nn.Linear(16, E))


def test_global_hooks_see_every_module() -> None:
    model, seen = feed_forward(), []
    x = torch.randn(2, E)
    handle = register_module_forward_hook(lambda module, args, out: seen.append(module))
    try:
        model(x)
        before = list(seen)
        tilewise.fuse(model)
        seen.clear()
        model(x)
    finally:
        handle.remove()
    assert seen == before and len(seen) == 5
    seen.clear()
    model(x)
    assert not seen


def test_revert_names_what_it_cannot_undo() -> None:
    model = nn.Sequential(nn.LayerNorm(E), nn.LayerNorm(E))
    report = tilewise.fuse(model)
    parametrizations.weight_norm(model[0], dim=0)
    with pytest.warns(UserWarning, match="0 stays fused, for it has become Parametrized"):
        report.revert()
    assert type(model[1]) is nn.LayerNorm
    assert torch.isfinite(model(torch.randn(2, E))).all()


def test_revert_after_a_parametrization_has_gone_is_silent() -> None:
    norm = nn.LayerNorm(E)
    report = tilewise.fuse(norm)
    parametrizations.weight_norm(norm, dim=0)
    parametrize.remove_parametrizations(norm, "weight")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report.revert()
    assert type(norm) is nn.LayerNorm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm", [nn.LayerNorm(E), nn.RMSNorm(E)], ids=["layer", "rms"])
def test_autocast_gives_norms_the_dtype_they_had(norm: nn.Module, dtype: torch.dtype) -> None:
    x = torch.randn(3, E).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        before = norm(x)
        report = tilewise.fuse(norm)
        after = norm(x)
    report.revert()
    assert after.dtype == before.dtype
    torch.testing.assert_close(after, before, atol=1e-2, rtol=1e-2)


def test_autocast_through_an_encoder_layer() -> None:
    layer: Any = nn.TransformerEncoderLayer(E, 2, 16, dropout=0.0, batch_first=True)
    x = torch.randn(2, 5, E)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        before = layer(x)
        tilewise.fuse(layer)
        after = layer(x)
    assert after.dtype == before.dtype
    torch.testing.assert_close(after, before, atol=5e-2, rtol=5e-2)


def test_complex_outputs_are_compared() -> None:
    class Waves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(E)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(x)
            return torch.complex(torch.zeros_like(y), y)

    torch.manual_seed(0)
    report = tilewise.fuse(Waves(), example=torch.randn(64, E))
    assert report.max_difference is not None and 0 < report.max_difference < 1e-5


@pytest.mark.parametrize("tolerance", [-1.0, float("nan")])
def test_a_tolerance_that_nothing_meets(tolerance: float) -> None:
    model = nn.LayerNorm(E)
    with pytest.raises(ArgumentError, match="tolerance is"):
        tilewise.fuse(model, example=torch.randn(2, E), tolerance=tolerance)
    assert type(model) is nn.LayerNorm


def test_reports_say_what_was_not_done() -> None:
    assert "no example was given" in str(tilewise.fuse(nn.LayerNorm(E)))
    assert "nothing in this model is known" in str(tilewise.fuse(nn.Linear(E, E)))
