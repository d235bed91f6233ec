"""Weight deltas of contexts trained by gradient: from zero, as a LoRA begins, or on from those that the closed form found.

    loss = mean KL(model with the context || model as it is) over a batch's tokens + beta mean KL(base || model) over text

Each block's weight delta is left right, of two factors (d, r) and (r, f), both trained by AdamW. Conversations are batched
once; what they read below the lowest patched block never changes, and is computed once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from npt.block.probing import logit_head
from npt.common.progress import tracked
from npt.editing.absorbing.lesson import Apart, Lesson
from npt.editing.absorbing.stream import Blocks
from npt.editing.adapter import DownAdapter
from npt.editing.descent import Descent, check_slopes, mean_divergence, turns
from npt.editing.solve import Factors

#: The weight of text, conversations of a step, and pieces of text, where a context is absorbed.
BETA, BATCH, PIECES = 1.0, 8, 24
#: Tokens that the KL is taken over: all that both conversations end with, which the closed form reads; or the answers' alone.
TOKENS = ("all", "answers")


@dataclass(frozen=True)
class Training:
    """How factors are trained. rate: AdamW's. tokens: see `TOKENS`. batch: conversations of a step. beta: the weight of text.
    falling: over how many steps the rate falls to zero; 0 keeps it. seed: of the batches, and of factors that begin at random.
    """

    rate: float
    tokens: str = "all"
    batch: int = BATCH
    beta: float = 0.0
    falling: int = 0
    seed: int = 0


def check_trainable(blocks: Blocks, layer: int) -> None:
    """Checks that blocks can be trained.

    Args:
        blocks: the model's.
        layer: the lowest block that is trained.

    Raises:
        NPTError: see `check_slopes`.
    """
    check_slopes(
        blocks.base, blocks.down(layer), "absorb",
        "use steps=0, the closed form alone, or a base whose layers have one",
    )  # fmt: skip


class Trained:
    """Factors in training, at work on the blocks' `down` projections.

    Args:
        lesson: what is learnt from; nothing is at work on its model.
        factors: {block: the factors to begin with}.
        training: see `Training`.
        text: pieces of text that must not be disturbed, one for each step in turn; none without beta.
        together: the adapters of a store on the same model; None without one.
    """

    def __init__(
        self,
        lesson: Lesson,
        factors: Mapping[int, Factors],
        training: Training,
        text: Sequence[Apart] = (),
        together: list[DownAdapter] | None = None,
    ):
        self.blocks, self.training = lesson.blocks, training
        chance = torch.Generator().manual_seed(training.seed)
        order = torch.randperm(len(lesson.conversations), generator=chance).tolist()
        self._batches = [lesson.part(order[at : at + training.batch]) for at in range(0, len(order), training.batch)]
        self._text, lowest = [piece.copy() for piece in text], min(factors)
        for apart in (*self._batches, *self._text):
            apart.stream.through(lowest)
        shared = [] if together is None else together
        self.adapters: dict[int, DownAdapter] = {}
        try:
            for layer in factors:
                self.adapters[layer] = DownAdapter(
                    self.blocks.down(layer), self.blocks.base, together=shared, first=True
                )
            self._descent = Descent(self.blocks.base, self.adapters, factors, training.rate, training.falling)
        except BaseException:
            self.close()
            raise
        self._turns = turns(len(self._batches), chance)

    @property
    def steps(self) -> int:
        """Steps taken so far."""
        return self._descent.steps

    @property
    def factors(self) -> dict[int, Factors]:
        """{block: its factors now}."""
        return self._descent.factors

    def train(self, steps: int, progress: bool = False) -> float:
        """Takes so many steps more and puts the result to work; returns the last step's loss, in nats a token.

        Args:
            steps: how many.
            progress: show a progress bar.

        Raises:
            NPTError: a factor is not finite any more.
        """
        loss = 0.0
        for _ in tracked(range(steps), "Training", progress, unit="steps"):
            loss = self._step(self._batches[next(self._turns)])
            if not math.isfinite(loss):
                break
        remedy = f"use a lower rate than {self.training.rate:g}, steps=0, or the base in float32"
        self._descent.check("absorb", remedy)
        for layer, factors in self.factors.items():
            self.adapters[layer].set(factors)
        return loss

    def close(self) -> None:
        """Takes the factors off the model."""
        for adapter in self.adapters.values():
            adapter.close()

    def _step(self, batch: Apart) -> float:
        losses = [partial(self._loss, batch, self.training.tokens)]
        if self.training.beta and self._text:
            losses.append(partial(self._kept, self._text[self.steps % len(self._text)]))
        return self._descent.step(losses)[0]

    def _kept(self, piece: Apart) -> Tensor:
        return self.training.beta * self._loss(piece, "all")

    def _loss(self, apart: Apart, tokens: str) -> Tensor:
        now = apart.stream.last()
        given, use = apart.last, apart.counted >= 0
        if tokens == "answers":
            given, now = given[use.to(given.device)], now[use.to(now.device)]
        return mean_divergence(logit_head(self.blocks.base), given, now)
