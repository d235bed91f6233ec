"""Markdown tables of benchmarks/results/editing-*.json, which `npt bench editing` and `python -m benchmarks.editing` write.

    python -m benchmarks.editing --records FILE --output benchmarks/results/editing-NAME--PART.json
    npt bench editing --factworld llama gpt2 --seed 0 1 2 --output benchmarks/results/factworld-NAME.json
    python -m benchmarks.editing_tables

The last command writes the table of each NAME between its markers in docs/editing.md. Files of records of one NAME are joined,
so methods can be measured by separate commands; all files of FactWorld, factworld-*.json, give one table.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from benchmarks.tables import RESULTS
from npt.editing.benchmark.rows import Kept, joined, read_kept, table
from npt.editing.benchmark.worlds import Result, gates_text, read_worlds, worlds_table
from scripts.marked import write_section

#: The document with the tables, the markers of FactWorld's, and the columns of the others.
DOCUMENT = "docs/editing.md"
FACTWORLD = "factworld"
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


def kept_factworld(folder: Path = RESULTS) -> list[Result]:
    """The results of all files of FactWorld."""
    return [
        result for path in sorted(folder.glob("factworld-*.json")) for result in read_worlds(path, "--output").results
    ]


def factworld_table(results: Sequence[Result]) -> str:
    """A line for each method, model and number of edits, and the gates of every model behind it."""
    gates = "\n".join(f"- {line}" for line in gates_text(results).splitlines())
    return f"{worlds_table(results)}\n\n{gates}"


def tables() -> dict[str, str]:
    """{name of its markers: table} of what is kept."""
    found = {section_of(name): editing_table(kept) for name, kept in kept_editing().items()}
    if results := kept_factworld():
        found[FACTWORLD] = factworld_table(results)
    return found


def main() -> None:
    """Writes every table whose markers stand in the document."""
    for name, table_of_it in tables().items():
        write_section(DOCUMENT, name, table_of_it)


if __name__ == "__main__":
    main()
