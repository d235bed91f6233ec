"""Many facts trained together behind their solve: what they do to text and to each other's neighbours is in the loss.

    loss = mean over prompts of sum over tokens max(0, GOAL - margin)
           + TEXT mean KL(base || model) over text + NEAR mean KL(base || model) over prompts about other names

Values are found for each fact alone, and the solve knows other text by second moments only. Of many facts the parts that every
token gets of their values add up, which these steps see and mend: both factors of each block's weight delta are trained by
AdamW, from those of the solve. The result is a function of the facts, in the order of their ids.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from npt.block.probing import logit_head
from npt.common.precision import wide
from npt.common.progress import tracked
from npt.editing.bench import Bench, chunks
from npt.editing.descent import Descent, balanced, check_slopes, mean_divergence, turns
from npt.editing.keys import Place, Target
from npt.editing.neighbours import fits, neighbours
from npt.editing.replay import Recording, skipping
from npt.editing.requests import Request, continued
from npt.editing.solve import Factors
from npt.editing.trial import margins, word_ends
from npt.errors import NPTError
from npt.tuner.converted import eval_mode, run_backbone

#: Nats by which every token of a target shall lead, and half of it the end of its last word.
GOAL = 1.5
#: Weights of the divergences on text and on prompts about other names.
TEXT, NEAR = 30.0, 20.0
#: AdamW's rate, in root mean squares of the factors' numbers at the beginning. It falls to zero.
RATE = 0.025
#: Rows of a step: prompts with their targets, prompts about other names, texts.
ROWS, TEXTS = 16, 2
#: Texts of the base that targets shall follow behind too, other names for each prompt, and rows of text at most.
CONTEXTS, NAMES, PIECES = 2, 4, 96
_SEED = 0
_Row = TypeVar("_Row", Place, Target)


@dataclass(frozen=True)
class Refining:
    """How facts are trained together. steps: of AdamW; 0 leaves them as they are solved for. terminator: text that shall
    follow the targets; None for whatever does.
    """

    steps: int = 0
    terminator: str | None = None


class Rows:
    """Rows of tokens from the lowest edited block on, and the spots of them that are looked at.

    Args:
        bench: the model at the edited blocks.
        rows: token ids.
        spots: (row, token) of each spot.
    """

    def __init__(self, bench: Bench, rows: Sequence[Sequence[int]], spots: Sequence[tuple[int, int]]):
        self.bench = bench
        self.recording: Recording = bench.inside(rows, whole=False).recording
        self._row, self._token = (torch.tensor(part) for part in zip(*spots, strict=True))

    def last(self) -> Tensor:
        """The model's last hidden states at the spots (spots, d), with what is at work; a gradient where one is enabled."""
        base = self.bench.base
        with eval_mode(base), skipping(self.bench.blocks, self.recording):
            found = run_backbone(base, dict(self.recording.batch))
        return found[self._row.to(found.device), self._token.to(found.device)]


class Told:
    """Prompts with their targets behind them.

    Args:
        bench: the model at the edited blocks.
        rows: the prompts.
    """

    def __init__(self, bench: Bench, rows: Sequence[Target]):
        words = [i for i, row in enumerate(rows) if row.in_word and row.words == len(row.targets)]
        aimed = [(i, row.start - 1 + t) for i, row in enumerate(rows) for t in range(len(row.targets))]
        self._rows = Rows(bench, [row.ids for row in rows], [*aimed, *((i, len(rows[i].ids) - 1) for i in words)])
        self._target = torch.tensor([token for row in rows for token in row.targets])
        self._continuing, self._count = bench.prompts.continuing, len(rows)
        self._head = logit_head(bench.base)

    def loss(self) -> Tensor:
        """Nats that the margins of targets, and of the ends of their words, lack of their goals, summed over a prompt."""
        logits = wide(self._head(self._rows.last()))
        targets, ends = logits[: len(self._target)], logits[len(self._target) :]
        lack = (GOAL - margins(targets, self._target)).clamp_min(0).sum()
        if len(ends):
            lack = lack + (GOAL / 2 - word_ends(ends, self._continuing)).clamp_min(0).sum()
        return lack / self._count


class Kept:
    """Rows of text that shall stay as the base has them.

    Args:
        bench: the model at the edited blocks.
        rows: token ids, each with the first token behind which text counts.
        weight: of the divergence.
    """

    def __init__(self, bench: Bench, rows: Sequence[Place], weight: float):
        spots = [(i, t) for i, row in enumerate(rows) for t in range(row.position, len(row.ids))]
        self._rows = Rows(bench, [row.ids for row in rows], spots)
        self._weight, self._head = weight, logit_head(bench.base)
        with torch.no_grad(), bench.off():
            self._given = self._rows.last()

    def loss(self) -> Tensor:
        """The mean divergence from the base, in nats, times its weight."""
        return self._weight * mean_divergence(self._head, self._given, self._rows.last())


@torch.inference_mode(False)
def refined(
    bench: Bench,
    facts: Mapping[str, Request],
    factors: Mapping[int, Factors],
    refining: Refining,
    text: Sequence[Sequence[int]],
    prefixes: Sequence[str],
    progress: bool = False,
) -> dict[int, Factors]:
    """{block: weight delta of the facts}, trained together, float64 on the CPU.

    Args:
        bench: the model at the edited blocks, with its hooks on and nothing else at work.
        facts: {id: request}.
        factors: {block: weight delta that they are solved for}.
        refining: see `Refining`.
        text: token ids of text that shall stay as it is.
        prefixes: nothing, and short texts of the base; those that the window does not hold are left out.
        progress: show a progress bar.

    Raises:
        NPTError: the base has no gradient, or a loss or factor is not finite.
    """
    check_refinable(bench)
    chance, requests = torch.Generator().manual_seed(_SEED), [facts[id] for id in sorted(facts)]
    told = [
        row
        for number, prefix in enumerate(prefixes[: 1 + CONTEXTS])
        for request in requests
        for prompt in request.prompts
        if not number or fits(bench.prompts, continued(prefix + prompt, request.target), 1)
        for row in [bench.prompts.target(prefix + prompt, request.target, refining.terminator)]
    ]
    with bench.off():
        most = ROWS * refining.steps
        near = neighbours(bench.base, bench.tokenizer, bench.prompts, requests, NAMES, most, progress)
    pieces = [Place(tuple(row), 0) for row in text[:PIECES]]
    parts: list[Sequence[Callable[[], Told | Kept]]] = [
        [partial(Told, bench, part) for part in _batches(told, ROWS, chance)],
        [partial(Kept, bench, part, TEXT) for part in chunks(pieces, TEXTS)],
        [partial(Kept, bench, part, NEAR) for part in _batches(near, ROWS, chance)],
    ]
    streams = [_pieces(makers, chance) for makers in parts if makers]
    begin = {layer: balanced(one) for layer, one in factors.items()}
    adapters = {site.layer: site.adapter for site in bench.sites}
    descent = Descent(bench.base, adapters, begin, RATE * _size(begin), refining.steps)
    remedy = "use refine=0, or the base in float32"
    for step in tracked(range(refining.steps), "Training facts together", progress, unit="steps"):
        # A piece is made here, while nothing is at work.
        found = descent.step([next(stream).loss for stream in streams])
        if not all(map(math.isfinite, found)):
            raise NPTError(f"refine: the loss is not finite at step {step + 1} of {refining.steps}; {remedy}")
    descent.check("refine", remedy)
    return {layer: Factors(one.left.cpu().double(), one.right.cpu().double()) for layer, one in descent.factors.items()}


def check_refinable(bench: Bench) -> None:
    """Checks that facts at some blocks can be trained.

    Raises:
        NPTError: their hooks are off the model, or the base has no gradient.
    """
    if not bench.is_open:
        raise NPTError("refine: the store's edits are off the model since close(); call reopen() first")
    with bench.off():
        check_slopes(bench.base, bench.first.down, "refine", "use refine=0, or a base whose layers have one")


def _pieces(makers: Sequence[Callable[[], Told | Kept]], chance: torch.Generator) -> Iterator[Told | Kept]:
    """Pieces in turns, each made when it is read for the first time; its rows are read below the edits then."""
    made: dict[int, Told | Kept] = {}
    for number in turns(len(makers), chance):
        if number not in made:
            made[number] = makers[number]()
        yield made[number]


def _batches(rows: Sequence[_Row], size: int, chance: torch.Generator) -> list[list[_Row]]:
    """Rows in batches that chance puts together."""
    order = torch.randperm(len(rows), generator=chance).tolist()
    return [[rows[i] for i in part] for part in chunks(order, size)]


def _size(factors: Mapping[int, Factors]) -> float:
    """The root mean square of all numbers of some factors."""
    parts = [part for one in factors.values() for part in (one.left, one.right)]
    return float((sum(part.square().sum() for part in parts) / sum(part.numel() for part in parts)) ** 0.5)
