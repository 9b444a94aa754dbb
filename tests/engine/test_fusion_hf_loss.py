"""fuse() on Hugging Face models whose loss is written out inside forward: outputs, loss, saving.

Weights are random and larger than the initial ones; the gradients are those of test_fusion_hf.py.
"""

import copy
import inspect
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tilewise
from tilewise_kernels import record

transformers = pytest.importorskip("transformers")

VOCABULARY, ROWS, LENGTH = 61, 3, 9
ENCODER = dict(
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=24,
    max_position_embeddings=40,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)
BART = dict(
    d_model=16,
    encoder_layers=1,
    decoder_layers=1,
    encoder_attention_heads=2,
    decoder_attention_heads=2,
    encoder_ffn_dim=24,
    decoder_ffn_dim=24,
    max_position_embeddings=40,
    dropout=0.0,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    decoder_start_token_id=2,
)
T5 = dict(
    d_model=16,
    d_kv=8,
    d_ff=24,
    num_layers=1,
    num_heads=2,
    dropout_rate=0.0,
    decoder_start_token_id=0,
    pad_token_id=0,
)
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("BertConfig", "BertForMaskedLM", ENCODER),
    "roberta": ("RobertaConfig", "RobertaForMaskedLM", ENCODER),
    "bart": ("BartConfig", "BartForConditionalGeneration", BART),
    "t5": ("T5Config", "T5ForConditionalGeneration", T5),
}


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    config, model, values = MODELS[name]
    built = getattr(transformers, model)(
        getattr(transformers, config)(vocab_size=VOCABULARY, **values)
    )
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return built.eval()


def batch(name: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids, labels, decoder = torch.randint(3, VOCABULARY, (3, ROWS, LENGTH), generator=generator)
    labels[0, :2] = -100
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    inputs["attention_mask"][1, 5:] = 0
    return inputs if name in ("bert", "roberta") else inputs | {"decoder_input_ids": decoder}


FORMS = list(itertools.product(["dict", "tuple", "shifted", "positions"], MODELS))
FORMS += [("config", "bert"), ("config", "roberta")]  # BART itself fails with return_dict = False


@pytest.mark.parametrize(("form", "name"), FORMS)
def test_loss_inside_forward(form: str, name: str) -> None:
    """The same output object, loss first, whatever form is asked for."""
    model, inputs = make(name), batch(name)
    options: dict[str, Any] = {"return_dict": False} if form == "tuple" else {}
    model.config.return_dict = form != "config"
    if form == "shifted":
        inputs.pop("decoder_input_ids", None)
    order = list(inspect.signature(model.forward).parameters)
    order = order[: order.index("labels") + 1]
    args = [inputs.pop(key, None) for key in order] if form == "positions" else []
    twin = copy.deepcopy(model)
    report = tilewise.fuse(model)
    kind = type(twin).__name__
    assert ("", kind, f"{kind} with fused cross-entropy") in report.replaced
    with record() as ops:
        ours = model(*args, **inputs, **options)
    theirs = twin(*args, **inputs, **options)
    assert [op.op for op in ops][-1] == "cross_entropy"
    assert type(ours) is type(theirs) and len(ours) == len(theirs)
    if not isinstance(ours, tuple):
        assert list(ours) == list(theirs) and ours.loss is ours[0]
    for mine, other in zip(ours[:2], theirs[:2], strict=True):  # the loss and the logits
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_loss_inside_forward_in_bfloat16(name: str) -> None:
    """Its dtype is that of the logits, float32 under autocast."""
    model, inputs = make(name), batch(name)
    tilewise.fuse(model)
    exact = model(**inputs).loss.item()
    with torch.autocast("cpu", torch.bfloat16):
        autocast = model(**inputs).loss
    half = model.bfloat16()(**inputs).loss
    assert (autocast.dtype, half.dtype) == (torch.float32, torch.bfloat16)
    assert abs(autocast.item() - exact) < 0.05 * exact
    assert abs(half.item() - exact) < 0.05 * exact


@pytest.mark.parametrize("name", MODELS)
def test_a_model_with_fused_loss_is_called_as_before(name: str, tmp_path: Path) -> None:
    """Its class keeps its name and signature: transformers saves the one and reads the other."""
    model, inputs = make(name), batch(name)
    before, signature = type(model), inspect.signature(model.forward)
    report = tilewise.fuse(model)
    assert type(model) is not before and isinstance(model, before)
    assert list(inspect.signature(model.forward).parameters) == list(signature.parameters)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [before.__name__]
    other = before.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(other(**inputs).loss, model(**inputs).loss)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**inputs).loss, model(**inputs).loss)
    with pytest.raises((IndexError, ValueError, RuntimeError), match="."):
        model(**inputs | {"labels": inputs["labels"] + VOCABULARY})
    report.revert()
    assert type(model) is before


def test_bart_has_no_cache_beside_labels() -> None:
    model, inputs = make("bart"), batch("bart")
    twin = copy.deepcopy(model)
    tilewise.fuse(model)
    for more in ({}, {"use_cache": False}, {"use_cache": True}):
        assert list(model(**inputs, **more)) == list(twin(**inputs, **more))
