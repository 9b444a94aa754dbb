"""Scores, embeddings, fillings and few-shot choices against brute force and transformers."""

import math
from pathlib import Path

import pytest
import torch
from transformers import (
    BertConfig,
    BertForNextSentencePrediction,
    BertTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
)

import tilewise
from tilewise.config import ModelConfig
from tilewise.errors import ArgumentError, GenerationError, TokenizerError
from tilewise.models import build
from tilewise.models.stack import evaluating
from tilewise.pretrained import Model
from tilewise.scoring import Score, choose, embed, few_shot_prompt, next_sentence, perplexity, score
from tilewise.scoring.batches import by_tokens
from tilewise.scoring.score import scored
from tilewise.text import train_tokenizer

MASKED = {"decoder_layers": 0, "encoder_layers": 2, "masked_head": "gelu", "output_bias": True}
TEXTS = [[5, 6, 7, 8], [9, 10], [11, 12, 13, 14, 15, 16, 17], [5, 5, 5]]
SIZES = {"hidden_size": 16, "num_heads": 2, "ffn_size": 20, "max_positions": 12}


def made(**changes: object) -> torch.nn.Module:
    torch.manual_seed(0)
    values = {"model_type": "tilewise-transformer", "vocab_size": 30, "decoder_layers": 2}
    network = build(ModelConfig(**(values | SIZES | changes))).eval()  # type: ignore[arg-type]
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return network


def by_hand(network: torch.nn.Module, ids: list[int], first: int) -> list[float]:
    """Log-probabilities of ids[first:], each from a forward pass of its own."""
    found = []
    for t in range(first, len(ids)):
        logits = network(torch.tensor([ids[:t]])).logits[0, -1].detach()
        found.append(float(torch.log_softmax(logits.double(), -1)[ids[t]]))
    return found


@pytest.mark.parametrize("batch_tokens", [1, 9, 4096])
def test_scores_are_those_of_one_token_at_a_time(batch_tokens: int) -> None:
    network = made()
    contexts: list[list[int]] = [[], [3, 4], [2], [1, 2, 3]]
    found = score(network, TEXTS, contexts, batch_tokens=batch_tokens)
    for text, context, each in zip(TEXTS, contexts, found, strict=True):
        first = max(len(context), 1)
        expected = by_hand(network, context + text, first)
        assert each.tokens == (context + text)[first:]
        assert each.log_probs == pytest.approx(expected, abs=1e-5)
        assert each.total == pytest.approx(sum(expected), abs=1e-5) and not each.greedy
        assert each.perplexity == pytest.approx(math.exp(-sum(expected) / len(expected)), rel=1e-5)


def test_batches_hold_what_was_asked_padding_included() -> None:
    lengths = [3, 9, 1, 4, 4, 2]
    batches = list(by_tokens(lengths, 8))
    assert sorted(sum(batches, [])) == list(range(6))
    assert [[lengths[i] for i in batch] for batch in batches] == [[9], [4, 4], [3, 2], [1]]


def test_perplexity_is_of_all_tokens() -> None:
    scores = [Score([1, 2], [-1.0, -2.0]), Score([3], [-6.0]), Score([], [])]
    assert perplexity(scores) == pytest.approx(math.exp(3.0))
    with pytest.raises(ArgumentError, match="no token"):
        perplexity([Score([], [])])
    assert Score([1], [-1e4]).perplexity == perplexity([Score([1], [-1e4])]) == math.inf


@pytest.mark.parametrize("stride", [None, 1, 5, 11, 12])
def test_long_texts_are_scored_in_windows(stride: int | None) -> None:
    network = made()
    ids = torch.randint(0, 30, (40,), generator=torch.Generator().manual_seed(1)).tolist()
    found = score(network, [ids], stride=stride)[0]
    assert found.tokens == ids[1:]
    step, expected, done = stride or 6, by_hand(network, ids[:13], 1), 13  # 12 are read
    while done < 40:
        end = min(done + step, 40)
        expected += by_hand(network, ids[end - 13 : end], 13 - (end - done))
        done = end
    assert found.log_probs == pytest.approx(expected, abs=1e-5)


def test_scores_of_a_seq2seq_model() -> None:
    network = made(encoder_layers=1, decoder_start_token_id=2)
    sources = [[3, 4, 5], [6], [7, 8], [9, 9, 9, 9]]
    for text, source, each in zip(TEXTS, sources, score(network, TEXTS, sources), strict=True):
        target = torch.tensor([[2, *text[:-1]]])
        logits = network(torch.tensor([source]), decoder_input_ids=target).logits[0]
        rows = torch.log_softmax(logits.double(), -1)
        expected = [float(rows[i, token]) for i, token in enumerate(text)]
        assert each.tokens == text and each.log_probs == pytest.approx(expected, abs=1e-5)
    with pytest.raises(ArgumentError, match="contexts is not given"):
        score(network, TEXTS)


def test_targets_are_scored_without_the_whole_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    network = made(encoder_layers=1, decoder_start_token_id=2)
    expected = score(network, TEXTS, TEXTS)
    monkeypatch.setitem(scored.__globals__, "LOGITS", 60)  # two rows of the vocabulary
    sizes: list[int] = []
    network.decoder.lm_head.register_forward_hook(lambda _, __, out: sizes.append(out.numel()))
    found = score(network, TEXTS, TEXTS)
    assert max(sizes) == 60 and [each.tokens for each in found] == TEXTS
    for one, other in zip(found, expected, strict=True):
        assert one.log_probs == pytest.approx(other.log_probs, abs=1e-6)


def test_padding_tokens_inside_a_text_take_no_position() -> None:
    network = made(position_count="tokens", pad_token_id=1, position_offset=2,
                   positions="sinusoidal")  # fmt: skip
    rows = [[5, 1, 6, 7], [1, 5, 6], [8, 9, 10, 11, 12, 13]]
    for row, each in zip(rows, score(network, rows), strict=True):
        assert each.log_probs == pytest.approx(by_hand(network, row, 1), abs=1e-5)


def test_ids_of_a_tokenizer_past_the_vocabulary() -> None:
    tokenizer = train_tokenizer(["abcdefghijkl"])
    model = Model(made(vocab_size=8), tokenizer)
    for call in (model.score, model.embed, lambda t: model.score(t, ["a"])):
        with pytest.raises(ArgumentError, match=r"\[0\] holds the id 1\d; the vocabulary is 0..7"):
            call(["ijkl"])


def test_eval_mode_lasts_until_the_last_thread_is_out() -> None:
    network = made(dropout=0.3).train()
    network.layers[0].eval()
    before = [part.training for part in network.modules()]
    first, second = evaluating(network), evaluating(network)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not any(part.training for part in network.modules())
    second.__exit__(None, None, None)
    assert [part.training for part in network.modules()] == before


@pytest.mark.parametrize(
    "pairs", ["ab", ["ab", "cd"], [("a",)], [("a", "b", "c")], [("a", "b"), ("c",)], 5, [("a", 5)]]
)
def test_bad_pairs(pairs) -> None:
    network = made(**FOLLOWING)
    with pytest.raises(TokenizerError, match=r"pairs must be|pairs\[\d\] is|must be a string"):
        Model(network, train_tokenizer(["abc"])).next_sentence(pairs)


FOLLOWING = {"decoder_layers": 0, "encoder_layers": 2, "pooler": True, "next_sentence": True}
WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] a b c d e f g h i j".split()
SENTENCES = [
    ("a b c", "d"), ("e", "f g h i j a b"), ("c c c c c c c c c", "d d d d d d d d d d"),
    ("a", "a"), ("j i h g f", "e d c b a"), ("b", ""),
]  # fmt: skip


@pytest.mark.parametrize("batch_tokens", [1, 20, 30, 4096])
def test_pairs_run_together_as_they_do_alone(batch_tokens: int) -> None:
    network = made(**FOLLOWING, token_types=2, pad_token_id=3)
    rows = [(ids, [0] + [1] * (len(ids) - 1)) for ids in [*TEXTS, [3, 5, 3], list(range(12))]]
    sizes: list[tuple[int, int]] = []
    hook = network.embedding.register_forward_hook(
        lambda _, given, __: sizes.append(given[0].shape)
    )
    found = next_sentence(network, rows, batch_tokens=batch_tokens)
    hook.remove()
    assert all(r * s <= batch_tokens or r == 1 for r, s in sizes)
    assert sum(r for r, _ in sizes) == len(rows)
    assert batch_tokens not in (1, 4096) or len(sizes) == (6 if batch_tokens == 1 else 1)
    for (ids, types), probability in zip(rows, found, strict=True):
        out = network(torch.tensor([ids]), token_type_ids=torch.tensor([types]))
        alone = out.next_sentence_logits[0].softmax(-1)[0]
        assert probability == pytest.approx(float(alone.detach()), abs=1e-6)
    assert len({round(p, 3) for p in found}) == len(rows), "the pairs must differ"


def test_next_sentence_is_transformers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=2,
                        num_attention_heads=2, intermediate_size=20, max_position_embeddings=12,
                        initializer_range=0.5)  # fmt: skip
    theirs = BertForNextSentencePrediction(config).eval()
    theirs.save_pretrained(tmp_path)
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    tokenizer, model = BertTokenizer.from_pretrained(tmp_path), tilewise.load(tmp_path)
    for batch_tokens in (1, 30, 4096):
        found = model.next_sentence(SENTENCES, truncate=True, batch_tokens=batch_tokens)
        for (first, second), probability in zip(SENTENCES, found, strict=True):
            given = tokenizer([first], [second], truncation="longest_first", max_length=12,
                              return_tensors="pt")  # fmt: skip
            with torch.no_grad():
                expected = theirs(**given).logits[0].softmax(-1)[0]
            assert probability == pytest.approx(float(expected), abs=1e-6)
    with pytest.raises(ArgumentError, match=r"pairs\[2\] is 22 tokens .*12 pos.* truncate=True"):
        model.next_sentence(SENTENCES)
    assert model.next_sentence([]) == []


def test_loss_of_transformers_is_the_mean(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=30, n_embd=16, n_head=2, n_layer=2, n_positions=12,
                        initializer_range=0.3, bos_token_id=1, eos_token_id=2)  # fmt: skip
    theirs = GPT2LMHeadModel(config).eval()
    theirs.save_pretrained(tmp_path)
    found = tilewise.load(tmp_path).score(TEXTS)
    for text, each in zip(TEXTS, found, strict=True):
        loss = float(theirs(torch.tensor([text]), labels=torch.tensor([text])).loss)
        assert each.mean == pytest.approx(-loss, abs=1e-5)


@pytest.mark.parametrize("kind", ["decoder_layers", "encoder_layers"])
def test_embeddings_do_not_depend_on_the_batch(kind: str) -> None:
    network = made(**({"decoder_layers": 0} | {kind: 2}))
    model = Model(network)
    for pooling, of in (
        ("mean", lambda h: h.mean(0)),
        ("cls", lambda h: h[0]),
        ("last", lambda h: h[-1]),
    ):
        found = model.embed(TEXTS, pooling=pooling, normalize=False, batch_tokens=8)
        unit = model.embed(TEXTS, pooling=pooling)
        for i, text in enumerate(TEXTS):
            hidden = network(torch.tensor([text])).last_hidden_state[0]
            torch.testing.assert_close(found[i], of(hidden), rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(unit[i], of(hidden) / of(hidden).norm())


def test_fillings_are_the_best_of_the_masked_distribution() -> None:
    network = made(**MASKED)
    rows = [[3, 4, 7, 5], [4, 4], [6, 7, 8, 9, 4]]
    found = Model(network).fill_mask(rows, mask_token_id=4, top_k=3)
    assert [len(each) for each in found] == [1, 2, 1]
    for row, masks in zip(rows, found, strict=True):
        logits = network(torch.tensor([row])).logits[0]
        places = [i for i, token in enumerate(row) if token == 4]
        for place, best in zip(places, masks, strict=True):
            values, tokens = torch.log_softmax(logits[place], -1).topk(3)
            assert [filling.token for filling in best] == tokens.tolist()
            assert [f.log_prob for f in best] == pytest.approx(values.tolist(), abs=1e-5)
    with pytest.raises(ArgumentError, match=r"rows\[1\] holds no mask"):
        Model(network).fill_mask([[4], [5]], mask_token_id=4)


def test_texts_and_contexts_are_encoded_as_one() -> None:
    tokenizer = train_tokenizer(["a cat sat on the mat", "the dog ran"], vocab_size=40)
    network = made(vocab_size=tokenizer.vocab_size, max_positions=64)
    model = Model(network, tokenizer)
    whole = tokenizer.encode(["the cat sat"])[0]
    split = model.score([" cat sat"], ["the"])[0]
    first = len(whole) - len(split.tokens)
    assert split.tokens == whole[first:]
    assert split.log_probs == pytest.approx(by_hand(network, whole, first), abs=1e-5)
    assert tokenizer.decode([split.tokens]) == [" cat sat"]


def test_few_shot_prompts_and_choices() -> None:
    examples = [("2 + 2 =", "4"), ("1 + 1 =", "2")]
    assert few_shot_prompt("3 + 1 =", description="Add.") == "Add.\n\n3 + 1 =\n"
    prompt = few_shot_prompt("3 + 1 =", examples, "Add.", delimiter=" ")
    assert prompt == "Add.\n\n2 + 2 = 4\n\n1 + 1 = 2\n\n3 + 1 = "
    table = {("4", "P"): [-1.0], ("long answer", "P"): [-0.4] * 4,
             ("4", "N"): [-1.0], ("long answer", "N"): [-3.0]}  # fmt: skip

    def scores(texts: list[str], contexts: list[str]) -> list[Score]:
        pairs = zip(texts, contexts, strict=True)
        return [Score([0] * len(table[pair]), table[pair]) for pair in pairs]

    answers = ["4", "long answer"]
    assert choose(scores, "P", answers).index == 0  # type: ignore[arg-type]
    assert choose(scores, "P", answers, normalise="length").index == 1  # type: ignore[arg-type]
    chosen = choose(scores, "P", answers, normalise="unconditional", neutral="N")  # type: ignore[arg-type]
    assert chosen.index == 1 and chosen.values == pytest.approx([0.0, 1.4])
    with pytest.raises(ArgumentError, match="normalise"):
        choose(scores, "P", answers, normalise="other")  # type: ignore[arg-type]
    table["", "P"], table["odd", "P"] = [], [math.nan]
    with pytest.raises(ArgumentError, match=r"answers\[1\], '', has no token to score"):
        choose(scores, "P", ["4", ""])  # type: ignore[arg-type]
    with pytest.raises(GenerationError, match=r"score of answers\[1\] is NaN"):
        choose(scores, "P", ["4", "odd"])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda m: m.score("text"), "texts is str"),
        (lambda m: m.score([[1, 99]]), "holds the id 99"),
        (lambda m: m.score([[1, 2]], [[1], [2]]), "contexts has 2 rows and texts 1"),
        (lambda m: m.score([[1, 2]], batch_tokens=0), "batch_tokens is 0"),
        (lambda m: m.score([list(range(20))], stride=13), "stride is 13"),
        (lambda m: m.score([[1, 2]], stride=2.5), "stride is 2.5"),
        (lambda m: m.score([[1, 2]], stride=True), "stride is True"),
        (lambda m: m.score([b"\1\2"]), r"texts\[0\] is bytes"),
        (lambda m: score(m.network, [[1, -1]]), r"texts\[0\] holds the id -1"),
        (lambda m: score(m.network, [[1, 2]], [[30]]), r"contexts\[0\] holds the id 30"),
        (lambda m: embed(m.network, [[1, 30]]), r"rows\[0\] holds the id 30"),
        (lambda m: embed(m.network, [[1.5]]), "holds 1.5"),
        (lambda m: m.next_sentence([("a", "b")]), "no next-sentence head"),
        (
            lambda m: next_sentence(made(**FOLLOWING, token_types=2), [([1, 2], [0])]),
            r"pairs\[0\] has 2 ids and 1 token_type_ids",
        ),
        (lambda m: next_sentence(made(**FOLLOWING, token_types=2), [([1], [2])]), "holds the id 2"),
        (lambda m: next_sentence(made(**FOLLOWING), [([1], [0])], batch_tokens=0), "batch_tokens"),
        (lambda m: few_shot_prompt(5), "query is 5"),
        (lambda m: few_shot_prompt("a", delimiter=None), "delimiter is None"),
        (lambda m: few_shot_prompt("a", None), "examples is None"),
        (lambda m: choose(m.score, "a", "bc"), "answers is str"),
        (lambda m: m.score(["text"]), "no tokenizer files; add them, or in Python"),
        (lambda m: m.score([[1, 2]], language="ro_RO"), "language is of a seq2seq model's"),
        (lambda m: m.embed([[]]), r"rows\[0\] is empty"),
        (lambda m: m.embed([[1]], pooling="max"), "pooling is 'max'"),
        (lambda m: m.embed([[1] * 13]), "13 tokens long"),
        (lambda m: m.fill_mask([[1]], mask_token_id=1), "no masked-token head"),
        (lambda _: Model(made(**MASKED)).fill_mask([[1]]), "mask_token_id is not given, and no"),
    ],
)
def test_bad_input(call, match: str) -> None:
    with pytest.raises(ArgumentError, match=match):
        call(Model(made()))


def test_long_texts_are_cut_when_asked() -> None:
    text = "abcdefgh" * 4  # 33 tokens with </s>, for 12 positions
    tokenizer = train_tokenizer([text])
    network = made(**MASKED)
    model = Model(network, tokenizer)
    with pytest.raises(ArgumentError, match="33 tokens long.*12 positions.*truncate=True"):
        model.embed([text])
    assert model.embed([text, "a"], truncate=True)[0].equal(model.embed([text[:11]])[0])
    (mask,) = tokenizer.encode(["c"])[0][:1]
    found = model.fill_mask([text], mask_token_id=mask, truncate=True)
    assert len(found[0]) == 2  # of text[:11]
    with pytest.raises(ArgumentError, match="33 tokens long"):
        model.fill_mask([text], mask_token_id=mask)
