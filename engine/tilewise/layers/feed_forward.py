"""The position-wise network of a Transformer: Linear, activation, Linear; or its gated form.

Shapes: x [..., E]; hidden [..., F].
"""

from torch import Tensor, nn

from tilewise_kernels import feed_forward, linear_act

from ..config import Activation
from .linear import Linear


class FeedForward(nn.Module):
    """act(x W1^T + b1) W2^T + b2 as one op; saves the pre-activation only.

    gated: act(x W1^T + b1) * (x Wg^T + bg) in place of the activation. Parameters linear1 [F, E],
    linear2 [E, F] and gate [F, E]; the first two named as in torch.nn.TransformerEncoderLayer.
    Source: Vaswani et al. 2017, section 3.3; gated: Shazeer 2020.
    """

    def __init__(
        self,
        size: int,
        ffn_size: int,
        activation: Activation = "relu",
        *,
        gated: bool = False,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.linear1 = Linear(size, ffn_size, bias=bias)
        self.linear2 = Linear(ffn_size, size, bias=bias)
        self.gate = Linear(size, ffn_size, bias=bias) if gated else None
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """[..., E] to [..., E]."""
        return run_feed_forward(x, self.linear1, self.linear2, self.gate, self.activation)


def run_feed_forward(
    x: Tensor, linear1: nn.Linear, linear2: nn.Linear, gate: nn.Linear | None, activation: str
) -> Tensor:
    """FeedForward of modules that stand in another: [..., E] to [..., E]."""
    if gate is not None and gate.bias is not None:  # the op's gate has no bias
        inner = linear_act(x, linear1.weight, linear1.bias, activation=activation)
        return linear2(inner * gate(x))
    return feed_forward(
        x,
        linear1.weight,
        linear1.bias,
        linear2.weight,
        linear2.bias,
        activation=activation,
        gate=None if gate is None else gate.weight,
    )
