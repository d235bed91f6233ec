"""The error of each block's output against the original block's, on the original's stream and on the model's own."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from npt.block.families import blocks_of
from npt.block.hooks import first_tensor
from npt.block.layer import BlockRecord, NPTLayer
from npt.block.modes import Mode, running_as, watching
from npt.tuner.converted import ConvertedModel, active_layers, run_backbone

Batches = Iterable[dict[str, Tensor]]
#: Sequences whose hidden states of all blocks are held at once.
STREAM_ROWS = 4


class _Comparison:
    """Sums of errors over tokens, and the figures computed from them."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = defaultdict(float)

    def add(self, found: Tensor, expected: Tensor, before: Tensor) -> None:
        """Adds tokens, (tokens, d) each. The relative error is that of `found`, over the norm of `expected` - `before`."""
        error, sums = found - expected, self.sums
        sums["square"] += float(error.square().sum())
        sums["update"] += float((expected - before).square().sum())
        sums["cosine"] += float(torch.cosine_similarity(found, expected, dim=-1).sum())
        sums["max"] = max(sums["max"], float(error.abs().max()))
        sums["tokens"] += len(error)
        sums["entries"] += error.numel()

    def figures(self) -> dict[str, float]:
        """mse, cosine_similarity, relative_error, max_absolute_diff."""
        f = self.sums
        return {
            "mse": f["square"] / f["entries"],
            "cosine_similarity": f["cosine"] / f["tokens"],
            "relative_error": (f["square"] / max(f["update"], 1e-300)) ** 0.5,
            "max_absolute_diff": f["max"],
        }


@torch.no_grad()
def layer_equivalence(model: ConvertedModel, batches: Batches) -> dict[str, dict[str, Any]]:
    """{"layer_<i>": {mse, cosine_similarity, relative_error, max_absolute_diff, own_stream}} of block outputs.

    Both blocks get the original model's h and a on real tokens; for `own_stream`, with the same figures in it, those of
    the converted model's own forward. relative_error is the error's norm over the norm of the original update y - h.
    """
    layers = active_layers(model)
    teacher = {layer.index: _Comparison() for layer in layers}
    own = {layer.index: _Comparison() for layer in layers}
    mask: list[Tensor] = []

    def on_teachers(layer: NPTLayer, record: BlockRecord) -> None:
        _see(layer, record, None, teacher[layer.index], mask[0])

    def on_own(layer: NPTLayer, record: BlockRecord) -> None:
        _see(layer, record, Mode.EXACT, own[layer.index], mask[0])

    for batch in batches:
        mask[:] = [batch["attention_mask"].bool()]
        with running_as(layers, Mode.ORIGINAL), watching(layers, on_teachers):
            run_backbone(model, batch)
        with watching(layers, on_own):
            run_backbone(model, batch)
    return {
        f"layer_{index}": {**teacher[index].figures(), "own_stream": own[index].figures()} for index in sorted(teacher)
    }


def _see(layer: NPTLayer, record: BlockRecord, mode: Mode | None, comparison: _Comparison, mask: Tensor) -> None:
    """Compares a pass with the other block, NPT's (None) or the original (Mode.EXACT), on the same h and a."""
    other = record.hidden_states + layer.update_from(record.hidden_states, record.attention, mode)
    h, here, there = (x[mask].double() for x in (record.hidden_states, record.output, other))
    found, expected = (there, here) if mode is None else (here, there)
    comparison.add(found, expected, h)


@torch.no_grad()
def residual_stream(model: ConvertedModel, batches: Batches) -> dict[str, dict[str, float]]:
    """{"layer_<i>": {relative_error, cosine_similarity}} of the residual stream after each block from the first converted.

    Each model runs on its own stream, so the blocks' errors add up. They are relative to the stream's own norm.
    """
    layers, blocks = active_layers(model), list(blocks_of(model.get_base_model()))
    kept: dict[int, Tensor] = {}
    comparisons = {index: _Comparison() for index in range(layers[0].index, len(blocks))}

    def keep(index: int) -> Callable[..., None]:
        def hook(module: Any, args: Any, output: Any) -> None:
            kept[index] = first_tensor(output)

        return hook

    handles = [blocks[index].register_forward_hook(keep(index)) for index in comparisons]
    try:
        for batch in batches:
            for start in range(0, len(batch["input_ids"]), STREAM_ROWS):
                rows = {key: value[start : start + STREAM_ROWS] for key, value in batch.items()}
                mask = rows["attention_mask"].bool()
                run_backbone(model, rows)
                own = dict(kept)
                with running_as(layers, Mode.ORIGINAL):
                    run_backbone(model, rows)
                for index, comparison in comparisons.items():
                    expected = kept[index][mask].double()
                    comparison.add(own[index][mask].double(), expected, torch.zeros_like(expected))
    finally:
        for handle in handles:
            handle.remove()
    found = {f"layer_{index}": comparison.figures() for index, comparison in comparisons.items()}
    return {name: {key: f[key] for key in ("relative_error", "cosine_similarity")} for name, f in found.items()}
