"""The error of each block's output against the original block's, on the original's stream and on the model's own."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from npt.block.layer import BlockRecord, NPTLayer
from npt.block.modes import Mode, watching_deltas
from npt.common.precision import HALF
from npt.evaluation.look import Batch, Observer
from npt.tuner.converted import ConvertedModel, active_layers


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


class BlockErrors(Observer):
    """The report's `layer_equivalence`.

    Both blocks get the original model's h and a on real tokens; for `own_stream` those of the NPT model's own forward.
    relative_error is the error's norm over the norm of the original update y - h.
    """

    def __init__(self, model: ConvertedModel):
        indices = [layer.index for layer in active_layers(model)]
        self.teacher = {index: _Comparison() for index in indices}
        self.own = {index: _Comparison() for index in indices}

    def begin(self, batch: Batch) -> None:
        """Keeps which tokens are real."""
        self.mask = batch["attention_mask"].bool()

    def see_original(self, layer: NPTLayer, record: BlockRecord) -> None:
        """Compares with the NPT block."""
        h, original, found = self._pair(layer, record, None)
        self.teacher[layer.index].add(found, original, h)

    def see_own(self, layer: NPTLayer, record: BlockRecord) -> None:
        """Compares with the original block."""
        h, found, original = self._pair(layer, record, Mode.EXACT)
        self.own[layer.index].add(found, original, h)

    def _pair(self, layer: NPTLayer, record: BlockRecord, mode: Mode | None) -> list[Tensor]:
        """h, the pass's output and that of the block as `mode` says on the same h and a, of real tokens.

        In half precision both outputs are h and an update, unrounded: at massive activations rounding is more than the error.
        """
        h, a = record.hidden_states, record.attention
        with watching_deltas([layer], None):  # this pass is nobody else's
            other = layer.update_from(h, a, mode)
            if h.dtype in HALF:
                own = layer.update_from(h, a, Mode.EXACT if mode is None else None)
                found = [h, h.double() + own, h.double() + other]
            else:
                found = [h, record.output, h + other]
        return [x[self.mask].double() for x in found]

    def figures(self) -> dict[str, dict[str, Any]]:
        """{"layer_<i>": {mse, cosine_similarity, relative_error, max_absolute_diff, own_stream}}."""
        return {
            f"layer_{index}": {**self.teacher[index].figures(), "own_stream": self.own[index].figures()}
            for index in sorted(self.teacher)
        }


class ResidualStream(Observer):
    """The report's `residual_stream`: the stream after each block from the first converted one on.

    Each model runs on its own stream, so the blocks' errors add up. They are relative to the stream's own norm.
    """

    def __init__(self) -> None:
        self.comparisons: dict[int, _Comparison] = defaultdict(_Comparison)

    def begin(self, batch: Batch) -> None:
        """Keeps which tokens are real."""
        self.mask = batch["attention_mask"].bool()

    def see_streams(self, original: dict[int, Tensor], own: dict[int, Tensor]) -> None:
        """Compares the streams."""
        for index, output in original.items():
            expected = output[self.mask].double()
            self.comparisons[index].add(own[index][self.mask].double(), expected, torch.zeros_like(expected))

    def figures(self) -> dict[str, dict[str, float]]:
        """{"layer_<i>": {relative_error, cosine_similarity}}."""
        found = {f"layer_{index}": comparison.figures() for index, comparison in self.comparisons.items()}
        return {name: {key: f[key] for key in ("relative_error", "cosine_similarity")} for name, f in found.items()}
