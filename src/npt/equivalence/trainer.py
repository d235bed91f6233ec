"""`EquivalenceTrainer`: HF Trainer with the equivalence objectives."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments

from npt.common.processes import total, world
from npt.common.sharded import full_tensor, through
from npt.data.batches import block_lengths
from npt.equivalence.objectives import Objective
from npt.equivalence.resume import objective_settings
from npt.equivalence.teacher import ROW, teacher_cache, with_rows
from npt.errors import DataError
from npt.evaluation.weight_deltas import delta_records
from npt.training.objective_trainer import SCALE_BLOCKS, ObjectiveTrainer, check_trained, only_components_train
from npt.tuner.checks import renew_record
from npt.tuner.converted import ConvertedModel, active_layers, adapter_config, base_of

__all__ = ["FIGURE_ROWS", "SCALE_BLOCKS", "EquivalenceTrainer", "only_components_train"]

#: Rows of a step's last batch on which the logged weight deltas are measured.
FIGURE_ROWS = 4


class EquivalenceTrainer(ObjectiveTrainer):
    """Trains the active NPT adapter towards the model it was made from.

    Args:
        model: a PEFT model with an active NPT adapter.
        args: HF's TrainingArguments; the datasets hold packed blocks (`npt.data.pack`).
        objective: an `Objective` (`logits` KL by default), or a schedule [(first step, Objective), ...] from step 0 on.
        teacher_cache: folder for the teacher targets, made at the first run (`npt.equivalence.teacher`).
        teacher_top_k: tokens kept of each next-token distribution.
        kwargs: as `npt.training.objective_trainer.ObjectiveTrainer` (settings, text_settings, progress), and as
            `transformers.Trainer`.
    """

    def __init__(
        self,
        model: ConvertedModel,
        args: TrainingArguments,
        objective: Objective | Sequence[tuple[int, Objective]] | None = None,
        *,
        teacher_cache: str | Path | None = None,
        teacher_top_k: int = 64,
        **kwargs: Any,
    ):
        active_layers(model)  # a readable error before any long work
        check_trained(model)
        objective = objective or Objective()
        schedule = [(0, objective)] if isinstance(objective, Objective) else objective
        super().__init__(model, args, schedule, **kwargs)
        self.teacher_cache, self.teacher_top_k = teacher_cache, teacher_top_k

    def before_training(self) -> None:
        """Makes the teacher targets, and a new record of the base where it has changed."""
        self.read_teacher()
        renew_record(base_of(self.model), adapter_config(self.model))

    def objective_settings(self) -> dict[str, Any]:
        """{name: value} of what the objectives and the teacher targets decide."""
        top_k = None if self.teacher_cache is None else self.teacher_top_k
        return objective_settings([objective for _, objective in self.schedule], top_k)

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

    def logged_figures(self, sums: list[float]) -> dict[str, Any]:
        """The figures that equivalence training is judged by."""
        norm, regularization = self._delta_figures(sums[2])
        return {
            "equivalence_loss": sums[1],
            "mean_delta_norm": norm,
            "regularization_loss": regularization,
            "objective": self._last_objective,
        }

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
