"""Other names for the same tensors, and tensors without a use, as files of the hub have them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

import tilewise
from tilewise.errors import ArgumentError, CheckpointError, ConfigError
from tilewise.families import FAMILIES

IDS = torch.randint(4, 59, (2, 7), generator=torch.Generator().manual_seed(0))


def written(kind: str, folder: Path, **changes: Any) -> tilewise.Model:
    """A random model of a family's first example, saved in folder."""
    torch.manual_seed(0)
    family = FAMILIES[kind]
    model = tilewise.Model(tilewise.build(family.config_from(family.EXAMPLES[0] | changes))).eval()
    model.save(folder)
    return model


def rewrite(folder: Path, change: Any) -> None:
    path = folder / "model.safetensors"
    tensors: dict[str, Tensor] = change(load_file(path))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


@pytest.mark.parametrize(
    "kind, old, new",
    [
        ("gpt_neox", "embed_out.", "lm_head."),
        ("gpt_neox", "gpt_neox.", ""),
        ("bloom", "transformer.", ""),
        ("openai-gpt", "transformer.", ""),
        ("opt", "model.decoder.", "decoder."),
        ("opt", "model.decoder.", ""),
    ],
)
def test_prefixes_and_heads(kind: str, old: str, new: str, tmp_path: Path) -> None:
    model = written(kind, tmp_path)
    rewrite(tmp_path, lambda found: {n.replace(old, new): t for n, t in found.items()})
    assert torch.equal(tilewise.load(tmp_path)(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize(
    "kind, extra",
    [
        ("gpt_neox", "gpt_neox.layers.0.attention.bias"),
        ("gpt_neox", "gpt_neox.layers.1.attention.masked_bias"),
        ("gpt_neox", "gpt_neox.layers.0.attention.rotary_emb.inv_freq"),
        ("openai-gpt", "transformer.h.0.attn.bias"),
        ("openai-gpt", "transformer.position_ids"),
    ],
)
def test_buffers_are_ignored(kind: str, extra: str, tmp_path: Path) -> None:
    model = written(kind, tmp_path)
    rewrite(tmp_path, lambda found: found | {extra: torch.zeros(3)})
    assert torch.equal(tilewise.load(tmp_path)(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize(
    "kind, tokens",
    [
        ("bloom", "transformer.word_embeddings.weight"),
        ("openai-gpt", "transformer.tokens_embed.weight"),
        ("opt", "model.decoder.embed_tokens.weight"),
    ],
)
def test_a_tied_head_may_be_in_the_file_twice(kind: str, tokens: str, tmp_path: Path) -> None:
    model = written(kind, tmp_path)
    rewrite(tmp_path, lambda found: found | {"lm_head.weight": found[tokens].clone()})
    assert torch.equal(tilewise.load(tmp_path)(IDS).logits, model(IDS).logits)


def test_the_first_llamas_say_minus_one_for_no_padding(tmp_path: Path) -> None:
    written("llama", tmp_path)
    for name in ("config.json", "generation_config.json"):
        path = tmp_path / name
        found = json.loads(path.read_text()) if path.exists() else {"num_beams": 2}
        path.write_text(json.dumps(found | {"pad_token_id": -1}))
    model = tilewise.load(tmp_path)
    assert model.config.pad_token_id is None
    assert model.generate(IDS, max_new_tokens=2).sequences.shape == (len(IDS), IDS.shape[1] + 2)


def test_of_two_ways_to_say_the_scaling_the_older_counts() -> None:
    llama = FAMILIES["llama"]
    both = {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 55.0}
    both |= {"rope_parameters": {"rope_type": "default", "rope_theta": 99.0}}
    config = llama.config_from(llama.SMALL | both)
    theirs = transformers.LlamaConfig(**llama.SMALL | both).rope_parameters
    assert (config.rotary_scaling, config.rotary_factor) == (theirs["rope_type"], theirs["factor"])
    assert config.rotary_base == theirs["rope_theta"] == 55.0


def test_embeddings_of_a_projected_decoder(tmp_path: Path) -> None:
    """OPT-350M's states leave its stack at the size of its embeddings."""
    model = written("opt", tmp_path, word_embed_proj_dim=10, do_layer_norm_before=False)
    found = model.embed(IDS.tolist(), pooling="last", normalize=False)
    assert found.shape == (2, 10)
    torch.testing.assert_close(found, model(IDS).last_hidden_state[:, -1])
    scored = model.score(IDS.tolist())[0].log_probs
    expected = model(IDS).logits[0, :-1].log_softmax(-1).gather(1, IDS[0, 1:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(scored), expected)


@pytest.mark.parametrize(
    "kind, wrong",
    [
        ("gpt_neox", {"rotary_pct": 1.5}),
        ("gpt_neox", {"num_attention_heads": 5}),
        ("gpt_neox", {"use_parallel_residual": 1}),
        ("gpt_neox", {"rope_parameters": {"rope_type": "linear"}}),
        ("llama", {"rope_scaling": {"type": "llama3"}}),
        ("bloom", {"n_head": 3}),
        ("bloom", {"n_head": 0}),
        ("openai-gpt", {"afn": "gelu_new"}),
        ("openai-gpt", {"afn": ["gelu"]}),
        ("opt", {"word_embed_proj_dim": -1}),
        ("opt", {"enable_bias": "yes"}),
    ],
)
def test_values_that_make_no_sense(kind: str, wrong: dict[str, Any], tmp_path: Path) -> None:
    written(kind, tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rope_parameters": None} | wrong))
    with pytest.raises(ConfigError):
        tilewise.load(tmp_path)


@pytest.mark.parametrize("kind", ["gpt_neox", "bloom", "openai-gpt", "opt"])
def test_a_folder_says_only_what_its_family_can(kind: str, tmp_path: Path) -> None:
    model = tilewise.build(tilewise.families.gpt2.config_from(FAMILIES["gpt2"].EXAMPLES[1]))
    fields = model.config.to_dict() | {"model_type": kind}
    odd = tilewise.build(tilewise.ModelConfig(**fields))
    with pytest.raises(ConfigError, match=f"a {kind} folder cannot say this"):
        tilewise.Model(odd).save(tmp_path)


BASES = [
    ("gpt2", "GPT2Model"), ("llama", "LlamaModel"), ("opt", "OPTModel"), ("bart", "BartModel"),
    ("t5", "T5Model"),
]  # fmt: skip


@pytest.mark.parametrize("kind, base", BASES)
def test_a_base_model_without_a_head_embeds(kind: str, base: str, tmp_path: Path) -> None:
    raw = {"architectures": [base], "tie_word_embeddings": False}
    written(kind, tmp_path, **raw)
    model = tilewise.load(tmp_path)
    more = {"decoder_input_ids": IDS} if model.config.is_seq2seq else {}
    out = model(IDS, **more)
    assert out.logits is None and out.last_hidden_state.shape == (2, 7, model.config.hidden_size)
    assert model.embed(IDS.tolist()).shape == (2, model.config.hidden_size)
    for refused in (
        lambda: model.generate(IDS),
        lambda: model.score(IDS.tolist(), IDS.tolist()),
        lambda: model(IDS, labels=IDS),
    ):
        with pytest.raises(ArgumentError, match=f"this {kind} has no output matrix"):
            refused()


def test_a_head_that_is_lost_is_missed(tmp_path: Path) -> None:
    written("llama", tmp_path)
    rewrite(tmp_path, lambda found: {n: t for n, t in found.items() if n != "lm_head.weight"})
    with pytest.raises(CheckpointError, match=r"1 missing: 'lm_head\.weight'"):
        tilewise.load(tmp_path)
