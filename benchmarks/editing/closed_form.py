"""ROME, MEMIT, AlphaEdit and UltraEdit: published rules on the solve, metric and keys of `npt.editing`.

                 key                                   weight delta
    ROME         mean over prefixes, M = C^-1          v (M k)^T / (k_0^T M k), one edit after the other
    MEMIT        the same, on each of several blocks   R K^T (rho C + K K^T)^-1
    AlphaEdit    the same                              R K^T P (K_p K_p^T P + K K^T P + rho I)^-1
    UltraEdit    every token that predicts the target  V H^T (H H^T + rho I)^-1

k_0 is the bare prompt's key, as in the code of ROME's authors: v was tried at it. With no prefixes that is equation 2 of the
paper. R holds what is missing at the last block's output, divided by the number of blocks still to come. Published defaults
such as MEMIT's rho belong to models with keys of a certain length, and have to be tuned on others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from npt.common.precision import wide
from npt.editing.bench import Bench
from npt.editing.benchmark.methods import Method, Setup, block_outputs, targets_at
from npt.editing.requests import Request
from npt.editing.solve import Factors, Pairs, solve
from npt.editing.trial import Settings
from npt.editing.values import settings_of
from npt.errors import NPTError

#: Share of a value by which the block's output may differ from it.
_UNCHANGED = 1e-2


class Rome(Method):
    """ROME (arXiv 2202.05262) at the setup's middle layer.

    Args:
        setup: see `Method`.
        settings: of `optimised` in `npt.editing.trial.Settings`: steps, rate, weight_decay, essence, clamp.
    """

    def __init__(self, setup: Setup, **settings: Any):
        super().__init__(setup)
        self.settings = settings_of("optimised", settings)
        self.metric = setup.metric(setup.middle)

    def write_many(self, requests: Sequence[Request]) -> None:
        layer = self.setup.middle
        for request in requests:  # each on the model that holds those before
            with self.at(layer) as bench:
                value = self.best_output(bench, request, self.settings)
                (keys,) = bench.keys(self.places(bench, request))
            whitened = self.metric(keys.mean(1, keepdim=True))
            self.deltas.add(layer, solve(Pairs(keys[:, :1], whitened, value[:, None])))


class Spread(Method):
    """What MEMIT and AlphaEdit share: the block output that makes the target follow, reached over several blocks.

    Args:
        setup: see `Method`.
        settings: see `Rome`. The clamp is relative to the block's output, which is longer than the projection's.
    """

    def __init__(self, setup: Setup, **settings: Any):
        super().__init__(setup)
        self.settings = settings_of("optimised", {"clamp": 0.75, **settings})

    def write_many(self, requests: Sequence[Request]) -> None:
        layers, last = self.setup.layers, self.setup.layers[-1]
        with self.at(last) as bench:
            goals = torch.stack([self._goal(bench, request) for request in requests], 1)
        for number, layer in enumerate(layers):
            with self.at(last) as bench:
                bare = [bench.prompts.place(request.prompt, request.subject) for request in requests]
                residual = (goals - block_outputs(bench, bare)) / (len(layers) - number)
            with self.at(layer) as bench:
                keys = torch.stack([self.mean_key(bench, request) for request in requests], 1)
            self.deltas.add(layer, self.step(layer, keys, residual))

    def _goal(self, bench: Bench, request: Request) -> Tensor:
        """z (d,): the block's output at the subject's token that makes the target follow."""
        (bare,) = self.places(bench, request)[:1]
        now = block_outputs(bench, [bare])[:, 0]
        value = self.best_output(bench, request, self.settings, length=float(now.norm()))
        added = value.new_zeros(1, len(bare.ids), len(value)).index_fill(1, torch.tensor(bare.position), 1.0) * value
        with bench.adapter.trying(lambda x: added.to(x)):
            moved = block_outputs(bench, [bare])[:, 0] - now
        if float((moved - value).norm()) > _UNCHANGED * float(value.norm()):
            raise NPTError(
                "MEMIT and AlphaEdit are for blocks whose output holds that of `down` as it is; "
                f"{bench.base.config.model_type} changes it first; leave both out"
            )
        return now + value

    def step(self, layer: int, keys: Tensor, residual: Tensor) -> Factors:
        """The weight delta of one block.

        Args:
            keys: (f, n). residual: R (d, n).
        """
        raise NotImplementedError


class Memit(Spread):
    """MEMIT (arXiv 2210.07229) over the setup's layers.

    Args:
        setup: see `Method`.
        ridge: lambda of equation 15, beside C as a mean over tokens; 15,000 is the authors' for GPT-J.
        settings: see `Spread`.
    """

    def __init__(self, setup: Setup, ridge: float = 15_000.0, **settings: Any):
        super().__init__(setup, **settings)
        self.ridge = ridge
        self._metrics = {layer: setup.metric(layer) for layer in setup.layers}

    def step(self, layer: int, keys: Tensor, residual: Tensor) -> Factors:
        return solve(Pairs(keys, self._metrics[layer](keys), residual), self.ridge, scaled=False)


class AlphaEdit(Spread):
    """AlphaEdit (arXiv 2410.02355) over the setup's layers.

    Args:
        setup: see `Method`.
        threshold: P projects onto C's eigenvectors with a smaller eigenvalue, 0.02 in the paper. It depends on the scale of
            a model's keys; None takes a share of the directions.
        share: of C's eigenvectors, those with the smallest eigenvalues, without a threshold.
        ridge: L2; 10 is the authors' for Llama-3.
        settings: see `Spread`.

    Raises:
        NPTError: no eigenvalue of a layer is below the threshold, or there is no C.
    """

    def __init__(
        self, setup: Setup, threshold: float | None = None, share: float = 0.8, ridge: float = 10.0, **settings: Any
    ):
        super().__init__(setup, **settings)
        self.ridge = ridge
        self._bases = {layer: null_space(setup.moments.get(layer), threshold, share, layer) for layer in setup.layers}
        self._past: dict[int, Tensor] = {}

    def step(self, layer: int, keys: Tensor, residual: Tensor) -> Factors:
        past = self._past.get(layer, keys[:, :0])
        every = torch.cat([keys, past], 1)  # what was written before gets nothing more
        values = torch.cat([residual, residual.new_zeros(len(residual), past.shape[1])], 1)
        basis = self._bases[layer]
        self._past[layer] = every
        return solve(Pairs(every, basis @ (basis.T @ every), values), self.ridge, scaled=False)

    def undo(self) -> None:
        super().undo()
        self._past = {}


def null_space(moment: Tensor | None, threshold: float | None, share: float, layer: int) -> Tensor:
    """C's eigenvectors (f, m) whose eigenvalue is below a threshold, or the share of them with the least; P = U U^T.

    Raises:
        NPTError: there is none, or no C.
    """
    if moment is None:
        raise NPTError("AlphaEdit has to know C; use the metric 'text' or 'domain'")
    if not 0 < share <= 1:
        raise NPTError(f"share={share}: use a number above 0, up to 1")
    values, vectors = torch.linalg.eigh(moment)
    count = max(1, int(share * len(values))) if threshold is None else int((values < threshold).sum())
    if not count:
        raise NPTError(
            f"threshold={threshold}: no eigenvalue of C at block {layer} is below it (the least is {float(values[0]):.3g}); "
            "use a larger one, or a share of the directions"
        )
    return vectors[:, :count]


class UltraEdit(Method):
    """UltraEdit (arXiv 2505.14679) over the setup's layers: one gradient an edit, normalised by running statistics.

    h and g are `down`'s input and the loss's gradient at its output, at each token that predicts a part of the target. Both
    are normalised number by number with the mean and deviation over all tokens so far, which `undo` keeps, since they outlive
    turns in the method too. V = -rate |h^|^2 g^. The very first token alone has no deviation, and its edit is nothing.

    Args:
        setup: see `Method`.
        rate: eta.
        ridge: beside H H^T.
    """

    carries = True

    def __init__(self, setup: Setup, rate: float = 1e-3, ridge: float = 1.0):
        super().__init__(setup)
        self.rate, self.ridge = rate, ridge
        self._running = {layer: Running() for layer in setup.layers}

    def write_many(self, requests: Sequence[Request]) -> None:
        found = {}
        for layer in self.setup.layers:  # all on the model as it is, before any is added
            with self.at(layer) as bench:
                keys, gradients = self._features(bench, requests)
            features = torch.cat([keys, gradients])
            self._running[layer].update(features)
            hats = self._running[layer](features).split([len(keys), len(gradients)])
            values = -self.rate * hats[0].square().sum(0) * hats[1]
            found[layer] = solve(Pairs(keys, keys, values), self.ridge, scaled=False)
        self.passes += len(requests)
        for layer, factors in found.items():
            self.deltas.add(layer, factors)

    def _features(self, bench: Bench, requests: Sequence[Request]) -> tuple[Tensor, Tensor]:
        """(h (f, tokens), g (d, tokens)) in float64 on the CPU, of each record's own mean loss."""
        keys, gradients = [], []
        for request in requests:
            trial = targets_at(bench, [request], Settings())
            inputs, at = trial.inside.inputs[0][0], trial.at
            start = torch.zeros(
                len(inputs), bench.first.size, dtype=bench.adapter.dtype, device=inputs.device, requires_grad=True
            )
            with bench.adapter.trying(lambda x, start=start: start):  # type: ignore[misc]
                aimed = trial.aimed(trial.again())
            loss = torch.nn.functional.cross_entropy(aimed, trial.target.to(aimed.device))
            (gradient,) = torch.autograd.grad(loss, start)
            keys.append(wide(inputs[at]).cpu().double().T)
            gradients.append(gradient[at].cpu().double().T)
        return torch.cat(keys, 1), torch.cat(gradients, 1)


class Running:
    """Mean and deviation of each number over all columns seen so far."""

    def __init__(self) -> None:
        self._count = 0
        self._mean: Tensor | float = 0.0
        self._squares: Tensor | float = 0.0

    def update(self, features: Tensor) -> None:
        """Takes in columns (numbers, n)."""
        new, count = features.shape[1], self._count + features.shape[1]
        mean = features.mean(1)
        apart = mean - self._mean
        spread = (features - mean[:, None]).square().sum(1)
        self._squares = self._squares + spread + apart.square() * self._count * new / count
        self._mean, self._count = self._mean + apart * new / count, count

    def __call__(self, features: Tensor) -> Tensor:
        """Columns less the mean, by the deviation."""
        mean, squares = torch.as_tensor(self._mean), torch.as_tensor(self._squares)
        deviation = (squares / max(self._count - 1, 1)).sqrt()
        return (features - mean[:, None]) / (deviation[:, None] + 1e-8)
