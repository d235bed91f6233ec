"""One forward, run again from a block on: below an edit nothing changes, so trials and previews start at the edited block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from npt.block.families import hand_on
from npt.block.outputs import first_tensor


@dataclass(frozen=True)
class Recording:
    """A batch, the outputs of the blocks below the one that is run again, and the logits of the whole pass.

    hidden: (rows, tokens, d), what the block reads; None for the first one. rests: what blocks return beside it, per block.
    logits: (rows, tokens, vocabulary); None where the pass ended inside the block.
    """

    batch: Mapping[str, Tensor]
    hidden: Tensor | None
    rests: tuple[tuple[Any, ...] | None, ...]
    logits: Tensor | None

    @property
    def whole(self) -> Tensor:
        """The logits of a pass that ran to its end."""
        if self.logits is None:
            raise RuntimeError("the recorded pass ended inside a block, so it has no logits")
        return self.logits

    def to(self, device: torch.device | str) -> Recording:
        """The same on a device; nothing is copied where it is there already."""

        def moved(value: Any) -> Any:
            if isinstance(value, (tuple, list)):
                return type(value)(map(moved, value))
            return value.to(device) if isinstance(value, Tensor) else value

        batch = {name: tensor.to(device) for name, tensor in self.batch.items()}
        return Recording(batch, moved(self.hidden), moved(self.rests), moved(self.logits))


class _ReachedError(Exception):
    """Ends a forward at the module that it was asked for."""


@contextmanager
def ending_at(model: nn.Module, module: nn.Module | None) -> Iterator[None]:
    """Forwards within a `with` block end behind a module, which ends the block too; None changes nothing.

    A model whose weights accelerate moves in and out around each module runs to its end.
    """
    if module is None or any(hasattr(part, "_hf_hook") for part in model.modules()):
        yield
        return

    def end(module: nn.Module, args: Any, output: Any) -> None:
        raise _ReachedError

    handle = module.register_forward_hook(end)
    try:
        yield
    except _ReachedError:
        pass
    finally:
        handle.remove()


@torch.no_grad()
def record(
    model: Any, blocks: Sequence[nn.Module], first: int, batch: Mapping[str, Tensor], until: nn.Module | None = None
) -> Recording:
    """Runs the model once and keeps what block `first` reads; nothing where blocks need lower ones: all is run again then.

    Args:
        blocks: the model's decoder blocks. first: the block to start from later. batch: what the model takes.
        until: the module behind which nothing is computed; None runs the whole model.
    """
    hidden: list[Tensor] = []
    rests: list[tuple[Any, ...] | None] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        hidden[:] = [first_tensor(output)]
        rests.append(output[1:] if isinstance(output, tuple) else None)

    logits: Tensor | None = None
    first = 0 if hand_on(model) else first
    handles = [block.register_forward_hook(keep) for block in blocks[:first]]
    try:
        with ending_at(model, until):
            logits = model(**batch, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()
    return Recording(batch, hidden[0] if hidden else None, tuple(rests), logits)


def run_again(model: Any, blocks: Sequence[nn.Module], recording: Recording, positions: Tensor | None = None) -> Tensor:
    """The logits (rows, tokens, vocabulary) of a recorded batch; the blocks below the first one are not computed.

    Args:
        model, blocks: as `record` had them.
        recording: of `record`.
        positions: rising indices of the tokens whose logits are asked for; None for all.
    """
    options: dict[str, Any] = {}
    if positions is not None and "logits_to_keep" in signature(type(model).forward).parameters:
        options["logits_to_keep"] = positions.to(recording.batch["input_ids"].device)
    with skipping(blocks, recording):
        logits: Tensor = model(**recording.batch, use_cache=False, **options).logits
    if positions is not None and not options:
        logits = logits[:, positions.to(logits.device)]
    return logits


@contextmanager
def skipping(blocks: Sequence[nn.Module], recording: Recording) -> Iterator[None]:
    """Gives the blocks below a forward that returns what was recorded."""
    count = len(recording.rests)
    own = [block.__dict__.get("forward") for block in blocks[:count]]
    try:
        for block, rest in zip(blocks[:count], recording.rests, strict=True):
            block.forward = _returning(recording.hidden, rest)
        yield
    finally:
        for block, forward in zip(blocks[:count], own, strict=True):
            if forward is None:
                block.__dict__.pop("forward", None)
            else:  # accelerate's hooks stand there
                block.forward = forward


def _returning(hidden: Tensor | None, rest: tuple[Any, ...] | None) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        return hidden if rest is None else (hidden, *rest)

    return forward
