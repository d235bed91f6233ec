"""Writes the families npt supports into README.md, from the table in npt.block.families: python scripts/readme_families.py"""

from __future__ import annotations

from pathlib import Path

from npt.block.families import FAMILIES

README = Path(__file__).resolve().parents[1] / "README.md"
START, END = "<!-- families: start -->", "<!-- families: end -->"


def with_families(text: str) -> str:
    """README.md with the list between its markers replaced."""
    before, rest = text.split(START)
    return f"{before}{START}\n{', '.join(f'`{name}`' for name in sorted(FAMILIES))}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    README.write_text(with_families(README.read_text(encoding="utf-8")), encoding="utf-8")
