"""Attention on the CPU holds no [Sq, Sk] tensor: peak memory grows with length, not its square."""

import json
import os
import subprocess
import sys

import pytest

MEASURE = """
import ctypes, json, re, torch
from tilewise_kernels import attention, force

def peak():
    with open("/proc/self/status") as status:
        return int(re.search(r"VmHWM:\\s+(\\d+)", status.read())[1]) / 1024

def growth(length, way, **options):
    q, k, v = (torch.randn(1, 1, length, 16, requires_grad=True) for _ in range(3))
    getattr(ctypes.CDLL(None), "malloc_trim", lambda pad: None)(0)  # what earlier calls freed
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak starts again from what is in use now
    before = peak()
    with force(way, "attention"):
        attention(q, k, v, **options).sum().backward()
    return peak() - before

def calls(length):
    padded = torch.tensor([length - 100])
    keys = (torch.arange(length) < length - 50)[None, None, None].expand(1, 1, length, length)
    yield "torch, causal", "torch", {"causal": True}
    yield "torch, lengths", "torch", {"key_lengths": padded}
    yield "torch, expanded mask", "torch", {"mask": keys}
    yield "blocked, causal, lengths", "blocked", {"causal": True, "key_lengths": padded}
    slopes, every = torch.tensor([0.1]), torch.zeros(1, 1, 1, length, requires_grad=True)
    yield "torch, ALiBi", "torch", {"alibi_slopes": slopes}
    yield "torch, ALiBi, mask", "torch", {"alibi_slopes": slopes, "mask": keys}
    yield "torch, window, two terms", "torch", {"window": (300, 20), "mask": keys, "bias": every}
    yield "blocked, softcap, dropout", "blocked", {"softcap": 9.0, "dropout_p": 0.1}
    yield "native, causal", "native", {"causal": True}
    yield "native, expanded mask, dropout", "native", {"mask": keys, "dropout_p": 0.1}

def all_of(length):
    return {name: growth(length, way, **options) for name, way, options in calls(length)}

all_of(256)
print(json.dumps([all_of(4096), all_of(8192)]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc/self")
def test_memory_is_linear_in_length():
    """Peak above the inputs, forward and backward: one float32 [Sq, Sk] is 256 MiB at 8192.

    From 4096 to 8192 it may grow 3.5 times (noise included): quadratic growth would be fourfold.
    """
    result = subprocess.run(
        [sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    half, whole = json.loads(result.stdout)
    for name, growth in whole.items():
        assert growth < 128, f"{name}: {growth} MiB"
        assert growth <= 3.5 * max(half[name], 8), f"{name}: {half[name]}, then {growth} MiB"
