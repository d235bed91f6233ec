"""Several processes as one, on torch.distributed: who is who, sums and tables over all of them, and work inside the forward
of a model that DDP, FSDP2 or DeepSpeed has wrapped.

In a single process every function returns at once. A function that says "all processes call it" is a collective.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate.utils import str_to_bool
from torch import Tensor

T = TypeVar("T")


def world() -> tuple[int, int]:
    """(this process's rank, number of processes)."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def is_first() -> bool:
    """True for the process that writes the run's files and talks to the user."""
    return world()[0] == 0


def loads_once() -> bool:
    """True where only the first process of a machine reads the weights; the others get theirs as the base is sharded."""
    return world()[1] > 1 and env_flag("ACCELERATE_USE_FSDP") and env_flag("FSDP_CPU_RAM_EFFICIENT_LOADING")


def env_flag(name: str) -> bool:
    """True where accelerate's variable of this name is set to a word that means yes."""
    return bool(str_to_bool(os.environ.get(name, "false")))


def barrier() -> None:
    """Waits for all processes; all call it."""
    if world()[1] > 1:
        dist.barrier()


def wire_device() -> torch.device:
    """The device that the group's collectives need tensors on."""
    return (
        torch.device("cpu") if "gloo" in str(dist.get_backend()) else torch.device("cuda", torch.cuda.current_device())
    )


def total(x: Tensor) -> Tensor:
    """The sum of a tensor over all processes, in its own dtype and place; all call it."""
    if world()[1] == 1:
        return x
    wire = x.detach().clone().to(wire_device())
    dist.all_reduce(wire)
    return wire.to(x.device)


def any_process(flag: bool) -> bool:
    """True where the flag is set in some process; all call it."""
    return bool(total(torch.tensor(float(flag))) > 0)


def gather(x: Tensor) -> list[Tensor]:
    """Every process's tensor, in the order of ranks; they may differ in their first size only. All call it."""
    rank, count = world()
    if count == 1:
        return [x]
    device = wire_device()
    lengths = torch.zeros(count, dtype=torch.long, device=device)
    lengths[rank] = len(x)
    dist.all_reduce(lengths)
    padded = torch.zeros(int(lengths.max()), *x.shape[1:], dtype=x.dtype, device=device)
    padded[: len(x)] = x
    parts = [torch.empty_like(padded) for _ in range(count)]
    dist.all_gather(parts, padded)
    return [part[:n].to(x.device) for part, n in zip(parts, lengths.tolist(), strict=True)]


def gather_values(value: T) -> list[T]:
    """Every process's value, in the order of ranks; all call it. They are sent between this run's own processes only."""
    count = world()[1]
    if count == 1:
        return [value]
    found: list[Any] = [None] * count
    dist.all_gather_object(found, value)
    return found


def from_first(value: T) -> T:
    """The first process's value, everywhere; all call it. It is sent between this run's own processes only."""
    if world()[1] == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def first_does(function: Callable[[], T]) -> T:
    """Lets the first process alone do something, files above all, and gives all of them its result; all call it.

    An error of it is raised in all of them.
    """
    if world()[1] == 1:
        return function()
    found: tuple[Any, BaseException | None] = (None, None)
    if is_first():
        try:
            found = function(), None
        except Exception as error:
            found = None, error
    result, failure = from_first(found)
    if failure is not None:
        raise failure
    return result  # type: ignore[no-any-return]


def share(items: Sequence[T], fill: bool) -> Iterator[tuple[int, T, bool]]:
    """(index, item, whether it counts) of this process's items, every `count`-th.

    fill: all processes get equally many, the last one repeated where they don't divide: a sharded model's forward needs all
    processes.
    """
    rank, count = world()
    for start in range(0, len(items), count):
        if start + rank < len(items) or fill:
            index = min(start + rank, len(items) - 1)
            yield index, items[index], start + rank < len(items)
