"""Requests for edits, checked before any work: from Python, or from a file of JSON lines."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any
from unicodedata import east_asian_width

from npt.common.display import one_line
from npt.errors import DataError

#: Bytes of a file of edits, and edits in it, that are read.
MOST_BYTES, MOST_EDITS = 64 * 2**20, 100_000


@dataclass(frozen=True)
class Request:
    """One fact to write.

    prompt: the text before the target. target: what shall follow. subject: the part of the prompt that the fact is about;
    None edits at the prompt's last token. paraphrases: other prompts for the same target. protect: prompts after which nothing
    shall change.
    """

    prompt: str
    target: str
    subject: str | None = None
    paraphrases: tuple[str, ...] = ()
    protect: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        """Eight hexadecimal digits that belong to these words."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode("utf-8", "replace")).hexdigest()[:8]

    @property
    def fact(self) -> tuple[str, str | None]:
        """The prompt and subject, which can have one target only."""
        return self.prompt.strip(), self.subject

    @property
    def prompts(self) -> tuple[str, ...]:
        """The prompt and its paraphrases."""
        return (self.prompt, *self.paraphrases)


def continued(prompt: str, target: str) -> str:
    """The prompt with a target behind it, a space between; none after a line break or a bracket, or before wide letters."""
    apart = prompt[-1:] not in ("\n", "\t", "(", "[", "{", '"', "") and east_asian_width(target[:1] or "a") not in "WF"
    return f"{prompt}{' ' if apart else ''}{target}"


NAMES = tuple(field.name for field in fields(Request))


def request_of(values: Mapping[str, Any], where: str) -> Request:
    """A request from the names of `Request`.

    Args:
        where: the place, for errors.

    Raises:
        DataError: an unknown, missing, blank or ill-typed value; a subject that does not stand in its prompt.
    """
    unknown = sorted(set(values) - set(NAMES))
    if unknown:
        raise DataError(f"{where}: unknown name {one_line(repr(unknown[0]), 40)}; use {', '.join(NAMES)}")
    for name in ("prompt", "target"):
        if name not in values:
            raise DataError(f"{where}: {name} is missing; each edit has a prompt and a target")
        _check_text(values[name], f"{where}, {name}")
    subject = values.get("subject")
    if subject is not None:
        _check_text(subject, f"{where}, subject")
        if subject not in values["prompt"]:
            raise DataError(
                f"{where}: the subject {one_line(repr(subject), 60)} does not stand in the prompt "
                f"{one_line(repr(values['prompt']), 80)}; write it as the prompt has it"
            )
    lists = {name: _texts(values.get(name), f"{where}, {name}") for name in ("paraphrases", "protect")}
    return Request(values["prompt"].rstrip(" "), values["target"].strip(), subject and subject.strip(), **lists)


def _texts(value: Any, where: str) -> tuple[str, ...]:
    if value is None:
        return ()
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise DataError(f"{where}={one_line(repr(value), 60)}: use a list of texts")
    for number, text in enumerate(value, 1):
        _check_text(text, f"{where}, text {number}")
    return tuple(text.rstrip(" ") for text in value)


def _check_text(value: Any, where: str) -> None:
    if not isinstance(value, str):
        raise DataError(f"{where}={one_line(repr(value), 60)}: use text")
    if not value.strip():
        raise DataError(f"{where}: is blank; write some text")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise DataError(f"{where}={one_line(repr(value), 60)}: is not Unicode text; write it in UTF-8")


def check_together(requests: Sequence[Request], where: Sequence[str], written: Sequence[Request] = ()) -> None:
    """Checks that requests do not contradict each other or what is written.

    Raises:
        DataError: one prompt and subject with two targets, or the same request twice.
    """
    known = {request.fact: (request, "an edit of the store") for request in written}
    for request, place in zip(requests, where, strict=True):
        if request.fact in known:
            other, holder = known[request.fact]
            shown = one_line(repr(request.prompt), 80)
            if other.target == request.target:
                raise DataError(f"{place}: {shown} has that target already, by {holder} (id {other.id}); leave it out")
            raise DataError(
                f"{place}: {shown} has the target {one_line(repr(other.target), 40)} already, by {holder} (id {other.id}); "
                "undo that one first, or leave one of the two out"
            )
        known[request.fact] = request, place


def file_text(path: Path, wanted: str) -> str:
    """The text of a file.

    Args:
        path: the file.
        wanted: the kind of file that is meant, for errors.

    Raises:
        DataError: missing, unreadable or too large.
    """
    try:
        size = path.stat().st_size
        if size > MOST_BYTES:
            raise DataError(f"{path}: has {size:,} bytes; split it into files of at most {MOST_BYTES:,}")
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"{path}: can't be read ({error.strerror or error}); name {wanted}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 (byte {error.start}); save it as UTF-8") from error


def json_lines(path: Path, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, object) of every line of JSON that is not blank.

    Args:
        path: the file, for errors.
        text: its text.

    Raises:
        DataError: a line that is no JSON object.
    """
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: not JSON ({one_line(error, 80)}); write one object a line") from error
        if not isinstance(values, dict):
            raise DataError(f"{where}: not a JSON object but {type(values).__name__}; write one object a line")
        yield where, values


def read_requests(path: Path) -> tuple[list[Request], list[str]]:
    """(requests, their places) of a file with one JSON object a line.

    Raises:
        DataError: missing, unreadable, too large or empty; a line that is no request.
    """
    requests, places = [], []
    for where, values in json_lines(path, file_text(path, "a file of JSON lines")):
        requests.append(request_of(values, where))
        places.append(where)
    if not requests:
        raise DataError(
            f'{path}: holds no edit; write lines such as {{"prompt": "...", "subject": "...", "target": "..."}}'
        )
    if len(requests) > MOST_EDITS:
        raise DataError(f"{path}: holds {len(requests):,} edits; write at most {MOST_EDITS:,} at once")
    return requests, places
