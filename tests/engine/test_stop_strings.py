"""Stop strings against transformers' own, and in every place that takes them."""

import json
import random
from pathlib import Path

import pytest
import tokenizers
import torch
from click.testing import CliRunner
from tokenizers import decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import tilewise
from tilewise.cli import main
from tilewise.errors import ArgumentError
from tilewise.generation import generate
from tilewise.generation.stopping import stop_at

CASES = 40
stopped: list[bool] = []  # of every row that was compared


def byte_level() -> tokenizers.Tokenizer:
    """All bytes and some longer tokens: a stop string begins and ends anywhere in them."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    longer = ["ab", "abc", "Ġa", "Ġab", "cd", "ĊĊ", "Ċa", ".Ċ", "bc", "ca", "aa", "cab"]
    vocab = {token: i for i, token in enumerate([*letters, *longer])}
    backend.model = models.BPE(vocab, [])
    backend.add_special_tokens(["<end>"])
    return backend


def folder(root: Path, seed: int) -> Path:
    """A model that likes few tokens, longer ones and some letters, and says them in any order."""
    torch.manual_seed(seed)
    backend = byte_level()
    size = backend.get_vocab_size()
    config = GPT2Config(
        vocab_size=size, n_embd=24, n_layer=2, n_head=2, n_positions=64, initializer_range=0.6,
        bos_token_id=None, eos_token_id=None, tie_word_embeddings=False,
    )  # fmt: skip
    theirs = GPT2LMHeadModel(config).eval()
    liked = [backend.token_to_id(t) for t in ("ab", "cab", "ĊĊ", "Ġa", "c", "Ċ", "Ã", "©", "<end>")]
    with torch.no_grad():
        kept = theirs.lm_head.weight[liked].clone()
        theirs.lm_head.weight.mul_(0.1)
        theirs.lm_head.weight[liked] = kept
    theirs.save_pretrained(root)
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(root)
    return root


@pytest.mark.parametrize("seed", range(CASES))
def test_as_in_transformers(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    root = folder(tmp_path, seed)
    ours = tilewise.load(root)
    theirs = GPT2LMHeadModel.from_pretrained(root)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(root)
    prompts = ["ab\n", "a cab", "é"]
    beams = rng.choice([1, 1, 2, 4])
    options = {"max_new_tokens": 14, "num_beams": beams, "pad_token_id": 0}
    told = ours.generate(prompts, **options).texts
    pieces = [text[i : i + rng.randint(1, 4)] for text in told for i in range(2, len(text) - 1, 3)]
    wanted = [text for text in pieces if "�" not in text]
    options["stop_strings"] = rng.sample(wanted, min(len(wanted), 2)) + ["\n\n"] * (seed % 3 == 0)
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        expected = theirs.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            tokenizer=tokenizer,
            do_sample=False,
            **options,
        )[0].tolist()
        found = ours.generate([ids[0].tolist()], **options)
        length = int(found.lengths[0])
        assert found.sequences[0, :length].tolist() == expected[:length], (prompt, options)
        assert set(expected[length:]) <= {0}
        stopped.append(length < ids.shape[1] + 14)


def test_enough_rows_were_stopped() -> None:
    if len(stopped) < 3 * CASES:
        pytest.fail("run the whole file: this check counts what the cases above saw")
    assert 0.3 <= sum(stopped) / len(stopped) <= 0.95


def test_where_a_stop_string_may_lie(tmp_path: Path) -> None:
    """It may begin in the prompt and its last token may go on; one from before is none."""
    tokenizer = tilewise.load(folder(tmp_path, 0)).tokenizer
    cases = [
        ("a\n", "\n", "\n\n", True),
        ("\n\n", "a", "\n\n", False),
        ("x", "cab", "a", True),
        ("x", "cab", "xc", True),
        ("é"[0], "c", "é", False),
        ("x", "<end>", "<end>", True),
        ("x", "<end>", "end", True),
    ]
    for before, new, text, expected in cases:
        row = [-1, -1, *tokenizer.encode([before])[0], tokenizer.token_to_id(byte_name(new))]
        ended = stop_at((text,), tokenizer)
        assert ended(torch.tensor([row])).tolist() == [expected], (before, new, text)


def byte_name(text: str) -> str:
    return text.replace("\n", "Ċ").replace(" ", "Ġ")


def test_a_letter_of_two_tokens_is_complete_with_the_second(tmp_path: Path) -> None:
    tokenizer = tilewise.load(folder(tmp_path, 0)).tokenizer
    first, second = tokenizer.encode(["é"])[0]
    ended = stop_at(("é",), tokenizer)
    rows = [[-1, first], [first, second], [second, first], [second, second]]
    assert ended(torch.tensor(rows)).tolist() == [False, True, False, False]


def test_bad_stop_strings(tmp_path: Path) -> None:
    model = tilewise.load(folder(tmp_path, 0))
    for bad in ("", [""], [3], 3, ["a", None], b"a", "a\ud800"):
        with pytest.raises(ArgumentError, match="stop_strings is"):
            model.generate([[1]], stop_strings=bad)
    with pytest.raises(ArgumentError, match="stop_strings need a tokenizer"):
        generate(model.network, [[1]], stop_strings="a")
    with pytest.raises(ArgumentError, match="tokenizer is str; pass that of a Model"):
        generate(model.network, [[1]], stop_strings="a", tokenizer="gpt2")
    for inputs in (["a"], [[1]]):  # as transformers wants it
        with pytest.raises(ArgumentError, match="generate was given tokenizer; .* the model's own"):
            model.generate(inputs, stop_strings="a", tokenizer=model.tokenizer)


def test_from_the_command_line_and_from_the_folder(tmp_path: Path) -> None:
    model = folder(tmp_path, 0)
    every = ["generate", "--model", str(model), "--max-new-tokens", "9", "ab"]
    whole = CliRunner().invoke(main, every).output
    stop = whole[2]
    cut = CliRunner().invoke(main, [*every, "--stop", "never said", "--stop", stop]).output
    assert len(cut) < len(whole) and whole.startswith(cut[:-1]) and cut[:-1].endswith(stop)
    (model / "generation_config.json").write_text(json.dumps({"stop_strings": [stop]}))
    assert CliRunner().invoke(main, every).output == cut
