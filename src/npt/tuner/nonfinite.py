"""What to do about NaN and infinity: find where they come from, keep the batch, stop before they reach the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from npt.block.families import blocks_of
from npt.block.hooks import first_tensor
from npt.block.modes import Mode, running_as, watching
from npt.common.files import write_file
from npt.common.processes import gather_values, world
from npt.common.sharded import is_sharded
from npt.errors import REMEDY, RunError
from npt.tuner.converted import eval_mode, npt_layers, run_backbone


@torch.no_grad()
def find_nonfinite(model: Any, inputs: dict[str, Tensor], *, together: bool = False) -> str:
    """In words, the first place of a forward pass that is not finite: a weight, or a block of one of the two models.

    together: all processes call it. One alone can't look into a sharded model.
    """
    if is_sharded(model) and not together:
        return "where is not known of a sharded model; one process without FSDP would say"
    names = [(name, p) for name, p in model.named_parameters() if not p.is_meta]
    broken = next((name for name, p in names if not p.isfinite().all()), None)
    if broken is not None:
        return f"weight {broken} is not finite"
    mask = inputs["attention_mask"].bool()
    for mode, which in ((Mode.ORIGINAL, "the original model"), (None, "the NPT model")):
        found: list[str] = []
        layers = npt_layers(model)
        with eval_mode(model), running_as(layers, mode), watching(layers, None):
            handles = [module.register_forward_hook(_look(found, where, mask)) for where, module in _places(model)]
            try:
                hidden = run_backbone(model, inputs)
            finally:
                for handle in handles:
                    handle.remove()
        if found:
            return f"first in {found[0]} of {which}"
        if not hidden[mask].isfinite().all():
            return f"in the last norm of {which}"
    return "in the loss: every block's output is finite"


def _places(model: Any) -> list[tuple[str, Any]]:
    base = model.get_base_model()
    blocks: Any = blocks_of(base)
    return [("the embedding", base.get_input_embeddings()), *((f"block {i}", block) for i, block in enumerate(blocks))]


def _look(found: list[str], where: str, mask: Tensor) -> Any:
    def hook(module: Any, args: Any, output: Any) -> None:
        values = first_tensor(output)
        if not values.reshape(*mask.shape, -1)[mask].isfinite().all():
            found.append(where)

    return hook


def keep_batch(folder: Path, step: int, inputs: dict[str, Tensor]) -> Path:
    """Writes a batch for inspection: input_ids, attention_mask and labels, (rows, tokens) each."""
    rank, _ = world()
    path = folder / f"bad_batch-{step}{f'-process-{rank}' if rank else ''}.safetensors"
    write_file(path, lambda temporary: save_file({n: v.cpu().contiguous() for n, v in inputs.items()}, temporary))
    return path


def raise_nonfinite(what: str | None, where: str, inputs: dict[str, Tensor], step: int, folder: Path) -> None:
    """Keeps the batch and raises, in all processes, what the first of them found; `what` is None where all is finite.

    Raises:
        RunError: always; with what was not finite, where it began, and where the batch lies.
    """
    found = None
    if what is not None:
        path = keep_batch(folder, step, inputs)
        found = (
            f"step {step}: {what} is not finite, {where}. The step was not taken, the adapters saved before are good; the "
            f"batch is kept in {path}; {REMEDY}"
        )
    raise RunError(next(message for message in gather_values(found) if message is not None))
