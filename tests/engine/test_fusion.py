"""fuse() on torch.nn modules: every option of theirs, what stays, what is skipped, and revert."""

import copy
import itertools
import pickle
import warnings
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import tilewise
from tilewise.errors import ArgumentError, FusionError
from tilewise_kernels import record

B, S, T, E, H = 3, 7, 9, 32, 4
PADDING = torch.arange(S) >= torch.tensor([S, 4, 6])[:, None]  # True = ignore
LATER = torch.ones(S, S, dtype=torch.bool).triu(1)


def randomised(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model


def twins(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The model with random parameters, and the same one fused."""
    fused = copy.deepcopy(randomised(model))
    report = tilewise.fuse(fused)
    assert report.replaced
    return model, fused


def first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def agree(ours: Any, theirs: Any, **tolerance: float) -> None:
    tolerance = tolerance or dict(atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours, theirs, **tolerance)


def gradients_agree(model: nn.Module, fused: nn.Module, *args: Any, **kwargs: Any) -> None:
    """Outputs and gradients of the parameters and the float inputs, in training mode."""
    found = []
    for each in (model, fused):
        each.train()
        inputs = [a.clone().requires_grad_() if a.is_floating_point() else a for a in args]
        output = first(each(*inputs, **kwargs))
        torch.manual_seed(5)
        output.backward(torch.randn(output.shape))
        grads = {path: p.grad for path, p in each.named_parameters()}
        found.append((output.detach(), grads, [i.grad for i in inputs]))
    agree(found[1][0], found[0][0])
    for path, grad in found[0][1].items():
        agree(found[1][1][path], grad, atol=1e-4 * float(grad.abs().max()) + 1e-6, rtol=1e-4)
    for ours, theirs in zip(found[1][2], found[0][2], strict=True):
        agree(ours, theirs, atol=1e-4 * float(theirs.abs().max()), rtol=1e-4)


# -- norms and feed-forward ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "norm",
    [
        nn.LayerNorm(E),
        nn.LayerNorm(E, eps=0.1, bias=False),
        nn.LayerNorm(E, elementwise_affine=False),
        nn.RMSNorm(E),
        nn.RMSNorm(E, eps=0.1),
        nn.RMSNorm(E, elementwise_affine=False),
    ],
    ids=str,
)
def test_norms(norm: nn.Module) -> None:
    model, fused = twins(nn.Sequential(norm))
    gradients_agree(model, fused, torch.randn(B, S, E))
    with record() as ops:
        fused(torch.randn(B, S, E))
    assert [op.op for op in ops] == ["rms_norm" if isinstance(norm, nn.RMSNorm) else "layer_norm"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_rms_norm_without_eps_adds_what_torch_adds(dtype: torch.dtype) -> None:
    """Rows so small that eps decides."""
    model, fused = twins(nn.Sequential(nn.RMSNorm(E)).to(dtype))
    small = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps ** 0.5
    x = (torch.randn(5, E) * small).to(dtype)
    agree(fused(x).float(), model(x).float(), atol=1e-3, rtol=1e-2)


@pytest.mark.parametrize(
    "activation", [nn.GELU(), nn.GELU("tanh"), nn.ReLU(), nn.ReLU(inplace=True), nn.SiLU()], ids=str
)
@pytest.mark.parametrize("bias", [False, True])
def test_feed_forward(activation: nn.Module, bias: bool) -> None:
    steps = [nn.Linear(E, 48, bias=bias), activation, nn.Linear(48, E, bias=bias)]
    model, fused = twins(nn.Sequential(*steps))
    gradients_agree(model, fused, torch.randn(B, S, E))
    with record() as ops:
        fused(torch.randn(B, S, E))
    assert [op.op for op in ops] == ["feed_forward"]


def test_feed_forward_with_dropout_draws_as_before() -> None:
    steps = [nn.Linear(E, 48), nn.GELU(), nn.Dropout(0.4), nn.Linear(48, E), nn.Dropout(0.4)]
    model, fused = twins(nn.Sequential(*steps))
    x = torch.randn(B, E)
    results = []
    for each in (model, fused):
        torch.manual_seed(3)
        results.append(each(x))
    agree(results[1], results[0])
    with record() as ops:
        agree(fused.eval()(x), model.eval()(x))
    assert [op.op for op in ops] == ["feed_forward"]


def test_sequences_with_more_in_them() -> None:
    steps: Any = OrderedDict(
        up=nn.Linear(E, 48),
        act=nn.GELU(),
        down=nn.Linear(48, E),
        norm=nn.LayerNorm(E),
        tanh=nn.Tanh(),
        again=nn.Linear(E, 48),
        relu=nn.ReLU(),
        last=nn.Linear(48, 5),
    )
    model, fused = twins(nn.Sequential(steps))
    gradients_agree(model, fused, torch.randn(B, E))
    assert list(model.state_dict()) == list(fused.state_dict())
    assert fused.norm.weight.shape == (E,) and len(fused) == 8 and len(fused[:3]) == 3


# -- attention -----------------------------------------------------------------------------------

BOOL_MASK = torch.rand(S, T, generator=torch.Generator().manual_seed(0)) < 0.4
BOOL_MASK[:, 0] = False  # every query keeps a key: torch's weights of the others are NaN
PER_HEAD = torch.randn(B * H, S, T, generator=torch.Generator().manual_seed(0))
KEYS = torch.arange(T) >= torch.tensor([T, 4, 6])[:, None]
MASKS = {
    "none": dict(),
    "padding": dict(key_padding_mask=KEYS),
    "float padding": dict(key_padding_mask=KEYS.float() * -3),
    "bool": dict(attn_mask=BOOL_MASK),
    "float": dict(attn_mask=PER_HEAD[0]),
    "per head": dict(attn_mask=PER_HEAD),
    "both bool": dict(attn_mask=BOOL_MASK, key_padding_mask=KEYS),
    "both float": dict(attn_mask=PER_HEAD, key_padding_mask=KEYS.float() * -3),
}


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize("masks", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize(
    "options", [dict(), dict(kdim=20, vdim=24), dict(bias=False)], ids=["", "kdim", "no bias"]
)
def test_attention(options: dict[str, Any], batch_first: bool, masks: dict[str, Tensor]) -> None:
    torch.manual_seed(0)
    model, fused = twins(nn.MultiheadAttention(E, H, batch_first=batch_first, **options))
    q = torch.randn(B, S, E)
    k, v = torch.randn(B, T, options.get("kdim", E)), torch.randn(B, T, options.get("vdim", E))
    if not batch_first:
        q, k, v = q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)
    for weights in (dict(), dict(average_attn_weights=False), dict(need_weights=False)):
        agree(fused(q, k, v, **masks, **weights), model(q, k, v, **masks, **weights))
    gradients_agree(model, fused, q, k, v, need_weights=False, **masks)
    with record() as ops:
        fused(q, k, v, need_weights=False, **masks)
    assert [op.op for op in ops] == ["attention"]


@pytest.mark.parametrize("batch_first", [False, True])
def test_self_attention_and_shared_keys(batch_first: bool) -> None:
    model, fused = twins(nn.MultiheadAttention(E, H, batch_first=batch_first))
    x, memory = torch.randn(5, S, E), torch.randn(5, S, E)
    for inputs in ((x, x, x), (x, memory, memory), (x, memory, x)):
        for mode in (model.train(), model.eval()):
            fused.train(mode.training)
            agree(fused(*inputs), model(*inputs))
            with torch.no_grad():  # torch's fast path
                agree(fused(*inputs, need_weights=False), model(*inputs, need_weights=False))


@pytest.mark.parametrize("batch_first", [False, True])
def test_attention_without_a_batch(batch_first: bool) -> None:
    model, fused = twins(nn.MultiheadAttention(E, H, batch_first=batch_first))
    x, memory = torch.randn(S, E), torch.randn(T, E)
    for masks in (dict(), dict(key_padding_mask=KEYS[1]), dict(attn_mask=PER_HEAD[:H])):
        agree(fused(x, memory, memory, **masks), model(x, memory, memory, **masks))
        weights = dict(average_attn_weights=False)
        agree(
            fused(x, memory, memory, **masks, **weights),
            model(x, memory, memory, **masks, **weights),
        )


def test_causal_hint() -> None:
    model, fused = twins(nn.MultiheadAttention(E, H, batch_first=True))
    x = torch.randn(B, S, E)
    for more in (dict(), dict(key_padding_mask=PADDING)):
        masks = dict(attn_mask=LATER, is_causal=True, **more)
        for weights in (True, False):
            ours = fused(x, x, x, need_weights=weights, **masks)
            agree(ours, model(x, x, x, need_weights=weights, **masks))
    for each in (model, fused):
        with pytest.raises(RuntimeError, match="attn_mask"):
            each(x, x, x, is_causal=True)


def test_rows_without_a_key_are_zero() -> None:
    """torch gives NaN where weights are asked for; here output and gradients stay finite."""
    model, fused = twins(nn.MultiheadAttention(E, H, batch_first=True))
    x = torch.randn(B, S, E, requires_grad=True)
    padding = PADDING.clone()
    padding[1] = True
    assert model(x, x, x, key_padding_mask=padding)[1].isnan().any()
    out, weights = fused(x, x, x, key_padding_mask=padding)
    agree(out[1], model.out_proj.bias.expand(S, E))
    assert not weights[1].any()
    out.sum().backward()
    assert x.grad.isfinite().all()


def test_a_learned_mask_keeps_its_gradient() -> None:
    model, fused = twins(nn.MultiheadAttention(E, H, batch_first=True))
    x, grads = torch.randn(B, S, E), []
    for each in (model, fused):
        mask = PER_HEAD[0, :, :S].clone().requires_grad_()
        each(x, x, x, attn_mask=mask, need_weights=False)[0].square().sum().backward()
        grads.append(mask.grad)
    agree(grads[1], grads[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("need_weights", [True, False])
def test_attention_dropout(need_weights: bool) -> None:
    """Drawn in training only, reproducible, and right on average."""
    model, fused = twins(nn.MultiheadAttention(E, H, dropout=0.5, batch_first=True))
    x = torch.randn(1, S, E)

    def run() -> Tensor:
        return fused(x, x, x, need_weights=need_weights)[0]

    torch.manual_seed(0)
    one = run()
    assert not torch.equal(run(), one)
    torch.manual_seed(0)
    assert torch.equal(run(), one)
    expected = model.eval()(x, x, x, need_weights=False)[0]
    with torch.no_grad():
        mean = torch.stack([run() for _ in range(400)]).mean(0)
    assert (mean - expected).abs().mean() < 0.1 * expected.abs().mean()
    fused.eval()
    agree(run(), expected)


# -- encoder and decoder -------------------------------------------------------------------------

LAYER = dict(d_model=E, nhead=H, dim_feedforward=48, dropout=0.0)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("activation", ["relu", F.gelu, nn.SiLU(), torch.tanh], ids=str)
@pytest.mark.parametrize("batch_first", [False, True])
def test_encoder_layer(batch_first: bool, activation: Any, norm_first: bool) -> None:
    options = dict(batch_first=batch_first, norm_first=norm_first, activation=activation)
    model, fused = twins(nn.TransformerEncoderLayer(**LAYER, **options))
    x = torch.randn(B, S, E) if batch_first else torch.randn(S, B, E)
    for masks in (dict(), dict(src_key_padding_mask=PADDING), dict(src_mask=LATER)):
        gradients_agree(model, fused, x, **masks)
        with torch.no_grad():
            agree(fused.eval()(x, **masks), model.eval()(x, **masks))


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_transformer(batch_first: bool, norm_first: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # norm_first switches nested tensors off
        model, fused = twins(
            nn.Transformer(
                E,
                H,
                2,
                2,
                48,
                dropout=0.0,
                batch_first=batch_first,
                norm_first=norm_first,
            )
        )
    source, target = torch.randn(B, T, E), torch.randn(B, S, E)
    if not batch_first:
        source, target = source.transpose(0, 1), target.transpose(0, 1)
    masks = dict(
        tgt_mask=LATER,
        src_key_padding_mask=KEYS,
        memory_key_padding_mask=KEYS,
        tgt_key_padding_mask=PADDING,
    )
    gradients_agree(model, fused, source, target, **masks)
    with torch.no_grad():
        agree(fused.eval()(source, target, **masks), model.eval()(source, target, **masks))
    kinds = {type(m) for m in fused.modules()}
    assert nn.LayerNorm not in kinds and nn.MultiheadAttention not in kinds


@pytest.mark.parametrize("mode", ["train", "eval", "no_grad", "mask"])
@pytest.mark.parametrize("norm", [False, True])
def test_encoder_and_its_fast_path(mode: str, norm: bool) -> None:
    """In evaluation torch packs padded batches into nested tensors: the same zeros come back."""
    layer = nn.TransformerEncoderLayer(**LAYER, batch_first=True)
    model, fused = twins(nn.TransformerEncoder(layer, 2, nn.LayerNorm(E) if norm else None))
    for each in (model, fused):
        each.train(mode == "train")
    x = torch.randn(B, S, E)
    scattered = PADDING.flip(1)  # padding before the words is never packed
    for padding in (None, PADDING, PADDING.float().masked_fill(PADDING, -torch.inf), scattered):
        with torch.set_grad_enabled(mode != "no_grad"), record() as ops:
            mask = LATER if mode == "mask" and padding is not scattered else None
            ours = fused(x, mask=mask, src_key_padding_mask=padding)
        with torch.set_grad_enabled(mode != "no_grad"):
            agree(ours, model(x, mask=mask, src_key_padding_mask=padding))
        assert [op.op for op in ops].count("attention") == 2
        assert [op.op for op in ops].count("feed_forward") == 2


def test_encoder_takes_a_nested_tensor() -> None:
    layer = nn.TransformerEncoderLayer(**LAYER, batch_first=True)
    model, fused = twins(nn.TransformerEncoder(layer, 2).eval())
    parts = torch.nested.nested_tensor([torch.randn(5, E), torch.randn(3, E)])
    with torch.no_grad():
        ours, theirs = fused(parts), model(parts)
    agree(ours.to_padded_tensor(0.0), theirs.to_padded_tensor(0.0))


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


def test_a_layer_round_a_skipped_attention() -> None:
    layer = nn.TransformerEncoderLayer(**LAYER, batch_first=True)
    layer.self_attn = nn.MultiheadAttention(E, H, batch_first=True, add_zero_attn=True)
    model, fused = twins(layer)
    gradients_agree(model, fused, torch.randn(B, S, E), src_key_padding_mask=PADDING)


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


def test_every_mask_pairing_of_the_encoder() -> None:
    """bool and float masks in every pairing, with and without the hint, in both modes."""
    layer = nn.TransformerEncoderLayer(**LAYER, batch_first=True)
    model, fused = twins(nn.TransformerEncoder(layer, 1))
    x = torch.randn(B, S, E)
    as_float = {m: torch.zeros(m.shape).masked_fill(m, -torch.inf) for m in (LATER, PADDING)}
    masks, paddings = [None, LATER, as_float[LATER]], [None, PADDING, as_float[PADDING]]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        for mask, padding, training in itertools.product(masks, paddings, [True, False]):
            model.train(training), fused.train(training)
            for hint in (None, False) if mask is None else (None, False, True):
                options = dict(mask=mask, src_key_padding_mask=padding, is_causal=hint)
                agree(fused(x, **options), model(x, **options))
