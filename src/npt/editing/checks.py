"""Arguments of `EditStore`, checked."""

from __future__ import annotations

from collections.abc import Mapping

from npt.common.display import one_line
from npt.errors import NPTError


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


def check_layer(layer: int | str) -> None:
    """Checks a layer.

    Raises:
        NPTError: neither "auto" nor a whole number.
    """
    if layer != "auto" and type(layer) is not int:
        raise NPTError(f"layer={layer!r}: use 'auto', or the index of a block")
