"""The adapter for lm-eval against sums made one token at a time, and under the real harness.

lm-eval is an extra; without it two small classes stand in for the two of it that are used.
"""

import copy
import json
import math
import random
import re
import sys
import types
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, processors

from tilewise.config import ModelConfig
from tilewise.errors import ArgumentError, TokenizerError
from tilewise.models import build
from tilewise.pretrained import Model
from tilewise.text import Tokenizer

ALPHABET = "abcdefgh \n"
POSITIONS = 12
BOS, EOS = 0, 1
REAL = "the harness extra is not installed"


@pytest.fixture(scope="module")
def harness() -> Iterator[types.ModuleType]:
    """tilewise.harness, over stand-ins where lm-eval is missing."""
    names = ("lm_eval", "lm_eval.api", "lm_eval.api.model")
    try:
        import lm_eval.api.model  # noqa: F401

        stubs = {}
    except ImportError:
        stubs = {name: types.ModuleType(name) for name in names}
        stubs["lm_eval.api.model"].LM = type("LM", (), {})  # type: ignore[attr-defined]
        sys.modules.update(stubs)
    import tilewise.harness

    yield tilewise.harness
    for name in [*stubs, "tilewise.harness"]:
        del sys.modules[name]


def asked(*arguments: Any) -> Any:
    """A request, of which only the arguments are read."""
    try:
        from lm_eval.api.instance import Instance
    except ImportError:
        return types.SimpleNamespace(args=arguments)
    return Instance("loglikelihood", {}, arguments, 0)


def characters(frame: list[str]) -> Tokenizer:
    """A token per character; frame: the special tokens round a text "$A"."""
    vocab = {token: i for i, token in enumerate(["<s>", "</s>", "<unk>", *ALPHABET])}
    backend = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens(["<s>", "</s>", "<unk>"])
    if len(frame) > 1:
        named = [(token, vocab[token]) for token in frame if token != "$A"]
        backend.post_processor = processors.TemplateProcessing(single=frame, special_tokens=named)
    return Tokenizer(backend, "characters")


def numbers(text: str) -> list[int]:
    return [3 + ALPHABET.index(character) for character in text]


def made(frame: list[str], **changes: Any) -> Model:
    values = {
        "model_type": "tilewise-transformer", "vocab_size": 3 + len(ALPHABET), "hidden_size": 16,
        "num_heads": 2, "ffn_size": 20, "decoder_layers": 1, "max_positions": POSITIONS,
        "bos_token_id": BOS, "eos_token_id": (EOS,), "decoder_start_token_id": BOS,
        "tie_embeddings": False,
    }  # fmt: skip
    network = build(ModelConfig(**(values | changes))).eval()
    generator = torch.Generator().manual_seed(3)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.6, generator=generator)
    return Model(network, characters(frame))


def log_probs_of(model: Model) -> Callable[..., torch.Tensor]:
    """The next token's log-probabilities, in float64, behind ids (and a source)."""
    network = copy.deepcopy(model.network).double()

    @cache
    def after(ids: tuple[int, ...], source: tuple[int, ...] | None = None) -> torch.Tensor:
        row = torch.tensor([ids])
        with torch.no_grad():
            if source is None:
                logits = network(row).logits
            else:
                logits = network(torch.tensor([source]), decoder_input_ids=row).logits
        return torch.log_softmax(logits[0, -1], -1)

    return lambda ids, source=None: after(tuple(ids), None if source is None else tuple(source))


def a_text(rng: random.Random, least: int, most: int) -> str:
    return "".join(rng.choices(ALPHABET, k=rng.randint(least, most)))


def begin(t: int, first: int, count: int, most: int) -> int:
    """Where the window begins in which token t of `count` is predicted, scored from `first` on."""
    end = first
    while end <= t:
        end = min(end + most, count)
    return max(end - most - 1, 0)


def greedy_ids(
    after: Callable[..., torch.Tensor], ids: list[int], count: int, source: Any = None
) -> list[int]:
    found: list[int] = []
    while len(found) < count and EOS not in found:
        found.append(int(after([*ids, *found], source).argmax()))
    return found


@pytest.mark.parametrize("positions", ["learned", "rotary"])
@pytest.mark.parametrize("frame", [["$A"], ["<s>", "$A"]], ids=["bare", "bos"])
def test_log_likelihood(harness: types.ModuleType, frame: list[str], positions: str) -> None:
    """Of contexts and texts of all lengths up to one past the positions, which is cut."""
    model, rng = made(frame, positions=positions), random.Random(1)
    after = log_probs_of(model)
    pairs = [(a_text(rng, 0, 16), a_text(rng, 1, POSITIONS)) for _ in range(30)]
    pairs += [("", "a"), ("", "abc def"), ("abc ", "de"), ("ab \n ", "cd"), (" ", "d"), ("ab", "")]
    for context in ("", "abc", "hg ab"):
        likeliest = greedy_ids(after, [BOS, *numbers(context)] if context == "" or len(frame) > 1
                               else numbers(context), 3)  # fmt: skip
        text = "".join(ALPHABET[i - 3] for i in likeliest if i >= 3)
        pairs += [(context, text), (context, text[:-1] + ("a" if text[-1:] != "a" else "b"))]
    found = harness.HarnessModel(model, batch_tokens=64).loglikelihood(
        [asked(*pair) for pair in pairs]
    )
    greedy = 0
    for (context, text), (total, is_greedy) in zip(pairs, found, strict=True):
        stripped = context.rstrip()
        ids = numbers(context + text)
        first = len(stripped)
        if len(frame) > 1 or not stripped:
            ids, first = [BOS, *ids], first + 1
        expected, likeliest = 0.0, True
        for t in range(first, len(ids)):
            row = after(ids[begin(t, first, len(ids), POSITIONS) : t])
            expected += float(row[ids[t]])
            likeliest &= int(row.argmax()) == ids[t]
        assert total == pytest.approx(expected, rel=1e-5, abs=1e-4), (context, text)
        assert is_greedy == likeliest
        greedy += is_greedy
    assert 3 <= greedy < len(pairs), "both answers must be among them"


@pytest.mark.parametrize("max_length", [None, 5, 1])
@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_rolling(harness: types.ModuleType, positions: str, max_length: int | None) -> None:
    """Every token once; one token of context, and in the last window as much as fits."""
    model, rng = made(["$A"], positions=positions), random.Random(2)
    after, most = log_probs_of(model), max_length or POSITIONS
    texts = [a_text(rng, n, n) for n in (0, 1, 2, 11, 12, 13, 24, 25, 31)]
    ours = harness.HarnessModel(model, max_length=max_length)
    found = ours.loglikelihood_rolling([asked(text) for text in texts])
    for text, total in zip(texts, found, strict=True):
        ids, expected = [BOS, *numbers(text)], 0.0
        for t in range(1, len(ids)):
            expected += float(after(ids[begin(t, 1, len(ids), most) : t])[ids[t]])
        assert total == pytest.approx(expected, rel=1e-5, abs=1e-4), text


def test_rolling_has_the_windows_of_the_harness(harness: types.ModuleType) -> None:
    utils = pytest.importorskip("lm_eval.utils", reason=REAL)
    ours = harness.HarnessModel(made(["$A"]))
    for length in range(1, 40):
        ids = list(range(3, 3 + length))
        theirs = utils.get_rolling_token_windows(ids, BOS, POSITIONS, context_len=1)
        assert list(ours._windows([BOS], ids)) == list(map(utils.make_disjoint_window, theirs))


def test_a_seq2seq_model_scores_targets(harness: types.ModuleType) -> None:
    model, rng = made(["$A", "</s>"], encoder_layers=1), random.Random(4)
    after = log_probs_of(model)
    pairs = [(a_text(rng, 1, 9), a_text(rng, 1, 9)) for _ in range(20)]
    pairs += [("", "abc"), ("", "abcdefgh" * 3), ("abcdefgh" * 3, "ab"), ("ab ", "c")]
    found = harness.HarnessModel(model).loglikelihood([asked(*pair) for pair in pairs])
    rolling = harness.HarnessModel(model).loglikelihood_rolling([asked(text) for _, text in pairs])
    for (context, text), (total, is_greedy) in zip(pairs, found, strict=True):
        kept = context.rstrip()
        source = [*numbers(kept)[-(POSITIONS - 1) :], EOS]
        ids, expected, likeliest = numbers(context[len(kept) :] + text), 0.0, True
        for t, token in enumerate(ids):
            row = after([BOS, *ids[t - t % POSITIONS : t]], source)
            expected += float(row[token])
            likeliest &= int(row.argmax()) == token
        assert total == pytest.approx(expected, rel=1e-5, abs=1e-4), (context, text)
        assert is_greedy == likeliest
    alone = harness.HarnessModel(model).loglikelihood([asked("", text) for _, text in pairs])
    assert rolling == pytest.approx([total for total, _ in alone])


@pytest.mark.parametrize("kind", ["decoder", "seq2seq"])
def test_generation_stops(harness: types.ModuleType, kind: str) -> None:
    """At the first of several texts, at the end token, or after so many tokens; in order."""
    frame, more = (["$A"], {}) if kind == "decoder" else (["$A", "</s>"], {"encoder_layers": 1})
    model, rng = made(frame, max_positions=40, **more), random.Random(5)
    after = log_probs_of(model)
    asks = [
        {"until": ["a", "d"], "max_gen_toks": 15}, {"until": "b", "max_new_tokens": 9},
        {"until": ["", "zz"], "max_gen_toks": 20, "do_sample": False, "temperature": 0.0},
        {"max_gen_toks": 3}, {"until": ["ab", "c", "h"], "max_gen_toks": 20, "temperature": 0},
    ]  # fmt: skip
    requests = [(a_text(rng, 0, 60), rng.choice(asks)) for _ in range(25)]
    ours = harness.HarnessModel(model, batch_size=3)
    found = ours.generate_until([asked(*request) for request in requests])
    cut = 0
    for (context, given), text in zip(requests, found, strict=True):
        new = given.get("max_gen_toks") or given["max_new_tokens"]
        if kind == "decoder":
            prompt, source = numbers(context)[-(40 - new) :] or [BOS], None
        else:
            prompt, source = [BOS], [*numbers(context)[-39:], EOS]
        ids = greedy_ids(after, prompt, new, source)
        whole = "".join(ALPHABET[i - 3] for i in ids if i >= 3)
        until = given.get("until", [])
        places = [whole.find(s) for s in ([until] if isinstance(until, str) else until) if s]
        end = min((place for place in places if place >= 0), default=len(whole))
        assert text == whole[:end], (context, given)
        cut += end < len(whole)
    assert cut > 5, "stops must be among them"


def test_a_stop_that_begins_in_the_context_is_none(harness: types.ModuleType) -> None:
    """As in the harness' own Hugging Face model, which reads the continuation alone."""
    ours = harness.HarnessModel(made(["$A"], max_positions=40))
    contexts = ["abc", "cab", "hhd", "dcba"]
    plain = ours.generate_until([asked(context, {"max_gen_toks": 9}) for context in contexts])
    for context, whole in zip(contexts, plain, strict=True):
        over, inside = context[-1] + whole[0], whole[4:6]
        found = ours.generate_until([asked(context, {"max_gen_toks": 9, "until": [over, inside]})])
        ends = [place for stop in (over, inside) if (place := whole.find(stop)) >= 0]
        assert found == [whole[: min(ends, default=len(whole))]], (context, over)


def test_stop_strings_and_until_may_both_be_given(harness: types.ModuleType) -> None:
    ours = harness.HarnessModel(made(["$A"], max_positions=40))
    (whole,) = ours.generate_until([asked("abc", {"max_gen_toks": 9})])
    for until, stop in ((whole[2:4], whole[5:8]), (whole[6:9], whole[2:4])):
        given = {"until": until, "stop_strings": stop, "max_gen_toks": 9}
        (found,) = ours.generate_until([asked("abc", given)])
        stopped = next(k for k in range(1, 10) if ("abc" + whole[:k]).endswith(stop))
        assert found == whole[:stopped].split(until)[0], (whole, given)


def test_bad_input(harness: types.ModuleType) -> None:
    model, made_of = made(["$A"]), harness.HarnessModel
    with pytest.raises(TokenizerError, match="no tokenizer"):
        made_of(Model(model.network))
    with pytest.raises(ArgumentError, match="max_length is 13; the model takes 1 to 12"):
        made_of(model, max_length=13)
    with pytest.raises(ArgumentError, match="model is Decoder; pass what tilewise.load gives"):
        made_of(model.network)
    sizes = {"vocab_size": 9, "hidden_size": 8, "num_heads": 2, "ffn_size": 8, "max_positions": 4}
    config = ModelConfig(model_type="tilewise-transformer", encoder_layers=1, **sizes)
    with pytest.raises(ArgumentError, match="no next token"):
        made_of(Model(build(config), model.tokenizer))
    for name in ("batch_size", "batch_tokens", "max_length"):
        for value in (0, True, 2.5, "8"):
            with pytest.raises(ArgumentError, match=f"{name} is {value!r}"):
                made_of(model, **{name: value})
    for wrong in ({"max_gen_toks": "2"}, {"max_gen_toks": None}, {"max_new_tokens": 1.5},
                  {"until": 5}, {"until": [5]}):  # fmt: skip
        with pytest.raises(ArgumentError, match=f"^{next(iter(wrong))} is"):
            made_of(model).generate_until([asked("a", {"max_gen_toks": 2} | wrong)])
    with pytest.raises(ArgumentError, match="pass a dict"):
        made_of(model).generate_until([asked("a", None)])
    for given in ({"do_sample": True}, {"temperature": 0.7}):
        with pytest.raises(ArgumentError, match="sampling"):
            made_of(model).generate_until([asked("a", given | {"max_gen_toks": 2})])
    with pytest.raises(ArgumentError, match="max_gen_toks is 256, which leaves no room"):
        made_of(model).generate_until([asked("a", {"until": ["b"]})])
    with pytest.raises(ArgumentError, match="generate takes no max_tokens"):
        made_of(model).generate_until([asked("a", {"max_gen_toks": 2, "max_tokens": 3})])
    nothing = made(["$A"], bos_token_id=None, eos_token_id=())
    with pytest.raises(ArgumentError, match="no bos or eos token"):
        made_of(nothing).loglikelihood([asked("", "a")])
    assert made_of(model).generate_until([]) == []
    assert made_of(model).loglikelihood([]) == []


def test_the_extra_is_named_when_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    monkeypatch.delitem(sys.modules, "tilewise.harness", raising=False)
    with pytest.raises(ImportError, match=r"pip install 'tilewise\[harness\]'"):
        import tilewise.harness  # noqa: F401


def test_under_the_real_harness(
    harness: types.ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three tasks of a local file, one of each kind; their figures from the requests by hand."""
    evaluator = pytest.importorskip("lm_eval.evaluator", reason=REAL)
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model, rng = made(["$A"], max_positions=40), random.Random(6)
    docs = [
        {"question": a_text(rng, 3, 9), "answers": [a_text(rng, 2, 4) for _ in range(3)],
         "right": rng.randrange(3), "text": a_text(rng, 30, 99)}
        for _ in range(12)
    ]  # fmt: skip
    (tmp_path / "docs.jsonl").write_text("\n".join(map(json.dumps, docs)))
    shared = {
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": str(tmp_path / "docs.jsonl"),
            "cache_dir": str(tmp_path / "cache"),
        },
        "test_split": "train",
    }
    tasks: list[dict[str, Any]] = [
        {"task": "choice", "output_type": "multiple_choice", "doc_to_text": "{{question}}",
         "doc_to_choice": "{{answers}}", "doc_to_target": "right",
         "metric_list": [{"metric": "acc"}]},
        {"task": "rolling", "output_type": "loglikelihood_rolling", "doc_to_text": "",
         "doc_to_target": "{{text}}", "metric_list": [{"metric": "word_perplexity"}]},
        {"task": "written", "output_type": "generate_until", "doc_to_text": "{{question}}",
         "doc_to_target": "{{text}}",
         "generation_kwargs": {"until": ["a", "b"], "max_gen_toks": 8, "do_sample": False},
         "metric_list": [{"metric": "exact_match"}]},
    ]  # fmt: skip
    ours = harness.HarnessModel(model)
    out = evaluator.simple_evaluate(model=ours, tasks=[shared | task for task in tasks])
    answers = [
        ours.loglikelihood([asked(doc["question"], " " + each) for each in doc["answers"]])
        for doc in docs
    ]
    right = [
        max(range(3), key=lambda i: each[i][0]) == doc["right"]
        for doc, each in zip(docs, answers, strict=True)
    ]
    assert out["results"]["choice"]["acc,none"] == pytest.approx(sum(right) / len(right))
    totals = ours.loglikelihood_rolling([asked(doc["text"]) for doc in docs])
    words = sum(len(re.split(r"\s+", doc["text"])) for doc in docs)
    perplexity = out["results"]["rolling"]["word_perplexity,none"]
    assert perplexity == pytest.approx(math.exp(-sum(totals) / words))
    given = tasks[2]["generation_kwargs"]
    written = ours.generate_until([asked(doc["question"], given) for doc in docs])
    samples = {each["doc_id"]: each for each in out["samples"]["written"]}
    assert [samples[i]["resps"][0][0] for i in range(len(docs))] == written
