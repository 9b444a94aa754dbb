"""Fuse a Hugging Face model that you already have: three lines, and one to undo it.

    python examples/fuse_huggingface.py

Builds a small GPT-2 from a configuration (any BERT, RoBERTa, GPT-2, BART, LLaMA, GPT-NeoX or T5
from from_pretrained does as well), fuses it, checks that it still generates the same tokens, and
times both. Needs transformers.
"""

import copy
import statistics
import time

import torch
import transformers

import tilewise


def new_model() -> transformers.GPT2LMHeadModel:
    config = transformers.GPT2Config(
        n_embd=256, n_layer=4, n_head=4, vocab_size=1000, bos_token_id=0, eos_token_id=None
    )
    return transformers.GPT2LMHeadModel(config).eval()


def milliseconds(models: list[torch.nn.Module], batch: dict[str, torch.Tensor]) -> list[float]:
    """The median of ten forward passes of each model, taken in turns so that a busy machine
    slows both."""
    taken: list[list[float]] = [[] for _ in models]
    with torch.no_grad():
        for _ in range(10):
            for model, times in zip(models, taken, strict=True):
                start = time.perf_counter()
                model(**batch)
                times.append(time.perf_counter() - start)
    return [statistics.median(times) * 1e3 for times in taken]


def main() -> None:
    torch.manual_seed(0)
    model = new_model()
    ids = torch.randint(0, 1000, (4, 64))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    prompt = {name: tensor[:1, :8] for name, tensor in batch.items()}
    before = model.generate(**prompt, max_new_tokens=16, do_sample=False, pad_token_id=0)
    eager = copy.deepcopy(model)

    report = tilewise.fuse(model, example=batch)
    print(report)

    after = model.generate(**prompt, max_new_tokens=16, do_sample=False, pad_token_id=0)
    print("same tokens:", torch.equal(before, after))
    print("eager {:.1f} ms, fused {:.1f} ms".format(*milliseconds([eager, model], batch)))
    report.revert()
    print("reverted:", type(model.transformer.h[0].mlp).__name__)


if __name__ == "__main__":
    main()
