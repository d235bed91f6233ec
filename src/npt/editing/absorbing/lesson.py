"""Conversations as a model reads them with the context and without, and how far apart the two are."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import Any, Self

import torch
from torch import Tensor

from npt.block.probing import logit_head
from npt.common.precision import HALF, spacing, wide
from npt.editing.absorbing.dialogue import Conversation
from npt.editing.absorbing.formula import moments, solve
from npt.editing.absorbing.patches import Patches
from npt.editing.absorbing.settings import Setting
from npt.editing.absorbing.stream import Blocks, Stream, outputs_of
from npt.editing.statistics import Moments

#: Logits that are compared at once.
_ENTRIES = 2**23


class Apart:
    """Rows of tokens whose next-token distributions are compared with given ones.

    Args:
        blocks: the model's.
        rows: token ids of each row.
        kept: how many of a row's last tokens are read.
        last: (tokens, d), the last hidden states that the given distributions come from.
        counted: (tokens,), the row to which a token's divergence counts; -1 for none.
    """

    def __init__(
        self, blocks: Blocks, rows: Sequence[Sequence[int]], kept: Sequence[int], last: Tensor, counted: Tensor
    ):
        self.blocks, self.last, self.counted, self.count = blocks, last, counted, len(rows)
        self.stream = Stream(blocks, rows, kept)

    def copy(self) -> Self:
        """The same rows at the same block; the streams of the two go on apart."""
        other = copy(self)
        other.stream = self.stream.copy()
        return other

    def kl(self) -> Tensor:
        """KL(given || model as it is now) in nats, summed over the counted tokens of each row, (rows,) float64."""
        use = self.counted >= 0
        given = self.last[use.to(self.last.device)]
        found = divergences(self.blocks.base, given, self.stream.copy().finish()[use.to(given.device)])
        return torch.zeros(self.count, dtype=torch.float64).index_add(0, self.counted[use], found)

    @property
    def tokens(self) -> Tensor:
        """Tokens that count in each row, (rows,)."""
        return torch.bincount(self.counted[self.counted >= 0], minlength=self.count)


def difference(one: Tensor, other: Tensor) -> Tensor:
    """one - other in float32 or better, zero where that is no more than the rounding of half precision.

    At massive activations, where it is large, the least squares would fit little else.
    """
    found = wide(one) - wide(other)
    if one.dtype not in HALF:
        return found
    return torch.where(found.abs() > spacing(one, other), found, 0)


@torch.no_grad()
def divergences(base: Any, given: Tensor, now: Tensor) -> Tensor:
    """KL(given || now) in nats of the distributions behind last hidden states (tokens, d), (tokens,) float64 on the CPU."""
    head = logit_head(base)
    size = max(1, _ENTRIES // base.get_output_embeddings().weight.shape[0])
    found = []
    for one, other in zip(given.split(size), now.split(size), strict=True):
        p, q = (wide(head(hidden)).log_softmax(-1) for hidden in (one, other))
        found.append((p.exp() * (p - q)).sum(-1).clamp_min(0).cpu().double())
    return torch.cat(found) if found else torch.zeros(0, dtype=torch.float64)


class Lesson(Apart):
    """Conversations, with the outputs that the model's blocks have at them where the context stands in front.

    Args:
        blocks: the model's, with nothing at work on it.
        conversations: at least one.
        weights: of a token of each conversation in the sum of squares; None for 1 over all tokens.
        layers: blocks whose outputs are kept.
    """

    def __init__(
        self,
        blocks: Blocks,
        conversations: Sequence[Conversation],
        layers: Sequence[int] = (),
        weights: Sequence[float] | None = None,
    ):
        kept = [c.shared for c in conversations]
        self.conversations = list(conversations)
        self.targets, last = outputs_of(blocks, [c.teacher for c in conversations], kept, layers)
        # The token before an answer's first one predicts it; the last token predicts what no one wrote.
        counted = [
            torch.tensor([i if n - c.answer - 1 <= t < n - 1 else -1 for t in range(n)])
            for i, (c, n) in enumerate(zip(conversations, kept, strict=True))
        ]
        super().__init__(blocks, [c.student for c in conversations], kept, last, torch.cat(counted))
        each = [1 / sum(kept)] * len(kept) if weights is None else weights
        self.weights = torch.cat([torch.full((n,), w, dtype=torch.float64) for n, w in zip(kept, each, strict=True)])

    def part(self, chosen: Sequence[int]) -> Apart:
        """Some of the conversations, by their places, with what the teacher says there, at the first block."""
        own = [self.conversations[i] for i in chosen]
        sizes = [c.shared for c in self.conversations]
        last, counted = (x.split(sizes) for x in (self.last, self.counted))
        rows, kept = [c.student for c in own], [c.shared for c in own]
        return Apart(
            self.blocks, rows, kept, torch.cat([last[i] for i in chosen]), torch.cat([counted[i] for i in chosen])
        )

    def fit(self, setting: Setting, text: Moments, patches: Patches) -> None:
        """Finds the weight deltas block by block, from low to high, each on what the blocks patched before give.

        Args:
            setting: blocks, lambda, mu and rank.
            text: second moments of text, of each block.
            patches: nothing at work; afterwards the weight deltas.
        """
        stream = self.stream.copy()
        for layer in setting.blocks:
            passed = stream.through(layer)
            gap = difference(self.targets[layer], passed.hidden)
            residuals = self.blocks.missing(layer, passed.outputs, gap)
            a, b = moments(passed.inputs, residuals, self.weights)
            patches.put(layer, solve(a, b, text[layer], setting.mu, setting.lam, setting.rank))
