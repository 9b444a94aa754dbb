"""One linear layer with its activation, and the feed-forward block of two.

    linear_act:    h = x weight^T + bias         y = act(h)
    feed_forward:  h = x w1^T + b1               y = act(h) w2^T + b2

Memory contract: forward saves x, the weights and the pre-activation h, and nothing else of h's
size: backward takes act'(h) from h, and feed_forward computes act(h) a second time for dw2. relu
keeps act(h) instead, which tells as much; linear_act with identity keeps neither. Without
gradients act(h) overwrites h. Work for M rows: 2MKN FLOPs for linear_act, 4MKF for feed_forward
(K = N), and twice that backward, besides the activation. Bytes: each operand and result once.

Ways. torch: cuBLAS or oneDNN with the bias inside, then one elementwise pass. triton: one kernel
that adds bias and activation to the tile it still holds (feed_forward's second product stays with
cuBLAS). The epilogue saves two moves of [M, N], or one when h is kept; beside a product of 2MNK
FLOPs that is worth moves * s * RIDGE / 2K of the product's time, s bytes an element. No GPU has
measured it yet, so triton is chosen only where that exceeds what its product is assumed to lose.

Shapes: x [..., K], seen as [M, K]; weight [N, K]; w1, gate [F, K]; w2 [N, F]; h and y [..., N]
(h [..., F] in feed_forward).
Source: Vaswani et al. 2017, section 3.3; GELU: Hendrycks and Gimpel 2016; gates: Shazeer 2020.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import lazy_triton, linear_act_triton
from .checks import fail, has_shape, is_float_tensor, is_probability, matches
from .op import Cost, Implementation, Op, accumulator, autocast_dtype

aten = torch.ops.aten
RIDGE = 200  # FLOPs that a GPU does while it moves one byte: H200, 989 TFLOP/s over 4.8 TB/s
TRITON_LOSS = 0.25  # how much longer than cuBLAS's a Triton product is assumed to take
FEW_ROWS = 512  # below this a product is bound by the weight, not by its epilogue

Outputs = tuple[Tensor, Tensor]  # y and what is kept of h (empty when nothing is)
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]  # dx, dweight, dbias
Forward = Callable[[Tensor, Tensor, Tensor | None, str, bool], Outputs]
Backward = Callable[[Tensor, Tensor, Tensor, Tensor | None, str, list[bool]], Gradients]


# -- activations ---------------------------------------------------------------------------------


class Activation(NamedTuple):
    """An activation three times: formulas, torch's kernels, and what backward wants.

    formula(h), slope(h): act and its derivative, spelled out. value(h), overwrite(h): act, the
    latter in h's memory. gradient(grad, h) = grad * act'(h). keeps_h: backward needs h; where it is
    False slope and gradient take act(h) just as well. flops: of one element, transcendentals as 10.
    """

    formula: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]
    value: Callable[[Tensor], Tensor]
    overwrite: Callable[[Tensor], Tensor]
    gradient: Callable[[Tensor, Tensor], Tensor]
    keeps_h: bool
    flops: int


def _normal_cdf(h: Tensor) -> Tensor:
    return 0.5 * (1 + torch.erf(h / math.sqrt(2)))


def _gelu_slope(h: Tensor) -> Tensor:
    return _normal_cdf(h) + h * torch.exp(-0.5 * h * h) / math.sqrt(2 * math.pi)


def _tanh_cdf(h: Tensor) -> Tensor:
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))


def _gelu_tanh_slope(h: Tensor) -> Tensor:
    cdf = _tanh_cdf(h)
    return cdf + 2 * h * cdf * (1 - cdf) * math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * h * h)


def _swish_slope(h: Tensor, beta: float) -> Tensor:
    gate = torch.sigmoid(beta * h)
    return gate + beta * h * gate * (1 - gate)


ACTIVATIONS = {
    "gelu": Activation(
        formula=lambda h: h * _normal_cdf(h),
        slope=_gelu_slope,
        value=F.gelu,
        overwrite=aten.gelu_,
        gradient=aten.gelu_backward,
        keeps_h=True,
        flops=14,
    ),
    "gelu_tanh": Activation(
        formula=lambda h: h * _tanh_cdf(h),
        slope=_gelu_tanh_slope,
        value=lambda h: F.gelu(h, approximate="tanh"),
        overwrite=lambda h: aten.gelu_(h, approximate="tanh"),
        gradient=lambda grad, h: aten.gelu_backward(grad, h, approximate="tanh"),
        keeps_h=True,
        flops=18,
    ),
    "relu": Activation(
        formula=lambda h: h.clamp(min=0),
        slope=lambda y: (y > 0).to(y.dtype),
        value=torch.relu,
        overwrite=torch.relu_,
        gradient=lambda grad, y: aten.threshold_backward(grad, y, 0),
        keeps_h=False,
        flops=1,
    ),
    "silu": Activation(
        formula=lambda h: h * torch.sigmoid(h),
        slope=lambda h: _swish_slope(h, 1.0),
        value=F.silu,
        overwrite=aten.silu_,
        gradient=aten.silu_backward,
        keeps_h=True,
        flops=12,
    ),
    "quick_gelu": Activation(
        formula=lambda h: h * torch.sigmoid(1.702 * h),
        slope=lambda h: _swish_slope(h, 1.702),
        value=lambda h: torch.sigmoid_(h * 1.702).mul_(h),
        overwrite=lambda h: h.mul_(torch.sigmoid_(h * 1.702)),
        # h sigmoid(1.702 h) is silu(1.702 h) / 1.702, so its derivative is silu'(1.702 h)
        gradient=lambda grad, h: aten.silu_backward(grad, h * 1.702),
        keeps_h=True,
        flops=13,
    ),
    "identity": Activation(
        formula=lambda h: h,
        slope=torch.ones_like,
        value=lambda h: h,
        overwrite=lambda h: h,
        gradient=lambda grad, y: grad,
        keeps_h=False,
        flops=0,
    ),
}


def _as_rows(tensor: Tensor) -> Tensor:
    """[M, last dim], a view where the leading dims collapse into one stride."""
    return tensor.reshape(tensor.shape[:-1].numel(), tensor.shape[-1])


def _like_rows(rows: Tensor, x: Tensor) -> Tensor:
    """[M, N] back to [..., N] with the leading dims of x."""
    return rows.view(*x.shape[:-1], rows.shape[-1])


# -- reference -----------------------------------------------------------------------------------


def reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, training: bool
) -> Outputs:
    """linear_act by its definition, in float32 or wider."""
    act, wide = ACTIVATIONS[activation], accumulator(x.dtype)
    h = _as_rows(x).to(wide) @ weight.to(wide).t()
    h = _like_rows(h if bias is None else h + bias, x)
    kept = h.to(x.dtype) if training and act.keeps_h else x.new_empty(0)
    return act.formula(h).to(x.dtype), kept


def _linear_gradients(dh: Tensor, x: Tensor, weight: Tensor, needs: list[bool]) -> Gradients:
    """dx, dweight and dbias of h = x weight^T + bias from dh [M, N]."""
    return (
        (dh @ weight).view(x.shape) if needs[0] else None,
        dh.t() @ _as_rows(x) if needs[1] else None,
        dh.sum(0) if needs[2] else None,
    )


def reference_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    kept: Tensor | None,
    activation: str,
    needs: list[bool],
) -> Gradients:
    """dh = grad * act'(h), then the two products, in float32 or wider."""
    wide = accumulator(x.dtype)
    dh = _as_rows(grad).to(wide)
    if kept is not None:
        dh = dh * ACTIVATIONS[activation].slope(_as_rows(kept).to(wide))
    dx, dweight, dbias = _linear_gradients(dh, x.to(wide), weight.to(wide), needs)
    return (
        None if dx is None else dx.to(x.dtype),
        None if dweight is None else dweight.to(x.dtype),
        None if dbias is None else dbias.to(x.dtype),
    )


# -- torch's own kernels -------------------------------------------------------------------------


def _torch_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, training: bool
) -> Outputs:
    act = ACTIVATIONS[activation]
    h = F.linear(x, weight, bias)
    if training and act.keeps_h:
        return act.value(h), h
    return act.overwrite(h), x.new_empty(0)


def _torch_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    kept: Tensor | None,
    activation: str,
    needs: list[bool],
) -> Gradients:
    dh = _as_rows(grad)
    if kept is not None:
        dh = ACTIVATIONS[activation].gradient(dh, _as_rows(kept))
    return _linear_gradients(dh, x, weight, needs)


# -- triton --------------------------------------------------------------------------------------


def _triton_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, training: bool
) -> Outputs:
    y = x.new_empty((*x.shape[:-1], weight.shape[0]))
    h = torch.empty_like(y) if training and ACTIVATIONS[activation].keeps_h else None
    linear_act_triton.forward(_as_rows(x), weight, bias, activation, y, h)
    return y, x.new_empty(0) if h is None else h


def _triton_refuses(x: Tensor, *_: object) -> str | None:
    if x.dtype == torch.float64:
        return "float64 is computed by torch"
    if not x.is_cuda and x.dtype == torch.bfloat16:
        return "Triton's interpreter multiplies bfloat16 wrongly"
    return None


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


# -- linear_act ----------------------------------------------------------------------------------


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
            _triton_forward,
            _torch_backward,
            devices=("cuda",),
            missing=lazy_triton.missing,
            refuses=_triton_refuses,
            slower=_triton_slower,
            refuses_backward=lambda grad, x, *_: _triton_refuses(x),
        ),
        Implementation("torch", _torch_forward, _torch_backward),
        Implementation("reference", reference, reference_backward),
    ],
    fake=_fake,
    fake_backward=_fake_backward,
    save=_save,
    inputs_with_grad=(0, 1, 2),
    cost=cost,
)


# -- feed_forward --------------------------------------------------------------------------------


def _two_layers(first: Forward, second: Forward) -> Callable[..., Outputs]:
    """feed_forward's forward from two of linear_act's."""

    def forward(
        x: Tensor,
        w1: Tensor,
        b1: Tensor | None,
        w2: Tensor,
        b2: Tensor | None,
        activation: str,
        training: bool,
    ) -> Outputs:
        a, h = first(x, w1, b1, activation, training)
        y, nothing = second(a, w2, b2, "identity", False)
        kept = h if ACTIVATIONS[activation].keeps_h else a
        return y, kept if training else nothing

    return forward


def _two_layers_backward(layer: Backward) -> Callable[..., tuple[Tensor | None, ...]]:
    """feed_forward's backward from linear_act's."""

    def backward(
        grad: Tensor,
        x: Tensor,
        w1: Tensor,
        w2: Tensor,
        h: Tensor,
        activation: str,
        needs: list[bool],
    ) -> tuple[Tensor | None, ...]:
        act = ACTIVATIONS[activation]
        needs_a = any(needs[:3])
        a = act.value(h) if act.keeps_h and needs[3] else h  # a's shape does where a is not needed
        da, dw2, db2 = layer(grad, a, w2, None, "identity", [needs_a, *needs[3:]])
        del a  # as large as h
        if da is None:
            return None, None, None, dw2, db2
        return (*layer(da, x, w1, h, activation, needs[:3]), dw2, db2)

    return backward


def feed_forward_cost(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    activation: str,
    training: bool,
) -> Cost:
    """Both layers, without the traffic of a: it need not leave the chip."""
    (F_, K), N, M, size = w1.shape, w2.shape[0], x.shape[:-1].numel(), x.element_size()
    added = M * F_ * (ACTIVATIONS[activation].flops + (b1 is not None)) + M * N * (b2 is not None)
    biases = sum(0 if b is None else b.numel() for b in (b1, b2))
    read = M * K + F_ * K + N * F_ + biases
    products = 2 * M * F_ * (K + N)
    return Cost(
        products + added,
        (read + M * N + (M * F_ if training else 0)) * size,
        2 * products + 2 * added,
        (2 * read + M * N + M * F_) * size,
    )


def _feed_forward_fake(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    activation: str,
    training: bool,
) -> Outputs:
    lead = x.shape[:-1]
    h = x.new_empty((*lead, w1.shape[0])) if training else x.new_empty(0)
    return x.new_empty((*lead, w2.shape[0])), h


def _feed_forward_fake_backward(
    grad: Tensor, x: Tensor, w1: Tensor, w2: Tensor, h: Tensor, activation: str
) -> tuple[Tensor, ...]:
    shapes = (x.shape, w1.shape, w1.shape[:1], w2.shape, w2.shape[:1])
    return tuple(x.new_empty(shape) for shape in shapes)


FEED_FORWARD = Op(
    "feed_forward",
    schema=(
        "(Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, str activation, bool training)"
        " -> (Tensor y, Tensor h)"
    ),
    backward_schema=(
        "(Tensor grad, Tensor x, Tensor w1, Tensor w2, Tensor h, str activation)"
        " -> (Tensor dx, Tensor dw1, Tensor db1, Tensor dw2, Tensor db2)"
    ),
    implementations=[
        Implementation(
            "triton",
            _two_layers(_triton_forward, _torch_forward),
            _two_layers_backward(_torch_backward),
            devices=("cuda",),
            missing=lazy_triton.missing,
            refuses=_triton_refuses,
            slower=lambda x, w1, b1, w2, b2, activation, training: _triton_slower(
                x, w1, b1, activation, training
            ),
            refuses_backward=lambda grad, x, *_: _triton_refuses(x),
        ),
        Implementation(
            "torch",
            _two_layers(_torch_forward, _torch_forward),
            _two_layers_backward(_torch_backward),
        ),
        Implementation(
            "reference",
            _two_layers(reference, reference),
            _two_layers_backward(reference_backward),
        ),
    ],
    fake=_feed_forward_fake,
    fake_backward=_feed_forward_fake_backward,
    save=lambda args, outputs: ((args[0], args[1], args[3], outputs[1]), (args[5],)),
    inputs_with_grad=(0, 1, 2, 3, 4),
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
    for name, tensor in others.items():
        if tensor is not None:
            matches(op, name, tensor, "x", x)
    return [x, *others.values()]


def _training(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


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
    return LINEAR_ACT(x, weight, bias, activation, _training(x, weight, bias))[0]


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

    x: [..., K] float32, float16, bfloat16 or float64, any strides. w1, gate: [F, K]; b1: [F] or
    None; w2: [N, F]; b2: [N] or None; all of x's dtype. activation: as in linear_act. dropout_p:
    probability of zeroing an inner element, drawn from torch's generator at every call (pass 0 in
    evaluation). Returns [..., N] in x's dtype. Under autocast everything is cast to its dtype.
    With a gate or dropout the steps run one by one and each keeps what it needs for backward.
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
    if gate is None and dropout_p == 0:
        return FEED_FORWARD(x, w1, b1, w2, b2, activation, _training(x, w1, b1, w2, b2))[0]
    a = linear_act(x, w1, b1, activation=activation)
    if gate is not None:
        a = a * linear_act(x, gate, activation="identity")
    return linear_act(F.dropout(a, dropout_p), w2, b2, activation="identity")
