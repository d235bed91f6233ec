"""Modes of converted blocks and observers of their passes, as typed context managers around a forward pass.

    with running_as(layers, Mode.ORIGINAL):            # the unconverted model
        teacher = model(**inputs)
    with watching(layers, lambda layer, record: ...):  # h, a and y of every pass through a block
        model(**inputs)
    with watching_deltas(layers, lambda layer, deltas: ...):  # dW of every targeted projection, in factors
        model(**inputs)

Each puts back what was there before, also after an error. They may be nested. Each holds for the thread that entered it: other
threads that run the same model go on as they were.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING

from npt.block.passes import BlockObserver, DeltaObserver, Mode

if TYPE_CHECKING:
    from npt.block.layer import NPTLayer

__all__ = ["Mode", "running_as", "watching", "watching_deltas"]


def running_as(layers: Sequence[NPTLayer], mode: Mode | None) -> AbstractContextManager[None]:
    """Blocks run as `mode` says; None is the active adapter, as configured."""
    return having(layers, "mode", mode)


def watching(layers: Sequence[NPTLayer], see: BlockObserver | None) -> AbstractContextManager[None]:
    """Hands h, a and y of every pass through a block's own forward to `see(layer, record)`; None: nobody watches."""
    return having([layer.hooks.thread.now for layer in layers], "on_block", see)


def watching_deltas(layers: Sequence[NPTLayer], see: DeltaObserver | None) -> AbstractContextManager[None]:
    """Hands the weight deltas of every pass to `see(layer, {projection: delta})`, gate and up before down."""
    return having([layer.hooks.thread.now for layer in layers], "on_deltas", see)


@contextmanager
def having(owners: Sequence[object], name: str, value: object) -> Iterator[None]:
    """An attribute of all owners has a value, and afterwards each its own again."""
    before = [getattr(owner, name) for owner in owners]
    try:
        for owner in owners:
            setattr(owner, name, value)
        yield
    finally:
        for owner, old in zip(owners, before, strict=True):
            setattr(owner, name, old)
