"""Values as people read them; text of models, files and people made harmless to show."""

from __future__ import annotations

import unicodedata

#: Marks that change the direction of the text around them.
_BIDIRECTIONAL = set("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def visible(text: object) -> str:
    """Control characters, escapes and direction marks as \\x1b or \\u202e; line breaks and tabs stay."""
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
    """1536 -> "1.50 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1024
    return f"{count:.2f} TiB"
