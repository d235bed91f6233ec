"""Errors a user can cause, each with one line that names the value, the place and the remedy."""

from __future__ import annotations

#: What a person can do about numbers that are not finite.
REMEDY = "use model.dtype=float32 or optimization.mixed_precision='no', a lower training.learning_rate, or other text"


class NPTError(ValueError):
    """Base of every error the package raises for bad input; the command prints it as one line and exits with 2."""


class ConfigError(NPTError):
    """A configuration is unreadable or has unknown, ill-typed or contradictory keys."""


class DataError(NPTError):
    """A text source is missing, unreadable or holds nothing to train on."""


class ConversionError(NPTError):
    """A model can't be converted: unknown family, a block that breaks the conversion contract, a layer out of range."""


class CheckpointError(NPTError):
    """An adapter or checkpoint is missing, incomplete, or belongs to another base model."""


class RunError(NPTError):
    """A run can't go on through no fault of its input: a full disk, numbers that are not finite. Exit status 1."""


class Stopped(RunError):  # noqa: N818 - nothing went wrong
    """Somebody stopped the run (SIGTERM, Ctrl-C). Exit status 128 + the signal's number."""

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.signal_number = signal_number
