"""fuse() and the model it is given: what stays, what is skipped and why, examples, revert."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import tilewise
from tilewise.errors import ArgumentError, FusionError

B, S, E, H = 3, 7, 32, 4
LAYER = dict(d_model=E, nhead=H, dim_feedforward=48, dropout=0.0)


def randomised(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model


def agree(ours: Any, theirs: Any, **tolerance: float) -> None:
    tolerance = tolerance or dict(atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours, theirs, **tolerance)


# -- what stays ----------------------------------------------------------------------------------


def block() -> nn.Module:
    layer = nn.TransformerEncoderLayer(**LAYER, batch_first=True)
    mlp = nn.Sequential(nn.Linear(E, 48), nn.GELU(), nn.Linear(48, E))
    return randomised(nn.ModuleDict(dict(encoder=nn.TransformerEncoder(layer, 2), mlp=mlp)))


def run(model: Any, x: Tensor) -> Tensor:
    return model["mlp"](model["encoder"](x))


def test_everything_about_a_module_stays() -> None:
    model: Any = block().double()
    model["mlp"][2].weight = model["encoder"].layers[0].linear2.weight  # tied
    model["mlp"][0].weight.requires_grad_(False)
    model["encoder"].layers[1].eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    parameters, flags = list(model.parameters()), [m.training for m in model.modules()]
    tilewise.fuse(model)
    assert [id(p) for p in model.parameters()] == [id(p) for p in parameters]
    assert model["mlp"][2].weight is model["encoder"].layers[0].linear2.weight
    assert not model["mlp"][0].weight.requires_grad
    assert [m.training for m in model.modules()] == flags
    assert list(model.state_dict()) == list(before)
    assert isinstance(model["encoder"].layers[0], nn.TransformerEncoderLayer)
    assert isinstance(model["encoder"].layers[0].norm1, nn.LayerNorm)
    model.load_state_dict(before)
    assert run(model, torch.randn(B, S, E, dtype=torch.float64)).dtype == torch.float64


@pytest.mark.parametrize("hooks", ["before", "after"])
def test_hooks_fire(hooks: str) -> None:
    """On a fused module, and on those whose call a fused parent would have gone past."""
    model, x, seen = block(), torch.randn(B, S, E), []
    expected = run(model, x)
    tilewise.fuse(model) if hooks == "after" else None
    for path, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.LayerNorm, nn.GELU, nn.MultiheadAttention)):
            module.register_forward_hook(lambda m, i, o, path=path: seen.append(path))
    tilewise.fuse(model) if hooks == "before" else None
    agree(run(model, x), expected)
    hooked = {path for path, m in model.named_modules() if m._forward_hooks}
    assert set(seen) == {path for path in hooked if not path.endswith("out_proj")}


def test_a_layer_swapped_later_is_called() -> None:
    """LoRA and quantisation put their own modules in the place of Linear after the fact."""

    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model: Any = block()
    tilewise.fuse(model)
    x, w = torch.randn(B, E), model["mlp"]
    w[2].__class__ = Doubled
    agree(w(x), 2 * F.linear(F.gelu(F.linear(x, w[0].weight, w[0].bias)), w[2].weight, w[2].bias))


def test_copies_and_pickles() -> None:
    model, x = block().eval(), torch.randn(B, S, E)
    tilewise.fuse(model)
    expected = run(model, x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert [type(m) for m in other.modules()] == [type(m) for m in model.modules()]
        assert torch.equal(run(other, x), expected)
        assert not {id(p) for p in other.parameters()} & {id(p) for p in model.parameters()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_after_fusing(dtype: torch.dtype) -> None:
    model, x = block().eval(), torch.randn(B, S, E, dtype=torch.float64)
    exact = run(copy.deepcopy(model).double(), x)
    report = tilewise.fuse(model)
    with torch.no_grad():
        ours = run(model.to(dtype), x.to(dtype))
        report.revert()
        theirs = run(model, x.to(dtype))
    scale = exact.abs().max()
    assert (ours - exact).abs().max() <= 2 * (theirs - exact).abs().max() + 1e-3 * scale


def test_autocast_and_mixed_dtypes() -> None:
    model, x = block().eval(), torch.randn(B, S, E)
    fused = copy.deepcopy(model)
    tilewise.fuse(fused)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        ours, theirs = run(fused, x), run(model, x)
    assert ours.dtype == theirs.dtype
    agree(ours.float(), theirs.float(), atol=0.05 * float(theirs.abs().max()), rtol=0)
    norm = nn.Sequential(nn.LayerNorm(E))
    tilewise.fuse(norm)
    assert norm(x.bfloat16()).dtype == torch.bfloat16


def test_compile() -> None:
    model, x = block(), torch.randn(B, S, E)
    report = tilewise.fuse(model)
    assert report.replaced

    def loss(x: Tensor) -> Tensor:
        return run(model, x).square().mean()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    agree(compiled(x), loss(x))
    agree(compiled(x[:2, :5]), loss(x[:2, :5]))


def test_gradients_of_each_sample() -> None:
    """torch.func's recipe: functional_call, grad and vmap."""
    model, xs = block().eval(), torch.randn(B, S, E)
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = model

        def forward(self, x: Tensor) -> Tensor:
            return run(self.parts, x)

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        named = {f"parts.{name}": p for name, p in parameters.items()}
        return torch.func.functional_call(Whole(), named, (x[None],)).square().mean()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))
    expected = each(parameters, xs)
    tilewise.fuse(model)
    found = each(parameters, xs)
    for name, gradient in expected.items():
        agree(found[name], gradient, atol=1e-4 * float(gradient.abs().max()) + 1e-6, rtol=1e-4)


@pytest.mark.parametrize("training", [True, False])
def test_revert(training: bool) -> None:
    model, x = block().train(training), torch.randn(B, S, E)
    kinds, attributes = [type(m) for m in model.modules()], [set(vars(m)) for m in model.modules()]
    before = run(model, x)
    report = tilewise.fuse(model)
    report.revert()
    assert torch.equal(run(model, x), before)
    assert [type(m) for m in model.modules()] == kinds
    assert [set(vars(m)) for m in model.modules()] == attributes
    report.revert()  # again: nothing left to do
    assert [type(m) for m in model.modules()] == kinds
    assert len(tilewise.fuse(model).replaced) == len(report.replaced)


def test_revert_keeps_what_was_trained() -> None:
    model: Any = block()
    report = tilewise.fuse(model)
    run(model, torch.randn(B, S, E)).sum().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.1 * parameter.grad
    trained = {k: v.clone() for k, v in model.state_dict().items()}
    report.revert()
    assert all(torch.equal(trained[k], v) for k, v in model.state_dict().items())


# -- skipped and refused -------------------------------------------------------------------------


class OwnNorm(nn.LayerNorm):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def skipped_modules() -> dict[str, nn.Module]:
    replaced = nn.LayerNorm(E)
    replaced.forward = lambda x: x  # type: ignore[method-assign]
    odd = nn.TransformerEncoder(nn.TransformerEncoderLayer(**LAYER, batch_first=True), 1)
    odd.layers[0] = nn.Linear(E, E)
    return {
        "only LayerNorm itself": OwnNorm(E),
        "normalises over 2 dims, layer_norm": nn.LayerNorm((S, E)),
        "normalises over 2 dims, rms_norm": nn.RMSNorm((S, E)),
        "add_bias_kv": nn.MultiheadAttention(E, H, add_bias_kv=True),
        "add_zero_attn": nn.MultiheadAttention(E, H, add_zero_attn=True),
        "parametrized": parametrizations.weight_norm(nn.LayerNorm((E,)), dim=0),
        "replaced on the instance": replaced,
        "no nn.TransformerEncoderLayer": odd,
    }


@pytest.mark.parametrize("reason", skipped_modules())
def test_skipped_with_a_reason(reason: str) -> None:
    module = skipped_modules()[reason]
    kind = type(module)
    report = tilewise.fuse(nn.ModuleDict(dict(inside=module)))
    assert [(s.path, s.type) for s in report.skipped] == [("inside", kind.__name__)]
    assert reason in report.skipped[0].reason
    assert type(module) is kind
    assert reason in str(report)


def test_fused_already() -> None:
    model = block()
    first_report = tilewise.fuse(model)
    second = tilewise.fuse(model)
    assert not second.replaced
    assert [s.reason for s in second.skipped] == ["it is fused already"] * len(
        first_report.replaced
    )


def test_nothing_to_fuse() -> None:
    report = tilewise.fuse(nn.Linear(3, 3), example=torch.randn(2, 3))
    assert not report.replaced and not report.skipped and report.max_difference == 0
    assert str(report).startswith("0 modules replaced")


def test_report_reads_well() -> None:
    layer = nn.TransformerEncoderLayer(**LAYER, batch_first=True)
    model = nn.Sequential(nn.TransformerEncoder(layer, 3), OwnNorm(E))
    report = tilewise.fuse(model, example=torch.randn(B, S, E))
    assert ("0.layers.1.norm1", "LayerNorm", "FusedLayerNorm") in report.replaced
    text = str(report).splitlines()
    assert text[0].startswith("13 modules replaced, 1 skipped; outputs differ by at most")
    assert any(line.split()[:3] == ["3", "*.layers.*.norm1", "LayerNorm"] for line in text)
    assert len(text) == 8


@pytest.mark.parametrize("form", ["tensor", "tuple", "dict"])
def test_example_forms(form: str) -> None:
    model = nn.Sequential(nn.LayerNorm(E)).train()
    x = torch.randn(B, E)
    example = {"tensor": x, "tuple": (x,), "dict": {"input": x}}[form]
    state = torch.get_rng_state()
    report = tilewise.fuse(model, example=example)
    assert report.max_difference is not None and report.max_difference < 1e-5
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training and model[0].training


class Fragile(nn.Module):
    """Adds the class of its norm to what it returns: fused, it is another model."""

    def __init__(self, fault: str) -> None:
        super().__init__()
        self.norm, self.fault = nn.LayerNorm(E), fault

    def forward(self, x: Tensor) -> Any:
        fused = type(self.norm) is not nn.LayerNorm
        y = self.norm(x)
        if not fused:
            return y, x.argmax(-1)
        if self.fault == "raises":
            raise KeyError("from inside the model")
        changed = {"value": (y + 0.1, x.argmax(-1)), "ids": (y, x.argmin(-1)), "shape": (y[:1], x)}
        return {**changed, "nan": (y * torch.nan, x.argmax(-1))}[self.fault]


@pytest.mark.parametrize(
    ("fault", "error", "message"),
    [
        ("value", FusionError, "output 0 .* moved by"),
        ("ids", FusionError, "output 1 .* moved by"),
        ("nan", FusionError, "output 0"),
        ("shape", FusionError, "other shapes"),
        ("raises", KeyError, "from inside"),
    ],
)
def test_a_mismatch_puts_the_model_back(fault: str, error: Any, message: str) -> None:
    model = Fragile(fault)
    with pytest.raises(error, match=message):
        tilewise.fuse(model, example=torch.randn(B, E))
    assert type(model.norm) is nn.LayerNorm and model.training
    if fault == "value":
        assert tilewise.fuse(model, example=torch.randn(B, E), tolerance=1.0).replaced


def test_an_example_that_fails_before_anything_is_replaced() -> None:
    model = nn.Sequential(nn.LayerNorm(E))
    with pytest.raises(RuntimeError):
        tilewise.fuse(model, example=torch.randn(B, E + 1))
    assert type(model[0]) is nn.LayerNorm and model.training


@pytest.mark.parametrize(
    ("model", "example", "message"),
    [
        (nn.LayerNorm, None, "model is type"),
        ("bert-base-uncased", None, "model is str"),
        (nn.Linear(2, 2), [torch.ones(2)], "example is list"),
        (nn.Linear(2, 2), 3, "example is int"),
        (nn.Module(), {}, None),
    ],
    ids=lambda value: str(value)[:20],
)
def test_bad_arguments(model: Any, example: Any, message: str | None) -> None:
    if message is None:
        with pytest.raises(NotImplementedError):  # what the model itself raises
            tilewise.fuse(model, example=example)
        return
    with pytest.raises(ArgumentError, match=message):
        tilewise.fuse(model, example=example)


def test_an_example_without_a_tensor() -> None:
    class Silent(nn.Module):
        def forward(self, x: Tensor) -> None:
            return None

    with pytest.raises(ArgumentError, match="no tensor"):
        tilewise.fuse(Silent(), example=torch.ones(1))
