"""The position-wise network of a Transformer: Linear, activation, Linear.

Shapes: x [..., E]; hidden [..., F].
"""

from torch import Tensor, nn

from tilewise_kernels import feed_forward

from ..config import Activation


class FeedForward(nn.Module):
    """act(x W1^T + b1) W2^T + b2 as one op; saves the pre-activation only.

    Parameters linear1 [F, E] and linear2 [E, F] are named as in torch.nn.TransformerEncoderLayer.
    Source: Vaswani et al. 2017, section 3.3.
    """

    def __init__(self, size: int, ffn_size: int, activation: Activation = "relu") -> None:
        super().__init__()
        self.linear1 = nn.Linear(size, ffn_size)
        self.linear2 = nn.Linear(ffn_size, size)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """[..., E] to [..., E]."""
        return feed_forward(
            x,
            self.linear1.weight,
            self.linear1.bias,
            self.linear2.weight,
            self.linear2.bias,
            activation=self.activation,
        )
