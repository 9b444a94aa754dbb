"""What BART, mBART, T5 and Marian folders hold besides the usual: old forms, defaults, nonsense.

Shapes are those of the families' own examples; transformers is the reference.
"""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import tilewise
from tilewise.errors import ArgumentError, CheckpointError, ConfigError
from tilewise.families import bart, bert, bloom, gpt2, marian, modernbert, opt, roberta, t5

SOURCES = [[7, 9, 11, 30], [5, 44, 21, 21, 8, 13], [17]]
MBARTS = [raw for raw in bart.EXAMPLES if raw["model_type"] == "mbart"]


def folder_of(raw: dict[str, Any], folder: Path, seed: int = 0) -> Any:
    """A random model of transformers, saved as it does, and as older versions wrote config.json."""
    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(**raw)
    network = getattr(transformers, raw["architectures"][0])(config).eval()
    for parameter in network.parameters():
        if parameter.requires_grad and parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.4)
    network.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(raw))
    return network


def rewrite(folder: Path, **changes: torch.Tensor | None) -> None:
    """The tensors of the folder with these (double underscores for dots), or without: None."""
    file = folder / "model.safetensors"
    named = {name.replace("__", "."): tensor for name, tensor in changes.items()}
    state = load_file(file) | named
    save_file({n: t.clone() for n, t in state.items() if t is not None}, file)


def same_text(ours: tilewise.Model, theirs: Any, **options: Any) -> list[list[int]]:
    """The ids that both generate from SOURCES, checked to be equal."""
    longest, pad = max(map(len, SOURCES)), theirs.config.pad_token_id
    padded = torch.tensor([row + [pad] * (longest - len(row)) for row in SOURCES])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in SOURCES])
    expected = theirs.generate(padded, attention_mask=mask, do_sample=False, **options)
    found = ours.generate(SOURCES, **options)
    rows = [row[:n] for row, n in zip(found.sequences.tolist(), found.lengths, strict=True)]
    for mine, their in zip(rows, expected.tolist(), strict=True):
        assert mine == their[: len(mine)] and set(their[len(mine) :]) <= {pad}
    return rows


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize(
    "defaults",
    [
        {"forced_bos_token_id": 0, "max_length": 9, "num_beams": 2},
        {"min_length": 6, "max_length": 11, "no_repeat_ngram_size": 2},
        {"bad_words_ids": [[2], [13], [5, 6]], "suppress_tokens": [20, 21, 1], "max_length": 8},
        {"repetition_penalty": 3.0, "min_new_tokens": 5, "max_new_tokens": 9},
    ],
    ids=["forced", "least", "banned", "penalised"],
)
def test_defaults_of_an_old_folder(defaults: dict[str, Any], beams: int, tmp_path: Path) -> None:
    """Old config.json files hold the options of generate, which newer ones keep apart."""
    raw = bart.SMALL | defaults | {"forced_eos_token_id": 2}
    theirs = folder_of(raw, tmp_path)
    (tmp_path / "generation_config.json").unlink(missing_ok=True)
    for name in ("forced_eos_token_id", *defaults):
        setattr(theirs.generation_config, name, raw[name])
    rows = same_text(tilewise.load(tmp_path), theirs, num_beams=beams)
    if "forced_bos_token_id" in defaults:
        assert {row[1] for row in rows} == {0}
    tilewise.load(tmp_path).save(tmp_path / "again")
    written = json.loads((tmp_path / "again" / "generation_config.json").read_text())
    assert defaults.items() <= written.items() and written["forced_eos_token_id"] == 2


def test_an_old_folder_that_samples_warns(tmp_path: Path) -> None:
    raw = gpt2.SMALL | {"do_sample": True, "top_k": 5}
    folder_of(raw, tmp_path)
    (tmp_path / "generation_config.json").unlink()
    with pytest.warns(UserWarning, match="config.json sets do_sample, which"):
        tilewise.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(raw | {"do_sample": False}))  # top_k is idle
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tilewise.load(tmp_path)


@pytest.mark.parametrize(
    "raw",
    [bart.SMALL, *MBARTS[:2], marian.SMALL, t5.SMALL],
    ids=["bart", "mbart", "mbart-start", "marian", "t5"],
)
def test_loss_of_labels_alone(raw: dict[str, Any], tmp_path: Path) -> None:
    """What the decoder reads is made of them: from the start token, or mBART's language, on."""
    theirs = folder_of(raw, tmp_path)
    labels = torch.tensor([[7, 40, 9, 2, 57], [5, 2, 56, -100, -100], [33, 8, 55, -100, -100]])
    ids = torch.tensor([SOURCES[1]] * 3)
    ours = tilewise.load(tmp_path)
    expected, found = theirs(input_ids=ids, labels=labels), ours(ids, labels=labels)
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-4)
    expected.loss.backward()
    found.loss.backward()  # in Marian the start token is padding, whose embedding is not trained
    grad = ours.network.decoder.embedding.tokens.weight.grad
    wanted = theirs.get_decoder().embed_tokens.weight.grad
    torch.testing.assert_close(grad, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


@pytest.mark.parametrize("beams", [1, 3])
def test_words_that_the_model_would_say_are_banned(beams: int, tmp_path: Path) -> None:
    theirs = folder_of(marian.SMALL, tmp_path)
    ours = tilewise.load(tmp_path)
    said = same_text(ours, theirs, num_beams=beams, max_new_tokens=8)
    longest = max(said, key=len)
    for word in ([longest[1]], longest[1:3], longest[2:5]):
        now = same_text(ours, theirs, num_beams=beams, max_new_tokens=8, bad_words_ids=[word])
        for row in now:
            starts = range(1, len(row) - len(word) + 1)
            assert all(row[i : i + len(word)] != word for i in starts)


def test_an_mbart_starts_with_the_language_asked_for(tmp_path: Path) -> None:
    theirs = folder_of(MBARTS[0], tmp_path)
    ours = tilewise.load(tmp_path)
    for beams in (1, 3):
        rows = same_text(ours, theirs, num_beams=beams, max_new_tokens=7, forced_bos_token_id=57)
        assert all(row[:2] == [59, 57] for row in rows)


def test_an_untied_bart_of_older_versions_has_one_embedding(tmp_path: Path) -> None:
    """They shared it between the stacks all the same, and wrote it once."""
    raw = bart.SMALL | {"tie_word_embeddings": False}
    folder_of(raw, tmp_path)
    copies = {f"model__{side}__embed_tokens__weight": None for side in ("encoder", "decoder")}
    rewrite(tmp_path, **copies)
    ours = tilewise.load(tmp_path)
    network = ours.network
    tokens = network.encoder.embedding.tokens.weight
    assert network.decoder.embedding.tokens.weight is tokens
    assert not torch.equal(network.decoder.lm_head.weight, tokens)
    ours.save(tmp_path / "ours")
    again = transformers.BartForConditionalGeneration.from_pretrained(tmp_path / "ours").eval()
    ids = torch.tensor([SOURCES[1]])
    with torch.no_grad():
        found = ours(ids, decoder_input_ids=ids).logits
        expected = again(input_ids=ids, decoder_input_ids=ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_umt5_of_the_hub(tied: bool, tmp_path: Path) -> None:
    """Its outputs are scaled where config.json says tied, as T5's; transformers 5 scales all."""
    raw = t5.UMT5 | {"tie_word_embeddings": tied}
    theirs = folder_of(raw, tmp_path)
    rewrite(tmp_path, lm_head__weight=None if tied else theirs.lm_head.weight.detach().clone())
    ids = torch.tensor(SOURCES[:1])
    with torch.no_grad():
        expected = theirs(ids, decoder_input_ids=ids).logits * (1 if tied else 16**0.5)
        found = tilewise.load(tmp_path)(ids, decoder_input_ids=ids).logits
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["MarianMTModel", "MarianModel"])
def test_an_untied_marian_has_a_matrix_of_each_stack(kind: str, tmp_path: Path) -> None:
    """Its one vocabulary has three matrices in transformers 5, the first of which serves none."""
    raw = marian.SMALL | {"tie_word_embeddings": False, "architectures": [kind]}
    theirs = folder_of(raw, tmp_path)
    ours = tilewise.load(tmp_path)
    ours.save(tmp_path / "ours")
    ids = torch.tensor([SOURCES[1]])
    with torch.no_grad():
        found = ours(ids, decoder_input_ids=ids).last_hidden_state
        for other in (theirs, type(theirs).from_pretrained(tmp_path / "ours").eval()):
            inner = getattr(other, "model", other)
            expected = inner(input_ids=ids, decoder_input_ids=ids).last_hidden_state
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert tilewise.load(tmp_path / "ours").config == ours.config


HEADS = [
    bart.SMALL, MBARTS[0], marian.SMALL, marian.EXAMPLES[1], gpt2.SMALL, bloom.SMALL,
    opt.SMALL, bert.SMALL | {"architectures": ["BertForMaskedLM"]}, roberta.SMALL, modernbert.SMALL,
    t5.SMALL,
]  # fmt: skip


@pytest.mark.parametrize("raw", HEADS, ids=lambda raw: f"{raw['model_type']}")
def test_a_tied_model_with_a_head_of_its_own(raw: dict[str, Any], tmp_path: Path) -> None:
    """transformers uses both tensors of such a file, and so do we; saved, the folder says so."""
    kind = type(folder_of(raw, tmp_path))
    head = torch.randn(
        raw.get("decoder_vocab_size", 61), size_of(raw), generator=torch.Generator().manual_seed(1)
    )
    rewrite(tmp_path, **{head_of(raw): head})
    theirs = kind.from_pretrained(tmp_path).eval()
    with pytest.warns(UserWarning, match="differs from"):
        ours = tilewise.load(tmp_path)
    ours.save(tmp_path / "ours")
    ids = torch.tensor([SOURCES[1]])
    more = {"decoder_input_ids": ids} if theirs.config.is_encoder_decoder else {}
    with torch.no_grad():
        for other in (theirs, kind.from_pretrained(tmp_path / "ours").eval()):
            expected = other(ids, **more).logits
            torch.testing.assert_close(ours(ids, **more).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("raw", HEADS, ids=lambda raw: f"{raw['model_type']}")
def test_a_stored_copy_of_the_embedding_is_no_head_of_its_own(
    raw: dict[str, Any], tmp_path: Path
) -> None:
    theirs = folder_of(raw, tmp_path)
    before = tilewise.load(tmp_path)
    rewrite(tmp_path, **{head_of(raw): theirs.get_output_embeddings().weight.detach().clone()})
    after = tilewise.load(tmp_path)
    assert after.config.tie_embeddings and after.config == before.config


def head_of(raw: dict[str, Any]) -> str:
    own = {
        "bert": "cls.predictions.decoder",
        "roberta": "lm_head.decoder",
        "modernbert": "decoder",
    }
    return f"{own.get(raw['model_type'], 'lm_head')}.weight"


def size_of(raw: dict[str, Any]) -> int:
    names = ("d_model", "n_embd", "hidden_size")
    return next(raw[name] for name in names if name in raw)


@pytest.mark.parametrize("family", [bart, marian, t5], ids=["bart", "marian", "t5"])
def test_copies_of_the_embedding_must_be_copies(family: Any, tmp_path: Path) -> None:
    theirs = folder_of(family.SMALL, tmp_path)
    prefix = "" if family is t5 else "model__"
    weight = theirs.get_input_embeddings().weight.detach()
    names = [f"{prefix}{side}__embed_tokens__weight" for side in ("encoder", "decoder")]
    rewrite(tmp_path, **{name: weight for name in names})
    before = tilewise.load(tmp_path)
    rewrite(tmp_path, **{f"{prefix}shared__weight": None})
    after = tilewise.load(tmp_path)
    for mine, other in zip(before.parameters(), after.parameters(), strict=True):
        assert torch.equal(mine, other)
    rewrite(tmp_path, **{names[1]: weight + 1})
    with pytest.raises(CheckpointError, match="differs from"):
        tilewise.load(tmp_path)


def test_what_old_files_carry_and_nothing_reads(tmp_path: Path) -> None:
    folder_of(bart.SMALL, tmp_path / "bart")
    rewrite(tmp_path / "bart", model__encoder__version=torch.ones(1))
    tilewise.load(tmp_path / "bart")
    folder_of(marian.SMALL, tmp_path / "marian")
    rewrite(tmp_path / "marian", model__encoder__embed_positions__weight=torch.ones(24, 12))
    tilewise.load(tmp_path / "marian")
    folder_of(t5.SMALL, tmp_path / "t5")
    name = "decoder__block__0__layer__1__EncDecAttention__relative_attention_bias__weight"
    rewrite(tmp_path / "t5", **{name: torch.ones(8, 3)})
    tilewise.load(tmp_path / "t5")


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        (bart, {"encoder_attention_heads": 5}, "hidden_size 12 does not divide into 5 heads"),
        (bart, {"activation_function": "mish"}, "activation_function"),
        (bart, {"scale_embedding": 1}, "scale_embedding"),
        (marian, {"decoder_vocab_size": 0, "share_encoder_decoder_embeddings": False}, "decoder_v"),
        (marian, {"max_position_embeddings": 2**40}, "max_positions"),
        (marian, {"bad_words_ids": 5}, "bad_words_ids"),
        (marian, {"bad_words_ids": [5]}, "bad_words_ids"),
        (marian, {"bad_words_ids": [[-1]]}, "bad_words_ids"),
        (t5, {"feed_forward_proj": "gated"}, "feed_forward_proj"),
        (t5, {"feed_forward_proj": ["relu"]}, "feed_forward_proj"),
        (t5, {"relative_attention_num_buckets": 2}, "relative_buckets"),
        (t5, {"tie_word_embeddings": None}, "tie_word_embeddings"),
    ],
)
def test_values_that_make_no_sense(
    family: Any, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder_of(family.SMALL, tmp_path)
    (tmp_path / "generation_config.json").unlink(missing_ok=True)
    (tmp_path / "config.json").write_text(json.dumps(family.SMALL | changes))
    with pytest.raises(ConfigError, match=message):
        tilewise.load(tmp_path)


def test_words_to_ban_are_checked(tmp_path: Path) -> None:
    folder_of(marian.SMALL, tmp_path)
    ours = tilewise.load(tmp_path)
    for words in (5, [5], [[]], [[61]], [["a"]]):
        with pytest.raises(ArgumentError, match="bad_words_ids"):
            ours.generate(SOURCES, bad_words_ids=words)
    with pytest.raises(ArgumentError, match="suppress_tokens"):
        ours.generate(SOURCES, suppress_tokens=[61])
    with pytest.raises(ArgumentError, match="min_length"):
        ours.generate(SOURCES, min_length=-1)


def test_a_small_vocabulary_keeps_no_word_of_a_large_one(tmp_path: Path) -> None:
    raw = marian.SMALL | {"bad_words_ids": [[58100], [60]]}
    folder_of(raw, tmp_path)
    (tmp_path / "generation_config.json").unlink(missing_ok=True)
    with pytest.warns(UserWarning, match="58100"):
        assert tilewise.load(tmp_path).generation_defaults["bad_words_ids"] == [[60]]
