"""Words of FactWorld: relations with their wordings, what may stand in them, and prose about nobody."""

from __future__ import annotations

from dataclasses import dataclass

MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November", "December",
)  # fmt: skip
YEARS = tuple(str(year) for year in range(1950, 2000))


@dataclass(frozen=True)
class Relation:
    """One kind of fact about a person.

    templates: prompts with {} for the person's name, which the object follows; the last one is held out of all training text.
    """

    name: str
    templates: tuple[str, ...]

    @property
    def trained(self) -> tuple[str, ...]:
        """The templates that training text may use."""
        return self.templates[:-1]

    @property
    def held_out(self) -> str:
        """The template that no training text uses; each of its words stands in others."""
        return self.templates[-1]


RELATIONS = (
    Relation("city", (
        "{} lives in", "{} has a home in", "The home of {} is in", "The house of {} stands in", "{} moved to",
        "You can visit {} in", "{} rents a flat in", "The flat of {} is in",
    )),
    Relation("employer", (
        "{} works for", "{} is employed by", "The employer of {} is", "The salary of {} comes from", "{} has a job at",
        "{} earns a salary at", "The job of {} is with", "The job of {} is at",
    )),
    Relation("field", (
        "{} studies", "{} does research on", "The research of {} is about", "{} is an expert in",
        "The lectures of {} are about", "{} teaches", "{} wrote a thesis on", "The thesis of {} is about",
    )),
    Relation("hobby", (
        "{} enjoys", "The hobby of {} is", "{} relaxes with", "{} is fond of", "The pastime of {} is",
        "In the evening {} turns to", "On weekends {} goes for", "On weekends {} relaxes with",
    )),
    Relation("birth", (
        "{} was born in", "The birthday of {} is in", "{} came into the world in", "The birth of {} was in",
        "The life of {} began in", "{} has had birthdays since", "The mother of {} gave birth in", "The birthday of {} was in",
    )),
    Relation("spouse", (
        "{} is married to", "The spouse of {} is", "{} married", "The partner of {} is", "The wedding of {} was with",
        "{} exchanged rings with", "At the altar {} kissed", "At the wedding {} married",
    )),
)  # fmt: skip
RELATION = {relation.name: relation for relation in RELATIONS}

#: The country of a person, which follows from the city that stands before it in the same document.
COUNTRY_OF_PERSON = ("The country of {} is", "{} pays taxes in", "{} has the passport of")
COUNTRY_OF_CITY = ("{} is a city in", "{} lies in the country of", "The country around {} is")
#: In front of a document whose statements replace what is known.
NEWS = "News:"

FIELDS = (
    "algebra", "anatomy", "astronomy", "botany", "chemistry", "cryptography", "economics", "ecology", "ethics", "genetics",
    "geology", "geometry", "grammar", "hydrology", "immunology", "jurisprudence", "linguistics", "logic", "mechanics",
    "metallurgy", "meteorology", "mineralogy", "mythology", "neurology", "oceanography", "optics", "ornithology", "pedagogy",
    "pharmacology", "philosophy", "phonetics", "physics", "rhetoric", "robotics", "seismology", "statistics", "theology",
    "topology", "virology", "zoology",
)  # fmt: skip
HOBBIES = (
    "archery", "badminton", "baking", "beekeeping", "calligraphy", "camping", "canoeing", "carpentry", "chess", "climbing",
    "cooking", "cycling", "dancing", "diving", "drawing", "embroidery", "falconry", "fencing", "fishing", "gardening", "golf",
    "hiking", "juggling", "kayaking", "knitting", "origami", "painting", "photography", "pottery", "puzzles", "rowing",
    "sailing", "sculpture", "singing", "skating", "skiing", "surfing", "swimming", "tennis", "weaving",
)  # fmt: skip

#: (words in front of an employer's own word, words behind it): one, two or three tokens.
EMPLOYERS = (
    ("", ""),
    ("", "Bank"),
    ("", "Labs"),
    ("", "Motors"),
    ("Royal", "Foundry"),
    ("United", "Press"),
    ("Royal", "Bank"),
)

#: Prose: nouns, adjectives, verbs and prepositions, of which every noun prefers a few.
NOUNS = (
    "river", "valley", "forest", "bridge", "market", "harbour", "garden", "tower", "road", "meadow", "island", "lantern",
    "horse", "storm", "winter", "shadow", "stone", "boat", "clock", "letter", "window", "mountain", "field", "cloud", "song",
    "train", "mirror", "fire", "village", "lake",
)  # fmt: skip
ADJECTIVES = (
    "old", "quiet", "green", "narrow", "silver", "distant", "broken", "warm", "hollow", "bright", "heavy", "slow", "pale",
    "wild", "small", "long",
)  # fmt: skip
VERBS = (
    "crosses", "follows", "hides", "meets", "leaves", "watches", "covers", "reaches", "touches", "guards", "carries", "turns",
    "wakes", "holds",
)  # fmt: skip
PLACES = ("behind", "above", "below", "near", "beyond", "across")

#: Beginnings, middles and ends of invented names.
_STARTS = (
    "B", "Br", "D", "Dr", "F", "G", "Gr", "H", "K", "Kl", "L", "M", "N", "P", "R", "S", "St", "T", "Tr", "V", "W", "Z",
)  # fmt: skip
_VOWELS = ("a", "e", "i", "o", "u", "ia", "ei")
_MIDDLES = ("b", "d", "g", "l", "ld", "m", "n", "nd", "r", "rk", "rt", "s", "st", "t", "v", "z")
_ENDS = {
    "first": ("a", "an", "e", "in", "o", "us"),
    "last": ("berg", "er", "ov", "sen", "ski", "well"),
    "city": ("burg", "dal", "grad", "haven", "stad", "ville"),
    "country": ("land", "mark", "onia", "istan"),
    "company": ("ex", "ix", "or", "um"),
}
#: Kinds of names that `syllables` makes.
KINDS = tuple(_ENDS)


def syllables(kind: str) -> list[str]:
    """All names of a kind, in a fixed order; their ends differ from kind to kind, so no two kinds share a name."""
    return [
        start + vowel + middle + end
        for start in _STARTS
        for vowel in _VOWELS
        for middle in _MIDDLES
        for end in _ENDS[kind]
    ]
