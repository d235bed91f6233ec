"""Blocks to score: those that an adapter has not seen. A text's later blocks take the place of those left out."""

from __future__ import annotations

from typing import Any

import datasets
import numpy as np

from npt.data.packing import Packer
from npt.data.seen import Seen
from npt.errors import DataError

#: How many times as many blocks as wanted are read from a text without an end, in search of some that were not seen.
MOST_READ = 16


class Unseen:
    """Chooses the blocks of texts that are not in a record, and notes how many were left out.

    Args:
        trained: text that is not to be scored; None where no text is to be left out.
    """

    def __init__(self, trained: Seen | None):
        self.trained = trained
        #: For the report.
        self.notes: list[str] = []

    def first(self, name: str, packer: Packer, count: int | None, *, has_end: bool = True) -> datasets.Dataset:
        """The first `count` unseen blocks of a text; fewer where it has no more, all where `count` is None.

        Args:
            name: of the text, for notes and errors. has_end: False for a text that may be too large to be read whole.

        Raises:
            DataError: every block was seen.
        """
        wanted = count
        while True:
            packer.read(wanted)
            blocks = packer.blocks(wanted)
            fresh = np.flatnonzero(self._fresh(blocks))
            if count is None or wanted is None or len(fresh) >= count or packer.count < wanted:
                break
            if not has_end and wanted >= MOST_READ * count:
                break
            wanted *= 2
        kept = fresh[:count]
        end = int(kept[-1]) + 1 if len(kept) == count else len(blocks)
        return self._chosen(name, blocks, kept, end - len(kept))

    def last(
        self, name: str, blocks: datasets.Dataset, start: int, count: int, packer: Packer | None = None
    ) -> datasets.Dataset:
        """The last `count` unseen blocks of those from `start` on.

        Args:
            packer: reads on where these are too few, None where `blocks` is all there is.

        Raises:
            DataError: every block was seen.
        """
        while True:
            # The text before `start` too: the document that is cut there began in it.
            fresh = np.flatnonzero(self._fresh(blocks))
            fresh = fresh[fresh >= start]
            more = 2 * len(blocks)
            if len(fresh) >= count or packer is None:
                break
            packer.read(more)
            if packer.count <= len(blocks):
                break
            blocks = packer.blocks(more)
        kept = fresh[len(fresh) - min(count, len(fresh)) :]
        first = int(kept[0]) if len(kept) == count and count else start
        return self._chosen(name, blocks, kept, len(blocks) - first - len(kept))

    def among(self, name: str, blocks: datasets.Dataset, *, or_all: bool = False) -> datasets.Dataset:
        """The unseen ones of some blocks that nothing can replace.

        Args:
            or_all: where every block was seen, return all, for a report that says so.

        Raises:
            DataError: every block was seen.
        """
        kept = np.flatnonzero(self._fresh(blocks))
        return blocks if or_all and not len(kept) else self._chosen(name, blocks, kept, len(blocks) - len(kept))

    def _fresh(self, blocks: Any) -> np.ndarray:
        """(blocks,) bool: those that were not seen."""
        return np.ones(len(blocks), dtype=bool) if self.trained is None else ~self.trained.covers(blocks)

    def _chosen(self, name: str, blocks: datasets.Dataset, kept: np.ndarray, left_out: int) -> datasets.Dataset:
        if left_out and not len(kept):
            raise DataError(
                f"{name}: all {left_out} block(s) that could be scored were trained on, and nothing is left; give other text, "
                "or set data.score_seen_text=true to score it all the same"
            )
        if left_out:
            self.notes.append(
                f"{left_out} block{'s' * (left_out > 1)} of {name} were trained on and are left out; "
                f"{len(kept)} others are scored"
            )
        whole = len(kept) == len(blocks)
        return blocks if whole else blocks.select(kept)
