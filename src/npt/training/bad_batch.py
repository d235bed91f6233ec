"""Stops a run whose loss or gradient is not finite, before the optimiser's step, and keeps the batch for inspection."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from npt.common.files import write_file
from npt.common.processes import gather_values, world
from npt.errors import REMEDY, RunError


def keep_batch(folder: Path, step: int, inputs: dict[str, Tensor]) -> Path:
    """Writes a batch for inspection: input_ids, attention_mask and labels, (rows, tokens) each."""
    rank, _ = world()
    path = folder / f"bad_batch-{step}{f'-process-{rank}' if rank else ''}.safetensors"
    write_file(path, lambda temporary: save_file({n: v.cpu().contiguous() for n, v in inputs.items()}, temporary))
    return path


def raise_nonfinite(what: str | None, where: str, inputs: dict[str, Tensor], step: int, folder: Path) -> None:
    """Keeps the batch and raises the same error in all processes: that of the first one with a value that is not finite.

    Args:
        what: the value that is not finite, None in a process where all are. where: its origin in the forward.

    Raises:
        RunError: always; it names the value, its origin and the path of the batch.
    """
    found = None
    if what is not None:
        path = keep_batch(folder, step, inputs)
        found = (
            f"step {step}: {what} is not finite, {where}. The step was not taken, the adapters saved before are good; the "
            f"batch is kept in {path}; {REMEDY}"
        )
    raise RunError(next(message for message in gather_values(found) if message is not None))
