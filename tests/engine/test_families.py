"""Every family against transformers: logits, loss, gradients, generation, the folder and back.

The cases are each family's own EXAMPLES: small config.json contents, odd on purpose, built by the
class that their "architectures" names, with every parameter random.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import tilewise
from tilewise.errors import ArgumentError
from tilewise.families import FAMILIES, tensors_to
from tilewise.scoring import next_sentence
from tilewise.text import train_tokenizer

Record = Callable[[str, object], None]

CASES = [
    pytest.param(raw, id=f"{name}-{i}")
    for name, family in FAMILIES.items()
    for i, raw in enumerate(family.EXAMPLES)
    if raw["model_type"] == name
]


def saved_as(*endings: str) -> list[Any]:
    """The cases whose class has one of these names."""
    return [case for case in CASES if case.values[0]["architectures"][0].endswith(endings)]


SPEAKING = saved_as("LMHeadModel", "ForCausalLM", "ForConditionalGeneration", "MTModel")
MASKED = saved_as("ForMaskedLM", "ForPreTraining")
FOLLOWING = saved_as("ForPreTraining", "ForNextSentencePrediction")
MASK = torch.tensor([[1] * 9, [1] * 5 + [0] * 4, [1] * 8 + [0]])
LEFT = torch.tensor([[1] * 9, [0] * 4 + [1] * 5, [0] + [1] * 8])
HOLES = torch.tensor([[1, 0] * 4 + [1], [0, 1, 1, 0, 0, 1, 1, 1, 0], [1] * 9])


def reference(raw: dict[str, Any], seed: int = 0) -> Any:
    """A random model of transformers in float32, in eval mode."""
    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(**raw)
    config._attn_implementation = "eager"
    network = getattr(transformers, raw["architectures"][0])(config).eval()
    untied = not raw.get("tie_word_embeddings", True) and hasattr(network, "lm_head")
    if untied and config.tie_word_embeddings:  # T5's class ties
        network.lm_head.weight = torch.nn.Parameter(torch.empty_like(network.lm_head.weight))
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if not parameter.requires_grad:  # Marian's sinusoids
                continue
            is_norm = "norm" in name.lower() or "ln_" in name
            mean = float(parameter.dim() == 1 and is_norm and name.endswith("weight"))
            parameter.normal_(mean, 0.2)
        if "bart" in raw["model_type"] and not config.tie_word_embeddings:  # one that nothing uses
            base = getattr(network, "model", network)
            base.shared.weight.copy_(base.encoder.embed_tokens.weight)
    for name, buffer in network.named_buffers():
        if name == "final_logits_bias":
            buffer.normal_(0, 0.2)
    state = network.state_dict()
    for name in state:
        if name.endswith(".decoder.bias"):  # a head's bias under two names, one of them unread
            state[name.replace(".decoder.", ".")].copy_(state[name])
    return network


def saved(raw: dict[str, Any], folder: Path) -> Any:
    """The reference of raw, in a folder as transformers writes it; raw's own keys stay in it."""
    network = reference(raw)
    network.save_pretrained(folder)
    written = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(written | raw))
    return network


def drawn(rows: int, length: int, vocab: int) -> torch.Tensor:
    """Ids without the special ones, which are below 4 or at the end in every example."""
    generator = torch.Generator().manual_seed(5)
    return torch.randint(4, vocab - 2, (rows, length), generator=generator)


def inputs(network: Any, mask: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """What a forward pass takes, by the kind of model."""
    config = network.config
    ids = drawn(3, 9, config.vocab_size)
    if mask is not None and config.pad_token_id is not None:
        ids = ids.masked_fill(mask == 0, config.pad_token_id)
    found = {"input_ids": ids}
    if mask is not None:
        found["attention_mask"] = mask
    if config.is_encoder_decoder:
        target = getattr(config, "decoder_vocab_size", None) or config.vocab_size
        found["decoder_input_ids"] = drawn(3, 6, target).flip(1)
    if getattr(config, "type_vocab_size", 0) > 1 and not config.is_encoder_decoder:
        found["token_type_ids"] = (torch.arange(9) > 4).long().expand(3, 9)
    return found


def as_attributes(network: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors by their names in the class, where these are not the names in its files."""
    prefix = f"{network.base_model_prefix}."
    renamed = {"embed_out.weight": "lm_head.weight"}
    found = {renamed.get(name, name): tensor for name, tensor in tensors.items()}
    return found | {name.removeprefix(prefix): tensor for name, tensor in found.items()}


def common(expected: Any) -> list[tuple[str, str]]:
    """What of a model's output is compared: our name and transformers' name of each field."""
    named = [
        ("logits", "logits"),
        ("logits", "prediction_logits"),
        ("last_hidden_state", "last_hidden_state"),
        ("encoder_last_hidden_state", "encoder_last_hidden_state"),
        ("pooler_output", "pooler_output"),
        ("next_sentence_logits", "seq_relationship_logits"),
    ]
    if type(expected).__name__ == "NextSentencePredictorOutput":
        named = [("next_sentence_logits", "logits")]
    return [pair for pair in named if getattr(expected, pair[1], None) is not None]


def close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = 1e-4) -> float:
    """Equal but for `tolerance` of the largest value; returns the share of it that they differ."""
    assert ours.shape == theirs.shape
    scale = max(float(theirs.detach().abs().max()), 1e-3)
    difference = float((ours - theirs).detach().abs().max())
    assert difference <= tolerance * scale
    return difference / scale


@pytest.mark.feature("logits")
@pytest.mark.parametrize("raw", CASES)
@pytest.mark.parametrize("mask", [None, MASK, LEFT, HOLES], ids=["whole", "right", "left", "holes"])
def test_logits(
    raw: dict[str, Any], mask: torch.Tensor | None, tmp_path: Path, record_property: Record
) -> None:
    theirs = saved(raw, tmp_path)
    ours = tilewise.load(tmp_path)
    given = inputs(theirs, mask)
    with torch.no_grad():
        expected, found = theirs(**given), ours(**given)
    real = slice(None)
    if mask is not None and not theirs.config.is_encoder_decoder:
        real = mask.bool()
    assert common(expected)
    for name, other in common(expected):
        kept = slice(None) if name in ("pooler_output", "next_sentence_logits") else real
        if name.startswith("encoder") and mask is not None:
            kept = mask.bool()
        off = close(getattr(found, name)[kept], getattr(expected, other)[kept])
        record_property("off", off)


@pytest.mark.feature("gradients")
@pytest.mark.parametrize("raw", CASES)
def test_loss_and_gradients(raw: dict[str, Any], tmp_path: Path, record_property: Record) -> None:
    theirs = saved(raw, tmp_path)
    ours = tilewise.load(tmp_path)
    given = inputs(theirs, MASK)
    if theirs.config.pad_token_id is not None:  # padding that no mask hides
        for name in given.keys() & {"input_ids", "decoder_input_ids"}:
            given[name][:, 2] = theirs.config.pad_token_id
    expected, found = theirs(**given), ours(**given)
    total_theirs, total_ours = torch.zeros(()), torch.zeros(())
    for name, other in common(expected):
        value = getattr(expected, other)
        weight = torch.randn(value.shape, generator=torch.Generator().manual_seed(3))
        if value.shape[:2] == MASK.shape:  # not a target's, whose length is another
            weight = weight * MASK[..., None]
        total_theirs = total_theirs + (value * weight).sum()
        total_ours = total_ours + (getattr(found, name) * weight).sum()
    close(total_ours, total_theirs)
    total_theirs.backward()
    total_ours.backward()
    network = ours.network
    state = {n: p.grad for n, p in network.named_parameters(remove_duplicate=False)}
    state |= {n: torch.zeros_like(network.get_parameter(n)) for n, g in state.items() if g is None}
    compared = as_attributes(theirs, tensors_to(ours.config, state))
    largest = max(float(g.grad.abs().max()) for g in theirs.parameters() if g.grad is not None)
    unused = 1e-6 * largest
    seen = set()
    for name, parameter in theirs.named_parameters(remove_duplicate=False):
        if parameter.grad is None or name not in compared:  # a tied one has another name too
            continue
        grad, scale = compared[name], float(parameter.grad.abs().max())
        difference = float((grad.reshape(parameter.shape) - parameter.grad).abs().max())
        assert difference <= 1e-4 * scale + unused, name
        record_property("off", difference / (scale + 1e4 * unused))
        seen.add(parameter)
    assert [n for n, p in theirs.named_parameters() if p.grad is not None and p not in seen] == []
    assert len(seen) > 3


@pytest.mark.feature("generate")
@pytest.mark.parametrize("raw", SPEAKING)
def test_generation(raw: dict[str, Any], tmp_path: Path) -> None:
    theirs = saved(raw, tmp_path)
    ours = tilewise.load(tmp_path)
    # transformers counts positions of a source from its padding on, we from its first token.
    mask = MASK if theirs.config.is_encoder_decoder else LEFT
    given = {k: v for k, v in inputs(theirs, mask).items() if k != "decoder_input_ids"}
    pad, end = theirs.config.pad_token_id or 0, theirs.config.eos_token_id
    padding = {pad, *(end if isinstance(end, list) else [end])}  # its beam search pads with either
    for beams in (1, 3):
        options: dict[str, Any] = {"num_beams": beams, "max_new_tokens": 8}
        expected = theirs.generate(
            **given, **options, do_sample=False, pad_token_id=pad, output_scores=True,
            return_dict_in_generate=True,
        )  # fmt: skip
        found = ours.generate(given["input_ids"], attention_mask=mask, **options)
        cached = ours.generate(given["input_ids"], attention_mask=mask, use_cache=False, **options)
        assert torch.equal(found.sequences, cached.sequences)
        for i in range(3):
            prompt = 0 if theirs.config.is_encoder_decoder else int((mask[i] == 0).sum())
            row = found.sequences[i, : int(found.lengths[i])].tolist()
            their_row = expected.sequences[i, prompt:].tolist()
            assert row == their_row[: len(row)] and set(their_row[len(row) :]) <= padding
        if beams > 1:
            close(found.sequences_scores, expected.sequences_scores)


@pytest.mark.feature("folder")
@pytest.mark.parametrize("raw", CASES)
def test_saved_folder_is_transformers(raw: dict[str, Any], tmp_path: Path) -> None:
    theirs = saved(raw, tmp_path / "theirs")
    ours = tilewise.load(tmp_path / "theirs")
    ours.save(tmp_path / "ours")
    kind = type(theirs)
    again, info = kind.from_pretrained(tmp_path / "ours", output_loading_info=True)
    computed = {n for n, p in theirs.named_parameters() if not p.requires_grad}
    assert not info["missing_keys"] - computed and not info["unexpected_keys"]
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    back = tilewise.load(tmp_path / "ours")
    assert back.config == ours.config
    for a, b in zip(back.parameters(), ours.parameters(), strict=True):
        assert torch.equal(a, b)


def is_tied(raw: dict[str, Any]) -> bool:
    return raw.get("tie_word_embeddings", raw["model_type"] not in ("llama", "gpt_neox"))


@pytest.mark.parametrize("raw", [c for c in SPEAKING + MASKED if is_tied(c.values[0])])
def test_a_file_may_have_the_head_for_the_embedding(raw: dict[str, Any], tmp_path: Path) -> None:
    """Of two tied tensors some writers keep the one, some the other."""
    theirs = saved(raw, tmp_path)
    expected = tilewise.load(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    head = theirs.get_output_embeddings()
    same = {name for name, tensor in tensors.items() if torch.equal(tensor, head.weight)}
    tensors = {name: tensor for name, tensor in tensors.items() if name not in same}
    (prefix,) = (name for name, module in theirs.named_modules() if module is head)
    save_file(tensors | {f"{prefix}.weight": head.weight.detach()}, tmp_path / "model.safetensors")
    found = tilewise.load(tmp_path)
    assert same and found.config == expected.config
    for a, b in zip(found.parameters(), expected.parameters(), strict=True):
        assert torch.equal(a, b)


FIRST = [next(raw for raw in f.EXAMPLES if raw["model_type"] == k) for k, f in FAMILIES.items()
         if f.EXAMPLES]  # fmt: skip


@pytest.mark.parametrize("raw", FIRST, ids=lambda raw: raw["model_type"])
def test_bfloat16_and_the_tokenizer_are_saved(raw: dict[str, Any], tmp_path: Path) -> None:
    theirs = saved(raw, tmp_path / "theirs")
    tokenizer = train_tokenizer(["half past three"])
    for name, content in tokenizer.files().items():
        (tmp_path / "theirs" / name).write_bytes(content)
    tokens = {"pad_token": "<pad>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (tmp_path / "theirs" / "tokenizer_config.json").write_text(json.dumps(tokens))
    ours = tilewise.load(tmp_path / "theirs", dtype="bfloat16")
    ours.save(tmp_path / "ours")
    again = type(theirs).from_pretrained(tmp_path / "ours")
    assert again.dtype == torch.bfloat16
    for name, tensor in theirs.bfloat16().state_dict().items():
        if "embed_positions" not in name:  # Marian's are computed, in bfloat16 or before it
            assert torch.equal(again.state_dict()[name], tensor), name
    for reader in (tilewise.load(tmp_path / "ours").tokenizer, ours.tokenizer):
        assert reader is not None and reader.encode(["pat"]) == tokenizer.encode(["pat"])
    their_reader = transformers.AutoTokenizer.from_pretrained(tmp_path / "ours")
    assert their_reader("pat")["input_ids"] == tokenizer.encode(["pat"])[0]
    assert their_reader.pad_token == "<pad>"


@pytest.mark.feature("bfloat16")
@pytest.mark.parametrize("raw", CASES)
def test_bfloat16_is_no_further_off(
    raw: dict[str, Any], tmp_path: Path, record_property: Record
) -> None:
    """From float64, at most twice as far as transformers' own bfloat16, by the 2-norm."""
    theirs = saved(raw, tmp_path)
    given = inputs(theirs, None)
    mine, name = common(theirs(**given))[0]
    with torch.no_grad():
        exact = getattr(theirs.double()(**given), name)
        half = getattr(theirs.bfloat16()(**given), name)
        found = getattr(tilewise.load(tmp_path, dtype="bfloat16")(**given), mine)
    off = torch.linalg.vector_norm(half.double() - exact)
    ours_off = torch.linalg.vector_norm(found.double() - exact)
    assert ours_off <= 2 * off + 1e-5
    record_property("off", float(ours_off / off))


@pytest.mark.feature("attention maps")
@pytest.mark.parametrize("raw", CASES)
def test_attention_maps(raw: dict[str, Any], tmp_path: Path) -> None:
    theirs = saved(raw, tmp_path)
    ours = tilewise.load(tmp_path)
    given = inputs(theirs, MASK)
    with torch.no_grad():
        expected = theirs(**given, output_attentions=True)
        found = ours(**given, output_attentions=True)
    pairs = [("attentions", "attentions")]
    if theirs.config.is_encoder_decoder:
        pairs = [("attentions", "decoder_attentions"), ("cross_attentions", "cross_attentions"),
                 ("encoder_attentions", "encoder_attentions")]  # fmt: skip
    for name, other in pairs:
        maps = getattr(found, name)
        assert len(maps) == len(getattr(expected, other)) > 0
        for mine, their in zip(maps, getattr(expected, other), strict=True):
            rows = MASK.bool() if mine.shape[2] == MASK.shape[1] else slice(None)
            close(mine.transpose(1, 2)[rows], their.transpose(1, 2)[rows])


def texts_of(theirs: Any, vocab: int | None = None) -> list[list[int]]:
    """Three texts of different lengths."""
    ids = drawn(3, 9, vocab or theirs.config.vocab_size).flip(0).tolist()
    return [row[:n] for row, n in zip(ids, (9, 4, 6), strict=True)]


@pytest.mark.feature("score")
@pytest.mark.parametrize("raw", SPEAKING)
def test_score(raw: dict[str, Any], tmp_path: Path) -> None:
    theirs = saved(raw, tmp_path)
    config = theirs.config
    texts = texts_of(theirs, getattr(config, "decoder_vocab_size", None))
    sources = texts_of(theirs)[::-1] if config.is_encoder_decoder else None
    found = tilewise.load(tmp_path).score(texts, sources)
    for i, text in enumerate(texts):
        given = {"input_ids": torch.tensor([text])}
        if sources is not None:
            target = [config.decoder_start_token_id, *text]
            given = {"input_ids": torch.tensor([sources[i]]),
                     "decoder_input_ids": torch.tensor([target])}  # fmt: skip
        with torch.no_grad():
            log_probs = theirs(**given).logits[0, :-1].log_softmax(-1)
        assert found[i].tokens == text[-len(log_probs) :]
        expected = log_probs[range(len(log_probs)), found[i].tokens]
        close(torch.tensor(found[i].log_probs), expected)


@pytest.mark.feature("embed")
@pytest.mark.parametrize("raw", CASES)
def test_embed(raw: dict[str, Any], tmp_path: Path) -> None:
    theirs = saved(raw, tmp_path)
    ours, texts = tilewise.load(tmp_path), texts_of(theirs)
    stack = theirs.get_encoder() if theirs.config.is_encoder_decoder else theirs.base_model
    with torch.no_grad():
        states = [stack(torch.tensor([text])).last_hidden_state[0] for text in texts]
    for pooling, pool in (
        ("mean", lambda x: x.mean(0)),
        ("cls", lambda x: x[0]),
        ("last", lambda x: x[-1]),
    ):
        expected = torch.stack([pool(each) for each in states])
        close(ours.embed(texts, pooling=pooling, normalize=False), expected)
        close(ours.embed(texts, pooling=pooling), torch.nn.functional.normalize(expected, dim=-1))


@pytest.mark.feature("fill_mask")
@pytest.mark.parametrize("raw", MASKED)
def test_fill_mask(raw: dict[str, Any], tmp_path: Path) -> None:
    theirs = saved(raw, tmp_path)
    texts, mask = texts_of(theirs), 4
    for text in texts:
        text[1] = text[-1] = mask
    found = tilewise.load(tmp_path).fill_mask(texts, mask_token_id=mask, top_k=3)
    for text, masks in zip(texts, found, strict=True):
        with torch.no_grad():
            out = theirs(torch.tensor([text]))
        logits = getattr(out, "prediction_logits", None)
        log_probs = (out.logits if logits is None else logits)[0].log_softmax(-1)
        places = [i for i, token in enumerate(text) if token == mask]
        for place, best in zip(places, masks, strict=True):
            values, tokens = log_probs[place].topk(3)
            assert [each.token for each in best] == tokens.tolist()
            close(torch.tensor([each.log_prob for each in best]), values)


@pytest.mark.feature("next_sentence")
@pytest.mark.parametrize("raw", FOLLOWING)
def test_next_sentence(raw: dict[str, Any], tmp_path: Path) -> None:
    theirs = saved(raw, tmp_path)
    pairs = [(text, [0] * 2 + [1] * (len(text) - 2)) for text in texts_of(theirs)]
    found = next_sentence(tilewise.load(tmp_path).network, pairs)
    for (text, types), probability in zip(pairs, found, strict=True):
        given = {"input_ids": torch.tensor([text]), "token_type_ids": torch.tensor([types])}
        with torch.no_grad():
            out = theirs(**given)
        logits = out.logits if hasattr(out, "logits") else out.seq_relationship_logits
        assert probability == pytest.approx(float(logits[0].softmax(-1)[0]), abs=1e-5)


@pytest.mark.parametrize("raw", [case for case in CASES if case.id.endswith("-0")])
def test_what_a_family_cannot_do_is_refused(raw: dict[str, Any], tmp_path: Path) -> None:
    """Where the table of families has a dash there is an error that says why."""
    saved(raw, tmp_path)
    model = tilewise.load(tmp_path)
    can_speak, can_fill, can_follow = (
        any(case.values[0] is raw for case in cases) for cases in (SPEAKING, MASKED, FOLLOWING)
    )
    if not can_speak:
        with pytest.raises(ArgumentError, match="no next token"):
            model.score([[5, 6]])
        with pytest.raises(ArgumentError, match="generate"):
            model.generate([[5, 6]])
    if not can_fill:
        with pytest.raises(ArgumentError, match="no masked-token head"):
            model.fill_mask([[5, 4]], mask_token_id=4)
    if not can_follow:
        with pytest.raises(ArgumentError, match="no next-sentence head"):
            next_sentence(model.network, [([5, 6], [0, 1])])
