"""GPT-2 folders: parity with transformers, odd and damaged folders, saving, text in and out."""

import json
import os
import resource
import shutil
import time
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel

import tilewise
from tilewise.errors import (
    ArgumentError,
    CheckpointError,
    ConfigError,
    GenerationError,
    TokenizerError,
)
from tilewise.text import train_tokenizer

SHAPES: dict[str, dict] = {
    "untied": {
        "n_embd": 20,
        "n_head": 5,
        "n_layer": 3,
        "n_inner": 33,
        "tie_word_embeddings": False,
    },
    "inverse": {
        "n_embd": 24,
        "n_head": 2,
        "n_layer": 2,
        "scale_attn_by_inverse_layer_idx": True,
        "activation_function": "relu",
        "layer_norm_epsilon": 1e-3,
    },
    "unscaled": {
        "n_embd": 14,
        "n_head": 1,
        "n_layer": 1,
        "scale_attn_weights": False,
        "activation_function": "gelu",
        "initializer_range": 0.1,
    },
}


def reference(**changes: object) -> GPT2LMHeadModel:
    """A random GPT-2 of transformers in float32, every parameter random."""
    values: dict = {"vocab_size": 61, "n_positions": 24, "n_embd": 16, "n_head": 2, "n_layer": 2}
    values |= {"bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.3}
    torch.manual_seed(0)
    network = GPT2LMHeadModel(GPT2Config(**(values | changes))).eval()
    for name, parameter in network.named_parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=float("ln" in name), std=0.2)
    return network


def drawn(rows: int, length: int, vocab: int = 61) -> torch.Tensor:
    return torch.randint(0, vocab, (rows, length), generator=torch.Generator().manual_seed(5))


def edit_config(folder: Path, **changes: object) -> None:
    raw = json.loads((folder / "config.json").read_text())
    kept = {name: value for name, value in (raw | changes).items() if value != "absent"}
    (folder / "config.json").write_text(json.dumps(kept))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder that transformers wrote; copy it before changing it."""
    folder = tmp_path_factory.mktemp("small") / "gpt2"
    reference().save_pretrained(folder)
    return folder


@pytest.fixture
def changed(small: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small, tmp_path / "changed"))


# ---- parity ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float16])
def test_half_precision_loading(small: Path, dtype: object) -> None:
    ours, full = tilewise.load(small, dtype=dtype), tilewise.load(small)
    named = dtype if isinstance(dtype, torch.dtype) else getattr(torch, str(dtype))
    assert {p.dtype for p in ours.parameters()} == {named}
    for a, b in zip(ours.parameters(), full.parameters(), strict=True):
        assert torch.equal(a, b.to(named))
    with torch.no_grad():
        got, exact = ours(drawn(2, 8)).logits, full(drawn(2, 8)).logits
    assert got.dtype == named
    assert (got.float() - exact).abs().max() < 0.05 * exact.abs().max()
    assert ours.generate([[3, 4], [5]], num_beams=2, max_new_tokens=5).sequences.shape[0] == 2


def test_bfloat16_file_loads_as_float32(tmp_path: Path) -> None:
    theirs = reference().to(torch.bfloat16)
    theirs.save_pretrained(tmp_path)
    ours = tilewise.load(tmp_path)
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
    expected = theirs.float()(drawn(2, 8)).logits
    torch.testing.assert_close(ours(drawn(2, 8)).logits, expected, rtol=1e-4, atol=1e-4)


# ---- folders as they come ----------------------------------------------------------------------


def same_logits(folder: Path, small: Path) -> None:
    ids = drawn(2, 7)
    assert torch.equal(tilewise.load(folder)(ids).logits, tilewise.load(small)(ids).logits)


def test_sharded_folder(small: Path, tmp_path: Path) -> None:
    GPT2LMHeadModel.from_pretrained(small).save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    same_logits(tmp_path, small)


def test_base_model_names_and_old_buffers(small: Path, changed: Path) -> None:
    """Files of the bare GPT2Model lack the prefix; old ones carry mask buffers."""
    state = load_file(changed / "model.safetensors")
    bare = {name.removeprefix("transformer."): t for name, t in state.items()}
    bare |= {f"h.{i}.attn.bias": torch.ones(1, 1, 24, 24, dtype=torch.uint8) for i in range(2)}
    bare |= {f"h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(2)}
    save_file(bare, changed / "model.safetensors")
    same_logits(changed, small)


def test_repeated_head_and_one_of_its_own(small: Path, changed: Path) -> None:
    state = load_file(changed / "model.safetensors")
    state["lm_head.weight"] = state["transformer.wte.weight"].clone()
    save_file(state, changed / "model.safetensors")
    same_logits(changed, small)
    state["lm_head.weight"][0, 0] += 1
    save_file(state, changed / "model.safetensors")
    with pytest.warns(UserWarning, match="'lm_head.weight' differs from"):
        ours = tilewise.load(changed)
    theirs = GPT2LMHeadModel.from_pretrained(changed).eval()
    ids = torch.tensor([[5, 9, 30]])
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-4)


def test_unknown_keys_are_kept_and_code_like_ones_never_followed(changed: Path, tmp_path) -> None:
    strange = {"auto_map": {"AutoModel": "evil.Model"}, "trust_remote_code": True, "mine": [1]}
    edit_config(changed, **strange)
    (changed / "evil.py").write_text("raise SystemExit('code of the folder ran')")
    model = tilewise.load(changed)
    model.save(tmp_path / "again")
    raw = json.loads((tmp_path / "again" / "config.json").read_text())
    assert strange.items() <= raw.items()


def test_special_ids_of_a_larger_model(tmp_path: Path) -> None:
    """transformers writes GPT-2's 50256 into any small configuration that names no other."""
    small_one = GPT2Config(vocab_size=61, n_positions=24, n_embd=8, n_head=2, n_layer=1)
    theirs = GPT2LMHeadModel(small_one).eval()
    theirs.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="50256"):
        ours = tilewise.load(tmp_path)
    assert ours.config.eos_token_id == ()
    expected = theirs(drawn(2, 7)).logits
    torch.testing.assert_close(ours(drawn(2, 7)).logits, expected, rtol=1e-4, atol=1e-4)
    assert ours.generate([[3]], max_new_tokens=4).lengths.tolist() == [5]


def test_pickled_weights_are_refused_with_the_line_that_converts_them(changed: Path) -> None:
    (changed / "model.safetensors").unlink()
    marker = changed / "ran"
    payload = f"cos\nsystem\n(S'touch {marker}'\ntR."
    (changed / "pytorch_model.bin").write_text(payload)
    with pytest.raises(CheckpointError) as caught:
        tilewise.load(changed)
    message = str(caught.value)
    assert "pytorch_model.bin" in message and "save_pretrained" in message
    assert "GPT2LMHeadModel" in message or "AutoModelForCausalLM" in message
    assert str(changed) in message
    assert not marker.exists()


def test_missing_unexpected_and_unfitting_tensors_are_listed(changed: Path) -> None:
    state = load_file(changed / "model.safetensors")
    del state["transformer.h.1.ln_1.weight"]
    state["transformer.h.7.surprise"] = torch.zeros(2)
    name = "transformer.h.0.mlp.c_fc.weight"
    state[name] = state[name].t().contiguous()
    state["transformer.wpe.weight"] = torch.zeros(24, 16, dtype=torch.int64)
    save_file(state, changed / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        tilewise.load(changed)
    message = str(caught.value)
    for part in ("h.1.ln_1.weight", "h.7.surprise", "[64, 16]", "wpe.weight"):
        assert part in message, message


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"model_type": "gpt5"}, ConfigError, "model_type is 'gpt5'.*opens .*gpt2"),
        ({"model_type": "absent"}, ConfigError, "model_type is None"),
        ({"model_type": ["gpt2"]}, ConfigError, "model_type is \\['gpt2'\\]"),
        ({"n_head": 3}, ConfigError, "16 does not divide into 3"),
        ({"n_head": True}, ConfigError, "n_head is True"),
        ({"n_layer": 0}, ConfigError, "n_layer is 0"),
        ({"n_layer": 3}, CheckpointError, "h.2.ln_1.weight"),
        ({"n_layer": 1}, CheckpointError, "h.1.ln_1.weight"),
        ({"n_embd": "16"}, ConfigError, "n_embd is '16'"),
        ({"n_embd": 32}, CheckpointError, "wte.weight"),
        ({"n_inner": -4}, ConfigError, "n_inner is -4"),
        ({"n_inner": 1.5}, ConfigError, "n_inner is 1.5"),
        ({"vocab_size": 60}, CheckpointError, r"\[61, 16\]"),
        ({"n_positions": 25}, CheckpointError, "wpe.weight"),
        ({"activation_function": "tanh"}, ConfigError, "activation_function is 'tanh'"),
        ({"activation_function": ["relu"]}, ConfigError, "activation_function is"),
        ({"layer_norm_epsilon": "x"}, ConfigError, "layer_norm_epsilon is 'x'"),
        ({"layer_norm_epsilon": None}, ConfigError, "layer_norm_epsilon is None"),
        ({"tie_word_embeddings": "no"}, ConfigError, "tie_word_embeddings is 'no'"),
        ({"tie_word_embeddings": False}, CheckpointError, "lm_head.weight"),
        ({"eos_token_id": 1.5}, ConfigError, "eos_token_id is 1.5"),
        ({"eos_token_id": "</s>"}, ConfigError, "eos_token_id is '</s>'"),
        ({"bos_token_id": -1}, ConfigError, "bos_token_id is -1"),
        ({"add_cross_attention": True}, ConfigError, "add_cross_attention"),
        ({"resid_pdrop": 2}, ConfigError, "dropout is 2"),
    ],
)
def test_configurations_that_do_not_work(changed: Path, changes, error, match: str) -> None:
    edit_config(changed, **changes)
    with pytest.raises(error, match=match):
        tilewise.load(changed)


def test_folders_that_are_none(tmp_path: Path, small: Path) -> None:
    for source in (tmp_path / "nowhere", str(tmp_path / "nowhere"), "./nowhere", "a/b/c"):
        with pytest.raises(CheckpointError, match="there is no folder"):
            tilewise.load(source)
    for source in (None, 5, b"dates"):
        with pytest.raises(ArgumentError, match="source is"):
            tilewise.load(source)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="the hub gave none"):
        tilewise.load("a" * 5000)
    with pytest.raises(CheckpointError, match="there is no folder.*config.json"):
        tilewise.load(small / "config.json")
    with pytest.raises(CheckpointError, match="config.json"):
        tilewise.load(tmp_path)


def test_device_and_dtype_that_do_not_exist(small: Path) -> None:
    for device in ("cuda:99", "abacus", 3.5, 10**30, "meta", "privateuseone"):
        with pytest.raises(ArgumentError, match=f"device is .*{device}"):
            tilewise.load(small, device=device)
    for dtype in ("int8", torch.int64, "Tensor", None, 32):
        with pytest.raises(ArgumentError, match="dtype is"):
            tilewise.load(small, dtype=dtype)


def test_hub_id_without_a_network_is_one_quick_error(monkeypatch, tmp_path: Path) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    for source in ("gpt2", "someone/some-model", "not a hub id!"):
        began = time.monotonic()
        with pytest.raises(CheckpointError, match="the hub gave none"):
            tilewise.load(source)
        assert time.monotonic() - began < 10


# ---- saving ------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_transformers_reads_what_we_save(shape: str, tmp_path: Path) -> None:
    theirs = reference(**SHAPES[shape])
    theirs.save_pretrained(tmp_path / "theirs")
    network = tilewise.load(tmp_path / "theirs").network
    tilewise.Model(network).save(tmp_path / "ours")  # without the config.json it came from
    again, info = GPT2LMHeadModel.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    ids = drawn(2, 9)
    assert torch.equal(again.eval()(ids).logits, theirs(ids).logits)
    ours = tilewise.load(tmp_path / "ours")
    assert torch.equal(ours(ids).logits, tilewise.load(tmp_path / "theirs")(ids).logits)


def test_saved_dtype_is_the_weights_dtype(tmp_path: Path) -> None:
    """A folder that says bfloat16, loaded as float32, must not be read back as bfloat16."""
    reference().to(torch.bfloat16).save_pretrained(tmp_path / "half")
    edit_config(tmp_path / "half", torch_dtype="bfloat16")
    tilewise.load(tmp_path / "half").save(tmp_path / "full")
    assert {t.dtype for t in load_file(tmp_path / "full" / "model.safetensors").values()} == {
        torch.float32
    }
    assert GPT2LMHeadModel.from_pretrained(tmp_path / "full").dtype == torch.float32


def test_generation_defaults_survive_saving(changed: Path, tmp_path: Path) -> None:
    (changed / "generation_config.json").write_text(
        json.dumps({"num_beams": 3, "max_new_tokens": 4, "eos_token_id": [7, 9], "unknown": 1})
    )
    model = tilewise.load(changed)
    out = model.generate([[3, 4]])
    explicit = model.generate([[3, 4]], num_beams=3, max_new_tokens=4, eos_token_id=[7, 9])
    assert torch.equal(out.sequences, explicit.sequences)
    assert torch.equal(out.sequences_scores, explicit.sequences_scores)
    model.save(tmp_path / "again")
    again = tilewise.load(tmp_path / "again")
    assert again.generation_defaults == model.generation_defaults
    assert torch.equal(again.generate([[3, 4]]).sequences, out.sequences)


def test_damaged_generation_defaults(changed: Path) -> None:
    (changed / "generation_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="generation_config.json"):
        tilewise.load(changed)
    (changed / "generation_config.json").unlink()
    (changed / "generation_config.json").symlink_to("generation_config.json")
    with pytest.raises(CheckpointError, match="generation_config.json"):
        tilewise.load(changed)
    (changed / "generation_config.json").unlink()
    (changed / "generation_config.json").write_text('{"num_beams": "4"}')
    with pytest.raises(ArgumentError, match="num_beams is '4'"):
        tilewise.load(changed).generate([[3]])


# ---- text --------------------------------------------------------------------------------------

CORPUS = ["the cat sat on the mat", "a dog sat on a log", "caf\u00e9 \u6771\u4eac"]


def tokenizer_files(folder: Path) -> int:
    """A byte-level BPE as GPT-2's two files; returns its size."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=280,
        initial_alphabet=alphabet,
        special_tokens=["<|endoftext|>"],
        show_progress=False,
    )
    bpe.train_from_iterator(CORPUS, trainer)
    bpe.model.save(str(folder))
    return bpe.get_vocab_size()


@pytest.fixture(scope="module")
def talking(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with vocab.json and merges.txt whose model ends with token 0, <|endoftext|>."""
    folder = tmp_path_factory.mktemp("talking")
    size = tokenizer_files(folder)
    reference(vocab_size=size, bos_token_id=0, eos_token_id=0).save_pretrained(folder)
    return folder


def test_strings_in_texts_out(talking: Path, tmp_path: Path) -> None:
    model = tilewise.load(talking)
    prompts = ["the cat", "caf\u00e9 \u6771\u4eac", "a dog sat on"]
    options = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 6}
    out = model.generate(prompts, **options)
    ids = model.tokenizer.encode(prompts)
    assert model.tokenizer.decode(ids) == prompts
    same = model.generate(ids, **options)
    assert torch.equal(out.sequences, same.sequences) and same.texts is None
    assert len(out.texts) == 6
    for row in range(6):
        start = len(ids[row // 2])
        assert out.sequences[row, :start].tolist() == ids[row // 2]
        new = out.sequences[row, start : out.lengths[row]].tolist()
        assert out.texts[row] == model.tokenizer.decode([new])[0]
    assert model.generate("the cat", max_new_tokens=3).texts == (
        model.generate(["the cat"], max_new_tokens=3).texts
    )
    model.save(tmp_path / "again")
    again = tilewise.load(tmp_path / "again").generate(prompts, **options)
    assert again.texts == out.texts


def test_empty_text_starts_from_bos(talking: Path) -> None:
    model = tilewise.load(talking)
    out = model.generate(["", "the"], max_new_tokens=4)
    alone = model.generate([[0]], max_new_tokens=4)
    n = int(alone.lengths[0])
    assert out.sequences[0, :n].tolist() == alone.sequences[0, :n].tolist()
    assert out.texts[0] == model.tokenizer.decode([alone.sequences[0, 1:n].tolist()])[0]


def test_text_problems_are_named(small: Path, talking: Path, changed: Path) -> None:
    silent, model = tilewise.load(small), tilewise.load(talking)
    for inputs in ("hello", ["hello", "you"]):
        with pytest.raises(TokenizerError, match="no tokenizer files"):
            silent.generate(inputs)
    with pytest.raises(TokenizerError, match="lone surrogate"):
        model.generate(["\ud800"])
    with pytest.raises(ArgumentError, match="positions"):
        model.generate(["the cat sat on the mat " * 10])
    with pytest.raises(ArgumentError, match="attention_mask"):
        model.generate(["the"], attention_mask=torch.ones(1, 1))
    with pytest.raises(ArgumentError, match=r"input_ids\[1\] is str"):
        model.generate([[1], "the"])
    tokenizer_files(changed)
    with pytest.raises(TokenizerError, match="61 embeddings"):
        tilewise.load(changed)
    (changed / "merges.txt").unlink()
    with pytest.raises(TokenizerError, match="vocab.json"):
        tilewise.load(changed)


def test_special_tokens_may_lack_an_embedding(changed: Path) -> None:
    """As the <mask> of bart-large-cnn, whose tokenizer has one token more than its model."""
    tokens = json.loads(train_tokenizer(["abc"]).files()["tokenizer.json"])
    tokens["model"]["vocab"]["<mask>"] = 61
    (changed / "tokenizer.json").write_text(json.dumps(tokens))
    with pytest.raises(TokenizerError, match="62 tokens and the model only 61 embeddings"):
        tilewise.load(changed)
    tokens["added_tokens"].append(tokens["added_tokens"][0] | {"id": 61, "content": "<mask>"})
    (changed / "tokenizer.json").write_text(json.dumps(tokens))
    model = tilewise.load(changed)
    assert len(model.score(["cab"])[0].tokens) == 3  # of four, </s> the last
    with pytest.raises(ArgumentError, match="the id 61"):
        model.score(["a<mask>"])


def test_weights_of_nan_are_found_when_they_speak(changed: Path) -> None:
    state = load_file(changed / "model.safetensors")
    state["transformer.ln_f.bias"].fill_(torch.nan)
    save_file(state, changed / "model.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = tilewise.load(changed)
    for beams in (1, 3):
        with pytest.raises(GenerationError, match=r"step 0 for rows \[0, 1\]"):
            model.generate([[3], [4, 5]], num_beams=beams)


def test_loading_leaves_global_state_alone(small: Path) -> None:
    torch.manual_seed(11)
    before, directory = torch.get_rng_state(), os.getcwd()
    model = tilewise.load(small)
    assert not model.training and not model.network.training
    assert os.getcwd() == directory and torch.get_default_dtype() == torch.float32
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "field, value", [("n_embd", 2**24), ("n_layer", 1000), ("vocab_size", 2**31 - 1)]
)
def test_a_config_far_larger_than_its_weights_is_refused_before_memory_is_taken(
    field: str, value: int, tmp_path: Path
) -> None:
    GPT2LMHeadModel(GPT2Config(n_embd=16, n_head=2, n_layer=1, vocab_size=30)).save_pretrained(
        tmp_path
    )
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, field: value}))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match="do not fit"):
        tilewise.load(tmp_path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # KiB
