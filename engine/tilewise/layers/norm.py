"""LayerNorm with the residual addition fused in.

Shapes: x, residual [..., N].
"""

from torch import Tensor, nn

from tilewise_kernels import layer_norm


class LayerNorm(nn.LayerNorm):
    """torch.nn.LayerNorm over the last dim, with its parameters and state_dict, on our kernel."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """LN(x), or LN(x + residual): [..., N] to [..., N]."""
        return layer_norm(x, self.weight, self.bias, eps=self.eps, residual=residual)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(LN(s), s) with s = x + residual: the pre-norm step that carries the sum on."""
        return layer_norm(
            x, self.weight, self.bias, eps=self.eps, residual=residual, prenorm=True
        )
