"""The tokens that a block's fit sees: parts of the text, and the shift D to be written."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from npt.block.layer import NPTLayer
from npt.common.precision import wide_dtype
from npt.common.processes import total

#: Tokens whose temporaries are in memory at once.
SLICE_TOKENS = 1024


class TextPart(NamedTuple):
    """The place of a batch in the text.

    start: of its first token. end: of the first token after this round, in which each process has one batch. counts:
    False for a filler batch that only keeps the processes' forwards in step.
    """

    start: int
    end: int
    counts: bool = True


class Part(NamedTuple):
    """h and a, (tokens, d) each, of consecutive tokens of the text; start is the place of the first one.

    device: where they are computed with; None for where they are.
    """

    start: int
    h: Tensor
    a: Tensor
    device: torch.device | None = None

    def cut(self, first: int, end: int | None = None) -> Part:
        """Returns its tokens from `first` to before `end`; none where `end` is None."""
        return self.at(slice(first, first if end is None else end))._replace(start=self.start + first)

    def at(self, where: slice | Tensor) -> Part:
        """Returns some of its tokens."""
        return self._replace(h=self.h[where], a=self.a[where])

    def loaded(self) -> Part:
        """Returns it with h and a on the device."""
        return self if self.device is None else Part(self.start, self.h.to(self.device), self.a.to(self.device))


def spans(chunk: list[Part]) -> Iterator[Part]:
    """Yields parts of at most `SLICE_TOKENS`, whose temporaries stay small. An empty part gives one empty slice."""
    for part in chunk:
        for first in range(0, max(1, len(part.h)), SLICE_TOKENS):
            yield part.cut(first, first + SLICE_TOKENS)


def slices(chunk: list[Part]) -> Iterator[Part]:
    """Yields `spans` with h and a on the device that computes with them."""
    return (part.loaded() for part in spans(chunk))


def held(chunk: list[Part]) -> int:
    """Returns the number of tokens in all processes' chunks."""
    return int(total(torch.tensor(sum(len(part.h) for part in chunk))))


def shift_of(layer: NPTLayer, h: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """(z, D), each (tokens, d), float32 or better."""
    z, original = (x.to(wide_dtype(h.dtype)) for x in layer.mlp_inputs(h, a))
    return z, original - z
