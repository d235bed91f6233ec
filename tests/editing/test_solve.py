"""The closed form keeps its constraints at the least cost, and holds the known methods as special cases."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from npt.editing.export import truncated
from npt.editing.solve import Metric, Pairs, gram_of, joined, solve
from npt.errors import NPTError

F, D = 12, 7


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def moment(seed: int = 1) -> Tensor:
    x = random(40, F, seed=seed) * torch.linspace(0.2, 3, F, dtype=torch.float64)
    return x.T @ x / 40


def pairs(n: int, metric: Metric, seed: int = 2) -> Pairs:
    keys = random(F, n, seed=seed)
    return Pairs(keys, metric(keys), random(D, n, seed=seed + 1))


def full(c: Tensor, epsilon: float = 1e-2) -> Tensor:
    return c + epsilon * c.diagonal().mean() * torch.eye(F, dtype=torch.float64)


def test_one_key_without_a_metric_is_npts_transient_delta() -> None:
    one = pairs(1, Metric(None))
    key, value = one.keys[:, 0], one.values[:, 0]
    assert torch.allclose(solve(one).delta, torch.outer(value, key) / key.square().sum())


def test_one_key_is_romes() -> None:
    c = moment()
    one = pairs(1, Metric(c))
    key, value = one.keys[:, 0], one.values[:, 0]
    u = torch.linalg.solve(full(c), key)
    assert torch.allclose(solve(one).delta, torch.outer(value, u) / (u @ key))


def test_a_ridge_is_memits() -> None:
    """R K^T (K K^T + rho C)^-1, of keys of length 1 in the metric."""
    c = moment()
    several = pairs(4, Metric(c))
    scale = (several.keys * several.whitened).sum(0).rsqrt()
    keys, values = several.keys * scale, several.values * scale
    memit = values @ keys.T @ torch.linalg.inv(keys @ keys.T + 0.3 * full(c))
    assert torch.allclose(solve(several, 0.3).delta, memit)


def test_keys_left_as_long_as_they_are_give_memits_own_ridge() -> None:
    c = moment()
    several = pairs(4, Metric(c))
    memit = several.values @ several.keys.T @ torch.linalg.inv(several.keys @ several.keys.T + 0.3 * full(c))
    assert torch.allclose(solve(several, 0.3, scaled=False).delta, memit)
    assert not torch.allclose(solve(several, 0.3).delta, memit)
    assert torch.allclose(solve(several, scaled=False).delta, solve(several).delta)
    short = Pairs(several.keys * 1e-6, several.whitened * 1e-6, several.values)
    assert torch.allclose(solve(short, scaled=False).delta * 1e-6, solve(several).delta)
    with pytest.raises(NPTError, match="keys 1 and 2 of 2 are the same"):
        twice = joined([pairs(1, Metric(c))] * 2)
        solve(Pairs(twice.keys * 1e6, twice.whitened * 1e6, twice.values), scaled=False)


def test_constraints_hold_and_no_other_solution_costs_less() -> None:
    c = moment()
    several = pairs(5, Metric(c))
    delta = solve(several).delta
    assert torch.allclose(delta @ several.keys, several.values)
    null = torch.eye(F, dtype=torch.float64) - several.keys @ torch.linalg.pinv(several.keys)
    for seed in range(3):
        other = delta + 0.1 * random(D, F, seed=seed) @ null
        assert torch.allclose(other @ several.keys, several.values)
        assert torch.trace(other @ full(c) @ other.T) > torch.trace(delta @ full(c) @ delta.T) + 1e-6


def test_the_length_of_a_key_does_not_decide_what_a_ridge_does() -> None:
    several = pairs(3, Metric(moment()))
    longer = Pairs(several.keys * 5, several.whitened * 5, several.values * 5)
    assert torch.allclose(solve(several, 0.2).delta, solve(longer, 0.2).delta)
    assert torch.allclose(gram_of(several).diagonal(), torch.ones(3, dtype=torch.float64))


def test_equal_keys_are_refused_without_a_ridge_and_meet_half_way_with_one() -> None:
    one = pairs(2, Metric(moment()))
    twice = joined([one, Pairs(one.keys[:, 1:] * 2, one.whitened[:, 1:] * 2, one.values[:, :1])])
    with pytest.raises(NPTError, match="keys 2 and 3 of 3 are the same"):
        solve(twice)
    assert bool(solve(twice, 1e-6).delta.isfinite().all())


def test_a_zero_key_is_refused() -> None:
    one = pairs(1, Metric(None))
    with pytest.raises(NPTError, match="a key is zero"):
        solve(Pairs(one.keys * 0, one.whitened * 0, one.values))


def test_a_moment_that_is_none_is_refused() -> None:
    with pytest.raises(NPTError, match="not positive definite"):
        Metric(-moment())


def test_truncation_is_the_nearest_in_the_metric() -> None:
    c = moment()
    several = pairs(6, Metric(c))
    for ridge in (0.0, 0.2):
        whole = solve(several, ridge)
        root = torch.linalg.cholesky(full(c))
        u, s, v = torch.linalg.svd(whole.delta @ root, full_matrices=False)
        best = u[:, :3] @ torch.diag(s[:3]) @ v[:3] @ torch.linalg.inv(root)
        found = truncated(whole, several, 3)
        assert found.left.shape == (D, 3) and found.right.shape == (3, F)
        assert torch.allclose(found.delta, best, atol=1e-8)
