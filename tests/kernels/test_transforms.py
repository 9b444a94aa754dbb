"""torch.func over the ops: grad, vjp, jacrev and vmap, one in another, and functional_call.

Every derivative is compared with torch.autograd's of the same op.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, vjp, vmap

from tilewise_kernels import (
    attention,
    attention_varlen,
    cross_entropy,
    feed_forward,
    force,
    layer_norm,
    linear_act,
    linear_cross_entropy,
    log_softmax,
    log_softmax_topk,
    rms_norm,
    rotary,
    softmax,
)
from tilewise_kernels.op import record


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


X, W, GATE, W2 = normal(4, 8), normal(16, 8, seed=1), normal(16, 8, seed=2), normal(8, 16, seed=3)
KEYS, TARGET, CUTS = normal(1, 1, 6, 8, seed=4), torch.tensor([3, 0, 7, -100]), [0, 1, 4]
PACKED, CU = normal(4, 1, 8, seed=5), torch.tensor(CUTS, dtype=torch.int32)
TURN = normal(2, 4, 4, seed=6)

LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda x: softmax(x).square().sum(),
    "log_softmax": lambda x: log_softmax(x).square().sum(),
    "topk": lambda x: log_softmax_topk(x, 3)[0].square().sum(),
    "layer_norm": lambda x: layer_norm(x, W[0], W[1]).square().sum(),
    "prenorm": lambda x: sum(y.square().sum() for y in rms_norm(x, residual=2 * x, prenorm=True)),
    "linear_act": lambda x: linear_act(x, W).square().sum(),
    "feed_forward": lambda x: feed_forward(x, W, None, W2, None, gate=GATE).square().sum(),
    "cross_entropy": lambda x: cross_entropy(x, TARGET),
    "linear_cross_entropy": lambda x: linear_cross_entropy(x, W, TARGET),
    "attention": lambda x: attention(x[None, None], KEYS, KEYS, causal=True).square().sum(),
    "attention_varlen": lambda x: attention_varlen(x[:, None], PACKED, PACKED, CU, CU).sum(),
    "rotary": lambda x: rotary(x[None, None], x[None, None], *TURN)[1].mul(PACKED[:, 0]).sum(),
}


def expected(loss: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(loss(leaf), leaf)[0]


@pytest.mark.parametrize("name", LOSSES)
def test_transforms(name: str) -> None:
    loss, batch = LOSSES[name], torch.stack([X, 2 * X, -X])
    wanted = torch.stack([expected(loss, x) for x in batch])
    assert wanted.abs().max() > 1e-3
    found = {
        "grad": grad(loss)(X)[None],
        "vjp": vjp(loss, X)[1](torch.tensor(1.0))[0][None],
        "jacrev": jacrev(loss)(X)[None],
        "vmap of grad": vmap(grad(loss))(batch),
        "grad of vmap": grad(lambda xs: vmap(loss)(xs).sum())(batch),
        "vmap of vmap": vmap(vmap(grad(loss)))(batch[None])[0],
    }
    for transform, gradient in found.items():
        close = torch.allclose(gradient, wanted[: len(gradient)], atol=1e-5)
        assert close, f"{transform}: off by {(gradient - wanted[: len(gradient)]).abs().max()}"
    values = torch.stack([loss(x) for x in batch])
    torch.testing.assert_close(vmap(loss)(batch), values)


def test_functional_call_gives_gradients_of_each_sample() -> None:
    """The usual recipe: parameters as a dict, a gradient for each row of the batch."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.norm = nn.Parameter(W.clone()), nn.Parameter(torch.ones(8))

        def forward(self, x: Tensor) -> Tensor:
            return linear_act(layer_norm(x, self.norm), self.weight)

    block = Block()
    parameters = {name: p.detach() for name, p in block.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(block, parameters, (x[None],)).square().sum()

    each = vmap(grad(loss), in_dims=(None, 0))(parameters, X)
    for i, x in enumerate(X):
        block.zero_grad()
        block(x[None]).square().sum().backward()
        for name, parameter in block.named_parameters():
            torch.testing.assert_close(each[name][i], parameter.grad, atol=1e-5, rtol=1e-4)


def test_only_what_is_asked_for_is_differentiated() -> None:
    """Inputs without gradient, several arguments, and the pinned implementation's backward."""
    weight, bias = W[0].clone(), W[1].clone()

    def loss(x: Tensor, weight: Tensor) -> Tensor:
        return layer_norm(x, weight, bias).square().sum()

    leaves = [X.clone().requires_grad_(), weight.clone().requires_grad_()]
    wanted = torch.autograd.grad(loss(*leaves), leaves)
    for found in (grad(loss, (0, 1))(X, weight), [grad(loss, i)(X, weight) for i in (0, 1)]):
        for ours, theirs in zip(found, wanted, strict=True):
            torch.testing.assert_close(ours, theirs)
    with force("reference"):
        assert torch.allclose(grad(loss)(X, weight), wanted[0], atol=1e-5)


def test_parameters_outside_keep_their_gradient() -> None:
    """A derivative by torch.func beside leaves of torch.autograd."""
    leaf = W[0].clone().requires_grad_()
    value = torch.func.vjp(lambda x: layer_norm(x, leaf).square().sum(), X)[0]
    value.backward()
    other = W[0].clone().requires_grad_()
    layer_norm(X, other).square().sum().backward()
    torch.testing.assert_close(leaf.grad, other.grad)


def test_what_has_no_derivative_says_so() -> None:
    """A clear error, never a derivative that is silently dropped."""
    with pytest.raises(RuntimeError, match="softmax has no second derivative; use plain torch"):
        grad(lambda x: grad(LOSSES["softmax"])(x).sum())(X)
    with pytest.raises(RuntimeError, match="softmax has no second derivative; use plain torch"):
        leaf = X.clone().requires_grad_()
        grad(LOSSES["softmax"])(leaf).sum().backward()
    with pytest.raises(RuntimeError, match="softmax has no forward-mode derivative"):
        torch.func.jvp(softmax, (X,), (X,))


def test_eager_calls_stay_as_they_are() -> None:
    """Nothing of a transform is left behind when it ends."""
    grad(LOSSES["softmax"])(X)
    with record() as ops:
        softmax(X)
    assert [op.op for op in ops] == ["softmax"]
