"""Loading: straight into the model's memory and dtype, and never anything but the file's values."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tilewise
from tilewise.checkpoints import fill_weights, open_weights
from tilewise.checkpoints.copying import WeightRule
from tilewise.errors import CheckpointError
from tilewise.families import FAMILIES, tensors_to
from tilewise.models import build

EXAMPLES = [
    pytest.param(raw, id=f"{name}-{i}")
    for name, family in FAMILIES.items()
    for i, raw in enumerate(family.EXAMPLES)
    if raw["model_type"] == name
]
SMALL: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 20,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 16,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def llama(folder: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """A folder of random weights: config.json and model.safetensors."""
    raw = SMALL | changes
    size, inner, heads = raw["hidden_size"], raw["intermediate_size"], raw["num_attention_heads"]
    keys = size // heads * raw["num_key_value_heads"]
    layer = "model.layers.0."
    shapes = {
        "model.embed_tokens.weight": (raw["vocab_size"], size),
        "model.norm.weight": (size,),
        f"{layer}input_layernorm.weight": (size,),
        f"{layer}post_attention_layernorm.weight": (size,),
        f"{layer}self_attn.q_proj.weight": (size, size),
        f"{layer}self_attn.k_proj.weight": (keys, size),
        f"{layer}self_attn.v_proj.weight": (keys, size),
        f"{layer}self_attn.o_proj.weight": (size, size),
        f"{layer}mlp.gate_proj.weight": (inner, size),
        f"{layer}mlp.up_proj.weight": (inner, size),
        f"{layer}mlp.down_proj.weight": (size, inner),
    }
    generator = torch.Generator().manual_seed(2)
    tensors = {n: torch.randn(s, generator=generator).to(dtype) for n, s in shapes.items()}
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


def sharded(folder: Path, raw: dict[str, Any], dtype: torch.dtype, shards: int = 2) -> Path:
    """A folder of ones, dealt out to shards."""
    config = FAMILIES[raw["model_type"]].config_from(raw, None)
    with torch.device("meta"):
        shapes = {n: t.shape for n, t in tensors_to(config, build(config).state_dict()).items()}
    folder.mkdir(parents=True)
    places = {name: f"part-{i % shards}.safetensors" for i, name in enumerate(sorted(shapes))}
    for part in set(places.values()):
        names = [name for name in places if places[name] == part]
        save_file({n: torch.ones(shapes[n], dtype=dtype) for n in names}, folder / part)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


# The peak is read from VmHWM: ru_maxrss starts with what the parent process had.
MEASURE = """
import json, sys, tilewise
from pathlib import Path

def status(field):
    text = Path("/proc/self/status").read_text()
    return int(text.split(field + ":")[1].split()[0]) * 1024

small, large, dtype = sys.argv[1:]
tilewise.load(small, dtype=dtype)  # whatever a first load imports and keeps
before = status("VmRSS")
model = tilewise.load(large, dtype=dtype)
size = sum(p.nbytes for p in model.parameters())
print(json.dumps({"growth": status("VmHWM") - before, "size": size}))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 MB in float32, most of it one embedding matrix."""
    sizes = {"vocab_size": 32768, "hidden_size": 2048, "intermediate_size": 64}
    return llama(tmp_path_factory.mktemp("large") / "m", **sizes, num_attention_heads=16)


def growth(*arguments: str) -> tuple[int, float]:
    """Bytes of the weights, and the growth of a process that loads them over that."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *arguments], check=True, capture_output=True, text=True
    )
    found = json.loads(done.stdout)
    return found["size"], found["growth"] / found["size"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_grows_by_little_more_than_the_weights(
    tmp_path: Path, large: Path, dtype: str
) -> None:
    size, grown = growth(str(llama(tmp_path / "small")), str(large), dtype)
    wanted = {"float32": 300e6, "bfloat16": 150e6}[dtype]
    assert wanted < size < 1.1 * wanted
    assert 0.9 < grown <= 1.2


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_grows_as_little_for_shards_of_transposed_weights(tmp_path: Path) -> None:
    gpt2 = FAMILIES["gpt2"].EXAMPLES[0]
    small = sharded(tmp_path / "small", gpt2, torch.bfloat16)
    large = gpt2 | {"n_embd": 768, "n_head": 12, "n_layer": 8}
    folder = sharded(tmp_path / "large", large, torch.bfloat16)
    size, grown = growth(str(small), str(folder), "float32")
    assert size > 200e6
    assert 0.9 < grown <= 1.2


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16, torch.float64])
def test_every_value_arrives_in_the_wanted_dtype(
    tmp_path: Path, stored: torch.dtype, wanted: torch.dtype
) -> None:
    # The embedding is 2.3 pieces of the file, and no whole number of rows ends where a piece does.
    folder = llama(tmp_path / "m", stored, vocab_size=8191, hidden_size=74, num_attention_heads=37)
    model = tilewise.load(folder, dtype=wanted)
    tensors = load_file(folder / "model.safetensors")
    parts = [tensors[f"model.layers.0.self_attn.{x}_proj.weight"] for x in "qkv"]
    packed = model.network.state_dict()["layers.0.self_attn.in_proj_weight"]
    assert torch.equal(packed, torch.cat(parts).to(wanted))
    embedding = model.network.embedding.tokens.weight
    assert torch.equal(embedding, tensors["model.embed_tokens.weight"].to(wanted))
    assert {p.dtype for p in model.parameters()} == {wanted}


def test_a_transposed_target_and_integers_are_filled_too(tmp_path: Path) -> None:
    source = {"w": torch.randn(6, 4), "n": torch.tensor([5])}
    save_file(source, tmp_path / "model.safetensors")
    target = {"w": torch.zeros(4, 6).t(), "n": torch.tensor([0])}
    rules = [WeightRule("w", "w"), WeightRule("n", "n")]
    assert fill_weights(target, open_weights(tmp_path), rules) == []
    assert torch.equal(target["w"], source["w"]) and target["n"].item() == 5


def test_loading_leaves_the_default_dtype_alone(tmp_path: Path) -> None:
    model = tilewise.load(llama(tmp_path / "m"), dtype="bfloat16")
    assert torch.get_default_dtype() == torch.float32
    assert next(model.parameters()).dtype == torch.bfloat16


@pytest.mark.parametrize("raw", EXAMPLES)
def test_every_family_is_built_on_the_meta_device(raw: dict[str, Any]) -> None:
    config = FAMILIES[raw["model_type"]].config_from(raw, None)
    with torch.device("meta"):
        state = build(config).state_dict()
    assert all(tensor.is_meta for tensor in state.values())
    assert {n: t.shape for n, t in state.items()} == {
        n: t.shape for n, t in build(config).state_dict().items()
    }


LOAD_ALL = """
import sys, torch, tilewise
before = torch.random.get_rng_state()
for folder in sys.argv[1:]:
    tilewise.load(folder)
    assert "torch._dynamo" not in sys.modules, folder
assert torch.equal(torch.random.get_rng_state(), before)
"""


def test_loading_draws_no_random_number_and_imports_no_compiler(tmp_path: Path) -> None:
    """Either costs seconds: torch's meta kernels written in Python import its compiler."""
    raws = [case.values[0] for case in EXAMPLES]
    folders = [sharded(tmp_path / str(i), raw, torch.float32) for i, raw in enumerate(raws)]  # type: ignore[arg-type]
    subprocess.run([sys.executable, "-c", LOAD_ALL, *map(str, folders)], check=True)


def test_position_tables_are_exact_in_every_dtype() -> None:
    exact = tilewise.load("dates").network.encoder.embedding.table
    for dtype in (torch.bfloat16, torch.float16):
        table = tilewise.load("dates", dtype=dtype).network.encoder.embedding.table
        assert torch.equal(table, exact.to(dtype))


def test_a_shard_that_changes_while_loading_is_an_error(tmp_path: Path) -> None:
    weights = open_weights(llama(tmp_path / "m"))
    with open(tmp_path / "m" / "model.safetensors", "r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(bytes(4))
    os.utime(tmp_path / "m" / "model.safetensors", (0, 0))
    with pytest.raises(CheckpointError, match="changed while loading"):
        weights.read("model.norm.weight")
