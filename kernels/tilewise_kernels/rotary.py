"""Rotary position embedding of queries and keys: each pair of columns turns by its token's angle.

    (a, b) -> (a cos - b sin, b cos + a sin)

for the pairs (j, j + R/2) of GPT-NeoX and LLaMA, or (2j, 2j + 1) of GPT-J where interleaved. The
first R columns turn; those past them are copied. Computed in float32 (float64 for float64).

Memory contract: q and k are read once and written once, in their own memory layout; cos and sin are
saved and nothing else, since backward turns the gradient by the opposite angle. Work for n turning
elements: 3n FLOPs; traffic: every element read and written, cos and sin read once. Memory bound.

Shapes: q [B, Hq, S, D]; k [B, Hkv, S, D]; cos, sin [S, R/2], or [B or 1, S, R/2], with R <= D.
Source: Su et al. 2021 (RoFormer), equation 34; half-split pairs: Black et al. 2022 (GPT-NeoX).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import lazy_triton, native, rotary_triton
from .checks import fail, is_flag, is_float_tensor, matches, same_device, shape_of
from .launch import refuses
from .op import Cost, Implementation, Op, accumulator, autocast_dtype

# -- reference -----------------------------------------------------------------------------------


def _turn(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x [B, H, S, D] turned, in float32 or wider."""
    wide = accumulator(x.dtype)
    cos, sin = cos.to(wide).unsqueeze(-3), sin.to(wide).unsqueeze(-3)
    turning, rest = x[..., : 2 * cos.shape[-1]].to(wide), x[..., 2 * cos.shape[-1] :]
    pairs = turning.unflatten(-1, (-1, 2) if interleaved else (2, -1))
    dim = -1 if interleaved else -2
    a, b = pairs.unbind(dim)
    turned = torch.stack([a * cos - b * sin, b * cos + a * sin], dim).flatten(-2)
    return torch.cat([turned.to(x.dtype), rest], -1)


def reference(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool
) -> tuple[Tensor, Tensor]:
    """The definition, in torch."""
    return _turn(q, cos, sin, interleaved), _turn(k, cos, sin, interleaved)


def reference_turn_back(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool
) -> tuple[Tensor, Tensor]:
    """q [B, Hq, S, D] and k [B, Hkv, S, D] turned the other way: the gradient's rotation."""
    return reference(q, k, cos, -sin, interleaved)


# -- native --------------------------------------------------------------------------------------


def _native(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool
) -> tuple[Tensor, Tensor]:
    turn = native.op("rotary")
    return turn(q, cos, sin, interleaved, False), turn(k, cos, sin, interleaved, False)


def _native_turn_back(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool
) -> tuple[Tensor, Tensor]:
    turn = native.op("rotary")
    return turn(q, cos, sin, interleaved, True), turn(k, cos, sin, interleaved, True)


# -- the op --------------------------------------------------------------------------------------


def _backward(turn_back: Any) -> Any:
    """The op's backward on top of a function that turns two tensors back."""

    def backward(
        grad_q: Tensor | None,
        grad_k: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        interleaved: bool,
        q_shape: Sequence[int],
        k_shape: Sequence[int],
        needs: list[bool],
    ) -> tuple[Tensor | None, ...]:
        given = grad_k if grad_q is None else grad_q
        assert given is not None, "a backward without any gradient"
        grads = [
            given.new_zeros(shape) if grad is None else grad
            for grad, shape in ((grad_q, q_shape), (grad_k, k_shape))
        ]
        found: tuple[Tensor, Tensor] = turn_back(*grads, cos, sin, interleaved)
        return found

    return backward


def cost(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Cost:
    """3 FLOPs per turning element; q and k moved twice, cos and sin once, either way."""
    rows, columns = q.shape[:-1].numel() + k.shape[:-1].numel(), 2 * cos.shape[-1]
    tables = 2 * cos.numel() * cos.element_size()
    moved = 2 * (q.numel() + k.numel()) * q.element_size() + tables
    return Cost(3 * rows * columns, moved, 3 * rows * columns, moved)


def _fake(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _fake_backward(
    grad_q: Tensor | None,
    grad_k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool,
    q_shape: Sequence[int],
    k_shape: Sequence[int],
) -> tuple[Tensor, Tensor]:
    given = grad_k if grad_q is None else grad_q
    assert given is not None, "a backward without any gradient"
    return given.new_empty(q_shape), given.new_empty(k_shape)


def _save(args: Any, outputs: Any) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
    q, k, cos, sin, interleaved = args
    return (cos, sin), (interleaved, q.shape, k.shape)


OP = Op(
    "rotary",
    schema=(
        "(Tensor q, Tensor k, Tensor cos, Tensor sin, bool interleaved)"
        " -> (Tensor turned_q, Tensor turned_k)"
    ),
    backward_schema=(
        "(Tensor? grad_q, Tensor? grad_k, Tensor cos, Tensor sin, bool interleaved,"
        " SymInt[] q_shape, SymInt[] k_shape) -> (Tensor dq, Tensor dk)"
    ),
    implementations=[
        Implementation(
            "triton",
            rotary_triton.turn,
            _backward(rotary_triton.turn_back),
            devices=("cuda",),
            missing=lazy_triton.missing,
            refuses=lambda q, *_: refuses(q),
            refuses_backward=lambda grad_q, grad_k, *_: refuses(
                grad_k if grad_q is None else grad_q
            ),
        ),
        Implementation(
            "native",
            _native,
            _backward(_native_turn_back),
            devices=("cpu",),
            missing=native.missing,
        ),
        Implementation("reference", reference, _backward(reference_turn_back)),
    ],
    fake=_fake,
    fake_backward=_fake_backward,
    save=_save,
    inputs_with_grad=(0, 1),
    outputs_with_grad=2,
    cost=cost,
)


def _check_heads(name: str, x: Tensor) -> None:
    is_float_tensor("rotary", name, x)
    if x.dim() != 4:
        raise fail("rotary", name, f"of shape {shape_of(x)}", "it must be [B, heads, S, D]")


def _check_table(name: str, table: Tensor, q: Tensor) -> None:
    """Raise unless `table` is one of cosines or sines for q, without gradient."""
    is_float_tensor("rotary", name, table)
    same_device("rotary", name, table, "q", q)
    if table.requires_grad:
        raise fail("rotary", name, "one that requires grad", f"it takes none: {name}.detach()")
    B, _, S, D = q.shape
    per_batch = table.dim() == 3 and (table.shape[0] == B or table.shape[0] == 1)
    if (table.dim() != 2 and not per_batch) or table.shape[-2] != S or 2 * table.shape[-1] > D:
        raise fail(
            "rotary",
            name,
            f"of shape {shape_of(table)}",
            f"pass [S, R/2] or [B, S, R/2] with B {B}, S {S} and R at most {D}: one number for each"
            " pair of columns (of a table that repeats them, the first half)",
        )


def rotary(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False
) -> tuple[Tensor, Tensor]:
    """Queries and keys with the first R of their D columns turned by each token's angles.

    q: [B, Hq, S, D] float32, float16, bfloat16 or float64, any strides. k: [B, Hkv, S, D], of q's
    dtype. cos, sin: [S, R/2] shared by the batch, or [B, S, R/2] for positions of each sequence's
    own ([1, S, R/2] is shared too); R at most D; cosine and sine of position * theta_j in radians,
    any float dtype, without gradient. interleaved: pair columns (2j, 2j + 1) instead of
    (j, j + R/2). Returns (q', k') in their shapes and dtype, in the memory layout of q and k where
    that is dense; columns past R are unchanged. Under autocast q and k are cast to its dtype, which
    the attention after it would do. Raises ArgumentError for anything else. Source: module
    docstring.
    """
    _check_heads("q", q)
    _check_heads("k", k)
    is_flag("rotary", "interleaved", interleaved)
    matches("rotary", "k", k, "q", q)
    (B, _, S, D), k_shape = q.shape, k.shape
    if k_shape[0] != B or k_shape[2] != S or k_shape[3] != D:
        got, takes = f"of shape {shape_of(k)}", f"it must be [{B}, heads, {S}, {D}] (as q is)"
        raise fail("rotary", "k", got, takes)
    _check_table("cos", cos, q)
    _check_table("sin", sin, q)
    if sin.shape != cos.shape:
        raise fail("rotary", "sin", f"of shape {shape_of(sin)}", f"cos is {shape_of(cos)}")
    dtype = autocast_dtype(q.device)
    if dtype is not None and q.dtype != torch.float64:
        q, k = q.to(dtype), k.to(dtype)
    found: tuple[Tensor, Tensor] = OP(q, k, cos, sin, interleaved)
    return found
