"""Every family against transformers: logits, loss, gradients, generation, the folder and back.

The cases are each family's own EXAMPLES: small config.json contents, odd on purpose, built by the
class that their "architectures" names, with every parameter random.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import tilewise
from tilewise.families import FAMILIES, tensors_to
from tilewise.text import train_tokenizer

CASES = [
    pytest.param(raw, id=f"{name}-{i}")
    for name, family in FAMILIES.items()
    for i, raw in enumerate(family.EXAMPLES)
    if raw["model_type"] == name
]
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


def close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = 1e-4) -> None:
    """Equal but for `tolerance` of the largest value."""
    assert ours.shape == theirs.shape
    scale = max(float(theirs.detach().abs().max()), 1e-3)
    assert float((ours - theirs).detach().abs().max()) <= tolerance * scale


@pytest.mark.parametrize("raw", CASES)
@pytest.mark.parametrize("mask", [None, MASK, LEFT, HOLES], ids=["whole", "right", "left", "holes"])
def test_logits(raw: dict[str, Any], mask: torch.Tensor | None, tmp_path: Path) -> None:
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
        close(getattr(found, name)[kept], getattr(expected, other)[kept])


@pytest.mark.parametrize("raw", CASES)
def test_loss_and_gradients(raw: dict[str, Any], tmp_path: Path) -> None:
    theirs = saved(raw, tmp_path)
    ours = tilewise.load(tmp_path)
    given = inputs(theirs, MASK)
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
        seen.add(parameter)
    assert [n for n, p in theirs.named_parameters() if p.grad is not None and p not in seen] == []
    assert len(seen) > 3


@pytest.mark.parametrize("raw", CASES)
def test_generation(raw: dict[str, Any], tmp_path: Path) -> None:
    theirs = saved(raw, tmp_path)
    if not theirs.can_generate():
        pytest.skip(f"{raw['architectures'][0]} does not generate")
    ours = tilewise.load(tmp_path)
    # transformers counts positions of a source from its padding on, we from its first token.
    mask = MASK if theirs.config.is_encoder_decoder else LEFT
    given = {k: v for k, v in inputs(theirs, mask).items() if k != "decoder_input_ids"}
    pad = theirs.config.pad_token_id or 0
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
            assert row == expected.sequences[i, prompt:][: len(row)].tolist()
        if beams > 1:
            close(found.sequences_scores, expected.sequences_scores)


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


@pytest.mark.parametrize("raw", CASES)
def test_bfloat16_is_no_further_off(raw: dict[str, Any], tmp_path: Path) -> None:
    """From float64, at most twice as far as transformers' own bfloat16, by the 2-norm."""
    theirs = saved(raw, tmp_path)
    given = inputs(theirs, None)
    mine, name = common(theirs(**given))[0]
    with torch.no_grad():
        exact = getattr(theirs.double()(**given), name)
        half = getattr(theirs.bfloat16()(**given), name)
        found = getattr(tilewise.load(tmp_path, dtype="bfloat16")(**given), mine)
    off = torch.linalg.vector_norm(half.double() - exact)
    assert torch.linalg.vector_norm(found.double() - exact) <= 2 * off + 1e-5


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
