"""Training parts, the training example, and the model it made that ships in the package."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tilewise
from tilewise.data.batches import seq2seq_batches
from tilewise.data.dates import held_out_pairs
from tilewise.training import inverse_square_root

ROOT = Path(__file__).resolve().parents[2]


def test_inverse_square_root_schedule_is_the_closed_form() -> None:
    size, warmup = 512, 4000
    assert inverse_square_root(1, size, warmup) == pytest.approx(512**-0.5 * 4000**-1.5)
    assert inverse_square_root(warmup, size, warmup) == pytest.approx((512 * 4000) ** -0.5)
    assert inverse_square_root(4 * warmup, size, warmup) == pytest.approx((512 * 16000) ** -0.5)
    rising = [inverse_square_root(s, size, warmup) for s in range(1, warmup + 1)]
    assert rising == sorted(rising)


def test_batches_hold_every_pair_once_and_repeat_with_their_seed() -> None:
    pairs = [([i] * (1 + i % 7), [i, i + 1]) for i in range(1, 51)]
    first = list(seq2seq_batches(iter(pairs), 8, 0, seed=3, pool=2))
    again = list(seq2seq_batches(iter(pairs), 8, 0, seed=3, pool=2))
    seen = []
    for batch, same in zip(first, again, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(batch, same, strict=True))
        assert batch.source.shape == batch.source_mask.shape
        for source, mask, labels in zip(*batch, strict=True):
            real = source[mask.bool()].tolist()
            assert (source[~mask.bool()] == 0).all()
            seen.append((real, labels[labels != -100].tolist()))
    assert sorted(seen) == sorted(pairs)


def test_a_few_steps_lower_the_loss() -> None:
    torch.manual_seed(0)
    config = tilewise.ModelConfig(
        model_type="tilewise-transformer",
        vocab_size=20,
        hidden_size=32,
        num_heads=4,
        ffn_size=64,
        encoder_layers=1,
        decoder_layers=1,
        max_positions=16,
        norm_position="post",
        final_norm=False,
        positions="sinusoidal",
        scale_embedding=True,
        pad_token_id=0,
        decoder_start_token_id=1,
    )
    model = tilewise.build(config)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    ids = torch.randint(4, 20, (64, 6))  # the task: copy
    losses = []
    for _ in range(60):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_the_example_trains_and_saves(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "examples" / "train_dates.py")]
    sizes = ["--steps", "3", "--batch-size", "8", "--hidden", "16", "--layers", "1"]
    done = subprocess.run(
        [*command, *sizes, "--held-out", "5", "--out", str(tmp_path / "dates")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "exact match with beam 4" in done.stdout
    assert tilewise.load(tmp_path / "dates").config.hidden_size == 16


def test_the_embedded_model_translates_phrases_it_never_saw() -> None:
    model = tilewise.load("dates")
    pairs = sorted(held_out_pairs(1000, seed=1), key=lambda pair: len(pair.source))
    right = 0
    for start in range(0, len(pairs), 100):
        chunk = pairs[start : start + 100]
        out = model.generate([pair.source for pair in chunk], num_beams=4, max_new_tokens=32)
        right += sum(text == pair.target for text, pair in zip(out.texts, chunk, strict=True))
    assert right >= 980


def test_the_embedded_model_knows_its_closed_sets() -> None:
    phrases = ["Tuesday", "the day after tomorrow", "noon"]
    out = tilewise.load("dates").generate(phrases, num_beams=4, max_new_tokens=16)
    assert out.texts[0] == "火曜日" and out.texts[1] == "明後日" and out.texts[2] == "正午"
