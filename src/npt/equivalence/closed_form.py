"""The formulas of the closed-form fit: tensors in, tensors out (docs/maths.md, section 4).

Nothing here knows a model, a layer or other processes; `npt.equivalence.calibration` passes the text and adds the sums.

    token_sizes, outlier_cutoff, outlier_weights   how much a token counts
    channel_products, alternate                    gain and carry
    Regression, best_regression                    the scale 1 / rms(h), which gain `state` estimates
    token_product, reduced_rank_regression         the low-rank part
    solve_ridge                                    the linear system behind all of them

Symbols: d hidden size, r rank, t the channels of all targets, n the columns of a regression, D = Norm2(h + a) - z.
Sums over tokens are in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:  # and in tests, which check the shapes
    from jaxtyping import Float

#: A token counts as extreme when its |D|^2 or |a|^2 is this many times the median.
OUTLIER_FACTOR = 10.0
#: Standard deviation of a A: tanh is then linear to 0.3 %.
MODULATION_STD = 0.1
#: Ridge of the low-rank fit, relative to the mean diagonal of a^T a, which is close to singular in real models.
LOW_RANK_RIDGE = 1e-4
#: Ridges tried for the scale, relative to the mean variance of its inputs.
SCALE_RIDGES = (1e-8, 1e-6, 1e-4, 1e-2, 1.0, 1e8)
#: Rounds of `alternate`.
ALTERNATIONS = 10


# -- how much a token counts ---------------------------------------------------------------------------------------------


def token_sizes(delta: Float[Tensor, "tokens d"], attention: Float[Tensor, "tokens d"]) -> Float[Tensor, "tokens 2"]:
    """|D|^2, which the fit explains, and |a|^2, which explains it, in float64."""
    norms = [torch.linalg.vector_norm(x, dim=-1, dtype=delta.dtype).double() for x in (delta, attention)]
    return torch.stack(norms, -1).square()


def outlier_cutoff(sizes: Float[Tensor, "tokens 2"]) -> Float[Tensor, " 2"]:
    """The sizes beyond which a token counts as extreme; infinite where the median is zero."""
    medians = sizes.median(0).values
    return torch.where(medians > 0, OUTLIER_FACTOR * medians, torch.inf)


def outlier_weights(sizes: Float[Tensor, "tokens 2"], cutoff: Float[Tensor, " 2"]) -> Float[Tensor, "tokens 1"]:
    """One for a usual token, (cutoff / size)^2 for one beyond a cutoff, in float64.

    The square is needed because the gain's own features grow with |a|^2: with the first power, a token's influence on
    the fit would still grow with its size.
    """
    return (cutoff / sizes.clamp_min(1e-300)).clamp_max(1).amin(-1, keepdim=True).square()


# -- gain and carry ------------------------------------------------------------------------------------------------------


def channel_products(
    columns: Sequence[Float[Tensor, "tokens d"]], weights: Float[Tensor, "tokens 1"]
) -> Float[Tensor, "d n n"]:
    """Per channel, the weighted sums over tokens of the products of n columns, in float64."""
    n = len(columns)
    products = columns[0].new_zeros(columns[0].shape[-1], n, n, dtype=torch.float64)
    for i, column in enumerate(columns):
        weighted = weights * column
        for j in range(i, n):
            products[:, i, j] = products[:, j, i] = (weighted * columns[j]).sum(0)
    return products


def alternate(
    gram: Float[Tensor, "d n n"], count_z: int, count_a: int
) -> tuple[Float[Tensor, " k"], Float[Tensor, " l"], Float[Tensor, " d"]]:
    """(k, l, c): the least squares of D on k . Z + c (A_0 + l . A_1...), solved for c and for (k, l) by turns.

    Args:
        gram: the products of [Z, A, D], as `channel_products` gives them. count_z, count_a: columns of Z and of A.
    """
    gram, right = gram[:, :-1, :-1], gram[:, :-1, -1]
    gain, slope, c = gram.new_zeros(count_z), gram.new_zeros(max(0, count_a - 1)), gram.new_zeros(len(gram))
    shared = [i for i in range(count_z + count_a) if i != count_z or not count_a]
    for _ in range(ALTERNATIONS):
        if count_a:
            v = F.pad(slope, (1, 0), value=1.0)
            rest = right[:, count_z:] - gram[:, count_z:, :count_z] @ gain
            square = v @ gram[:, count_z:, count_z:] @ v
            c = torch.where(square > 0, rest @ v / square, 0)
        if count_z:
            scale = torch.stack([torch.ones_like(c)] * count_z + [c] * len(slope), -1)
            rest = right[:, shared] - (c[:, None] * gram[:, shared, count_z] if count_a else 0)
            products = (scale[:, :, None] * scale[:, None] * gram[:, shared][:, :, shared]).sum(0)
            gain, slope = solve_ridge(products, (scale * rest).sum(0), 1e-10).split([count_z, len(slope)])
    return gain, slope, c


# -- the scale -----------------------------------------------------------------------------------------------------------


class Regression:
    """Weighted moments of [x, 1, y] in float64: enough for any ridge regression of y on x and for its error elsewhere.

    moments (d + 2, d + 2): the sum over tokens of w [x, 1, y]^T [x, 1, y]; zero, of no shape yet, without tokens.
    """

    def __init__(self) -> None:
        self.moments = torch.zeros(())

    def add(
        self, x: Float[Tensor, "tokens d"], y: Float[Tensor, " tokens"], weights: Float[Tensor, "tokens 1"]
    ) -> None:
        """Adds tokens."""
        columns = torch.cat([x, torch.ones_like(weights), y[:, None]], -1)
        self.moments = self.moments + token_product(weights * columns, columns)

    def joined(self, other: Regression) -> Regression:
        """The regression over the tokens of both."""
        both = Regression()
        both.moments = self.moments + other.moments
        return both

    def solve(self, ridge: float) -> tuple[Float[Tensor, " d"], Float[Tensor, ""]]:
        """(direction, offset); the ridge is relative to the mean variance of x."""
        xx, x1, xy = self.moments[:-2, :-2], self.moments[:-2, -2], self.moments[:-2, -1]
        weight, y1 = self.moments[-2, -2], self.moments[-2, -1]
        mean, mean_y = x1 / weight, y1 / weight
        direction = solve_ridge(xx - torch.outer(mean, x1), xy - mean * y1, ridge)
        return direction, mean_y - mean @ direction

    def error(self, direction: Float[Tensor, " d"], offset: Float[Tensor, ""]) -> float:
        """The weighted sum of squared errors of a solution on these tokens."""
        coefficients = torch.cat([direction, offset[None], -torch.ones_like(offset)[None]])
        return float(coefficients @ self.moments @ coefficients)


def best_regression(fitted: Regression, checked: Regression) -> tuple[Float[Tensor, " d"], Float[Tensor, ""]]:
    """(direction, offset) over the tokens of both, with the ridge whose fit to `fitted` errs least on `checked`."""
    errors = [(checked.error(*fitted.solve(ridge)), ridge) for ridge in SCALE_RIDGES]
    return fitted.joined(checked).solve(min(errors)[1])


# -- the low-rank part ---------------------------------------------------------------------------------------------------


def token_product(x: Float[Tensor, "tokens n"], y: Float[Tensor, "tokens t"]) -> Float[Tensor, "n t"]:
    """x^T y of a slice of tokens, in float64 for the sum over slices.

    On the CPU the slice is multiplied in its own float32 or better, which is twice as fast. A GPU may be set to TF32,
    which has too few digits, so there the slice is multiplied in float64.
    """
    return x.double().T @ y.double() if x.is_cuda else (x.T @ y).double()


def reduced_rank_regression(
    gram: Float[Tensor, "d d"], cross: Float[Tensor, "d t"], total_weight: float, rank: int
) -> tuple[Float[Tensor, "d r"], Float[Tensor, "r t"]]:
    """(A, B): the rank-r regression a A B of the targets R on a, with standard deviation `MODULATION_STD` of a A.

    L L^T = S, U from the SVD of L^-1 T, A = L^-T U_r up to scale, B = (A^T S A)^-1 A^T T.

    Args:
        gram: S = a^T a. cross: T = a^T R, side by side for targets of d channels each. Both over weighted tokens.
        total_weight: the sum of the tokens' weights.
    """
    d, scale = len(gram), gram.diagonal().mean()
    ridged = gram + LOW_RANK_RIDGE * scale * torch.eye(d, dtype=gram.dtype, device=gram.device)
    lower = torch.linalg.cholesky(ridged)
    whitened = torch.linalg.solve_triangular(lower, cross, upper=False)
    # Input and down targets have different units: each is scaled to unit energy before directions are chosen.
    whitened = torch.cat([part / part.norm().clamp_min(1e-300) for part in whitened.split(d, -1)], -1)
    # The leading left singular vectors, from a matrix a quarter the size where there are two targets.
    directions = torch.linalg.eigh(whitened @ whitened.T)[1][:, -rank:].flip(-1)
    # An eigenvector may come with either sign; rounding must not choose it.
    directions = directions * directions.gather(0, directions.abs().argmax(0, keepdim=True)).sign()
    a_matrix = torch.linalg.solve_triangular(lower.T, directions, upper=True)
    # A^T S A = I so far: a A has mean square 1 / total_weight.
    a_matrix = a_matrix * (MODULATION_STD * total_weight**0.5)
    return a_matrix, solve_ridge(a_matrix.T @ gram @ a_matrix, a_matrix.T @ cross, 1e-8)


def solve_ridge(gram: Float[Tensor, "n n"], right: Float[Tensor, n * m], ridge: float) -> Float[Tensor, n * m]:
    """(gram + ridge mean(diag gram) I)^-1 right; zero where gram is zero."""
    scale = gram.diagonal().mean()
    if not float(scale) > 0:
        return torch.zeros_like(right)
    identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return torch.linalg.solve(gram + ridge * scale * identity, right)
