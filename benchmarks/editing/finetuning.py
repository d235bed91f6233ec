"""FT-M and LocFT: gradient descent on one down projection, on the target's tokens alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from npt.common.precision import cast
from npt.editing.bench import Bench, chunks
from npt.editing.benchmark.methods import Method, Setup, targets_at
from npt.editing.requests import Request
from npt.editing.solve import Factors
from npt.editing.trial import Settings, Trial
from npt.errors import NPTError


class FineTuning(Method):
    """Adam on a full weight delta of the setup's middle layer, with the mean negative log-likelihood of the targets' tokens.

    Args:
        setup: see `Method`.
        rate: Adam's step.
        steps: the most steps on each batch.
        rows: records of a batch.
        breadth: True goes over all batches again and again with one optimizer (LocFT); False brings each batch to its end
            before the next (FT-M).
        enough: the loss at which a batch, or a whole round over all of them, ends.
        limit: the most that a number of the weight may change; None for no limit (FT+L has one).
    """

    def __init__(
        self,
        setup: Setup,
        rate: float = 5e-4,
        steps: int = 25,
        rows: int = 1,
        breadth: bool = False,
        enough: float = 1e-2,
        limit: float | None = None,
    ):
        super().__init__(setup)
        if rows < 1 or steps < 1:
            raise NPTError(f"rows={rows}, steps={steps}: use whole numbers from 1")
        self.rate, self.steps, self.size, self.breadth = rate, steps, rows, breadth
        self.enough, self.limit = enough, limit

    def write_many(self, requests: Sequence[Request]) -> None:
        layer = self.setup.middle
        with self.at(layer) as bench:
            adapter = bench.adapter
            weight = torch.zeros(
                bench.first.size, bench.first.width, device=adapter.device, dtype=adapter.dtype, requires_grad=True
            )
            trials = [targets_at(bench, part, Settings()) for part in chunks(requests, self.size)]
            for group in [trials] if self.breadth else [[trial] for trial in trials]:
                self._descend(bench, weight, group)
        delta = weight.detach().cpu().double()
        self.deltas.add(layer, Factors(torch.eye(len(delta), dtype=delta.dtype), delta))

    def _descend(self, bench: Bench, weight: Tensor, trials: Sequence[Trial]) -> None:
        optimizer = torch.optim.Adam([weight], lr=self.rate)
        for _ in range(self.steps):
            losses = [self._step(bench, weight, trial, optimizer) for trial in trials]
            if sum(losses) / len(losses) < self.enough:
                break

    def _step(self, bench: Bench, weight: Tensor, trial: Trial, optimizer: torch.optim.Optimizer) -> float:
        """One pass; the loss before its step. A batch whose loss is small enough takes none."""
        self.passes += len(trial.rows)
        with bench.adapter.trying(lambda x: torch.nn.functional.linear(cast(x, weight.dtype), weight)):
            aimed = trial.aimed(trial.again())
        loss = torch.nn.functional.cross_entropy(aimed, trial.target.to(aimed.device))
        found = float(loss.detach())
        if found >= self.enough:
            optimizer.zero_grad()
            weight.grad = torch.autograd.grad(loss, weight)[0]
            optimizer.step()
            if self.limit is not None:
                with torch.no_grad():
                    weight.clamp_(-self.limit, self.limit)
        return found
