"""The weight delta that makes a projection give what it gave with a context in front. Pure tensors.

    min  sum_t w_t |dW i_t - r_t|^2 + tr(dW (mu C + lambda mean(diag A) I) dW^T),     A = sum_t w_t i_t i_t^T
    dW = B S^-1,     B = sum_t w_t r_t i_t^T,     S = A + mu C + lambda mean(diag A) I

i_t (f) is the projection's input at token t of a conversation without the context, r_t (d) what its output lacks there of
that with the context, C (f, f) the second moment of the input over text. It is the equation of `npt.editing.solve` with many
keys and a ridge instead of a constraint. Under a rank the best weight delta for the same sum keeps the strongest left singular
directions of dW S^1/2 (reduced-rank regression, Izenman 1975, doi:10.1016/0047-259X(75)90042-1).
"""

from __future__ import annotations

import torch
from torch import Tensor

from npt.common.precision import wide
from npt.editing.solve import Factors
from npt.errors import NPTError


def moments(inputs: Tensor, residuals: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """(A (f, f), B (d, f)) in float64 on the CPU.

    Args:
        inputs: (tokens, f).
        residuals: (tokens, d).
        weights: (tokens,), of every token in the sum.
    """
    inputs, residuals = wide(inputs), wide(residuals)
    weighted = inputs * weights.to(inputs)[:, None]
    return (weighted.T @ inputs).cpu().double(), (residuals.T @ weighted).cpu().double()


def ridged(a: Tensor, text: Tensor, mu: float, lam: float) -> Tensor:
    """S (f, f) of the module's equation.

    Args:
        a: A (f, f).
        text: C (f, f).
        mu: the weight of text.
        lam: lambda, the share of A's mean diagonal that is added to every direction.
    """
    full = a + mu * text
    full = (full + full.T) / 2
    full.diagonal().add_(lam * a.diagonal().mean())
    return full


def solve(a: Tensor, b: Tensor, text: Tensor, mu: float, lam: float, rank: int) -> Factors:
    """The weight delta in two factors, left (d, r) and right (r, f), float64.

    Args:
        a: A (f, f), float64.
        b: B (d, f), float64.
        text: C (f, f), float64.
        mu: the weight of text.
        lam: lambda.
        rank: the most columns of left.

    Raises:
        NPTError: S is singular or not finite.
    """
    factor, failed = torch.linalg.cholesky_ex(ridged(a, text, mu, lam))
    if int(failed) or not bool(factor.isfinite().all()):
        raise NPTError(
            "absorb: the second moment of the projection's input is not positive definite; raise lam, or use a model on which "
            "the context's conversations are finite"
        )
    # dW S^1/2 for the root S = L L^T: B L^-T, as dW = B S^-1.
    scaled = torch.linalg.solve_triangular(factor, b.T, upper=False).T
    vectors = torch.linalg.eigh(scaled @ scaled.T).eigenvectors  # of ascending eigenvalues
    kept = vectors[:, -min(rank, len(b), b.shape[1]) :].flip(1)
    right = torch.linalg.solve_triangular(factor.T, (kept.T @ scaled).T, upper=True).T
    return Factors(kept, right)
