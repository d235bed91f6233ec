"""The loss of fine-tuning: next-token cross-entropy, and optionally the KL to the original on text that it wrote itself.

    loss = sum over counted tokens of -log p(token) / items
         + beta * sum over rows of (counted tokens of the row / items) * mean over positions of KL(original || model)

The KL of a row is taken on the anchor block that accompanies it (`npt.finetuning.anchor`), so that a row weighs alike in both
terms. `items` counts the tokens of the whole optimiser step: the split into micro-batches and processes changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from npt.block.probing import logit_head
from npt.common.precision import wide
from npt.common.sharded import through
from npt.data.batches import scored_positions
from npt.equivalence.objectives import POSITION_CHUNK, check_logit_head, divergence_sum
from npt.finetuning.anchor import ANCHOR
from npt.tuner.converted import as_original, run_backbone
from npt.tuner.trunk import shared_trunk


class LanguageLosses(NamedTuple):
    """One micro-batch's share of the step's losses, as scalars in nats. Only `total` carries a gradient.

    language: the cross-entropy. anchor: the KL, without its weight. base: the base's cross-entropy; zero where not measured.
    """

    total: Tensor
    language: Tensor
    anchor: Tensor
    base: Tensor


@dataclass
class LanguageModelObjective:
    """Cross-entropy plus `anchor_weight` times the KL to the original on its own text.

    Args:
        anchor_weight: beta; 0 leaves the second term out.
        measures_base: also gives the base's cross-entropy on the same tokens, at the cost of a forward pass.
    """

    anchor_weight: float = 0.0
    measures_base: bool = False

    name: ClassVar[str] = "language_model"
    per_block: ClassVar[bool] = False

    def prepare(self, model: Any, first: dict[str, Tensor]) -> None:
        """Checks that the logits can be computed from the last hidden states.

        Raises:
            NPTError: they can't.
        """
        through(model, lambda: check_logit_head(model, first["input_ids"][:1, :8]))

    def __call__(self, model: Any, inputs: dict[str, Tensor], items: Tensor | float) -> LanguageLosses:
        """The losses of one micro-batch {"input_ids", "attention_mask", "labels"}, each (batch, tokens).

        Args:
            model: a PEFT model.
            inputs: the batch; with `anchor_weight` also `ANCHOR`, (batch, tokens) ids of the original's own text.
            items: the counted tokens of the whole optimiser step.
        """
        head, counted = logit_head(model), torch.nn.functional.pad(scored_positions(inputs["labels"]), (0, 1))
        target = torch.nn.functional.pad(inputs["labels"][:, 1:], (0, 1))[counted]
        base = wide(torch.zeros((), device=target.device))
        with shared_trunk(model) if self.measures_base else nullcontext():
            if self.measures_base:
                with torch.no_grad(), as_original(model):
                    base = cross_entropy_sum(head, run_backbone(model, inputs)[counted], target) / items
            language = cross_entropy_sum(head, run_backbone(model, inputs)[counted], target) / items
        if not self.anchor_weight:
            return LanguageLosses(language, language.detach(), torch.zeros_like(base), base)
        anchor = self._anchor(model, head, inputs[ANCHOR], counted.sum(-1) / items)
        return LanguageLosses(language + self.anchor_weight * anchor, language.detach(), anchor.detach(), base)

    def _anchor(self, model: Any, head: Callable[[Tensor], Tensor], ids: Tensor, weights: Tensor) -> Tensor:
        """The sum over rows of a row's weight times its mean KL. ids: (rows, tokens). weights: (rows,)."""
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        with shared_trunk(model):
            with torch.no_grad(), as_original(model):
                teacher = run_backbone(model, inputs).flatten(0, 1)
            student = run_backbone(model, inputs).flatten(0, 1)
        return divergence_sum(head, student, [teacher], wide(weights / ids.shape[1]).repeat_interleave(ids.shape[1]))


def cross_entropy_sum(head: Callable[[Tensor], Tensor], hidden: Tensor, target: Tensor) -> Tensor:
    """Sum over positions of -log p(target) in nats, in chunks of positions.

    Args:
        head: hidden states to logits. hidden: last hidden states (positions, d). target: token ids (positions,).
    """
    found = wide(hidden.new_zeros(()))
    for chunk in torch.arange(len(hidden), device=hidden.device).split(POSITION_CHUNK):
        found = found + checkpoint(_chunk_cross_entropy, head, hidden[chunk], target[chunk], use_reentrant=False)
    return found


def _chunk_cross_entropy(head: Callable[[Tensor], Tensor], hidden: Tensor, target: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(wide(head(hidden)), target, reduction="sum")
