"""The one sign of progress, for everything slow in this package: a bar on a terminal, a line every half minute in a file."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from npt.common.display import duration

logger = logging.getLogger(__name__)

T = TypeVar("T")
#: Takes the number of steps done since the last call.
Advance = Callable[[int], None]
#: Seconds between two lines where progress goes into a file.
LINE_SECONDS = 30.0
#: The bars on the terminal: a phase within a phase adds its bar below.
_shown: list[Progress] = []


def progress_bar(
    label: str, total: int | None, shown: bool, *, unit: str, done: int = 0
) -> AbstractContextManager[Advance]:
    """Progress of one phase; the context gives the function that advances it.

    On a terminal and in a notebook it is a bar that vanishes when done. Elsewhere (a file, a batch system's log) it is a log
    line every `LINE_SECONDS`, on stderr where no logging is set up. A program that logs warnings only sees neither.

    Args:
        label: what is being done. total: steps there are, None where that is unknown. shown: False for no sign of progress.
        unit: what a step is, such as "blocks". done: steps that were done before.
    """
    if not shown or _wants_warnings_only():
        return nullcontext(lambda steps: None)
    console = Console(stderr=True)
    if console.is_terminal or console.is_jupyter:
        return _bar(console, label, total, unit, done)
    return _lines(label, total, unit, done)


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


def _wants_warnings_only() -> bool:
    """True where logging is set up and leaves information out, as `npt --quiet` does."""
    return logger.hasHandlers() and logging.getLogger("npt").level > logging.INFO


def _say(line: str) -> None:
    """Logs a line. Where nothing is set up to show it, it goes to stderr, as a bar would."""
    if logger.hasHandlers() and logger.isEnabledFor(logging.INFO):
        logger.info("%s", line)
    else:
        print(line, file=sys.stderr, flush=True)


@contextmanager
def _lines(label: str, total: int | None, unit: str, before: int) -> Iterator[Advance]:
    start = time.monotonic()
    done, last, said = before, start, False

    def advance(steps: int) -> None:
        nonlocal done, last, said
        done += steps
        now = time.monotonic()
        if now - last >= LINE_SECONDS:
            _say(f"{label}: {_state(done, total, unit, (done - before) / (now - start))}")
            last, said = now, True

    yield advance
    if said:
        _say(f"{label}: {done:,} {unit} in {duration(time.monotonic() - start)}")


def _state(done: int, total: int | None, unit: str, rate: float) -> str:
    """Steps done, of how many, how many a second, and the time left at that rate."""
    shown = f"{rate:,.0f} {unit}/s" if rate >= 10 else f"{rate:.2g} {unit}/s"
    if total is None:
        return f"{done:,} {unit}, {shown}"
    left = f", {duration((total - done) / rate)} left" if rate else ""
    return f"{done:,} of {total:,} {unit}, {shown}{left}"


@contextmanager
def _bar(console: Console, label: str, total: int | None, unit: str, before: int) -> Iterator[Advance]:
    if _shown:
        outer = _shown[-1]
        task = outer.add_task(label, total=total, completed=before, unit=unit)
        try:
            yield lambda steps: outer.advance(task, steps)
        finally:
            outer.remove_task(task)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[unit]}"))
    times = (TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, *times, console=console, transient=True) as bar:
        _shown.append(bar)
        task = bar.add_task(label, total=total, completed=before, unit=unit)
        try:
            yield lambda steps: bar.advance(task, steps)
        finally:
            _shown.remove(bar)
