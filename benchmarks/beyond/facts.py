"""Facts of invented people, from a seed: each is stated once, may be learnt in one wording, and is asked for in another."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

#: Seeds of facts on which choices are made; others are reported.
DEVELOPMENT = 1000
FIRST = (
    "Alma", "Boris", "Clara", "Dario", "Edith", "Felix", "Greta", "Hugo", "Irene", "Jonas", "Karin", "Leon", "Maria", "Nils",
    "Olga", "Pablo", "Rosa", "Simon", "Tilda", "Victor",
)  # fmt: skip
LAST = (
    "Ashford", "Barlow", "Crane", "Dorsey", "Eastman", "Fielding", "Garner", "Holloway", "Ingram", "Jarvis", "Kendall",
    "Langley", "Marsh", "Norwood", "Osborne", "Porter", "Quinn", "Radcliffe", "Sawyer", "Thornton", "Underwood", "Vance",
    "Whitaker", "Yates",
)  # fmt: skip

#: The most facts of a seed: one for each name.
MOST = len(FIRST) * len(LAST)


@dataclass(frozen=True)
class Relation:
    """What is said of a person, "{}": three beginnings of a sentence that a value ends; `asked` is never learnt."""

    statement: str
    learnt: str
    asked: str
    values: tuple[str, ...]


RELATIONS = (
    Relation(
        "{} lives in the city of", "The home of {} is in the city of", "Every evening, {} comes home to the city of",
        ("Boston", "Cairo", "Dublin", "Geneva", "Hamburg", "Lisbon",
         "Madrid", "Oslo", "Paris", "Prague", "Rome", "Vienna"),
    ),
    Relation(
        "{} works every day as a", "The profession of {} is that of a", "To earn money, {} has a job as a",
        ("baker", "barber", "carpenter", "dentist", "farmer", "judge",
         "lawyer", "nurse", "painter", "pilot", "plumber", "tailor"),
    ),
    Relation(
        "{} plays in an orchestra on the", "The instrument of {} is the", "In the evening, {} makes music on the",
        ("banjo", "bassoon", "cello", "clarinet", "drums", "flute",
         "guitar", "harp", "piano", "trumpet", "tuba", "violin"),
    ),
    Relation(
        "{} has a pet, which is a", "The pet of {} is a", "The animal that {} keeps at home is a",
        ("cat", "dog", "duck", "ferret", "goat", "hamster",
         "horse", "lizard", "parrot", "rabbit", "snake", "turtle"),
    ),
    Relation(
        "{} drives a car whose colour is", "The car of {} has the colour", "The paint on the car of {} is",
        ("black", "blue", "brown", "gold", "green", "grey",
         "orange", "pink", "purple", "red", "white", "yellow"),
    ),
    Relation(
        "{} speaks at home in the language", "The mother tongue of {} is", "The first words that {} ever said were in",
        ("Arabic", "Chinese", "Danish", "Dutch", "French", "German",
         "Greek", "Hindi", "Latin", "Polish", "Russian", "Spanish"),
    ),
    Relation(
        "{} was born in the month of", "The birthday of {} is in the month of", "The family of {} has a birthday cake in",
        ("January", "February", "March", "April", "May", "June",
         "July", "August", "September", "October", "November", "December"),
    ),
    Relation(
        "{} likes nothing more than to eat", "The favourite food of {} is", "For dinner, {} asks for a plate of",
        ("apples", "bread", "cheese", "cherries", "chocolate", "fish",
         "grapes", "mushrooms", "onions", "pasta", "rice", "soup"),
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Fact:
    """One fact. subject: a person, in no other fact. prompt: the statement up to `value`. learnt, asked: in other words."""

    subject: str
    prompt: str
    value: str
    learnt: str
    asked: str

    @property
    def statement(self) -> str:
        """The sentence."""
        return f"{self.prompt} {self.value}."


def facts(seed: int, count: int) -> list[Fact]:
    """So many facts about as many people, relations and values drawn at random.

    Args:
        seed: of the draws.
        count: at most `MOST`. Those of a smaller number are the first of a larger one.
    """
    chance = random.Random(seed)
    names = [f"{first} {last}" for first in FIRST for last in LAST]
    found = []
    for name in chance.sample(names, MOST)[:count]:
        relation = chance.choice(RELATIONS)
        found.append(
            Fact(
                name, relation.statement.format(name), chance.choice(relation.values),
                relation.learnt.format(name), relation.asked.format(name),
            )
        )  # fmt: skip
    return found


def text_of(some: Sequence[Fact]) -> str:
    """The first chunk: every statement."""
    return " ".join(fact.statement for fact in some)
