"""The terms that a token's value is a sum of, and the place where each of them joins the MLP."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from npt.block.weight_delta import Factors
from npt.common.precision import cast, wide_dtype

#: The place of a term that is added to z itself, and so reaches gate and up through their own weights.
MLP_INPUT = "mlp input"


class Term(NamedTuple):
    """One term of a token's value.

    place: `MLP_INPUT`, "gate", "up" or "down". value: what it adds there, (..., d) at `MLP_INPUT`, else (..., out).
    factors: of a low-rank part with a key of its own; None where the input key carries the term.
    """

    place: str
    value: Tensor
    factors: Factors | None = None


@dataclass
class InputValues:
    """The values of gate and up for one batch of tokens.

    shift (..., d): added to z before the projections (carry, gain and a low rank at the input, Eq. 2), or None.
    values: per projection (..., f), added to its output (a low rank at the projection).
    modulation m (..., r), shared with the down projection, or None.
    """

    shift: Tensor | None = None
    values: dict[str, Tensor] = field(default_factory=dict)
    modulation: Tensor | None = None


def sums(terms: Sequence[Term], own_key: bool = True) -> dict[str, Tensor]:
    """{place: the sum of its terms}; without `own_key` those of the input key alone."""
    found: dict[str, Tensor] = {}
    for place, value, factors in terms:
        if own_key or factors is None:
            found[place] = found[place] + value if place in found else value
    return found


def own_key(terms: Sequence[Term], place: str) -> Factors | None:
    """(m, C, B) of the term at a place that has a key of its own."""
    # No next(..., None) in what torch.compile follows: torch 2.8 knows next without a default alone.
    found = [term.factors for term in terms if term.place == place and term.factors is not None]
    return found[0] if found else None


def has_key(x: Tensor, like: Tensor) -> Tensor:
    """(..., 1) one where |x|^2 > 0 (so that the input key exists), else zero, in `like`'s dtype."""
    x = x.detach() if x.requires_grad else x
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide_dtype(x.dtype))
    return cast(norm.sign(), like.dtype)
