"""Values as people read them, and text of models, files and people made harmless to show."""

from __future__ import annotations

import logging
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager

#: Marks that change the direction of the text around them.
_BIDIRECTIONAL = set("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


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
