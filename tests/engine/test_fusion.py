"""fuse() on torch.nn modules: every option of theirs, in outputs and gradients."""

import copy
import itertools
import warnings
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tilewise
from tilewise.fusion.swapping import gated_layers
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


@pytest.mark.parametrize("shape", [(1,), (1, 48)])
def test_biases_that_broadcast(shape: tuple[int, ...]) -> None:
    """torch adds a bias of any shape that broadcasts; ours takes one number for each output."""
    mlp = nn.Sequential(nn.Linear(E, 48), nn.GELU(), nn.Linear(48, E))
    model, fused = twins(mlp)
    for each in (model, fused):
        each[0].bias = nn.Parameter(torch.full(shape, 0.25))
        each[2].bias = nn.Parameter(torch.full((1,), -0.5))
    gradients_agree(model, fused, torch.randn(B, S, E))


@pytest.mark.parametrize("layer", [0, 2])
def test_a_bias_of_another_dtype_is_the_modules_own_affair(layer: int) -> None:
    mlp = nn.Sequential(nn.Linear(E, 48), nn.GELU(), nn.Linear(48, E))
    model, fused = twins(mlp)
    for each in (model, fused):
        each[layer].bias = nn.Parameter(each[layer].bias.detach().double())
        with pytest.raises(RuntimeError, match="dtype"):
            each(torch.randn(B, E))


def test_a_gate_with_a_bias_of_another_kind() -> None:
    """gated_layers looks at every bias too."""
    layers = [nn.Linear(E, 48), nn.Linear(E, 48, bias=False), nn.Linear(48, E)]
    layers[0].bias = nn.Parameter(torch.full((1,), 0.25))
    x = torch.randn(B, E)
    found = gated_layers(x, layers[0], F.silu, layers[1], None, layers[2])
    agree(found, layers[2](F.silu(layers[0](x)) * layers[1](x)))


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


class Marked(Tensor):
    """A subclass that counts the torch functions it is given to."""

    calls = 0

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        cls.calls += 1
        return super().__torch_function__(function, types, args, kwargs or {})


def outcome(model: nn.Module, *inputs: Tensor) -> Any:
    """What a call gives: its output, or the words it fails with."""
    try:
        return model(*inputs)[0]
    except (RuntimeError, AssertionError, TypeError) as error:
        return str(error)


def test_attention_leaves_what_it_does_not_take() -> None:
    """key and value are looked at as query is: the module's own forward takes or refuses them."""
    model, fused = twins(nn.MultiheadAttention(E, H, batch_first=True))
    x, y = torch.randn(B, S, E), torch.randn(B, T, E)
    wrong = {
        "dtype": y.double(),
        "device": y.to("meta"),
        "layout": y.to_sparse(),
        "dims": y[0],
        "nested": torch.nested.nested_tensor([y[0], y[1, :4]]),
    }
    for reason, other in wrong.items():
        for key, value in ((other, y), (y, other), (other, other)):
            with record() as ops:
                ours = outcome(fused, x, key, value)
            theirs = outcome(model, x, key, value)
            assert not ops and type(ours) is type(theirs)
            if reason != "device":  # torch reads what is not there
                assert torch.equal(ours, theirs) if isinstance(ours, Tensor) else ours == theirs


def test_attention_with_foreign_projections() -> None:
    """A weight of a Tensor subclass, of keys only, goes the module's own way."""
    model, fused = twins(nn.MultiheadAttention(E, H, batch_first=True, kdim=16, vdim=24))
    for each in (model, fused):
        del each.k_proj_weight
        weight = torch.full((E, 16), 0.1).as_subclass(Marked)
        each.k_proj_weight = weight
    inputs = torch.randn(B, S, E), torch.randn(B, T, 16), torch.randn(B, T, 24)
    expected = model(*inputs, need_weights=False)[0]
    Marked.calls = 0
    with record() as ops:
        found = fused(*inputs, need_weights=False)[0]
    assert not ops and Marked.calls
    agree(found.as_subclass(Tensor), expected.as_subclass(Tensor))


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
@pytest.mark.parametrize(
    "activation", ["relu", F.gelu, nn.SiLU(), torch.tanh], ids=["relu", "gelu", "silu", "tanh"]
)
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


def test_a_layer_round_a_skipped_attention() -> None:
    layer = nn.TransformerEncoderLayer(**LAYER, batch_first=True)
    layer.self_attn = nn.MultiheadAttention(E, H, batch_first=True, add_zero_attn=True)
    model, fused = twins(layer)
    gradients_agree(model, fused, torch.randn(B, S, E), src_key_padding_mask=PADDING)


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
