"""Files of a context and of questions about it."""

from __future__ import annotations

import json
from pathlib import Path

from npt.common.display import one_line
from npt.editing.absorbing.dialogue import Context, checked, context_from
from npt.editing.requests import file_text, json_lines
from npt.errors import DataError

#: The names of a line of questions.
_NAMES = ("question", "answer")


def read_context(path: Path) -> Context:
    """The context in a file: the messages of a chat in one that ends in .json, else its text.

    Args:
        path: the file.

    Raises:
        DataError: missing, unreadable, blank, or no list of messages.
    """
    text = file_text(path, "a file of text, or of messages as .json")
    if path.suffix.lower() != ".json":
        return context_from(text, str(path))
    try:
        return context_from(json.loads(text), str(path))
    except (ValueError, RecursionError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: not JSON ({one_line(error, 80)}); write a list of messages") from error


def read_questions(path: Path) -> tuple[list[str], list[str] | None]:
    """(questions, their answers or None) of a file: one question a line, or JSON lines in one that ends in .jsonl.

    Args:
        path: the file.

    Raises:
        DataError: missing or unreadable, no question in it, an unknown name, or answers to some questions only.
    """
    text = file_text(path, "a file with one question a line, or of JSON lines as .jsonl")
    if path.suffix.lower() != ".jsonl":
        questions = [checked(line.strip(), str(path)) for line in text.split("\n") if line.strip()]
        if not questions:
            raise DataError(f"{path}: holds no question; write one a line")
        return questions, None
    rows = list(json_lines(path, text))
    if not rows:
        raise DataError(f'{path}: holds no question; write lines such as {{"question": "...", "answer": "..."}}')
    for where, row in rows:
        unknown = sorted(set(row) - set(_NAMES))
        if unknown:
            raise DataError(f"{where}: unknown name {one_line(repr(unknown[0]), 40)}; use {' and '.join(_NAMES)}")
        if "question" not in row:
            raise DataError(f"{where}: question is missing; each line has one, and an answer if you give answers")
        if ("answer" in row) != ("answer" in rows[0][1]):
            raise DataError(f"{where}: answers are given to some questions only; give one to each, or none")
    questions = [checked(row["question"], f"{where}, question") for where, row in rows]
    if "answer" not in rows[0][1]:
        return questions, None
    return questions, [checked(row["answer"], f"{where}, answer") for where, row in rows]
