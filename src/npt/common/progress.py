"""The one progress bar, for everything slow in this package."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

T = TypeVar("T")
#: Takes the number of steps done since the last call.
Advance = Callable[[int], None]


def progress_bar(label: str, total: int | None, shown: bool, *, unit: str) -> AbstractContextManager[Advance]:
    """A bar on stderr that vanishes when done; the context gives the function that advances it.

    Args:
        label: what is being done. total: steps there are, None where that is unknown. shown: False for no sign of progress.
        unit: what a step is, such as "blocks".
    """
    console = Console(stderr=True)
    if not shown:
        return _silent()
    if console.is_terminal or console.is_jupyter:
        return _bar(console, label, total, unit)
    return _in_a_file()


def tracked(items: Iterable[T], label: str, shown: bool, *, unit: str, total: int | None = None) -> Iterator[T]:
    """The items one by one, under a progress bar (see `progress_bar`).

    Args:
        total: the number of items; None takes their length, where they have one.
    """
    if total is None and isinstance(items, Sized):
        total = len(items)
    with progress_bar(label, total, shown, unit=unit) as advance:
        for item in items:
            yield item
            advance(1)


def _silent() -> AbstractContextManager[Advance]:
    return nullcontext(lambda steps: None)


def _in_a_file() -> AbstractContextManager[Advance]:
    """Progress where stderr is a file: none, as a bar would leave a blank line there and nothing else."""
    return _silent()


@contextmanager
def _bar(console: Console, label: str, total: int | None, unit: str) -> Iterator[Advance]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit))
    times = (TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, *times, console=console, transient=True) as bar:
        task = bar.add_task(label, total=total)
        yield lambda steps: bar.advance(task, steps)
