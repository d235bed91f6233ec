"""`WeightDelta`: the per-token weight delta of one projection, kept in factors and formed only on request."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from npt.common.precision import wide

if TYPE_CHECKING:  # and in tests, which check the shapes
    from jaxtyping import Bool, Float

#: m (..., r), C (in, r) and B (r, out) of a low-rank part that has a key of its own: dW = B^T diag(m) C^T.
Factors = tuple[Tensor, Tensor, Tensor]


@dataclass
class WeightDelta:
    """dW of one projection for a batch of tokens, in factors: dW = value k^T + B^T diag(m) C^T.

    value (..., out) is carried by the input key k = x / |x|^2; inputs x (..., in); low_rank is (m (..., r), C (in, r),
    B (r, out)), or None when the low-rank part uses the input key and is part of `value`.
    Tokens with x = 0 have no input key: their `value` is zero and `skipped` counts them.
    """

    value: Float[Tensor, "*tokens out"]
    inputs: Float[Tensor, "*tokens in"]
    low_rank: Factors | None = None

    @property
    def skipped(self) -> Bool[Tensor, "*tokens"]:
        """Tokens whose input is all zero, so that no input key exists."""
        return wide(self.inputs).square().sum(-1) == 0

    def apply(self) -> Float[Tensor, "*tokens out"]:
        """dW x."""
        return self.value if self.low_rank is None else self.value + _low_rank_product(self.inputs, *self.low_rank)

    def frobenius_norm(self) -> Float[Tensor, "*tokens"]:
        """|dW|_F per token, without forming dW."""
        return self.frobenius_norm_square().sqrt()

    def frobenius_norm_square(self) -> Float[Tensor, "*tokens"]:
        """|dW|_F^2 per token (docs/maths.md, Eq. 3)."""
        value, inputs = wide(self.value), wide(self.inputs)  # squares leave float16's range
        inverse = inverse_square(inputs)
        square = value.square().sum(-1) * inverse
        if self.low_rank is not None:
            m, c, b = (wide(x) for x in self.low_rank)
            gram = (c.T @ c) * (b @ b.T)
            square = square + ((m @ gram) * m).sum(-1)
            square = square + 2 * (value * _low_rank_product(inputs, m, c, b)).sum(-1) * inverse
        return square.clamp_min(0)

    def scaled(self, factor: float) -> WeightDelta:
        """factor * dW."""
        if factor == 1:
            return self
        low_rank = None if self.low_rank is None else (factor * self.low_rank[0], *self.low_rank[1:])
        return WeightDelta(factor * self.value, self.inputs, low_rank)

    def matrix(self, *token: int) -> Float[Tensor, "out in"]:
        """dW of the token at index `token` of the leading dimensions, formed."""
        value, x = wide(self.value[token]), wide(self.inputs[token])
        square = x.square().sum()
        key = x / square if square > 0 else torch.zeros_like(x)
        delta = torch.outer(value, key)
        if self.low_rank is not None:
            m, c, b = (wide(x) for x in self.low_rank)
            delta = delta + (b.T * m[token]) @ c.T
        return delta


def _low_rank_product(inputs: Tensor, m: Tensor, c: Tensor, b: Tensor) -> Tensor:
    return ((inputs @ c) * m) @ b


def inverse_square(x: Float[Tensor, "*tokens in"]) -> Float[Tensor, "*tokens"]:
    """1 / |x|^2, zero where x is; in float32 or better."""
    square = wide(x).square().sum(-1)
    return torch.where(square > 0, 1 / square.clamp_min(torch.finfo(square.dtype).tiny), 0)


@dataclass
class Routing:
    """The experts that a pass used. indices (tokens, k) of experts; weights p_e (tokens, k) of what they give.

    lengths (tokens, k) of what experts read, where the router scales it; None where that is the MLP's input.
    """

    indices: Tensor
    weights: Tensor
    lengths: Tensor | None = None
