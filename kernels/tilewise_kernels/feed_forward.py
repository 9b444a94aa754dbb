"""One linear layer with its activation, and the feed-forward block of two, plain or gated.

    linear_act:    h = x weight^T + bias                    y = act(h)
    feed_forward:  h = x w1^T + b1      g = x gate^T        y = drop(act(h) * g) w2^T + b2

without the factor g where there is no gate. Between the products stands one pass (activations.py).

Memory contract: forward saves x, the weights and the pre-activation h (and g), and nothing else of
h's size: backward takes act'(h) from h, and feed_forward computes act(h) a second time for dw2.
Without gate and dropout relu keeps act(h) instead, which tells as much; linear_act with identity
keeps neither. Without gradients act(h) overwrites h. A backward that does not keep its graph
overwrites h and g with gradients and frees them as soon as it can, so that its peak is no higher
than that of separate layers. Work for M rows: 2MKN FLOPs for linear_act, 2MF(K + N) for
feed_forward (one more MFK with a gate), and twice that backward, besides the activation. Bytes:
each operand and result once.

Ways. native: oneDNN or MKL with the bias inside (few_rows.py where x has few rows), then one pass
of csrc/activation.cpp. torch: the same with torch's own kernels. triton: one kernel that adds bias
and activation to the tile it still holds; a gate or dropout takes an elementwise kernel after
cuBLAS's products, as backward does. The epilogue saves two moves of [M, N], or one when h is kept;
beside a product of 2MNK FLOPs that is worth moves * s * RIDGE / 2K of the product's time, s bytes
an element. No GPU has measured it yet, so triton is chosen only where that exceeds what its product
is assumed to lose; what it fuses beyond the epilogue loses nothing.

Shapes: x [..., K], seen as [M, K]; weight [N, K]; w1, gate [F, K]; w2 [N, F]; h and y [..., N]
(h and g [..., F] in feed_forward).
Source: Vaswani et al. 2017, section 3.3; gates: Shazeer 2020.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import activations, few_rows, lazy_triton, linear_act_triton, native
from .activations import ACTIVATIONS, Drop, Middle, Wanted
from .checks import fail, has_shape, is_float_tensor, is_probability, matches
from .dropout import draw_seed
from .launch import as_rows, refuses
from .op import Cost, Implementation, Op, accumulator, autocast_dtype, disposable, tracked

RIDGE = 200  # FLOPs that a GPU does while it moves one byte: H200, 989 TFLOP/s over 4.8 TB/s
TRITON_LOSS = 0.25  # how much longer than cuBLAS's a Triton product is assumed to take
FEW_ROWS = 512  # below this a product is bound by the weight, not by its epilogue

Outputs = tuple[Tensor, Tensor]  # y and what is kept of h (empty when nothing is)
Gradients = tuple[Tensor | None, ...]
Multiply = Callable[..., Tensor]  # as F.linear
NO_DROPOUT = Drop(None, 0.0)


def _like_rows(rows: Tensor, x: Tensor) -> Tensor:
    """[M, N] back to [..., N] with the leading dims of x."""
    return rows if x.dim() == 2 else rows.view(*x.shape[:-1], rows.shape[-1])


def _in_wide(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` computed in float32 or wider, its results in the dtype it was given."""

    def run(*args: Any) -> Any:
        dtype = args[0].dtype
        wide = [
            arg.to(accumulator(dtype)) if isinstance(arg, Tensor) and arg.dtype == dtype else arg
            for arg in args
        ]
        return tuple(None if found is None else found.to(dtype) for found in function(*wide))

    return run


# -- linear_act ----------------------------------------------------------------------------------


def _keeps(activation: str, training: bool) -> bool:
    """Whether linear_act's forward keeps h beside y."""
    return training and ACTIVATIONS[activation].keeps_h


def _linear(middle: Middle, multiply: Multiply = F.linear) -> Callable[..., Outputs]:
    """linear_act's forward: a product and what comes after it."""

    def forward(
        x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, training: bool
    ) -> Outputs:
        h = multiply(x, weight, bias)
        if activation == "identity":
            return h, x.new_empty(0)
        keeps = _keeps(activation, training)
        # without dropout and gate it is the same in every shape
        y = middle.forward(h.contiguous(), None, NO_DROPOUT, activation, not keeps)
        return y, h if keeps else x.new_empty(0)

    return forward


def _linear_backward(middle: Middle) -> Callable[..., Gradients]:
    """linear_act's backward: dh = grad * act'(h), then the products."""

    def backward(
        grad: Tensor,
        x: Tensor,
        weight: Tensor,
        kept: Tensor | None,
        activation: str,
        needs: list[bool],
    ) -> Gradients:
        dh = as_rows(grad)
        if kept is not None:
            private = disposable() and ACTIVATIONS[activation].keeps_h  # else it is y itself
            wanted = Wanted(a=False, dg=False, over_da=False, over_kept=private)
            dh, _, _ = middle.backward(dh, as_rows(kept), None, NO_DROPOUT, activation, wanted)
        return (
            _like_rows(dh @ weight, x) if needs[0] else None,
            dh.t() @ as_rows(x) if needs[1] else None,
            dh.sum(0) if needs[2] else None,
        )

    return backward


def _triton_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, training: bool
) -> Outputs:
    y = x.new_empty((*x.shape[:-1], weight.shape[0]))
    h = torch.empty_like(y) if _keeps(activation, training) else None
    linear_act_triton.forward(as_rows(x), weight, bias, activation, y, h)
    return y, x.new_empty(0) if h is None else h


def _triton_slower(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, training: bool
) -> str | None:
    """Where the epilogue is worth less than the product is assumed to lose (module docstring)."""
    if x.dtype == torch.float32:
        return "cuBLAS is assumed to multiply float32 faster"
    if x.shape[:-1].numel() < FEW_ROWS:
        return f"fewer than {FEW_ROWS} rows"
    moves = 1 if training and ACTIVATIONS[activation].keeps_h else 2
    worth = moves * x.element_size() * RIDGE / (2 * max(x.shape[-1], 1))
    if activation == "identity" or worth <= TRITON_LOSS:
        return "cuBLAS and one elementwise pass are assumed to beat the epilogue"
    return None


def cost(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, training: bool) -> Cost:
    """One product forward, two backward; each operand and result moved once."""
    (N, K), M, size = weight.shape, x.shape[:-1].numel(), x.element_size()
    act = ACTIVATIONS[activation]
    added = M * N * (act.flops + (bias is not None))
    h_moved = M * N if act.keeps_h else 0
    read = M * K + N * K + (0 if bias is None else N)
    return Cost(
        2 * M * N * K + added,
        (read + M * N + (h_moved if training else 0)) * size,
        4 * M * N * K + added,
        (2 * read + M * N + h_moved) * size,
    )


def _fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, training: bool
) -> Outputs:
    y = x.new_empty((*x.shape[:-1], weight.shape[0]))
    kept = training and ACTIVATIONS[activation].keeps_h
    return y, torch.empty_like(y) if kept else x.new_empty(0)


def _fake_backward(
    grad: Tensor, x: Tensor, weight: Tensor, kept: Tensor | None, activation: str
) -> tuple[Tensor, ...]:
    dx, dweight, dbias = x.shape, weight.shape, weight.shape[:1]
    return x.new_empty(dx), x.new_empty(dweight), x.new_empty(dbias)


def _save(args: Any, outputs: Any) -> tuple[tuple[Tensor | None, ...], tuple[Any, ...]]:
    x, weight, _, activation, _ = args
    kept = None if activation == "identity" else outputs[ACTIVATIONS[activation].keeps_h]
    return (x, weight, kept), (activation,)


LINEAR_ACT = Op(
    "linear_act",
    schema=(
        "(Tensor x, Tensor weight, Tensor? bias, str activation, bool training)"
        " -> (Tensor y, Tensor h)"
    ),
    backward_schema=(
        "(Tensor grad, Tensor x, Tensor weight, Tensor? kept, str activation)"
        " -> (Tensor dx, Tensor dweight, Tensor dbias)"
    ),
    implementations=[
        Implementation(
            "triton",
            _triton_linear,
            _linear_backward(activations.TRITON),
            devices=("cuda",),
            missing=lazy_triton.missing,
            refuses=lambda x, *_: refuses(x),
            slower=_triton_slower,
            refuses_backward=lambda grad, x, *_: refuses(x),
        ),
        Implementation(
            "native",
            _linear(activations.NATIVE, few_rows.multiply),
            _linear_backward(activations.NATIVE),
            devices=("cpu",),
            missing=native.missing,
        ),
        Implementation("torch", _linear(activations.TORCH), _linear_backward(activations.TORCH)),
        Implementation(
            "reference",
            _in_wide(_linear(activations.REFERENCE)),
            _in_wide(_linear_backward(activations.REFERENCE)),
        ),
    ],
    fake=_fake,
    fake_backward=_fake_backward,
    save=_save,
    inputs_with_grad=(0, 1, 2),
    cost=cost,
)


# -- feed_forward --------------------------------------------------------------------------------


def _keeps_a(gate: Tensor | None, seed: Tensor | None, activation: str) -> bool:
    """Whether act(h), which is a, tells backward as much as h does, and is kept instead."""
    return gate is None and seed is None and not ACTIVATIONS[activation].keeps_h


def _block(
    middle: Middle, multiply: Multiply = F.linear
) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """feed_forward's forward: products and what stands between them."""

    def forward(
        x: Tensor,
        w1: Tensor,
        b1: Tensor | None,
        w2: Tensor,
        b2: Tensor | None,
        gate: Tensor | None,
        seed: Tensor | None,
        activation: str,
        dropout_p: float,
        training: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        h = multiply(x, w1, b1)
        g = x.new_empty(0) if gate is None else multiply(x, gate)
        keeps_a = _keeps_a(gate, seed, activation)
        a = middle.forward(
            as_rows(h),
            None if gate is None else as_rows(g),
            Drop(seed, dropout_p),
            activation,
            keeps_a or not training,
        )
        y = _like_rows(multiply(a, w2, b2), x)
        if not training:
            return y, x.new_empty(0), x.new_empty(0)
        return y, _like_rows(a, x) if keeps_a else h, g

    return forward


def _triton_block(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    gate: Tensor | None,
    seed: Tensor | None,
    activation: str,
    dropout_p: float,
    training: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    if gate is not None or seed is not None:
        fused = _block(activations.TRITON)
        return fused(x, w1, b1, w2, b2, gate, seed, activation, dropout_p, training)
    a, h = _triton_linear(x, w1, b1, activation, training)
    kept = h if ACTIVATIONS[activation].keeps_h else a
    return F.linear(a, w2, b2), kept if training else x.new_empty(0), x.new_empty(0)


def _block_backward(middle: Middle) -> Callable[..., Gradients]:
    """feed_forward's backward: the second layer's, what stands between, the first layer's."""

    def backward(
        grad: Tensor,
        x: Tensor,
        w1: Tensor,
        w2: Tensor,
        gate: Tensor | None,
        h: Tensor,
        g: Tensor | None,
        seed: Tensor | None,
        activation: str,
        dropout_p: float,
        needs: list[bool],
    ) -> Gradients:
        needs_x, needs_w1, needs_b1, needs_w2, needs_b2, needs_gate = needs
        rows, x_rows, h = as_rows(grad), as_rows(x), as_rows(h)
        g = None if gate is None or g is None else as_rows(g)
        db2 = rows.sum(0) if needs_b2 else None
        drop, private = Drop(seed, dropout_p), disposable()
        if not (needs_x or needs_w1 or needs_b1 or needs_gate):
            a = middle.forward(h, g, drop, activation, private)
            return None, None, None, rows.t() @ a if needs_w2 else None, db2, None
        finds_a = needs_w2 and not _keeps_a(gate, seed, activation)
        wanted = Wanted(finds_a, needs_x or needs_gate, over_da=True, over_kept=private)
        dh, dg, found = middle.backward(rows @ w2, h, g, drop, activation, wanted)
        dw2 = rows.t() @ (h if found is None else found) if needs_w2 else None
        del found
        if private and dh.data_ptr() != h.data_ptr():
            h.untyped_storage().resize_(0)  # the caller's frames hold on to the tensor
        dx = dh @ w1 if needs_x else None
        dgate = None
        if gate is not None and dg is not None:
            dx = None if dx is None else dx.addmm_(dg, gate)
            dgate = dg.t() @ x_rows if needs_gate else None
        dw1 = dh.t() @ x_rows if needs_w1 else None
        db1 = dh.sum(0) if needs_b1 else None
        return None if dx is None else dx.view(x.shape), dw1, db1, dw2, db2, dgate

    return backward


def _block_slower(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    gate: Tensor | None,
    seed: Tensor | None,
    activation: str,
    dropout_p: float,
    training: bool,
) -> str | None:
    """Only the epilogue may be slower; a gate or dropout takes cuBLAS's products in either way."""
    if gate is not None or seed is not None:
        return None
    return _triton_slower(x, w1, b1, activation, training)


def feed_forward_cost(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    gate: Tensor | None,
    seed: Tensor | None,
    activation: str,
    dropout_p: float,
    training: bool,
) -> Cost:
    """Both layers, without the traffic of a: it need not leave the chip."""
    (F_, K), N, M, size = w1.shape, w2.shape[0], x.shape[:-1].numel(), x.element_size()
    gates = 0 if gate is None else 1
    added = M * F_ * (ACTIVATIONS[activation].flops + gates + (b1 is not None))
    added += M * N * (b2 is not None)
    biases = sum(0 if b is None else b.numel() for b in (b1, b2))
    read = M * K + (1 + gates) * F_ * K + N * F_ + biases
    products = 2 * M * F_ * ((1 + gates) * K + N)
    kept = (1 + gates) * M * F_
    return Cost(
        products + added,
        (read + M * N + (kept if training else 0)) * size,
        2 * products + 2 * added,
        (2 * read + M * N + kept) * size,
    )


def _block_fake(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    gate: Tensor | None,
    seed: Tensor | None,
    activation: str,
    dropout_p: float,
    training: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    inner = (*x.shape[:-1], w1.shape[0])
    h = x.new_empty(inner) if training else x.new_empty(0)
    g = x.new_empty(inner) if training and gate is not None else x.new_empty(0)
    return x.new_empty((*x.shape[:-1], w2.shape[0])), h, g


def _block_fake_backward(
    grad: Tensor,
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    gate: Tensor | None,
    h: Tensor,
    g: Tensor | None,
    seed: Tensor | None,
    activation: str,
    dropout_p: float,
) -> tuple[Tensor, ...]:
    shapes = (x.shape, w1.shape, w1.shape[:1], w2.shape, w2.shape[:1], w1.shape)
    return tuple(x.new_empty(shape) for shape in shapes)


def _block_save(args: Any, outputs: Any) -> tuple[tuple[Tensor | None, ...], tuple[Any, ...]]:
    x, w1, _, w2, _, gate, seed, activation, dropout_p, _ = args
    _, h, g = outputs
    return (x, w1, w2, gate, h, None if gate is None else g, seed), (activation, dropout_p)


FEED_FORWARD = Op(
    "feed_forward",
    schema=(
        "(Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, Tensor? gate, Tensor? seed,"
        " str activation, float dropout_p, bool training) -> (Tensor y, Tensor h, Tensor g)"
    ),
    backward_schema=(
        "(Tensor grad, Tensor x, Tensor w1, Tensor w2, Tensor? gate, Tensor h, Tensor? g,"
        " Tensor? seed, str activation, float dropout_p)"
        " -> (Tensor dx, Tensor dw1, Tensor db1, Tensor dw2, Tensor db2, Tensor dgate)"
    ),
    implementations=[
        Implementation(
            "triton",
            _triton_block,
            _block_backward(activations.TRITON),
            devices=("cuda",),
            missing=lazy_triton.missing,
            refuses=lambda x, *_: refuses(x),
            slower=_block_slower,
            refuses_backward=lambda grad, x, *_: refuses(x),
        ),
        Implementation(
            "native",
            _block(activations.NATIVE, few_rows.multiply),
            _block_backward(activations.NATIVE),
            devices=("cpu",),
            missing=native.missing,
        ),
        Implementation("torch", _block(activations.TORCH), _block_backward(activations.TORCH)),
        Implementation(
            "reference",
            _in_wide(_block(activations.REFERENCE)),
            _in_wide(_block_backward(activations.REFERENCE)),
        ),
    ],
    fake=_block_fake,
    fake_backward=_block_fake_backward,
    save=_block_save,
    inputs_with_grad=(0, 1, 2, 3, 4, 5),
    cost=feed_forward_cost,
)


# -- public functions ----------------------------------------------------------------------------


def _check_layer(
    op: str, x: Tensor, names: tuple[str, str], weight: Tensor, bias: Tensor | None, wide: str
) -> None:
    """Raise unless weight [out, columns of x] and bias [out] are float tensors that fit x."""
    is_float_tensor(op, names[0], weight)
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        got = f"of shape {list(weight.shape)}"
        raise fail(op, names[0], got, f"it must be [out, {x.shape[-1]}] ({wide})")
    if bias is not None:
        is_float_tensor(op, names[1], bias)
        has_shape(op, names[1], bias, weight.shape[:1], f"the rows of {names[0]}")


def _check_activation(op: str, activation: object) -> None:
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise fail(op, "activation", repr(activation), f"pass one of {', '.join(ACTIVATIONS)}")


def _cast(op: str, x: Tensor, others: dict[str, Tensor | None]) -> list[Any]:
    """x and the others as autocast wants them; raises unless all agree in device and dtype."""
    dtype = autocast_dtype(x.device)
    if dtype is not None and x.dtype != torch.float64:
        x = x.to(dtype)
        others = {name: None if t is None else t.to(dtype) for name, t in others.items()}
    dtype, device = x.dtype, x.device
    for name, tensor in others.items():
        if tensor is not None and (tensor.dtype != dtype or tensor.device != device):
            matches(op, name, tensor, "x", x)
    return [x, *others.values()]


def linear_act(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str = "gelu"
) -> Tensor:
    """act(x weight^T + bias).

    x: [..., K] float32, float16, bfloat16 or float64, any strides. weight: [N, K], bias: [N] or
    None, of x's dtype. activation: gelu (with erf), gelu_tanh, relu, silu, quick_gelu or identity.
    Returns [..., N] in x's dtype. Under autocast everything is cast to its dtype, as F.linear does.
    Raises ArgumentError for anything else. Sources: module docstring.
    """
    is_float_tensor("linear_act", "x", x)
    _check_activation("linear_act", activation)
    _check_layer("linear_act", x, ("weight", "bias"), weight, bias, "the last dim of x")
    x, weight, bias = _cast("linear_act", x, {"weight": weight, "bias": bias})
    return LINEAR_ACT(x, weight, bias, activation, tracked((x, weight, bias)))[0]


def feed_forward(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    *,
    activation: str = "gelu",
    gate: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """dropout(act(x w1^T + b1) * (x gate^T)) w2^T + b2, without the factor when gate is None.

    activation="silu" with a gate is SwiGLU, gelu or gelu_tanh GEGLU, relu ReGLU.

    x: [..., K] float32, float16, bfloat16 or float64, any strides. w1, gate: [F, K]; b1: [F] or
    None; w2: [N, F]; b2: [N] or None; all of x's dtype. activation: as in linear_act. dropout_p:
    probability of zeroing an inner element; which ones follows from a seed drawn from torch's
    generator at every call, so that backward and a recomputing checkpoint find them again (pass 0
    in evaluation). Returns [..., N] in x's dtype. Under autocast everything is cast to its dtype.
    Raises ArgumentError for anything else. Sources: module docstring.
    """
    is_float_tensor("feed_forward", "x", x)
    _check_activation("feed_forward", activation)
    is_probability("feed_forward", "dropout_p", dropout_p)
    _check_layer("feed_forward", x, ("w1", "b1"), w1, b1, "the last dim of x")
    if gate is not None:
        is_float_tensor("feed_forward", "gate", gate)
        has_shape("feed_forward", "gate", gate, w1.shape, "the shape of w1")
    _check_layer("feed_forward", w1.t(), ("w2", "b2"), w2, b2, "the rows of w1")
    others = {"w1": w1, "b1": b1, "w2": w2, "b2": b2, "gate": gate}
    x, w1, b1, w2, b2, gate = _cast("feed_forward", x, others)
    seed = draw_seed(x.device) if dropout_p > 0 else None
    training = tracked((x, w1, b1, w2, b2, gate))
    arguments = (x, w1, b1, w2, b2, gate, seed, activation, float(dropout_p), training)
    return FEED_FORWARD(*arguments)[0]
