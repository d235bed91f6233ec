"""Held-out questions about a context: how far what is at work on a model is from the model with the context."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from benchmarks.absorbing.cases import Case, contains
from npt import EditStore
from npt.editing.absorbing.lesson import Lesson
from npt.editing.absorbing.questions import Asked
from npt.editing.absorbing.settings import Options
from npt.editing.absorbing.teaching import Teacher
from npt.errors import DataError


@dataclass(frozen=True)
class Mark:
    """The figures of one arm.

    kl: mean KL from the model with the context, over the tokens of its answers, in nats. text_kl: from the base on text that
    the base writes, in nats a token. texts: written to the questions.
    """

    kl: float
    text_kl: float
    texts: tuple[str, ...]

    def kept(self) -> dict[str, Any]:
        """The figures as a record holds them."""
        return {"kl": self.kl, "text_kl": self.text_kl, "texts": list(self.texts)}


class Exam:
    """The held-out questions of a context with the answers of the model that has it in front.

    Args:
        store: a store with nothing in it.
        case: the context.
        options: how questions are put, and the longest answer.

    Raises:
        DataError: the model with the context answers none of the questions.
    """

    def __init__(self, store: EditStore, case: Case, options: Options):
        self.contexts, self.case, self.options = store.contexts, case, options
        teacher = Teacher(self.contexts.blocks, self.contexts.dialogue(options.style), options, False)
        teacher.check(case.questions)
        asked = [Asked(question, i) for i, question in enumerate(case.questions)]
        found, self.left_out = teacher.answered(teacher.chunks(case.text), asked, {})
        if not found:
            raise DataError(f"{case.name}: the model with the context answers none of its questions; write others")
        self.questions = [question.text for question, _ in found]
        self.conversations = [conversation for _, conversation in found]
        self.answers = None if case.answers is None else [case.answers[question.source] for question, _ in found]
        self.style = teacher.dialogue.style
        self.lesson = Lesson(self.contexts.blocks, self.conversations)
        self.taught = tuple(conversation.reply for conversation in self.conversations)

    def mark(self) -> Mark:
        """The figures of what is at work on the model now."""
        kl = float(self.lesson.kl().sum() / self.lesson.tokens.sum())
        texts = self.contexts.said(self.conversations, self.style, self.options.new_tokens)
        return Mark(kl, self.contexts.text_kl(), tuple(texts))


def right(texts: tuple[str, ...] | list[str], answers: list[str]) -> list[bool]:
    """True for each text that contains its answer."""
    return [contains(text, answer) for text, answer in zip(texts, answers, strict=True)]
