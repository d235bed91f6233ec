"""The original's own text beside the training text: each training row brings one anchor block with it.

As a column of the training set it is shuffled, resumed and divided among processes with the rows themselves.
"""

from __future__ import annotations

from typing import Any

import datasets

from npt.errors import DataError

#: The column of a training row that holds the token ids of its anchor block.
ANCHOR = "anchor_ids"


def with_anchor(blocks: datasets.Dataset, anchor: Any) -> datasets.Dataset:
    """The training blocks, each with an anchor block; the anchor blocks are used in turn.

    Args:
        blocks: rows to train on. anchor: rows of input_ids of one length (`npt.data.sample_blocks` writes them).

    Raises:
        DataError: no anchor blocks.
    """
    own = [row["input_ids"] for row in anchor]
    if not own:
        raise DataError("finetuning.anchor_weight: there is no anchor text; give at least one block of it")
    return blocks.add_column(ANCHOR, [own[i % len(own)] for i in range(len(blocks))])
