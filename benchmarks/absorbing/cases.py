"""The contexts: documents with invented facts, system prompts, and held-out questions about each."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.kept import PARTS
from npt.common.display import one_line
from npt.editing.absorbing.dialogue import checked
from npt.editing.requests import file_text, json_lines
from npt.errors import DataError

FOLDER = Path(__file__).resolve().parent
#: {kind: its file}.
FILES = {"document": FOLDER / "documents.jsonl", "prompt": FOLDER / "prompts.jsonl"}
NAMES = ("name", "part", "text", "questions")


@dataclass(frozen=True)
class Case:
    """A context. questions: held out. answers: a text that a right answer to each contains; None for a system prompt."""

    name: str
    kind: str
    part: str
    text: str
    questions: tuple[str, ...]
    answers: tuple[str, ...] | None


def contains(text: str, answer: str) -> bool:
    """True where an answer stands in a text as words of its own, in any case; it may be a plural ("foxes" gives "fox").

    Args:
        text: what a model wrote.
        answer: what a right one contains.
    """
    return re.search(rf"(?<!\w){re.escape(answer.casefold())}(?:e?s)?(?!\w)", text.casefold()) is not None


def read_cases(files: Mapping[str, Path] = FILES) -> list[Case]:
    """All contexts, in the order of the files.

    Args:
        files: {kind: its file}, "document" with answers and "prompt" without.

    Raises:
        DataError: a file that can't be read, a name that is unknown, missing or there twice, a blank text, an answer that is
            in its question or not in the document, or a question that is asked twice.
    """
    found: list[Case] = []
    for kind, path in files.items():
        for where, row in json_lines(path, file_text(path, "a file of JSON lines")):
            found.append(_case(kind, row, where, found))
    return found


def _case(kind: str, row: Mapping[str, Any], where: str, before: Sequence[Case]) -> Case:
    if set(row) != set(NAMES):
        raise DataError(f"{where}: has {', '.join(sorted(row))}; use {', '.join(NAMES)}")
    name, text = (checked(row[key], f"{where}, {key}") for key in ("name", "text"))
    if row["part"] not in PARTS:
        raise DataError(f"{where}: part {one_line(repr(row['part']), 40)} is unknown; use {' or '.join(PARTS)}")
    if name in {case.name for case in before}:
        raise DataError(f"{where}: {name!r} is a context before; use another name")
    if not isinstance(row["questions"], list) or not row["questions"]:
        raise DataError(f"{where}: questions is no list of questions; write some")
    pairs = [_question(kind, one, f"{where}, question {i}") for i, one in enumerate(row["questions"], 1)]
    questions = tuple(question for question, _ in pairs)
    asked = [question for case in before for question in case.questions if case.kind == kind]
    for i, (question, answer) in enumerate(pairs):
        if question in (*questions[:i], *asked):
            raise DataError(f"{where}, question {i + 1}: is asked before; ask another one")
        if answer and (contains(question, answer) or not contains(text, answer)):
            fault = "is in its question" if contains(question, answer) else "is not in the text"
            raise DataError(f"{where}, question {i + 1}: the answer {answer!r} {fault}; write another one")
    answers = tuple(answer for _, answer in pairs) if kind == "document" else None
    return Case(name, kind, row["part"], text, questions, answers)


def _question(kind: str, value: Any, where: str) -> tuple[str, str]:
    """(question, the answer, "" in a system prompt)."""
    if kind == "prompt":
        return checked(value, where), ""
    if not isinstance(value, dict) or set(value) != {"question", "answer"}:
        raise DataError(f'{where}: use {{"question": "...", "answer": "..."}}')
    return checked(value["question"], where), checked(value["answer"], where)
