"""Tables of benchmarks/results/plasticity-*--test.json, for docs/finetuning.md: python -m benchmarks.plasticity.tables"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.absorbing.choice import with_error
from benchmarks.absorbing.tables import shown
from benchmarks.kept import Kept, reported
from benchmarks.plasticity.__main__ import KIND
from benchmarks.plasticity.arms import ARMS
from benchmarks.plasticity.tasks import TASKS
from benchmarks.tables import RESULTS
from npt.common.display import markdown
from npt.report.finetune import NAMES
from scripts.marked import write_section

DOCUMENT = "docs/finetuning.md"
HEAD = ("task", "method", "learning rate", "trained", "right answers", "held-out loss", "KL on general text", "seconds")


def kept_plasticity(folder: Path = RESULTS) -> dict[str, Kept]:
    """{model's name in its file: its figures}."""
    return reported(KIND, folder)


def section_of(name: str) -> str:
    """The name of a table's markers."""
    return f"plasticity {name}"


def plasticity_section(kept: Kept) -> str:
    """A line on what was measured, and a row for each task and method."""
    about, records = kept.about, list(kept.contexts.values())
    size, seeds = about["size"], sorted({record["seed"] for record in records})
    form = f", {' '.join(about['set'])}" if about["set"] else ""
    rates = ", ".join(f"{rate:g}" for rate in about["rates"])
    line = (
        f"`{about['model']}`, {about['machine']['device']}, {size['steps']} steps of {size['batch']} x {size['length']} "
        f"tokens, seeds {', '.join(map(str, seeds))}{form}. Rates chosen among {rates}."
    )
    rows = []
    for task in TASKS:
        own = [record["arms"] for record in records if record["task"] == task]
        rows += [[task, NAMES[arm], *cells([arms[arm] for arms in own])] for arm in ARMS if own]
    return f"{line}\n\n{markdown(HEAD, rows)}"


def cells(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """One method's figures on one task, each a mean over seeds with its standard error."""
    right = shown(with_error([fmean(run["right"]) for run in runs]), "percent")
    others = (shown(with_error([run[name] for run in runs]), name) for name in ("loss", "kl", "seconds"))
    return [f"{runs[0]['rate']:g}", f"{runs[0]['trained']:,}", right, *others]


def main() -> None:
    """Writes the tables of what is kept."""
    for name, kept in kept_plasticity().items():
        write_section(DOCUMENT, section_of(name), plasticity_section(kept))


if __name__ == "__main__":
    main()
