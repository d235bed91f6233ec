"""The scale sigma = 1 / rms(h) of a token, read off Norm2 or estimated from z, and the norm's formula that needs it."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from npt.common.precision import cast

if TYPE_CHECKING:  # and in tests, which check the shapes
    from jaxtyping import Float


#: Bound of log sigma: exp of it, squared, is still finite in float32, and D hardly depends on a sigma that large.
LARGEST_LOG_SCALE = 40.0


class HiddenUnits(NamedTuple):
    """The non-linear part of an estimate of log sigma, gelu(x W + b) . v: W (d, n), b (n,), v (n,)."""

    weight: Tensor
    bias: Tensor
    out: Tensor

    def __call__(self, x: Float[Tensor, "*tokens d"]) -> Float[Tensor, "*tokens 1"]:
        """Returns what the units add to log sigma."""
        weight, bias, out = (cast(parameter, x.dtype) for parameter in self)
        return (F.gelu(x @ weight + bias) * out).sum(-1, keepdim=True)


def scale_of_norm(
    h: Float[Tensor, "*tokens d"], z: Float[Tensor, "*tokens d"], inverse: Float[Tensor, " d"] | None
) -> Float[Tensor, "*tokens 1"]:
    """sigma from zhat = sigma h, by least squares over the channels: no norm's epsilon or class need be known. Zero at h = 0.

    Args:
        h: what the norm read, centred where the norm centres.
        z: what it wrote, without its bias.
        inverse: one over its weight, zero where that is zero; None without a weight.
    """
    if inverse is not None:
        z = z * inverse
        h = torch.where(inverse == 0, 0.0, h)
    return (z * h).sum(-1, keepdim=True) / (h * h).sum(-1, keepdim=True).clamp_min(torch.finfo(z.dtype).tiny)


def norm_ratio(
    scale: Float[Tensor, "*tokens 1"],
    size: Float[Tensor, "*tokens 1"],
    overlap: Float[Tensor, "*tokens 1"],
    least: float,
) -> Float[Tensor, "*tokens 1"]:
    """q = rms(h) / rms(h + a) = (1 + 2 sigma <zhat, a>/d + sigma^2 |a|^2/d)^(-1/2).

    Args:
        scale: sigma. size: |a|^2/d. overlap: <zhat, a>/d.
        least: bound from below of the number whose root is taken, which an estimate may bring to zero.
    """
    return (scale * torch.add(scale * size, overlap, alpha=2) + 1).clamp_min(least).rsqrt()


def scale_sensitivity(
    z: Float[Tensor, "*tokens d"],
    carried: Float[Tensor, "*tokens d"],
    scale: Float[Tensor, "*tokens 1"],
    size: Float[Tensor, "*tokens 1"],
    overlap: Float[Tensor, "*tokens 1"],
) -> Float[Tensor, "*tokens 1"]:
    """|dD / d log sigma|^2 of D = (q - 1) z + sigma q (gamma * a), Norm2's own formula.

    Args:
        z: without the norm's bias. carried: gamma * a, gamma the norm's weight.
        scale, size, overlap: as `norm_ratio` takes them.
    """
    ratio = norm_ratio(scale, size, overlap, least=1e-12)
    of_z = -scale * (overlap + scale * size) * ratio**3
    of_a = scale * (ratio + of_z)
    return of_z**2 * _dot(z, z) + 2 * of_z * of_a * _dot(z, carried) + of_a**2 * _dot(carried, carried)


def _dot(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).sum(-1, keepdim=True)
