"""Linear with a weight packed once, for decoding: y = x W^T + b over few rows, inference only.

The weight is packed in float32, bfloat16 or int8. Float32 and bfloat16: x is rounded to that dtype,
products are summed in float32. int8, symmetric, with a scale for each column n of W and, found
anew in each call, for each row m of x:

    qw = round(W / sw),  sw[n] = max_k |W[n, k]| / 127        qx likewise, sx[m]
    y  = sx[m] sw[n] (qx . qw) + b[n]                         the dot product exact, in int32

so that |y - y_exact| <= (sx sum_k |W| + sw sum_k |x| + K sx sw / 2) / 2. A row of x that is not
finite gives a row of NaN; a row of x or W that holds nothing of 2^-100 or more counts as zero.

On a CPU with AVX-512, and its dot products of the dtype (csrc/linear.cpp), the weight is stored in
panels of 48 columns, in the order in which they are multiplied, with its bias or int8 compensation
ahead of each:
[ceil(N / 48), 1 + ceil(K / G), 48, G], G = 1, 2 or 4 elements in 32 bits. Elsewhere it stays as it
is and torch multiplies it (cuBLASLt, oneDNN). From panels, a row's bits depend on no other row and
not on the number of threads.

Memory contract: reads the packed weight and x once, writes y once. 2MNK FLOPs. A CPU is bound by
memory below about 10 rows (of weights that no cache holds), by its multiply-adds from there on.

Shapes: x [..., K] (M rows), W [N, K], b [N], y [..., N].
"""

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from . import native
from .checks import fail, has_shape, is_float_tensor, same_device, shape_of
from .op import Cost, Implementation, Op, warn_once

PANEL = 48
TINY = 2.0**-100
PACKED_DTYPES = (torch.float32, torch.bfloat16, torch.int8)
_NEEDS = {  # of a CPU, for panels; ATEN_CPU_CAPABILITY may withhold AVX-512
    torch.float32: "AVX-512",
    torch.bfloat16: "AVX-512 bfloat16 dot products, and without AMX, which torch uses",
    torch.int8: "AVX-512 VNNI",
}
_MOST_INT8_K = 2**31 // (127 * 127)  # beyond, an int32 sum might wrap


@dataclass(frozen=True, eq=False, repr=False)
class PackedLinear:
    """What pack_linear makes and linear multiplies by. Tensors only: it copies and pickles.

    weight: in panels, or [N, K] (int8: filled up with zeros to multiples of 8). scale [N] float32:
    of int8 only. bias [N]: float32, or of weight's dtype where torch adds it. shape: (N, K).
    """

    weight: Tensor
    scale: Tensor | None
    bias: Tensor | None
    shape: tuple[int, int]

    @property
    def dtype(self) -> torch.dtype:
        """What the weight is packed in."""
        return self.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the weight lies, and x must."""
        return self.weight.device

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(t.nbytes for t in (self.weight, self.scale, self.bias) if t is not None)

    def __repr__(self) -> str:
        n, k = self.shape
        layout = "panels" if _in_panels(self.weight) else "plain"
        bias = "no bias" if self.bias is None else "bias"
        return f"PackedLinear([{n}, {k}], {self.dtype}, {bias}, {layout}, {self.device})"


# ---- packing -------------------------------------------------------------------------------------


def _in_panels(weight: Tensor) -> bool:
    return weight.dim() == 4


def _to_panels(weight: Tensor, start: Tensor) -> Tensor:
    """weight [N, K] and what each column's sum starts from, [N] in 32 bits, as panels."""
    g = 4 // weight.element_size()
    panels, steps = -(-weight.shape[0] // PANEL), -(-weight.shape[1] // g)
    more = panels * PANEL - weight.shape[0]
    words = F.pad(weight, (0, steps * g - weight.shape[1], 0, more))
    words = words.view(panels, PANEL, steps, g)
    first = F.pad(start, (0, more)).view(panels, 1, PANEL, 1).view(weight.dtype)
    return torch.cat([first, words.transpose(1, 2)], 1)


def _from_panels(panels: Tensor, n: int, k: int) -> Tensor:
    """The weight [N, K] again."""
    return panels[:, 1:].transpose(1, 2).flatten(2).flatten(0, 1)[:n, :k]


def _quantise(rows: Tensor) -> tuple[Tensor, Tensor]:
    """int8 [M, K] and float32 scales [M], so that rows = int8 * scale but for rounding."""
    rows = rows.float()
    largest = rows.abs().amax(1)
    top = torch.full_like(largest, 127)  # 127 / largest would multiply by a rounded reciprocal
    factor = torch.where(largest >= TINY, top / largest, 0)
    quantised = (rows * factor[:, None]).round().nan_to_num(0, 0, 0).to(torch.int8)
    scale = torch.where(largest < TINY, 0, largest / 127).masked_fill(largest.isinf(), torch.nan)
    return quantised, scale


@functools.cache
def _no_panels(device: str, dtype: torch.dtype) -> str | None:
    """Why weights of `dtype` are not packed in panels on this type of device, or None."""
    if device != "cpu":
        return f"panels are for the CPU, not for {device}"
    if native.missing() is not None:
        return native.missing()
    if not native.op("linear_runs")(dtype):
        return f"{dtype} needs a CPU with {_NEEDS[dtype]}"
    return None


def pack_linear(
    weight: Tensor, bias: Tensor | None = None, dtype: torch.dtype | None = None
) -> PackedLinear:
    """Pack a weight once for many calls of `linear`. The result holds copies.

    weight: [N, K] float32, bfloat16 or float16, K at least 1. bias: [N] of such a dtype. dtype:
    float32, bfloat16, int8, or None for weight's own (float16 becomes float32 on a CPU, exactly).
    Raises ArgumentError for anything else, and for int8 if the weight holds NaN or infinity.
    """
    is_float_tensor("pack_linear", "weight", weight, min_dims=2)
    _check_weight(weight, bias, dtype)
    if dtype is None:
        half_on_cpu = weight.dtype == torch.float16 and weight.device.type == "cpu"
        dtype = torch.float32 if half_on_cpu else weight.dtype
    obstacle = _no_panels(weight.device.type, dtype)
    if weight.device.type == "cpu" and native.missing() is not None:
        warn_once(f"tilewise: pack_linear leaves the weight to torch: {obstacle}")
    scale = None
    if dtype == torch.int8:
        packed, scale = _quantise(weight.detach())
        start = packed.sum(1, dtype=torch.int32) * -128
    else:
        packed = weight.detach().to(dtype, copy=True, memory_format=torch.contiguous_format)
        start = weight.new_zeros(weight.shape[0]) if bias is None else bias.detach()
        start = start.float()
    if bias is not None:
        added_in = torch.float32 if obstacle is None or dtype == torch.int8 else dtype
        bias = bias.detach().to(added_in, copy=True, memory_format=torch.contiguous_format)
    n, k = weight.shape
    if obstacle is None:
        packed = _to_panels(packed, start)
    elif dtype == torch.int8:
        packed = F.pad(packed, (0, -k % 8, 0, -n % 8))  # as cuBLASLt takes it
    return PackedLinear(packed, scale, bias, (n, k))


def _check_weight(weight: Tensor, bias: Tensor | None, dtype: torch.dtype | None) -> None:
    op = "pack_linear"
    if weight.dim() != 2 or weight.shape[1] == 0:
        raise fail(op, "weight", f"of shape {shape_of(weight)}", "it must be [N, K], K at least 1")
    if weight.dtype == torch.float64:
        raise fail(op, "weight", weight.dtype, "pass float32, bfloat16 or float16")
    if dtype is not None and dtype not in PACKED_DTYPES:
        raise fail(op, "dtype", dtype, "pass torch.float32, bfloat16, int8 or None")
    if bias is not None:
        is_float_tensor(op, "bias", bias)
        if bias.dtype == torch.float64:
            raise fail(op, "bias", bias.dtype, "pass float32, bfloat16 or float16")
        same_device(op, "bias", bias, "weight", weight)
        has_shape(op, "bias", bias, weight.shape[:1], "N")
    if dtype == torch.int8 and not weight.isfinite().all():
        raise fail(op, "weight", "not finite", "int8 needs finite values: pass dtype=None")
    if dtype == torch.int8 and weight.shape[1] > _MOST_INT8_K:
        raise fail(op, "K", weight.shape[1], f"int8 sums hold {_MOST_INT8_K}: pass bfloat16")


# ---- multiplying ---------------------------------------------------------------------------------


def reference(
    x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, n: int
) -> tuple[Tensor]:
    """The definition, in torch, from either layout: float32 products, or exact integer ones."""
    k = x.shape[-1]
    plain = _from_panels(weight, n, k) if _in_panels(weight) else weight[:n, :k]
    if scale is None:
        y = x.to(plain.dtype).float() @ plain.float().T
    else:
        rows, row_scale = _quantise(x.reshape(-1, k))
        sums = (rows.double() @ plain.double().T).float()
        y = (sums * (row_scale[:, None] * scale)).view(*x.shape[:-1], n)
    return ((y if bias is None else y + bias.float()).to(x.dtype),)


def _native(
    x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, n: int
) -> tuple[Tensor]:
    return (native.op("linear")(x, weight, scale, bias, n),)


def _torch(
    x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, n: int
) -> tuple[Tensor]:
    """cuBLASLt on CUDA, oneDNN or MKL on the CPU."""
    if scale is None:
        return (F.linear(x.to(weight.dtype), weight, bias).to(x.dtype),)
    rows, row_scale = _quantise(x.reshape(-1, x.shape[-1]))
    m, k = rows.shape
    padded = F.pad(rows, (0, weight.shape[1] - k, 0, max(0, 17 - m)))  # cuBLASLt takes 17 or more
    sums = torch._int_mm(padded, weight.t())[:m, :n]
    y = sums * (row_scale[:, None] * scale)
    return ((y if bias is None else y + bias).to(x.dtype).view(*x.shape[:-1], n),)


def _plain(x: Tensor, weight: Tensor, *_: object) -> str | None:
    if _in_panels(weight):
        return None
    obstacle = _no_panels(weight.device.type, weight.dtype)
    return "the weight is not packed in panels" + (f": {obstacle}" if obstacle else "")


def _panels(x: Tensor, weight: Tensor, *_: object) -> str | None:
    return "the weight is packed in panels" if _in_panels(weight) else None


def _native_refuses(x: Tensor, weight: Tensor, *_: object) -> str | None:
    return _plain(x, weight) or _no_panels("cpu", weight.dtype)


def cost(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, n: int) -> Cost:
    """2MNK FLOPs; the weight, x and y once."""
    rows = x.numel() // x.shape[-1]
    moved = weight.nbytes + (x.numel() + rows * n) * x.element_size()
    return Cost(2 * x.numel() * n, moved, 0, 0)


OP = Op(
    "linear",
    schema="(Tensor x, Tensor weight, Tensor? scale, Tensor? bias, int n) -> Tensor",
    implementations=[
        Implementation(
            "native",
            _native,
            devices=("cpu",),
            missing=native.missing,
            refuses=_native_refuses,
            slower=_plain,
        ),
        Implementation("torch", _torch, refuses=_panels, slower=_panels),
        Implementation("reference", reference),
    ],
    fake=lambda x, weight, scale, bias, n: x.new_empty(*x.shape[:-1], n),
    cost=cost,
)


def linear(x: Tensor, packed: PackedLinear) -> Tensor:
    """x W^T + b with a weight that pack_linear packed; inference only.

    x: [..., K] float32, bfloat16 or float16 on packed's device, any strides. Returns [..., N] in
    x's dtype: x is rounded to a float32 or bfloat16 weight's dtype, or quantised row by row for an
    int8 weight (module docstring); sums are float32, or exact. Autocast changes nothing: the packed
    dtype says what is computed. Raises ArgumentError for anything else, and where x would need a
    gradient. Source of the int8 scheme: Zafrir et al. 2019, with a scale per row and column.
    """
    is_float_tensor("linear", "x", x)
    if not isinstance(packed, PackedLinear):
        raise fail("linear", "packed", type(packed).__name__, "pass what pack_linear returned")
    n, k = packed.shape
    if x.shape[-1] != k:
        raise fail("linear", "x", f"of shape {shape_of(x)}", f"its last dim must be {k} (K)")
    if x.dtype == torch.float64:
        raise fail("linear", "x", x.dtype, "pass float32, bfloat16 or float16")
    same_device("linear", "x", x, "packed", packed.weight)
    if x.requires_grad and torch.is_grad_enabled():
        raise fail(
            "linear",
            "x",
            "one that requires grad",
            "a packed weight is for inference: use torch.no_grad(), x.detach() or F.linear",
        )
    return OP(x, packed.weight, packed.scale, packed.bias, n)
