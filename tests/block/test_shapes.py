"""Shapes in the signatures of the maths hold: component.py and weight_delta.py run here with jaxtyping's checks on.

The checked modules are second copies: torch.compile could not trace the checks, so the other tests run without them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import product
from types import ModuleType
from typing import Any

import pytest
import torch
from jaxtyping import TypeCheckError

from npt.block.deltas import down_deltas, input_deltas
from npt.block.spec import ComponentSpec
from npt.common.options import CARRIES, GAINS, KEYS, LOW_RANK_SITES
from tests.helpers import checked_copy

D, F, R = 6, 10, 2


@pytest.fixture(scope="module")
def checked() -> ModuleType:
    """`npt.block.component` with every annotation checked at run time; the package keeps the modules it has."""
    return checked_copy("npt.block.component", "npt.block.weight_delta")


def options() -> Iterator[dict[str, Any]]:
    for key, carry, gain, site in product(KEYS, CARRIES, GAINS, LOW_RANK_SITES):
        projections = ("gate", "up") if key == "tied" else ("gate", "up", "down")
        yield {"key": key, "carry": carry, "gain": gain, "low_rank_at": site, "projections": projections}


@pytest.mark.parametrize("leading", [(), (5,), (2, 5)], ids=str)
@torch.no_grad()
def test_every_option_keeps_the_shapes_of_its_signatures(checked: ModuleType, leading: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*leading, *shape, generator=generator)

    a, z, inner = normal(D), normal(D), normal(F)
    weight = torch.randn(F, D, generator=generator)
    products = dict.fromkeys(("gate", "up"), lambda x: x @ weight.T)
    for chosen in options():
        component = checked.NPComponent(ComponentSpec(D, F, rank=R, **chosen), torch.ones(D), torch.zeros(D))
        values = component.input_values(a, z, a, component.norm_scale(a, z))
        down = component.down_value(a, inner, values.modulation)
        assert (down is not None) == ("down" in chosen["projections"])
        for delta in {
            **input_deltas(component, a, z, products, a, component.norm_scale(a, z)),
            **down_deltas(component, a, inner),
        }.values():
            assert delta.apply().shape[:-1] == delta.frobenius_norm().shape == delta.skipped.shape == leading


@pytest.mark.parametrize(
    "entry, shapes",
    [
        ("input_values", [(3, D), (3, D + 1)]),
        ("input_values", [(3, D), (2, D)]),
        ("down_value", [(3, D), (2, F)]),
        ("features", [(3, D), (3, F)]),
        ("centered", []),
    ],
)
def test_a_wrong_shape_is_found(checked: ModuleType, entry: str, shapes: list[tuple[int, ...]]) -> None:
    """The annotations are really checked: one input too wide, too few tokens, or no tensor at all, is an error."""
    component = checked.NPComponent(ComponentSpec(D, F, rank=R), torch.ones(D))
    with pytest.raises(TypeCheckError):
        getattr(component, entry)(*([torch.zeros(*shape) for shape in shapes] or [[0.0] * D]))


def test_the_copies_are_gone_again(checked: ModuleType) -> None:
    """Other tests see the modules that the package itself uses."""
    import npt.block.layer

    assert npt.block.layer.NPComponent is sys.modules["npt.block.component"].NPComponent is not checked.NPComponent
