"""Attention that never holds the score matrix: out = softmax(scale * q k^T | bias, masks) v.

    S = scale q k^T;  S = softcap tanh(S / softcap);  S = S + bias + mask - slope_h |j - i'|
    P = softmax(S), 0 where hidden;  out = (P M / (1 - p)) v, M = dropout's kept elements

with i' = i + Sk - Sq the key position of query i. Causal hides keys j > i', window = (left, right)
those outside i' - left <= j <= i' + right.

Memory contract: forward saves q, k, v, out and the log-sum-exp of each row, all linear in length;
backward recomputes the probabilities tile by tile, and dropout's mask from its seed. Work:
2 B Hq (pairs of a query and a key it sees) (D + Dv) FLOPs forward, 2.5 times that backward; bytes:
q, k, v, out once.
Source: Dao et al. 2022 and Dao 2023 (FlashAttention); Milakov and Gimelshein 2018 (online softmax);
Press et al. 2022 (ALiBi); Beltagy et al. 2020 (window); Gemma Team 2024 (softcap).

Shapes: q [B, Hq, Sq, D]; k [B, Hkv, Sk, D]; v [B, Hkv, Sk, Dv]; Hq = G * Hkv, query head h reads
key head h // G; mask and bias 4-D, broadcasting to [B, Hq, Sq, Sk]; key_lengths [B];
alibi_slopes [Hq]; out [B, Hq, Sq, Dv], laid out in memory as q by torch's kernel, [B, Hq, Sq, Dv]
by Triton's, [B, Sq, Hq, Dv] by the others; lse [B, Hq, Sq].

Ways: triton (attention_triton.py) on CUDA; native (csrc/attention.cpp) on the CPU, float32 and
bfloat16; torch (attention_cpu.py): the CPU flash kernel inside torch, on pieces that it can
express; blocked (attention_blocked.py): plain torch over blocks of queries, for everything else;
reference: the same with the whole score matrix.
"""

from typing import Any, Literal, overload

import torch
from torch import Tensor

from . import attention_cpu, dropout, lazy_triton, native
from .attention_blocked import Scoring, blocked, blocked_backward, reference
from .checks import (
    broadcasts,
    fail,
    has_shape,
    is_flag,
    is_float_tensor,
    is_index_tensor,
    is_mask,
    is_number,
    is_probability,
    is_whole,
    matches,
    same_device,
)
from .launch import architecture
from .op import (
    Cost,
    Implementation,
    Op,
    accumulator,
    autocast_dtype,
    plain_eager,
    warn_once,
)

# -- triton --------------------------------------------------------------------------------------


def _expanded(q: Tensor, k: Tensor, scoring: tuple[Any, ...]) -> Scoring:
    """With the mask at the whole of its shape; a broadcast dim has stride 0."""
    how = Scoring(*scoring)
    if how.mask is None:
        return how
    return how._replace(mask=how.mask.expand(*q.shape[:3], k.shape[2]))


def _triton_forward(q: Tensor, k: Tensor, v: Tensor, *scoring: Any) -> tuple[Tensor, Tensor]:
    from . import attention_triton

    return attention_triton.forward(q, k, v, *_expanded(q, k, scoring))


def _triton_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *rest: Any
) -> tuple[Tensor | None, ...]:
    from . import attention_triton

    *scoring, needs = rest
    how = _expanded(q, k, tuple(scoring))
    return attention_triton.backward(grad, q, k, v, out, lse, *how, needs)


def triton_refuses(q: Tensor, k: Tensor, v: Tensor, *_: object) -> str | None:
    """Why no Triton kernel of attention takes these, [..., D] each, or None."""
    if q.dtype == torch.float64:
        return "its matrix products have no float64"
    for name, width in (("head dim", q.shape[3]), ("head dim of v", v.shape[3])):
        if not 1 <= width <= 256:
            return f"{name} {width} is outside 1..256"
    if 0 < architecture(q.device) < 80:
        return f"its block sizes are for sm_80 and newer, this is sm_{architecture(q.device)}"
    if not q.is_cuda and q.dtype == torch.bfloat16:
        return "Triton's interpreter multiplies bfloat16 wrongly"
    return None


# -- native --------------------------------------------------------------------------------------


def native_lacks(q: Tensor, *_: object) -> str | None:
    """What csrc/attention.cpp was never made for."""
    if q.dtype in (torch.float32, torch.bfloat16):
        return None
    return f"its kernel has no {q.dtype}"


def native_refuses(q: Tensor, *_: object) -> str | None:
    """Why csrc/attention.cpp cannot take a call."""
    if lacking := native_lacks(q):
        return lacking
    if not native.op("attention_runs")(q.dtype):
        return f"torch multiplies no tiles of {q.dtype} on this CPU"
    return None


def _native_forward(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return native.op("attention_forward")(q, *rest)


def _native_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *rest: Any
) -> tuple[Tensor | None, ...]:
    *scoring, needs = rest
    if lost := native_refuses(q):  # oneDNN was there in forward and has been turned off
        warn_once(f"tilewise: attention's backward leaves its native way: {lost}")
        return blocked_backward(grad, q, k, v, out, lse, *rest)
    return native.op("attention_backward")(grad, q, k, v, lse, *scoring, needs[3])


# -- the op --------------------------------------------------------------------------------------


def cost(q: Tensor, k: Tensor, v: Tensor, *scoring: Any) -> Cost:
    """2 (D + Dv) FLOPs for each key a query sees by causality and window; q, k, v, out once."""
    (b, hq, sq, d), (sk, dv) = q.shape, v.shape[2:]
    how = Scoring(*scoring).settled(sq, sk)
    pairs = sq * sk
    if how.left >= 0 or how.right >= 0:
        spans = (how.span(slice(i, i + 1), sq, sk) for i in range(sq))
        pairs = sum(keys.stop - keys.start for keys in spans)
    flops = 2 * b * hq * pairs * (d + dv)
    outputs = b * hq * sq * dv
    moved = (q.numel() + k.numel() + v.numel() + outputs) * q.element_size()
    return Cost(flops, moved, flops * 5 // 2, 2 * moved + outputs * q.element_size())


def _fake(q: Tensor, k: Tensor, v: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    out = q.new_empty(*q.shape[:3], v.shape[3])
    return out, q.new_empty(q.shape[:3], dtype=accumulator(q.dtype))


def _fake_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *scoring: Any
) -> tuple[Tensor, ...]:
    bias = Scoring(*scoring).bias
    return tuple(grad.new_empty(0) if t is None else t.new_empty(t.shape) for t in (q, k, v, bias))


_TERMS = "Tensor? mask, Tensor? bias, Tensor? key_lengths, Tensor? alibi_slopes, Tensor? seed"
_NUMBERS = "bool causal, int left, int right, float softcap, float scale, float dropout_p"

OP = Op(
    "attention",
    schema=f"(Tensor q, Tensor k, Tensor v, {_TERMS}, {_NUMBERS}) -> (Tensor, Tensor)",
    backward_schema="(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{_TERMS}, {_NUMBERS}) -> (Tensor, Tensor, Tensor, Tensor)",
    implementations=[
        Implementation(
            "triton",
            _triton_forward,
            _triton_backward,
            devices=("cuda",),
            missing=lazy_triton.missing,
            refuses=triton_refuses,
            refuses_backward=lambda grad, q, k, v, *_: triton_refuses(q, k, v),
        ),
        Implementation(
            "native",
            _native_forward,
            _native_backward,
            devices=("cpu",),
            missing=native.missing,
            refuses=native_refuses,
            slower=native_lacks,
            refuses_backward=lambda grad, q, *_: native_refuses(q),
        ),
        Implementation(
            "torch",
            attention_cpu.forward,
            attention_cpu.backward,
            devices=("cpu",),
            refuses=attention_cpu.refuses,
            slower=attention_cpu.lacks,
            refuses_backward=lambda grad, q, k, v, out, lse, *rest: attention_cpu.refuses(
                q, k, v, *rest[:-1]
            ),
        ),
        Implementation("blocked", blocked, blocked_backward),
        Implementation("reference", reference, blocked_backward),
    ],
    fake=_fake,
    fake_backward=_fake_backward,
    save=lambda args, outputs: ((*args[:3], *outputs, *args[3:8]), args[8:14]),
    inputs_with_grad=(0, 1, 2, 4),
    cost=cost,
)


# -- checks --------------------------------------------------------------------------------------


def check_qkv(op: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise ArgumentError unless q [B, Hq, Sq, D], k [.., Hkv, Sk, D], v [.., Sk, Dv] fit."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        is_float_tensor(op, name, tensor, min_dims=4)
        if tensor.dim() != 4:
            raise fail(op, name, f"{tensor.dim()}-dimensional", "pass [batch, heads, length, dim]")
    matches(op, "k", k, "q", q)
    matches(op, "v", v, "q", q)
    (b, hq, _, d), (hkv, sk), dv = q.shape, k.shape[1:3], v.shape[3]
    has_shape(op, "k", k, (b, hkv, sk, d), "batch of q, its own heads and length, head dim of q")
    has_shape(op, "v", v, (b, hkv, sk, dv), "batch, heads and length of k, its own head dim")
    if hkv == 0 or hq % hkv:
        raise fail(op, "k", f"of {hkv} heads", f"q has {hq}: it must be a multiple of k's heads")


def _check_key_lengths(key_lengths: Tensor, q: Tensor, sk: int) -> None:
    is_index_tensor("attention", "key_lengths", key_lengths)
    same_device("attention", "key_lengths", key_lengths, "q", q)
    has_shape("attention", "key_lengths", key_lengths, (q.shape[0],), "[batch]")
    # Reading values would stall a GPU and break a graph; there the kernels clamp instead.
    if key_lengths.is_cpu and not torch.compiler.is_compiling() and key_lengths.numel():
        low, high = (int(n) for n in torch.aminmax(key_lengths))
        if low < 0 or high > sk:
            raise fail("attention", "key_lengths", f"{low}..{high}", f"keep it within 0..{sk}")


def check_slopes(op: str, slopes: Tensor | None, q: Tensor) -> None:
    """Raise ArgumentError unless alibi_slopes are [Hq], or None; q is [B, Hq, ...]."""
    if slopes is None:
        return
    is_float_tensor(op, "alibi_slopes", slopes)
    same_device(op, "alibi_slopes", slopes, "q", q)
    has_shape(op, "alibi_slopes", slopes, (q.shape[1],), "[heads of q]")
    if slopes.requires_grad:
        takes = "they take no gradient: pass alibi_slopes.detach()"
        raise fail(op, "alibi_slopes", "one that requires grad", takes)
    # a GPU would have to wait for the values; a list of a few is quicker than an op
    if slopes.is_cpu and plain_eager([slopes]):
        largest = torch.finfo(accumulator(q.dtype)).max  # the kernels' own dtype
        wrong = [slope for slope in slopes.tolist() if not abs(slope) <= largest]
        if wrong:
            takes = f"pass finite slopes, of at most {largest:.3g}"
            raise fail(op, "alibi_slopes", f"holding {wrong[0]}", takes)


def check_bias(op: str, bias: Tensor, q: Tensor, sk: int, meaning: str) -> None:
    """Raise ArgumentError unless bias broadcasts to [*q.shape[:3], sk], spelt by `meaning`."""
    is_float_tensor(op, "bias", bias, min_dims=0)
    same_device(op, "bias", bias, "q", q)
    broadcasts(op, "bias", bias, (*q.shape[:3], sk), meaning)


def bounds(op: str, window: tuple[int | None, int | None] | None) -> tuple[int, int]:
    """window as two numbers, -1 where it is None; raises ArgumentError unless it is such a pair."""
    if window is None:
        return -1, -1
    pair = isinstance(window, (tuple, list)) and len(window) == 2
    if not pair or not all(n is None or (is_whole(n) and n >= 0) for n in window):
        raise fail(op, "window", window, "pass (left, right), each a number >= 0 or None")
    left, right = (-1 if n is None else min(n, 2**31 - 1) for n in window)
    return left, right


def check_numbers(op: str, scale: object, softcap: object, dropout_p: object) -> None:
    """Raise ArgumentError unless scale is finite, softcap 1e-30..1e30, dropout_p within [0, 1]."""
    if scale is not None:
        is_number(op, "scale", scale)
    if softcap is not None:
        is_number(op, "softcap", softcap)
        if not 1e-30 <= softcap <= 1e30:  # type: ignore[operator]  # float32 has its inverse too
            raise fail(op, "softcap", softcap, "pass a number of 1e-30 to 1e30, or None")
    is_probability(op, "dropout_p", dropout_p)


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    causal: bool = False,
    key_lengths: Tensor | None = None,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    return_lse: Literal[False] = False,
) -> Tensor: ...
@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    causal: bool = False,
    key_lengths: Tensor | None = None,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    causal: bool = False,
    key_lengths: Tensor | None = None,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale * q k^T + bias, over the keys that the masks leave) v, no score matrix held.

    q: [B, Hq, Sq, D]; k: [B, Hkv, Sk, D]; v: [B, Hkv, Sk, Dv]; Hq a multiple of Hkv (query head h
    reads key head h // (Hq / Hkv)); one dtype of float32, float16, bfloat16, float64; any strides.
    mask: broadcastable to [B, Hq, Sq, Sk]; bool (True = attend) or float without gradient (added,
    natural-log units). bias: float, likewise added; its gradient has its own shape and dtype.
    Below, i' = i + Sk - Sq is where query i stands among the keys.
    causal: key j is seen by query i when j <= i'. window: (left, right), key j is seen when
    i' - left <= j <= i' + right; None = unbounded. key_lengths: [B] int, the number of real keys;
    what lies past them is never read into the result, NaN included.
    alibi_slopes: [Hq], finite, no gradient; a score loses slope * |j - i'|. softcap: 1e-30 to
    1e30; scores, before all that is added, become softcap * tanh(score / softcap).
    scale: multiplies q k^T; 1 / sqrt(D) when None. dropout_p: 0 to 1; each probability is zeroed
    with it, others are divided by 1 - dropout_p; torch.manual_seed governs which.
    Returns out [B, Hq, Sq, Dv] in q's dtype, and with return_lse also the log-sum-exp of the scores
    [B, Hq, Sq], float32 (float64 for float64), without gradient, dropout left out. A row with
    nothing to attend to gives out 0, gradient 0, lse -inf; one whose every key carries a float mask
    below -1e30 gives the mean of v, as eager softmax does, and gradient 0. Under autocast q, k, v
    are cast to its dtype. Sums are kept in float32 or wider; forward and backward are
    deterministic. Raises ArgumentError for anything else. Source: Vaswani et al. 2017; Dao 2023.
    """
    check_qkv("attention", q, k, v)
    (b, hq, sq, d), sk = q.shape, k.shape[2]
    if mask is not None:
        is_mask("attention", mask, "q", q, (b, hq, sq, sk), "[B, Hq, Sq, Sk]")
        mask = _four_dims(mask, q)
    if bias is not None:
        check_bias("attention", bias, q, sk, "[B, Hq, Sq, Sk]")
        bias = _four_dims(bias, q)
    if key_lengths is not None:
        _check_key_lengths(key_lengths, q, sk)
    check_slopes("attention", alibi_slopes, q)
    is_flag("attention", "causal", causal)
    is_flag("attention", "return_lse", return_lse)
    check_numbers("attention", scale, softcap, dropout_p)
    left, right = bounds("attention", window)
    dtype = autocast_dtype(q.device)
    if dtype is not None and q.dtype != torch.float64:
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    scale = d**-0.5 if scale is None and d else float(scale or 0.0)
    seed = dropout.draw_seed(q.device) if dropout_p else None
    terms = (mask, bias, key_lengths, alibi_slopes, seed)
    softcap, dropout_p = float(softcap or 0.0), float(dropout_p)
    out, lse = OP(q, k, v, *terms, causal, left, right, softcap, scale, dropout_p)
    return (out, lse) if return_lse else out


def _four_dims(term: Tensor, q: Tensor) -> Tensor:
    """mask or bias with leading dims of 1, in a dtype that sums with scores in q's accumulator."""
    term = term[(None,) * (4 - term.dim())]
    return term.to(accumulator(q.dtype)) if term.dtype == torch.float64 else term
