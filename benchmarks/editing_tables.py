"""Markdown tables of benchmarks/results/editing-*.json, which `npt bench editing` and `python -m benchmarks.editing` write.

    python -m benchmarks.editing --records FILE --output benchmarks/results/editing-NAME--PART.json
    python -m benchmarks.editing_tables

The second command writes the table of each NAME between its markers in docs/editing.md. Files of one NAME are joined, so that
methods can be measured by separate commands.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from benchmarks.tables import RESULTS
from npt.editing.benchmark.rows import Kept, joined, read_kept, table
from scripts.marked import write_section

#: The document with the tables, and the columns of a table.
DOCUMENT = "docs/editing.md"
COLUMNS = ("efficacy", "paraphrase", "locality", "S", "gap", "kl", "largest kl", "perplexity", "passes", "bytes")


def kept_editing(folder: Path = RESULTS) -> dict[str, Kept]:
    """{name: the joined rows of its files}; files of other kinds, such as editing-cost.json, are passed over.

    Raises:
        NPTError: files of one name that can't be joined.
    """
    files: dict[str, dict[Path, Kept]] = {}
    for path in sorted(folder.glob("editing-*.json")):
        if "rows" in json.loads(path.read_text(encoding="utf-8")):
            name = path.stem.removeprefix("editing-").partition("--")[0]
            files.setdefault(name, {})[path] = read_kept(path, "--from")
    return {name: joined(found) for name, found in files.items()}


def editing_table(kept: Kept) -> str:
    """A line for each method and batch size, with what all of them have in common in front."""
    about = kept.about
    line = f"`{about['model']}`, {kept.arguments['--records']}, {about['text_tokens']:,} tokens of running text."
    return f"{line}\n\n{table(kept.rows, COLUMNS)}"


def section_of(name: str) -> str:
    """The name of a table's markers."""
    return f"editing {name}"


def write_tables(kept: Mapping[str, Kept]) -> None:
    """Writes every table whose markers stand in the document."""
    for name, found in kept.items():
        write_section(DOCUMENT, section_of(name), editing_table(found))


def main() -> None:
    """Writes the tables of what is kept."""
    write_tables(kept_editing())


if __name__ == "__main__":
    main()
