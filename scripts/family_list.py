"""Writes the list of supported families into docs/families.md, from npt.block.families: python -m scripts.family_list"""

from __future__ import annotations

from npt.block.families import FAMILIES
from scripts.marked import write_section

DOCUMENT, NAME = "docs/families.md", "families"


def family_list() -> str:
    """The model types of the table in alphabetical order, as one line of markdown."""
    return ", ".join(f"`{name}`" for name in sorted(FAMILIES))


if __name__ == "__main__":
    write_section(DOCUMENT, NAME, family_list())
