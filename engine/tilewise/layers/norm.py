"""LayerNorm with the residual addition fused in.

Shapes: x, residual [..., N].
"""

from collections.abc import Sequence

from torch import Tensor, nn

from tilewise_kernels import layer_norm
from tilewise_kernels.errors import ArgumentError


class LayerNorm(nn.LayerNorm):
    """torch.nn.LayerNorm over the last dim, with its parameters and state_dict, on our kernel."""

    def __init__(
        self,
        size: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
    ) -> None:
        super().__init__(size, eps, elementwise_affine, bias)
        if len(self.normalized_shape) != 1:
            raise ArgumentError(f"LayerNorm: size is {size}; it normalises the last dim only")

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """LN(x), or LN(x + residual): [..., N] to [..., N]."""
        return layer_norm(x, self.weight, self.bias, eps=self.eps, residual=residual)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(LN(s), s) with s = x + residual: the pre-norm step that carries the sum on."""
        return layer_norm(x, self.weight, self.bias, eps=self.eps, residual=residual, prenorm=True)
