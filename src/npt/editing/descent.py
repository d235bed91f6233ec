"""Weight deltas of some blocks, trained by gradient: two factors each, moved by AdamW along the slopes of some losses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
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
from npt.editing.adapter import DownAdapter
from npt.editing.solve import Factors
from npt.editing.statistics import padded
from npt.errors import NPTError
from npt.tuner.converted import device_of, eval_mode, run_backbone

#: Logits that are kept for a slope at once; those of more tokens are computed again for it.
ENTRIES = 2**26
#: Times the loss where slopes are taken, which would vanish in a base in float16; a power of two moves no digit of them.
SCALE = 2.0**10


class Descent:
    """Factors in training, at work on the blocks' `down` projections while a step is taken.

    Args:
        base: the causal LM. Nothing else in it is trained.
        adapters: {block: the hook on its `down`}.
        factors: {block: the factors to begin with}, of the same blocks.
        rate: AdamW's.
        falling: over how many steps the rate falls to zero; 0 keeps it.
    """

    def __init__(
        self,
        base: nn.Module,
        adapters: Mapping[int, DownAdapter],
        factors: Mapping[int, Factors],
        rate: float,
        falling: int = 0,
    ):
        self.base, self.adapters, self.rate, self.falling, self.steps = base, dict(adapters), rate, falling, 0
        self._pairs = {layer: _begun(one, self.adapters[layer]) for layer, one in factors.items()}
        self._parts = [part for pair in self._pairs.values() for part in pair]
        self._optimizer = torch.optim.AdamW(self._parts, lr=rate, weight_decay=0.0)

    @property
    def factors(self) -> dict[int, Factors]:
        """{block: its factors now}."""
        return {
            layer: Factors(left.detach().clone(), right.detach().clone())
            for layer, (left, right) in self._pairs.items()
        }

    def step(self, losses: Sequence[Callable[[], Tensor]]) -> list[float]:
        """Takes one step down the sum of losses, each with a graph of its own; returns them.

        Args:
            losses: in nats.
        """
        share = max(0.0, 1 - self.steps / self.falling) if self.falling else 1.0
        self._optimizer.param_groups[0]["lr"] = self.rate * share
        slopes, found = [torch.zeros_like(part) for part in self._parts], list[float]()
        with self._at_work(), eval_mode(self.base), torch.enable_grad():
            for loss in losses:
                value = loss()
                found.append(float(value.detach()))
                slopes = [a + b for a, b in zip(slopes, slopes_of(value, self._parts), strict=True)]
                del value  # its graph, before the next one is built
        for part, slope in zip(self._parts, slopes, strict=True):
            part.grad = slope
        self._optimizer.step()
        self.steps += 1
        return found

    def check(self, named: str, remedy: str) -> None:
        """Checks that the factors are finite.

        Args:
            named: what trains them, for the error.
            remedy: what to do where they are not.

        Raises:
            NPTError: not so.
        """
        for layer, (left, right) in self._pairs.items():
            if not bool(left.isfinite().all() and right.isfinite().all()):
                raise NPTError(
                    f"{named}: the weight delta of block {layer} is not finite after step {self.steps}; {remedy}"
                )

    @contextmanager
    def _at_work(self) -> Iterator[None]:
        """The factors as they are trained are at work, and nothing else can be trained."""
        with _frozen(self.base), ExitStack() as stack:
            for layer, (left, right) in self._pairs.items():
                stack.enter_context(self.adapters[layer].trying(partial(_through, left, right)))
            yield


def turns(count: int, chance: torch.Generator) -> Iterator[int]:
    """Numbers below a count without end, each once before any comes again, in another order each time."""
    while count:
        yield from reversed(torch.randperm(count, generator=chance).tolist())


def zero(shapes: Mapping[int, tuple[int, int]], rank: int, seed: int = 0) -> dict[int, Factors]:
    """{block: factors as PEFT begins a LoRA}: right random, left zero.

    Args:
        shapes: {block: (f, d) of its projection}.
        rank: of each.
        seed: of the random numbers.
    """
    chance, found = torch.Generator().manual_seed(seed), {}
    for layer, (width, size) in shapes.items():
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
def check_slopes(base: nn.Module, down: nn.Module, named: str, remedy: str) -> None:
    """Checks that a gradient comes back through every projection behind a block's `down`, the head and quantised kernels too.

    Args:
        base: the causal LM.
        down: the projection of the lowest block that is trained.
        named: what trains it, for the error.
        remedy: what to do without a gradient.

    Raises:
        NPTError: one of them has no gradient.
    """
    names, begun = list[str](), list[Tensor]()

    def begin(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        begun[:] = [torch.zeros_like(output, requires_grad=True)]
        return output + begun[0]

    def look(name: str, module: nn.Module, args: Any, output: Any) -> None:
        # A block may turn gradients off around a part on purpose, as for indices of sparse attention.
        needed = torch.is_grad_enabled() and bool(args) and args[0].requires_grad
        if needed and isinstance(output, Tensor) and not output.requires_grad:
            names.append(name)

    with ExitStack() as stack:
        stack.callback(down.register_forward_hook(begin).remove)
        for name, module in base.named_modules():
            if hasattr(module, "in_features") or isinstance(module, Conv1D):
                stack.callback(module.register_forward_hook(partial(look, name)).remove)
        with _frozen(base), eval_mode(base), torch.enable_grad():
            found = logit_head(base)(run_backbone(base, padded([[0, 0]], device_of(base))))
    if not names:
        try:
            torch.autograd.grad(wide(found).sum(), begun)
        except RuntimeError as error:
            raise NPTError(
                f"{named}: the base has no gradient ({one_line(str(error), 120)}), which steps need; {remedy}"
            ) from error
        return
    kind = type(base.get_submodule(names[0])).__name__
    raise NPTError(f"{named}: {names[0]} ({kind}) has no gradient, which steps need; {remedy}")


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
