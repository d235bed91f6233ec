"""Edits measured on FactWorld: small models that know every fact in every wording, so that each figure has a right answer.

    python -m npt.editing.benchmark.factworld --model llama --seed 0 --edits 1 64 256

Each seed has its own world, model and edits. All figures are of text that the model writes with nothing of the answer given.
"""

from __future__ import annotations

import argparse
import random
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from npt.common.display import markdown
from npt.common.progress import tracked
from npt.editing.bench import chunks
from npt.editing.benchmark.continuing import continued_many
from npt.editing.benchmark.records import Neighbour, Record
from npt.editing.benchmark.small import ANSWER, Gates, Recipe, gates_of, small_model
from npt.editing.benchmark.wording import RELATIONS
from npt.editing.benchmark.world import Person, World
from npt.editing.measure import divergences, follows
from npt.editing.requests import Request
from npt.editing.statistics import padded, token_rows
from npt.editing.store import EditStore
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

    def _of_prose(self) -> Any:
        for part in chunks(self._rows, 32):
            with torch.no_grad():
                logits: Tensor = self.model(**padded(part, device_of(self.model)), use_cache=False).logits
            yield from (logits[i, : len(row)] for i, row in enumerate(part))

    def answers(self, prompts: Sequence[str]) -> dict[str, str]:
        """{prompt: what the model says now}."""
        return dict(zip(prompts, continued_many(self.model, self.tokenizer, prompts, ANSWER), strict=True))

    def remember(self, batch: Sequence[Fact]) -> None:
        """Asks the base after everything that shall stay as it is; nothing may be written."""
        kept = {near.prompt for fact in batch for near in (*fact.neighbours, *fact.others)} - set(self._said)
        self._said |= {prompt: _sentence(text) for prompt, text in self.answers(sorted(kept)).items()}

    def figures(self, batch: Sequence[Fact]) -> Figures:
        """The figures of edits that are at work now; `remember` was called for them."""
        said = self.answers([p for f in batch for p in (*f.trained, *f.paraphrases)])
        now = self.answers([near.prompt for f in batch for near in (*f.neighbours, *f.others)])

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


def mean_figures(figures: Sequence[Figures]) -> Figures:
    """The mean of each figure."""
    return Figures(*(fmean(getattr(one, name) for one in figures) for name in NAMES))


# -- the measurement -------------------------------------------------------------------------------------------------------

#: What `EditStore` is given here; chosen on other worlds than those reported.
OPTIONS: Mapping[str, Any] = {"layer": 1}


@dataclass(frozen=True)
class Result:
    """Figures of one model and one number of edits: means over its batches."""

    model: str
    seed: int
    edits: int
    figures: Figures
    gates: Gates


def factworld(
    models: Sequence[str] = ("llama",),
    seeds: Sequence[int] = (0,),
    edits: Sequence[int] = (1, 64, 256),
    *,
    options: Mapping[str, Any] | None = None,
    wordings: int = 1,
    singles: int = SINGLES,
    recipe: Recipe | None = None,
    cache_dir: str | Path | None = None,
    progress: bool = True,
) -> list[Result]:
    """Trains or loads each model, asks its gates, and measures batches of edits on it.

    Args:
        models: "llama", "gpt2". seeds: of worlds, models and edits. edits: how many are written together; 1 stands for
            `singles` edits, each alone. options: of `EditStore`, beside `OPTIONS`. wordings: see `facts`. recipe: of the
            training, family and seed aside. cache_dir: where models are kept. progress: show progress bars.

    Raises:
        NPTError: an argument out of range. RunError: a model does not pass the gates.
    """
    found = []
    recipes = [replace(recipe or Recipe(), family=family, seed=seed) for family in models for seed in seeds]
    for one in recipes:  # before any training
        for count in edits:
            facts(one.world(), count if count > 1 else singles, wordings=wordings)
    for one in recipes:
        model, tokenizer, world = small_model(one, cache_dir=cache_dir, progress=progress)
        gates = gates_of(model, tokenizer, world, progress=progress)
        gates.check(f"FactWorld, {one.family}, seed {one.seed}")
        for count in edits:
            chosen = facts(world, count if count > 1 else singles, wordings=wordings)
            batches = [chosen] if count > 1 else [[fact] for fact in chosen]
            figures = measured(model, tokenizer, world, batches, options or {}, progress)
            found.append(Result(one.family, one.seed, count, mean_figures(figures), gates))
    return found


def measured(
    model: Any,
    tokenizer: Any,
    world: World,
    batches: Sequence[Sequence[Fact]],
    options: Mapping[str, Any],
    progress: bool = True,
) -> list[Figures]:
    """The figures of every batch: written, asked and undone before the next."""
    examiner = Examiner(model, tokenizer, world)
    for batch in batches:
        examiner.remember(batch)
    own = {"statistics": statistics_of(world), "domain": prompts_of(world), **OPTIONS, **options}
    store, found = EditStore(model, tokenizer, progress=progress, **own), []
    try:
        for batch in tracked(batches, "Batches of edits", progress and len(batches) > 1, unit="batches"):
            written = store.write_many([fact.request for fact in batch])
            found.append(examiner.figures(batch))
            for edit in written:
                store.undo(edit.id)
    finally:
        store.close()
    return found


def table(results: Sequence[Result]) -> str:
    """One row per model and number of edits, the mean of its seeds; in brackets the worst seed."""
    rows = []
    for model, edits in dict.fromkeys((result.model, result.edits) for result in results):
        own = [r.figures for r in results if (r.model, r.edits) == (model, edits)]
        cells = []
        for name in NAMES:
            values = [getattr(figures, name) for figures in own]
            worst = max(values) if name == "kl" else min(values)
            shown = "{:.2g}" if name == "kl" else "{:.1%}"
            cells.append(shown.format(fmean(values)) + (f" ({shown.format(worst)})" if len(values) > 1 else ""))
        rows.append([model, str(edits), str(len(own)), *cells])
    return markdown(["model", "edits", "seeds", *NAMES], rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command `python -m npt.editing.benchmark.factworld`."""
    parser = argparse.ArgumentParser(
        prog="python -m npt.editing.benchmark.factworld", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--model", nargs="+", default=["llama"], help="llama, gpt2")
    parser.add_argument("--seed", nargs="+", type=int, default=[0], help="of worlds, models and edits")
    parser.add_argument("--edits", nargs="+", type=int, default=[1, 64, 256], help="edits written together")
    parser.add_argument("--cache-dir", default=None, help="the folder that keeps trained models")
    given = parser.parse_args(arguments)
    try:
        results = factworld(given.model, given.seed, given.edits, cache_dir=given.cache_dir)
    except NPTError as error:
        print(error, file=sys.stderr)
        return 2
    print(table(results))
    for result in {(r.model, r.seed): r for r in results}.values():
        shown = ", ".join(f"{name} {value:.1%}" for name, value in asdict(result.gates).items())
        print(f"\n{result.model}, seed {result.seed}, before any edit: {shown}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
