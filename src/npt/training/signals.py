"""SIGTERM and Ctrl-C: training finishes its step, saves and leaves; anything else leaves at once, with a message."""

from __future__ import annotations

import logging
import signal
import threading
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from npt.common.processes import any_process
from npt.errors import Stopped

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopSignals(TrainerCallback):
    """A context manager that takes the signals, and a callback that lets training end at the next step."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._training = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        # Python lets only the main thread handle signals; in a thread of someone's program they are that program's.
        if threading.current_thread() is threading.main_thread():
            # A process started to ignore a signal, as nohup and a shell's background do, goes on ignoring it.
            heard = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._handle) for number in heard}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: Any) -> None:
        again, self.received = self.received is not None, signal.Signals(number)
        if not self._training or again:
            raise self.stopped("at once; go on from the last checkpoint with --resume, or start again without")
        logger.warning("%s: finishing this step and saving; once more to leave at once", self.received.name)

    def stopped(self, what: str) -> Stopped:
        """The error that ends the run."""
        number = self.received or signal.SIGTERM
        return Stopped(f"stopped by {number.name} {what}", number)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """From here on a signal lets the step finish and a checkpoint be saved."""
        self._training = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Saves and stops when a signal came, to any of the processes."""
        if any_process(self.received is not None):
            control.should_save = control.should_training_stop = True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """From here on a signal stops the run at once: there is no step to finish."""
        self._training = False
