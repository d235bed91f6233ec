"""The table of benchmarks/results/beyond-*--test.json, for docs/editing.md: python -m benchmarks.beyond.tables"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.absorbing.choice import with_error
from benchmarks.absorbing.tables import shown
from benchmarks.beyond.__main__ import ARMS, KIND
from benchmarks.kept import Kept, reported
from benchmarks.tables import RESULTS
from npt.common.display import markdown
from scripts.marked import write_section

DOCUMENT = "docs/editing.md"
HEAD = ("facts", "arm", "asked in other words", "as stated", "KL on general text", "seconds")


def kept_beyond(folder: Path = RESULTS) -> dict[str, Kept]:
    """{model's name in its file: its figures}."""
    return reported(KIND, folder)


def section_of(name: str) -> str:
    """The name of a table's markers."""
    return f"beyond {name}"


def beyond_section(kept: Kept) -> str:
    """A line on what was measured, and a row for each number of facts and arm."""
    records = list(kept.contexts.values())
    seeds = sorted({record["seed"] for record in records})
    line = f"`{kept.about['model']}`, {kept.about['machine']['device']}, seeds {', '.join(map(str, seeds))}."
    loras = {
        r["arm"]: f" {r['arm']}: rank {kept.about['rank']}, rate {r['rate']:g}, {r['epochs']} epochs."
        for r in records
        if "rate" in r
    }
    line += "".join(loras.values())
    rows = []
    for count in sorted({record["facts"] for record in records}):
        for arm in ARMS:
            if own := [r for r in records if (r["facts"], r["arm"]) == (count, arm)]:
                rows.append([str(count), arm, *cells(own)])
    return f"{line}\n\n{markdown(HEAD, rows)}"


def cells(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """The figures of one arm over its seeds; shares have a standard error over facts, the others over seeds."""
    shares = [share([value for r in records for value in r[wording]]) for wording in ("asked", "prompt")]
    text, seconds = (with_error([r[name] for r in records]) for name in ("text_kl", "seconds"))
    return [*(shown(value, "percent") for value in shares), shown(text, "kl"), shown(seconds, "seconds")]


def share(values: Sequence[int]) -> tuple[float, float]:
    """(mean, its standard error) of zeros and ones."""
    mean = fmean(values)
    return mean, math.sqrt(mean * (1 - mean) / len(values))


def main() -> None:
    """Writes the tables of what is kept."""
    for name, kept in kept_beyond().items():
        write_section(DOCUMENT, section_of(name), beyond_section(kept))


if __name__ == "__main__":
    main()
