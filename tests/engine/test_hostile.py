"""Hostile folders through `load`: each ends in an error of tilewise, in bounded time and memory.

What a single file of weights may do wrong is in test_checkpoints.py, what a tokenizer's may in
test_text.py; here are whole folders, and the configurations of every family.
"""

import functools
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import tilewise
from tilewise.checkpoints import open_weights
from tilewise.errors import CheckpointError, ConfigError, TilewiseError
from tilewise.families import FAMILIES, tensors_to
from tilewise.models import build
from tilewise.text import train_tokenizer

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
EXAMPLES = [
    pytest.param(raw, id=f"{name}-{i}")
    for name, family in FAMILIES.items()
    for i, raw in enumerate(family.EXAMPLES)
    if raw["model_type"] == name
]
SMALL = FAMILIES["llama"].EXAMPLES[0]
MEMORY = 64 << 20  # bytes that no hostile folder of a few KB may cost
MARK = Path("/proc/self/clear_refs")  # a 5 written there sets the high-water mark back


def write_model(folder: Path, raw: dict[str, Any] = SMALL, **changed: torch.Tensor) -> Path:
    """A folder of random weights of a family's example, as the family names them."""
    config = FAMILIES[raw["model_type"]].config_from(raw, None)
    torch.manual_seed(0)
    state = build(config).state_dict()
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {n: t.clone().contiguous() for n, t in tensors_to(config, state).items()}
    save_file(tensors | changed, folder / WEIGHTS)
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


@pytest.fixture(scope="module", autouse=True)
def imports(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What the first load imports is not what a hostile folder costs."""
    tilewise.load(write_model(tmp_path_factory.mktemp("sound")))


def peak(*, anew: bool = False) -> int:
    """The most bytes that this process has had. anew: forget what it had before, or the memory that
    an earlier test took would hide what a later one takes.
    """
    if not MARK.exists():  # no Linux
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if anew:
        MARK.write_text("5")
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024


def refused(folder: Path, seconds: float = 1.0) -> TilewiseError:
    """The error of loading, which came soon and cost little."""
    began, before = time.process_time(), peak(anew=True)
    with warnings.catch_warnings(), pytest.raises(TilewiseError) as caught:
        warnings.simplefilter("ignore")
        tilewise.load(folder)
    assert time.process_time() - began < seconds and peak() - before < MEMORY
    return caught.value


@pytest.mark.parametrize(
    ("values", "kib", "step"), [(40, 4, 1), pytest.param(890, 64, 997, marks=pytest.mark.long)]
)
def test_a_file_cut_at_many_bytes(tmp_path: Path, values: int, kib: int, step: int) -> None:
    """4 KiB at every byte, 64 KiB at every 997th."""
    tmp_path.joinpath("m").mkdir()
    path = tmp_path / "m" / WEIGHTS
    save_file({f"tensor.{i}": torch.ones(values) for i in range(18)}, path)
    size = path.stat().st_size
    assert 0.95 < size / (kib * 1024) < 1.07
    began = time.process_time()
    for length in reversed(range(0, size, step)):
        os.truncate(path, length)
        with pytest.raises(CheckpointError, match="damaged"):
            open_weights(tmp_path / "m")
    assert time.process_time() - began < 0.05 * size


@pytest.mark.parametrize("length", [0, 1, 10_000, 100_000_001, 2**63, 2**64 - 1])
def test_header_lengths_cost_no_memory(tmp_path: Path, length: int) -> None:
    folder = write_model(tmp_path)
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(length.to_bytes(8, "little") + content[8:])
    with pytest.raises(CheckpointError):
        open_weights(folder)  # imports
    before = peak(anew=True)
    with pytest.raises(CheckpointError, match="damaged"):
        open_weights(folder)
    assert peak() - before <= 1 << 20


def test_one_error_lists_all_that_does_not_fit(tmp_path: Path) -> None:
    folder = write_model(tmp_path, extra=torch.ones(2))
    tensors = load_file(folder / WEIGHTS)
    tensors["model.norm.weight"] = torch.ones(3)
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, folder / WEIGHTS)
    text = str(refused(folder))
    assert "1 missing: 'model.layers.0.mlp.up_proj.weight'" in text
    assert "1 unexpected: 'extra'" in text and "1 not fitting: 'model.norm.weight'" in text


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.self_attn.k_proj.weight"])
def test_weights_that_are_not_finite(tmp_path: Path, name: str, value: float) -> None:
    folder = write_model(tmp_path)
    tensors = load_file(folder / WEIGHTS)
    tensors[name].view(-1)[-1] = value
    save_file(tensors, folder / WEIGHTS)
    with pytest.warns(UserWarning, match=f"NaN or infinite as float32: '{name}'$"):
        tilewise.load(folder)
    with pytest.raises(CheckpointError, match=f"NaN or infinite as float32: '{name}'"):
        tilewise.load(folder, strict_finite=True)


def test_values_beyond_the_wanted_dtype_are_named(tmp_path: Path) -> None:
    folder = write_model(tmp_path)
    tensors = load_file(folder / WEIGHTS)
    tensors["model.norm.weight"][0] = 1e6
    save_file(tensors, folder / WEIGHTS)
    tilewise.load(folder, dtype="bfloat16", strict_finite=True)
    with pytest.raises(CheckpointError, match="infinite as float16: 'model.norm.weight'"):
        tilewise.load(folder, dtype="float16", strict_finite=True)


TRUNCATE = """
import os, sys, tilewise
from tilewise.checkpoints import copying

class Cut:  # shortens the file once some of it has been read
    def __call__(self, values):
        os.truncate(sys.argv[1] + "/model.safetensors", 4096)
        return True

copying.finite = Cut()
try:
    tilewise.load(sys.argv[1])
except tilewise.TilewiseError as error:
    print("refused:", error)
"""


def test_truncation_while_loading_does_not_kill(tmp_path: Path) -> None:
    folder = str(write_model(tmp_path))
    done = subprocess.run([sys.executable, "-c", TRUNCATE, folder], capture_output=True, text=True)
    assert done.returncode == 0 and "changed while loading" in done.stdout


@pytest.mark.parametrize("flips", [1000, pytest.param(20_000, marks=pytest.mark.long)])
def test_no_flipped_bit_goes_unseen_in_a_verified_folder(tmp_path: Path, flips: int) -> None:
    tilewise.load(write_model(tmp_path / "theirs")).save(tmp_path / "ours")
    tilewise.load(tmp_path / "ours", verify=True)
    generator = random.Random(0)
    names = sorted(p.name for p in (tmp_path / "ours").iterdir())
    for i in range(flips):
        path = tmp_path / "ours" / (WEIGHTS if i % 2 else generator.choice(names))
        content = bytearray(path.read_bytes())
        position = generator.randrange(len(content))
        content[position] ^= 1 << generator.randrange(8)
        sound = path.read_bytes()
        path.write_bytes(content)
        with pytest.raises(CheckpointError):
            tilewise.load(tmp_path / "ours", verify=True)
        path.write_bytes(sound)


def test_verifying_needs_a_manifest_of_all_files(tmp_path: Path) -> None:
    folder = write_model(tmp_path)
    with pytest.raises(CheckpointError, match="has no sha256.json"):
        tilewise.load(folder, verify=True)
    for text in ('{"../config.json": "0"}', "{}", '{"config.json": [1]}'):
        (folder / "sha256.json").write_text(text)
        with pytest.raises(CheckpointError, match="not as they were saved"):
            tilewise.load(folder, verify=True)
    tilewise.load(folder)


VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2.5, float("nan"), float("inf"), 2**31, 2**70, 1e400, "", "x",
    [], [None], [[1]], ["x"], {}, {"x": []}, {"rope_type": []}, {"factor": "x"},
]  # fmt: skip


@pytest.mark.parametrize("raw", EXAMPLES)
def test_every_key_of_a_config_with_every_kind_of_value(raw: dict[str, Any]) -> None:
    """Each value is taken or refused by ConfigError; what is taken can be described."""
    family = FAMILIES[raw["model_type"]]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in raw.keys() - {"model_type"}:
            for value in VALUES:
                try:
                    family.config_from(raw | {name: value}, set())
                except ConfigError:
                    continue
                except Exception as error:
                    pytest.fail(f"{name} = {value!r}: {type(error).__name__}: {error}")


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 10**9},
        {"hidden_size": 2**30, "num_attention_heads": 1},
        {"num_attention_heads": 3},
        {"num_key_value_heads": 8},
        {"rms_norm_eps": float("nan")},
        {"rope_theta": 0},
        {"vocab_size": 62},
        {"vocab_size": True},
        {"model_type": "x"},
        {"model_type": ["llama"]},
        {"model_type": "tilewise-transformer"},
        {"tie_word_embeddings": "yes"},
    ],
    ids=str,
)
def test_configurations_that_make_no_sense(tmp_path: Path, changes: dict[str, Any]) -> None:
    folder = write_model(tmp_path)
    (folder / "config.json").write_text(json.dumps(SMALL | changes))
    refused(folder)


OWN = {
    "model_type": "tilewise-transformer", "vocab_size": 61, "hidden_size": 16, "num_heads": 2,
    "ffn_size": 20, "encoder_layers": 1, "decoder_layers": 1, "max_positions": 24,
}  # fmt: skip
SIZED = [
    *[family.EXAMPLES[0] for family in FAMILIES.values() if family.EXAMPLES],
    *[OWN | {"positions": kind} for kind in ("learned", "sinusoidal", "relative", "alibi")],
]


@pytest.mark.parametrize("raw", SIZED, ids=lambda raw: raw["model_type"])
def test_impossible_sizes_cost_nothing(tmp_path: Path, raw: dict[str, Any]) -> None:
    """Any whole number of config.json made huge: an error, or a number that takes no memory."""
    folder = write_model(tmp_path, raw)
    before = peak(anew=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in [key for key, value in raw.items() if type(value) is int]:
            for value in (2**26, 2**31 - 1):
                (folder / "config.json").write_text(json.dumps(raw | {name: value}))
                try:
                    tilewise.load(folder)
                except TilewiseError:
                    continue
    assert peak() - before < MEMORY


def test_a_table_of_sinusoids_has_a_largest_size() -> None:
    sizes = {"max_positions": 2**22, "hidden_size": 16, "num_heads": 1}
    family = FAMILIES["tilewise-transformer"]
    family.config_from(OWN | sizes | {"positions": "sinusoidal"}, set())
    for more in ({"max_positions": 2**22 + 1}, {"position_offset": 1}, {"hidden_size": 17}):
        with pytest.raises(ConfigError, match="max_positions is .* sinusoids are more than"):
            family.config_from(OWN | sizes | {"positions": "sinusoidal"} | more, set())


@pytest.mark.parametrize("content", [b"[" * 1000, b'{"a":' * 1000, b" " * (50 << 20)])
def test_configurations_too_deep_or_too_large(tmp_path: Path, content: bytes) -> None:
    folder = write_model(tmp_path)
    (folder / "config.json").write_bytes(content)
    refused(folder)


def test_keys_that_name_code_do_nothing(tmp_path: Path) -> None:
    folder, sentinel = write_model(tmp_path), tmp_path / "ran"
    plain = tilewise.load(folder)
    (folder / "evil.py").write_text(f"open({str(sentinel)!r}, 'w')")
    code = {
        "auto_map": {"AutoModelForCausalLM": "evil.Model", "AutoConfig": "evil.Config"},
        "_attn_implementation_internal": "evil/kernel",
        "_attn_implementation": "evil/kernel",
        "trust_remote_code": True,
        "custom_pipelines": {"x": {"impl": "evil.Pipe"}},
        "quantization_config": {"quant_method": "evil"},
        "transformers_version": "99.0",
    }
    (folder / "config.json").write_text(json.dumps(SMALL | code))
    assert tilewise.load(folder).config == plain.config
    assert not sentinel.exists() and "evil" not in sys.modules


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"model": 1}', b"\xff" * 99, b"[" * 9999])
def test_a_corrupt_tokenizer(tmp_path: Path, content: bytes) -> None:
    folder = write_model(tmp_path)
    (folder / "tokenizer.json").write_bytes(content)
    assert "tokenizer.json" in str(refused(folder))


def test_a_tokenizer_larger_than_the_embedding(tmp_path: Path) -> None:
    folder = write_model(tmp_path)
    text = "".join(chr(0x4E00 + i) for i in range(100))
    (folder / "tokenizer.json").write_bytes(train_tokenizer([text]).files()["tokenizer.json"])
    assert "104 tokens" in str(refused(folder))


def test_a_chat_template_is_never_run(tmp_path: Path) -> None:
    folder, sentinel = write_model(tmp_path), tmp_path / "ran"
    attack = (
        "{{ ''.__class__.__mro__[1].__subclasses__() }}"
        f"{{{{ cycler.__init__.__globals__.os.system('touch {sentinel}') }}}}"
    )
    (folder / "tokenizer.json").write_bytes(tokenizer_json())
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": attack}))
    (folder / "chat_template.jinja").write_text(attack)
    model = tilewise.load(folder)
    assert model.tokenizer is not None and model.tokenizer.encode(["ab"]) == [[4, 5, 2]]
    model.save(tmp_path / "again")
    assert not sentinel.exists()
    assert (tmp_path / "again" / "chat_template.jinja").read_text() == attack


# A fuzzer of whole folders

KINDS = ["config", "weights", "header", "index", "value", "tokenizer", "settings"]
# Files that a folder may have besides, and keys of those that are JSON.
WORDS = b"[UNK]\n[CLS]\n[SEP]\n[PAD]\n[MASK]\na\n##b\n"
SETTINGS = {
    "generation_config.json": ["eos_token_id", "bad_words_ids", "suppress_tokens", "num_beams"],
    "tokenizer_config.json": [
        "padding_side",
        "cls_token",
        "added_tokens_decoder",
        "do_lower_case",
        "pad_token",
        "mask_token",
    ],
    "special_tokens_map.json": ["unk_token", "additional_special_tokens"],
    "added_tokens.json": ["a", "[CLS]"],
}
ODD: list[Any] = [*VALUES, [[[1]]], [{}], {"content": []}, {"1": {}}, {"1": {"content": "q"}}]


@functools.cache
def tokenizer_json() -> bytes:
    return train_tokenizer(["ab"]).files()["tokenizer.json"]


def mutate(folder: Path, raw: dict[str, Any], data: st.DataObject) -> None:
    """One change of a folder: bytes of a file, a value of its JSON, an odd file, or odd shards."""
    kind = data.draw(st.sampled_from(KINDS))
    if kind == "value":
        changed = {data.draw(st.sampled_from(sorted(raw))): data.draw(st.sampled_from(VALUES))}
        (folder / "config.json").write_text(json.dumps(raw | changed))
    elif kind == "settings":
        (folder / "vocab.txt").write_bytes(WORDS)
        name = data.draw(st.sampled_from(sorted(SETTINGS)))
        key = data.draw(st.sampled_from(SETTINGS[name]))
        (folder / name).write_text(json.dumps({key: data.draw(st.sampled_from(ODD))}))
    elif kind == "index":
        names = [WEIGHTS, "../x.safetensors", "gone.safetensors", INDEX, 7]
        tensors = [*open_weights(folder).tensors, "x", ""]
        places = {n: data.draw(st.sampled_from(names)) for n in tensors[-5:]}
        (folder / INDEX).write_text(json.dumps({"weight_map": places}))
        (folder / WEIGHTS).rename(folder / "part.safetensors")
    else:
        files = {"config": "config.json", "tokenizer": "tokenizer.json"}
        path = folder / files.get(kind, WEIGHTS)
        if kind == "tokenizer":
            path.write_bytes(tokenizer_json())
        content = bytearray(path.read_bytes())
        last = 8 + int.from_bytes(content[:8], "little") if kind == "header" else len(content)
        for _ in range(data.draw(st.integers(1, 4))):
            position = data.draw(st.integers(0, min(last, len(content)) - 1))
            content[position] = data.draw(st.integers(0, 255))
        path.write_bytes(content[: data.draw(st.sampled_from([None, None, -1, 100]))])


def attack(folder: Path, raw: dict[str, Any], data: st.DataObject) -> None:
    """Loads a mutated folder: it gives a model, of the file's values, or an error of ours."""
    write_model(folder, raw)
    mutate(folder, raw, data)
    began, before = time.process_time(), peak(anew=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = tilewise.load(folder)
        except TilewiseError:
            model = None
    assert time.process_time() - began < 1 and peak() - before < MEMORY
    if model is not None and raw["model_type"] == "llama":
        tokens = load_file(folder / WEIGHTS)["model.embed_tokens.weight"].float()
        assert torch.equal(model.network.embedding.tokens.weight.nan_to_num(), tokens.nan_to_num())
    shutil.rmtree(folder)


RAWS = st.sampled_from([raw for case in EXAMPLES for raw in case.values])


@settings(max_examples=200, deadline=None, derandomize=True)
@given(raw=RAWS, data=st.data())
def test_mutated_folders(
    tmp_path_factory: pytest.TempPathFactory, raw: dict[str, Any], data: st.DataObject
) -> None:
    attack(tmp_path_factory.mktemp("fuzz"), raw, data)


@pytest.mark.long
@settings(max_examples=20_000, deadline=None)
@given(raw=RAWS, data=st.data())
def test_many_mutated_folders(
    tmp_path_factory: pytest.TempPathFactory, raw: dict[str, Any], data: st.DataObject
) -> None:
    attack(tmp_path_factory.mktemp("fuzz"), raw, data)
