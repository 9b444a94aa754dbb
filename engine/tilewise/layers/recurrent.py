"""Gated recurrent units, and attention by a small network over what they made of a source.

Shapes: x [R, N, I]; states [R, N, H] of each direction; queries [M, Q, E], keys [M, N, A], values
[M, N, C] of M sources, each asked Q times.
"""

import torch
from torch import Tensor, nn

from tilewise_kernels import softmax

from .linear import Linear, project


class GatedRecurrent(nn.Module):
    """A layer of gated units, read forward or both ways; parameters as in torch.nn.GRU.

        r, z = sigmoid(W_r x + U_r h), sigmoid(W_z x + U_z h)
        n = tanh(W_n x + U_n (r * h))       reset "before" the product (Cho et al. 2014)
        n = tanh(W_n x + r * (U_n h))       reset "after" it: cuDNN and torch.nn.GRU
        h = z * h + (1 - z) * n

    each product with its bias. Bahdanau et al. 2015 exchange z and 1 - z, which is the same unit
    with W_z, U_z and their biases negated.
    """

    def __init__(
        self, size: int, hidden_size: int, *, reset: str = "before", bidirectional: bool = False
    ) -> None:
        super().__init__()
        self.hidden_size, self.reset = hidden_size, reset
        self.directions = ("", "_reverse") if bidirectional else ("",)
        for suffix in self.directions:
            for kind, columns in (("ih", size), ("hh", hidden_size)):
                weight = torch.empty(3 * hidden_size, columns)
                self.register_parameter(f"weight_{kind}_l0{suffix}", nn.Parameter(weight))
                bias = torch.empty(3 * hidden_size)
                self.register_parameter(f"bias_{kind}_l0{suffix}", nn.Parameter(bias))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Orthogonal U, W from N(0, 0.01), biases 0, as in both papers."""
        for name, parameter in self.named_parameters():
            if name.startswith("bias"):
                nn.init.zeros_(parameter)
            elif name.startswith("weight_ih"):
                nn.init.normal_(parameter, std=0.01)
            else:
                for part in parameter.detach().chunk(3):  # torch has no QR of half precision
                    wide = torch.promote_types(part.dtype, torch.float32)
                    part.copy_(nn.init.orthogonal_(torch.empty(part.shape, dtype=wide)))

    def forward(self, x: Tensor, real: Tensor | None = None) -> Tensor:
        """[R, N, I] to states [R, N, H], or [R, N, 2 H] of both directions, from a zero state.

        real bool [R, N]: a position where it is False is passed over; the state stays.
        """
        return torch.cat([self._read(x, real, suffix) for suffix in self.directions], -1)

    def step(self, x: Tensor, h: Tensor) -> Tensor:
        """One step forward: inputs [R, I] and states [R, H] to states [R, H]."""
        return self._next(self._product(x, ""), h, "")

    def _product(self, x: Tensor, suffix: str) -> Tensor:
        weight, bias = (getattr(self, f"{kind}_ih_l0{suffix}") for kind in ("weight", "bias"))
        return project(x, weight, bias)

    def _read(self, x: Tensor, real: Tensor | None, suffix: str) -> Tensor:
        products = self._product(x, suffix).unbind(1)
        h = x.new_zeros(len(x), self.hidden_size)
        states = [h] * len(products)
        order = range(len(products))
        for t in reversed(order) if suffix else order:
            new = self._next(products[t], h, suffix)
            h = new if real is None else torch.where(real[:, t, None], new, h)
            states[t] = h
        return torch.stack(states, 1)

    def _next(self, product: Tensor, h: Tensor, suffix: str) -> Tensor:
        """product [R, 3 H]: W x and its bias, rows r, z, n."""
        weight, bias = (getattr(self, f"{kind}_hh_l0{suffix}") for kind in ("weight", "bias"))
        gates = 2 * self.hidden_size
        if self.reset == "before":
            turned = project(h, weight[:gates], bias[:gates])
            r, z = (product[:, :gates] + turned).sigmoid().chunk(2, -1)
            n = (product[:, gates:] + project(r * h, weight[gates:], bias[gates:])).tanh()
        else:
            turned = project(h, weight, bias)
            r, z = (product[:, :gates] + turned[:, :gates]).sigmoid().chunk(2, -1)
            n = (product[:, gates:] + r * turned[:, gates:]).tanh()
        return z * h + (1 - z) * n


class AdditiveAttention(nn.Module):
    """softmax over j of v . tanh(W q + U k_j), and the mean of values by it.

    Source: Bahdanau et al. 2015, appendix A.1.2. U k_j is found once per source, by `keys`.
    """

    def __init__(self, query_size: int, source_size: int, size: int) -> None:
        super().__init__()
        self.query = Linear(query_size, size, bias=False)
        self.key = Linear(source_size, size, bias=False)
        self.score = Linear(size, 1, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """W and U from N(0, 0.001), v 0: every position counts the same at first."""
        nn.init.normal_(self.query.weight, std=0.001)
        nn.init.normal_(self.key.weight, std=0.001)
        nn.init.zeros_(self.score.weight)

    def keys(self, values: Tensor) -> Tensor:
        """[M, N, C] to [M, N, A]."""
        return self.key(values)

    def forward(
        self, queries: Tensor, keys: Tensor, values: Tensor, real: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(contexts [M, Q, C], weights [M, Q, N]); weights are 0 where real [M, N] is False."""
        bent = (self.query(queries)[:, :, None] + keys[:, None]).tanh()
        scores = self.score(bent).squeeze(-1)
        weights = softmax(scores, mask=None if real is None else real[:, None])
        return weights @ values, weights
