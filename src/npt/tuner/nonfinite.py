"""Finds the first place of a forward pass that is not finite."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from npt.block.families import blocks_of
from npt.block.modes import watching
from npt.block.outputs import first_tensor
from npt.common.sharded import is_sharded
from npt.tuner.converted import ConvertedModel, as_original, eval_mode, npt_layers, run_backbone


@torch.no_grad()
def find_nonfinite(model: ConvertedModel, inputs: dict[str, Tensor], *, together: bool = False) -> str:
    """Returns the first place of a forward pass that is not finite, in words: a weight, or a block of one of the two models.

    Args:
        together: all processes call it. One process alone can't look into a sharded model.
    """
    if is_sharded(model) and not together:
        return "where is not known of a sharded model; one process without FSDP would say"
    names = [(name, p) for name, p in model.named_parameters() if not p.is_meta]
    broken = next((name for name, p in names if not p.isfinite().all()), None)
    if broken is not None:
        return f"weight {broken} is not finite"
    mask = inputs["attention_mask"].bool()
    layers = npt_layers(model)
    ours = "the NPT model" if layers else "the adapted model"
    for mode, which in ((as_original(model), "the original model"), (nullcontext(), ours)):
        found: list[str] = []
        with eval_mode(model), mode, watching(layers, None):
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


def _places(model: ConvertedModel) -> list[tuple[str, nn.Module]]:
    """(its name, module) of the embedding and of every block."""
    base = model.get_base_model()
    blocks: Any = blocks_of(base)
    return [("the embedding", base.get_input_embeddings()), *((f"block {i}", block) for i, block in enumerate(blocks))]


def _look(found: list[str], where: str, mask: Tensor) -> Callable[..., None]:
    """A forward hook that notes `where` once the module's output is not finite on real tokens."""

    def hook(module: Any, args: Any, output: Any) -> None:
        values = first_tensor(output)
        if not values.reshape(*mask.shape, -1)[mask].isfinite().all():
            found.append(where)

    return hook
