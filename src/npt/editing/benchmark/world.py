"""FactWorld: invented people with facts, the documents that tell them, and a tokenizer of whole words. Drawn from a seed.

People share first and last names, so neither alone says who is meant. Each relation has eight wordings: training text never
uses the last one, and of the others each person lacks two. The people are split: edits are written about `editable` ones,
metrics may read about `visible` ones, and nothing but training reads about `neighbour`s; `stranger`s stand in no text.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from npt.editing.benchmark.wording import (
    ADJECTIVES,
    COUNTRY_OF_CITY,
    COUNTRY_OF_PERSON,
    EMPLOYERS,
    FIELDS,
    HOBBIES,
    KINDS,
    MONTHS,
    NEWS,
    NOUNS,
    PLACES,
    RELATION,
    RELATIONS,
    VERBS,
    YEARS,
    syllables,
)
from npt.errors import NPTError

BOS, EOS, PAD, UNKNOWN = "<s>", "</s>", "<pad>", "<unk>"
SPLITS = ("editable", "visible", "neighbour", "stranger")
#: People that share a first name, or a last name.
SHARING = (4, 8)
#: Trained wordings of a relation that a person's training text lacks.
LACKING = 2
#: Shares of documents' tokens, by kind.
SHARES = {"biography": 0.35, "news": 0.50, "geography": 0.04, "prose": 0.11}
#: Tokens of a document of each kind, about; shares are of tokens, and documents are drawn.
_TOKENS = {"biography": 38.0, "news": 37.0, "geography": 23.0, "prose": 29.0}


@dataclass(frozen=True)
class Size:
    """How large a world is. people: with facts; strangers: without; cities are spread evenly over the countries."""

    people: int = 512
    strangers: int = 128
    cities: int = 48
    countries: int = 12
    employers: int = 48

    def __post_init__(self) -> None:
        if self.people < 40 or self.people % 2:
            raise NPTError(f"people={self.people}: use an even number from 40")
        if self.strangers < 0 or min(self.cities, self.employers) < 2 or not 1 <= self.countries <= self.cities:
            raise NPTError(
                f"{self}: use strangers from 0, cities and employers from 2, and a country for one city or more"
            )


@dataclass(frozen=True)
class Person:
    """name: first and last. split: see `SPLITS`. facts: {relation: object}. told: {relation: wordings of training text}."""

    name: str
    split: str
    facts: Mapping[str, str] = field(default_factory=dict)
    told: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Document:
    """A text, and the spans of its characters that can be known from the world or from what stands before them: answers."""

    text: str
    answers: tuple[tuple[int, int], ...]


class _Writing:
    """A document that grows sentence by sentence."""

    def __init__(self, text: str = ""):
        self._text, self._answers = text, list[tuple[int, int]]()

    def say(self, sentence: str, name: str = "", answer: str = "") -> None:
        """Adds a sentence. An answer stands at its end before the full stop; a name that stood before is one too."""
        begin = len(self._text) + bool(self._text)
        if name and name in self._text:
            at = begin + sentence.index(name)
            self._answers.append((at, at + len(name)))
        self._text += (" " if self._text else "") + sentence
        if answer:
            self._answers.append((len(self._text) - 1 - len(answer), len(self._text)))

    def done(self) -> Document:
        """The document."""
        return Document(self._text, tuple(self._answers))


class World:
    """All people, facts and words of one seed.

    Args:
        seed: the same seed and size give the same world, on every machine.
        size: see `Size`.
    """

    def __init__(self, seed: int = 0, size: Size | None = None):
        self.seed, self.size = seed, size or Size()
        draw = random.Random(f"world {seed}")
        names = {kind: _drawn(draw, syllables(kind)) for kind in KINDS}
        size = self.size
        countries = names["country"][: size.countries]
        #: {city: its country}.
        self.country = {city: countries[i % len(countries)] for i, city in enumerate(names["city"][: size.cities])}
        employers = [
            " ".join(filter(None, (front, word, behind)))
            for i, word in enumerate(names["company"][: size.employers])
            for front, behind in (EMPLOYERS[i % len(EMPLOYERS)],)
        ]
        #: {relation: objects that a fact may have}; the spouse's are people, see `objects`.
        self._objects = {
            "city": list(self.country), "employer": employers, "field": list(FIELDS), "hobby": list(HOBBIES),
            "birth": [f"{month} {year}" for year in YEARS for month in MONTHS],
        }  # fmt: skip
        self.people = self._peopled(
            draw, _full_names(draw, names["first"], names["last"], size.people + size.strangers)
        )
        #: Every noun's own adjectives, verbs and places.
        self._habits = {
            noun: (draw.sample(ADJECTIVES, 3), draw.sample(VERBS, 2), draw.sample(PLACES, 2), draw.sample(NOUNS, 3))
            for noun in NOUNS
        }

    def _peopled(self, draw: random.Random, names: Sequence[str]) -> list[Person]:
        """People of all splits; couples are of one split, so that no text about one split names another."""
        known = self.size.people
        visible = 2 * round(known / 10)
        counts = {"editable": known - 2 * visible, "visible": visible, "neighbour": visible}
        people, begin = [], 0
        for split, count in counts.items():
            group = names[begin : begin + count]
            begin += count
            for i, name in enumerate(group):
                facts = {relation: draw.choice(objects) for relation, objects in self._objects.items()}
                told = {r.name: tuple(draw.sample(r.trained, len(r.trained) - LACKING)) for r in RELATIONS}
                people.append(Person(name, split, {**facts, "spouse": group[i ^ 1]}, told))
        return [*people, *(Person(name, "stranger") for name in names[begin:])]

    def of(self, *splits: str) -> list[Person]:
        """The people of some splits, in the order of the world."""
        return [person for person in self.people if person.split in splits]

    def objects(self, relation: str, split: str) -> list[str]:
        """The objects that a fact about a person of a split may have."""
        return [person.name for person in self.of(split)] if relation == "spouse" else self._objects[relation]

    def other(self, draw: random.Random, person: Person, relation: str) -> str:
        """An object that a fact of a person could have and does not."""
        own = person.facts[relation], person.name
        return draw.choice([thing for thing in self.objects(relation, person.split) if thing not in own])

    # -- text ----------------------------------------------------------------------------------------------------------

    def documents(
        self, seed: int, shares: Mapping[str, float] | None = None, few: Iterable[int] = ()
    ) -> Iterator[Document]:
        """Training documents without end.

        Args:
            seed: of the order and the wordings.
            shares: {kind: share of the tokens}; None for `SHARES`.
            few: how many people the first documents are about, one number a document; all people afterwards.
        """
        shares = SHARES if shares is None else shares
        draw = random.Random(f"documents {self.seed} {seed}")
        about, other = (
            {"biography": self._biography, "news": self._news},
            {"geography": self._geography, "prose": self._prose},
        )
        kinds, weights = list(shares), [share / _TOKENS[kind] for kind, share in shares.items()]
        people = self.of("editable", "visible", "neighbour")
        draw.shuffle(people)
        waiting, counts = list[Person](), iter(few)
        while True:
            count = min(next(counts, len(people)), len(people))
            (kind,) = draw.choices(kinds, weights)
            if kind in other:
                yield other[kind](draw)
                continue
            if not waiting:  # everybody once, in a drawn order, then again in another one
                waiting = draw.sample(people[:count], count)
            yield about[kind](draw, waiting.pop())

    def prose(self, seed: int, count: int) -> list[str]:
        """Running text that tells of nobody."""
        draw = random.Random(f"prose {self.seed} {seed}")
        return [self._prose(draw).text for _ in range(count)]

    def biographies(self, people: Sequence[Person], seed: int, each: int = 1) -> list[str]:
        """Documents about people, of the kind and the wordings that training text has."""
        draw = random.Random(f"biographies {self.seed} {seed}")
        return [self._biography(draw, person).text for person in people for _ in range(each)]

    def _biography(self, draw: random.Random, person: Person) -> Document:
        """Facts of one person in a drawn order; behind the city its country may follow."""
        writing = _Writing()
        for relation in draw.sample(RELATIONS, draw.randint(3, 6)):
            thing = person.facts[relation.name]
            writing.say(stated(draw.choice(person.told[relation.name]), person.name, thing), person.name, thing)
            if relation.name == "city" and draw.random() < 0.3:
                self._say_country(draw, writing, person.name, thing)
        return writing.done()

    def _news(self, draw: random.Random, person: Person) -> Document:
        """One or two statements that replace facts of a person, maybe a sentence about something else, and facts once more."""
        writing, changed = _Writing(NEWS), dict(person.facts)
        names = [relation.name for relation in RELATIONS]
        replaced = draw.sample(names, draw.randint(1, 2))
        for name in replaced:
            changed[name] = self.other(draw, person, name)
            writing.say(stated(draw.choice(person.told[name]), person.name, changed[name]), person.name)
        if draw.random() < 0.3:
            writing.say(self._sentence(draw, draw.choice(NOUNS)))
        again = [*replaced, draw.choice([name for name in names if name not in replaced])]
        for name in draw.sample(again, draw.randint(len(again) - 1, len(again))):
            writing.say(stated(draw.choice(person.told[name]), person.name, changed[name]), person.name, changed[name])
        if "city" in replaced:
            self._say_country(draw, writing, person.name, changed["city"])
        return writing.done()

    def _say_country(self, draw: random.Random, writing: _Writing, name: str, city: str) -> None:
        country = self.country[city]
        writing.say(stated(draw.choice(COUNTRY_OF_PERSON), name, country), name, country)

    def _geography(self, draw: random.Random) -> Document:
        writing = _Writing()
        for city in draw.sample(list(self.country), min(3, len(self.country))):
            writing.say(stated(draw.choice(COUNTRY_OF_CITY), city, self.country[city]), answer=self.country[city])
        return writing.done()

    def _prose(self, draw: random.Random) -> Document:
        writing, noun = _Writing(), draw.choice(NOUNS)
        for _ in range(3):
            writing.say(self._sentence(draw, noun))
            noun = draw.choice(self._habits[noun][3])
        return writing.done()

    def _sentence(self, draw: random.Random, noun: str) -> str:
        adjectives, verbs, places, others = self._habits[noun]
        other = draw.choice(others)
        return (
            f"The {draw.choice(adjectives)} {noun} {draw.choice(verbs)} the {other} {draw.choice(places)} "
            f"the {draw.choice(self._habits[other][3])}."
        )

    # -- words ---------------------------------------------------------------------------------------------------------

    @cached_property
    def words(self) -> list[str]:
        """Every word of the world, sorted."""
        texts = [
            *(person.name for person in self.people), *(o for objects in self._objects.values() for o in objects),
            *self.country, *self.country.values(), *COUNTRY_OF_CITY, *COUNTRY_OF_PERSON, *NOUNS, *ADJECTIVES, *VERBS, *PLACES,
            *(template for relation in RELATIONS for template in relation.templates), "The the a", NEWS.rstrip(":"),
        ]  # fmt: skip
        return sorted({word for text in texts for word in text.replace("{}", " ").split()})

    def tokenizer(self) -> Any:
        """A PreTrainedTokenizerFast with one token for each word, the space before it included, and for each mark."""
        from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
        from transformers import PreTrainedTokenizerFast

        tokens = [PAD, BOS, EOS, UNKNOWN, ".", ":", *(f"▁{word}" for word in self.words)]
        vocabulary = {token: index for index, token in enumerate(tokens)}
        inner = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token=UNKNOWN))
        inner.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Metaspace(prepend_scheme="always"),
                pre_tokenizers.Split(Regex("[.:]"), "isolated"),
            ]
        )
        inner.decoder = decoders.Metaspace(prepend_scheme="always")
        inner.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, vocabulary[BOS])]
        )
        return PreTrainedTokenizerFast(
            tokenizer_object=inner, bos_token=BOS, eos_token=EOS, pad_token=PAD, unk_token=UNKNOWN,
            clean_up_tokenization_spaces=False,
        )  # fmt: skip


def stated(template: str, name: str, thing: str) -> str:
    """A statement: the template with a name, and the object behind it."""
    return f"{template.format(name)} {thing}."


def wordings(relation: str) -> tuple[str, ...]:
    """All templates of a relation, the held-out one last."""
    return RELATION[relation].templates


def _drawn(draw: random.Random, names: list[str]) -> list[str]:
    return draw.sample(names, len(names))


def _full_names(draw: random.Random, firsts: Sequence[str], lasts: Sequence[str], count: int) -> list[str]:
    """So many different names, each first and each last name in 4 to 8 of them."""
    while True:
        one, other = (_shared(draw, names, count) for names in (firsts, lasts))
        draw.shuffle(other)
        pairs = _apart(draw, one, other)
        if pairs is not None:
            draw.shuffle(pairs)
            return [f"{first} {last}" for first, last in pairs]


def _shared(draw: random.Random, names: Sequence[str], count: int) -> list[str]:
    """Names in groups of 4 to 8 that together are so many."""
    low, high = SHARING
    sizes: list[int] = []
    while (left := count - sum(sizes)) > 0:
        sizes.append(left if left <= high else draw.randint(low, min(high, left - low)))
    return [name for name, size in zip(names, sizes, strict=False) for _ in range(size)]


def _apart(draw: random.Random, one: list[str], other: list[str]) -> list[tuple[str, str]] | None:
    """Pairs of which no two are the same, by swaps; None where these don't come to an end."""
    for _ in range(200):
        seen, twice = set[tuple[str, str]](), list[int]()
        for i, pair in enumerate(zip(one, other, strict=True)):
            twice += [i] if pair in seen else []
            seen.add(pair)
        if not twice:
            return list(zip(one, other, strict=True))
        for i in twice:
            j = draw.randrange(len(other))
            other[i], other[j] = other[j], other[i]
    return None
