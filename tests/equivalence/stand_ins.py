"""A stand-in for an NPT layer in tests of the closed-form fit, and tokens for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from npt.block.component import ComponentSpec, NPComponent
from npt.equivalence.parts import Part

D, TOKENS = 8, 90
NO_CUTOFF = torch.tensor([torch.inf, torch.inf])


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Block:
    """Stands in for an NPT layer: a norm with weight and bias, and an MLP input that moves by more than the fit can say."""

    def __init__(self, **options: Any):
        self.component = NPComponent(
            ComponentSpec(D, 12, **{"rank": 3, **options}), 1 + 0.3 * normal(D, seed=1), 0.5 * normal(D, seed=2)
        )
        self.weight = normal(D, 12, seed=3)
        self.norm_parameters = 1 + 0.3 * normal(D, seed=1), self.component.norm_bias

    def norm(self, x: Tensor) -> Tensor:
        x = x - x.mean(-1, keepdim=True) if self.component.spec.centered else x
        weight = 1 + 0.3 * normal(D, seed=1)
        return x / x.square().mean(-1, keepdim=True).sqrt() * weight + self.component.norm_bias

    def mlp_inputs(self, h: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        return self.norm(h), self.norm(h + a)

    def product(self, name: str) -> Any:
        return lambda x: x @ ({"gate": 1, "up": 2}[name] * self.weight)


def tokens(seed: int = 0, count: int = TOKENS) -> tuple[Tensor, Tensor]:
    """(h, a), with a few large ones and norms of h that differ."""
    h, a = normal(count, D, seed=10 + seed), 0.5 * normal(count, D, seed=20 + seed)
    a[::17] *= 6
    return h * (1 + 0.5 * normal(count, 1, seed=30 + seed).abs()), a


def weights_of(delta: Tensor, a: Tensor, cutoff: Tensor) -> Tensor:
    """(tokens, 1): the square of min(1, cutoff / size) over both sizes."""
    ratios = [c / x.square().sum(-1, keepdim=True) for c, x in zip(cutoff, (delta, a), strict=True)]
    return torch.cat([*ratios, torch.ones_like(ratios[0])], -1).min(-1, keepdim=True).values ** 2


def parts_of(h: Tensor, a: Tensor) -> list[Part]:
    return [Part(37 * i, *pair) for i, pair in enumerate(zip(h.split(37), a.split(37), strict=True))]


CUTOFF = torch.tensor([3.0, 4.0], dtype=torch.float64)
