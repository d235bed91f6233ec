"""Tables that commands keep up to date, between markers in the documentation."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def write_section(file: str, name: str, text: str) -> None:
    """Puts text between `<!-- name: start -->` and `<!-- name: end -->` of a file, if it has them."""
    path, start, end = ROOT / file, f"<!-- {name}: start -->", f"<!-- {name}: end -->"
    content = path.read_text(encoding="utf-8")
    if start in content and end in content:
        before, rest = content.split(start)
        path.write_text(f"{before}{start}\n{text}\n{end}{rest.split(end)[1]}", encoding="utf-8")
