"""Batches of packed blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import datasets
import pyarrow.compute
import torch
from torch import Tensor

from npt.common.display import one_line
from npt.data.packing import IGNORED
from npt.errors import DataError


def batches_of(blocks: Any, batch_size: int, device: torch.device) -> Iterator[dict[str, Tensor]]:
    """Batches of a dataset of equally long blocks as tensors on a device, completed as `complete_batch` does.

    Raises:
        DataError: the blocks of a batch differ in length.
    """
    for start in range(0, len(blocks), batch_size):
        rows = [blocks[i] for i in range(start, min(start + batch_size, len(blocks)))]
        lengths = {len(row["input_ids"]) for row in rows}
        if len(lengths) > 1:
            raise DataError(
                f"rows {start} to {start + len(rows) - 1} have {min(lengths)} to {max(lengths)} tokens, and a batch needs one "
                "length; pack the text (npt.data.pack), or give EquivalenceTrainer a data_collator that pads"
            )
        names = ("input_ids", "attention_mask", "labels", "starts")
        columns = {n: torch.as_tensor([row[n] for row in rows]).to(device) for n in names if n in rows[0]}
        yield complete_batch(columns)


def collated(
    rows: list[Any], collate: Callable[[list[Any]], Mapping[str, Any]], device: torch.device
) -> dict[str, Tensor]:
    """One batch of rows that may differ in length, as a collator pads them, on a device and completed.

    Raises:
        DataError: the rows are not of token ids, or the collator can't join them.
    """
    if rows and (not isinstance(rows[0], Mapping) or "input_ids" not in rows[0]):
        kind = f"columns {', '.join(rows[0])}" if isinstance(rows[0], Mapping) else type(rows[0]).__name__
        raise DataError(
            f"the rows of the data set have no input_ids ({one_line(kind, 80)}); make blocks of text with "
            "npt.data.pack(texts, tokenizer, max_length)"
        )
    try:
        batch = collate(rows)
    except ValueError as error:  # of torch and transformers, for rows of several lengths
        lengths = sorted({len(row["input_ids"]) for row in rows})
        if len(lengths) < 2:
            raise
        raise DataError(
            f"rows of {lengths[0]} to {lengths[-1]} tokens can't be joined by {type(collate).__name__}: pack the text "
            "(npt.data.pack), or give EquivalenceTrainer a data_collator that pads input_ids and labels"
        ) from error
    names = ("input_ids", "attention_mask", "labels")
    return complete_batch({n: torch.as_tensor(batch[n]).to(device) for n in names if batch.get(n) is not None})


def block_lengths(blocks: datasets.Dataset) -> tuple[int, int]:
    """(tokens of the shortest block, of the longest one) of a dataset that is not empty."""
    tables = blocks.select_columns(["input_ids"]).with_format("arrow").iter(1000)
    found = [pyarrow.compute.min_max(pyarrow.compute.list_value_length(t["input_ids"])).as_py() for t in tables]
    return min(f["min"] for f in found), max(f["max"] for f in found)


def with_mask(batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """The columns of a batch that are of text, as tensors, with an attention_mask of ones where there is none."""
    names = ("input_ids", "attention_mask", "labels", "starts")
    found = {n: torch.as_tensor(batch[n]) for n in names if n in batch}
    return {"attention_mask": torch.ones_like(found["input_ids"]), **found}


def complete_batch(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Adds what may be left out: an attention_mask of ones, and labels that leave padding out."""
    ids = batch["input_ids"]
    mask = batch.get("attention_mask", torch.ones_like(ids))
    labels = batch.get("labels", torch.where(mask.bool(), ids, IGNORED))
    return {**batch, "attention_mask": mask, "labels": labels}


def scored_positions(labels: Tensor) -> Tensor:
    """(batch, tokens - 1) bool: positions whose next token counts (no padding, no join between documents)."""
    return labels[:, 1:] != IGNORED
