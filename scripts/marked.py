"""Parts of documents that commands keep up to date, between `<!-- name: start -->` and `<!-- name: end -->`."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def section(text: str, name: str) -> str:
    """The part of a document between the markers of `name`.

    Raises:
        ValueError: the document lacks one of them, or has one twice.
    """
    return _split(text, name)[1].strip()


def with_section(text: str, name: str, content: str) -> str:
    """A document with the part between the markers of `name` replaced.

    Raises:
        ValueError: the document lacks one of them, or has one twice.
    """
    before, _, after = _split(text, name)
    return f"{before}\n{content}\n{after}"


def write_section(file: str, name: str, content: str) -> None:
    """Replaces a part of a file, named relative to the repository; a file without its markers stays as it is."""
    path = ROOT / file
    text = path.read_text(encoding="utf-8")
    if f"<!-- {name}: start -->" in text:
        path.write_text(with_section(text, name, content), encoding="utf-8")


def _split(text: str, name: str) -> tuple[str, str, str]:
    """The text up to and with the first marker, between the markers, and from the second one on."""
    start, end = f"<!-- {name}: start -->", f"<!-- {name}: end -->"
    if text.count(start) != 1 or text.count(end) != 1 or text.index(start) > text.index(end):
        raise ValueError(f"expected {start} and then {end}, once each")
    before, rest = text.split(start)
    content, after = rest.split(end)
    return before + start, content, end + after
