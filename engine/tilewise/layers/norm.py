"""LayerNorm and RMSNorm with dropout and the residual addition fused in.

Shapes: x, residual [..., N].
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tilewise_kernels import layer_norm, rms_norm
from tilewise_kernels.errors import ArgumentError

from ..config import ModelConfig


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

    def forward(self, x: Tensor, residual: Tensor | None = None, dropout_p: float = 0.0) -> Tensor:
        """LN(dropout(x) + residual), of what is given: [..., N] to [..., N]."""
        return layer_norm(
            x, self.weight, self.bias, eps=self.eps, residual=residual, dropout_p=dropout_p
        )

    def add(self, x: Tensor, residual: Tensor, dropout_p: float = 0.0) -> tuple[Tensor, Tensor]:
        """(LN(s), s) with s = dropout(x) + residual: the pre-norm step that carries the sum on."""
        return layer_norm(
            x,
            self.weight,
            self.bias,
            eps=self.eps,
            residual=residual,
            dropout_p=dropout_p,
            prenorm=True,
        )


class RMSNorm(nn.RMSNorm):
    """torch.nn.RMSNorm over the last dim, with its parameter and state_dict, on our kernel.

    eps None is the epsilon of float32 (of float64 for float64), which torch computes in.
    """

    def __init__(
        self, size: int | Sequence[int], eps: float | None = None, elementwise_affine: bool = True
    ) -> None:
        super().__init__(size, eps, elementwise_affine)
        if len(self.normalized_shape) != 1:
            raise ArgumentError(f"RMSNorm: size is {size}; it normalises the last dim only")

    def forward(self, x: Tensor, residual: Tensor | None = None, dropout_p: float = 0.0) -> Tensor:
        """RMS(dropout(x) + residual), of what is given: [..., N] to [..., N]."""
        eps = self._eps(x)
        return rms_norm(x, self.weight, eps=eps, residual=residual, dropout_p=dropout_p)

    def add(self, x: Tensor, residual: Tensor, dropout_p: float = 0.0) -> tuple[Tensor, Tensor]:
        """(RMS(s), s) with s = dropout(x) + residual: the pre-norm step that carries the sum on."""
        eps = self._eps(x)
        return rms_norm(
            x, self.weight, eps=eps, residual=residual, dropout_p=dropout_p, prenorm=True
        )

    def _eps(self, x: Tensor) -> float:
        if self.eps is not None:
            return self.eps
        return torch.finfo(torch.float64 if x.dtype == torch.float64 else torch.float32).eps


def norm_of(config: ModelConfig, size: int | None = None) -> LayerNorm | RMSNorm:
    """The norm that a configuration names, over its hidden size or another."""
    size = config.hidden_size if size is None else size
    eps, affine = config.norm_eps, config.norm_weight
    if config.norm == "rms":
        return RMSNorm(size, eps=eps, elementwise_affine=affine)
    return LayerNorm(size, eps=eps, elementwise_affine=affine, bias=config.norm_bias)
