"""The figures per converted block, together."""

from __future__ import annotations

from typing import Any

from npt.evaluation.block_errors import BlockErrors, ResidualStream
from npt.evaluation.least_norm import LeastNorms
from npt.evaluation.look import Observer
from npt.evaluation.weight_deltas import WeightDeltas
from npt.tuner.converted import ConvertedModel


class Details:
    """The figures per converted block, of a few blocks of text: they cost more per token.

    observers: see that text's passes.
    """

    def __init__(self, model: ConvertedModel):
        self.errors, self.stream = BlockErrors(model), ResidualStream()
        self.deltas, self.norms = WeightDeltas(model), LeastNorms(model)
        self.observers: list[Observer] = [self.errors, self.stream, self.deltas, self.norms]

    def figures(self, tokenizer: Any) -> dict[str, Any]:
        """Their sections of the report."""
        return {
            "layer_equivalence": self.errors.figures(),
            "residual_stream": self.stream.figures(),
            "weight_delta_stats": {**self.deltas.figures(tokenizer), "least_joint_norm": self.norms.figures()},
        }
