"""The runs of experiment trackers: `--resume` goes on with the one that began, where the tracker lets a program name it.

A tracker's callback, transformers' own, begins its run by itself. It reads variables of the environment that say which one to
go on with; those are set here, for the time of a resumed run, from the ids that the first one kept in its output folder.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from npt.common.files import write_json

logger = logging.getLogger(__name__)

#: In a run's output folder: {tracker: id of its run}.
TRACKER_RUNS = "trackers.json"


@dataclass(frozen=True)
class Tracker:
    """A tracker whose runs can be gone on with.

    running: the id of the run that is going on, from the tracker's module; None for none. variable: names the run to go on
    with. more: further variables for that.
    """

    running: Callable[[Any], str | None]
    variable: str
    more: tuple[tuple[str, str], ...] = ()


def _wandb(module: Any) -> str | None:
    return None if module.run is None else module.run.id


def _mlflow(module: Any) -> str | None:
    run = module.active_run()
    return None if run is None else run.info.run_id


def _comet(module: Any) -> str | None:
    running = getattr(module, "get_running_experiment", None) or module.get_global_experiment
    experiment = running()
    return None if experiment is None else experiment.get_key()


#: {module: its tracker}. MLflow refuses another value of a parameter it has, such as the number of steps.
TRACKERS = {
    "wandb": Tracker(_wandb, "WANDB_RUN_ID", (("WANDB_RESUME", "allow"),)),
    "mlflow": Tracker(_mlflow, "MLFLOW_RUN_ID", (("MLFLOW_MAX_LOG_PARAMS", "0"),)),
    "comet_ml": Tracker(_comet, "COMET_EXPERIMENT_KEY"),
}
#: {name in `report_to`: module of the tracker that it logs to}, where these differ.
_MODULES = {"dagshub": "mlflow"}
#: Of `report_to`: trackers that keep everything in the run's own folder.
_IN_FOLDER = ("tensorboard",)


class RememberTrackers(TrainerCallback):
    """Keeps the ids of the trackers' runs in a file, once they have begun."""

    def __init__(self, path: Path):
        self.path = path
        self._kept: dict[str, str] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Keeps those that have begun."""
        self._keep(state)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Keeps those that have begun; the first evaluation comes before training does."""
        self._keep(state)

    def _keep(self, state: TrainerState) -> None:
        if not state.is_world_process_zero:
            return
        found = {name: t.running(sys.modules[name]) for name, t in TRACKERS.items() if name in sys.modules}
        kept = {**self._kept, **{name: run for name, run in found.items() if run is not None}}
        if kept != self._kept:
            write_json(self.path, kept)
            self._kept = kept


@contextmanager
def continued(output: Path, names: Sequence[str]) -> Iterator[None]:
    """The trackers that begin a run within a `with` block go on with the one whose id is kept in `output`.

    Variables that a person set stay as they are.

    Args:
        names: of the trackers that are on, as in `training.report_to`.
    """
    kept = _read(output / TRACKER_RUNS)
    wanted: dict[str, str] = {}
    for name, tracker in TRACKERS.items():
        if name in kept and tracker.variable not in os.environ:
            wanted |= {tracker.variable: kept[name], **dict(tracker.more)}
    own = {key: value for key, value in wanted.items() if key not in os.environ}
    for name in dict.fromkeys(_MODULES.get(name, name) for name in names):
        given = name in TRACKERS and TRACKERS[name].variable in os.environ
        if name not in _IN_FOLDER and name not in kept and not given:
            logger.warning("%s: the id of its run is not known, so that it begins a new one for what comes now", name)
    os.environ.update(own)
    try:
        yield
    finally:
        for key in own:
            os.environ.pop(key, None)  # MLflow takes its own out


def _read(path: Path) -> dict[str, str]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        logger.warning("%s: not readable; trackers begin new runs", path)
        return {}
    return found
