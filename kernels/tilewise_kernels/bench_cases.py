"""What is benchmarked: for each op its inputs, our call, and what to compare it with.

Activations are drawn from N(0, 1) and weights from N(0, 1 / fan_in), as in a trained network: unit
weights would drive softmax into denormals, and with them the timings.

Shapes: softmax, log_softmax ...xN; log_softmax_topk x [M, V]; attention q [B, H, Sq, D], k and v
[B, Hkv, Sk, D]; attention_varlen q, k, v [total, H, D] of B sequences of about S; decode_attention
q [R, H, 1, D], caches [R, Hkv, T, D]; layer_norm, rms_norm ...xN; linear, linear_act x [M, K],
weight [N, K]; feed_forward x [M, E], w1 [F, E], w2 [E, F]; rotary q [B, H, S, D]; cross_entropy
logits [M, V]; linear_cross_entropy x [M, K], weight [V, K]; adamw_step T tensors of N elements,
which it and its rivals copy first, to leave the inputs alone.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from . import bench_formulas as eager
from .adamw import adamw_step
from .attention import attention
from .attention_varlen import attention_varlen
from .bench_formulas import Function, Options, Outputs, Tensors
from .cross_entropy import cross_entropy
from .decode_attention import decode_attention
from .errors import ArgumentError
from .feed_forward import feed_forward, linear_act
from .layer_norm import layer_norm
from .linear import linear, pack_linear
from .linear_cross_entropy import linear_cross_entropy
from .log_softmax import log_softmax, log_softmax_topk
from .rms_norm import rms_norm
from .rotary import rotary
from .softmax import softmax

Shape = tuple[int, ...]
SEED = 7
MAX_ELEMENTS = 2**44  # or products of sizes: more than any memory holds
BEAMS = 4  # rows of a beam search that share a sentence


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

    def ids(self, rows: int, vocabulary: int) -> Tensor:
        """[rows] classes."""
        return torch.randint(vocabulary, (rows,), generator=self.generator, device=self.device)

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
    if o.bias:
        made["bias"] = draw.normal(1, h, sq, sk)
    if o.mask:
        made["mask"] = draw.padding_mask(b, sk)[:, None, None]
    return made


def _varlen_inputs(draw: Draw, shape: Shape, o: Options) -> Tensors:
    b, h, s, d = shape
    lengths = draw.lengths(b, s)
    ends = lengths.cumsum(0)
    made = {name: draw.normal(int(ends[-1]), h, d) for name in ("q", "k", "v")}
    cu_seqlens = torch.nn.functional.pad(ends, (1, 0)).int()
    return made | {"cu_seqlens": cu_seqlens, "longest": int(lengths.max())}


def _decode_inputs(draw: Draw, shape: Shape, o: Options) -> Tensors:
    r, h, t, d = shape
    made = {"q": draw.normal(r, h, 1, d)}
    made |= {name: draw.normal(r, o.heads_kv or h, t, d) for name in ("k", "v")}
    made |= {"lengths": draw.lengths(r, t)}
    if o.beams:  # each row goes on from some row of its own sentence
        ancestors = torch.arange(r, device=draw.device) // BEAMS * BEAMS
        room = (r - ancestors).clamp(max=BEAMS)
        ancestors += (
            torch.randint(0, BEAMS, (r,), generator=draw.generator, device=draw.device) % room
        )
        made["beam_index"] = ancestors.int()[:, None].expand(r, t).contiguous()
    return made


def _norm_inputs(draw: Draw, shape: Shape, o: Options) -> Tensors:
    made = {"x": draw.normal(*shape)}
    if o.residual:
        made["residual"] = draw.normal(*shape)
    n = shape[-1]
    return made | {"weight": draw.normal(n, std=0.1, mean=1.0), "bias": draw.normal(n, std=0.1)}


def _rms_inputs(draw: Draw, shape: Shape, o: Options) -> Tensors:
    made = _norm_inputs(draw, shape, o)
    del made["bias"]
    return made


def _linear_inputs(draw: Draw, shape: Shape, o: Options) -> Tensors:
    m, k, n = shape
    return {"x": draw.normal(m, k), "weight": draw.weight(n, k), "bias": draw.normal(n, std=0.1)}


def _packed_inputs(draw: Draw, shape: Shape, o: Options) -> Tensors:
    made = _linear_inputs(draw, shape, o)
    made["packed"] = pack_linear(made["weight"], made["bias"])
    if o.int8:
        made["packed int8"] = pack_linear(made["weight"], made["bias"], dtype=torch.int8)
    return made


def _feed_forward_inputs(draw: Draw, shape: Shape, o: Options) -> Tensors:
    m, e, f = shape
    made = {"x": draw.normal(m, e), "w1": draw.weight(f, e), "w2": draw.weight(e, f)}
    if o.gated:  # as LLaMA's: a gate and no biases
        return made | {"gate": draw.weight(f, e)}
    return made | {"b1": draw.normal(f, std=0.1), "b2": draw.normal(e, std=0.1)}


def _rotary_inputs(draw: Draw, shape: Shape, o: Options) -> Tensors:
    b, h, s, d = shape
    made = {"q": draw.normal(b, h, s, d), "k": draw.normal(b, o.heads_kv or h, s, d)}
    rates = 10000.0 ** -(torch.arange(0, d, 2, device=draw.device) / d)
    angles = torch.arange(s, device=draw.device)[:, None] * rates
    made |= {"cos": angles.cos().to(draw.dtype), "sin": angles.sin().to(draw.dtype)}
    return made | {f"{name} doubled": made[name].repeat(1, 2) for name in ("cos", "sin")}


def _cross_entropy_inputs(draw: Draw, shape: Shape, o: Options) -> Tensors:
    m, v = shape
    return {"logits": draw.normal(m, v), "target": draw.ids(m, v)}


def _linear_cross_entropy_inputs(draw: Draw, shape: Shape, o: Options) -> Tensors:
    m, k, v = shape
    return {"x": draw.normal(m, k), "weight": draw.weight(v, k), "target": draw.ids(m, v)}


def _adamw_inputs(draw: Draw, shape: Shape, o: Options) -> Tensors:
    made = {name: draw.normal(*shape) for name in ("param", "grad", "exp_avg")}
    return made | {"exp_avg_sq": draw.normal(*shape).square()}


# -- our calls -----------------------------------------------------------------------------------


def _softmax_ours(t: Tensors, o: Options) -> Tensor:
    return softmax(t["x"], mask=t.get("mask"), scale=eager.softmax_scale(o), causal=o.causal)


def _attention_ours(t: Tensors, o: Options) -> Tensor:
    window = None if o.window is None else (o.window, o.window)
    return attention(
        t["q"], t["k"], t["v"], mask=t.get("mask"), bias=t.get("bias"), causal=o.causal,
        window=window,
    )  # fmt: skip


def _varlen_ours(t: Tensors, o: Options) -> Outputs:
    ends = t["cu_seqlens"]
    return attention_varlen(t["q"], t["k"], t["v"], ends, ends, causal=o.causal)


def _decode_ours(t: Tensors, o: Options) -> Tensor:
    return decode_attention(t["q"], t["k"], t["v"], t["lengths"], beam_index=t.get("beam_index"))


def _norm_ours(t: Tensors, o: Options) -> Outputs:
    return layer_norm(t["x"], t["weight"], t["bias"], residual=t.get("residual"))


def _feed_forward_ours(t: Tensors, o: Options) -> Tensor:
    biases = (t.get("b1"), t["w2"], t.get("b2"))
    return feed_forward(t["x"], t["w1"], *biases, activation=o.activation, gate=t.get("gate"))


def _adamw_ours(t: Tensors, o: Options) -> Outputs:
    param, m, v = written = tuple(t[name].clone() for name in ("param", "exp_avg", "exp_avg_sq"))
    lists = (param.unbind(), t["grad"].unbind(), m.unbind(), v.unbind())
    adamw_step(*lists, eager.STEP, lr=eager.LR)
    return written


# -- the table -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """An op as the benchmark sees it.

    dims: the names of --shape's numbers; "..." in front takes any leading dims. shape, options:
    what runs when the user names none. takes: the Options that mean something here. by_item: batch
    items are independent and every input of two or more dims has them in dim 0, so that a
    reference may go one by one. rivals: torch's other ways. fixed: float inputs that take no
    gradient. rounding: the error, as a share of the scale, that the op is allowed by design.
    """

    op: str
    dims: str
    shape: Shape
    takes: tuple[str, ...]
    inputs: Callable[[Draw, Shape, Options], Tensors]
    ours: Function
    eager: Function
    options: Options = Options()
    rivals: Mapping[str, Function] = field(default_factory=dict)
    by_item: bool = False
    trains: bool = True
    fixed: tuple[str, ...] = ()
    rounding: Callable[[Options], float] = lambda o: 0.0

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
        for option in fields(Options):
            given = getattr(o, option.name) != option.default
            if given and option.name not in self.takes:
                takes = ", ".join(self.takes) or "none"
                raise ArgumentError(f"{self.op} has no option {option.name}; it takes {takes}")
        if o.activation not in eager.NAMED:
            known = ", ".join(eager.NAMED)
            raise ArgumentError(f"activation is {o.activation!r}; pass one of {known}")
        if o.window is not None and o.window < 0:
            raise ArgumentError(f"window is {o.window}; pass 0 or more")
        if "top" in self.takes and not 1 <= o.top <= shape[-1]:
            raise ArgumentError(f"top is {o.top}; pass 1 to {shape[-1]}, the vocabulary")
        if self.op == "rotary" and shape[-1] % 2:
            raise ArgumentError(f"rotary turns pairs; {shape[-1]} is odd")
        if self.op == "softmax" and o.causal and len(shape) < 2:
            raise ArgumentError("a causal softmax needs a shape of two or more numbers")
        if o.heads_kv is not None and (o.heads_kv < 1 or shape[1] % o.heads_kv):
            raise ArgumentError(f"heads_kv is {o.heads_kv}; it must divide the {shape[1]} heads")
        limited = o.causal or o.window is not None
        if self.op == "attention" and limited and shape[2] > shape[3]:
            raise ArgumentError(
                f"{shape[2]} queries and {shape[3]} keys under a causal limit or a window leave "
                "queries without keys, for which the eager formula has no answer; pass Sq <= Sk"
            )

    def make(self, shape: Shape, o: Options, device: str, dtype: torch.dtype) -> Tensors:
        """Inputs drawn with a fixed seed."""
        return self.inputs(Draw(device, dtype), shape, o)


CASES: Mapping[str, Case] = {
    case.op: case
    for case in (
        Case("softmax", "...xN", (8, 12, 512, 512), ("causal", "mask"), _softmax_inputs,
             _softmax_ours, eager.softmax, Options(mask=True), by_item=True),
        Case("attention", "BxHxSqxSkxD", (2, 8, 512, 512, 64),
             ("causal", "mask", "bias", "window", "heads_kv"), _attention_inputs, _attention_ours,
             eager.attention, Options(causal=True), rivals=eager.SDPA),
        Case("attention_varlen", "BxHxSxD", (8, 8, 256, 64), ("causal",), _varlen_inputs,
             _varlen_ours, eager.attention_varlen, Options(causal=True),
             rivals={"sdpa": eager.sdpa_varlen}),
        Case("decode_attention", "RxHxTxD", (32, 12, 512, 64), ("heads_kv", "beams"),
             _decode_inputs, _decode_ours, eager.decode_attention, Options(beams=True),
             rivals={"sdpa": eager.decode_sdpa}, trains=False),
        Case("layer_norm", "...xN", (4096, 768), ("residual",), _norm_inputs,
             _norm_ours, eager.layer_norm, Options(residual=True)),
        Case("rms_norm", "...xN", (4096, 768), ("residual",), _rms_inputs,
             lambda t, o: rms_norm(t["x"], t["weight"], residual=t.get("residual")),
             eager.rms_norm, Options(residual=True), rivals={"F.rms_norm": eager.torch_rms_norm}),
        Case("linear_act", "MxKxN", (1024, 768, 3072), ("activation",), _linear_inputs,
             lambda t, o: linear_act(t["x"], t["weight"], t["bias"], activation=o.activation),
             eager.linear_act),
        Case("feed_forward", "MxExF", (512, 768, 3072), ("activation", "gated"),
             _feed_forward_inputs, _feed_forward_ours, eager.feed_forward),
        Case("linear", "MxKxN", (32, 768, 3072), ("int8",), _packed_inputs,
             lambda t, o: linear(t["x"], t["packed int8" if o.int8 else "packed"]),
             eager.linear, rivals={}, trains=False,
             rounding=lambda o: 0.02 if o.int8 else 0.0),
        Case("rotary", "BxHxSxD", (4, 12, 512, 64), ("heads_kv",), _rotary_inputs,
             lambda t, o: rotary(t["q"], t["k"], t["cos"], t["sin"]),
             eager.rotary, fixed=("cos", "sin", "cos doubled", "sin doubled")),
        Case("log_softmax", "...xN", (256, 50257), (), _softmax_inputs,
             lambda t, o: log_softmax(t["x"]), eager.log_softmax),
        Case("log_softmax_topk", "MxV", (32, 50257), ("top",), _softmax_inputs,
             lambda t, o: log_softmax_topk(t["x"], o.top)[0], eager.log_softmax_topk,
             trains=False),
        Case("cross_entropy", "MxV", (1024, 32000), (), _cross_entropy_inputs,
             lambda t, o: cross_entropy(t["logits"], t["target"]), eager.cross_entropy),
        Case("linear_cross_entropy", "MxKxV", (1024, 512, 32000), (),
             _linear_cross_entropy_inputs,
             lambda t, o: linear_cross_entropy(t["x"], t["weight"], t["target"]),
             eager.linear_cross_entropy),
        Case("adamw_step", "TxN", (64, 65536), (), _adamw_inputs, _adamw_ours, eager.adamw_step,
             trains=False),
    )
}  # fmt: skip
