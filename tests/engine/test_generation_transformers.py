"""Beam and greedy search against transformers' own generate, on random tiny models.

Every case draws a model, prompts and options; token ids must be equal up to the first end token
and sequence scores within 1e-5 relative.
"""

import random

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, MarianConfig, MarianMTModel

import tilewise
from tilewise.config import ModelConfig

DECODER_CASES, SEQ2SEQ_CASES = 84, 40
ended_by_eos: list[bool] = []


def draw_options(rng: random.Random, ours: tilewise.Model, prompts: list[list[int]]) -> dict:
    """Random options; most end tokens are ones that this model is known to generate."""
    beams = rng.choice([1, 2, 3, 4, 5, 6])
    pilot = ours.generate(prompts, max_new_tokens=10, num_beams=3, eos_token_id=())
    likely = sorted({int(t) for t in pilot.sequences[:, -6:].flatten()} - {0, 1})
    others = [t for t in range(2, ours.config.vocab_size) if t not in likely]
    eos = rng.sample(likely, min(len(likely), rng.choice([1, 1, 2])))
    eos += rng.sample(others, rng.choice([0, 1]) if eos else 1)
    new = rng.randint(3, 12)
    return {
        "num_beams": beams,
        "num_return_sequences": rng.randint(1, beams),
        "max_new_tokens": new,
        "min_new_tokens": rng.choice([0, 0, 0, 2]),
        "eos_token_id": eos,
        "pad_token_id": 0,
        "no_repeat_ngram_size": rng.choice([0, 0, 0, 2]),
        "repetition_penalty": rng.choice([1.0, 1.0, 1.3]),
        **(
            {
                "length_penalty": rng.choice([0.0, 0.6, 1.0, 2.0, -0.5]),
                "early_stopping": rng.choice([True, False, "never"]),
            }
            if beams > 1
            else {}
        ),
    }


def until_eos(row: list[int], eos: list[int]) -> list[int]:
    for i, token in enumerate(row):
        if token in eos:
            return row[: i + 1]
    return row


def compare(ours, theirs, skips: list[int], ours_skips: list[int], options: dict) -> None:
    """skips, ours_skips: where the generated part of each of their and our rows begins."""
    eos = options["eos_token_id"]
    for i, (skip, mine) in enumerate(zip(skips, ours_skips, strict=True)):
        expected = until_eos(theirs.sequences[i, skip:].tolist(), eos)
        got = ours.sequences[i, mine : int(ours.lengths[i])].tolist()
        if expected[-1] not in eos:  # transformers fills up with end tokens, ours knows the length
            assert len(got) <= len(expected)
            expected = expected[: len(got)]
        assert got == expected, f"row {i}: {got} instead of {expected}"
        ended_by_eos.append(got[-1] in eos)
    if options["num_beams"] > 1:
        torch.testing.assert_close(
            ours.sequences_scores, theirs.sequences_scores, rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("seed", range(DECODER_CASES))
def test_decoder_equals_transformers(seed: int, tmp_path) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    vocab = rng.randint(17, 97)
    heads = rng.choice([2, 4])
    theirs = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=vocab,
            n_embd=8 * heads,
            n_head=heads,
            n_layer=rng.choice([1, 2]),
            n_positions=40,
            initializer_range=rng.uniform(0.2, 0.6),
            bos_token_id=1,
            eos_token_id=2,
        )
    ).eval()
    theirs.save_pretrained(tmp_path)
    ours = tilewise.load(tmp_path)
    prompts = [
        [rng.randrange(3, vocab) for _ in range(rng.randint(1, 8))]
        for _ in range(rng.randint(1, 4))
    ]
    options = draw_options(rng, ours, prompts)
    if options["no_repeat_ngram_size"] or options["repetition_penalty"] != 1.0:
        # transformers lets these rules see the padding on the left; equal lengths have none
        prompts = [prompts[0]] * len(prompts)
    longest = max(map(len, prompts))
    padded = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    expected = theirs.generate(
        padded,
        attention_mask=mask,
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
        **options,
    )
    got = ours.generate(prompts, **options)
    each = options["num_return_sequences"]
    mine = [len(p) for p in prompts for _ in range(each)]
    compare(got, expected, [longest] * len(mine), mine, options)


def marian_as_ours(theirs: MarianMTModel) -> tilewise.Model:
    """The same weights in our Seq2Seq, with Marian's sinusoid table in place of ours."""
    c = theirs.config
    model = tilewise.build(
        ModelConfig(
            model_type="tilewise-transformer",
            vocab_size=c.vocab_size,
            hidden_size=c.d_model,
            num_heads=c.encoder_attention_heads,
            ffn_size=c.encoder_ffn_dim,
            encoder_layers=c.encoder_layers,
            decoder_layers=c.decoder_layers,
            max_positions=c.max_position_embeddings,
            activation="relu",
            norm_position="post",
            final_norm=False,
            positions="sinusoidal",
            scale_embedding=True,
            decoder_start_token_id=c.decoder_start_token_id,
        )
    ).eval()
    state, own = theirs.state_dict(), model.state_dict()
    own["encoder.embedding.tokens.weight"].copy_(state["model.shared.weight"])
    for stack in ("encoder", "decoder"):
        table = state[f"model.{stack}.embed_positions.weight"]
        getattr(model, stack).embedding.table.copy_(table)
        for i in range(c.encoder_layers):
            their, our = f"model.{stack}.layers.{i}.", f"{stack}.layers.{i}."
            blocks = [("self_attn", "self_attn")]
            norms = [("self_attn_layer_norm", "norm1"), ("final_layer_norm", "norm2")]
            if stack == "decoder":
                blocks.append(("encoder_attn", "multihead_attn"))
                norms[1:] = [("encoder_attn_layer_norm", "norm2"), ("final_layer_norm", "norm3")]
            for theirs_name, ours_name in blocks:
                for kind in ("weight", "bias"):
                    parts = [state[f"{their}{theirs_name}.{p}_proj.{kind}"] for p in "qkv"]
                    own[f"{our}{ours_name}.in_proj_{kind}"].copy_(torch.cat(parts))
                    own[f"{our}{ours_name}.out_proj.{kind}"].copy_(
                        state[f"{their}{theirs_name}.out_proj.{kind}"]
                    )
            for theirs_name, ours_name in [*norms, ("fc1", "linear1"), ("fc2", "linear2")]:
                for kind in ("weight", "bias"):
                    own[f"{our}{ours_name}.{kind}"].copy_(state[f"{their}{theirs_name}.{kind}"])
    return tilewise.Model(model)


@pytest.mark.parametrize("seed", range(SEQ2SEQ_CASES))
def test_seq2seq_equals_transformers(seed: int) -> None:
    rng = random.Random(1000 + seed)
    torch.manual_seed(1000 + seed)
    vocab, heads = rng.randint(17, 97), rng.choice([2, 4])
    size = 8 * heads
    theirs = MarianMTModel(
        MarianConfig(
            vocab_size=vocab,
            d_model=size,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=heads,
            decoder_attention_heads=heads,
            encoder_ffn_dim=2 * size,
            decoder_ffn_dim=2 * size,
            max_position_embeddings=40,
            activation_function="relu",
            scale_embedding=True,
            init_std=rng.uniform(0.2, 0.6),
            decoder_start_token_id=0,
            pad_token_id=0,
            eos_token_id=1,
            forced_eos_token_id=None,
            tie_word_embeddings=True,
        )
    ).eval()
    theirs.generation_config.forced_eos_token_id = None
    theirs.generation_config.bad_words_ids = None
    ours = marian_as_ours(theirs)
    sources = [
        [rng.randrange(3, vocab) for _ in range(rng.randint(1, 9))]
        for _ in range(rng.randint(1, 4))
    ]
    options = draw_options(rng, ours, sources)
    longest = max(map(len, sources))
    padded = torch.tensor([s + [0] * (longest - len(s)) for s in sources])
    mask = torch.tensor([[1] * len(s) + [0] * (longest - len(s)) for s in sources])
    expected = theirs.generate(
        padded,
        attention_mask=mask,
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
        **options,
    )
    got = ours.generate(sources, **options)
    rows = len(sources) * options["num_return_sequences"]
    compare(got, expected, [1] * rows, [1] * rows, options)


def test_enough_cases_end_by_eos(capsys: pytest.CaptureFixture[str]) -> None:
    """Runs after the cases above: the parity means little if nothing ever ends early."""
    if not ended_by_eos:
        pytest.fail("run the whole file: this check counts what the cases above saw")
    share = sum(ended_by_eos) / len(ended_by_eos)
    with capsys.disabled():
        print(f"\n{len(ended_by_eos)} sequences compared, {share:.0%} ended by an end token")
    assert share >= 0.3
