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
    """h and a, (tokens, d) each, of consecutive tokens of the text; start is the place of the first one."""

    start: int
    h: Tensor
    a: Tensor

    def cut(self, first: int, end: int | None = None) -> Part:
        """Returns its tokens from `first` to before `end`; none where `end` is None."""
        end = first if end is None else end
        return Part(self.start + first, self.h[first:end], self.a[first:end])


def slices(chunk: list[Part]) -> Iterator[Part]:
    """Yields parts of at most `SLICE_TOKENS`, whose temporaries stay small. An empty part gives one empty slice."""
    for part in chunk:
        for first in range(0, max(1, len(part.h)), SLICE_TOKENS):
            yield part.cut(first, first + SLICE_TOKENS)


def held(chunk: list[Part]) -> int:
    """Returns the number of tokens in all processes' chunks."""
    return int(total(torch.tensor(sum(len(part.h) for part in chunk))))


def shift_of(layer: NPTLayer, h: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """(z, D), each (tokens, d), float32 or better."""
    z, original = (x.to(wide_dtype(h.dtype)) for x in layer.mlp_inputs(h, a))
    return z, original - z
