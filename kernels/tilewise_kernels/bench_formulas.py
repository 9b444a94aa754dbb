"""What the benchmark compares with: the eager formulas as people write them, and torch's rivals.

Each takes the named tensors of a case (bench_cases.py has their shapes) and its options.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .errors import KernelUnavailable

Tensors = dict[str, Any]  # float tensors differentiate; others are masks, lengths, packed weights
Outputs = Tensor | tuple[Tensor, ...]
NAMED: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda h: F.gelu(h, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "quick_gelu": lambda h: h * torch.sigmoid(1.702 * h),
    "identity": lambda h: h,
}


@dataclass(frozen=True)
class Options:
    """How an op is called, besides its shape. A case takes some of these."""

    causal: bool = False
    mask: bool = False  # a padding mask over the keys, bool
    bias: bool = False  # added to the scores, with gradient, shared by the batch
    window: int | None = None  # keys further away than this are not seen
    beams: bool = False  # rows read their ancestors' caches
    residual: bool = False
    heads_kv: int | None = None  # key and value heads; None: as many as query heads
    activation: str = "gelu"
    gated: bool = False
    int8: bool = False
    top: int = 8


Function = Callable[[Tensors, Options], Outputs]


# -- masks ---------------------------------------------------------------------------------------


def seen(sq: int, sk: int, device: torch.device, o: Options) -> Tensor | None:
    """Bool [sq, sk] of a causal limit and a window, bottom-right aligned; None without either."""
    if not o.causal and o.window is None:
        return None
    ahead = torch.arange(sk, device=device) - torch.arange(sq, device=device)[:, None] - (sk - sq)
    found = ahead <= 0 if o.causal else torch.ones_like(ahead, dtype=torch.bool)
    return found if o.window is None else found & (ahead.abs() <= o.window)


def masked_softmax(scores: Tensor, mask: Tensor | None, o: Options) -> Tensor:
    """softmax over the last dim of what is not masked."""
    allowed = (
        seen(scores.shape[-2], scores.shape[-1], scores.device, o) if scores.dim() > 1 else None
    )
    for hidden in (mask, allowed):
        if hidden is not None:
            scores = scores.masked_fill(~hidden, -torch.inf)
    return torch.softmax(scores, -1)


# -- softmax and attention -----------------------------------------------------------------------


def softmax_scale(o: Options) -> float:
    """A score's usual scale where there is a mask; a plain softmax has none."""
    return 0.125 if o.mask or o.causal else 1.0


def softmax(t: Tensors, o: Options) -> Tensor:
    scale = softmax_scale(o)
    return masked_softmax(t["x"] * scale if scale != 1.0 else t["x"], t.get("mask"), o)


def attention(t: Tensors, o: Options) -> Tensor:
    q, k, v = t["q"], t["k"], t["v"]
    group = q.shape[1] // k.shape[1]
    if group > 1:
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if "bias" in t:
        scores = scores + t["bias"]
    return masked_softmax(scores, t.get("mask"), o) @ v


def sdpa(t: Tensors, o: Options) -> Tensor:
    """torch's scaled_dot_product_attention, by whichever kernel it chooses."""
    q, k, v, mask = t["q"], t["k"], t["v"], t.get("mask")
    square = q.shape[2] == k.shape[2]  # torch's causal limit is top-left: equal only then
    causal = o.causal and square and mask is None and o.window is None and "bias" not in t
    if not causal:
        allowed = seen(q.shape[2], k.shape[2], q.device, o)
        mask = allowed if mask is None else mask if allowed is None else mask & allowed
        if "bias" in t:
            mask = t["bias"] if mask is None else t["bias"].masked_fill(~mask, -torch.inf)
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=grouped)


def sdpa_by(backend: SDPBackend) -> Callable[[Tensors, Options], Tensor]:
    """sdpa by one kernel of torch's; raises KernelUnavailable where that takes no such call."""

    def call(t: Tensors, o: Options) -> Tensor:
        try:
            with sdpa_kernel(backend):
                return sdpa(t, o)
        except RuntimeError as error:
            raise KernelUnavailable(str(error).strip().splitlines()[0]) from error

    return call


SDPA = {"sdpa": sdpa} | {
    f"sdpa {name}": sdpa_by(backend)
    for name, backend in (
        ("flash", SDPBackend.FLASH_ATTENTION),
        ("efficient", SDPBackend.EFFICIENT_ATTENTION),
        ("cudnn", SDPBackend.CUDNN_ATTENTION),
        ("math", SDPBackend.MATH),
    )
}


def _sequences(t: Tensors, o: Options, attend: Callable[[Tensors, Options], Tensor]) -> Tensor:
    """Packed sequences one by one: q, k, v [total, H, D]."""
    ends, outs = t["cu_seqlens"].tolist(), []
    for start, end in zip(ends, ends[1:], strict=False):
        one = {name: t[name][start:end].transpose(0, 1)[None] for name in "qkv"}
        outs.append(attend(one, o)[0].transpose(0, 1))
    return torch.cat(outs)


def attention_varlen(t: Tensors, o: Options) -> Tensor:
    return _sequences(t, o, attention)


def sdpa_varlen(t: Tensors, o: Options) -> Tensor:
    return _sequences(t, o, sdpa)


def gathered(t: Tensors) -> Tensors:
    """decode_attention's inputs for attention: each row's own cache, lengths as a mask.

    With beam_index the caches are first reordered as beam searches do that keep none: every
    position moves to the row that reads it.
    """
    k, v = t["k"], t["v"]
    positions = torch.arange(k.shape[2], device=k.device)
    if "beam_index" in t:
        rows = t["beam_index"][:, -1].long()  # one reorder, of the step just made
        k, v = k.index_select(0, rows), v.index_select(0, rows)
    mask = (positions < t["lengths"][:, None])[:, None, None]
    return {"q": t["q"], "k": k, "v": v, "mask": mask}


def decode_attention(t: Tensors, o: Options) -> Tensor:
    return attention(gathered(t), o)


def decode_sdpa(t: Tensors, o: Options) -> Tensor:
    return sdpa(gathered(t), o)


# -- norms, products, positions ------------------------------------------------------------------


def _summed(t: Tensors) -> Tensor:
    return t["x"] + t["residual"] if "residual" in t else t["x"]


def layer_norm(t: Tensors, o: Options) -> Tensor:
    x = _summed(t)
    return F.layer_norm(x, x.shape[-1:], t["weight"], t["bias"])


def rms_norm(t: Tensors, o: Options) -> Tensor:
    """As LLaMA's is written."""
    x = _summed(t)
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)
    return t["weight"] * scaled.to(x.dtype)


def torch_rms_norm(t: Tensors, o: Options) -> Tensor:
    x = _summed(t)
    return F.rms_norm(x, x.shape[-1:], t["weight"], 1e-6)


def linear(t: Tensors, o: Options) -> Tensor:
    return F.linear(t["x"], t["weight"], t["bias"])


def linear_act(t: Tensors, o: Options) -> Tensor:
    return NAMED[o.activation](linear(t, o))


def feed_forward(t: Tensors, o: Options) -> Tensor:
    h = NAMED[o.activation](F.linear(t["x"], t["w1"], t.get("b1")))
    if "gate" in t:
        h = h * F.linear(t["x"], t["gate"])
    return F.linear(h, t["w2"], t.get("b2"))


def rotary(t: Tensors, o: Options) -> tuple[Tensor, Tensor]:
    """As LLaMA's is written: x cos + rotate_half(x) sin, the tables [S, D] made beforehand."""
    cos, sin = t["cos doubled"], t["sin doubled"]

    def turned(x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return x * cos + torch.cat([-b, a], -1) * sin

    return turned(t["q"]), turned(t["k"])


# -- optimiser -----------------------------------------------------------------------------------

STEP, LR = 10, 0.1


def adamw_step(t: Tensors, o: Options) -> tuple[Tensor, Tensor, Tensor]:
    """The formula, with torch's default betas, eps and decay; the new parameters and moments."""
    m = 0.9 * t["exp_avg"] + 0.1 * t["grad"]
    v = 0.999 * t["exp_avg_sq"] + 0.001 * t["grad"].square()
    moved = m / (1 - 0.9**STEP) / ((v / (1 - 0.999**STEP)).sqrt() + 1e-8)
    return (1 - LR * 0.01) * t["param"] - LR * moved, m, v


# -- vocabulary ----------------------------------------------------------------------------------


def log_softmax(t: Tensors, o: Options) -> Tensor:
    return F.log_softmax(t["x"], -1)


def log_softmax_topk(t: Tensors, o: Options) -> Tensor:
    wide = torch.float64 if t["x"].dtype == torch.float64 else torch.float32
    return F.log_softmax(t["x"], -1, dtype=wide).topk(o.top, -1).values


def cross_entropy(t: Tensors, o: Options) -> Tensor:
    logits = t["logits"]  # half types in float32, as trainers do
    wide = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    return F.cross_entropy(wide, t["target"])


def linear_cross_entropy(t: Tensors, o: Options) -> Tensor:
    return cross_entropy({"logits": F.linear(t["x"], t["weight"]), "target": t["target"]}, o)
