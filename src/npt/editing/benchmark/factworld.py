"""Edits measured on FactWorld: small models that know every fact in every wording, so that each figure has a right answer.

Each seed has its own world, model and edits. All figures are of text that the model writes with nothing of the answer given.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from npt.common.progress import tracked
from npt.editing.bench import chunks
from npt.editing.benchmark.continuing import continued_many
from npt.editing.benchmark.methods import Method
from npt.editing.benchmark.records import Neighbour, Record
from npt.editing.benchmark.small import ANSWER
from npt.editing.benchmark.wording import RELATIONS
from npt.editing.benchmark.world import Person, World
from npt.editing.measure import divergences, follows
from npt.editing.metrics import Source
from npt.editing.requests import Request
from npt.editing.statistics import padded, token_rows
from npt.errors import NPTError
from npt.tuner.converted import device_of

#: Neighbours that a record asks after, and single edits that n = 1 stands for.
NEIGHBOURS, SINGLES = 8, 100
#: Documents of held-out prose, over which the divergence is a mean; and those of the statistics.
PROSE, STATISTICS = 60, 400
#: Seeds of documents that training doesn't use.
_HELD_OUT, _STATISTICS = 10**6, 10**6 + 1


@dataclass(frozen=True)
class Fact(Record):
    """A record of FactWorld. `paraphrases` holds the held-out wording.

    person, relation: whose fact. trained: prompts in all wordings of training text. others: the person's other facts, as
    neighbours are asked.
    """

    person: str
    relation: str
    trained: tuple[str, ...]
    others: tuple[Neighbour, ...]


def facts(world: World, count: int, seed: int = 0, wordings: int = 1) -> list[Fact]:
    """Edits of so many different editable people, each of one relation, with a new object.

    Args:
        wordings: how many trained wordings the request names: one is the prompt, the others its paraphrases.

    Raises:
        NPTError: more edits than people, or more wordings than there are.
    """
    people, most = world.of("editable"), len(RELATIONS[0].trained)
    if not 1 <= count <= len(people):
        raise NPTError(
            f"edits={count}: the world has {len(people)} people whose facts may be edited; use 1 to {len(people)}"
        )
    if not 1 <= wordings <= most:
        raise NPTError(f"wordings={wordings}: use 1 to {most}")
    draw = random.Random(f"edits {world.seed} {seed}")
    return [_fact(draw, world, person, wordings) for person in draw.sample(people, count)]


def _fact(draw: random.Random, world: World, person: Person, wordings: int) -> Fact:
    relation = draw.choice(RELATIONS)
    trained = tuple(template.format(person.name) for template in relation.trained)
    prompt, *more = draw.sample(trained, wordings)
    request = Request(prompt, world.other(draw, person, relation.name), person.name, tuple(more))
    first, last = person.name.split()
    near = world.of("neighbour")
    draw.shuffle(near)
    near.sort(key=lambda other: not {first, last} & set(other.name.split()))  # those that share a name come first
    template = draw.choice(relation.trained)
    return Fact(
        request=request,
        paraphrases=(relation.held_out.format(person.name),),
        neighbours=tuple(Neighbour(template.format(o.name), o.facts[relation.name]) for o in near[:NEIGHBOURS]),
        person=person.name,
        relation=relation.name,
        trained=trained,
        others=tuple(
            Neighbour(draw.choice(r.trained).format(person.name), person.facts[r.name])
            for r in RELATIONS
            if r is not relation
        ),
    )


def statistics_of(world: World) -> list[str]:
    """Running text for a metric: documents about visible people, news and geography left out, and prose."""
    visible = world.of("visible")
    return [*world.biographies(visible, _STATISTICS, 2), *world.prose(_STATISTICS, STATISTICS)]


def prompts_of(world: World, seed: int = 0, each: int = 6) -> list[str]:
    """Prompts about visible people, as edits are asked: for `domain`, or for `protect`."""
    draw = random.Random(f"prompts {world.seed} {seed}")
    pairs = [(person, relation) for person in world.of("visible") for relation in draw.sample(RELATIONS, each)]
    return [draw.choice(relation.trained).format(person.name) for person, relation in pairs]


# -- figures ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Figures:
    """Shares over the edits of one batch, and the divergence.

    efficacy: the object follows in the trained wordings. prompt: in the one that was given. paraphrase: in the held-out one.
    neighbours: other people's facts read as before; others: the same person's other facts. kl: in nats a token of prose.
    """

    efficacy: float
    prompt: float
    paraphrase: float
    neighbours: float
    others: float
    kl: float


NAMES = tuple(Figures.__dataclass_fields__)


class Examiner:
    """Puts all questions of a batch of edits at once, and remembers what the base says and how likely it finds prose.

    Args:
        model, tokenizer: with nothing written. world: the model's.
    """

    def __init__(self, model: Any, tokenizer: Any, world: World, texts: int = PROSE):
        self.model, self.tokenizer = model, tokenizer
        self._rows = token_rows(tokenizer, world.prose(_HELD_OUT, texts), "prose")
        self._said: dict[str, str] = {}
        self._logits = list(self._of_prose())

    def _of_prose(self) -> Iterator[Tensor]:
        for part in chunks(self._rows, 32):
            with torch.no_grad():
                logits: Tensor = self.model(**padded(part, device_of(self.model)), use_cache=False).logits
            yield from (logits[i, : len(row)] for i, row in enumerate(part))

    def answers(self, prompts: Sequence[str], text: Callable[[str], str] = str) -> dict[str, str]:
        """{prompt: what the model says now}. text: what the model is given for a prompt."""
        found = continued_many(self.model, self.tokenizer, [text(prompt) for prompt in prompts], ANSWER)
        return dict(zip(prompts, found, strict=True))

    def remember(self, batch: Sequence[Fact]) -> None:
        """Asks the base after everything that shall stay as it is; nothing may be written."""
        kept = {near.prompt for fact in batch for near in (*fact.neighbours, *fact.others)} - set(self._said)
        self._said |= {prompt: _sentence(text) for prompt, text in self.answers(sorted(kept)).items()}

    def figures(self, batch: Sequence[Fact], text: Callable[[str], str] = str) -> Figures:
        """The figures of edits that are at work now; `remember` was called for them. text: see `answers`."""
        said = self.answers([p for f in batch for p in (*f.trained, *f.paraphrases)], text)
        now = self.answers([near.prompt for f in batch for near in (*f.neighbours, *f.others)], text)

        def told(prompts: Sequence[str], fact: Fact) -> float:
            return fmean(follows(said[prompt], fact.request.target) for prompt in prompts)

        def kept(near: Sequence[Neighbour]) -> float:
            return fmean(_sentence(now[n.prompt]) == self._said[n.prompt] for n in near)

        kl = [float(divergences(a, b).sum()) for a, b in zip(self._logits, self._of_prose(), strict=True)]
        return Figures(
            efficacy=fmean(told(f.trained, f) for f in batch),
            prompt=fmean(told([f.request.prompt], f) for f in batch),
            paraphrase=fmean(told(f.paraphrases, f) for f in batch),
            neighbours=fmean(kept(f.neighbours) for f in batch),
            others=fmean(kept(f.others) for f in batch),
            kl=sum(kl) / sum(map(len, self._rows)),
        )


def _sentence(text: str) -> str:
    return re.split(r"(?<=\.)", text.strip(), maxsplit=1)[0]


# -- the measurement -------------------------------------------------------------------------------------------------------

#: What is taken where nothing is said, chosen on a world that is not reported: docs/experiments.md. A fact is looked up at the
#: prompt's last token here, whose key in the last block is `margin`'s; the other methods' blocks hold the subject.
METHOD = "margin"
LAYERS: tuple[int, ...] = (0,)


def source_of(model: Any, tokenizer: Any, world: World, metric: str = "domain", progress: bool = True) -> Source:
    """The text that edits must not disturb: that about visible people, and prose."""
    domain = prompts_of(world) if metric == "domain" else None
    return Source(model, tokenizer, metric, statistics_of(world), domain, None, progress)


def measured(
    method: Method, examiner: Examiner, batches: Sequence[Sequence[Fact]], label: str = "", progress: bool = True
) -> Figures:
    """The means of the figures of every batch: written, asked and undone before the next.

    Args:
        method: with nothing written. examiner: of the method's model. label: of the progress bar.
    """
    for batch in batches:
        examiner.remember(batch)
    found = []
    for batch in tracked(batches, label, progress and len(batches) > 1, unit="batches"):
        try:
            method.write_many([fact.request for fact in batch])
            found.append(examiner.figures(batch, method.text))
        finally:
            method.undo()
    return Figures(*(fmean(getattr(one, name) for one in found) for name in NAMES))
