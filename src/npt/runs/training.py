"""Parts of a run that trains, whatever its phase: the evaluations before and after it, and the steps between."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers.integrations import TensorBoardCallback

from npt.common.memory import release_memory
from npt.common.processes import is_first
from npt.common.sharded import full_tensor
from npt.common.stopwatch import Stopwatch
from npt.config import RunConfig
from npt.runs.estimate import EVALUATION, TRAINING
from npt.runs.tracker_runs import continued
from npt.training.callbacks import BEST_METRIC
from npt.training.checkpoints import step_of
from npt.training.objective_trainer import ObjectiveTrainer

#: Folder of tensorboard's events in a run's output folder.
TENSORBOARD = "tensorboard"
#: Change of the parameters, relative to their norm, below which training did nothing.
NO_CHANGE = 1e-7


def evaluate_and_train(
    trainer: ObjectiveTrainer, last: Path | None, spent: Stopwatch, *, trains: bool = True, part: str = TRAINING
) -> list[str]:
    """Evaluates once and trains, or trains the rest from a checkpoint.

    Args:
        last: the checkpoint; None for a new run. trains: False where there is nothing to train. part: the name that the time
            of the training is taken under.

    Returns:
        notes on the training, for the report.
    """
    model: Any = trainer.model
    if last is None:
        with spent.timing(EVALUATION):
            trainer.evaluate()
        release_memory()
    if last is not None and trainer.is_finished(last):
        trainer.state.global_step = step_of(last)
    elif trains:
        before = trained_values(model)
        with spent.timing(part):
            trainer.train(resume_from_checkpoint=None if last is None else str(last))
        moved = (trained_values(model) - before).norm() / before.norm()
        if trainer.state.global_step and moved < NO_CHANGE:
            return [
                f"{trainer.state.global_step} training steps moved the parameters by {moved:.1g} of their norm; see "
                "training.learning_rate"
            ]
    return []


def trained_values(model: Any) -> torch.Tensor:
    """All trained parameters in one vector on the CPU."""
    return torch.cat([full_tensor(p).flatten().double().cpu() for p in model.parameters() if p.requires_grad])


def evaluate_last(config: RunConfig, trainer: ObjectiveTrainer, spent: Stopwatch) -> None:
    """Evaluates the last step, if that is still due."""
    step = trainer.state.global_step
    # Newer versions of transformers evaluate the last step by themselves.
    done = any(entry.get("step") == step and BEST_METRIC in entry for entry in trainer.state.log_history)
    if step % config.training.eval_steps and not done:
        # MLflow's run was ended with the training.
        with spent.timing(EVALUATION), continued(Path(config.paths.output_dir), ()):
            trainer.evaluate()


def place_tensorboard(trainer: ObjectiveTrainer, output: Path, last: Path | None) -> None:
    """Puts tensorboard's events into the run's output folder.

    Args:
        last: the checkpoint that the run goes on from.
    """
    for callback in trainer.callback_handler.callbacks:
        # The evaluation before training would make it write to ./runs, wherever that is.
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
            callback.logging_dir = str(output / TENSORBOARD)
            if last is not None and is_first():  # hides what was logged after the checkpoint
                callback.tb_writer = callback._SummaryWriter(callback.logging_dir, purge_step=step_of(last) + 1)
