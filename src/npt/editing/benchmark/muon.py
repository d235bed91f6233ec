"""Muon: momentum whose matrices are made orthogonal. It learns a small model's facts in fewer steps than AdamW."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

#: Coefficients of the quintic iteration (Keller Jordan's, github.com/KellerJordan/Muon).
_A, _B, _C = 3.4445, -4.7750, 2.0315


def orthogonal(matrices: Tensor, steps: int) -> Tensor:
    """Matrices (n, a, b) with their singular values brought near 1, by Newton-Schulz iterations."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = _A * x + (_B * gram + _C * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Muon on matrices, in their own format. `torch.optim.Muon` computes in bfloat16, which most CPUs have no units for.

    Args:
        parameters: matrices; those of one shape are handled together.
        rate: length of a step, of a matrix whose singular values are 1.
        momentum: of Nesterov's kind.
        steps: of the iteration.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], rate: float, momentum: float = 0.95, steps: int = 3):
        super().__init__(parameters, {"lr": rate})
        self._momentum, self._steps = momentum, steps
        self._groups: dict[torch.Size, list[nn.Parameter]] = {}
        for parameter in parameters:
            self._groups.setdefault(parameter.shape, []).append(parameter)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:  # type: ignore[override]
        """One step of all matrices, from their gradients."""
        rate = self.param_groups[0]["lr"]
        for shape, group in self._groups.items():
            gradient = torch.stack([p.grad for p in group if p.grad is not None])
            mean = self.state[group[0]].setdefault("mean", torch.zeros_like(gradient))
            mean.lerp_(gradient, 1 - self._momentum)
            update = orthogonal(gradient.lerp(mean, self._momentum), self._steps)
            for parameter, part in zip(group, update, strict=True):
                parameter.add_(part, alpha=-rate * max(1.0, shape[0] / shape[1]) ** 0.5)
