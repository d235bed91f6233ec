"""Weight deltas of several blocks at work on a model, each by a hook on its `down` projection."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor

from npt.block.modes import having
from npt.editing.absorbing.stream import Blocks
from npt.editing.adapter import DownAdapter
from npt.editing.solve import Factors


class Patches:
    """The patched blocks of a model.

    Args:
        blocks: the model's.
        together: the adapters of the store that they belong to.
    """

    def __init__(self, blocks: Blocks, together: list[DownAdapter]):
        self.blocks, self.together = blocks, together
        self.factors: dict[int, Factors] = {}
        self.closed = False
        self._adapters: dict[int, DownAdapter] = {}

    def put(self, layer: int, factors: Factors) -> None:
        """Puts a weight delta to work, rounded to the format that it is computed in."""
        if layer not in self._adapters:
            self._adapters[layer] = DownAdapter(
                self.blocks.down(layer), self.blocks.base, together=self.together, first=True, at_work=not self.closed
            )
        adapter = self._adapters[layer]
        self.factors[layer] = Factors(*(_rounded(part, adapter) for part in (factors.left, factors.right)))
        adapter.set(self.factors[layer])

    def set(self, factors: Mapping[int, Factors]) -> None:
        """Puts these weight deltas to work, and no others."""
        for layer in set(self._adapters) - set(factors):
            self._adapters.pop(layer).close()
        self.factors = {}
        for layer in sorted(factors):
            self.put(layer, factors[layer])

    @contextmanager
    def trying(self) -> Iterator[None]:
        """Nothing is at work at the beginning of a `with` block, and what was before it at the end."""
        before = dict(self.factors)
        self.set({})
        try:
            yield
        finally:
            self.set(before)

    @contextmanager
    def off(self, layer: int | None = None) -> Iterator[None]:
        """The base within a `with` block.

        Args:
            layer: leave only this block's weight delta out; None for all.
        """
        adapters = [adapter for block, adapter in self._adapters.items() if layer in (None, block)]
        with having(adapters, "on", False):
            yield

    @contextmanager
    def opened(self) -> Iterator[None]:
        """The hooks are on within a `with` block, and afterwards as they were before.

        Raises:
            NPTError: another store is at work on the model.
        """
        closed = self.closed
        self.open()
        try:
            yield
        finally:
            if closed:
                self.close()

    def close(self) -> None:
        """Takes the hooks off, and leaves later ones off too, until `open`."""
        self.closed = True
        for adapter in self._adapters.values():
            adapter.close()

    def open(self) -> None:
        """Puts the hooks on again.

        Raises:
            NPTError: another store is at work on the model.
        """
        for adapter in self._adapters.values():
            adapter.open()
        self.closed = False


def _rounded(part: Tensor, adapter: DownAdapter) -> Tensor:
    return part.to(dtype=adapter.dtype).cpu().contiguous()
