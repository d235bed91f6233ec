"""Text that a context must not change: its second moments at some blocks, and other text on which the damage is measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from npt.common.limits import context_of
from npt.data.sampling import sample_blocks
from npt.editing.absorbing.lesson import Apart
from npt.editing.absorbing.stream import Blocks, outputs_of
from npt.editing.statistics import (
    LENGTH,
    Moments,
    begins_with_bos,
    digest_of,
    moments_kept,
    moments_of,
    own_text,
    token_rows,
)
from npt.errors import NPTError

#: Texts of `LENGTH` tokens that the base writes, on which the damage is measured.
WATCHED = 24
#: The same for facts, whose `limit` is measured on it.
WATCHED_FOR_FACTS = 8
#: Rows of a piece of text that a step by gradient reads.
PIECE = 2
#: Of the text by which a setting is chosen, and of the text of the figure that is reported; 0 is that of the statistics.
CHOOSING, REPORTING = 1, 2


class GeneralText:
    """Text of a base, or given, that must stay as it is.

    Args:
        model: as `EditStore` takes it.
        tokenizer: the model's.
        blocks: the model's.
        statistics: "self" (the base writes it) or a list of texts.
        cache_dir: a folder that keeps what was computed; None for none.
        progress: show progress bars.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        blocks: Blocks,
        statistics: str | Sequence[str],
        cache_dir: Path | None,
        progress: bool,
    ):
        self.model, self.tokenizer, self.blocks, self.statistics = model, tokenizer, blocks, statistics
        self.cache_dir, self.progress = cache_dir, progress
        self._rows: list[list[int]] | None = None
        self._moments: Moments = {}
        self._taken = False

    @property
    def known(self) -> list[list[int]] | None:
        """Token ids of the text; None before it was asked for."""
        return self._rows

    def take(self, rows: Sequence[Sequence[int]]) -> None:
        """Takes token ids of another store's text for its own."""
        if self._rows != (own := [list(map(int, row)) for row in rows]):
            self._rows, self._moments, self._taken = own, {}, True

    def leave(self) -> None:
        """Goes back to this store's own text, where that of another one was taken and no context is left beside it."""
        if self._taken:
            self._rows, self._moments, self._taken = None, {}, False

    def check(self) -> None:
        """Checks that texts which were given are those that were taken.

        Raises:
            NPTError: they differ.
        """
        if not self._taken or isinstance(self.statistics, str):
            return
        if token_rows(self.tokenizer, list(self.statistics), "statistics") != self._rows:
            raise NPTError(
                "statistics: the contexts in the store were absorbed beside other text; give that, or no statistics to go on "
                "beside it"
            )

    def rows(self) -> list[list[int]]:
        """Token ids of the text. The base has to be alone where it writes it."""
        if self._rows is None and isinstance(self.statistics, str):
            width = self.blocks.shape(0)[0]
            self._rows = own_text(self.model, self.tokenizer, width, self.cache_dir)
        elif self._rows is None:
            self._rows = token_rows(self.tokenizer, list(self.statistics), "statistics")
        return self._rows

    def moments(self, layers: Sequence[int]) -> Moments:
        """C (f, f) of some blocks, float64 of the float32 that a file keeps. The base has to be alone."""
        missing = {layer: self.blocks.down(layer) for layer in layers if layer not in self._moments}
        if missing:
            self._moments |= moments_kept(
                self.model, missing, f"text {digest_of(self.rows())}", self.cache_dir,
                lambda downs: moments_of(self.blocks.base, downs, self.rows(), progress=self.progress),
            )  # fmt: skip
        return {layer: self._moments[layer] for layer in layers}

    def watched(self, seed: int) -> Apart:
        """Other text that the base writes itself, to be compared with what the base says of it. The base has to be alone.

        Args:
            seed: `CHOOSING` or `REPORTING`.
        """
        return self._apart(self.watched_rows(seed))

    def pieces(self, count: int) -> list[Apart]:
        """So many first pieces of the text, of `PIECE` rows each, to be compared as `watched`. The base has to be alone."""
        rows = self.rows()[: PIECE * count]
        return [self._apart(rows[at : at + PIECE]) for at in range(0, len(rows), PIECE)]

    def _apart(self, rows: Sequence[Sequence[int]]) -> Apart:
        kept = [len(row) for row in rows]
        counted = torch.tensor([i for i, n in enumerate(kept) for _ in range(n)])
        return Apart(self.blocks, rows, kept, outputs_of(self.blocks, rows, kept, [])[1], counted)

    def watched_rows(self, seed: int, count: int | None = None) -> list[list[int]]:
        """Token ids of the text of `watched`, of so many rows; None for `WATCHED`."""
        found = sample_blocks(
            self.model, self.tokenizer, count or WATCHED, min(LENGTH, self._longest()), seed=seed, cache_dir=self.cache_dir,
            label="general", progress=self.progress,
        )  # fmt: skip
        start = 0 if begins_with_bos(self.tokenizer) else 1
        return [list(row)[start:] for row in found["input_ids"]]

    def _longest(self) -> int:
        return context_of(self.blocks.base.config) or LENGTH
