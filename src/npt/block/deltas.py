"""dW itself in factors, for norms and inspection: the same terms as the forward pass of `NPComponent`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from npt.block.component import NPComponent
from npt.block.terms import MLP_INPUT, has_key, own_key, sums
from npt.block.weight_delta import WeightDelta
from npt.common.precision import cast

if TYPE_CHECKING:  # and in tests, which check the shapes
    from jaxtyping import Float


def input_deltas(
    component: NPComponent,
    attention: Float[Tensor, "*tokens d"],
    z: Float[Tensor, "*tokens d"],
    products: Mapping[str, Callable[[Tensor], Tensor]],
    exact_input: Float[Tensor, "*tokens d"] | None = None,
    scale: Float[Tensor, "*tokens 1"] | None = None,
) -> dict[str, WeightDelta]:
    """dW of gate and up in factors, as far as they receive one; arguments as `NPComponent.input_values`.

    products: {"gate" | "up": x (..., d) -> W_t x (..., f), without bias}.
    """
    inputs = attention, z, exact_input, scale
    return {t: _input_delta(component, t, products[t], *inputs) for t in component.spec.input_projections}


def _input_delta(
    component: NPComponent,
    t: str,
    product: Callable[[Tensor], Tensor],
    attention: Tensor,
    z: Tensor,
    exact_input: Tensor | None,
    scale: Tensor | None,
) -> WeightDelta:
    # Terms are made anew per projection: sharing them would change the order of gradient sums, and the last digits.
    terms = component.input_terms(attention, z, component.modulation(attention), exact_input, scale)
    mask = has_key(z, z)
    keyed = {place: cast(value * mask, z.dtype) for place, value in sums(terms, own_key=False).items()}
    value = product(keyed[MLP_INPUT]) if MLP_INPUT in keyed else None
    if t in keyed:
        value = keyed[t] if value is None else value + keyed[t]
    if value is None:
        value = z.new_zeros(*z.shape[:-1], component.spec.intermediate_size)
    factors, shared = own_key(terms, t), own_key(terms, MLP_INPUT)
    if shared is not None:  # it reaches the projection through W_t
        m, c, b = shared
        factors = m, c, product(b)
    return WeightDelta(value, z, factors)


def down_deltas(
    component: NPComponent, attention: Float[Tensor, "*tokens d"], inner: Float[Tensor, "*tokens f"]
) -> dict[str, WeightDelta]:
    """{"down": dW of down in factors}, empty where it receives none; arguments as `NPComponent.down_value`."""
    if "down" not in component.spec.projections:
        return {}
    terms = component.down_terms(attention, inner, None)
    value = sums(terms, own_key=False).get("down")
    value = torch.zeros_like(attention) if value is None else value * has_key(inner, inner)
    return {"down": WeightDelta(value, inner, own_key(terms, "down"))}
