"""log-softmax over one dim, and its k largest values alone: what a decoder asks of its logits.

    log_softmax(x)_c = (x_c - m) - log(sum_j exp(x_j - m)),   m = max x

Memory contract: log_softmax reads x once and writes y once (a CPU row that fits in cache is read
from it a second time), saves y alone; backward reads grad and y once and writes dx once,
dx = grad - exp(y) * sum(grad). log_softmax_topk reads x once and writes k scores and ids per row;
it saves x and the ids. Its backward is log_softmax's with a gradient that is zero outside the ids.
Work for M rows of V columns: 5MV FLOPs and 2MV elements of traffic forward (4MV and MV for the top
k), 4MV and 3MV backward (5MV and 2MV). Memory bound on a GPU; a CPU computes exp at about the speed
at which it reads float32.

Shapes: x, y, grad [..., V]; scores, ids [..., k]. Native: C++ on CPU (csrc/log_softmax.*).
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import lazy_triton, log_softmax_triton, native
from .checks import fail, is_float_tensor, is_whole
from .launch import refuses
from .op import Cost, Implementation, Op, accumulator, autocast_dtype

Pair = tuple[Tensor, Tensor]

# -- log_softmax ---------------------------------------------------------------------------------


def reference(x: Tensor, dim: int) -> tuple[Tensor]:
    """torch's own, in float32 or wider: on a CPU its float16 sums overflow."""
    return (torch.log_softmax(x, dim, dtype=accumulator(x.dtype)).to(x.dtype),)


def reference_backward(grad: Tensor, y: Tensor, dim: int, needs: list[bool]) -> tuple[Tensor]:
    """dx = grad - exp(y) * sum(grad)."""
    return (torch.ops.aten._log_softmax_backward_data(grad, y, dim, y.dtype),)


def _moved(x: Tensor, dim: int) -> Tensor:
    """x with `dim` last, without the cost of a call where it is."""
    return x if dim == x.dim() - 1 else x.movedim(dim, -1)


def _back(y: Tensor, dim: int) -> Tensor:
    return y if dim == y.dim() - 1 else y.movedim(-1, dim)


def _native_forward(x: Tensor, dim: int) -> tuple[Tensor]:
    return (_back(native.op("log_softmax_forward")(_moved(x, dim)), dim),)


def _native_backward(grad: Tensor, y: Tensor, dim: int, needs: list[bool]) -> tuple[Tensor]:
    dx = native.op("log_softmax_backward")(_moved(grad, dim), _moved(y, dim))
    return (_back(dx, dim),)


def _triton_forward(x: Tensor, dim: int) -> tuple[Tensor]:
    return (_back(log_softmax_triton.forward(_moved(x, dim)), dim),)


def _triton_backward(grad: Tensor, y: Tensor, dim: int, needs: list[bool]) -> tuple[Tensor]:
    return (_back(log_softmax_triton.backward(_moved(grad, dim), _moved(y, dim)), dim),)


def _strided(x: Tensor, dim: int) -> str | None:
    return None if dim == x.dim() - 1 else "torch walks another dim than the last without a copy"


def cost(x: Tensor, dim: int) -> Cost:
    """5 FLOPs and two element moves forward, 4 FLOPs and three moves backward, per element."""
    n, moved = x.numel(), x.numel() * x.element_size()
    return Cost(5 * n, 2 * moved, 4 * n, 3 * moved)


OP = Op(
    "log_softmax",
    schema="(Tensor x, int dim) -> Tensor",
    backward_schema="(Tensor grad, Tensor y, int dim) -> Tensor",
    implementations=[
        Implementation(
            "triton",
            _triton_forward,
            _triton_backward,
            devices=("cuda",),
            missing=lazy_triton.missing,
            refuses=lambda x, dim: refuses(x),
            slower=_strided,
            refuses_backward=lambda grad, y, dim, _: refuses(y) or _strided(y, dim),
        ),
        Implementation(
            "native",
            _native_forward,
            _native_backward,
            devices=("cpu",),
            missing=native.missing,
            slower=_strided,
            refuses_backward=lambda grad, y, dim, _: _strided(y, dim),
        ),
        Implementation("reference", reference, reference_backward),
    ],
    fake=lambda x, dim: torch.empty_like(x, memory_format=torch.contiguous_format),
    fake_backward=lambda grad, y, dim: (
        torch.empty_like(y, memory_format=torch.contiguous_format),
    ),
    save=lambda args, outputs: ((outputs[0],), (args[1],)),
    inputs_with_grad=(0,),
    cost=cost,
)


def log_softmax(x: Tensor, *, dim: int = -1) -> Tensor:
    """The natural logarithm of softmax(x) over `dim`.

    x: [..., V] float32, float16, bfloat16 or float64, any strides; dim: any of its dims. Returns a
    tensor of x's shape and dtype [nats]. Sums are kept in float32 (float64 for float64); under
    autocast it computes in and returns float32, both as torch.log_softmax does. As there, a row
    that holds NaN or +inf, or -inf alone, is NaN; other -inf stay -inf. Raises ArgumentError for
    anything else. Source: Bridle 1990, in the log domain.
    """
    is_float_tensor("log_softmax", "x", x, min_dims=1)
    if not is_whole(dim) or not -x.dim() <= dim < x.dim():
        raise fail(
            "log_softmax", "dim", dim, f"x has {x.dim()} dims: pass {-x.dim()}..{x.dim() - 1}"
        )
    if autocast_dtype(x.device) is not None and x.dtype != torch.float64:
        x = x.float()
    return OP(x, dim % x.dim())


# -- log_softmax_topk ----------------------------------------------------------------------------


def topk_reference(x: Tensor, k: int) -> Pair:
    """The k largest of log_softmax(x), descending, the lowest ids where several are equal."""
    wide = x.to(accumulator(x.dtype))
    top = wide.amax(-1, keepdim=True)
    log_sum = (wide - top).exp().sum(-1, keepdim=True).log()
    sound = log_sum.isfinite()  # else all of log_softmax is NaN, and equal values stand in for it
    values = torch.where(sound, wide, 0.0)
    least = values.topk(k).values[..., -1:]
    above, equal = values > least, values == least
    room = k - above.sum(-1, keepdim=True)
    chosen = above | (equal & (equal.cumsum(-1) <= room))  # k in every row
    ids = chosen.nonzero()[:, -1].reshape(*x.shape[:-1], k)  # ascending
    best, order = values.gather(-1, ids).sort(stable=True, descending=True)
    scores = torch.where(sound, best - top - log_sum, torch.nan)
    return scores, ids.gather(-1, order)


def topk_backward(grad: Tensor, x: Tensor, ids: Tensor, needs: list[bool]) -> tuple[Tensor]:
    """dx = grad at the ids - softmax(x) * sum(grad)."""
    grad = grad.to(accumulator(x.dtype))
    dx = torch.softmax(x.to(grad.dtype), -1) * -grad.sum(-1, keepdim=True)
    return (dx.scatter(-1, ids, dx.gather(-1, ids) + grad).to(x.dtype),)


def _native_topk(x: Tensor, k: int) -> Pair:
    scores, ids = native.op("log_softmax_topk")(x, k)
    return scores, ids


def topk_cost(x: Tensor, k: int) -> Cost:
    """4 FLOPs and one element move forward, 5 FLOPs and two moves backward, per element of x."""
    n, moved = x.numel(), x.numel() * x.element_size()
    found = 12 * (n // max(x.shape[-1], 1)) * k  # a float32 score and an int64 id
    return Cost(4 * n, moved + found, 5 * n, 2 * moved + found)


def _fake_topk(x: Tensor, k: int) -> Pair:
    shape = (*x.shape[:-1], k)
    scores = x.new_empty(shape, dtype=accumulator(x.dtype))
    return scores, x.new_empty(shape, dtype=torch.int64)


TOPK = Op(
    "log_softmax_topk",
    schema="(Tensor x, int k) -> (Tensor scores, Tensor ids)",
    backward_schema="(Tensor grad, Tensor x, Tensor ids) -> Tensor",
    implementations=[
        Implementation(
            "triton",
            log_softmax_triton.topk,
            topk_backward,
            devices=("cuda",),
            missing=lazy_triton.missing,
            refuses=log_softmax_triton.refuses_topk,
        ),
        Implementation(
            "native", _native_topk, topk_backward, devices=("cpu",), missing=native.missing
        ),
        Implementation("reference", topk_reference, topk_backward),
    ],
    fake=_fake_topk,
    fake_backward=lambda grad, x, ids: (x.new_empty(x.shape),),
    save=lambda args, outputs: ((args[0], outputs[1]), ()),
    inputs_with_grad=(0,),
    cost=topk_cost,
)


def log_softmax_topk(x: Tensor, k: int) -> Pair:
    """The k largest log-probabilities of each row and where they are: log_softmax, then top-k.

    x: logits [..., V] float32, float16, bfloat16 or float64, any strides. k: 1 to V. Returns scores
    [..., k], float32 (float64 for float64) [nats], and ids [..., k] int64. A row is ordered by its
    values in x, largest first; among equal ones the lowest id wins. -inf counts as a value: a row
    with fewer than k finite ones ends in scores of -inf at the lowest ids that hold it. Where all
    of log_softmax is NaN (a row that holds NaN or +inf, or -inf alone) the scores are NaN and the
    ids 0 to k - 1. The scores have a gradient; the ids have none. Raises ArgumentError for anything
    else. Source: log_softmax as above, then the k first of a stable descending sort.
    """
    is_float_tensor("log_softmax_topk", "x", x, min_dims=1)
    if not is_whole(k) or not 1 <= k <= x.shape[-1]:
        takes = f"pass a whole number from 1 to x's last dim, {x.shape[-1]}"
        raise fail("log_softmax_topk", "k", repr(k), takes)
    scores, ids = TOPK(x, k)
    return scores, ids
