"""Values as people read them, and text of models, files and people made harmless to show."""

from __future__ import annotations

import logging
import re
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

#: Marks that change the direction of the text around them.
_BIDIRECTIONAL = set("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")

#: The folder of one revision of a model in the hub's cache.
_SNAPSHOT = re.compile(r"(?:^|/)models--([^/]+)/snapshots/[^/]+$")


def visible(text: object) -> str:
    """The text with control characters, escapes and direction marks as \\x1b or \\u202e; line breaks and tabs stay."""
    return "".join(_shown(character) for character in str(text))


def one_line(text: object, limit: int | None = None) -> str:
    """Visible text without line breaks, at most `limit` characters of it."""
    line = " ".join(visible(text).split())
    return line if limit is None or len(line) <= limit else line[: limit - 3] + "..."


def _shown(character: str) -> str:
    hidden = unicodedata.category(character) in ("Cc", "Cs") and character not in "\n\t"
    if not hidden and character not in _BIDIRECTIONAL:
        return character
    code = ord(character)
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"


def ranges(numbers: object, most: int | None = None) -> str:
    """Whole numbers as people write them, ascending and without repeats: [0, 3, 15, 16, 17] -> "0, 3 and 15 to 17".

    Anything but a list of whole numbers is shown as it is. most: so many numbers and ranges are written, the rest counted.
    """
    if not isinstance(numbers, list | tuple | range) or not numbers or any(type(n) is not int for n in numbers):
        return visible(numbers)
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    shown = runs[:most]
    parts = [part for run in shown for part in _range(run)]
    if left := sum(map(len, runs[len(shown) :])):
        parts.append(f"{left} more")
    last = parts.pop()
    return f"{', '.join(parts)} and {last}" if parts else last


def _range(run: list[int]) -> list[str]:
    """Consecutive numbers: three and more as a range."""
    return [f"{run[0]} to {run[-1]}"] if len(run) > 2 else [str(number) for number in run]


def blocks_text(indices: object, *, of: str = "", verb: bool = False, most: int | None = None) -> str:
    """Blocks of a model: "block 4", "blocks 15 to 29".

    of: the model to be named after them. verb: True to end with "is" or "are". most: as in `ranges`.
    """
    one = isinstance(indices, list | tuple | range) and len(indices) == 1
    parts = ["block" if one else "blocks", ranges(indices, most), of and f"of {of}", verb and ("is" if one else "are")]
    return " ".join(part for part in parts if part)


def model_name(source: object) -> str:
    """A model's name for a headline: of a path its last part, of a snapshot in the hub's cache the hub id, else `source`."""
    name = visible(source)
    if snapshot := _SNAPSHOT.search(name.rstrip("/")):
        return snapshot[1].replace("--", "/", 1)
    local = name.startswith(("/", "~", ".")) or name.count("/") > 1
    return name.rstrip("/").rpartition("/")[2] or name if local else name


def human_bytes(count: float) -> str:
    """A size in bytes as people read it: 1536 -> "1.50 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1024
    return f"{count:.2f} TiB"


def duration(seconds: float) -> str:
    """A time as people read it: "1.4 s", "12 min", "3.1 h"."""
    for size, unit in ((86400.0, "days"), (3600.0, "h"), (60.0, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"


@contextmanager
def quiet(*names: str) -> Iterator[None]:
    """Switches loggers off, for code that runs once more where its messages would mislead."""
    loggers = [logging.getLogger(name) for name in names]
    before = [logger.disabled for logger in loggers]
    try:
        for logger in loggers:
            logger.disabled = True
        yield
    finally:
        for logger, disabled in zip(loggers, before, strict=True):
            logger.disabled = disabled


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table."""
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join(lines)
