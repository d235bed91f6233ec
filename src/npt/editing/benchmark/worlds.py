"""Figures of edits on FactWorld: one result for each method, model, seed and number of edits; their table and file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

from pydantic import Field

from npt.common.display import markdown
from npt.editing.benchmark.factworld import NAMES, Figures
from npt.editing.benchmark.rows import FiguresFile, Number, Strict, line_of, read_figures, write_figures
from npt.editing.benchmark.small import Gates


@dataclass(frozen=True)
class Result:
    """Figures of one number of edits: means over its batches.

    base: fingerprint of the trained model. gates: its figures before any edit.
    """

    method: str
    model: str
    seed: int
    edits: int
    base: str
    figures: Figures
    gates: Gates

    @property
    def asked(self) -> tuple[str, str, int, int]:
        """The question that it answers."""
        return self.method, self.model, self.seed, self.edits


@dataclass
class KeptWorlds:
    """A file of results.

    about: versions and machine. arguments: those that decide the figures, which all results share.
    """

    about: dict[str, Any]
    arguments: dict[str, Any]
    results: list[Result] = field(default_factory=list)


class _Figures(Strict):
    efficacy: Number
    prompt: Number
    paraphrase: Number
    neighbours: Number
    others: Number
    kl: Number


class _Gates(Strict):
    recall: Number
    held_out: Number
    override: Number
    two_hop: Number


class _Result(Strict):
    method: str
    model: str
    seed: int
    edits: Annotated[int, Field(ge=1)]
    base: str
    figures: _Figures
    gates: _Gates


class _File(FiguresFile):
    holds = "figures of npt bench editing --factworld"
    results: list[_Result]


def write_worlds(path: Path, kept: KeptWorlds) -> None:
    """Writes results, a line for each.

    Raises:
        RunError: the disk is full or gone; the old file is as it was.
    """
    write_figures(path, kept.about, kept.arguments, "results", [line_of(asdict(result)) for result in kept.results])


def read_worlds(path: Path, option: str) -> KeptWorlds:
    """The results that `write_worlds` wrote.

    Args:
        option: the command's option that named the file.

    Raises:
        DataError: missing, damaged, or of a newer format.
    """
    file = read_figures(path, option, _File)
    return KeptWorlds(file.about, file.arguments, [_result(result.model_dump()) for result in file.results])


def _result(values: Mapping[str, Any]) -> Result:
    return Result(**{**values, "figures": Figures(**values["figures"]), "gates": Gates(**values["gates"])})


def worlds_table(results: Sequence[Result]) -> str:
    """A row for each method, model and number of edits: the mean of its seeds, the worst seed in brackets."""
    rows = []
    for method, model, edits in dict.fromkeys((r.method, r.model, r.edits) for r in results):
        own = [r.figures for r in results if (r.method, r.model, r.edits) == (method, model, edits)]
        cells = []
        for name in NAMES:
            values = [getattr(figures, name) for figures in own]
            worst = max(values) if name == "kl" else min(values)
            shown = "{:.2g}" if name == "kl" else "{:.1%}"
            cells.append(shown.format(fmean(values)) + (f" ({shown.format(worst)})" if len(values) > 1 else ""))
        rows.append([method, model, str(edits), str(len(own)), *cells])
    return markdown(["method", "model", "edits", "seeds", *NAMES], rows)


def gates_text(results: Sequence[Result]) -> str:
    """A line for each model: what it answered before any edit."""
    models = {(result.model, result.seed): result.gates for result in results}
    return "\n".join(
        f"{model}, seed {seed}, before any edit: "
        + ", ".join(f"{name.replace('_', '-')} {value:.1%}" for name, value in asdict(gates).items())
        for (model, seed), gates in models.items()
    )
