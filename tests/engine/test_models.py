"""Encoder, Decoder and Seq2Seq: parity with torch.nn.Transformer, masks, labels, bad input."""

import copy
import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tilewise
from tilewise.config import ModelConfig, usable_ids
from tilewise.errors import ArgumentError, CheckpointError, ConfigError
from tilewise.models import Decoder, Encoder, Seq2Seq

V, E, HEADS, FFN, LENGTH = 13, 16, 4, 24, 12
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
VALUES: dict = {
    "model_type": "tilewise-transformer",
    "vocab_size": V,
    "hidden_size": E,
    "num_heads": HEADS,
    "ffn_size": FFN,
    "max_positions": LENGTH,
    "pad_token_id": 0,
    "decoder_start_token_id": 1,
}
LAYERS = {
    "encoder": {"encoder_layers": 2},
    "decoder": {"decoder_layers": 2},
    "seq2seq": {"encoder_layers": 2, "decoder_layers": 2},
}


def model(kind: str, **changes: object):
    """A model of unit-scale activations whose output depends on every parameter."""
    network = tilewise.build(ModelConfig(**(VALUES | LAYERS[kind] | changes)))
    generator = torch.Generator().manual_seed(7)
    for parameter in network.parameters():
        scale = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.5
        nn.init.normal_(parameter, std=scale, generator=generator)
    return network


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(2, V, shape, generator=torch.Generator().manual_seed(seed))


def fingerprint(network: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        digest.update(name.encode() + tensor.detach().numpy().tobytes())
    return digest.hexdigest()


# ---- parity with torch.nn.Transformer ----------------------------------------------------------


@pytest.mark.parametrize("padded", [False, True])
def test_seq2seq_is_torchs_transformer(padded: bool) -> None:
    """Post-norm with final norms, weights loaded by name: forward, loss and all gradients."""
    ours = model("seq2seq", norm_position="post", positions="sinusoidal", scale_embedding=True)
    theirs = nn.Transformer(E, HEADS, 2, 2, FFN, dropout=0.0, batch_first=True)
    for stack, mine in ((theirs.encoder, ours.encoder), (theirs.decoder, ours.decoder)):
        state = mine.state_dict()
        names = stack.state_dict().keys()
        stack.load_state_dict({name: state[name] for name in names}, strict=True)
    source, target, labels = draw(3, 7), draw(3, 5, seed=1), draw(3, 5, seed=2)
    labels[1, 3:] = -100
    mask = torch.ones(3, 7, dtype=torch.int64)
    if padded:
        mask[1, 4:], mask[2, 1:] = 0, 0
    tokens = ours.encoder.embedding.tokens.weight.detach().clone().requires_grad_()
    table = ours.encoder.embedding.table

    def embedded(ids: Tensor) -> Tensor:
        return tokens[ids] * E**0.5 + table[: ids.shape[1]]

    hidden = theirs(
        embedded(source),
        embedded(target),
        tgt_mask=torch.ones(5, 5, dtype=torch.bool).triu(1),
        src_key_padding_mask=mask == 0,
        memory_key_padding_mask=mask == 0,
    )
    logits = hidden @ tokens.t()
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
    loss.backward()

    out = ours(source, mask, decoder_input_ids=target, labels=labels)
    torch.testing.assert_close(out.last_hidden_state, hidden, **TOLERANCE)
    torch.testing.assert_close(out.logits, logits, **TOLERANCE)
    torch.testing.assert_close(out.loss, loss, **TOLERANCE)
    out.loss.backward()
    torch.testing.assert_close(ours.encoder.embedding.tokens.weight.grad, tokens.grad, **TOLERANCE)
    grads = {name: p.grad for name, p in ours.named_parameters()}
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(grads.pop(name), parameter.grad, msg=name, **TOLERANCE)
    assert list(grads) == ["encoder.embedding.tokens.weight"]


@pytest.mark.parametrize("pre_norm", [False, True])
def test_encoder_is_torchs(pre_norm: bool) -> None:
    ours = model("encoder", norm_position="pre" if pre_norm else "post", positions="none")
    layer = nn.TransformerEncoderLayer(E, HEADS, FFN, 0.0, batch_first=True, norm_first=pre_norm)
    theirs = nn.TransformerEncoder(layer, 2, nn.LayerNorm(E), enable_nested_tensor=False)
    state = ours.state_dict()
    theirs.load_state_dict({name: state[name] for name in theirs.state_dict()}, strict=True)
    ids = draw(3, 7)
    mask = torch.tensor([[1] * 7, [1] * 3 + [0] * 4, [0, 1, 0, 1, 1, 1, 0]])
    expected = theirs(ours.embedding.tokens(ids), src_key_padding_mask=mask == 0)
    torch.testing.assert_close(ours(ids, mask).last_hidden_state, expected, **TOLERANCE)


# ---- masks, causality, labels ------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_padded_rows_equal_rows_alone(kind: str, side: str) -> None:
    network = model(kind, positions="none" if side == "left" else "learned")
    ids, lengths = draw(3, 6), [6, 3, 1]
    mask = torch.zeros(3, 6, dtype=torch.int64)
    real = [slice(0, n) if side == "right" else slice(6 - n, 6) for n in lengths]
    for r, where in enumerate(real):
        mask[r, where] = 1
    together = network(ids, mask).last_hidden_state
    assert together.isfinite().all()
    for r, where in enumerate(real):
        alone = network(ids[r : r + 1, where]).last_hidden_state[0]
        torch.testing.assert_close(together[r, where], alone, **TOLERANCE)


@pytest.mark.parametrize("side", ["right", "left", "middle"])
def test_padded_sources_equal_sources_alone(side: str) -> None:
    network = model("seq2seq", positions="none")
    source, target = draw(2, 6), draw(2, 4, seed=1)
    kept = {"right": [0, 1, 2], "left": [3, 4, 5], "middle": [0, 2, 5]}[side]
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[1] = torch.isin(torch.arange(6), torch.tensor(kept))
    together = network(source, mask, decoder_input_ids=target).logits
    alone = network(source[1:, kept], decoder_input_ids=target[1:]).logits
    torch.testing.assert_close(together[1:], alone, **TOLERANCE)


def test_what_is_padded_does_not_matter() -> None:
    network = model("seq2seq")
    source, target = draw(2, 6), draw(2, 4, seed=1)
    mask = torch.tensor([[1] * 6, [1, 1, 0, 0, 0, 0]])
    other = source.clone()
    other[1, 2:] = draw(4, seed=9)
    outputs = [network(ids, mask, decoder_input_ids=target).logits for ids in (source, other)]
    assert torch.equal(*outputs)


@pytest.mark.parametrize("kind", ["decoder", "seq2seq"])
def test_no_token_changes_what_comes_before_it(kind: str) -> None:
    network = model(kind)

    def logits(ids: Tensor) -> Tensor:
        if kind == "decoder":
            return network(ids).logits
        return network(draw(1, 5, seed=3), decoder_input_ids=ids).logits

    ids = draw(1, 8)
    before = logits(ids)
    for t in range(8):
        changed = ids.clone()
        changed[0, t] = (ids[0, t] + 1) % V
        after = logits(changed)
        assert torch.equal(after[:, :t], before[:, :t])
        assert not torch.allclose(after[:, t], before[:, t])


def test_an_encoder_sees_both_ways() -> None:
    network = model("encoder")
    ids = draw(1, 6)
    changed = ids.clone()
    changed[0, 5] = (ids[0, 5] + 1) % V
    first = [network(row).last_hidden_state[:, 0] for row in (ids, changed)]
    assert not torch.allclose(*first)


def test_language_model_loss_is_that_of_the_next_token() -> None:
    network = model("decoder")
    ids = draw(2, 6)
    labels = ids.clone()
    labels[0, :3], labels[1, 5] = -100, -100
    out = network(ids, labels=labels)
    log_probs = torch.log_softmax(out.logits, -1)
    terms = [
        -log_probs[r, t, labels[r, t + 1]]
        for r in range(2)
        for t in range(5)
        if labels[r, t + 1] != -100
    ]
    assert len(terms) == 3 + 4
    torch.testing.assert_close(out.loss, torch.stack(terms).mean(), **TOLERANCE)


def test_labels_alone_make_the_decoder_inputs() -> None:
    network = model("seq2seq")
    source = draw(2, 5)
    labels = torch.tensor([[4, 5, 6, 7], [8, 9, -100, -100]])
    shifted = torch.tensor([[1, 4, 5, 6], [1, 8, 9, 0]])
    assert torch.equal(network.shift_right(labels), shifted)
    assert torch.equal(labels, torch.tensor([[4, 5, 6, 7], [8, 9, -100, -100]]))
    out = network(source, labels=labels)
    explicit = network(source, decoder_input_ids=shifted)
    assert explicit.loss is None
    assert torch.equal(out.logits, explicit.logits)
    expected = F.cross_entropy(out.logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
    torch.testing.assert_close(out.loss, expected, **TOLERANCE)


@pytest.mark.parametrize("kind", LAYERS)
def test_empty_batches_and_int32_ids(kind: str) -> None:
    network = model(kind)
    more = {"decoder_input_ids": draw(0, 3)} if kind == "seq2seq" else {}
    assert network(draw(0, 4), **more).last_hidden_state.shape[0] == 0
    more = {"decoder_input_ids": draw(2, 3).int()} if kind == "seq2seq" else {}
    out = network(draw(2, 4).int(), **more).last_hidden_state
    more = {name: ids.long() for name, ids in more.items()}
    assert torch.equal(out, network(draw(2, 4), **more).last_hidden_state)


def test_stacks_share_one_embedding_and_the_head_follows_tying() -> None:
    tied, untied = model("seq2seq"), model("seq2seq", tie_embeddings=False)
    for network in (tied, untied):
        assert network.encoder.embedding.tokens is network.decoder.embedding.tokens
    assert tied.decoder.lm_head.weight is tied.encoder.embedding.tokens.weight
    assert untied.decoder.lm_head.weight is not untied.encoder.embedding.tokens.weight
    copied = copy.deepcopy(tied)
    assert copied.decoder.lm_head.weight is copied.encoder.embedding.tokens.weight


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("tied", [True, False])
def test_every_kind_survives_its_folder(kind: str, tied: bool, tmp_path: Path) -> None:
    network = model(kind, tie_embeddings=tied, eos_token_id=(2, 3), positions="sinusoidal")
    tilewise.Model(network).save(tmp_path)
    again = tilewise.load(tmp_path)
    assert again.config == network.config
    assert fingerprint(again.network) == fingerprint(network)
    assert not again.training and not again.network.training


def test_folder_of_ours_that_does_not_fit(tmp_path: Path) -> None:
    tilewise.Model(model("seq2seq")).save(tmp_path)
    good = json.loads((tmp_path / "config.json").read_text())
    for changes, error, match in (
        ({"ffn_size": 25}, CheckpointError, r"encoder.layers.0.linear1.weight.*\[24, 16\]"),
        ({"decoder_layers": 3}, CheckpointError, "decoder.layers.2"),
        ({"positions": "sinusoidal"}, CheckpointError, "encoder.embedding.positions.weight"),
        ({"eos_token_id": 2}, ConfigError, "eos_token_id is 2; it must be a list"),
        ({"num_heads": None}, ConfigError, "num_heads is None"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(good | changes))
        with pytest.raises(error, match=match):
            tilewise.load(tmp_path)
    del good["num_heads"]
    (tmp_path / "config.json").write_text(json.dumps(good))
    with pytest.raises(ConfigError, match="lacks num_heads"):
        tilewise.load(tmp_path)


def test_layer_numbers_divide_the_scale() -> None:
    network = model("decoder", attention_scale_by_layer=True)
    scales = [layer.self_attn.scale for layer in network.layers]
    assert scales == pytest.approx([(E // HEADS) ** -0.5, (E // HEADS) ** -0.5 / 2])
    assert model("decoder", attention_scale=0.3).layers[1].self_attn.scale == 0.3


@pytest.mark.parametrize("kind", ["decoder", "seq2seq"])
def test_compiled_model_equals_eager(kind: str) -> None:
    network = model(kind).eval()
    torch._dynamo.reset()
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    more = {"decoder_input_ids": draw(2, 4)} if kind == "seq2seq" else {}
    expected = network(draw(2, 5), mask, **more).logits
    real = mask.bool() if kind == "decoder" else torch.ones(2, 4, dtype=torch.bool)
    got = compiled(draw(2, 5), mask, **more).logits
    torch.testing.assert_close(got[real], expected[real], **TOLERANCE)


def test_initial_scale_is_sane() -> None:
    """A fresh model predicts close to uniformly, whatever its family."""
    torch.manual_seed(0)
    for kind in ("decoder", "seq2seq"):
        c = VALUES | LAYERS[kind] | {"vocab_size": 500, "hidden_size": 64}
        network = tilewise.build(ModelConfig(**c))
        more = {"decoder_input_ids": draw(4, 10)} if kind == "seq2seq" else {}
        logits = network(draw(4, 10), **more).logits
        assert logits.std() < 2
        assert all(p.isfinite().all() for p in network.parameters())


# ---- configuration -----------------------------------------------------------------------------

BAD_CONFIGS = [
    ({"vocab_size": 0}, "vocab_size is 0"),
    ({"vocab_size": True}, "vocab_size is True"),
    ({"vocab_size": 2**31}, "vocab_size is 2147483648"),
    ({"hidden_size": -16}, "hidden_size is -16"),
    ({"hidden_size": 16.0}, "hidden_size is 16.0"),
    ({"hidden_size": "16"}, "hidden_size is '16'"),
    ({"num_heads": 0}, "num_heads is 0"),
    ({"num_heads": 3}, "hidden_size 16 does not divide into 3 heads"),
    ({"num_kv_heads": 0}, "num_kv_heads is 0"),
    ({"num_kv_heads": 8}, "num_kv_heads is 8"),
    ({"num_kv_heads": 3}, "num_heads 4 is no multiple of num_kv_heads 3"),
    ({"ffn_size": None}, "ffn_size is None"),
    ({"max_positions": 0}, "max_positions is 0"),
    ({"decoder_layers": -1}, "decoder_layers is -1"),
    ({"encoder_layers": 1_001}, "encoder_layers is 1001"),
    ({"decoder_layers": 0}, "encoder_layers and decoder_layers are both 0"),
    ({"activation": "tanh"}, "activation is 'tanh'"),
    ({"activation": ["relu"]}, "activation is \\['relu'\\]"),
    ({"norm_position": "mid"}, "norm_position is 'mid'"),
    ({"positions": None}, "positions is None"),
    ({"norm_eps": float("nan")}, "norm_eps is nan"),
    ({"norm_eps": -1e-5}, "norm_eps is -1e-05"),
    ({"norm_eps": 10**400}, "norm_eps is 1000"),
    ({"dropout": 1.5}, "dropout is 1.5"),
    ({"dropout": float("inf")}, "dropout is inf"),
    ({"dropout": False}, "dropout is False"),
    ({"attention_scale": "1"}, "attention_scale is '1'"),
    ({"attention_scale": float("nan")}, "attention_scale is nan"),
    ({"tie_embeddings": "yes"}, "tie_embeddings is 'yes'"),
    ({"final_norm": 1}, "final_norm is 1"),
    ({"scale_embedding": None}, "scale_embedding is None"),
    ({"attention_scale_by_layer": "no"}, "attention_scale_by_layer is 'no'"),
    ({"pad_token_id": -1}, "pad_token_id is -1"),
    ({"bos_token_id": V}, "bos_token_id is 13"),
    ({"decoder_start_token_id": 1.0}, "decoder_start_token_id is 1.0"),
    ({"eos_token_id": 3}, "eos_token_id is 3; it must be a tuple"),
    ({"hidden_size": 2**30, "vocab_size": 2**31 - 1}, "no memory holds"),
    ({"eos_token_id": (V,)}, "eos_token_id is 13"),
    ({"eos_token_id": (True,)}, "eos_token_id is True"),
]


@pytest.mark.parametrize(("changes", "match"), BAD_CONFIGS)
def test_bad_configurations_are_named(changes: dict, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        ModelConfig(**(VALUES | {"decoder_layers": 1} | changes))


def test_configuration_survives_its_dict() -> None:
    c = ModelConfig(**VALUES, decoder_layers=1, eos_token_id=(2, 3))
    assert ModelConfig(**c.to_dict()) == c
    with pytest.raises(dataclasses.FrozenInstanceError):
        c.dropout = 0.5  # type: ignore[misc]


def test_special_ids_beyond_the_vocabulary_are_left_out_aloud() -> None:
    assert usable_ids("eos_token_id", None, 10) == ()
    assert usable_ids("eos_token_id", [3, 3, 4], 10) == (3, 4)
    with pytest.warns(UserWarning, match=r"eos_token_id \[50256\] is left out"):
        assert usable_ids("eos_token_id", [3, 50256], 10) == (3,)
    for value in (-1, 1.5, "a", [None], True, {"a": 1}):
        with pytest.raises(ConfigError, match="eos_token_id"):
            usable_ids("eos_token_id", value, 10)


def test_only_a_configuration_can_be_built() -> None:
    for config in (None, VALUES):
        with pytest.raises(ConfigError, match="pass a tilewise.ModelConfig"):
            tilewise.build(config)  # type: ignore[arg-type]


def test_stacks_that_are_absent_cannot_be_built() -> None:
    both = ModelConfig(**VALUES, encoder_layers=1, decoder_layers=1)
    only = ModelConfig(**VALUES, decoder_layers=1)
    for kind, c in ((Encoder, only), (Seq2Seq, only)):
        with pytest.raises(ConfigError, match="encoder_layers is 0"):
            kind(c)
    with pytest.raises(ConfigError, match="decoder_layers is 0"):
        Decoder(dataclasses.replace(both, decoder_layers=0))


# ---- bad input ---------------------------------------------------------------------------------

IDS = draw(2, 4)
BAD_IDS = [
    ([[1, 2]], "is list"),
    (None, "is NoneType"),
    (IDS.float(), "is torch.float32"),
    (IDS.bool(), "is torch.bool"),
    (IDS[0], r"has shape \[4\]"),
    (IDS[None], r"has shape \[1, 2, 4\]"),
    (torch.tensor(3), r"has shape \[\]"),
    (IDS - 10, "holds the id -"),
    (IDS.masked_fill(IDS == IDS[1, 2], V), "holds the id 13"),
    (IDS.masked_fill(IDS == IDS[1, 2], 2**40), "holds the id 1099511627776"),
    (draw(2, LENGTH + 1), "is 13 tokens long; the model has 12 positions"),
]


def refused(network: nn.Module, match: str, *args: object, **kwargs: object) -> None:
    """ArgumentError before the first layer runs, the model unchanged."""
    before, ran = fingerprint(network), []
    stacks: list[Callable] = [m for m in network.modules() if hasattr(m, "self_attn")]
    hooks = [m.register_forward_pre_hook(lambda *_: ran.append(1)) for m in stacks]
    try:
        with pytest.raises(ArgumentError, match=match):
            network(*args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    assert not ran
    assert fingerprint(network) == before


@pytest.mark.parametrize(("ids", "match"), BAD_IDS)
@pytest.mark.parametrize("kind", LAYERS)
def test_bad_ids_are_named(kind: str, ids: object, match: str) -> None:
    more = {"decoder_input_ids": IDS} if kind == "seq2seq" else {}
    refused(model(kind), f"input_ids {match}", ids, **more)


@pytest.mark.parametrize(("ids", "match"), [case for case in BAD_IDS if case[0] is not None])
def test_bad_decoder_ids_are_named(ids: object, match: str) -> None:
    refused(model("seq2seq"), f"decoder_input_ids {match}", IDS, decoder_input_ids=ids)


BAD_LABELS = [
    ([[1, 2]], "labels is list"),
    (torch.tensor(3), r"labels has shape \[\]"),
    (IDS.float(), "labels is torch.float32"),
    (IDS[:, :3], r"labels have shape \[2, 3\]; pass \[2, 4\]"),
    (IDS[:1], r"labels have shape \[1, 4\]"),
    (IDS[0], r"labels has shape \[4\]"),
    (IDS.masked_fill(IDS == IDS[0, 0], -1), "labels holds the id -1"),
    (IDS.masked_fill(IDS == IDS[0, 0], V), "labels holds the id 13"),
]


@pytest.mark.parametrize(("labels", "match"), BAD_LABELS)
def test_bad_labels_are_named(labels: object, match: str) -> None:
    refused(model("decoder"), match, IDS, labels=labels)
    refused(model("seq2seq"), match, IDS, decoder_input_ids=IDS, labels=labels)


BAD_MASKS = [
    (torch.ones(2, 5), r"attention_mask has shape \[2, 5\]; pass \[2, 4\]"),
    (torch.ones(4), r"attention_mask has shape \[4\]"),
    (torch.ones(2, 1, 4), r"attention_mask has shape \[2, 1, 4\]"),
    ([[1, 1, 1, 1]] * 2, "attention_mask is list"),
    (torch.ones(2, 4, device="meta"), "attention_mask is on meta"),
]


@pytest.mark.parametrize(("mask", "match"), BAD_MASKS)
@pytest.mark.parametrize("kind", LAYERS)
def test_bad_masks_are_named(kind: str, mask: object, match: str) -> None:
    more = {"decoder_input_ids": IDS} if kind == "seq2seq" else {}
    refused(model(kind), match, IDS, mask, **more)


def test_arguments_of_other_models_are_named() -> None:
    for kind in LAYERS:
        refused(model(kind), "token_type_ids was given", IDS, token_type_ids=IDS)
    for kind in ("encoder", "decoder"):
        refused(model(kind), "decoder_input_ids was given", IDS, decoder_input_ids=IDS)
    refused(model("encoder"), "labels was given", IDS, labels=IDS)
    refused(model("seq2seq"), "neither decoder_input_ids nor labels", IDS)
    refused(model("seq2seq"), "2 rows and decoder_input_ids 1", IDS, decoder_input_ids=IDS[:1])


def test_labels_need_a_start_token() -> None:
    network = model("seq2seq", decoder_start_token_id=None)
    with pytest.raises(ConfigError, match="decoder_start_token_id is not set"):
        network(IDS, labels=IDS)


def test_a_decoder_with_cross_attention_does_not_run_without_memory() -> None:
    network = model("seq2seq")
    with pytest.raises(ArgumentError, match="memory is not given"):
        network.decoder(IDS)
