"""What is benchmarked: for each op its inputs, our call, the eager formula, and torch's own rivals.

Activations are drawn from N(0, 1) and weights from N(0, 1 / fan_in), as in a trained network: unit
weights would drive softmax into denormals, and with them the timings.

Shapes: softmax ...xN; attention q [B, H, Sq, D], k and v [B, Hkv, Sk, D]; decode_attention q
[R, H, 1, D], caches [R, Hkv, T, D]; layer_norm ...xN; linear_act x [M, K], weight [N, K];
feed_forward x [M, E], w1 [F, E], w2 [E, F].
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import attention
from .decode_attention import decode_attention
from .errors import ArgumentError
from .feed_forward import feed_forward, linear_act
from .layer_norm import layer_norm
from .softmax import softmax

Shape = tuple[int, ...]
Tensors = dict[str, Tensor]  # float tensors differentiate, others are masks and lengths
SEED = 7
MAX_ELEMENTS = 2**44  # or products of sizes: more than any memory holds


@dataclass(frozen=True)
class Options:
    """How an op is called, besides its shape. A case takes some of these."""

    causal: bool = False
    mask: bool = False  # a padding mask over the keys, bool
    residual: bool = False
    heads_kv: int | None = None  # key and value heads; None: as many as query heads
    activation: str = "gelu"


Function = Callable[[Tensors, Options], Tensor]
NAMED = {
    "gelu": F.gelu,
    "gelu_tanh": lambda h: F.gelu(h, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "quick_gelu": lambda h: h * torch.sigmoid(1.702 * h),
    "identity": lambda h: h,
}


# -- inputs --------------------------------------------------------------------------------------


class Draw:
    """Random tensors of one device and dtype, the same for the same seed."""

    def __init__(self, device: str, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.generator = torch.Generator(device).manual_seed(SEED)

    def normal(self, *shape: int, std: float = 1.0, mean: float = 0.0) -> Tensor:
        """[*shape] from N(mean, std)."""
        drawn = torch.randn(shape, device=self.device, generator=self.generator)
        return drawn.mul_(std).add_(mean).to(self.dtype)

    def weight(self, out: int, fan_in: int) -> Tensor:
        """[out, fan_in] from N(0, 1 / fan_in): unit activations stay so."""
        return self.normal(out, fan_in, std=fan_in**-0.5)

    def lengths(self, rows: int, longest: int) -> Tensor:
        """[rows] whole numbers from about half of `longest` to all of it."""
        low, generator = longest // 2 + 1, self.generator
        return torch.randint(low, longest + 1, (rows,), generator=generator, device=self.device)

    def padding_mask(self, rows: int, longest: int) -> Tensor:
        """Bool [rows, longest], True at real positions."""
        positions = torch.arange(longest, device=self.device)
        return positions < self.lengths(rows, longest)[:, None]


def _softmax_inputs(draw: Draw, shape: Shape, o: Options) -> Tensors:
    made = {"x": draw.normal(*shape)}
    if o.mask:
        rows = shape[0] if len(shape) > 1 else 1
        middle = (1,) * (len(shape) - 2)
        mask = draw.padding_mask(rows, shape[-1])
        made["mask"] = mask.view(rows, *middle, shape[-1]) if len(shape) > 1 else mask[0]
    return made


def _attention_inputs(draw: Draw, shape: Shape, o: Options) -> Tensors:
    b, h, sq, sk, d = shape
    hkv = o.heads_kv or h
    made = {"q": draw.normal(b, h, sq, d)}
    made |= {name: draw.normal(b, hkv, sk, d) for name in ("k", "v")}
    if o.mask:
        made["mask"] = draw.padding_mask(b, sk)[:, None, None]
    return made


def _decode_inputs(draw: Draw, shape: Shape, o: Options) -> Tensors:
    r, h, t, d = shape
    made = {"q": draw.normal(r, h, 1, d)}
    made |= {name: draw.normal(r, o.heads_kv or h, t, d) for name in ("k", "v")}
    return made | {"lengths": draw.lengths(r, t)}


def _norm_inputs(draw: Draw, shape: Shape, o: Options) -> Tensors:
    made = {"x": draw.normal(*shape)}
    if o.residual:
        made["residual"] = draw.normal(*shape)
    n = shape[-1]
    return made | {"weight": draw.normal(n, std=0.1, mean=1.0), "bias": draw.normal(n, std=0.1)}


def _linear_inputs(draw: Draw, shape: Shape, o: Options) -> Tensors:
    m, k, n = shape
    return {"x": draw.normal(m, k), "weight": draw.weight(n, k), "bias": draw.normal(n, std=0.1)}


def _feed_forward_inputs(draw: Draw, shape: Shape, o: Options) -> Tensors:
    m, e, f = shape
    biases = {"b1": draw.normal(f, std=0.1), "b2": draw.normal(e, std=0.1)}
    return {"x": draw.normal(m, e), "w1": draw.weight(f, e), "w2": draw.weight(e, f)} | biases


# -- the eager formulas, as people write them -----------------------------------------------------


def _causal(sq: int, sk: int, device: torch.device) -> Tensor:
    """Bool [sq, sk], bottom-right aligned."""
    return torch.ones(sq, sk, dtype=torch.bool, device=device).tril(sk - sq)


def _masked_softmax(scores: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    if causal:
        allowed = _causal(scores.shape[-2], scores.shape[-1], scores.device)
        scores = scores.masked_fill(~allowed, -torch.inf)
    return torch.softmax(scores, -1)


def _softmax_scale(t: Tensors, o: Options) -> float:
    """A score's usual scale where there is a mask; a plain softmax has none."""
    return 0.125 if o.mask or o.causal else 1.0


def _softmax_eager(t: Tensors, o: Options) -> Tensor:
    scale = _softmax_scale(t, o)
    return _masked_softmax(t["x"] * scale if scale != 1.0 else t["x"], t.get("mask"), o.causal)


def _attention_eager(t: Tensors, o: Options) -> Tensor:
    q, k, v = t["q"], t["k"], t["v"]
    group = q.shape[1] // k.shape[1]
    if group > 1:
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    return _masked_softmax(scores, t.get("mask"), o.causal) @ v


def _attention_sdpa(t: Tensors, o: Options) -> Tensor:
    q, k, v, mask = t["q"], t["k"], t["v"], t.get("mask")
    square = q.shape[2] == k.shape[2]  # torch's causal limit is top-left: equal only then
    if o.causal and (mask is not None or not square):
        allowed = _causal(q.shape[2], k.shape[2], q.device)
        mask = allowed if mask is None else mask & allowed
    return F.scaled_dot_product_attention(
        q, k, v, mask, is_causal=o.causal and mask is None, enable_gqa=q.shape[1] != k.shape[1]
    )


def _decode_mask(t: Tensors) -> Tensors:
    """The same inputs for attention: lengths as a mask over the cached positions."""
    positions = torch.arange(t["k"].shape[2], device=t["k"].device)
    return t | {"mask": (positions < t["lengths"][:, None])[:, None, None]}


def _norm_eager(t: Tensors, o: Options) -> Tensor:
    x = t["x"] + t["residual"] if o.residual else t["x"]
    return F.layer_norm(x, x.shape[-1:], t["weight"], t["bias"])


def _linear_eager(t: Tensors, o: Options) -> Tensor:
    return NAMED[o.activation](F.linear(t["x"], t["weight"], t["bias"]))


def _feed_forward_eager(t: Tensors, o: Options) -> Tensor:
    return F.linear(NAMED[o.activation](F.linear(t["x"], t["w1"], t["b1"])), t["w2"], t["b2"])


# -- our calls -----------------------------------------------------------------------------------


def _softmax_ours(t: Tensors, o: Options) -> Tensor:
    return softmax(t["x"], mask=t.get("mask"), scale=_softmax_scale(t, o), causal=o.causal)


def _attention_ours(t: Tensors, o: Options) -> Tensor:
    out = attention(t["q"], t["k"], t["v"], mask=t.get("mask"), causal=o.causal)
    assert isinstance(out, Tensor)  # no lse was asked for
    return out


def _norm_ours(t: Tensors, o: Options) -> Tensor:
    out = layer_norm(t["x"], t["weight"], t["bias"], residual=t.get("residual"))
    assert isinstance(out, Tensor)  # no sum was asked for
    return out


# -- the table -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """An op as the benchmark sees it.

    dims: the names of --shape's numbers; "..." in front takes any leading dims. shape, options:
    what runs when the user names none. takes: the Options that mean something here. by_item: batch
    items are independent and every input of two or more dims has them in dim 0, so that a
    reference may go one by one.
    """

    op: str
    dims: str
    shape: Shape
    takes: tuple[str, ...]
    inputs: Callable[[Draw, Shape, Options], Tensors]
    ours: Function
    eager: Function
    options: Options = Options()
    sdpa: Function | None = None
    by_item: bool = False
    trains: bool = True

    def parse(self, text: str) -> Shape:
        """The shape written as 8x12x512x512; raises ArgumentError naming the syntax."""
        parts = text.lower().split("x")
        wanted = self.dims.split("x")
        if not all(re.fullmatch("0*[1-9][0-9]{0,99}", part) for part in parts):
            raise ArgumentError(f"shape is {text!r}; pass {self.dims} in numbers above 0")
        fits = len(parts) >= 1 if wanted[0] == "..." else len(parts) == len(wanted)
        if not fits:
            raise ArgumentError(
                f"shape {text} has {len(parts)} numbers; {self.op} takes {self.dims}, "
                f"such as {'x'.join(map(str, self.shape))}"
            )
        shape = tuple(int(part) for part in parts)
        if math.prod(shape) > MAX_ELEMENTS:
            raise ArgumentError(f"shape {text} is beyond any memory; pass {self.dims} smaller")
        return shape

    def check(self, shape: Shape, o: Options) -> None:
        """Raise ArgumentError for options that the op does not take or that do not fit."""
        for field in fields(Options):
            given = getattr(o, field.name) != field.default
            if given and field.name not in self.takes:
                takes = ", ".join(self.takes) or "none"
                raise ArgumentError(f"{self.op} has no option {field.name}; it takes {takes}")
        if o.activation not in NAMED:
            raise ArgumentError(f"activation is {o.activation!r}; pass one of {', '.join(NAMED)}")
        if self.op == "softmax" and o.causal and len(shape) < 2:
            raise ArgumentError("a causal softmax needs a shape of two or more numbers")
        if o.heads_kv is not None and (o.heads_kv < 1 or shape[1] % o.heads_kv):
            raise ArgumentError(f"heads_kv is {o.heads_kv}; it must divide the {shape[1]} heads")
        if self.op == "attention" and o.causal and shape[2] > shape[3]:
            raise ArgumentError(
                f"causal with {shape[2]} queries and {shape[3]} keys leaves queries without keys, "
                "for which the eager formula has no answer; pass Sq <= Sk"
            )

    def make(self, shape: Shape, o: Options, device: str, dtype: torch.dtype) -> Tensors:
        """Inputs drawn with a fixed seed."""
        return self.inputs(Draw(device, dtype), shape, o)


CASES: Mapping[str, Case] = {
    case.op: case
    for case in (
        Case("softmax", "...xN", (8, 12, 512, 512), ("causal", "mask"), _softmax_inputs,
             _softmax_ours, _softmax_eager, Options(mask=True), by_item=True),
        Case("attention", "BxHxSqxSkxD", (2, 8, 512, 512, 64), ("causal", "mask", "heads_kv"),
             _attention_inputs, _attention_ours, _attention_eager, Options(causal=True),
             sdpa=_attention_sdpa, by_item=True),
        Case("decode_attention", "RxHxTxD", (16, 8, 1024, 64), ("heads_kv",), _decode_inputs,
             lambda t, o: decode_attention(t["q"], t["k"], t["v"], t["lengths"]),
             lambda t, o: _attention_eager(_decode_mask(t), o),
             sdpa=lambda t, o: _attention_sdpa(_decode_mask(t), o), by_item=True, trains=False),
        Case("layer_norm", "...xN", (4096, 768), ("residual",), _norm_inputs,
             _norm_ours, _norm_eager, Options(residual=True)),
        Case("linear_act", "MxKxN", (1024, 768, 3072), ("activation",), _linear_inputs,
             lambda t, o: linear_act(t["x"], t["weight"], t["bias"], activation=o.activation),
             _linear_eager),
        Case("feed_forward", "MxExF", (512, 768, 3072), ("activation",), _feed_forward_inputs,
             lambda t, o: feed_forward(
                 t["x"], t["w1"], t["b1"], t["w2"], t["b2"], activation=o.activation),
             _feed_forward_eager),
    )
}  # fmt: skip
