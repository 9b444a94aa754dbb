"""A linear map; where x has few rows and no gradient is asked for, by the kernel for decoding.

Shapes: x [..., I]; weight [O, I]; bias [O].
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tilewise_kernels import few_rows, linear_act
from tilewise_kernels.op import autocast_dtype


def project(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x weight^T + bias: [..., O]. Raises as F.linear does, or ArgumentError."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or not few_rows.serves(x, weight):
        return F.linear(x, weight, bias)  # its autograd is torch's own, in C++
    if autocast_dtype(x.device) is not None:  # which keeps the weights that it has cast
        return F.linear(x, weight, bias)
    return linear_act(x, weight, bias, activation="identity")


class Linear(nn.Linear):
    """torch.nn.Linear over `project`."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] to [..., O]."""
        return project(x, self.weight, self.bias)
