"""Progress: a bar on a terminal, a line every half minute in a file, nothing where only warnings are wanted."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator

import pytest
from rich.console import Console

from npt.common import progress
from npt.common.progress import progress_bar, tracked


class Clock:
    """Stands for the module `time`; its time moves when the test says so."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(progress, "time", found)
    return found


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    written = io.StringIO()
    monkeypatch.setattr(progress, "Console", lambda **_: Console(file=written, force_terminal=True, width=100))
    yield written
    assert not progress._shown


def test_a_file_gets_a_line_every_half_minute(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "npt")
    with progress_bar("Sampling text", 1000, True, unit="tokens") as advance:
        for _ in range(10):
            clock.now += 10
            advance(100)
    assert caplog.messages == [
        "Sampling text: 300 of 1,000 tokens, 10 tokens/s, 70 s left",
        "Sampling text: 600 of 1,000 tokens, 10 tokens/s, 40 s left",
        "Sampling text: 900 of 1,000 tokens, 10 tokens/s, 10 s left",
        "Sampling text: 1,000 tokens in 100 s",
    ]


def test_what_was_done_before_does_not_count_as_speed(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "npt")
    with progress_bar("Training", 100, True, unit="steps", done=60) as advance:
        clock.now += 40
        advance(4)
    assert caplog.messages[0] == "Training: 64 of 100 steps, 0.1 steps/s, 6 min left"


def test_an_unknown_total_has_no_time_left(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "npt")
    for _ in tracked(iter("ab"), "Packing text", True, unit="blocks"):
        clock.now += 31
    assert caplog.messages == [
        "Packing text: 1 blocks, 0.032 blocks/s",
        "Packing text: 2 blocks, 0.032 blocks/s",
        "Packing text: 2 blocks in 62 s",
    ]


def test_a_short_phase_says_nothing(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "npt")
    for _ in tracked("abc", "Calibrating", True, unit="batches"):
        clock.now += 9
    assert not caplog.messages


def test_without_logging_it_goes_to_stderr(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(logging.Logger, "hasHandlers", lambda self: False)
    for _ in tracked("a", "Calibrating", True, unit="batches"):
        clock.now += 60
    assert capsys.readouterr().err.splitlines()[0] == "Calibrating: 1 of 1 batches, 0.017 batches/s, 0 s left"


@pytest.mark.parametrize("shown", [True, False])
def test_nothing_where_only_warnings_are_wanted(
    shown: bool,
    clock: Clock,
    terminal: io.StringIO,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    caplog.set_level(logging.WARNING if shown else logging.INFO, "npt")
    for _ in tracked("a", "Calibrating", shown, unit="batches"):
        clock.now += 60
    assert not terminal.getvalue() and not caplog.messages and not capsys.readouterr().err


def test_a_terminal_gets_one_bar_that_holds_inner_phases(
    terminal: io.StringIO, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "npt")
    with progress_bar("Training", 4, True, unit="steps") as advance:
        advance(1)
        (bar,) = progress._shown
        with progress_bar("Evaluating", 2, True, unit="batches") as inner:
            inner(1)
            assert [(task.description, task.completed) for task in bar.tasks] == [("Training", 1), ("Evaluating", 1)]
        assert [task.description for task in bar.tasks] == ["Training"]
    assert not caplog.messages
    with pytest.raises(ZeroDivisionError), progress_bar("Evaluating", 2, True, unit="batches"):
        raise ZeroDivisionError
    assert "Training" in terminal.getvalue()
