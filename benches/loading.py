"""Time and memory of tilewise.load, against reading the files alone and against transformers.

    OMP_NUM_THREADS=2 python benches/loading.py [--folder DIR] [--json FILE] [--readme FILE]

Random checkpoints are written to DIR (by default a temporary folder; 3 GB), and read from the page
cache. The contenders take turns, each load in a fresh process; the median of ROUNDS counts. Memory
is the process's growth, at its peak, over the bytes of the weights that it then has. The table goes
between `<!-- loading:begin -->` and `<!-- loading:end -->` of the README.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from report import table, write_between_markers
from safetensors.torch import save_file

import tilewise
from tilewise.families import FAMILIES, tensors_to
from tilewise_kernels.measure import machine

ROUNDS = 5
BEGIN, END = "<!-- loading:begin -->", "<!-- loading:end -->"
GPT2 = {
    "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": 50257, "n_embd": 768,
    "n_head": 12, "n_layer": 12, "n_positions": 1024,
}  # fmt: skip
LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 32000,
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 12,
    "num_attention_heads": 16, "num_key_value_heads": 4, "max_position_embeddings": 2048,
}  # fmt: skip
# (name, config, dtype of the file, dtype of the model, number of files)
CASES: list[tuple[str, dict[str, Any], str, str, int]] = [
    ("GPT-2 124M, stored transposed", GPT2, "float32", "float32", 1),
    ("LLaMA-like 248M", LLAMA, "float32", "float32", 1),
    ("LLaMA-like 248M", LLAMA, "float32", "float32", 4),
    ("LLaMA-like 248M", LLAMA, "float32", "bfloat16", 1),
    ("LLaMA-like 248M", LLAMA, "bfloat16", "float32", 1),
]
# Each in a process of its own, or freed memory would be used again, and hide what new memory costs.
# A weight that is only mapped is not yet read: the sum of all is part of the time of such loaders.
LOADERS = {
    "tilewise": "tilewise.load(folder, dtype=dtype).parameters()",
    "read": "[read(path) for path in files(folder)]",
    "safetensors": "touched(t.to(dtype) for f in files(folder) for t in load_file(f).values())",
    "transformers": "touched(Auto.from_pretrained(folder, dtype=dtype).parameters())",
}
CHILD = """
import sys, time, torch
from pathlib import Path

def status(field):
    text = open("/proc/self/status").read()
    return int(text.split(field + ":")[1].split()[0]) * 1024

def files(folder):
    return sorted(Path(folder).glob("*.safetensors"))

def read(path):
    room = torch.empty(path.stat().st_size, dtype=torch.uint8)
    left = room.numpy().data
    with open(path, "rb", buffering=0) as file:
        while left and (count := file.readinto(left)):
            left = left[count:]
    return room

def touched(weights):
    weights = list(weights)
    assert sum(w.detach().sum() for w in weights) != 0
    return weights

{imports}
folder, large, dtype = sys.argv[1], sys.argv[2], getattr(torch, sys.argv[3])
weights = list({load})  # what a first load imports and keeps
before, folder, weights = status("VmRSS"), large, None
began = time.perf_counter()
weights = list({load})
seconds = time.perf_counter() - began
print(seconds, (status("VmHWM") - before) / sum(w.nbytes for w in weights))
"""
IMPORTS = {
    "tilewise": "import tilewise",
    "read": "",
    "safetensors": "from safetensors.torch import load_file",
    "transformers": "from transformers import AutoModelForCausalLM as Auto",
}


def write(folder: Path, raw: dict[str, Any], dtype: torch.dtype, shards: int) -> Path:
    """A checkpoint of random weights; one that is already there is kept."""
    if folder.exists():
        return folder
    config = FAMILIES[raw["model_type"]].config_from(raw, None)
    with torch.device("meta"):
        shapes = {
            n: t.shape for n, t in tensors_to(config, tilewise.build(config).state_dict()).items()
        }
    folder.mkdir(parents=True)
    names = sorted(shapes)
    places = {name: f"model-{i % shards}.safetensors" for i, name in enumerate(names)}
    if shards == 1:
        places = dict.fromkeys(names, "model.safetensors")
    for file in sorted(set(places.values())):
        tensors = {n: 0.02 * torch.randn(shapes[n]) for n in names if places[n] == file}
        stored = {n: t.to(dtype) for n, t in tensors.items()}
        save_file(stored, folder / file, metadata={"format": "pt"})
    if shards > 1:
        index = {"metadata": {}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(raw | {"dtype": str(dtype).split(".")[1]}))
    return folder


def run(loader: str, small: Path, folder: Path, dtype: str) -> tuple[float, float]:
    """Seconds, and the growth of a process at its peak over the bytes of the weights."""
    code = CHILD.replace("{load}", LOADERS[loader]).replace("{imports}", IMPORTS[loader])
    command = [sys.executable, "-c", code, str(small), str(folder), dtype]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    seconds, grown = map(float, done.stdout.split())
    return seconds, grown


def measured(root: Path) -> Iterator[dict[str, Any]]:
    for name, raw, stored, wanted, shards in CASES:
        family = raw["model_type"]
        small = write(root / f"{family}-small", FAMILIES[family].EXAMPLES[0], torch.float32, 1)
        folder = root / f"{family}-{stored}-{shards}"
        write(folder, raw, getattr(torch, stored), shards)
        rounds = [{who: run(who, small, folder, wanted) for who in LOADERS} for _ in range(ROUNDS)]
        seconds = {who: statistics.median(each[who][0] for each in rounds) for who in LOADERS}
        peaks = {who: max(each[who][1] for each in rounds) for who in LOADERS}
        files = "1 file" if shards == 1 else f"{shards} files"
        words = f"{name}, {stored} in {files} to {wanted}"
        yield {"case": words, "seconds": seconds, "peak": peaks}


def lines(rows: list[dict[str, Any]]) -> list[str]:
    """The Markdown: conditions and table."""
    heads = ["checkpoint", "tilewise.load, ms", "over reading it", "safetensors over it",
             "transformers over it", "peak of tilewise", "peak of transformers"]  # fmt: skip
    cells = []
    for row in rows:
        took, peaks = row["seconds"], row["peak"]
        ours = took["tilewise"]
        cells.append([
            row["case"], f"{1e3 * ours:.0f}", f"{ours / took['read']:.2f}x",
            *(f"{took[name] / ours:.2f}x" for name in ("safetensors", "transformers")),
            *(f"{peaks[name]:.2f}x" for name in ("tilewise", "transformers")),
        ])  # fmt: skip
    import transformers

    where = (
        f"{machine('cpu')}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, {time.strftime('%Y-%m-%d')}."
    )
    return [where, "", *table(heads, cells)]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--readme", type=Path, default=Path(__file__).parent / "README.md")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        rows = list(measured(arguments.folder or Path(temporary)))
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2))
    print("\n".join(lines(rows)))
    write_between_markers(arguments.readme, lines(rows), BEGIN, END)


if __name__ == "__main__":
    main()
