"""LLaMA folders with Meta's own names and params.json, against Meta's form of the arithmetic."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

import tilewise
from tilewise.errors import CheckpointError, ConfigError
from tilewise.pretrained import inspect

# As in Llama 2 7B's file, but small: the inner size is 8 / 3 of dim, to the next multiple.
PARAMS: dict[str, Any] = {
    "dim": 24, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "multiple_of": 16, "vocab_size": 61,
    "norm_eps": 1e-5, "rope_theta": 1000.0,
}  # fmt: skip
INNER = 64


def weights(inner: int = INNER, layers: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * 0.3

    found = {"tok_embeddings.weight": drawn(61, 24), "norm.weight": drawn(24) + 1}
    found |= {"output.weight": drawn(61, 24), "rope.freqs": drawn(3)}
    shapes = {"attention.wq": (24, 24), "attention.wk": (12, 24), "attention.wv": (12, 24),
              "attention.wo": (24, 24), "feed_forward.w1": (inner, 24),
              "feed_forward.w2": (24, inner), "feed_forward.w3": (inner, 24)}  # fmt: skip
    for i in range(layers):
        found |= {f"layers.{i}.{name}.weight": drawn(*shape) for name, shape in shapes.items()}
        found |= {f"layers.{i}.{x}_norm.weight": drawn(24) + 1 for x in ("attention", "ffn")}
    return found


def folder_of(path: Path, tensors: dict[str, Tensor], params: dict[str, Any] = PARAMS) -> Path:
    save_file(tensors, path / "consolidated.safetensors")
    (path / "params.json").write_text(json.dumps(params))
    return path


def metas(w: dict[str, Tensor], ids: Tensor, heads: int = 4, kv_heads: int = 2) -> Tensor:
    """Logits [R, S, V]: neighbouring columns of a head are one complex number that turns."""

    def norm(x: Tensor, name: str) -> Tensor:
        return F.rms_norm(x, (24,), w[name + ".weight"], PARAMS["norm_eps"])

    size = 24 // heads
    angles = torch.outer(
        torch.arange(ids.shape[1]), PARAMS["rope_theta"] ** (-torch.arange(0, size, 2) / size)
    )
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]

    def turned(x: Tensor) -> Tensor:  # [R, S, H, D]
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * turn).flatten(-2)

    x = w["tok_embeddings.weight"][ids]
    for i in range(2):
        part = f"layers.{i}."
        inner = norm(x, part + "attention_norm")
        q, k, v = (
            (inner @ w[f"{part}attention.w{name}.weight"].T).unflatten(-1, (-1, size))
            for name in "qkv"
        )
        q, k = turned(q), turned(k).repeat_interleave(heads // kv_heads, 2)
        v = v.repeat_interleave(heads // kv_heads, 2)
        scores = torch.einsum("rshd,rthd->rhst", q, k) / math.sqrt(size)
        ahead = torch.ones(ids.shape[1], ids.shape[1]).triu(1).bool()
        probabilities = scores.masked_fill(ahead, -math.inf).softmax(-1)
        mixed = torch.einsum("rhst,rthd->rshd", probabilities, v).flatten(2)
        x = x + mixed @ w[part + "attention.wo.weight"].T
        inner = norm(x, part + "ffn_norm")
        up = F.silu(inner @ w[part + "feed_forward.w1.weight"].T)
        up = up * (inner @ w[part + "feed_forward.w3.weight"].T)
        x = x + up @ w[part + "feed_forward.w2.weight"].T
    return norm(x, "norm") @ w["output.weight"].T


def ids() -> Tensor:
    return torch.randint(4, 61, (3, 9), generator=torch.Generator().manual_seed(1))


def test_logits_are_metas(tmp_path: Path) -> None:
    tensors = weights()
    model = tilewise.load(folder_of(tmp_path, tensors))
    torch.testing.assert_close(model(ids()).logits, metas(tensors, ids()), rtol=1e-4, atol=1e-4)
    assert model.config.ffn_size == INNER and model.config.eos_token_id == (2,)
    config, found = inspect(tmp_path)
    assert config == model.config and found.keys() == tensors.keys()


def test_saved_again_it_has_transformers_form(tmp_path: Path) -> None:
    model = tilewise.load(folder_of(tmp_path, weights()))
    config, tensors = inspect(tmp_path)
    assert config == model.config and tensors["output.weight"].shape == (61, 24)
    model.save(tmp_path / "again")
    again = tilewise.load(tmp_path / "again")
    assert again.config == model.config
    assert torch.equal(again(ids()).logits, model(ids()).logits)
    names = tilewise.checkpoints.open_weights(tmp_path / "again").tensors
    assert "model.layers.1.self_attn.q_proj.weight" in names


def test_metas_names_beside_a_config_json(tmp_path: Path) -> None:
    tensors = weights()
    save_file(tensors, tmp_path / "model.safetensors")
    config = {
        "model_type": "llama", "vocab_size": 61, "hidden_size": 24, "intermediate_size": INNER,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5, "rope_theta": 1000.0,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    logits = tilewise.load(tmp_path)(ids()).logits
    torch.testing.assert_close(logits, metas(tensors, ids()), rtol=1e-4, atol=1e-4)


def test_without_an_output_matrix_it_is_tied(tmp_path: Path) -> None:
    tensors = weights()
    del tensors["output.weight"]
    model = tilewise.load(folder_of(tmp_path, tensors))
    expected = metas(tensors | {"output.weight": tensors["tok_embeddings.weight"]}, ids())
    assert model.config.tie_embeddings
    torch.testing.assert_close(model(ids()).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "published, inner",
    [
        ({"dim": 4096, "n_layers": 32, "n_heads": 32, "multiple_of": 256, "vocab_size": -1}, 11008),
        ({"dim": 8192, "n_layers": 80, "n_heads": 64, "n_kv_heads": 8, "multiple_of": 4096,
          "ffn_dim_multiplier": 1.3, "vocab_size": 32000}, 28672),
        ({"dim": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8, "multiple_of": 1024,
          "ffn_dim_multiplier": 1.3, "vocab_size": 128256, "use_scaled_rope": True}, 14336),
    ],
    ids=["1-7B", "2-70B", "3.1-8B"],
)  # fmt: skip
def test_published_params(published: dict[str, Any], inner: int) -> None:
    config = tilewise.families.FAMILIES["llama"].config_from(published)
    assert config.ffn_size == inner
    third = published["vocab_size"] == 128256
    assert config.vocab_size == (128256 if third else 32000)
    assert config.rotary_scaling == ("llama3" if third else "none")
    assert config.eos_token_id == ((128001, 128008, 128009) if third else (2,))


@pytest.mark.parametrize(
    "wrong", [{"dim": "wide"}, {"sliding_window": 4096}, {"multiple_of": 0},
              {"ffn_dim_multiplier": -1.0}, {"vocab_size": "x"}, {"n_kv_heads": 3}],
    ids=lambda wrong: next(iter(wrong)),
)  # fmt: skip
def test_what_params_cannot_mean(tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        tilewise.load(folder_of(tmp_path, weights(), PARAMS | wrong))


def test_weights_of_another_size(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="attention.wq"):
        tilewise.load(folder_of(tmp_path, weights(), PARAMS | {"dim": 32}))
