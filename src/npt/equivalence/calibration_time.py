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
from npt.equivalence.block_fit import BlockFit, first_tokens

#: Tokens of the two fits that are timed.
FEW, MANY = 256, 1024


@dataclass(frozen=True)
class FitSeconds:
    """Seconds for all blocks: once, per token of the chunk that gain and carry are fitted on, per token after it."""

    once: float = 0.0
    chunk: float = 0.0
    later: float = 0.0
    chunk_tokens: int = 0

    def of(self, tokens: int) -> float:
        """Seconds for so many tokens."""
        first = min(tokens, self.chunk_tokens)
        return self.once + first * self.chunk + (tokens - first) * self.later if tokens else 0.0


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
    )


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
