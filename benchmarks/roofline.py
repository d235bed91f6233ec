"""What a run's own operators cost at the machine's rates: each takes the longer of its products and of its bytes.

Rates are those of a product and of a copy in the same process. Operators are taken as they are called: what a fused kernel
would not write to memory counts, and what a cache holds does too. Python, hooks and launches count nothing, so the distance
from this limit is what they and slow kernels take.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_iter

from benchmarks.timing import Run, interleaved
from npt.planning.counters import WorkCounter

#: Rows, columns and columns of the product; numbers of the copy, which no cache holds.
PRODUCT, COPY = (1024, 1024, 4096), 2**25


class Rates(NamedTuple):
    """What the machine does in a second. products: floating point operations. bytes: read and written."""

    products: float
    bytes: float


def machine_rates(device: str, dtype: torch.dtype, clock: str = "wall") -> Rates:
    """The rates of a matrix product and of a copy, medians of ten."""
    n, k, m = PRODUCT
    x, w = torch.ones(n, k, dtype=dtype, device=device), torch.ones(k, m, dtype=dtype, device=device)
    source = torch.ones(COPY, dtype=dtype, device=device)
    target = torch.empty_like(source)
    times = interleaved({"product": lambda: x @ w, "copy": lambda: target.copy_(source)}, 10, clock)
    moved = 2 * source.numel() * source.element_size()
    return Rates(2 * n * k * m / times["product"]["seconds"], moved / times["copy"]["seconds"])


class _Limit(WorkCounter):
    """Adds up seconds, operator by operator."""

    def __init__(self, rates: Rates):
        super().__init__()
        self.rates, self.seconds = rates, 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        flops, traffic = self.flops, self.traffic
        result = super().__torch_dispatch__(func, types, args, kwargs)
        products, moved = self.flops - flops, self.traffic - traffic
        if products:  # whose operands the counter of bytes leaves out
            tensors = [t for t in tree_iter((args, kwargs, result)) if isinstance(t, Tensor)]
            moved = sum(t.numel() * t.element_size() for t in tensors)
        self.seconds += max(products / self.rates.products, moved / self.rates.bytes)
        return result


def limit_of(run: Run, rates: Rates) -> float:
    """Seconds that a run takes at least."""
    with _Limit(rates) as counter:
        run()
    return counter.seconds
