"""The weight delta that puts values on keys and disturbs a metric least. Pure tensors.

    min tr(dW C dW^T)  s.t.  dW K = R          dW = R (K^T M K + rho I)^-1 K^T M,   M = C^-1

K (f, n) holds keys in columns, R (d, n) their values, C (f, f) the second moment of a projection's input over text. With
M = I, n = 1 and rho = 0 the row is NPT's transient key k^T / |k|^2; with M = C^-1 and n = 1 it is ROME's (arXiv 2202.05262),
with rho > 0 MEMIT's (arXiv 2210.07229). Keys are scaled to length 1 in the metric first, so rho means the same for every key.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from npt.errors import NPTError

#: Added to C's diagonal, relative to its mean: text that has fewer tokens than the key has numbers leaves C singular.
EPSILON = 1e-2
#: The smallest pivot of a Gram matrix of keys of length 1 that still counts as one more direction, by the numbers' format.
_SMALLEST = {torch.float64: 1e-9, torch.float32: 1e-5}


class Metric:
    """M = (C + epsilon mean(diag C) I)^-1, as a map of keys.

    Args:
        moment: C (f, f), symmetric, in the format to compute in; None for M = I.
        epsilon: the share of C's mean diagonal that is added to it.

    Raises:
        NPTError: C is not finite, or has a negative direction.
    """

    def __init__(self, moment: Tensor | None, epsilon: float = EPSILON):
        self._factor: Tensor | None = None
        if moment is None:
            return
        full = moment + epsilon * moment.diagonal().mean() * torch.eye(len(moment), dtype=moment.dtype)
        factor, failed = torch.linalg.cholesky_ex(full)
        if int(failed) or not bool(factor.isfinite().all()):
            raise NPTError(
                "statistics: the second moment of the projection's input is not positive definite; use text on which the "
                "model's activations are finite"
            )
        self._factor = factor

    def __call__(self, keys: Tensor) -> Tensor:
        """M K, (f, n), of keys (f, n)."""
        return keys if self._factor is None else torch.cholesky_solve(keys, self._factor)


@dataclass(frozen=True)
class Pairs:
    """Keys and what the weight delta gives for them, in columns.

    keys: K (f, n). whitened: M K (f, n). values: R (d, n).
    """

    keys: Tensor
    whitened: Tensor
    values: Tensor

    def __len__(self) -> int:
        return self.keys.shape[1]

    def to(self, dtype: torch.dtype) -> Pairs:
        """The same pairs in another format."""
        return Pairs(self.keys.to(dtype), self.whitened.to(dtype), self.values.to(dtype))


def joined(parts: Sequence[Pairs]) -> Pairs:
    """The pairs of several edits, in their order."""
    return Pairs(*(torch.cat([getattr(part, name) for part in parts], 1) for name in ("keys", "whitened", "values")))


@dataclass(frozen=True)
class Factors:
    """A weight delta dW = left @ right: left (d, n), right (n, f)."""

    left: Tensor
    right: Tensor

    @property
    def delta(self) -> Tensor:
        """dW (d, f)."""
        return self.left @ self.right


def gram_of(pairs: Pairs) -> Tensor:
    """K^T M K of keys scaled to length 1 in the metric, (n, n): ones on the diagonal, the keys' overlaps beside it."""
    scale = lengths(pairs).rsqrt()
    gram = scale[:, None] * (pairs.keys.T @ pairs.whitened) * scale
    return (gram + gram.T) / 2


def lengths(pairs: Pairs) -> Tensor:
    """k^T M k of every key, (n,).

    Raises:
        NPTError: a key without a length, as of a token at which the projection's input is zero.
    """
    found = (pairs.keys * pairs.whitened).sum(0)
    if bool((found <= 0).any()) or not bool(found.isfinite().all()):
        raise NPTError(
            "a key is zero or not finite: the projection's input at that token is; use another block or prompt"
        )
    return found


def solve(pairs: Pairs, ridge: float = 0.0, scaled: bool = True) -> Factors:
    """The weight delta of n pairs, in the format that they are in.

    Args:
        ridge: rho, beside keys of length 1: 0 puts every value exactly, more lets keys that overlap give way.
        scaled: False leaves keys as long as they are, so that rho is that of published formulas.

    Raises:
        NPTError: without a ridge, two keys are the same up to a factor.
    """
    if scaled:
        scale, gram = lengths(pairs).rsqrt(), gram_of(pairs)
    else:
        gram = pairs.keys.T @ pairs.whitened
        scale, gram = torch.ones(len(pairs), dtype=gram.dtype), (gram + gram.T) / 2
    full = gram + ridge * torch.eye(len(pairs), dtype=gram.dtype)
    factor, failed = torch.linalg.cholesky_ex(full)
    if int(failed) or float(factor.diagonal().min()) ** 2 < _SMALLEST[gram.dtype] * (
        1.0 if scaled else float(full.diagonal().max())
    ):
        one, other = nearest(gram)
        raise NPTError(
            f"keys {one + 1} and {other + 1} of {len(pairs)} are the same up to a factor, so no weight delta gives each its "
            "own value; undo one of the two edits, or use a ridge above 0"
        )
    return Factors(pairs.values * scale, torch.cholesky_solve((pairs.whitened * scale).T, factor))


def nearest(gram: Tensor) -> tuple[int, int]:
    """The two keys of a Gram matrix that overlap most."""
    off = gram.abs() - 2 * torch.eye(len(gram), dtype=gram.dtype)
    place = int(off.argmax())
    return tuple(sorted(divmod(place, len(gram))))  # type: ignore[return-value]
