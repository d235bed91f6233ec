"""The fit of log sigma from z equals a weighted ridge regression, and hidden units join it where they help."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from npt.equivalence import parts, scale
from npt.equivalence.block_fit import fit_gain_and_carry
from tests.equivalence.stand_ins import CUTOFF, NO_CUTOFF, Block, D, normal, parts_of, tokens, weights_of


def moved(block: Any, h: Tensor, a: Tensor) -> Tensor:
    """(tokens, 1): |dD / d log sigma|^2, D written as a function of sigma and of what z shows."""
    z, p, weight = block.norm(h) - block.component.norm_bias, block.component, block.norm_parameters[0]
    h, a = p.centered(h), p.centered(a)

    def shift(log_scale: Tensor) -> Tensor:
        x = z / weight + log_scale.exp() * a
        return weight * x / x.square().mean(-1, keepdim=True).sqrt()

    y = -h.square().mean(-1, keepdim=True).sqrt().log()
    return ((shift(y + 1e-5) - shift(y - 1e-5)) / 2e-5).square().sum(-1, keepdim=True)


RIDGES = (1e-8, 1e-6, 1e-4, 1e-2, 1.0, 1e8)


@torch.no_grad()
def test_the_scale_is_a_ridge_regression_chosen_on_stretches_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "SLICE_TOKENS", 5)
    chosen = set()
    for seed, count in enumerate([9, 10, 11, 12, 13, 14, 15, 17, 22, 30, 45, 61, 18, 31, 47, 62, 80, 90, 100]):
        block: Any = Block(gain="state", centered=bool(seed % 2))
        p, (h, a) = block.component, tokens(seed, count)
        if seed > 9:  # nearly what the regression can say
            h = h / h.square().mean(-1, keepdim=True).sqrt() * torch.exp(block.norm(h) @ normal(D, 1) / 4)
            h = h * torch.exp(10.0 ** (8 - seed) * normal(count, 1, seed=seed))
        scale.fit_scale(block, p, parts_of(h, a), CUTOFF)
        z, original = block.mlp_inputs(h, a)
        x = z - p.norm_bias
        w = weights_of(original - z, a, CUTOFF) * moved(block, h, a)
        w = w.clamp_max(10 * w.median())
        h = h - h.mean(-1, keepdim=True) if seed % 2 else h
        y = -h.square().mean(-1).sqrt().log()

        def solve(w: Tensor, x: Tensor, y: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
            mean, mean_y = (w * x).sum(0) / w.sum(), w[:, 0] @ y / w.sum()
            scatter = (x - mean).T @ (w * (x - mean))
            identity = torch.eye(D, dtype=torch.float64) * scatter.diagonal().mean()
            u = torch.linalg.solve(scatter + ridge * identity, (x - mean).T @ (w[:, 0] * (y - mean_y)))
            return u, mean_y - mean @ u

        places = torch.arange(count)
        checks, errors = places * 64 // count % 8 == 7 if count >= 64 else places >= count * 3 // 4, []
        for ridge in RIDGES:
            u, b0 = solve(w[~checks], x[~checks], y[~checks], ridge)
            errors.append(w[checks, 0] @ (y - x @ u - b0)[checks] ** 2)
        ridge = RIDGES[int(torch.stack(errors).argmin())]
        chosen.add(ridge)
        u, b0 = solve(w, x, y, ridge)
        torch.testing.assert_close(p.scale_direction, u, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(p.log_scale[0], b0, rtol=1e-5, atol=1e-7)
    assert len(chosen) >= 4, chosen  # the choice had something to choose


@torch.no_grad()
@pytest.mark.parametrize("shape", [torch.square, torch.zeros_like])
def test_hidden_units_learn_what_is_not_linear_and_stay_out_where_nothing_is(shape: Any) -> None:
    """log sigma is linear in z, plus the square of a channel or plus nothing; the parts of the text come in any slices."""
    block: Any = Block(gain="state", gain_units=8)
    p, (h, a) = block.component, tokens(count=2000)
    direction = h / h.square().mean(-1, keepdim=True).sqrt()
    noise = 0.02 * normal(2000, 1, seed=5)
    h = direction * torch.exp(0.3 * direction[:, :1] + 0.3 * shape(direction[:, 1:2]) + noise)
    fit_gain_and_carry(block, p, parts_of(h, a), NO_CUTOFF)
    z = block.norm(h) - p.norm_bias
    y = -h.square().mean(-1).sqrt().log()
    linear = (z @ p.scale_direction + p.log_scale - y).std()
    error = (p.estimated_log_scale(z)[:, 0] - y).std()
    if shape is torch.square:
        assert error < 0.08 and linear > 2 * error, (error, linear)
    else:
        assert error < 0.021 and (p.scale_out == 0).all(), error


@torch.no_grad()
@pytest.mark.parametrize("count", [3, 16, 40, 63])
def test_of_few_tokens_the_last_quarter_checks(count: int) -> None:
    checks = scale._checks(torch.arange(count), count)
    assert checks.tolist() == [i >= count * 3 // 4 for i in range(count)] and 0 < checks.sum() < count


@torch.no_grad()
def test_few_tokens_leave_hidden_units_out() -> None:
    block: Any = Block(gain="state", gain_units=8)
    fit_gain_and_carry(block, block.component, parts_of(*tokens(count=200)), NO_CUTOFF)
    assert (block.component.scale_out == 0).all() and block.component.scale_direction.abs().max() > 0
