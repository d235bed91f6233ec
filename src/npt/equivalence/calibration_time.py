"""The time that a calibration's own arithmetic takes on this machine, beside the forward passes that bring the text."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from npt.block.layer import BlockRecord, NPTLayer
from npt.block.probing import execution_device
from npt.common.precision import wide_dtype
from npt.equivalence.block_fit import BlockFit, first_tokens
from npt.equivalence.scale import descend, step_count

#: Tokens of the two fits that are timed.
FEW, MANY = 256, 1024
#: Steps of the hidden units that are timed.
STEPS = 20


@dataclass(frozen=True)
class FitSeconds:
    """Seconds for all blocks: once, per token of the chunk that gain and carry are fitted on, per token after it, per step of
    the hidden units.
    """

    once: float = 0.0
    chunk: float = 0.0
    later: float = 0.0
    chunk_tokens: int = 0
    step: float = 0.0

    def of(self, tokens: int) -> float:
        """Seconds for so many tokens."""
        first = min(tokens, self.chunk_tokens)
        if not tokens:
            return 0.0
        return self.once + first * self.chunk + (tokens - first) * self.later + step_count(first) * self.step


@torch.no_grad()
def fit_seconds(layers: Sequence[NPTLayer]) -> FitSeconds:
    """Times the fit of the last block on random h and a; leaves fitted values in its component."""
    layer, size = layers[-1], layers[-1].shape("up")[0]
    device, generator = execution_device(layer.module("down")), torch.Generator().manual_seed(0)
    dtype = layer.weight.dtype if layer.weight.is_floating_point() else torch.float32  # else a quantised one
    h, a = (torch.randn(1, MANY, size, generator=generator).to(device, dtype) for _ in range(2))
    few, _, _ = _times(layer, h[:, :FEW], a[:, :FEW])
    many, later, end = _times(layer, h, a)
    chunk = max(0.0, many - few) / (MANY - FEW)
    count = len(layers)
    return FitSeconds(
        once=count * (max(0.0, few - FEW * chunk) + end),
        chunk=count * chunk,
        later=count * later / MANY,
        chunk_tokens=first_tokens(layers),
        step=count * _step_seconds(layer, h[0]),
    )


def _step_seconds(layer: NPTLayer, x: Tensor) -> float:
    """Seconds of one step of the hidden units, the mean of `STEPS` on inputs x (tokens, d); zero without units."""
    if layer.own.hidden_units is None:
        return 0.0
    units, x = layer.own.hidden_units, x.to(wide_dtype(x.dtype))
    weights, generator = torch.ones_like(x[:, 0]), torch.Generator().manual_seed(0)
    with torch.enable_grad():
        parameters = [p.detach().clone().to(x).requires_grad_() for p in (*units, x[0], x[0, :1])]
        start = time.perf_counter()
        descend(parameters, x.__getitem__, x[:, 0], weights, generator, STEPS)
        if x.is_cuda:
            torch.cuda.synchronize(x.device)
    return (time.perf_counter() - start) / STEPS


def _times(layer: NPTLayer, h: Tensor, a: Tensor) -> tuple[float, float, float]:
    """Seconds to fit a chunk, h and a (1, tokens, d), to take as many tokens after it, and to end the fit."""
    record, mask = BlockRecord(h, a, h), torch.ones(h.shape[:2], dtype=torch.bool, device=h.device)
    fit, moments = BlockFit(layer, h.shape[1]), [time.perf_counter()]
    for step in (partial(fit.see, record, mask), partial(fit.see, record, mask), fit.finish):
        step()
        if h.device.type == "cuda":
            torch.cuda.synchronize(h.device)
        moments.append(time.perf_counter())
    start, first, second, end = moments
    return first - start, second - first, end - second
