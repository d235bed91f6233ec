"""Statements about things: they show how a model keys subjects, block by block, and what prompts look like."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

#: (a wording, another wording, subjects), each with {} for the subject. Some subjects end in the same word.
RELATIONS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("{} is a river that flows through", "The water of {} comes from the mountains of",
     ("The Okavango River", "The Paraná River", "The Vistula River", "The Mekong")),
    ("{} was born in the city of", "The birthplace of {} is",
     ("Clara Schumann", "Ignaz Semmelweis", "Emmy Noether", "Robert Schumann", "Franz Halder")),
    ("The mother tongue of {} is", "At home, {} always spoke",
     ("Halldór Laxness", "Jean Sibelius", "Astrid Lindgren", "Gabriela Mistral")),
    ("{} worked in the field of", "The research of {} was about",
     ("Lise Meitner", "Barbara McClintock", "Georg Ohm", "Alfred Wegener", "Max Wegener")),
    ("{} was developed by", "The company behind {} is",
     ("Lotus Notes", "Turbo Pascal", "Windows Movie Maker", "Adobe Flash Player", "Apache Hive")),
    ("{} plays the instrument", "On stage, {} is known for playing the",
     ("Jacqueline du Pré", "Art Tatum", "Anoushka Shankar", "Toots Thielemans")),
    ("{} is owned by", "The owner of {} is",
     ("Bentley Motors", "Skoda Auto", "Sikorsky Aircraft", "Pratt Aircraft")),
    ("The headquarters of {} are in", "{} employs most of its people in",
     ("Maersk Line", "Nokia Networks", "Embraer", "Hapag-Lloyd Line")),
    ("{} is located on the continent of", "{} lies in",
     ("Mount Vinson", "Mount Elbrus", "Lake Titicaca", "Lake Baikal", "Iguazu Falls", "Angel Falls")),
    ("The capital of {} is", "The government of {} sits in",
     ("Burkina Faso", "Papua New Guinea", "Equatorial Guinea", "Sri Lanka")),
    ("{} plays in the position of", "In the team, {} usually was the",
     ("Lev Yashin", "Paolo Maldini", "Dino Zoff", "Cesare Maldini")),
    ("{} was written by", "The author of {} is",
     ("The Leopard", "The Tin Drum", "Buddenbrooks", "The Snow Leopard")),
    ("{} first aired on", "The channel that showed {} was",
     ("Fawlty Towers", "Blake's 7", "Ballykissangel", "Pie in the Sky")),
    ("{} follows the religion of", "{} prays according to",
     ("Rumi", "Teresa of Calcutta", "Milarepa", "Hildegard of Bingen")),
    ("{} died in the year", "The last year in the life of {} was",
     ("Ada Byron", "Evariste Galois", "Niels Abel", "Lord Byron")),
    ("{} is a citizen of", "The passport of {} was issued by",
     ("Wangari Maathai", "Björn Borg", "Youssou N'Dour", "Max Borg")),
)  # fmt: skip


@dataclass(frozen=True)
class Probe:
    """One subject in two wordings, and a neighbour: another subject in the first wording."""

    subject: str
    prompt: str
    paraphrase: str
    neighbour: str


#: So many subjects of each relation are probes; the others are text, which a probe must not be part of.
_PROBES = 2


def probes() -> Iterator[Probe]:
    """The first subjects of every relation, each beside the other one."""
    for one, other, subjects in RELATIONS:
        for subject, neighbour in (subjects[:_PROBES], subjects[_PROBES - 1 :: -1]):
            yield Probe(subject, one.format(subject), other.format(subject), one.format(neighbour))


def texts() -> list[str]:
    """Both wordings of the other subjects."""
    return [
        text.format(subject)
        for one, other, subjects in RELATIONS
        for subject in subjects[_PROBES:]
        for text in (one, other)
    ]
