"""What generation refuses, before any work, and how it fails when the model gives no numbers."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

import tilewise
from tilewise.config import ModelConfig
from tilewise.errors import ArgumentError, GenerationError
from tilewise.generation import generate

V, LENGTH, INF = 29, 40, float("inf")
KINDS = ["decoder", "seq2seq"]
SEARCHES = [{}, {"num_beams": 4}]  # greedy and beam


def build(kind: str, **changes: object):
    values: dict = {
        "model_type": "tilewise-transformer",
        "vocab_size": V,
        "hidden_size": 16,
        "num_heads": 2,
        "ffn_size": 24,
        "encoder_layers": int(kind == "seq2seq"),
        "decoder_layers": 2,
        "max_positions": LENGTH,
        "bos_token_id": 1,
        "decoder_start_token_id": 1,
        "eos_token_id": (2, 3),
        "dropout": 0.3,
    }
    torch.manual_seed(0)
    return tilewise.build(ModelConfig(**(values | changes))).eval()


@pytest.fixture(scope="module")
def models() -> dict[str, nn.Module]:
    return {kind: build(kind) for kind in KINDS}


# ---- bad input ---------------------------------------------------------------------------------

BAD_OPTIONS: list[tuple[dict, str]] = [
    ({"num_beams": 0}, "num_beams is 0; pass a whole number from 1 to 29"),
    ({"num_beams": -1}, "num_beams is -1"),
    ({"num_beams": V + 1}, "num_beams is 30"),
    ({"num_beams": 10**6}, "num_beams is 1000000"),
    ({"num_beams": True}, "num_beams is True"),
    ({"num_beams": 2.0}, "num_beams is 2.0"),
    ({"num_beams": "2"}, "num_beams is '2'"),
    ({"num_beams": 2, "num_return_sequences": 3}, "num_return_sequences is 3"),
    ({"num_return_sequences": 2}, "num_return_sequences is 2; pass a whole number from 1 to 1"),
    ({"num_return_sequences": 0}, "num_return_sequences is 0"),
    ({"max_new_tokens": 0}, "max_new_tokens is 0"),
    ({"max_new_tokens": -1}, "max_new_tokens is -1"),
    ({"max_new_tokens": 10**9}, "max_new_tokens is 1000000000, but the model has 40 positions"),
    ({"max_new_tokens": 2**40}, "max_new_tokens is 1099511627776"),
    ({"max_new_tokens": 3.0}, "max_new_tokens is 3.0"),
    ({"max_length": 0}, "max_length is 0"),
    ({"max_length": 1}, "max_length is 1, but the prompt alone has"),
    ({"max_length": 10**6}, "positions"),
    ({"min_new_tokens": -1}, "min_new_tokens is -1"),
    ({"min_new_tokens": 5, "max_new_tokens": 4}, "min_new_tokens is 5 and max_new_tokens 4"),
    ({"length_penalty": float("nan")}, "length_penalty is nan"),
    ({"length_penalty": INF}, "length_penalty is inf"),
    ({"length_penalty": 10**400}, "length_penalty is 1000"),
    ({"length_penalty": 1e4}, "length_penalty is 10000.0"),
    ({"length_penalty": "1"}, "length_penalty is '1'"),
    ({"length_penalty": True}, "length_penalty is True"),
    ({"repetition_penalty": 0}, "repetition_penalty is 0"),
    ({"repetition_penalty": -1.0}, "repetition_penalty is -1.0"),
    ({"repetition_penalty": float("nan")}, "repetition_penalty is nan"),
    ({"early_stopping": "maybe"}, "early_stopping is 'maybe'"),
    ({"early_stopping": 1}, "early_stopping is 1"),
    ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size is -1"),
    ({"no_repeat_ngram_size": 1.5}, "no_repeat_ngram_size is 1.5"),
    ({"eos_token_id": V}, "eos_token_id is 29"),
    ({"eos_token_id": [2, -1]}, "eos_token_id is -1"),
    ({"eos_token_id": [2, 2]}, "name each id once"),
    ({"eos_token_id": 1.5}, "eos_token_id is 1.5"),
    ({"eos_token_id": "</s>"}, "eos_token_id is '</s>'"),
    ({"eos_token_id": True}, "eos_token_id is True"),
    ({"pad_token_id": V}, "pad_token_id is 29"),
    ({"bos_token_id": -1}, "bos_token_id is -1"),
    ({"decoder_start_token_id": V}, "decoder_start_token_id is 29"),
    ({"forced_bos_token_id": 2**31}, "forced_bos_token_id is 2147483648"),
    ({"forced_eos_token_id": [2]}, "forced_eos_token_id is \\[2\\]"),
    ({"use_cache": "yes"}, "use_cache is 'yes'"),
    ({"dialect": "klingon"}, "dialect is 'klingon'"),
    ({"num_beam": 4}, "generate takes no num_beam"),
    ({"num_beam": None}, "generate takes no num_beam"),
]


@contextmanager
def untouched(network: nn.Module) -> Iterator[None]:
    """Nothing ran, no random number was drawn, no training flag changed."""
    torch.manual_seed(13)
    state = torch.get_rng_state()
    flags = [module.training for module in network.modules()]
    ran: list[nn.Module] = []
    hook = register_module_forward_pre_hook(lambda module, _: ran.append(module))
    try:
        yield
    finally:
        hook.remove()
    assert not ran
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in network.modules()] == flags


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("options", "match"), BAD_OPTIONS)
def test_bad_options_are_named_before_any_work(
    models, kind: str, options: dict, match: str
) -> None:
    with untouched(models[kind]), pytest.raises(ArgumentError, match=match):
        generate(models[kind], [[4, 5], [6]], **options)


def test_bad_defaults_of_a_folder_are_named(models) -> None:
    with pytest.raises(ArgumentError, match="num_beams is 'four'"):
        generate(models["decoder"], [[4]], defaults={"num_beams": "four"})


IDS = torch.tensor([[4, 5], [6, 7]])
BAD_PROMPTS: list[tuple[object, str]] = [
    (IDS.float(), "input_ids is torch.float32"),
    (IDS.bool(), "input_ids is torch.bool"),
    (IDS[0], r"input_ids has shape \[2\]"),
    (torch.tensor(3), r"input_ids has shape \[\]"),
    (IDS - 6, "holds the id -2"),
    (IDS + 22, "holds the id 29"),
    (IDS + 2**31, "holds the id 2147483655"),
    (torch.zeros(1, 41, dtype=torch.int64), "41 tokens long"),
    ([[4], [-1]], r"input_ids\[1\] holds the id -1"),
    ([[4, V]], r"input_ids\[0\] holds the id 29"),
    ([[2**31]], "holds the id 2147483648"),
    ([[1.0]], r"input_ids\[0\] holds 1.0"),
    ([[True]], "holds True"),
    ([["4"]], "holds '4'"),
    ([[None]], "holds None"),
    ([[4], 5], r"input_ids\[1\] is int"),
    ([4, 5], r"input_ids\[0\] is int"),
    (["hello"], r"input_ids\[0\] is str"),
    ("hello", "input_ids is str"),
    (None, "input_ids is NoneType"),
    (5, "input_ids is int"),
    ({"input_ids": [[4]]}, "input_ids is dict"),
    (torch.ones(1, 2, dtype=torch.int64).to_sparse(), "input_ids is sparse"),
    ([[4] * 41], "41 tokens long"),
    ([[4] * 400], "400 tokens long"),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize(("inputs", "match"), BAD_PROMPTS)
def test_bad_prompts_are_named_before_any_work(
    models, kind: str, search: dict, inputs: object, match: str
) -> None:
    with untouched(models[kind]), pytest.raises(ArgumentError, match=match):
        generate(models[kind], inputs, **search)


def test_a_prompt_that_fills_the_context_leaves_no_room(models) -> None:
    with untouched(models["decoder"]), pytest.raises(ArgumentError, match="prompt has 40 tokens"):
        generate(models["decoder"], [[4] * LENGTH])


def test_bad_masks_are_named(models) -> None:
    for mask, match in (
        (torch.ones(2, 3), r"attention_mask has shape \[2, 3\]; pass \[2, 2\]"),
        (torch.ones(2), r"attention_mask has shape \[2\]"),
        ([[1, 1], [1, 1]], "attention_mask is list"),
        (torch.ones(2, 2).to_sparse(), "attention_mask is sparse"),
    ):
        with untouched(models["decoder"]), pytest.raises(ArgumentError, match=match):
            generate(models["decoder"], IDS, attention_mask=mask)
    with untouched(models["decoder"]), pytest.raises(ArgumentError, match="lists of ids"):
        generate(models["decoder"], [[4]], attention_mask=torch.ones(1, 1))


def test_models_that_do_not_generate(models) -> None:
    encoder = tilewise.build(
        ModelConfig(
            model_type="tilewise-transformer",
            vocab_size=V,
            hidden_size=8,
            num_heads=2,
            ffn_size=8,
            encoder_layers=1,
            max_positions=9,
        )
    )
    with pytest.raises(ArgumentError, match="Encoder does not generate"):
        generate(encoder, [[4]])
    with pytest.raises(ArgumentError, match="memory is not given"):
        generate(models["seq2seq"].decoder, [[4]])
    silent = build("seq2seq", decoder_start_token_id=None, bos_token_id=None)
    with untouched(silent), pytest.raises(ArgumentError, match="decoder_start_token_id"):
        generate(silent, [[4]])
    assert int(generate(silent, [[4]], decoder_start_token_id=5).sequences[0, 0]) == 5


# ---- models that give no numbers ----------------------------------------------------------------


@contextmanager
def broken(network: nn.Module, step: int, change: Callable[[Tensor], None]) -> Iterator[None]:
    """The logits of one step changed in place."""
    calls = [0]

    def hook(_: nn.Module, __: object, logits: Tensor) -> Tensor:
        if calls[0] == step:
            logits = logits.clone()
            change(logits)
        calls[0] += 1
        return logits

    handle = getattr(network, "decoder", network).lm_head.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("step", [0, 2])
@pytest.mark.parametrize("bad", ["one nan", "all -inf", "one +inf", "all nan"])
def test_broken_logits_are_an_error_that_names_step_and_row(
    models, kind: str, beams: int, step: int, bad: str
) -> None:
    network = copy.deepcopy(models[kind]).train()
    getattr(network, "decoder", network).layers[0].eval()
    flags = [module.training for module in network.modules()]

    def change(logits: Tensor) -> None:
        first = 1 if step == 0 else beams  # the rows of sentence 1
        rows = slice(first, first + (1 if step == 0 else beams))
        value = {"n": torch.nan, "f": INF if "+" in bad else -INF}[bad[-1]]
        columns = slice(7, 8) if bad.startswith("one") else slice(None)
        logits[rows, columns] = value

    state = torch.get_rng_state()
    with broken(network, step, change):
        with pytest.raises(GenerationError, match=rf"step {step} for rows \[1\]"):
            generate(network, [[4, 5], [6], [7, 8, 9]], num_beams=beams, eos_token_id=())
    assert [module.training for module in network.modules()] == flags
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("beams", [1, 3])
def test_some_tokens_of_minus_infinity_are_merely_banned(models, beams: int) -> None:
    def change(logits: Tensor) -> None:
        logits[:, :10] = -INF

    with broken(models["decoder"], 1, change):
        out = generate(
            models["decoder"], [[4], [5]], num_beams=beams, max_new_tokens=4, eos_token_id=()
        )
    assert (out.sequences[out.lengths > 2, 2] >= 10).all()
    assert out.sequences_scores.isfinite().all()
