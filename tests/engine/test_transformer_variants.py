"""The original Transformer as the paper, fairseq and OpenNMT-py build it, against torch.nn's layers
with sinusoids and positions written out here.
"""

import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import tilewise
from tilewise.config import ModelConfig
from tilewise.errors import CheckpointError, ConfigError
from tilewise.families.transformer import VARIANTS, variant
from tilewise.models import Seq2Seq

V, E, HEADS, FFN, LAYERS = 17, 12, 3, 20, 2
SIZES: dict = {
    "vocab_size": V,
    "hidden_size": E,
    "num_heads": HEADS,
    "ffn_size": FFN,
    "encoder_layers": LAYERS,
    "decoder_layers": LAYERS,
    "max_positions": 32,
}
PRE_NORM = {"paper": False, "fairseq": False, "fairseq-pre-norm": True, "opennmt": True}
PAD = 1


def made(name: str, **changes: object) -> Seq2Seq:
    network = Seq2Seq(variant(name, **(SIZES | changes)))
    generator = torch.Generator().manual_seed(2)
    for key, parameter in network.named_parameters():
        mean = float("norm" in key and key.endswith("weight"))
        nn.init.normal_(parameter, mean, 0.4, generator=generator)
    return network.eval()


def sine(name: str, position: int) -> list[float]:
    """The row of one position, column by column."""
    row = []
    for column in range(E):
        if name.startswith("fairseq"):  # sines, then cosines; the last pair turns once in 10000
            pair, is_cosine = column % (E // 2), column >= E // 2
            rate = 10000 ** (-pair / (E // 2 - 1))
        else:
            pair, is_cosine = divmod(column, 2)
            rate = 10000 ** (-2 * pair / E)
        row.append(math.cos(position * rate) if is_cosine else math.sin(position * rate))
    return row


def embedded(name: str, matrix: Tensor, ids: list[int]) -> Tensor:
    """[1, S, E] of one row without padding."""
    first = PAD + 1 if name.startswith("fairseq") else 0
    table = torch.tensor([sine(name, first + i) for i in range(len(ids))])
    return (matrix[ids] * math.sqrt(E) + table)[None]


def reference(name: str, network: Seq2Seq, source: list[int], target: list[int]) -> Tensor:
    """Logits [S, V] of one pair by torch.nn's layers."""
    state, pre = network.state_dict(), PRE_NORM[name]
    eps = 1e-6 if name == "opennmt" else 1e-5
    options = {"batch_first": True, "norm_first": pre, "layer_norm_eps": eps}
    read = nn.TransformerEncoderLayer(E, HEADS, FFN, 0.0, **options)
    written = nn.TransformerDecoderLayer(E, HEADS, FFN, 0.0, **options)
    ends = (nn.LayerNorm(E, eps), nn.LayerNorm(E, eps)) if pre else (None, None)
    encoder = nn.TransformerEncoder(read, LAYERS, ends[0], enable_nested_tensor=False)
    decoder = nn.TransformerDecoder(written, LAYERS, ends[1])
    for side, stack in (("encoder.", encoder), ("decoder.", decoder)):
        stack.load_state_dict({key: state[side + key] for key in stack.state_dict()})
        stack.eval()
    own = state["decoder.embedding.tokens.weight"]
    memory = encoder(embedded(name, state["encoder.embedding.tokens.weight"], source))
    ahead = torch.ones(len(target), len(target), dtype=torch.bool).triu(1)
    hidden = decoder(embedded(name, own, target), memory, tgt_mask=ahead)[0]
    if name == "opennmt":
        return hidden @ state["decoder.lm_head.weight"].t() + state["decoder.lm_head.bias"]
    return hidden @ own.t()


@pytest.mark.feature("logits", "tilewise-transformer")
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_is_what_torchs_layers_make(
    name: str, side: str, record_property: Callable[[str, object], None]
) -> None:
    network = made(name, pad_token_id=PAD)
    sources, target = [[5, 9, 4, 16], [7, 7, 12]], [2, 8, 6, 11, 3]
    ids, mask = torch.full((2, 4), PAD), torch.zeros(2, 4, dtype=torch.int64)
    if side == "left" and not name.startswith("fairseq"):
        sources[1] = [7, 7, 12, 5]  # their positions count columns
    for i, row in enumerate(sources):
        place = slice(0, len(row)) if side == "right" else slice(4 - len(row), 4)
        ids[i, place], mask[i, place] = torch.tensor(row), 1
    with torch.no_grad():
        out = network(ids, mask, decoder_input_ids=torch.tensor([target, target]))
        for i, source in enumerate(sources):
            expected = reference(name, network, source, target)
            torch.testing.assert_close(out.logits[i], expected, rtol=1e-5, atol=2e-5)
            off = (out.logits[i] - expected).abs().max() / expected.abs().max()
            record_property("off", float(off))


@pytest.mark.feature("attention maps", "tilewise-transformer")
@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_shows_what_torchs_layers_attend_to(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, source, target = made(name), [5, 9, 4, 16], [2, 8, 6, 11, 3]
    expected, forward = [], nn.MultiheadAttention.forward

    def watched(self: nn.MultiheadAttention, *args: Tensor, **options: object) -> tuple:
        options |= {"need_weights": True, "average_attn_weights": False}
        out, maps = forward(self, *args, **options)
        expected.append(maps)
        return out, maps

    monkeypatch.setattr(nn.MultiheadAttention, "forward", watched)
    reference(name, network, source, target)
    ids = {"decoder_input_ids": torch.tensor([target]), "output_attentions": True}
    out = network(torch.tensor([source]), **ids)
    decoder = zip(out.attentions, out.cross_attentions, strict=True)
    found = [*out.encoder_attentions, *(maps for layer in decoder for maps in layer)]
    assert len(found) == 3 * LAYERS
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)


@pytest.mark.feature("generate", "tilewise-transformer")
@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_generates_from_its_own_start(name: str) -> None:
    start = {"paper": 0, "fairseq": 2, "fairseq-pre-norm": 2, "opennmt": 2}[name]
    more = {"decoder_start_token_id": 0} if name == "paper" else {}
    network, source = made(name, **more), [5, 9, 4, 16]
    options = {"max_new_tokens": 5, "eos_token_id": []}
    out = tilewise.Model(network).generate([source, [3, 3]], **options)
    tokens = [start]
    with torch.no_grad():
        for _ in range(5):
            tokens.append(int(reference(name, network, source, tokens)[-1].argmax()))
    assert out.sequences[0].tolist() == tokens


@pytest.mark.feature("folder", "tilewise-transformer")
@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_survives_its_folder(name: str, tmp_path: Path) -> None:
    network = made(name)
    tilewise.Model(network).save(tmp_path)
    again = tilewise.load(tmp_path)
    assert again.config == network.config
    for key, tensor in network.state_dict().items():
        assert torch.equal(again.network.state_dict()[key], tensor), key


FAIRSEQS = {
    "multihead_attn": "encoder_attn",
    "linear1": "fc1",
    "linear2": "fc2",
    "out_proj": "out_proj",
    "q": "q_proj",
    "k": "k_proj",
    "v": "v_proj",
    "norms": {
        "encoder": ["self_attn_layer_norm", "final_layer_norm"],
        "decoder": ["self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm"],
    },
    "encoder": "encoder.layers",
    "decoder": "decoder.layers",
    "tokens": "embed_tokens",
    "beside": ["version", "embed_positions._float_tensor"],
    "head": "decoder.output_projection",
}
OPENNMTS = {
    "multihead_attn": "context_attn",
    "linear1": "feed_forward.w_1",
    "linear2": "feed_forward.w_2",
    "out_proj": "final_linear",
    "q": "linear_query",
    "k": "linear_keys",
    "v": "linear_values",
    "norms": {
        "encoder": ["layer_norm", "feed_forward.layer_norm"],
        "decoder": ["layer_norm_1", "layer_norm_2", "feed_forward.layer_norm"],
    },
    "encoder": "encoder.transformer",
    "decoder": "decoder.transformer_layers",
    "tokens": "embeddings.make_embedding.emb_luts.0",
    "beside": ["embeddings.make_embedding.pe.pe"],
    "head": "generator",
}


def renamed(network: Seq2Seq, words: dict) -> dict[str, Tensor]:
    """The tensors of a model under another program's names, repeated ones included."""
    found: dict[str, Tensor] = {}
    for key, tensor in network.state_dict().items():
        side, *middle, kind = key.split(".")
        if key.endswith("tokens.weight"):
            found[f"{side}.{words['tokens']}.weight"] = tensor
        elif "lm_head" in key:
            found[f"{words['head']}.{kind}"] = tensor
        elif middle == ["norm"]:
            found[f"{side}.layer_norm.{kind}"] = tensor
        else:
            number, part, *last = middle[1:]
            start = f"{words[side]}.{number}."
            if part.startswith("norm"):
                found[f"{start}{words['norms'][side][int(part[4:]) - 1]}.{kind}"] = tensor
            elif kind.startswith("in_proj"):
                for letter, rows in zip("qkv", tensor.chunk(3), strict=True):
                    name = f"{start}{words.get(part, part)}.{words[letter]}"
                    found[f"{name}.{kind.removeprefix('in_proj_')}"] = rows
            else:
                inner = ".".join(words.get(each, each) for each in (part, *last))
                found[f"{start}{inner}.{kind}"] = tensor
    for side in ("encoder", "decoder"):
        found |= {f"{side}.{name}": torch.ones(1) for name in words["beside"]}
    return {key: tensor.clone().contiguous() for key, tensor in found.items()}


def write(network: Seq2Seq, tensors: dict[str, Tensor], folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(network.config.to_dict()))
    safetensors.torch.save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("name", ["fairseq", "fairseq-pre-norm", "opennmt"])
@pytest.mark.parametrize("shared", ["all", "decoder", "none"])
def test_names_of_other_programs_are_read(name: str, shared: str, tmp_path: Path) -> None:
    ties = {"share_embeddings": shared == "all", "tie_embeddings": shared != "none"}
    if shared != "all":
        ties["target_vocab_size"] = V - 2
    network = made(name, **ties)
    words = OPENNMTS if name == "opennmt" else FAIRSEQS
    write(network, renamed(network, words), tmp_path)
    again = tilewise.load(tmp_path).network
    for key, tensor in network.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor), key
    tilewise.Model(again).save(tmp_path / "ours")
    assert tilewise.load(tmp_path / "ours").config == network.config


def test_an_output_of_its_own_is_used(tmp_path: Path) -> None:
    """As in all families: the file has it, whatever config.json says."""
    network = made("fairseq")
    tensors = renamed(network, FAIRSEQS)
    head = tensors["decoder.output_projection.weight"]
    head[0, 0] += 1
    write(network, tensors, tmp_path)
    with pytest.warns(UserWarning, match="decoder.output_projection.weight.*differs"):
        again = tilewise.load(tmp_path).network
    assert torch.equal(again.decoder.lm_head.weight, head)
    assert torch.equal(
        again.encoder.embedding.tokens.weight, network.encoder.embedding.tokens.weight
    )


@pytest.mark.parametrize("name", ["fairseq", "opennmt"])
def test_copies_of_the_embedding_must_be_copies(name: str, tmp_path: Path) -> None:
    network = made(name, share_embeddings=True, tie_embeddings=True)
    tensors = renamed(network, OPENNMTS if name == "opennmt" else FAIRSEQS)
    (copy,) = (n for n in tensors if n.startswith("decoder.embed") and n.endswith("weight"))
    tensors[copy] = tensors[copy] + 1
    write(network, tensors, tmp_path)
    with warnings.catch_warnings(), pytest.raises(CheckpointError, match=f"{copy}.*differs"):
        warnings.simplefilter("error")
        tilewise.load(tmp_path)


def test_opennmts_older_output_is_read(tmp_path: Path) -> None:
    network = made("opennmt")
    write(network, renamed(network, OPENNMTS | {"head": "generator.0"}), tmp_path)
    again = tilewise.load(tmp_path).network.state_dict()
    assert torch.equal(again["decoder.lm_head.bias"], network.decoder.lm_head.bias)


def test_positions_follow_the_padding_id() -> None:
    assert variant("fairseq", **SIZES).position_offset == 2
    assert variant("fairseq", **SIZES, pad_token_id=4).position_offset == 5
    assert isinstance(variant("opennmt", **SIZES, num_kv_heads=1), ModelConfig)


def test_unknown_variants_are_named() -> None:
    with pytest.raises(ConfigError, match="the variant is 'marian'; it must be one of paper, fair"):
        variant("marian", **SIZES)
    with pytest.raises(ConfigError, match="pad_token_id"):
        variant("fairseq", **SIZES, pad_token_id=None)
