"""The choice of blocks, mu and lambda by held-out questions and a limit on general text, both written by the model itself."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from npt.common.progress import progress_bar
from npt.editing.absorbing.lesson import Apart, Lesson
from npt.editing.absorbing.patches import Patches
from npt.editing.absorbing.settings import Options, Setting
from npt.editing.statistics import Moments

logger = logging.getLogger(__name__)

#: Where the search begins. Trials of mu with one set of blocks, and of lambda, each by this factor.
MU, LAM, STEPS, FACTOR = 4.0, 0.01, 4, 10.0
#: The most blocks that steps by gradient train from zero.
TRAINED = 10
#: Damage that uses so much of the limit is near enough to it.
_NEAR = 0.8


@dataclass(frozen=True)
class Trial:
    """A setting that was tried. held: mean KL to the teacher on held-out questions. text: mean KL from the base on general
    text.
    """

    setting: Setting
    held: float
    text: float


def block_sets(count: int) -> list[tuple[int, ...]]:
    """Sets of blocks to compare, of so many: the upper half, spread; fewer of it; the upper two thirds, spread."""
    found = [_spread(count // 2, count - 1, 8), _spread(count // 2, count - 1, 4), _spread(count // 3, count - 1, 8)]
    return list(dict.fromkeys(found))


def trained_blocks(count: int) -> tuple[int, ...]:
    """The blocks that steps by gradient train from zero, of so many: all but the lowest seventh, spread."""
    return _spread(count // 7, count - 1, TRAINED)


def _spread(low: int, high: int, most: int) -> tuple[int, ...]:
    return tuple(sorted({round(float(x)) for x in torch.linspace(low, high, min(most, high - low + 1))}))


class Choice:
    """The search for a setting.

    Args:
        lesson: the conversations that are solved for.
        held: others, by which settings are compared.
        watched: general text.
        text: second moments of text, of every block that may be patched.
        patches: where weight deltas are tried; nothing at work.
        options: the limit, and what a person fixed.
        progress: show a progress bar.
    """

    def __init__(
        self,
        lesson: Lesson,
        held: Apart,
        watched: Apart,
        text: Moments,
        patches: Patches,
        options: Options,
        progress: bool = False,
    ):
        # Copies, as `best` moves them up to the lowest block of its sets.
        self.lesson, self.held, self.watched, self.text = lesson.copy(), held.copy(), watched.copy(), text
        self.patches, self.options, self.progress = patches, options, progress
        self.trials: dict[Setting, Trial] = {}
        self._advance: Callable[[int], None] = lambda steps: None

    def best(self, sets: Sequence[tuple[int, ...]]) -> Trial:
        """The setting with the least KL on the held-out questions among those within the limit on general text.

        The set of blocks first, then mu, then lambda. Where no setting is within the limit, the one nearest to it.

        Args:
            sets: the sets of blocks to compare.
        """
        mu, lam = self.options.mu or MU, self.options.lam or LAM
        lowest = min(min(one) for one in sets)
        for part in (self.lesson, self.held, self.watched):
            part.stream.through(lowest)  # below the lowest block nothing changes
        with progress_bar("Choosing blocks, mu and lambda", None, self.progress, unit="trials") as self._advance:
            for blocks in sets:
                self.trial(Setting(blocks, mu, lam, self.options.rank, self.options.steps, self.options.rate, "closed"))
            if self.options.mu is None:
                self._search_mu(self.chosen().setting)
            if self.options.lam is None:
                for other in (LAM * FACTOR, LAM / FACTOR):
                    self.trial(replace(self.chosen().setting, lam=other))
        return self.chosen()

    def _search_mu(self, setting: Setting) -> None:
        """Trials of mu, towards the damage that the limit allows: it falls about as fast as mu grows."""
        for _ in range(STEPS):
            near = [trial for trial in self.trials.values() if trial.setting.blocks == setting.blocks]
            best = self.chosen()
            if best.text <= self.options.limit and best.text >= _NEAR * self.options.limit:
                return
            last = min(near, key=lambda trial: abs(math.log(max(trial.text, 1e-9) / self.options.limit)))
            ratio = last.text / (0.9 * self.options.limit)
            step = min(16.0, max(1 / 16, ratio ** (1.5 if ratio > 1 else 1.0)))
            if abs(math.log(step)) < 0.1:
                return
            self.trial(replace(setting, mu=last.setting.mu * step))

    def chosen(self) -> Trial:
        """The best trial so far."""
        return min(self.trials.values(), key=self._key)

    def _key(self, trial: Trial) -> tuple[float, float]:
        over = trial.text - self.options.limit
        return (0.0, trial.held) if over <= 0 else (over, trial.held)

    def trial(self, setting: Setting) -> Trial:
        """The figures of a setting."""
        if setting not in self.trials:
            with self.patches.trying():
                self.lesson.fit(setting, self.text, self.patches)
                held, text = (float(part.kl().sum() / part.tokens.sum()) for part in (self.held, self.watched))
            self.trials[setting] = Trial(setting, held, text)
            logger.info(
                "absorb: %d blocks from %d, mu %.3g, lambda %.2g: KL %.4f on held-out questions, %.4f on general text",
                len(setting.blocks), setting.blocks[0], setting.mu, setting.lam, held, text,
            )  # fmt: skip
            self._advance(1)
        return self.trials[setting]
