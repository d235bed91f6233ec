"""How the cost of the NP component grows with tokens and rank, alone and inside a converted block."""

from __future__ import annotations

import ctypes
import sys
from typing import Any

import numpy as np
import torch

from benchmarks.timing import interleaved
from npt.block.component import ComponentSpec
from npt.planning.formed_deltas import example

TOKENS = (256, 1024, 2048)
RANKS = (8, 16, 32, 64, 128, 256)


def measure(rounds: int, hidden: int = 1024) -> dict[str, Any]:
    """{"microseconds": {rank: {tokens: per token}}, "exponent": {rank: of time over tokens, 1 is linear},
    "per_rank": {"slope", "intercept", "r_square"} of microseconds per token at 1,024 tokens}.

    The cost is everything an NPT block adds to the MLP it has: both values, and adding them.
    """
    keep_heap()
    runs = {(rank, tokens): run(hidden, rank, tokens) for rank in RANKS for tokens in TOKENS}
    times = interleaved({f"{r} {t}": runs[r, t] for r, t in runs}, rounds)
    seconds = {(r, t): times[f"{r} {t}"]["seconds"] for r, t in runs}
    exponent = {r: float(np.polyfit(np.log(TOKENS), np.log([seconds[r, t] for t in TOKENS]), 1)[0]) for r in RANKS}
    each = {r: {t: 1e6 * seconds[r, t] / t for t in TOKENS} for r in RANKS}
    values = [each[r][1024] for r in RANKS]
    slope, intercept = np.polyfit(RANKS, values, 1)
    return {
        "hidden": hidden,
        "microseconds": {str(r): {str(t): v for t, v in row.items()} for r, row in each.items()},
        "exponent": {str(r): e for r, e in exponent.items()},
        "per_rank": {
            "slope": float(slope),
            "intercept": float(intercept),
            "r_square": float(np.corrcoef(RANKS, values)[0, 1] ** 2),
        },
    }


def keep_heap() -> None:
    """Lets the C library keep what is freed (M_MMAP_MAX 0, M_TRIM_THRESHOLD at its most): pages fetched anew for large
    tensors would be measured instead of the component."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(-4, 0)
        mallopt(-1, 2**31 - 1)


def run(hidden: int, rank: int, tokens: int) -> Any:
    """What a converted block does beside its MLP, on random tokens."""
    component, a, z, i = example(ComponentSpec(hidden, hidden * 11 // 4, rank=rank), tokens)

    def once() -> None:
        with torch.no_grad():
            values = component.input_values(a, z, exact_input=a, scale=a[..., :1])
            z + values.shift
            z + component.down_value(a, i, values.modulation)

    return once
