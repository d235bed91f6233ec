"""Weight deltas trained by gradient: from zero, as a LoRA begins, or on from those that the closed form found.

    loss = mean KL(model with the context || model as it is) over a batch's tokens + beta mean KL(base || model) over text

Each block's weight delta is left right, of two factors (d, r) and (r, f), both trained by AdamW. Conversations are batched
once; what they read below the lowest patched block never changes, and is computed once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from npt.block.modes import having
from npt.block.probing import logit_head
from npt.common.display import one_line
from npt.common.precision import cast, wide
from npt.common.progress import tracked
from npt.editing.absorbing.lesson import Apart, Lesson
from npt.editing.absorbing.stream import Blocks
from npt.editing.adapter import DownAdapter
from npt.editing.solve import Factors
from npt.editing.statistics import padded
from npt.errors import NPTError
from npt.tuner.converted import device_of, eval_mode, run_backbone

#: Logits that are kept for a slope at once; those of more tokens are computed again for it.
ENTRIES = 2**26
#: Times the loss where slopes are taken, which would vanish in a base in float16; a power of two moves no digit of them.
SCALE = 2.0**10
#: What to do without a gradient.
_CLOSED = "which steps by gradient need; use steps=0, the closed form alone, or a base whose layers have one"
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
        self.blocks, self.training, self.steps = lesson.blocks, training, 0
        self._chance = torch.Generator().manual_seed(training.seed)
        order = torch.randperm(len(lesson.conversations), generator=self._chance).tolist()
        self._batches = [lesson.part(order[at : at + training.batch]) for at in range(0, len(order), training.batch)]
        self._text, lowest = [piece.copy() for piece in text], min(factors)
        for apart in (*self._batches, *self._text):
            apart.stream.through(lowest)
        shared = [] if together is None else together
        self.adapters: dict[int, DownAdapter] = {}
        self._pairs: dict[int, tuple[Tensor, Tensor]] = {}
        self._order: list[int] = []
        try:
            for layer, one in factors.items():
                self.adapters[layer] = DownAdapter(
                    self.blocks.down(layer), self.blocks.base, together=shared, first=True
                )
                self._pairs[layer] = _begun(one, self.adapters[layer])
        except BaseException:
            self.close()
            raise
        self._optimizer = torch.optim.AdamW(self._parts, lr=training.rate, weight_decay=0.0)

    @property
    def _parts(self) -> list[Tensor]:
        return [part for pair in self._pairs.values() for part in pair]

    @property
    def factors(self) -> dict[int, Factors]:
        """{block: its factors now}."""
        return {
            layer: Factors(left.detach().clone(), right.detach().clone())
            for layer, (left, right) in self._pairs.items()
        }

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
            loss = self._step(self._batch())
            self.steps += 1
            if not math.isfinite(loss):
                break
        for layer, factors in self.factors.items():
            if not bool(factors.left.isfinite().all() and factors.right.isfinite().all()):
                raise NPTError(
                    f"absorb: the weight delta of block {layer} is not finite after step {self.steps}; use a lower rate than "
                    f"{self.training.rate:g}, steps=0, or the base in float32"
                )
            self.adapters[layer].set(factors)
        return loss

    def close(self) -> None:
        """Takes the factors off the model."""
        for adapter in self.adapters.values():
            adapter.close()

    def _batch(self) -> Apart:
        """The next batch; each is read once before any is again."""
        if not self._order:
            self._order = torch.randperm(len(self._batches), generator=self._chance).tolist()
        return self._batches[self._order.pop()]

    def _step(self, batch: Apart) -> float:
        parts, falling = self._parts, self.training.falling
        share = max(0.0, 1 - self.steps / falling) if falling else 1.0
        self._optimizer.param_groups[0]["lr"] = self.training.rate * share
        with self._at_work(), eval_mode(self.blocks.base), torch.enable_grad():
            loss = self._loss(batch, self.training.tokens)
            slopes = slopes_of(loss, parts)
            if self.training.beta and self._text:
                piece = self._text[self.steps % len(self._text)]
                text = slopes_of(self.training.beta * self._loss(piece, "all"), parts)
                slopes = tuple(a + b for a, b in zip(slopes, text, strict=True))
        for part, slope in zip(parts, slopes, strict=True):
            part.grad = slope
        self._optimizer.step()
        return float(loss.detach())

    def _loss(self, apart: Apart, tokens: str) -> Tensor:
        now = apart.stream.last()
        given, use = apart.last, apart.counted >= 0
        if tokens == "answers":
            given, now = given[use.to(given.device)], now[use.to(now.device)]
        return mean_divergence(logit_head(self.blocks.base), given, now)

    @contextmanager
    def _at_work(self) -> Iterator[None]:
        """The factors as they are trained are at work, and nothing else can be trained."""
        with _frozen(self.blocks.base), ExitStack() as stack:
            for layer, (left, right) in self._pairs.items():
                stack.enter_context(self.adapters[layer].trying(partial(_through, left, right)))
            yield


def zero(blocks: Blocks, layers: Sequence[int], rank: int, seed: int = 0) -> dict[int, Factors]:
    """{block: factors as PEFT begins a LoRA}: right random, left zero.

    Args:
        blocks: the model's.
        layers: the blocks.
        rank: of each.
        seed: of the random numbers.
    """
    chance, found = torch.Generator().manual_seed(seed), {}
    for layer in layers:
        width, size = blocks.shape(layer)
        right = torch.empty(min(rank, width, size), width)
        nn.init.kaiming_uniform_(right, a=5**0.5, generator=chance)
        found[layer] = Factors(torch.zeros(size, len(right)), right)
    return found


def balanced(factors: Factors) -> Factors:
    """The same weight delta with columns of left as long as their rows of right, so that AdamW moves both alike."""
    left, right = factors.left, factors.right
    ratio = (right.norm(dim=1) / left.norm(dim=0).clamp_min(1e-30)).sqrt()
    return Factors(left * ratio, right / ratio.clamp_min(1e-30)[:, None])


def _frozen(base: nn.Module) -> AbstractContextManager[None]:
    return having([p for p in base.parameters() if p.requires_grad], "requires_grad", False)


@torch.inference_mode(False)
def check_slopes(blocks: Blocks, layer: int) -> None:
    """Checks that a gradient comes back through every projection behind a block's `down`, the head and quantised kernels too.

    Args:
        blocks: the model's.
        layer: the lowest block that is trained.

    Raises:
        NPTError: one of them has no gradient.
    """
    base, names, begun = blocks.base, list[str](), list[Tensor]()

    def begin(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        begun[:] = [torch.zeros_like(output, requires_grad=True)]
        return output + begun[0]

    def look(name: str, module: nn.Module, args: Any, output: Any) -> None:
        # A block may turn gradients off around a part on purpose, as for indices of sparse attention.
        needed = torch.is_grad_enabled() and bool(args) and args[0].requires_grad
        if needed and isinstance(output, Tensor) and not output.requires_grad:
            names.append(name)

    with ExitStack() as stack:
        stack.callback(blocks.down(layer).register_forward_hook(begin).remove)
        for name, module in base.named_modules():
            if hasattr(module, "in_features") or isinstance(module, Conv1D):
                stack.callback(module.register_forward_hook(partial(look, name)).remove)
        with _frozen(base), eval_mode(base), torch.enable_grad():
            found = logit_head(base)(run_backbone(base, padded([[0, 0]], device_of(base))))
    if not names:
        try:
            torch.autograd.grad(wide(found).sum(), begun)
        except RuntimeError as error:
            raise NPTError(f"absorb: the base has no gradient ({one_line(str(error), 120)}), {_CLOSED}") from error
        return
    kind = type(base.get_submodule(names[0])).__name__
    raise NPTError(f"absorb: {names[0]} ({kind}) has no gradient, {_CLOSED}")


def _begun(factors: Factors, adapter: DownAdapter) -> tuple[Tensor, Tensor]:
    parts = (factors.left, factors.right)
    left, right = (part.detach().clone().to(adapter.device, adapter.dtype).requires_grad_() for part in parts)
    return left, right


def _through(left: Tensor, right: Tensor, x: Tensor) -> Tensor:
    return nn.functional.linear(nn.functional.linear(cast(x, right.dtype), right), left)


def slopes_of(loss: Tensor, parts: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The slopes of a mean over tokens, in `parts`, of which a base in float16 loses no small ones."""
    return tuple(slope / SCALE for slope in torch.autograd.grad(SCALE * loss, parts))


def mean_divergence(head: Callable[[Tensor], Tensor], given: Tensor, now: Tensor) -> Tensor:
    """Mean KL(given || now) in nats of the distributions behind last hidden states (tokens, d), with a gradient in `now`.

    Args:
        head: last hidden states -> logits.
        given: the teacher's.
        now: the student's.
    """

    def part(given: Tensor, now: Tensor) -> Tensor:
        with torch.no_grad():
            p = wide(head(given)).log_softmax(-1)
        return nn.functional.kl_div(wide(head(now)).log_softmax(-1), p, log_target=True, reduction="sum")

    with torch.no_grad():
        size = max(1, ENTRIES // head(given[:1]).shape[-1])
    if len(now) <= size:
        return part(given, now) / len(now)
    pairs = zip(given.split(size), now.split(size), strict=True)
    return torch.stack([checkpoint(part, one, other, use_reentrant=False) for one, other in pairs]).sum() / len(now)
