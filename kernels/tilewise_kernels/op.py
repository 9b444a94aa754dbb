"""What an op is: a reference, the implementations that compete with it, a cost, and a chooser.

An op file builds one `Op`. Its canonical arguments are the positional arguments of the schema;
the public function checks and normalises what the caller gave and then calls the Op with them.

    public function -> Op.__call__ -> eager:     autograd.Function -> chosen Implementation
                                   -> otherwise: torch.ops.tilewise.NAME -> chosen Implementation

The eager way skips torch's dispatcher, whose Python boundary costs more than a small kernel. It
steps aside whenever something wants to see the op: torch.compile and export, a dispatch mode,
functorch, tensor subclasses. Both ways end in the same Implementation, so the results are equal.
torch.func's transforms see the registered op through an autograd.Function of their own kind.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .errors import ArgumentError, KernelUnavailable
from .lazy_triton import interpreted

Outputs = tuple[Tensor, ...]
Reason = str | None  # why not, or None when nothing stands in the way

_library = torch.library.Library("tilewise", "DEF")  # noqa: TOR901  lives as long as the process


@dataclass(frozen=True)
class Cost:
    """The least work a call must do: floating-point operations and bytes of memory traffic."""

    flops: int
    bytes: int
    backward_flops: int
    backward_bytes: int


def _nothing(*_: object) -> Reason:
    return None


def _no_backward(*_: object) -> Any:
    raise NotImplementedError("this op has no gradient")


@dataclass(frozen=True)
class Implementation:
    """One way to compute an op.

    forward(*args) returns a tuple of outputs; backward(*backward_args) a tuple of gradients.
    missing() says what this machine lacks, refuses(*args) what the call has that this way cannot
    take, slower(*args) why a later way measures faster for this call. The first two warn once
    when they turn a preferred way away; the third is a choice, not a loss. What both refuses and
    slower give is no warning, but an error under force(): a call that this way was never made for.
    """

    name: str
    forward: Callable[..., Outputs]
    backward: Callable[..., tuple[Tensor | None, ...]] = _no_backward
    devices: tuple[str, ...] = ("cpu", "cuda")
    missing: Callable[[], Reason] = _nothing
    refuses: Callable[..., Reason] = _nothing
    slower: Callable[..., Reason] = _nothing
    refuses_backward: Callable[..., Reason] = _nothing

    def absent(self, device: str) -> Reason:
        """Why this way is not to be had on `device` at all."""
        on_interpreter = self.name == "triton" and device == "cpu" and interpreted()
        if device not in self.devices and not on_interpreter:
            return f"runs on {' and '.join(self.devices)}, not on {device}"
        return self.missing()


@dataclass(frozen=True)
class Explanation:
    """Which implementation a call would run, and why each other one would not."""

    op: str
    implementation: str
    others: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{self.op}: {self.implementation}"]
        return "\n".join(lines + [f"  not {name}: {why}" for name, why in self.others.items()])


class _Forced(threading.local):
    """The implementation pinned per op name ("" = every op) in this thread."""

    def __init__(self) -> None:
        self.names: dict[str, str] = {}

    def implementation(self, op: str) -> str | None:
        return self.names.get(op) or self.names.get("")


class _Observers(threading.local):
    """Functions called with each eager op call of this thread, before it runs."""

    def __init__(self) -> None:
        self.functions: list[Callable[[Op, tuple[Any, ...]], None]] = []


class _Backward(threading.local):
    """Whether the backward that runs in this thread may overwrite what its forward made."""

    disposable = False


_forced = _Forced()
_observing = _Observers()
_backward = _Backward()
_warned: set[str] = set()
_ops: dict[str, Op] = {}


def warn_once(message: str) -> None:
    """Emit `message` as a RuntimeWarning the first time it is seen in this process."""
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, RuntimeWarning, stacklevel=2)


_PLAIN = frozenset({Tensor, torch.nn.Parameter, type(None), bool, int, float, str})
_is_compiling = torch.compiler.is_compiling
_dispatch_modes = torch._C._len_torch_dispatch_stack
_any_autocast = torch._C._is_any_autocast_enabled
_transform = torch._C._functorch.peek_interpreter_stack
_graph_is_kept = torch._C._autograd._get_current_graph_task_keep_graph
_saving_hooks = torch._C._autograd._top_saved_tensors_default_hooks
_legacy_batched = torch._C._functorch.is_legacy_batchedtensor
# makes a view a tensor of its own: a view may not change in place
_unsafe_view = torch.ops.aten._unsafe_view.default._op


def plain_eager(args: Sequence[Any]) -> bool:
    """Whether nothing is watching: compiler, dispatch mode, functorch, subclass or meta tensor."""
    if _is_compiling() or _dispatch_modes() or _transform() is not None:
        return False
    if not _PLAIN.issuperset(map(type, args)) and not all(map(_is_plain, args)):
        return False
    return forward_ad._current_level < 0 and not args[0].is_meta


def _is_plain(arg: object) -> bool:
    return type(arg) in _PLAIN or (type(arg) is list and _PLAIN.issuperset(map(type, arg)))


def _first_tensor(args: Sequence[Any]) -> Tensor:
    for arg in args:
        if isinstance(arg, Tensor):
            return arg
    raise AssertionError("an op without a tensor")


def _batched(grads: Sequence[Tensor | None]) -> bool:
    """Whether vmap is under way in a backward, e.g. torch.autograd.grad(is_grads_batched=True)."""
    if _transform() is not None:
        return True
    for grad in grads:
        if grad is not None and _legacy_batched(grad):
            return True
    return False


def _has_tangents(args: Sequence[object]) -> bool:
    """Whether forward-mode differentiation is under way; torch would drop the tangents unsaid."""
    transform = torch._C._functorch.peek_interpreter_stack()
    if transform is not None:
        return bool(transform.key() == torch._C._functorch.TransformType.Jvp)
    return forward_ad._current_level >= 0 and any(
        isinstance(arg, Tensor) and forward_ad.unpack_dual(arg).tangent is not None for arg in args
    )


def tracked(tensors: Sequence[Tensor | None]) -> bool:
    """Whether a gradient may be asked for; a tensor under torch.func.vmap does not tell."""
    if not torch.is_grad_enabled():
        return False
    for tensor in tensors:
        if tensor is not None and tensor.requires_grad:
            return True
    transform = None if _is_compiling() else _transform()
    return transform is not None and transform.key() == torch._C._functorch.TransformType.Vmap


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that autocast asks matrix products to run in on `device`, or None."""
    if _any_autocast() and device.type != "meta" and torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return None


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype sums are kept in: float64 for float64 input, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def disposable() -> bool:
    """Whether the running backward may overwrite or free what its forward made for it alone.

    So it is when it runs eagerly, the graph is not kept for a second backward, and no hook saw the
    saved tensors. It never holds for inputs of the op, nor for outputs that the caller has.
    """
    return _backward.disposable


@contextlib.contextmanager
def _ready(tensor: Tensor) -> Iterator[None]:
    """Autocast off, and the tensor's GPU current, while an implementation runs."""
    with contextlib.ExitStack() as stack:
        if torch.is_autocast_enabled(tensor.device.type):
            stack.enter_context(torch.autocast(tensor.device.type, enabled=False))
        if tensor.is_cuda and tensor.get_device() != torch.cuda.current_device():
            stack.enter_context(torch.cuda.device(tensor.device))
        yield


def _needs_ready(tensor: Tensor) -> bool:
    if _any_autocast() and torch.is_autocast_enabled(tensor.device.type):
        return True
    return tensor.is_cuda and tensor.get_device() != torch.cuda.current_device()


def _readied(function: Callable[..., Any], tensor: Tensor) -> Callable[..., Any]:
    """function, to be called with autocast off and the tensor's GPU current."""
    if not _needs_ready(tensor):
        return function

    def run(*args: Any) -> Any:
        with _ready(tensor):
            return function(*args)

    return run


class Op:
    """A named op with its ways to run it.

    schema, backward_schema: torch.library argument and return text. Without a backward_schema (and
        fake_backward, save, inputs_with_grad) the op is for inference only, and its public function
        raises where a gradient would be needed. The backward's arguments are
        (grad of each differentiable output, *saved tensors, *saved constants); a trailing
        `bool[] needs` (which gradients are wanted) and `str implementation` are appended here.
    fake(*args), fake_backward(*args): outputs with the right shape and dtype and no data. They are
        contiguous, as what the registered op returns, whatever layout an implementation prefers.
    save(args, outputs) -> (tensors, constants) kept for the backward.
    outputs_with_grad, inputs_with_grad: how many leading outputs, and which inputs, differentiate.
    An unwanted gradient comes back as None from an implementation.
    cost(*args): the least work of a call.
    """

    def __init__(
        self,
        name: str,
        *,
        schema: str,
        implementations: Sequence[Implementation],
        fake: Callable[..., Any],
        cost: Callable[..., Cost],
        backward_schema: str | None = None,
        fake_backward: Callable[..., Outputs] = _no_backward,
        save: Callable[..., tuple[Sequence[Tensor | None], Sequence[Any]]] = _no_backward,
        inputs_with_grad: Sequence[int] = (),
        outputs_with_grad: int = 1,
    ) -> None:
        self.name = name
        self.implementations = {way.name: way for way in implementations}
        self.save = save
        self.inputs_with_grad = tuple(inputs_with_grad)
        self.outputs_with_grad = outputs_with_grad
        self.cost = cost
        self._fake_backward = fake_backward
        self._register(schema, fake)
        if backward_schema is not None:
            self._register_backward(backward_schema)
        self._eager_function = _eager_function(self)
        self._transformed_function = _transformed_function(self)
        _ops[name] = self

    # -- running -------------------------------------------------------------------------------

    def __call__(self, *args: Any) -> Any:
        """Run on canonical arguments; returns the outputs (a tensor when there is only one)."""
        if not plain_eager(args):
            if not _is_compiling() and _has_tangents(args):
                raise RuntimeError(
                    f"tilewise::{self.name} has no forward-mode derivative; use plain torch ops"
                )
            if self.inputs_with_grad and not _is_compiling() and _transform() is not None:
                return self._transformed_function(*args)
            return self._registered(*args)
        for observe in _observing.functions:
            observe(self, args)
        if torch.is_grad_enabled():
            for i in self.inputs_with_grad:
                if args[i] is not None and args[i].requires_grad:
                    return self._eager_function(*args)
        outputs = self._run(*args)
        return outputs if len(outputs) > 1 else outputs[0]

    def _run(self, *args: Any) -> Outputs:
        found: Outputs = _readied(self.choose(args).forward, args[0])(*args)
        return found

    def _run_backward(self, *args: Any) -> tuple[Tensor | None, ...]:
        """args: the backward schema's, ending in `needs` and the implementation's name."""
        inner, name, first = args[:-1], args[-1], _first_tensor(args)
        way = self.implementations[name] if name else self._choose_backward(first, inner)
        found: tuple[Tensor | None, ...] = _readied(way.backward, first)(*inner)
        return found

    # -- choosing ------------------------------------------------------------------------------

    def choose(self, args: Sequence[Any]) -> Implementation:
        """The implementation that runs this call: the forced one, else the first that may."""
        device = "cpu" if args[0].is_cpu else args[0].device.type
        forced = _forced.names and _forced.implementation(self.name)
        if forced:
            return self._demanded(forced, device, args)
        for way in self.implementations.values():
            if device not in way.devices or way.slower(*args) is not None:
                continue
            reason = way.missing() or way.refuses(*args)
            if reason is None:
                return way
            warn_once(f"tilewise: {self.name} leaves its {way.name} way: {reason}")
        raise KernelUnavailable(
            f"{self.name}: nothing runs on {device}; it has {', '.join(self.implementations)}"
        )

    def _choose_backward(self, first: Tensor, args: Sequence[Any]) -> Implementation:
        device = first.device.type
        for way in self.implementations.values():
            if device not in way.devices or way.missing() is not None:
                continue
            if way.refuses_backward(*args) is None:
                return way
        raise KernelUnavailable(f"{self.name}: no backward runs on {device}")

    def _demanded(self, name: str, device: str, args: Sequence[Any]) -> Implementation:
        way = self.implementations.get(name)
        if way is None:
            has = ", ".join(self.implementations)
            raise KernelUnavailable(f"{self.name} has no {name!r} implementation; it has {has}")
        reason = way.absent(device) or way.refuses(*args)
        if reason is not None:
            raise KernelUnavailable(f"{self.name} cannot run on {name!r} here: {reason}")
        return way

    def explain(self, *args: Any) -> Explanation:
        """Which implementation canonical arguments would run, and why not the others."""
        device = args[0].device.type
        chosen = self.choose(args).name
        others: dict[str, str] = {}
        for way in self.implementations.values():
            if way.name != chosen:
                why = way.absent(device) or way.refuses(*args) or way.slower(*args)
                others[way.name] = why or f"{chosen} comes first"
        return Explanation(self.name, chosen, others)

    # -- registration with torch.library ---------------------------------------------------------

    def _register(self, schema: str, fake: Callable[..., Any]) -> None:
        name = self.name
        _library.define(name + schema)

        def forward(*args: Any) -> Any:
            outputs = tuple(output.contiguous() for output in self._run(*args))
            return outputs if len(outputs) > 1 else outputs[0]

        _library.impl(name, forward, "CompositeExplicitAutograd")
        torch.library.register_fake(f"tilewise::{name}", fake, lib=_library)
        self._registered = getattr(torch.ops.tilewise, name)

    def _register_backward(self, backward_schema: str) -> None:
        name, backward_name = self.name, f"{self.name}_backward"
        arguments, _, returns = backward_schema.rpartition(") ->")
        _library.define(
            f"{backward_name}{arguments}, bool[] needs, str implementation) ->{returns}"
        )

        def backward(*args: Any) -> Any:
            *inner, needs, _ = args
            gradients = self._run_backward(*args)
            first = _first_tensor(inner)
            filled = [first.new_empty(0) if g is None else g.contiguous() for g in gradients]
            for i, gradient in enumerate(filled):  # one tensor may serve two inputs, but a compiler
                if any(gradient is other for other in filled[:i]):  # would reuse its memory
                    filled[i] = gradient.clone()
            return tuple(filled) if len(filled) > 1 else filled[0]

        def fake_backward(*args: Any) -> Any:
            *inner, needs, _ = args
            outputs = self._fake_backward(*inner)
            first = _first_tensor(inner)
            kept = tuple(
                g if need else first.new_empty(0) for g, need in zip(outputs, needs, strict=True)
            )
            return kept if len(kept) > 1 else kept[0]

        _library.impl(backward_name, backward, "CompositeExplicitAutograd")
        torch.library.register_fake(f"tilewise::{backward_name}", fake_backward, lib=_library)
        self._registered_backward = getattr(torch.ops.tilewise, backward_name)

        def keep(ctx: Any, inputs: Any, output: Any) -> None:
            self._keep(ctx, inputs, output, _forced.implementation(name) or "")

        def gradients(ctx: Any, *grads: Any) -> Any:
            return self._gradients(ctx, grads, self._registered_backward)

        torch.library.register_autograd(
            f"tilewise::{name}", gradients, setup_context=keep, lib=_library
        )
        torch.library.register_autograd(
            f"tilewise::{backward_name}", self._refuse_second_derivative, lib=_library
        )

    # -- autograd, shared by all ways ------------------------------------------------------------

    def _keep(self, ctx: Any, inputs: Sequence[Any], output: Any, implementation: str) -> None:
        outputs = output if isinstance(output, tuple) else (output,)
        tensors, ctx.constants = self.save(inputs, outputs)
        ctx.save_for_backward(*tensors)
        ctx.implementation = implementation
        if len(outputs) > 1:
            ctx.set_materialize_grads(False)
            ctx.mark_non_differentiable(*outputs[self.outputs_with_grad :])

    def _gradients(
        self, ctx: Any, grads: Sequence[Any], registered: Callable[..., Any] | None
    ) -> Any:
        """Gradients in the order of the forward's inputs, None where none is wanted.

        registered: what runs the registered backward; None: the implementation runs directly.
        """
        needed, wanted = ctx.needs_input_grad, grads[: self.outputs_with_grad]
        result: list[Tensor | None] = [None] * len(needed)
        for grad in wanted:
            if grad is not None:
                break
        else:
            return tuple(result)
        needs = [needed[i] for i in self.inputs_with_grad]
        saved = ctx.saved_tensors
        if _backward.disposable:  # a retry after an error raises, and does not read what it left
            ctx.maybe_clear_saved_tensors()
        arguments, name = (*wanted, *saved, *ctx.constants, needs), ctx.implementation
        if registered is None:
            found = _readied(self.implementations[name].backward, grad)(*arguments)
        else:
            found = registered(*arguments, name)
            found = found if isinstance(found, (tuple, list)) else (found,)
        for i, need, gradient in zip(self.inputs_with_grad, needs, found, strict=True):
            result[i] = gradient if need else None
        return tuple(result)

    def _refuse_second_derivative(self, ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(f"tilewise::{self.name} has no second derivative; use plain torch ops")


def _eager_function(op: Op) -> Callable[..., Any]:
    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            way = op.choose(args)
            outputs = _readied(way.forward, args[0])(*args)
            for i, y in enumerate(outputs):
                if y._is_view():
                    outputs = (*outputs[:i], _unsafe_view(y, y.shape), *outputs[i + 1 :])
            op._keep(ctx, args, outputs, way.name)
            ctx.hooked = _saving_hooks(True) is not None
            return outputs if len(outputs) > 1 else outputs[0]

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            # create_graph: the registered op refuses to go further; vmap wants it registered
            if torch.is_grad_enabled() or _batched(grads):
                return op._gradients(ctx, grads, op._registered_backward)
            _backward.disposable = not ctx.hooked and not _graph_is_kept()
            try:
                return op._gradients(ctx, grads, None)
            finally:
                _backward.disposable = False

    Eager.__name__ = Eager.__qualname__ = op.name
    return Eager.apply


def _transformed_function(op: Op) -> Callable[..., Any]:
    """The registered op for torch.func, whose transforms cannot take register_autograd's rule."""

    class Gradients(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*args: Any) -> Any:
            return op._registered_backward(*args)

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            pass

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return op._refuse_second_derivative(ctx, *grads)

    class Transformed(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*args: Any) -> Any:
            return op._registered(*args)

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            op._keep(ctx, inputs, output, _forced.implementation(op.name) or "")

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return op._gradients(ctx, grads, Gradients.apply)

    return Transformed.apply


# -- the user's handles --------------------------------------------------------------------------


@contextlib.contextmanager
def force(implementation: str, op: str | None = None) -> Iterator[None]:
    """Pin one implementation, by name, for every op (or for `op`) inside a `with` block.

    A call that the pinned implementation cannot take raises KernelUnavailable saying why. The
    backward of a forward that ran inside the block keeps the same implementation.
    """
    known = sorted({way for each in _ops.values() for way in each.implementations})
    if implementation not in known:
        raise ArgumentError(f"force: no implementation {implementation!r}; there are {known}")
    if op is not None and op not in _ops:
        raise ArgumentError(f"force: no op {op!r}; there are {sorted(_ops)}")
    before = dict(_forced.names)
    _forced.names[op or ""] = implementation
    try:
        yield
    finally:
        _forced.names = before


class _Stop(BaseException):
    """Carries an Explanation out of a public function before it does any work."""

    def __init__(self, explanation: Explanation) -> None:
        self.explanation = explanation


def explain(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Which implementation `function(*args, **kwargs)` would run, without running it.

    function: a public op such as tilewise_kernels.softmax; the arguments are its own and are
    checked as in a real call. Raises what the call would raise.
    """

    def stop(op: Op, canonical: tuple[Any, ...]) -> None:
        raise _Stop(op.explain(*canonical))

    _observing.functions.append(stop)
    try:
        function(*args, **kwargs)
    except _Stop as stopped:
        return stopped.explanation
    finally:
        _observing.functions.remove(stop)
    raise ArgumentError(f"explain: {function!r} called no tilewise op")


@contextlib.contextmanager
def record() -> Iterator[list[Explanation]]:
    """Collect an Explanation for each eager op call made inside the block, in order."""
    seen: list[Explanation] = []

    def note(op: Op, canonical: tuple[Any, ...]) -> None:
        seen.append(op.explain(*canonical))

    _observing.functions.append(note)
    try:
        yield seen
    finally:
        _observing.functions.remove(note)
