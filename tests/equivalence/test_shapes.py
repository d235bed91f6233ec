"""Shapes in the signatures of the closed form hold: closed_form.py runs here with jaxtyping's checks on."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from jaxtyping import TypeCheckError

from tests.helpers import checked_copy

TOKENS, D, R = 40, 6, 2


@pytest.fixture(scope="module")
def checked() -> ModuleType:
    """`npt.equivalence.closed_form` with every annotation checked at run time."""
    return checked_copy("npt.equivalence.closed_form")


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_every_formula_keeps_the_shapes_of_its_signature(checked: ModuleType) -> None:
    a, z, delta = normal(TOKENS, D), normal(TOKENS, D, seed=1), normal(TOKENS, D, seed=2)
    sizes = checked.token_sizes(delta, a)
    weights = checked.outlier_weights(sizes, checked.outlier_cutoff(sizes))
    for of_z, of_a in (([z], [a]), ([z, 2 * z], [a, a * a]), ([], [a]), ([z], [])):
        gram = checked.channel_products([*of_z, *of_a, delta], weights)
        gain, slope, c = checked.alternate(gram, len(of_z), len(of_a))
        assert (len(gain), len(slope), len(c)) == (len(of_z), max(0, len(of_a) - 1), D)
    halves = [checked.Regression(), checked.Regression()]
    for half, part in zip(halves, (slice(0, 30), slice(30, TOKENS)), strict=True):
        half.add(z[part], a[part, 0], weights[part])
    direction, offset = checked.best_regression(*halves)
    assert direction.shape == (D,) and offset.shape == ()
    for targets in (delta, torch.cat([delta, a], -1)):
        gram, cross = checked.token_product(a, a), checked.token_product(a, targets)
        a_matrix, b_matrix = checked.reduced_rank_regression(gram, cross, float(weights.sum()), R)
        assert a_matrix.shape == (D, R) and b_matrix.shape == (R, targets.shape[1])


def test_a_wrong_shape_is_found(checked: ModuleType) -> None:
    """The annotations are really checked: tokens that don't match, a matrix that is not square."""
    with pytest.raises(TypeCheckError):
        checked.token_sizes(normal(3, D), normal(4, D))
    with pytest.raises(TypeCheckError):
        checked.solve_ridge(normal(3, 4), normal(3), 0.1)
    with pytest.raises(TypeCheckError):
        checked.outlier_weights(normal(3, 3), normal(2))
