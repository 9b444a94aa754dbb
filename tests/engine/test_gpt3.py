"""GPT-3's presets, and banded layers against transformers' GPT-Neo, which has them too."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

import tilewise
from tilewise.errors import ConfigError
from tilewise.families.gpt3 import BAND, PRESETS, gpt3

PRINTED = {"125M": 125e6, "350M": 350e6, "760M": 760e6, "1.3B": 1.3e9,
           "2.7B": 2.7e9, "6.7B": 6.7e9, "13B": 13e9, "175B": 175e9}  # fmt: skip
WINDOW = 4


@pytest.mark.parametrize("size", PRINTED)
def test_parameters_are_as_many_as_printed(size: str) -> None:
    with torch.device("meta"):
        network = tilewise.build(PRESETS[size])
    count = sum(parameter.numel() for parameter in network.parameters())
    assert abs(count / PRINTED[size] - 1) < 0.02


def test_layers_are_dense_and_banded_by_turns() -> None:
    assert PRESETS.keys() == PRINTED.keys()
    for config in PRESETS.values():
        assert config.windows[::2] == (None,) * (config.decoder_layers // 2)
        assert config.windows[1::2] == (BAND - 1,) * (config.decoder_layers // 2)
        assert config.max_positions == 2048 and config.vocab_size == 50257


def test_another_size_is_refused() -> None:
    with pytest.raises(ConfigError, match="13B"):
        gpt3("12.9B")


def tiny(**changes: object) -> tuple[transformers.GPTNeoForCausalLM, tilewise.Model]:
    """A random GPT-Neo of two dense and two banded layers, and the same as our GPT-3."""
    torch.manual_seed(0)
    config = transformers.GPTNeoConfig(
        vocab_size=61, hidden_size=16, num_layers=4, num_heads=2, intermediate_size=64,
        attention_types=[[["global", "local"], 2]], window_size=WINDOW,
        max_position_embeddings=32, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    theirs = transformers.GPTNeoForCausalLM(config).eval()
    ours = tilewise.build(
        gpt3(
            "125M", vocab_size=61, hidden_size=16, num_heads=2, ffn_size=64, decoder_layers=4,
            max_positions=32, windows=(None, WINDOW - 1) * 2, attention_scale=1.0,
            bos_token_id=1, eos_token_id=(2,), **changes,
        )
    ).eval()  # fmt: skip
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, float(parameter.dim() == 1), 0.3)
    state = ours.state_dict()
    for name, tensor in theirs.transformer.state_dict().items():
        for old, new in (
            ("wte", "embedding.tokens"), ("wpe", "embedding.positions"), ("ln_f", "norm"),
            ("h.", "layers."), ("ln_1", "norm1"), ("ln_2", "norm2"), ("mlp.c_fc", "linear1"),
            ("mlp.c_proj", "linear2"), ("attn.attention.out_proj", "self_attn.out_proj"),
        ):  # fmt: skip
            name = name.replace(old, new)
        if name in state:
            state[name].copy_(tensor)
    for mine, block in zip(ours.layers, theirs.transformer.h, strict=True):
        each = block.attn.attention
        parts = [each.q_proj.weight, each.k_proj.weight, each.v_proj.weight]
        mine.self_attn.in_proj_weight.data.copy_(torch.cat(parts))
        torch.nn.init.zeros_(mine.self_attn.in_proj_bias)  # GPT-Neo has none
    return theirs, tilewise.Model(ours)


@pytest.mark.feature("logits", "tilewise-gpt3")
def test_banded_layers_are_gpt_neos(record_property: Callable[[str, object], None]) -> None:
    theirs, ours = tiny()
    ids = torch.randint(4, 61, (3, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, found = theirs(ids).logits, ours(ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    record_property("off", float((found - expected).abs().max() / expected.abs().max()))
    dense = tilewise.Model(tilewise.build(gpt3("125M", **_without_windows(ours))))
    dense.network.load_state_dict(ours.network.state_dict())
    assert not torch.allclose(dense(ids).logits, expected, rtol=1e-2, atol=1e-2)


@pytest.mark.feature("attention maps", "tilewise-gpt3")
def test_attention_maps_are_gpt_neos() -> None:
    theirs, ours = tiny()
    theirs.set_attn_implementation("eager")
    ids = torch.randint(4, 61, (3, 12), generator=torch.Generator().manual_seed(1))
    expected = theirs(ids, output_attentions=True).attentions
    found = ours(ids, output_attentions=True).attentions
    assert len(found) == 4 and found[1][0, 0, -1, 0] == 0 < found[0][0, 0, -1, 0]
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


def _without_windows(model: tilewise.Model) -> dict[str, object]:
    return model.config.to_dict() | {"windows": ()}


@pytest.mark.feature("generate", "tilewise-gpt3")
@pytest.mark.parametrize("beams", [1, 3])
def test_banded_generation_past_the_band(beams: int) -> None:
    theirs, ours = tiny()
    options = {"num_beams": beams, "max_new_tokens": 10}
    for length in (2, WINDOW, 9):
        ids = torch.randint(4, 61, (2, length), generator=torch.Generator().manual_seed(length))
        with torch.no_grad():
            expected = theirs.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0, **options
            )
        found = ours.generate(ids, **options)
        whole = ours.generate(ids, use_cache=False, **options)
        assert int(found.lengths.max()) > length + WINDOW
        assert torch.equal(found.sequences, whole.sequences)
        for row, other, n in zip(found.sequences, expected, found.lengths, strict=True):
            assert torch.equal(row[:n], other[:n])


def test_rows_of_different_lengths_generate_as_alone() -> None:
    _, ours = tiny()
    prompts = [[5, 6, 7, 8, 9, 10, 11, 12], [5, 6], [30, 31, 32, 33, 34]]
    together = ours.generate(prompts, max_new_tokens=9, num_beams=2)
    for i, prompt in enumerate(prompts):
        alone = ours.generate([prompt], max_new_tokens=9, num_beams=2)
        n = int(alone.lengths[0])
        assert int(together.lengths[i]) == n
        assert torch.equal(together.sequences[i, :n], alone.sequences[0, :n])


@pytest.mark.feature("folder", "tilewise-gpt3")
def test_a_folder_and_back(tmp_path: Path) -> None:
    _, ours = tiny(tie_embeddings=False)
    ours.save(tmp_path)
    again = tilewise.load(tmp_path)
    assert again.config == ours.config
    for name, tensor in ours.network.state_dict().items():
        assert torch.equal(again.network.state_dict()[name], tensor), name
