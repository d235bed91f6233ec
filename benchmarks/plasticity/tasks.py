"""Tasks as seeded generators of examples.

What an example is about (its digits, its function, its words) decides whether it is for training, development or the test.
So no answer of the test can be known from training, and no seed changes that.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass

PARTS = ("train", "development", "test")
#: Of 8 groups of examples so many are for the test, and as many for development.
_HELD = 1
_NAMES = (
    "Ann",
    "Ben",
    "Cleo",
    "Dan",
    "Eva",
    "Finn",
    "Gus",
    "Hal",
    "Ida",
    "Jim",
    "Kim",
    "Lea",
    "Max",
    "Nora",
    "Otto",
    "Pam",
)
_CITIES = ("Paris", "Rome", "Madrid", "Berlin", "Oslo", "Cairo", "Lima", "Delhi", "Tokyo", "Athens")
_COUNTRIES = ("France", "Italy", "Spain", "Germany", "Norway", "Egypt", "Peru", "India", "Japan", "Greece")
_RULES: dict[str, Callable[[list[int]], list[int]]] = {
    "up": sorted,
    "down": lambda numbers: sorted(numbers, reverse=True),
    "back": lambda numbers: numbers[::-1],
    "twice": lambda numbers: [2 * number for number in numbers],
}
#: Openings of the invented language, each with the ending that its sentences have.
_ENDINGS = {"za": "mol", "ke": "tir", "bo": "fen", "lu": "sak"}
_STEMS = ("rin", "tol", "bek", "dal", "vos", "mig", "pel", "har", "nud", "sif")


@dataclass(frozen=True)
class Example:
    """A prompt and its answer; of an answer with steps, the last word is what counts. group: what it is about."""

    prompt: str
    answer: str
    group: str


def part_of(group: str) -> str:
    """The part that a group of examples belongs to, by its own letters."""
    number = hashlib.sha256(group.encode()).digest()[0] % 8
    return "test" if number < _HELD else "development" if number < 2 * _HELD else "train"


def examples(task: str, seed: int, part: str, count: int) -> list[Example]:
    """So many examples of a part, each prompt once.

    Args:
        task: a name of `TASKS`.
        seed: of the draws.
        part: one of `PARTS`.
        count: how many.

    Raises:
        ValueError: the task does not have so many.
    """
    chance = random.Random(f"{task} {part} {seed}")
    found: dict[str, Example] = {}
    for _ in range(1000 + 20 * count):
        one = TASKS[task](chance)
        if part_of(one.group) == part:
            found.setdefault(one.prompt, one)
        if len(found) == count:
            return list(found.values())
    raise ValueError(f"{task}: has fewer than {count} {part} examples; ask for fewer")


def right(task: str, text: str, answer: str) -> bool:
    """True where a text gives an answer: as a whole, or the last word of an answer with steps."""
    said, wanted = text.strip().rstrip("."), answer.rstrip(".")
    return said.split()[-1:] == wanted.split()[-1:] if task in STEPS else said == wanted


def rule_switching(chance: random.Random) -> Example:
    """A cue says what is to be done with four digits."""
    cue, numbers = chance.choice(list(_RULES)), chance.sample(range(10), 4)
    return Example(f"{cue}: {_joined(numbers)}", _joined(_RULES[cue](numbers)), _joined(sorted(numbers)))


def recall(chance: random.Random) -> Example:
    """One of 4 to 64 pairs is asked for."""
    count = chance.choice((4, 8, 16, 32, 64))
    pairs = {key: chance.randrange(10) for key in _distinct(chance, count)}
    asked = chance.choice(list(pairs))
    prompt = f"{' '.join(f'{key}={value}' for key, value in pairs.items())} {asked}=?"
    return Example(prompt, str(pairs[asked]), prompt)


def regression(chance: random.Random) -> Example:
    """y = a x + b of small numbers, from three points."""
    a, b, (*known, x) = chance.randint(1, 9), chance.randint(0, 20), chance.sample(range(10), 4)
    points = " ".join(f"{value}:{a * value + b}" for value in known)
    return Example(f"{points} {x}:?", str(a * x + b), f"{a} {b}")


def two_hop(chance: random.Random) -> Example:
    """People live in cities, cities lie in countries, other ones each time: in which country does one live?"""
    people, cities, countries = (chance.sample(names, 4) for names in (_NAMES, _CITIES, _COUNTRIES))
    said = [f"{person} lives in {city}." for person, city in zip(people, cities, strict=True)]
    said += [f"{city} is in {country}." for city, country in zip(cities, countries, strict=True)]
    chance.shuffle(said)
    who = chance.randrange(4)
    prompt = f"{' '.join(said)} In which country does {people[who]} live?"
    return Example(prompt, countries[who], prompt)


def chains(chance: random.Random) -> Example:
    """A sum of four numbers, with every step written."""
    numbers = [chance.randint(1, 9) for _ in range(4)]
    steps, total = [], numbers[0]
    for number in numbers[1:]:
        steps.append(f"{total}+{number}={total + number}")
        total += number
    return Example(f"{'+'.join(map(str, numbers))}=?", f"{' '.join(steps)} so {total}", _joined(sorted(numbers)))


def domain(chance: random.Random) -> Example:
    """Words of an invented language, whose ending is that of the sentence's first syllable."""
    opening, stems = chance.choice(list(_ENDINGS)), chance.sample(_STEMS, 4)
    answer = " ".join(f"{stem}{_ENDINGS[opening]}" for stem in stems)
    return Example(f"{opening} {' '.join(stems)}", answer, " ".join(sorted(stems)))


#: {name: its generator of one example}.
TASKS: dict[str, Callable[[random.Random], Example]] = {
    "rule-switching": rule_switching,
    "recall": recall,
    "regression": regression,
    "two-hop": two_hop,
    "chains": chains,
    "domain": domain,
}
#: Tasks whose answers hold steps.
STEPS = ("chains",)


def _joined(numbers: list[int]) -> str:
    return " ".join(map(str, numbers))


def _distinct(chance: random.Random, count: int) -> list[str]:
    letters = "abcdefghijklmnopqrstuvwxyz"
    return chance.sample([a + b for a in letters for b in letters], count)
