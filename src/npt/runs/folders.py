"""The folders of a run: an earlier run's files set aside, or taken back to the checkpoint that a run goes on from."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from npt.common.files import keep_lines
from npt.config import RunConfig, save_config
from npt.errors import CheckpointError
from npt.report.run_files import FINETUNE_JSON, METRICS, PAGE, PLOTS_FOLDER, REPORT_JSON, SAMPLES
from npt.runs.tracker_runs import TRACKER_RUNS
from npt.training.callbacks import BEST_METRIC
from npt.training.checkpoints import last_checkpoint, step_of
from npt.training.resume import read_record

logger = logging.getLogger(__name__)


def prepare_folders(config: RunConfig, output: Path, checkpoints: Path, last: Path | None) -> None:
    """Makes a run's folders ready, and writes its configuration there.

    Args:
        last: the checkpoint it goes on from, None for a new run.
    """
    if last is None:
        set_aside(
            output,
            (METRICS, SAMPLES, REPORT_JSON, FINETUNE_JSON, PAGE, PLOTS_FOLDER, TRACKER_RUNS),
        )
        set_aside(checkpoints, ("best_model", "checkpoint-*"))
    else:
        rewind(output, step_of(last), read_record(last).get("eval_steps") or config.training.eval_steps)
    save_config(config, output / "config.yaml")


def set_aside(folder: Path, patterns: tuple[str, ...]) -> Path | None:
    """Moves files that match into a new folder `previous-<n>` beside them, so that a new run overwrites nothing."""
    found = sorted(path for pattern in patterns for path in folder.glob(pattern))
    if not found:
        return None
    number = 1
    while (target := folder / f"previous-{number}").exists():
        number += 1
    target.mkdir()
    for path in found:
        path.rename(target / path.name)
    return target


def checkpoint_to_resume(output: Path, checkpoints: Path) -> Path | None:
    """The newest finished checkpoint; None where a run began and was stopped before its first one.

    Raises:
        CheckpointError: no run has begun there.
    """
    last = last_checkpoint(checkpoints)
    if last is not None:
        logger.info("resuming from %s", last)
    elif (output / "config.yaml").is_file():
        logger.warning("%s: the run there was stopped before its first checkpoint; starting from the beginning", output)
    else:
        raise CheckpointError(f"paths.checkpoint_dir={checkpoints} holds no checkpoint to resume; run without --resume")
    return last


def rewind(output: Path, step: int, eval_steps: int) -> None:
    """Removes from a run's records all lines logged after the checkpoint it goes on from: they will be logged again."""

    def keep(row: dict[str, Any]) -> bool:
        # The one evaluation that follows its step's checkpoint is the last one, where it is not due by eval_steps.
        late = BEST_METRIC in row and step % eval_steps != 0
        return not isinstance(row.get("step"), int) or row["step"] < step + (not late)

    for name in ("metrics.jsonl", "samples.jsonl"):
        keep_lines(output / name, keep)
