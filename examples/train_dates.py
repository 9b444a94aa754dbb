"""Train the original Transformer on English -> Japanese dates, times and numbers.

    python examples/train_dates.py --out my_dates

Post-norm encoder and decoder, sinusoidal positions, one matrix for all embeddings, label
smoothing, warm-up and inverse square root decay (Vaswani et al. 2017), on pairs that the grammar
in tilewise.data.dates writes. Takes under ten minutes on two CPU cores; the last line is the share
of held-out phrases that beam search translates exactly.
"""

import argparse
import itertools
import time
from collections.abc import Iterator

import torch
from torch.nn import functional as F

import tilewise
from tilewise.data.batches import seq2seq_batches
from tilewise.data.dates import held_out_pairs, training_pairs
from tilewise.text import Tokenizer, train_tokenizer
from tilewise.training import inverse_square_root


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", default="my_dates", help="folder for the checkpoint")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch-size", type=int, default=192, help="pairs per step")
    parser.add_argument("--warmup", type=int, default=300, help="steps of rising learning rate")
    parser.add_argument("--rate", type=float, default=0.5, help="factor on the learning rate")
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2, help="of each stack")
    parser.add_argument("--vocab", type=int, default=480)
    parser.add_argument("--held-out", type=int, default=1000, help="phrases to test on")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def encoded(tokenizer: Tokenizer, seed: int) -> Iterator[tuple[list[int], list[int]]]:
    """Endless (source ids, target ids), encoded a thousand pairs at a time."""
    pairs = training_pairs(seed)
    while True:
        some = list(itertools.islice(pairs, 1000))
        sources = tokenizer.encode([pair.source for pair in some])
        targets = tokenizer.encode([pair.target for pair in some])
        yield from zip(sources, targets, strict=True)


def new_model(args: argparse.Namespace) -> tilewise.Model:
    sample = list(itertools.islice(training_pairs(args.seed + 1), 50_000))
    texts = [text for pair in sample for text in (pair.source, pair.target)]
    tokenizer = train_tokenizer(texts, args.vocab)
    config = tilewise.ModelConfig(
        model_type="tilewise-transformer",
        vocab_size=tokenizer.vocab_size,
        hidden_size=args.hidden,
        num_heads=4,
        ffn_size=4 * args.hidden,
        encoder_layers=args.layers,
        decoder_layers=args.layers,
        max_positions=128,
        norm_position="post",
        final_norm=False,
        positions="sinusoidal",
        scale_embedding=True,
        dropout=0.0,  # pairs never repeat, so there is nothing to overfit
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=(2,),
        decoder_start_token_id=1,
    )
    return tilewise.Model(tilewise.build(config), tokenizer)


def train(model: tilewise.Model, args: argparse.Namespace) -> None:
    assert model.tokenizer is not None
    optimizer = torch.optim.Adam(model.parameters(), betas=(0.9, 0.98), eps=1e-9)
    pairs = encoded(model.tokenizer, args.seed)
    batches = seq2seq_batches(pairs, args.batch_size, 0, args.seed)
    model.train()
    start = time.perf_counter()
    for step, batch in enumerate(itertools.islice(batches, args.steps), 1):
        rate = args.rate * inverse_square_root(step, args.hidden, args.warmup)
        rate *= min(1.0, 2 * (1 - (step - 1) / args.steps))  # and down to 0 over the last half
        for group in optimizer.param_groups:
            group["lr"] = rate
        decoder_input_ids = model.network.shift_right(batch.labels)
        logits = model(batch.source, batch.source_mask, decoder_input_ids=decoder_input_ids).logits
        loss = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0 or step == args.steps:
            speed = step * args.batch_size / (time.perf_counter() - start)
            print(f"step {step:5d}  loss {loss.item():.4f}  {speed:.0f} pairs/s", flush=True)


def exact_match(model: tilewise.Model, count: int, beams: int = 4) -> float:
    """The share of held-out phrases whose best translation is exactly right."""
    pairs = sorted(held_out_pairs(count, seed=1), key=lambda pair: len(pair.source))
    right = 0
    for i in range(0, len(pairs), 100):
        some = pairs[i : i + 100]
        out = model.generate([pair.source for pair in some], num_beams=beams, max_new_tokens=32)
        assert out.texts is not None
        for pair, text in zip(some, out.texts, strict=True):
            right += text == pair.target
            if text != pair.target:
                print(f"wrong: {pair.source!r} -> {text!r}, not {pair.target!r}")
    return right / len(pairs)


def main() -> None:
    args = parse()
    torch.manual_seed(args.seed)
    model = new_model(args)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    start = time.perf_counter()
    train(model, args)
    print(f"trained in {time.perf_counter() - start:.0f} s")
    model.eval()
    model.save(args.out)
    print(f"exact match with beam 4: {exact_match(model, args.held_out):.3f}")


if __name__ == "__main__":
    main()
