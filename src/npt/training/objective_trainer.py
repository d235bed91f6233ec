"""`ObjectiveTrainer`: HF Trainer with objectives of npt's own, exact resume and figures beside the frozen base.

Phase 1 (`npt.equivalence.trainer`) and Phase 2 (`npt.finetuning.trainer`) add what they optimise and what they log.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PrinterCallback, ProgressCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from npt.common.precision import all_finite
from npt.common.processes import any_process, env_flag, first_does, total
from npt.common.sharded import fsdp_accelerator, local_part, through
from npt.data.batches import collated, complete_batch, scored_positions
from npt.errors import NPTError
from npt.evaluation.divergence import summarize, token_divergences
from npt.training.bad_batch import raise_nonfinite
from npt.training.callbacks import BestAdapterCallback, ProgressBarCallback, close_bars
from npt.training.checkpoints import DurableTrainer, finished_checkpoint
from npt.training.resume import (
    argument_settings,
    check_adapter,
    check_record,
    new_record,
    text_record,
)
from npt.training.steps import run_steps
from npt.tuner.converted import (
    ConvertedModel,
    adapter_config,
    check_batch,
    device_of,
    hidden_dtype,
    npt_layers,
    own_parameters,
    text_record_of,
)
from npt.tuner.nonfinite import find_nonfinite

logger = logging.getLogger(__name__)

#: Blocks of the training set from which the objectives' constants are measured; fixed, so that a resumed run agrees.
SCALE_BLOCKS = 8


class StepObjective(Protocol):
    """The loss of a micro-batch. `__call__` returns a tuple of scalars, the first of which carries the gradient."""

    name: str

    @property
    def per_block(self) -> bool:
        """True where each block has a loss and a gradient of its own."""

    def __call__(self, model: Any, inputs: dict[str, Tensor], items: Tensor | float) -> tuple[Tensor, ...]:
        """The shares of the step's losses; items: counted tokens of the whole step."""

    def prepare(self, model: Any, first: dict[str, Tensor]) -> None:
        """Checks the model and measures constants, from a batch of the first blocks of the text."""


def only_components_train(model: nn.Module) -> bool:
    """True where nothing but NPT components is trained."""
    own = own_parameters(model)
    return all(p in own for p in model.parameters() if p.requires_grad)


def check_trained(model: nn.Module) -> None:
    """Checks that nothing but components is trained, no adapter inside the base for one.

    Raises:
        NPTError: what the components learn from would change while they learn it.
    """
    own = own_parameters(model)
    others = [name for name, p in model.named_parameters() if p.requires_grad and p not in own]
    if others:
        raise NPTError(
            f"{len(others)} parameters beside the NPT components are trained too, first {others[0]}: the model that they "
            "learn from would change while they learn; freeze those with requires_grad_(False), as a conversion does"
        )


class ObjectiveTrainer(DurableTrainer):
    """Trains an adapter with a schedule of objectives.

    Resume, accumulation, mixed precision, schedules, distributed launch and trackers are HF Trainer's; checkpoints are
    whole or not there (`npt.training.checkpoints`). A loss or gradient that is not finite stops the run before the step.
    `npt.training.overridden` lists the methods of HF's that this class and its base override.

    Args:
        model: a PEFT model with an active adapter.
        args: HF's TrainingArguments; the datasets hold packed blocks (`npt.data.pack`).
        schedule: [(first step, objective), ...] from step 0 on.
        settings: further settings that decide the result, by name. They are kept in every checkpoint, beside those that the
            arguments and objectives decide, and compared when training goes on from one.
        text_settings: settings that chose the text; named where the text is another one.
        progress: shows training and evaluations by `npt.common.progress`, in the place of HF's bar.
        kwargs: as `transformers.Trainer`.

    Raises:
        NPTError: the schedule does not begin at step 0.
    """

    def __init__(
        self,
        model: ConvertedModel,
        args: TrainingArguments,
        schedule: Sequence[tuple[int, Any]],
        *,
        settings: Mapping[str, Any] | None = None,
        text_settings: Mapping[str, Any] | None = None,
        progress: bool = False,
        **kwargs: Any,
    ):
        args.remove_unused_columns = False
        args.label_names = ["labels"]
        if args.ddp_find_unused_parameters is None and only_components_train(model):
            args.ddp_find_unused_parameters = False  # each of them has a gradient in every step
        if args.fsdp_plugin_args is not None or env_flag("ACCELERATE_USE_FSDP"):
            fsdp_accelerator(args)
        if args.n_gpu > 1:
            # nn.DataParallel would take so many times training.batch_size, and one GPU would do the work.
            logger.warning("one of the %d GPUs is used; start a process for each with torchrun", args.n_gpu)
            args._n_gpu = 1
        super().__init__(model=model, args=args, **kwargs)
        if progress:
            for theirs in (ProgressCallback, PrinterCallback):
                self.remove_callback(theirs)
            self.add_callback(ProgressBarCallback())
        self.progress = progress
        self.schedule = sorted(schedule, key=lambda x: x[0])
        if self.schedule[0][0] != 0:
            raise NPTError(f"the objective schedule begins at step {self.schedule[0][0]}; give one for step 0")
        halved = hidden_dtype(model) == torch.float16
        if halved and self.accelerator.mixed_precision != "fp16" and not all(own.per_block for _, own in self.schedule):
            logger.warning(
                "the base is in float16 and no loss is scaled: small gradients will be lost; use "
                "optimization.mixed_precision=fp16, or model.dtype=bfloat16"
            )
        # Losses are divided by the counted tokens of the whole step, over labels[:, 1:].
        self.model_accepts_loss_kwargs = True
        self._loss_shifts_labels = True
        self.settings, self.text_settings = dict(settings or {}), dict(text_settings or {})
        self._sums: list[float] = []
        self._sums_from: int | None = None  # the step before the first one in the sums
        self._last_inputs: dict[str, Tensor] = {}
        self._last_objective = ""
        self._texts: dict[str, Any] = {}
        self._compared: Path | None = None

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Prepares the objectives, then trains as HF's does.

        Args:
            resume_from_checkpoint: a folder, or True for the newest finished one of `args.output_dir`.

        Raises:
            CheckpointError: there is no finished checkpoint; it was made with other settings, another base or other text
                (`check_resume`).
        """
        if resume_from_checkpoint:
            checkpoint = finished_checkpoint(resume_from_checkpoint, Path(str(self.args.output_dir)))
            self.check_resume(checkpoint)
            resume_from_checkpoint = str(checkpoint)
        text: Any = self.eval_dataset if self.is_streamed else self.train_dataset
        rows = list(islice(text, SCALE_BLOCKS))
        first = collated(rows, self.data_collator, device_of(self.model))
        check_batch(self.model, first["input_ids"], "training text")
        for _, objective in self.schedule:
            objective.prepare(self.model, first)
        self.before_training()
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            close_bars(self.callback_handler.callbacks)

    def before_training(self) -> None:
        """Does what is left to do between the objectives' preparation and the first step."""

    def objective_settings(self) -> dict[str, Any]:
        """{name: value} of the objectives' part of `decisive_settings`."""
        return {"training.objective": [objective.name for _, objective in self.schedule]}

    def decisive_settings(self) -> dict[str, Any]:
        """{name: value} of all that decides the result beside the adapter, its base and the text."""
        return {
            **argument_settings(self.args, self.accelerator.mixed_precision, self.accelerator.num_processes),
            **self.objective_settings(),
            **self.settings,
        }

    def training_record(self) -> dict[str, Any]:
        """The record that a checkpoint of this step keeps (`npt.training.resume`)."""
        self._texts = self._texts or {"train": text_record(self.train_dataset), "eval": text_record(self.eval_dataset)}
        return new_record(
            self.decisive_settings(),
            self._texts,
            text_settings=self.text_settings,
            step=self.state.global_step,
            steps=self.args.max_steps,
            epochs=self.args.num_train_epochs,
            starts=[start for start, _ in self.schedule],
            eval_steps=self.args.eval_steps,
        )

    def check_resume(self, checkpoint: Path) -> None:
        """Compares this training with the one that a checkpoint is of; all processes call it.

        More steps, other logs and other places are no difference. A checkpoint of an earlier npt has no record of its
        settings and text, which the log then says.

        Raises:
            CheckpointError: another option of the adapter, another base, setting or text; fewer steps than were taken.
        """
        if checkpoint == self._compared:
            return
        chooses = any(isinstance(callback, BestAdapterCallback) for callback in self.callback_handler.callbacks)
        if npt_layers(self.model):  # the options of another method are among the settings
            first_does(lambda: check_adapter(checkpoint, adapter_config(self.model)))
        first_does(
            lambda: check_record(checkpoint, self.training_record(), ("train", "eval") if chooses else ("train",))
        )
        self._compared = checkpoint

    def is_finished(self, checkpoint: Path) -> bool:
        """True where nothing is left to train after a checkpoint; HF's Trainer would take one more step."""
        state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        args = self.args
        given = args.max_steps if args.max_steps > 0 else None
        batches = len(self.get_train_dataloader()) if given is None else 0  # a stream has no length
        steps = run_steps(batches, args.gradient_accumulation_steps, args.num_train_epochs, given)
        return state.global_step >= steps or any(
            callback.patience_is_over(state.global_step, args)
            for callback in self.callback_handler.callbacks
            if isinstance(callback, BestAdapterCallback)
        )

    @property
    def objective(self) -> Any:
        """The objective of the current step."""
        return [objective for start, objective in self.schedule if start <= self.state.global_step][-1]

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        """Moves the model as HF's does, unless its frozen weights are offloaded: then it is in its place already."""
        if not any(parameter.is_meta for parameter in model.parameters()):
            super()._move_model_to_device(model, device)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Returns the objective's total for one micro-batch, as its share of the optimiser step."""
        unwrapped, inputs = self.accelerator.unwrap_model(model), complete_batch(inputs)
        check_batch(unwrapped, inputs["input_ids"], "training text")
        if (record := text_record_of(unwrapped)) is not None:
            record.add_batch(inputs)
        items = scored_positions(inputs["labels"]).sum() if num_items_in_batch is None else num_items_in_batch
        # The model's own forward carries autocast; the objectives call what is inside it.
        with self.accelerator.autocast():
            losses = through(model, lambda: self.objective(unwrapped, inputs, items))
        self._stop_unless(math.isfinite(float(losses[0].detach())), lambda: "the loss", inputs)
        if self._sums_from is None:
            self._sums_from, self._sums = self.state.global_step, [0.0] * len(losses)
        # DDP and FSDP average over processes, where shares of one sum are to be added. Blocks without labels are counted
        # batch by batch, and Trainer averages over accumulated ones itself.
        together = self.args.average_tokens_across_devices and num_items_in_batch is not None
        count = self.accelerator.num_processes
        parts = 1 if together else count
        if num_items_in_batch is None:
            parts *= self.current_gradient_accumulation_steps
        for i, value in enumerate(losses):
            self._sums[i] += float(value.detach()) / parts
        self._last_inputs, self._last_objective = inputs, self.objective.name
        loss = losses[0] * (count if together else 1)
        return (loss, {}) if return_outputs else loss

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """HF's step; checks the gradient before an optimiser sees it. With a gradient scaler, the scaler checks."""
        loss: Tensor = super().training_step(*args, **kwargs)
        if self.accelerator.scaler is None:
            found = {n: local_part(p.grad) for n, p in self.model.named_parameters() if p.grad is not None}

            def broken() -> str:
                name = next((name for name, gradient in found.items() if not all_finite([gradient])), "a parameter")
                return f"the gradient of {name}"

            self._stop_unless(all_finite(list(found.values())), broken, self._last_inputs)
        return loss

    def _stop_unless(self, finite: bool, what: Callable[[], str], inputs: dict[str, Tensor]) -> None:
        """Stops all processes where one of them met a value that is not finite."""
        if not any_process(not finite):
            return
        model, step = self.accelerator.unwrap_model(self.model), self.state.global_step + 1
        where = through(self.model, lambda: find_nonfinite(model, inputs, together=True))
        raise_nonfinite(None if finite else what(), where, inputs, step, Path(self.args.output_dir))

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds the objective's own figures to every logged training step."""
        if "loss" in logs:
            steps = max(1, self.state.global_step - (self._sums_from or 0))
            # In double precision and over all processes, which HF's own sum is not.
            sums = (total(torch.tensor(self._sums, dtype=torch.float64)) / steps).tolist()
            logs["loss"] = sums[0]
            logs.update(self.logged_figures(sums))
            self._sums_from = None
        super().log({**logs, "world_size": self.accelerator.num_processes}, *args, **kwargs)

    def logged_figures(self, sums: list[float]) -> dict[str, Any]:
        """The figures of a logged training step beside its loss.

        Args:
            sums: the objective's losses, the first of which is the loss, as means over the steps since the last log.
        """
        return {"objective": self._last_objective}

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Perplexity of both models, their ratio and the mean KL on the evaluation blocks."""
        blocks = self.eval_dataset if eval_dataset is None else eval_dataset
        model = self.accelerator.unwrap_model(self.model)
        compare = partial(
            token_divergences, model, blocks,
            batch_size=self.args.per_device_eval_batch_size, collate=self.data_collator,
            progress=self.progress and self.is_world_process_zero(),
        )  # fmt: skip
        figures = summarize(through(self.model, compare))
        values = {
            "npt_perplexity": figures["perplexity"]["npt_perplexity"],
            "original_perplexity": figures["perplexity"]["original_perplexity"],
            "perplexity_ratio": figures["perplexity"]["perplexity_ratio"],
            "mean_kl": figures["divergence"]["mean_kl"],
            "top1_agreement": figures["divergence"]["top1_agreement"],
            **self.evaluated_figures(figures),
        }
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in values.items()}
        self.log(dict(metrics))
        self.control: TrainerControl = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def evaluated_figures(self, figures: Mapping[str, Any]) -> dict[str, float]:
        """{"loss": the figure that training lowers} of an evaluation, with what else a phase logs of it.

        Args:
            figures: of `npt.evaluation.divergence.summarize`.
        """
        return {"loss": figures["divergence"]["mean_kl"]}
