"""Batches of packed blocks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from npt.data.packing import IGNORED


def batches_of(blocks: Any, batch_size: int, device: torch.device) -> Iterator[dict[str, Tensor]]:
    """Batches of a dataset of equally long blocks as tensors on a device, completed as `complete_batch` does."""
    for start in range(0, len(blocks), batch_size):
        rows = [blocks[i] for i in range(start, min(start + batch_size, len(blocks)))]
        names = ("input_ids", "attention_mask", "labels")
        columns = {n: torch.as_tensor([row[n] for row in rows]).to(device) for n in names if n in rows[0]}
        yield complete_batch(columns)


def complete_batch(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Adds what may be left out: an attention_mask of ones, and labels that leave padding out."""
    ids = batch["input_ids"]
    mask = batch.get("attention_mask", torch.ones_like(ids))
    labels = batch.get("labels", torch.where(mask.bool(), ids, IGNORED))
    return {**batch, "attention_mask": mask, "labels": labels}


def scored_positions(labels: Tensor) -> Tensor:
    """(batch, tokens - 1) bool: positions whose next token counts (no padding, no join between documents)."""
    return labels[:, 1:] != IGNORED
