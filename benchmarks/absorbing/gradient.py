"""Gradient context distillation: a LoRA on `down` projections, trained by KL to the model with the context in front."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from npt.block.probing import logit_head
from npt.common.precision import cast, wide
from npt.editing.absorbing.dialogue import Conversation
from npt.editing.absorbing.lesson import Lesson
from npt.editing.absorbing.stream import Blocks
from npt.editing.adapter import DownAdapter
from npt.editing.solve import Factors
from npt.editing.statistics import padded
from npt.tuner.converted import device_of, eval_mode, run_backbone

#: Tokens that the KL is taken over: all that both conversations end with, which absorbing reads; or the answers' alone.
TOKENS = ("all", "answers")


@dataclass(frozen=True)
class Training:
    """How the LoRA is trained. rate: AdamW's. tokens: see `TOKENS`. batch: conversations of a step. seed: of their order and
    of the first weights.
    """

    rate: float
    tokens: str = "all"
    batch: int = 8
    seed: int = 0


class LowRank:
    """A LoRA at work on the blocks' `down` projections, as PEFT begins one: the first factor random, the second zero.

    Args:
        blocks: the model's, with nothing at work on it.
        layers: the blocks with a LoRA.
        rank: of each.
        conversations: what is learnt from.
        training: see `Training`.
        together: the adapters of a store on the same model; None without one.
    """

    def __init__(
        self,
        blocks: Blocks,
        layers: Sequence[int],
        rank: int,
        conversations: Sequence[Conversation],
        training: Training,
        together: list[DownAdapter] | None = None,
    ):
        self.blocks, self.conversations, self.training = blocks, conversations, training
        lesson = Lesson(blocks, conversations)
        self._last = lesson.last.split([c.shared for c in conversations])
        self._used = (lesson.counted >= 0).split([c.shared for c in conversations])
        self._chance = torch.Generator().manual_seed(training.seed)
        shared = [] if together is None else together
        self.adapters = [DownAdapter(blocks.down(layer), blocks.base, together=shared, first=True) for layer in layers]
        self._pairs = [
            self._begun(adapter, blocks.shape(layer), rank)
            for adapter, layer in zip(self.adapters, layers, strict=True)
        ]
        parameters = [part for pair in self._pairs for part in pair]
        self._optimizer = torch.optim.AdamW(parameters, lr=training.rate, weight_decay=0.0)
        self._order: list[int] = []
        self.steps = 0

    def _begun(self, adapter: DownAdapter, shape: tuple[int, int], rank: int) -> tuple[Tensor, Tensor]:
        """The factors (r, f) and (d, r) that are trained."""
        width, size = shape
        right = torch.empty(min(rank, width, size), width)
        nn.init.kaiming_uniform_(right, a=5**0.5, generator=self._chance)
        left = torch.zeros(size, len(right))
        return tuple(part.to(adapter.device, adapter.dtype).requires_grad_() for part in (right, left))  # type: ignore[return-value]

    def train(self, steps: int) -> float:
        """Takes so many steps more and puts the result to work; returns the last step's loss, in nats a token."""
        loss = 0.0
        for _ in range(steps):
            loss = self._step(self._batch())
        for adapter, (right, left) in zip(self.adapters, self._pairs, strict=True):
            adapter.set(Factors(left.detach().clone(), right.detach().clone()))
        self.steps += steps
        return loss

    def close(self) -> None:
        """Takes the LoRA off the model."""
        for adapter in self.adapters:
            adapter.close()

    def _batch(self) -> list[int]:
        """The next conversations; each is read once before any is again."""
        while len(self._order) < min(self.training.batch, len(self.conversations)):
            self._order += torch.randperm(len(self.conversations), generator=self._chance).tolist()
        found, self._order = self._order[: self.training.batch], self._order[self.training.batch :]
        return found

    def _step(self, chosen: Sequence[int]) -> float:
        base, parts = self.blocks.base, [part for pair in self._pairs for part in pair]
        rows = [self.conversations[i].student for i in chosen]
        with self._trained(), eval_mode(base), torch.enable_grad():
            hidden = run_backbone(base, padded(rows, device_of(base)))
            now, given = [], []
            for place, (i, row) in enumerate(zip(chosen, rows, strict=True)):
                use = self._used[i] if self.training.tokens == "answers" else torch.ones_like(self._used[i])
                own = hidden[place, len(row) - len(use) : len(row)]
                now.append(own[use.to(own.device)])
                given.append(self._last[i][use.to(self._last[i].device)])
            loss = mean_divergence(logit_head(base), torch.cat(given), torch.cat(now))
            for part, slope in zip(parts, torch.autograd.grad(loss, parts), strict=True):
                part.grad = slope
        self._optimizer.step()
        return float(loss.detach())

    @contextmanager
    def _trained(self) -> Iterator[None]:
        """The factors as they are trained are at work."""
        with ExitStack() as stack:
            for adapter, (right, left) in zip(self.adapters, self._pairs, strict=True):
                stack.enter_context(adapter.trying(partial(_through, right, left)))
            yield


def _through(right: Tensor, left: Tensor, x: Tensor) -> Tensor:
    return nn.functional.linear(nn.functional.linear(cast(x, right.dtype), right), left)


def mean_divergence(head: Callable[[Tensor], Tensor], given: Tensor, now: Tensor) -> Tensor:
    """Mean KL(given || now) in nats of the distributions behind last hidden states (tokens, d), with a gradient in `now`.

    Args:
        head: last hidden states -> logits.
        given: the teacher's.
        now: the student's.
    """
    with torch.no_grad():
        p = wide(head(given)).log_softmax(-1)
    q = wide(head(now)).log_softmax(-1)
    return nn.functional.kl_div(q, p, log_target=True, reduction="batchmean")
