"""Softmax with scale, mask and causal limit fused: y = softmax(scale * x | mask) over one dim.

Memory contract: forward reads x once and writes y once, and reads the mask at its own size; it
saves y alone. Backward reads grad and y once, writes dx once: dx = scale * y * (g - sum(g * y)).
Work for M rows of N columns: 5MN FLOPs and 2MN elements of traffic forward, 4MN FLOPs and 3MN
elements backward. Memory bound everywhere. A row with nothing to attend to gives exactly 0.

Shapes: x [..., Sq, N]; mask broadcasts to x. Native: C++ on CPU, CUDA on GPU (csrc/softmax.*).
"""

import torch
from torch import Tensor

from . import native
from .checks import fail, is_flag, is_float_tensor, is_mask, is_number, is_whole
from .op import Cost, Implementation, Op, accumulator, autocast_dtype


def causal_limit(queries: int, keys: int, device: torch.device) -> Tensor:
    """Bool [queries, keys], True where key j <= query i + (keys - queries): bottom-right causal."""
    last_key = torch.arange(queries, device=device)[:, None] + (keys - queries)
    return torch.arange(keys, device=device)[None, :] <= last_key


def reference(x: Tensor, mask: Tensor | None, scale: float, causal: bool) -> tuple[Tensor]:
    """The definition, in torch: masked positions count as -inf, dead rows give 0."""
    scores = x.to(accumulator(x.dtype)) * scale
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -torch.inf)
    elif mask is not None:
        scores = scores + mask
    if causal:
        allowed = causal_limit(x.shape[-2], x.shape[-1], x.device)
        scores = scores.masked_fill(~allowed, -torch.inf)
    dead = (scores == -torch.inf).all(-1, keepdim=True)
    return (torch.softmax(scores, -1).masked_fill(dead, 0).to(x.dtype),)


def reference_backward(
    grad: Tensor, y: Tensor, scale: float, needs: list[bool]
) -> tuple[Tensor | None]:
    """dx = scale * y * (g - sum(g * y)), summed in float32 or wider."""
    wide = accumulator(y.dtype)
    g, p = grad.to(wide), y.to(wide)
    return ((scale * p * (g - (g * p).sum(-1, keepdim=True))).to(y.dtype),)


def _native_forward(x: Tensor, mask: Tensor | None, scale: float, causal: bool) -> tuple[Tensor]:
    return (native.op("softmax_forward")(x, mask, scale, causal),)


def _native_backward(
    grad: Tensor, y: Tensor, scale: float, needs: list[bool]
) -> tuple[Tensor | None]:
    return (native.op("softmax_backward")(grad, y, scale),)


def _native_refuses(x: Tensor, *_: object) -> str | None:
    if x.is_cuda and not native.built_for_cuda():
        return "the native extension was built without CUDA"
    if x.dim() > 17:
        return f"its row walk takes 16 dims before the last, x has {x.dim() - 1}"
    return None


def cost(x: Tensor, mask: Tensor | None, scale: float, causal: bool) -> Cost:
    """5 FLOPs and two element moves forward, 4 FLOPs and three moves backward, per element."""
    n, size = x.numel(), x.element_size()
    mask_bytes = 0 if mask is None else _own_elements(mask) * mask.element_size()
    return Cost(5 * n, 2 * n * size + mask_bytes, 4 * n, 3 * n * size)


def _own_elements(tensor: Tensor) -> int:
    """Elements really stored: stride-0 (broadcast) dims count once."""
    count = 1
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= length if stride else 1
    return count


OP = Op(
    "softmax",
    schema="(Tensor x, Tensor? mask, float scale, bool causal) -> Tensor",
    backward_schema="(Tensor grad, Tensor y, float scale) -> Tensor",
    implementations=[
        Implementation(
            "native",
            _native_forward,
            _native_backward,
            missing=native.missing,
            refuses=_native_refuses,
            refuses_backward=_native_refuses,
        ),
        Implementation("reference", reference, reference_backward),
    ],
    fake=lambda x, mask, scale, causal: torch.empty_like(x, memory_format=torch.contiguous_format),
    fake_backward=lambda grad, y, scale: (torch.empty_like(y),),
    save=lambda args, outputs: ((outputs[0],), (args[2],)),
    inputs_with_grad=(0,),
    cost=cost,
)


def softmax(
    x: Tensor,
    *,
    mask: Tensor | None = None,
    scale: float = 1.0,
    causal: bool = False,
    dim: int = -1,
) -> Tensor:
    """softmax(scale * x) over `dim`, over the positions that mask and causal leave.

    x: [..., Sq, N] float32, float16, bfloat16 or float64, any strides. mask: broadcastable to x;
    bool (True = attend) or float without gradient (added to scale * x, natural-log units).
    causal: query i of the Sq rows attends to key j when j <= i + (N - Sq); needs dim = -1.
    Returns a tensor of x's shape and dtype; a row with nothing to attend to is 0. Under autocast
    it computes in and returns float32, as torch.softmax does. Sums are kept in float32 (float64
    for float64). Raises ArgumentError for anything else. Source: Bridle 1990; masked as in
    Vaswani et al. 2017, section 3.2.3.
    """
    is_float_tensor("softmax", "x", x, min_dims=1)
    is_number("softmax", "scale", scale)
    is_flag("softmax", "causal", causal)
    if not is_whole(dim) or not -x.dim() <= dim < x.dim():
        raise fail("softmax", "dim", dim, f"x has {x.dim()} dims: pass {-x.dim()}..{x.dim() - 1}")
    if causal and (x.dim() < 2 or dim % x.dim() != x.dim() - 1):
        raise fail("softmax", "causal", f"True with dim={dim}", "it needs dim=-1 and 2+ dims")
    if autocast_dtype(x.device) is not None and x.dtype != torch.float64:
        x = x.float()
    if mask is not None:
        is_mask("softmax", mask, "x", x, x.shape, "the shape of x")
        if mask.dtype not in (torch.bool, x.dtype):
            mask = mask.to(accumulator(x.dtype))  # float16 would turn a finite -1e6 into -inf
    if dim % x.dim() == x.dim() - 1:
        return OP(x, mask, float(scale), causal)
    if mask is not None:
        mask = mask.broadcast_to(x.shape).movedim(dim, -1)
    return OP(x.movedim(dim, -1), mask, float(scale), causal).movedim(-1, dim)
