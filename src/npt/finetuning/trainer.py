"""`FinetuneTrainer`: HF Trainer with the language-model loss, for an NPT adapter or one of another PEFT method."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import TrainingArguments

from npt.data.streaming import StreamedBlocks
from npt.errors import NPTError
from npt.finetuning.anchor import with_anchor
from npt.finetuning.objective import LanguageModelObjective
from npt.training.objective_trainer import ObjectiveTrainer, check_trained
from npt.tuner.converted import npt_layers


class FinetuneTrainer(ObjectiveTrainer):
    """Trains what a PEFT model has trainable on the language-model loss.

    The first step's row of the log also holds `base_loss`, the frozen base's loss on the same tokens. The base stays in eval
    mode whatever the method.

    Args:
        model: a PEFT model with an active adapter; of an NPT adapter commonly the low-rank part trains
            (`npt.finetuning.low_rank.train_low_rank`).
        args: HF's TrainingArguments; the datasets hold packed blocks (`npt.data.pack`).
        anchor_weight: beta, the weight of the KL to the original on `anchor`.
        anchor: blocks that the original wrote (`npt.data.sample_blocks`); needed where the weight is not 0.
        kwargs: as `npt.training.objective_trainer.ObjectiveTrainer` (settings, text_settings, progress), and as
            `transformers.Trainer`.

    Raises:
        NPTError: nothing is trained, something beside the NPT components is, or the anchor is missing or beside a stream.
    """

    def __init__(
        self,
        model: Any,
        args: TrainingArguments,
        *,
        anchor_weight: float = 0.0,
        anchor: Any = None,
        train_dataset: Any = None,
        **kwargs: Any,
    ):
        if npt_layers(model):
            check_trained(model)
        if not any(p.requires_grad for p in model.parameters()):
            raise NPTError("nothing is trained: every parameter is frozen; call npt.finetuning.low_rank.train_low_rank")
        if anchor_weight:
            if anchor is None or isinstance(train_dataset, StreamedBlocks):
                raise NPTError(
                    f"anchor_weight={anchor_weight:g} needs anchor blocks beside training text of fixed blocks; give both, "
                    "or leave anchor_weight out"
                )
            train_dataset = with_anchor(train_dataset, anchor)
        args.logging_first_step = True  # whose loss is the base's, where the model starts as the base
        super().__init__(
            model, args, [(0, LanguageModelObjective(anchor_weight))], train_dataset=train_dataset, **kwargs
        )

    def objective_settings(self) -> dict[str, Any]:
        """{name: value} of what the objective decides."""
        return {**super().objective_settings(), "finetuning.anchor_weight": self.objective.anchor_weight}

    def compute_loss(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The objective's total for one micro-batch; measures the base in the first step."""
        unwrapped = self.accelerator.unwrap_model(model)
        if not npt_layers(unwrapped) and not self.args.gradient_checkpointing:
            unwrapped.eval()  # no dropout, as in a converted model
        self.objective.measures_base = self.state.global_step == 0
        return super().compute_loss(model, *args, **kwargs)

    def logged_figures(self, sums: list[float]) -> dict[str, Any]:
        """The parts of the loss, and the base's loss beside the first step's."""
        found: dict[str, Any] = {"language_loss": sums[1]}
        if self.objective.anchor_weight:
            found["anchor_kl"] = sums[2]
        if self._sums_from == 0 and self.state.global_step == 1:
            found["base_loss"] = sums[3]
        return {**found, **super().logged_figures(sums)}

    def evaluated_figures(self, figures: Mapping[str, Any]) -> dict[str, float]:
        """The loss on the evaluation blocks, the base's beside it."""
        perplexity = figures["perplexity"]
        return {"loss": perplexity["npt_log_perplexity"], "base_loss": perplexity["original_log_perplexity"]}
