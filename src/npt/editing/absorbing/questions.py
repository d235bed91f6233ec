"""Questions that a model writes itself: about a context, in several wordings, and about anything."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from npt.editing.absorbing.dialogue import Context, Dialogue
from npt.editing.absorbing.settings import Options
from npt.editing.answers import continued

#: Beginnings that make questions differ, those of other wordings, and those of text that is to be continued.
OPENINGS = ("What", "Who", "Where", "When", "How many", "Which", "Tell me about", "What is the name of", "How", "Why")
AGAIN = ("Do you know", "Can you tell me", "What", "I would like to know", "Please tell me", "Which", "Could you say")
TEXT = ("The", "It", "There", "In", "They", "He", "She", "One day", "This", "When")
#: Examples of (a statement, a question that it answers), and of (a question, another wording).
ASKING = (
    ("The bakery in Tarn opens at five in the morning.", "When does the bakery in Tarn open?"),
    ("Anna Berg, who studied law, paints boats.", "What does Anna Berg paint?"),
    ("The tower was built from red stone by monks.", "Who built the tower?"),
)
REWORDING = (
    ("When does the bakery in Tarn open?", "At what time of day does Tarn's bakery open?"),
    ("What does Anna Berg paint?", "Which things are painted by Anna Berg?"),
    ("Who built the tower?", "Do you know who the builders of the tower were?"),
)
#: The temperatures of questions and of text, the most tokens of one, those of text, and the fewest words.
TEMPERATURE, FREE, TOKENS, BEGINNING, WORDS = 0.5, 0.8, 28, 8, 3
#: So many are written for each that is kept, since many are alike; and the share that is about anything.
SPARE, ANYTHING = 2, 3


@dataclass(frozen=True)
class Asked:
    """A question. source: those of one source are wordings of one question. context: the number of the context's chunk that it
    was written with; None for a question about anything, or one that was given.
    """

    text: str
    source: int
    context: int | None = None


class Questions:
    """Writes questions.

    Args:
        base: the causal LM, alone.
        dialogue: how it is asked.
        options: how many questions, and their seed.
        progress: show progress bars.
    """

    def __init__(self, base: Any, dialogue: Dialogue, options: Options, progress: bool):
        self.base, self.dialogue, self.options, self.progress = base, dialogue, options, progress
        self._seed = 7 * options.seed
        self._seen: set[str] = set()

    def about(self, chunks: Sequence[Context]) -> list[Asked]:
        """Writes questions: so many as the options say, a third of them about anything, wordings of one source side by side.

        Args:
            chunks: the context, or its parts.
        """
        number, found = self.options.number, list[Asked]()
        sources = max(1, (number - number // ANYTHING) // self.options.phrasings)
        for i, chunk in enumerate(chunks):
            count = (sources * (i + 1)) // len(chunks) - (sources * i) // len(chunks)
            found += self._of(chunk, i, count, len(found))
        found = self.worded(found)
        return found + self.anything(number - len(found))

    def worded(self, questions: Sequence[Asked]) -> list[Asked]:
        """The questions, each with other wordings behind it. Text that is to be continued has none.

        Args:
            questions: one of each source.
        """
        more: dict[int, list[Asked]] = {q.source: [q] for q in questions}
        self._seen |= {plain(q.text) for q in questions}
        wanted = self.options.phrasings - 1
        if not wanted or self.dialogue.style == "text":
            return list(questions)
        asked = [(q, AGAIN[(i + j) % len(AGAIN)]) for i, q in enumerate(questions) for j in range(SPARE * wanted)]
        prompts = [self._ids(f"{self.dialogue.after(REWORDING, q.text)}{opening}") for q, opening in asked]
        for (q, _), text in zip(asked, self._written(prompts, [opening for _, opening in asked]), strict=True):
            own = more[q.source]
            if len(own) <= wanted and (fresh := self._fresh([text])):
                own.append(Asked(fresh[0], q.source, q.context))
        return [question for own in more.values() for question in own]

    def anything(self, count: int) -> list[Asked]:
        """Questions about anything, each a source of its own.

        Args:
            count: how many.
        """
        before, _ = self.dialogue.around(None)
        return [Asked(text, -1 - i) for i, text in enumerate(self._behind(before, count))]

    def _of(self, chunk: Context, number: int, count: int, source: int) -> list[Asked]:
        """Questions about one chunk of a context, each a source of its own."""
        if self.dialogue.style == "text":
            texts = self._behind(self.dialogue.around(chunk)[0], count)
        else:
            statements = _sentences(
                chunk if isinstance(chunk, str) else "\n".join(str(m.get("content")) for m in chunk)
            )
            picked = [(statements[i % len(statements)], OPENINGS[(i + i // len(statements)) % len(OPENINGS)])
                      for i in range(SPARE * count)]  # fmt: skip
            bare, _ = self.dialogue.around(chunk)
            prompts = []
            for text, opening in picked:
                ids = self._ids(f"{self.dialogue.after(ASKING, text, chunk)}{opening}")
                # A small window may not hold the examples.
                prompts.append(ids if self.dialogue.room(len(ids), 1) else self._ids(f"{bare}{opening}"))
            texts = self._fresh(self._written(prompts, [opening for _, opening in picked]))[:count]
        return [Asked(text, source + i, number) for i, text in enumerate(texts)]

    def _behind(self, before: str, count: int) -> list[str]:
        """Questions, or beginnings of text, that the model writes behind a text by itself."""
        openings = TEXT if self.dialogue.style == "text" else OPENINGS
        picked = [openings[i % len(openings)] for i in range(SPARE * count)]
        most = BEGINNING if self.dialogue.style == "text" else TOKENS
        prompts = [self._ids(f"{before}{opening}") for opening in picked]
        return self._fresh(self._written(prompts, picked, FREE, most))[:count]

    def _ids(self, text: str) -> list[int]:
        return self.dialogue.ids(text, "the beginning of a question")

    def _written(
        self,
        prompts: Sequence[Sequence[int]],
        openings: Sequence[str],
        temperature: float = TEMPERATURE,
        most: int = TOKENS,
    ) -> list[str]:
        """The openings with what the model writes behind each prompt; nothing where the window ends before."""
        self._seed += 1
        room = [self.dialogue.room(len(prompt), most) for prompt in prompts]
        ids = continued(
            self.base, self.dialogue.tokenizer, prompts, room, self._over, seed=self._seed, temperature=temperature,
            label="Writing questions", progress=self.progress,
        )  # fmt: skip
        texts = [
            f"{opening}{self.dialogue.text(row)}" if row else "" for opening, row in zip(openings, ids, strict=True)
        ]
        return [" ".join(text.split()) for text in texts]

    def _over(self, ids: list[int]) -> bool:
        last = self.dialogue.text(ids[-1:])
        return "\n" in last or "?" in last

    def _fresh(self, texts: Sequence[str]) -> list[str]:
        """The texts that are questions, each once."""
        found = []
        for text in texts:
            text = text.strip(" \"'*-")
            if len(text.split()) >= WORDS and plain(text) not in self._seen:
                self._seen.add(plain(text))
                found.append(text)
        return found


def plain(text: str) -> str:
    """A text without what tells two writings of one question apart."""
    return " ".join(re.findall(r"\w+", text.lower()))


def _sentences(text: str) -> list[str]:
    """The sentences of a text, those of a few letters left out; all of it where none is longer."""
    found = [part.strip() for part in re.split(r"(?<=[.!?。])\s+|\n+", text)]
    return [part for part in found if len(part) > 12] or [text]
