"""Absorbing a context as the command does it: from files into a store's folder, with a page about what came out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from npt.common.display import one_line
from npt.editing.absorbing.absorbed import Absorbed
from npt.editing.absorbing.dialogue import Context
from npt.editing.absorbing.reading import read_context, read_questions
from npt.editing.absorbing.settings import options_of
from npt.editing.folder import check_target
from npt.editing.record import read_record
from npt.errors import NPTError
from npt.report.absorbed import write_absorbed_page
from npt.report.run_files import PAGE
from npt.runs.edits import Options, base_in, config_for, only_process, opened


@dataclass(frozen=True)
class Asked:
    """A person's words about a context: what is absorbed, where, and options of `npt.editing.absorbing.settings`."""

    context: Context
    questions: list[str] | None = None
    answers: list[str] | None = None
    blocks: str | list[int] = "auto"
    options: Mapping[str, Any] = field(default_factory=dict)


def asked_for(context: Path, questions: Path | None, blocks: str | None, options: Mapping[str, Any]) -> Asked:
    """Reads what is asked for, and checks it as far as it can be without a model.

    Args:
        context: a file of text, or of messages.
        questions: a file of questions; None has the model write them.
        blocks: "auto" or None, or indices with commas between.
        options: those that were given.

    Raises:
        DataError, NPTError: a file or an option is wrong.
    """
    found = None, None
    if questions is not None:
        found = read_questions(questions)  # type: ignore[assignment]
    given = {name: value for name, value in options.items() if value is not None}
    options_of(given)
    return Asked(read_context(context), *found, blocks=_blocks(blocks), options=given)


def _blocks(value: str | None) -> str | list[int]:
    if value is None or value == "auto":
        return "auto"
    try:
        return [int(part) for part in value.split(",")]
    except ValueError as error:
        raise NPTError(f"--blocks {one_line(value, 40)}: use 'auto', or indices such as 15,17,19") from error


def absorb(folder: Path, asked: Asked, options: Options) -> tuple[Absorbed, Path]:
    """Absorbs a context into a store's folder; returns what came out and the page about it.

    Args:
        folder: of the store; a new one is made.
        asked: the context.
        options: of the store and its base.

    Raises:
        NPTError: see `EditStore.absorb`; the folder is as it was.
    """
    check_target(folder)
    options.store()
    config_for(options, base_in(folder))
    with only_process(folder):
        store = opened(folder, options)
        found = store.absorb(asked.context, asked.questions, asked.answers, asked.blocks, **asked.options)
        store.save(folder)
        page = write_page(folder)
    assert isinstance(found, Absorbed)
    return found, page


def write_page(folder: Path) -> Path:
    """Writes the page about the absorbed contexts of a store's folder; loads no model.

    Args:
        folder: of the store.

    Raises:
        CheckpointError: missing or damaged. RunError: the disk is full or gone.
    """
    record = read_record(folder)
    return write_absorbed_page(folder / PAGE, record.get("contexts", []), record["base"])
