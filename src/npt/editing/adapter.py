"""Edits at work: a forward hook adds left (right x) to the output of one block's `down`; the base's weights stay."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from npt.block.modes import having
from npt.block.probing import execution_device
from npt.common.precision import cast, wide_dtype
from npt.editing.solve import Factors
from npt.errors import NPTError

#: The attribute of a model that holds the adapters at work on it, which belong together.
_OWNER = "_npt_edits"


class DownAdapter:
    """The hook that adds to one projection's output: nothing, the factors that were set, or for a trial something of its own.

    Args:
        down: the projection, Linear, Conv1D or a quantised linear. base: the causal LM that it is in; the
            projection itself where several blocks have an adapter each.
        together: the adapters of one store, a list that they share; None for an adapter alone.
        first: its part is added before those of the projection's other adapters, in whatever order they came.
        at_work: put the hook on; False leaves that to `open`.

    Raises:
        NPTError: edits are at work on it already.
    """

    def __init__(
        self,
        down: nn.Module,
        base: nn.Module,
        *,
        together: list[DownAdapter] | None = None,
        first: bool = False,
        at_work: bool = True,
    ):
        self.down, self.base, self.on = down, base, True
        self._together: list[DownAdapter] = [] if together is None else together
        self._first = first
        self._factors: Factors | None = None
        self._trial: Callable[[Tensor], Tensor] | None = None
        self._see: Callable[[Tensor], None] | None = None
        if at_work:
            self.open()

    def set(self, factors: Factors | None) -> None:
        """Puts a weight delta to work, in the projection's own format or float32; None for the base alone."""
        if factors is None:
            self._factors = None
            return
        parts = (factors.left, factors.right)
        self._factors = Factors(*(part.to(device=self.device, dtype=self.dtype) for part in parts))

    @property
    def device(self) -> torch.device:
        """The device that the projection computes on."""
        return execution_device(self.down)

    @property
    def dtype(self) -> torch.dtype:
        """The format that edits are computed in: the projection's, float32 where that is narrower or holds codes."""
        own = next(self.down.parameters()).dtype
        return wide_dtype(own) if own.is_floating_point else torch.float32

    @property
    def at_work(self) -> bool:
        """True while the hook is on."""
        return self in self._together

    def open(self) -> None:
        """Puts the hook on.

        Raises:
            NPTError: another store's is there.
        """
        if getattr(self.base, _OWNER, self._together) is not self._together:
            raise NPTError("the model has an edit store at work; use that one, or take it off with its close()")
        if not self.at_work:
            self._handle = self.down.register_forward_hook(self._add, prepend=self._first)
            self._together.append(self)
            setattr(self.base, _OWNER, self._together)

    def close(self) -> None:
        """Takes the hook off."""
        if self.at_work:
            self._handle.remove()
            self._together.remove(self)
            if not self._together:
                delattr(self.base, _OWNER)

    def _add(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if self._see is not None:
            self._see(args[0])
        if self._trial is not None:
            return output + cast(self._trial(args[0]), output.dtype).view_as(output)
        if self._factors is None or not self.on:
            return None
        left, right = (part.to(output.device) for part in (self._factors.left, self._factors.right))
        added = nn.functional.linear(nn.functional.linear(cast(args[0], right.dtype), right), left)
        return output + cast(added, output.dtype).view_as(output)

    def off(self) -> AbstractContextManager[None]:
        """The base alone within a `with` block."""
        return having([self], "on", False)

    def trying(self, add: Callable[[Tensor], Tensor]) -> AbstractContextManager[None]:
        """Adds `add(x)` of the projection's input x instead of the edits."""
        return having([self], "_trial", add)

    def watching(self, see: Callable[[Tensor], None]) -> AbstractContextManager[None]:
        """Shows the projection's input of every forward."""
        return having([self], "_see", see)
