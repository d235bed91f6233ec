"""Figures that cost more: how varied the text is that an edited model writes, and what it still learns from a prompt.

fluency   weighted 2- and 3-gram entropies, in bits, of 40 tokens behind a paraphrase; low where text repeats itself
skill     share right on prompts of random tokens: a list begun again, and a table of pairs asked in another order
"""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch

from npt.editing.bench import chunks, written
from npt.editing.benchmark.asking import Asker
from npt.editing.benchmark.methods import Method
from npt.editing.benchmark.records import Record
from npt.editing.replay import Recording, record, run_again
from npt.editing.statistics import padded
from npt.errors import NPTError
from npt.tuner.converted import device_of, eval_mode

EXTRAS = ("fluency", "skill")
#: Tokens that are written for the fluency, and the weights of 2- and 3-grams, those of ROME's authors.
TOKENS, WEIGHTS = 40, {2: 2 / 3, 3: 4 / 3}
#: Prompts of each kind that the skill is measured on, and items of each.
PROMPTS, ITEMS = 8, 8
_ROWS = 8


@dataclass(frozen=True)
class Probe:
    """Token ids, and the indices of those that the ones before them tell."""

    ids: tuple[int, ...]
    asked: range


class Extras:
    """Makes the figures that are asked for; (None, None) for others.

    Args:
        names: of `EXTRAS`.

    Raises:
        NPTError: an unknown name.
    """

    def __init__(self, names: Collection[str] = ()):
        for name in names:
            if name not in EXTRAS:
                raise NPTError(f"--with {name}: no figure has that name; use {', '.join(EXTRAS)}")
        self.names = names
        self._fluency: dict[str, float] = {}
        self._recorded: list[tuple[Sequence[Probe], Recording]] = []
        self._skill: float | None = None

    def fluency(self, asker: Asker, method: Method, item: Record) -> tuple[float | None, float | None]:
        """(entropy of the text behind a paraphrase, that less the base's), in bits."""
        if "fluency" not in self.names:
            return None, None
        prompt = next(iter(item.paraphrases), item.request.prompt)
        if prompt not in self._fluency:
            with method.disabled():
                self._fluency[prompt] = entropy(written(asker.base, asker.tokenizer, prompt, TOKENS))
        now = entropy(written(asker.base, asker.tokenizer, method.text(prompt), TOKENS))
        return now, now - self._fluency[prompt]

    def skill(self, asker: Asker, method: Method) -> tuple[float | None, float | None]:
        """(share right, that less the base's)."""
        if "skill" not in self.names:
            return None, None
        if self._skill is None:
            with method.disabled(), eval_mode(asker.base), torch.no_grad():
                for part in chunks(probes(asker.text, asker.tokenizer), _ROWS):
                    batch = padded([row.ids for row in part], device_of(asker.base))
                    self._recorded.append((part, record(asker.base, asker.blocks, asker.first, batch)))
                self._skill = self._right(asker)
        now = self._right(asker)
        return now, now - self._skill

    @torch.no_grad()
    def _right(self, asker: Asker) -> float:
        right = total = 0
        with eval_mode(asker.base):
            for part, recording in self._recorded:
                best = run_again(asker.base, asker.blocks, recording).argmax(-1).cpu()
                for i, row in enumerate(part):
                    right += sum(int(best[i, at - 1]) == row.ids[at] for at in row.asked)
                    total += len(row.asked)
        return right / total


def entropy(text: str) -> float:
    """Mean of the weighted n-gram entropies of a text's words and marks, in bits; 0 for a text without any."""
    words = re.findall(r"\w+|[^\w\s]", text)
    return sum(weight * _entropy(words, n) for n, weight in WEIGHTS.items()) / len(WEIGHTS)


def _entropy(words: Sequence[str], n: int) -> float:
    counts = Counter(zip(*(words[i:] for i in range(n)), strict=False)).values()
    total = sum(counts)
    return -sum(count / total * math.log2(count / total) for count in counts)


def probes(text: Sequence[Sequence[int]], tokenizer: object, seed: int = 0) -> list[Probe]:
    """Prompts of random tokens of the running text, the same for every method: a list that begins again, of which every
    further token is asked, and pairs whose second tokens are asked in another order.

    Raises:
        NPTError: the text has too few different tokens.
    """
    special = set(getattr(tokenizer, "all_special_ids", ()))
    tokens = sorted({token for row in text for token in row} - special)
    if len(tokens) < 2 * ITEMS:
        raise NPTError(f"--with skill: the running text has {len(tokens)} different tokens; give at least {2 * ITEMS}")
    chance, found = random.Random(seed), list[Probe]()
    for _ in range(PROMPTS):
        items = chance.sample(tokens, ITEMS)
        found.append(Probe((*items, *items), range(ITEMS + 1, 2 * ITEMS)))
        keys, values = (part := chance.sample(tokens, 2 * ITEMS))[:ITEMS], part[ITEMS:]
        pairs = list(zip(keys, values, strict=True))
        again = chance.sample(pairs, ITEMS)
        ids = tuple(token for pair in (*pairs, *again) for token in pair)
        found.append(Probe(ids, range(2 * ITEMS + 1, 4 * ITEMS, 2)))
    return found
