"""The figures per converted block, together."""

from __future__ import annotations

from typing import Any

from npt.block.families import family_of
from npt.evaluation.block_errors import BlockErrors, ResidualStream
from npt.evaluation.least_norm import LeastNorms
from npt.evaluation.look import Observer
from npt.evaluation.routing import Routing
from npt.evaluation.weight_deltas import WeightDeltas
from npt.tuner.converted import ConvertedModel, base_of


class Details:
    """The figures per converted block, of a few blocks of text: they cost more per token.

    observers: see that text's passes.
    """

    def __init__(self, model: ConvertedModel):
        self.errors, self.stream = BlockErrors(model), ResidualStream()
        self.deltas, self.norms = WeightDeltas(model), LeastNorms(model)
        self.routing = Routing()
        self.observers: list[Observer] = [self.errors, self.stream, self.deltas, self.norms]
        if family_of(base_of(model)).experts is not None:
            self.observers.append(self.routing)

    def figures(self, tokenizer: Any) -> dict[str, Any]:
        """Their sections of the report; `routing` where the model is a mixture of experts."""
        routing = self.routing.figures()
        return {
            **({"routing": routing} if routing else {}),
            "layer_equivalence": self.errors.figures(),
            "residual_stream": self.stream.figures(),
            "weight_delta_stats": {**self.deltas.figures(tokenizer), "least_joint_norm": self.norms.figures()},
        }
