"""`EquivalenceTrainer`: HF Trainer with the equivalence objectives."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PrinterCallback, ProgressCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from npt.common.precision import all_finite
from npt.common.processes import any_process, env_flag, first_does, total, world
from npt.common.sharded import fsdp_accelerator, full_tensor, local_part, through
from npt.data.batches import block_lengths, collated, complete_batch, scored_positions
from npt.equivalence.objectives import Objective
from npt.equivalence.resume import objective_settings
from npt.equivalence.teacher import ROW, teacher_cache, with_rows
from npt.errors import DataError, NPTError
from npt.evaluation.divergence import summarize, token_divergences
from npt.evaluation.weight_deltas import delta_records
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
from npt.tuner.checks import renew_record
from npt.tuner.converted import (
    ConvertedModel,
    active_layers,
    adapter_config,
    base_of,
    check_batch,
    device_of,
    own_parameters,
)
from npt.tuner.nonfinite import find_nonfinite

logger = logging.getLogger(__name__)

#: Blocks of the training set from which the constants of `local` are measured; fixed, so that a resumed run agrees.
SCALE_BLOCKS = 8
#: Rows of a step's last batch on which the logged weight deltas are measured.
FIGURE_ROWS = 4


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


class EquivalenceTrainer(DurableTrainer):
    """Trains the active NPT adapter towards the model it was made from.

    Resume, accumulation, mixed precision, schedules, distributed launch and trackers are HF Trainer's; checkpoints are
    whole or not there (`npt.training.checkpoints`). A loss or gradient that is not finite stops the run before the step.
    `npt.training.overridden` lists the methods of HF's that this class and its base override.

    Args:
        model: a PEFT model with an active NPT adapter.
        args: HF's TrainingArguments; the datasets hold packed blocks (`npt.data.pack`).
        objective: an `Objective` (`logits` KL by default), or a schedule [(first step, Objective), ...] from step 0 on.
        teacher_cache: folder for the teacher targets, made at the first run (`npt.equivalence.teacher`).
        teacher_top_k: tokens kept of each next-token distribution.
        settings: further settings that decide the result, by name. They are kept in every checkpoint, beside those that the
            arguments and objectives decide, and compared when training goes on from one.
        text_settings: settings that chose the text; named where the text is another one.
        progress: shows training and evaluations by `npt.common.progress`, in the place of HF's bar.
        kwargs: as `transformers.Trainer`.
    """

    def __init__(
        self,
        model: ConvertedModel,
        args: TrainingArguments,
        objective: Objective | Sequence[tuple[int, Objective]] | None = None,
        *,
        teacher_cache: str | Path | None = None,
        teacher_top_k: int = 64,
        settings: Mapping[str, Any] | None = None,
        text_settings: Mapping[str, Any] | None = None,
        progress: bool = False,
        **kwargs: Any,
    ):
        active_layers(model)  # a readable error before any long work
        check_trained(model)
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
        objective = objective or Objective()
        self.schedule = [(0, objective)] if isinstance(objective, Objective) else sorted(objective, key=lambda x: x[0])
        if self.schedule[0][0] != 0:
            raise NPTError(f"the objective schedule begins at step {self.schedule[0][0]}; give one for step 0")
        # Losses are divided by the counted tokens of the whole step, over labels[:, 1:].
        self.model_accepts_loss_kwargs = True
        self._loss_shifts_labels = True
        self.teacher_cache, self.teacher_top_k = teacher_cache, teacher_top_k
        self.settings, self.text_settings = dict(settings or {}), dict(text_settings or {})
        self._sums = [0.0, 0.0, 0.0]
        self._sums_from: int | None = None  # the step before the first one in the sums
        self._last_inputs: dict[str, Tensor] = {}
        self._last_objective = ""
        self._texts: dict[str, Any] = {}
        self._compared: Path | None = None

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Prepares the objectives and the teacher targets, then trains as HF's does.

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
        self.read_teacher()
        renew_record(base_of(self.model), adapter_config(self.model))
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            close_bars(self.callback_handler.callbacks)

    def read_teacher(self) -> None:
        """Makes the teacher targets that are missing, if a folder for them was named, and gives them to the objectives.

        Raises:
            DataError: those in the folder were made from something else.
        """
        folder = self.teacher_cache
        if folder is None or all(objective.teacher is not None for _, objective in self.schedule):
            return
        blocks: Any = self.train_dataset  # type: ignore[has-type]
        shortest, longest = block_lengths(blocks)
        if shortest < longest:
            raise DataError(
                f"teacher_cache={folder}: the training rows have {shortest} to {longest} tokens, and targets are kept for "
                "blocks of one length; pack the text (npt.data.pack), or leave teacher_cache out"
            )
        self.train_dataset: Any = blocks if ROW in blocks.column_names else with_rows(blocks)
        caches = {}
        for kind in dict.fromkeys(objective.teacher_kind for _, objective in self.schedule):
            with self.accelerator.autocast():
                make = partial(
                    teacher_cache,
                    folder,
                    self.accelerator.unwrap_model(self.model),
                    blocks,
                    kind,
                    top_k=self.teacher_top_k,
                    batch_size=self.args.per_device_train_batch_size,
                    precision=self.accelerator.mixed_precision,
                    progress=not self.args.disable_tqdm and self.is_world_process_zero(),
                )
                caches[kind] = through(self.model, make)
        for _, objective in self.schedule:
            objective.teacher = caches[objective.teacher_kind]

    def decisive_settings(self) -> dict[str, Any]:
        """{name: value} of all that decides the result beside the adapter, its base and the text."""
        objectives = [objective for _, objective in self.schedule]
        top_k = None if self.teacher_cache is None else self.teacher_top_k
        return {
            **argument_settings(self.args, self.accelerator.mixed_precision, self.accelerator.num_processes),
            **objective_settings(objectives, top_k),
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
    def objective(self) -> Objective:
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
        if (record := adapter_config(unwrapped).text_record) is not None:
            record.add_batch(inputs)
        items = scored_positions(inputs["labels"]).sum() if num_items_in_batch is None else num_items_in_batch
        # The model's own forward carries autocast; the objectives call what is inside it.
        with self.accelerator.autocast():
            losses = through(model, lambda: self.objective(unwrapped, inputs, items))
        self._stop_unless(math.isfinite(float(losses.total.detach())), lambda: "the loss", inputs)
        if self._sums_from is None:
            self._sums_from = self.state.global_step
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
        loss = losses.total * (count if together else 1)
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

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        """Clips each block by its own norm, as if it trained alone, where blocks have losses of their own; else as HF's.

        DeepSpeed clips by itself, all blocks together. Returns the joint norm, for logs.
        """
        if not self.objective.per_block or self.is_deepspeed_enabled:
            return super()._clip_grad_norm(model)
        self.accelerator.unscale_gradients()
        norms = [
            full_tensor(nn.utils.clip_grad_norm_(group, self.args.max_grad_norm)).to(self.args.device)
            for layer in active_layers(model)
            if (group := [p for p in layer.own.parameters() if p.grad is not None])
        ]
        return torch.linalg.vector_norm(torch.stack(norms))

    def _stop_unless(self, finite: bool, what: Callable[[], str], inputs: dict[str, Tensor]) -> None:
        """Stops all processes where one of them met a value that is not finite."""
        if not any_process(not finite):
            return
        model, step = self.accelerator.unwrap_model(self.model), self.state.global_step + 1
        where = through(self.model, lambda: find_nonfinite(model, inputs, together=True))
        raise_nonfinite(None if finite else what(), where, inputs, step, Path(self.args.output_dir))

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds the figures that equivalence training is judged by to every logged training step."""
        if "loss" in logs:
            steps = max(1, self.state.global_step - (self._sums_from or 0))
            # In double precision and over all processes, which HF's own sum is not.
            sums = (total(torch.tensor(self._sums, dtype=torch.float64)) / steps).tolist()
            logs["loss"], logs["equivalence_loss"], regularization = sums
            logs["mean_delta_norm"], logs["regularization_loss"] = self._delta_figures(regularization)
            logs["objective"] = self._last_objective  # type: ignore[assignment]
            self._sums, self._sums_from = [0.0, 0.0, 0.0], None
        super().log({**logs, "world_size": self.accelerator.num_processes}, *args, **kwargs)

    def _delta_figures(self, regularization: float) -> tuple[float, float]:
        """(mean |dW|_F over real tokens, blocks and projections of the last batch's first rows; the regularisation loss).

        The objective leaves out a `delta` regulariser of weight zero, so its value is taken here.
        """
        model, (rank, _) = self.accelerator.unwrap_model(self.model), world()
        first = self._last_inputs["input_ids"]
        wanted = min(max(0, FIGURE_ROWS - rank * len(first)), len(first))
        # A process whose rows are not among the first runs one all the same: a sharded forward needs every process.
        rows = {name: value[: wanted or 1] for name, value in self._last_inputs.items() if name != "labels"}
        records = through(self.model, lambda: delta_records(model, [rows], effect_tokens=0))
        squares = [[torch.cat(r.squares) for r in entry.values()] for entry in records.values()]
        sums = [torch.stack([x.sqrt().sum(), x.sum(), x.new_tensor(len(x))]) for entry in squares for x in entry]
        found = total(torch.stack(sums) * (wanted > 0))
        means = iter((found[:, :2] / found[:, 2:]).tolist())
        per_block = [[next(means) for _ in entry] for entry in squares]
        norm, square = (fmean(fmean(pair[i] for pair in entry) for entry in per_block) for i in (0, 1))
        measured = self.objective.regularizer == "delta" and not self.objective.regularization_weight
        return norm, square if measured else regularization

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
            "loss": figures["divergence"]["mean_kl"],
        }
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in values.items()}
        self.log(dict(metrics))
        self.control: TrainerControl = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics
