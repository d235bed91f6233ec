"""Trainer callbacks that write a run's files: metrics, samples, the best adapter."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from npt.adapters.weights import save_adapter
from npt.common.files import append_json, write_json
from npt.common.places import place
from npt.common.processes import first_does, is_first
from npt.common.progress import Advance, progress_bar
from npt.common.sharded import through
from npt.evaluation.generation import DEFAULT_PROMPTS, side_by_side
from npt.tuner.converted import ConvertedModel

logger = logging.getLogger(__name__)

#: The figure by which the best adapter is chosen; lower is better.
BEST_METRIC = "eval_mean_kl"


class JsonLinesCallback(TrainerCallback):
    """Appends every logged step to metrics.jsonl, whatever trackers there are."""

    def __init__(self, path: str | Path):
        self.path = place(path)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        """Writes one object."""
        if state.is_world_process_zero and logs:
            append_json(self.path, {"step": state.global_step, **logs})


class ProgressBarCallback(TrainerCallback):
    """The steps of a training as `npt.common.progress` shows all else, in the place of Trainer's own bar."""

    def __init__(self) -> None:
        self._open = ExitStack()
        self._advance: Advance | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Opens the bar at the step from which the training goes on."""
        bar = progress_bar(
            "Training", state.max_steps, state.is_world_process_zero, unit="steps", done=state.global_step
        )
        self._advance = self._open.enter_context(bar)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Advances it."""
        if self._advance is not None:
            self._advance(1)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: Any = None, **kwargs: Any
    ) -> None:
        """Says in one line what the evaluation found."""
        if state.is_world_process_zero and metrics:
            logger.info(
                "step %d: perplexity ratio %.4f, mean KL %.5f, same top token %.1f %%",
                state.global_step, metrics["eval_perplexity_ratio"], metrics[BEST_METRIC],
                100 * metrics["eval_top1_agreement"],
            )  # fmt: skip

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Closes it."""
        self.close()

    def close(self) -> None:
        """Closes the bar."""
        self._open.close()
        self._advance = None


def close_bars(callbacks: Sequence[TrainerCallback]) -> None:
    """Closes the bars of a training that an error may have ended: left open, they would share their line with its message."""
    for callback in callbacks:
        if isinstance(callback, ProgressBarCallback):
            callback.close()
        elif isinstance(callback, ProgressCallback) and callback.training_bar is not None:
            callback.training_bar.close()


class SamplesCallback(TrainerCallback):
    """Every `every` steps, lets both models continue fixed prompts and keeps what they wrote in samples.jsonl."""

    def __init__(
        self,
        path: str | Path,
        model: ConvertedModel,
        tokenizer: Any,
        every: int,
        prompts: Sequence[str] = DEFAULT_PROMPTS,
    ):
        self.path, self.model, self.tokenizer, self.every, self.prompts = place(path), model, tokenizer, every, prompts

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Writes the samples when they are due."""
        if state.global_step % self.every == 0:
            self.write(state.global_step)

    def write(self, step: int) -> None:
        """Generates and appends."""
        samples = through(self.model, lambda: side_by_side(self.model, self.tokenizer, self.prompts))
        for sample in samples if is_first() else ():
            append_json(self.path, {"step": step, **sample})
            logger.info("step %d, %r: NPT %r, original %r", step, sample["prompt"], sample["npt"], sample["original"])


class BestAdapterCallback(TrainerCallback):
    """Keeps the adapter with the lowest mean KL, or another figure, in best_model/; the figures of it stand in best.json.

    With `patience`, training stops after that many evaluations in a row without a new best.
    """

    def __init__(
        self, folder: str | Path, model: ConvertedModel, patience: int | None = None, metric: str = BEST_METRIC
    ):
        self.folder, self.model, self.patience, self.metric = place(folder), model, patience, metric

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: Any = None, **kwargs: Any
    ) -> None:
        """Saves when this evaluation is the best so far."""
        if first_does(lambda: metrics[self.metric] >= self.best()):
            if self.patience_is_over(state.global_step, args):
                logger.info(
                    "no better adapter for %d evaluations; stopping at step %d", self.patience, state.global_step
                )
                control.should_training_stop = True
            return
        save_adapter(self.model, self.folder)
        # Written last: a run killed before this line finds the older figure when it resumes, and saves the adapter again.
        first_does(lambda: write_json(self.folder / "best.json", {"step": state.global_step, **metrics}))

    def patience_is_over(self, step: int, args: TrainingArguments) -> bool:
        """True once `patience` evaluations have passed since the best one."""
        if self.patience is None:
            return False
        path = self.folder / "best.json"
        best = first_does(lambda: json.loads(path.read_text())["step"] if path.is_file() else step)
        return bool(step - best >= self.patience * (args.eval_steps or 1))

    def best(self) -> float:
        """The lowest figure so far, infinity before the first evaluation."""
        path = self.folder / "best.json"
        return float(json.loads(path.read_text())[self.metric]) if path.is_file() else float("inf")
