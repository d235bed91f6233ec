"""Arguments of `EditStore`, checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from npt.common.display import one_line
from npt.errors import NPTError

#: Steps that train facts together, at most.
MOST_STEPS = 100_000


def known_ids(edits: Mapping[str, object]) -> str:
    """The ids of a store, for an error."""
    return f"use one of {one_line(', '.join(edits), 120)}" if edits else "the store has none"


def checked_ridge(ridge: float | str) -> float | str:
    """A ridge.

    Raises:
        NPTError: neither "auto" nor a number from 0.
    """
    if ridge == "auto" or (
        isinstance(ridge, int | float) and not isinstance(ridge, bool) and 0 <= ridge < float("inf")
    ):
        return ridge
    raise NPTError(f"ridge={ridge!r}: use 'auto', or a number from 0")


def checked_limit(limit: float | None) -> float | None:
    """A limit on what edits do to text.

    Raises:
        NPTError: neither None nor a number above 0.
    """
    if limit is None or (isinstance(limit, int | float) and not isinstance(limit, bool) and 0 < limit < float("inf")):
        return limit
    raise NPTError(f"limit={limit!r}: use None, or nats above 0")


def checked_steps(steps: int) -> int:
    """Steps that train facts together.

    Raises:
        NPTError: no whole number from 0 to 100,000.
    """
    if type(steps) is not int or not 0 <= steps <= MOST_STEPS:
        raise NPTError(f"refine={one_line(repr(steps), 40)}: use a whole number of steps from 0 to {MOST_STEPS:,}")
    return steps


def checked_layers(layer: int | Sequence[int] | str) -> tuple[int, ...]:
    """Indices of blocks, rising.

    Raises:
        NPTError: no index, or an index twice.
    """
    layers: tuple[Any, ...] = tuple(layer) if isinstance(layer, Sequence) and not isinstance(layer, str) else (layer,)
    if not layers or any(type(one) is not int for one in layers) or len(set(layers)) < len(layers):
        raise NPTError(
            f"layer={one_line(repr(layer), 60)}: use 'auto', or the index of a block or of several, each once"
        )
    return tuple(sorted(layers))
