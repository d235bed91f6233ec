"""One edit before it is written: its settings, its problem, and trials of values on the model.

A trial adds v (a x) at every token x of a text, as the finished weight delta will, with a = M k / (k^T M k); so what is tried
is what is written. Where several blocks are edited, each has a key and a value of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from npt.common.precision import cast, wide
from npt.editing.bench import Bench
from npt.editing.keys import Place, Target
from npt.editing.requests import Request
from npt.editing.solve import Metric, Pairs, solve

#: Nats by which the end of the target's last word shall lead a longer word, and by which it does where that is enough.
_WORD_END, _WORD_ENDED = 2.0, 0.5


@dataclass(frozen=True)
class Settings:
    """How values are found.

    margin: nats by which every token of the target shall lead the log-sum-exp of all others. steps: the most passes, of
    `newton` those of Gauss-Newton. decay: share of the value given up in each Newton step. clamp: the value's length, at most,
    in lengths of the projection's own output at that token. terminator: text that shall follow the target; None for whatever
    does. contexts: short texts of the base behind which the target shall follow too, beside bare prompts. further, stride,
    reach: of Adam, which goes on where the steps of `newton` end and a token of the target does not lead: the most passes (0
    for none; the last one only looks), how far a pass moves the value at most, and the value's greatest length, `clamp` at
    least, both in such lengths. rate, weight_decay and essence: of `optimised`, as ROME names them (Adam's step, the value's
    own length, KL of "SUBJECT is a"). enough: the loss in nats below which it stops. alpha: of `naive`.
    """

    margin: float = 3.0
    steps: int = 10
    decay: float = 0.05
    clamp: float = 1.5
    terminator: str | None = None
    contexts: int = 2
    further: int = 25
    stride: float = 0.5
    reach: float = 4.0
    rate: float = 0.5
    weight_decay: float = 0.5
    essence: float = 0.0625
    enough: float = 0.05
    alpha: float = 1.0


@dataclass(frozen=True)
class Problem:
    """One edit alone, at every block of a bench.

    keys: of each block (f,), the subject's. fixed: of each (f, m), keys that get no value. metrics: M of each. prefixes:
    nothing, and short texts of the base.
    """

    bench: Bench
    request: Request
    settings: Settings
    metrics: tuple[Metric, ...]
    keys: tuple[Tensor, ...]
    fixed: tuple[Tensor, ...]
    prefixes: tuple[str, ...] = ("",)

    def targets(self) -> list[Target]:
        """Prompt and paraphrases, each with the target and its terminator behind it; bare first, then behind prefixes."""
        settings, target = self.settings, self.bench.prompts.target
        texts = [
            prefix + prompt for prefix in self.prefixes[: 1 + settings.contexts] for prompt in self.request.prompts
        ]
        return [target(text, self.request.target, settings.terminator) for text in texts]

    def pairs(self, keys: Sequence[Tensor], values: Sequence[Tensor]) -> dict[int, Pairs]:
        """{block: its keys (f, n) with values (d, n), and its fixed keys with none}."""
        found = {}
        for number, site in enumerate(self.bench.sites):
            own, value, fixed = keys[number], values[number], self.fixed[number]
            everything = torch.cat([own, fixed], 1)
            zeros = value.new_zeros(len(value), fixed.shape[1])
            found[site.layer] = Pairs(everything, self.metrics[number](everything), torch.cat([value, zeros], 1))
        return found

    def at_keys(self, values: Tensor) -> dict[int, Pairs]:
        """The pairs of values (blocks, d) at the subject's keys."""
        return self.pairs([key[:, None] for key in self.keys], list(values[..., None]))

    def rows(self) -> list[Tensor]:
        """a (f,) of each block: the weight delta is v a^T, with a k = 1 and a p = 0 for every fixed key p."""
        ones = torch.ones(len(self.keys), 1, dtype=self.keys[0].dtype)
        return [solve(pairs).delta[0] for pairs in self.at_keys(ones).values()]


class Trial:
    """Texts with a target behind them, and what the model says of them when each block's v is written at its key.

    Args:
        problem: the edit. rows: prompts with their targets. extra: other texts, whose last token is asked too. only: the
            one token of each row and other text at which v is added, whole, as ROME and MEMIT try it; without them it is
            added as the finished weight delta will.
    """

    def __init__(
        self,
        problem: Problem,
        rows: Sequence[Target],
        extra: Sequence[Place] = (),
        only: Sequence[int] | None = None,
    ):
        bench = problem.bench
        self.bench, self.rows = bench, rows
        self.inside = bench.inside([*(row.ids for row in rows), *(place.ids for place in extra)], whole=False)
        self.margin = problem.settings.margin
        # Indices stay on the CPU, from where they serve logits on any device.
        spots = [(i, row.start - 1 + t, token) for i, row in enumerate(rows) for t, token in enumerate(row.targets)]
        self.row_of, self.at, self.target = (torch.tensor(part) for part in zip(*spots, strict=True))
        # Without a terminator, the word must end behind a target that ends in a letter: "Oxford" is not "Oxfordshire".
        words = [i for i, row in enumerate(rows) if row.in_word and row.words == len(row.targets)]
        self.last = (
            torch.tensor(words, dtype=torch.long),
            torch.tensor([len(rows[i].ids) - 1 for i in words], dtype=torch.long),
        )
        self.ends = torch.tensor([len(place.ids) - 1 for place in extra], dtype=torch.long)
        # Logits are made at these tokens alone; places in them are indices among these.
        self._asked = torch.cat([self.at, self.last[1], self.ends]).unique()
        self._at = torch.searchsorted(self._asked, self.at)
        self.last = (self.last[0], torch.searchsorted(self._asked, self.last[1]))
        self.ends = torch.searchsorted(self._asked, self.ends)
        self._rows: list[Tensor] | None = None
        if only is None:
            self._rows = [
                row.to(device=site.adapter.device, dtype=site.adapter.dtype)
                for row, site in zip(problem.rows(), bench.sites, strict=True)
            ]
            # The key itself is at the first row's token that is moved most.
            place = int(self.shares(0, self.inside.inputs[0][0]).abs()[: rows[0].start].argmax())
        else:
            one = torch.zeros(self.inside.inputs[0].shape[:2], dtype=bench.adapter.dtype)
            one[torch.arange(len(only)), torch.tensor(only)] = 1
            self._spots, place = one.to(bench.adapter.device), only[0]
        #: Lengths of the projections' own outputs at the key, (blocks,).
        self.lengths = torch.stack([wide(outputs[0, place]).norm().cpu() for outputs in self.inside.outputs])

    def shares(self, number: int, inputs: Tensor) -> Tensor:
        """The share of v that each token of a block gets, of its projection's inputs (..., f): a x, or 1 at its spot alone."""
        if self._rows is None:
            return self._spots.reshape(inputs.shape[:-1])
        row = self._rows[number]
        return cast(inputs, row.dtype) @ row

    def logits(self, values: Tensor) -> Tensor:
        """Logits (rows, tokens asked for, vocabulary) with v (blocks, d)."""

        def add(number: int, x: Tensor) -> Tensor:
            return self.shares(number, x)[..., None] * values[number].to(x.device)

        with self.bench.trying([partial(add, number) for number in range(len(self.bench.sites))]):
            return self.again()

    def again(self) -> Tensor:
        """The same with what is at work."""
        return self.bench.again(self.inside.recording, self._asked)

    def aimed(self, logits: Tensor) -> Tensor:
        """Logits (targets, vocabulary) where a target is to be predicted."""
        return wide(logits[self.row_of, self._at])

    def margins(self, logits: Tensor) -> Tensor:
        """Nats by which each target leads the log-sum-exp of all other tokens, (targets,).

        Behind them, for each text without a terminator: how far the end of the last word leads its going on, raised so that
        `_WORD_END` nats of it count as the whole margin.
        """
        found = margins(self.aimed(logits), self.target)
        if not len(self.last[0]):
            return found
        ends = word_ends(wide(logits[self.last]), self.bench.prompts.continuing)
        return torch.cat([found, ends + self._raised])

    @property
    def _raised(self) -> float:
        return max(0.0, self.margin - _WORD_END)

    def leads(self, margins: Tensor, goal: float = 0.0) -> bool:
        """True where every target leads by a goal in nats and the end of each last word goes before its going on.

        Args:
            margins: of `margins`.
            goal: above 0, the ends of words shall lead by `_WORD_ENDED` too.
        """
        targets, ends = margins.detach().split([len(self.target), len(self.last[0])])
        return bool((targets > goal).all() and (ends - self._raised > (_WORD_ENDED if goal > 0 else 0)).all())


def margins(logits: Tensor, target: Tensor) -> Tensor:
    """Logit of the target less the log-sum-exp of all others, (rows,), of logits (rows, vocabulary)."""
    target = target.to(logits.device)[:, None]
    own = logits.gather(-1, target)
    others = logits.scatter(-1, target, float("-inf"))
    return own[:, 0] - others.logsumexp(-1)


def word_ends(logits: Tensor, continuing: Tensor) -> Tensor:
    """Nats by which tokens that end a word lead those that go on with it, (rows,), of logits (rows, vocabulary)."""
    mask = torch.zeros(logits.shape[-1], dtype=torch.bool)
    mask[: len(continuing)] = continuing
    mask = mask.to(logits.device)
    minus = float("-inf")
    return logits.masked_fill(mask, minus).logsumexp(-1) - logits.masked_fill(~mask, minus).logsumexp(-1)
