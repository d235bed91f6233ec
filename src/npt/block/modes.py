"""Modes of converted blocks and observers of their passes, as typed context managers around a forward pass.

    with running_as(layers, Mode.ORIGINAL):            # the unconverted model
        teacher = model(**inputs)
    with watching(layers, lambda layer, record: ...):  # h, a and y of every pass through a block
        model(**inputs)
    with watching_deltas(layers, lambda layer, deltas: ...):  # dW of every targeted projection, in factors
        model(**inputs)

Each puts back what was there before, also after an error. They may be nested.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from npt.block.hooks import BlockObserver, DeltaObserver, Mode

if TYPE_CHECKING:
    from npt.block.layer import NPTLayer

__all__ = ["Mode", "running_as", "watching", "watching_deltas"]


@contextmanager
def running_as(layers: Sequence[NPTLayer], mode: Mode | None) -> Iterator[None]:
    """Blocks run as `mode` says; None is the active adapter, as configured."""
    before = [layer.mode for layer in layers]
    try:
        for layer in layers:
            layer.mode = mode
        yield
    finally:
        for layer, old in zip(layers, before, strict=True):
            layer.mode = old


@contextmanager
def watching(layers: Sequence[NPTLayer], see: BlockObserver | None) -> Iterator[None]:
    """Hands h, a and y of every pass through a block's own forward to `see(layer, record)`; None: nobody watches."""
    before = [layer.hooks.on_block for layer in layers]
    try:
        for layer in layers:
            layer.hooks.on_block = see
        yield
    finally:
        for layer, old in zip(layers, before, strict=True):
            layer.hooks.on_block = old


@contextmanager
def watching_deltas(layers: Sequence[NPTLayer], see: DeltaObserver | None) -> Iterator[None]:
    """Hands the weight deltas of every pass to `see(layer, {projection: delta})`, gate and up before down."""
    before = [layer.hooks.on_deltas for layer in layers]
    try:
        for layer in layers:
            layer.hooks.on_deltas = see
        yield
    finally:
        for layer, old in zip(layers, before, strict=True):
            layer.hooks.on_deltas = old
