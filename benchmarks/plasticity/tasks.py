"""Tasks as seeded generators of examples. Training, development and test examples have no prompt in common."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass

PARTS = ("train", "development", "test")
#: Of 8 prompts so many are for the test, and as many for development.
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
_PLACES = {
    "Paris": "France", "Rome": "Italy", "Madrid": "Spain", "Berlin": "Germany", "Oslo": "Norway", "Cairo": "Egypt",
    "Lima": "Peru", "Delhi": "India", "Tokyo": "Japan", "Athens": "Greece",
}  # fmt: skip
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
    """A prompt and its answer; of an answer with steps, the last word is what counts."""

    prompt: str
    answer: str


def part_of(prompt: str) -> str:
    """The part that a prompt belongs to, by its own letters: whatever the seed, no two parts share one."""
    number = hashlib.sha256(prompt.encode()).digest()[0] % 8
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
        if part_of(one.prompt) == part:
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
    return Example(f"{cue}: {_joined(numbers)}", _joined(_RULES[cue](numbers)))


def recall(chance: random.Random) -> Example:
    """One of 4 to 64 pairs is asked for."""
    count = chance.choice((4, 8, 16, 32, 64))
    pairs = {key: chance.randrange(10) for key in _distinct(chance, count)}
    asked = chance.choice(list(pairs))
    return Example(f"{' '.join(f'{key}={value}' for key, value in pairs.items())} {asked}=?", str(pairs[asked]))


def regression(chance: random.Random) -> Example:
    """y = a x + b of small numbers, from three points."""
    a, b, (*known, x) = chance.randint(1, 5), chance.randint(0, 9), chance.sample(range(10), 4)
    points = " ".join(f"{value}:{a * value + b}" for value in known)
    return Example(f"{points} {x}:?", str(a * x + b))


def two_hop(chance: random.Random) -> Example:
    """People live in cities, cities lie in countries: in which country does one live?"""
    people, cities = chance.sample(_NAMES, 4), chance.sample(list(_PLACES), 4)
    said = [f"{person} lives in {city}." for person, city in zip(people, cities, strict=True)]
    said += [f"{city} is in {_PLACES[city]}." for city in cities]
    chance.shuffle(said)
    who = chance.randrange(4)
    return Example(f"{' '.join(said)} In which country does {people[who]} live?", _PLACES[cities[who]])


def chains(chance: random.Random) -> Example:
    """A sum of four numbers, with every step written."""
    numbers = [chance.randint(1, 9) for _ in range(4)]
    steps, total = [], numbers[0]
    for number in numbers[1:]:
        steps.append(f"{total}+{number}={total + number}")
        total += number
    return Example(f"{'+'.join(map(str, numbers))}=?", f"{' '.join(steps)} so {total}")


def domain(chance: random.Random) -> Example:
    """Words of an invented language, whose ending is that of the sentence's first syllable."""
    opening, stems = chance.choice(list(_ENDINGS)), chance.sample(_STEMS, 4)
    return Example(f"{opening} {' '.join(stems)}", " ".join(f"{stem}{_ENDINGS[opening]}" for stem in stems))


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
