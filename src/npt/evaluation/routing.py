"""How often the NPT model sends a token to the experts that its original sends it to."""

from __future__ import annotations

from collections import defaultdict
from statistics import fmean
from typing import Any

from torch import Tensor

from npt.evaluation.look import Batch, Observer


class Routing(Observer):
    """The report's `routing`, of every mixture of experts from the first converted block on; each model on its own stream."""

    def __init__(self) -> None:
        self.same: dict[int, float] = defaultdict(float)
        self.shared: dict[int, float] = defaultdict(float)
        self.experts: dict[int, int] = {}
        self.tokens = 0

    def begin(self, batch: Batch) -> None:
        """Keeps which tokens are real."""
        self.mask = batch["attention_mask"].bool().flatten()
        self.tokens += int(self.mask.sum())

    def see_routes(self, original: dict[int, Tensor], own: dict[int, Tensor]) -> None:
        """Compares the sets of experts."""
        for index, experts in original.items():
            one, other = (x.reshape(len(self.mask), -1)[self.mask] for x in (experts, own[index]))
            common = (one[:, :, None] == other[:, None]).any(-1).sum(-1)
            self.experts[index] = one.shape[1]
            self.same[index] += float((common == one.shape[1]).sum())
            self.shared[index] += float(common.sum())

    def figures(self) -> dict[str, Any]:
        """{mean_agreement, per_layer: layer_<i>: experts_per_token, agreement, shared_experts}; empty for a dense model.

        agreement: share of tokens with the same set of experts. shared_experts: mean share of a token's experts in common.
        """
        if not self.experts:
            return {}
        per_layer = {
            f"layer_{index}": {
                "experts_per_token": count,
                "agreement": self.same[index] / max(1, self.tokens),
                "shared_experts": self.shared[index] / max(1, count * self.tokens),
            }
            for index, count in sorted(self.experts.items())
        }
        return {"mean_agreement": fmean(f["agreement"] for f in per_layer.values()), "per_layer": per_layer}
