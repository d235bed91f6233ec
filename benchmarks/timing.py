"""Times and peaks of several contenders in one process, so that whatever slows the machine slows all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from npt.errors import NPTError
from npt.planning.counters import AllocationCounter

Run = Callable[[], Any]


#: Clocks by name: the wall's, or the process's own processor time, which other work on the machine does not count in.
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "processor": time.process_time}


def check_clock(clock: str) -> None:
    """Checks that a clock sees all of the work.

    Raises:
        NPTError: the process's own time is asked for, which counts neither a GPU nor, as seconds, several threads.
    """
    if clock == "processor" and (torch.cuda.is_available() or torch.get_num_threads() > 1):
        raise NPTError("--clock processor: counts one thread of a CPU; set OMP_NUM_THREADS=1")


def interleaved(contenders: Mapping[str, Run], rounds: int, clock: str = "wall") -> dict[str, dict[str, float]]:
    """{name: {"seconds": median, "spread": half the distance between the quartiles}}.

    In each round every contender runs once, in turn, another one first each time; the first round is thrown away. clock: of
    `CLOCKS`.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    for number in range(rounds + 1):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            seconds = timed(contenders[name], clock)
            if number:
                times[name].append(seconds)
    return {name: {"seconds": float(np.median(t)), "spread": half_quartiles(t)} for name, t in times.items()}


def timed(run: Run, clock: str = "wall") -> float:
    """Seconds of one run, the device's work included."""
    start = moment(clock)
    run()
    return moment(clock) - start


def moment(clock: str = "wall") -> float:
    """Seconds on one of `CLOCKS`, with a GPU's queue empty."""
    synchronize()
    return CLOCKS[clock]()


def half_quartiles(values: list[float]) -> float:
    """Half the distance between the quartiles."""
    return float(np.subtract(*np.percentile(values, [75, 25])) / 2)


def synchronize() -> None:
    """Waits for a GPU's queue."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak(run: Run) -> int:
    """Bytes alive at once during a run above what was there before, counted in allocations (CUDA: by its allocator)."""
    run()
    if torch.cuda.is_available():
        synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() - before
    with AllocationCounter() as counter:
        run()
    return counter.peak


def ratios(seconds: Mapping[str, float], reference: str) -> dict[str, float]:
    """Each value over the reference's."""
    return {name: value / seconds[reference] for name, value in seconds.items() if name != reference}
