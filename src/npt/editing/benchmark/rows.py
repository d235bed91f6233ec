"""Rows of a comparison: one method at one batch size; their table, and the file that keeps the figures of every record."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from npt.common.display import markdown, one_line
from npt.common.files import write_text
from npt.editing.benchmark.figures import FIGURES, OF_BATCH, Example, Measured, Outcome, ahead, with_error
from npt.editing.benchmark.records import Record
from npt.errors import DataError, NPTError

#: To be raised whenever the file's names or their meaning change.
FORMAT = 1
OF_RECORD = tuple(f.name for f in fields(Outcome) if f.name not in ("group", *OF_BATCH))
#: Figures that a record may lack.
_OPTIONAL = ("paraphrase", "locality", "ordering", "fluency", "fluency_change", "skill", "skill_change")


@dataclass
class Row:
    """One method's figures.

    sizes: records of each batch. asked: names the records and their batches, which rows that are compared share.
    sequential: True where the records of a batch were written one after the other.
    """

    method: str
    batch: int
    sequential: bool
    sizes: list[int]
    asked: str
    outcomes: list[Outcome] = field(default_factory=list)
    examples: list[Example] = field(default_factory=list)

    @property
    def done(self) -> int:
        """Batches that are measured."""
        return self.outcomes[-1].group + 1 if self.outcomes else 0

    @property
    def wrong(self) -> int:
        """Examples of what came out wrong."""
        return sum(not example.right for example in self.examples)

    def add(self, found: Measured) -> None:
        """Takes in a batch."""
        self.outcomes += found.outcomes
        self.examples += found.examples


def names_of(batches: Sequence[Sequence[Record]]) -> str:
    """Names records and their batches."""
    ids = [[[r.request.id, r.paraphrases, [n.prompt for n in r.neighbours]] for r in part] for part in batches]
    return hashlib.sha256(json.dumps(ids).encode("utf-8", "backslashreplace")).hexdigest()[:16]


# -- the table -------------------------------------------------------------------------------------------------------------

LESS = "S less the first row's"


def cells(rows: Sequence[Row], figures: Sequence[str] | None = None) -> tuple[list[str], list[list[str]]]:
    """(head, a line of cells for each row): figures with their standard errors, and S less that of the batch size's first row.

    Args:
        figures: names of `FIGURES`; None for all that some row has.
    """
    found = {id(row): {name: with_error(row.outcomes, FIGURES[name]) for name in figures or FIGURES} for row in rows}
    names = [n for n in figures or FIGURES if any(not math.isnan(found[id(row)][n][0]) for row in rows)]
    lines, first = [], dict[tuple[int, bool], Row]()
    for row in sorted(rows, key=lambda row: row.batch):
        start = first.setdefault((row.batch, row.sequential), row)
        less = ahead(row.outcomes, start.outcomes)
        batch = f"{row.batch} in turn" if row.sequential else str(row.batch)
        values = [cell(*found[id(row)][name]) for name in names]
        lines.append([row.method, batch, str(len(row.outcomes)), *values, "-" if row is start else cell(*less)])
    return ["method", "batch", "records", *names, LESS], lines


def table(rows: Sequence[Row], figures: Sequence[str] | None = None) -> str:
    """`cells` as markdown."""
    return markdown(*cells(rows, figures))


def cell(value: float, error: float) -> str:
    """A figure with its standard error, where there is one."""
    if math.isnan(value):
        return "-"
    shown = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return shown if math.isnan(error) or (error == 0 and abs(value) >= 1000) else f"{shown} ± {error:.2g}"


# -- the file --------------------------------------------------------------------------------------------------------------

Number = Annotated[float, Field(allow_inf_nan=False)]


class Strict(BaseModel):
    """A part of a file: nothing is converted, and no name is passed over."""

    model_config = ConfigDict(strict=True, extra="forbid")


class FiguresFile(Strict):
    """Beginning of every file of figures. holds: names them, for errors."""

    holds: ClassVar[str] = "figures"
    format_version: Literal[1]
    about: dict[str, Any]
    arguments: dict[str, Any]


File = TypeVar("File", bound=FiguresFile)


class _Example(Strict):
    kind: Literal["prompt", "paraphrase", "neighbour"]
    prompt: str
    target: str
    before: str
    after: str
    right: bool


class _Row(Strict):
    method: str
    batch: Annotated[int, Field(ge=1)]
    sequential: bool
    sizes: list[Annotated[int, Field(ge=1)]]
    asked: str
    records: dict[str, list[Number | None]]
    batches: dict[str, list[Number | None]]
    examples: list[_Example]

    @model_validator(mode="after")
    def _whole(self) -> _Row:
        for names, found in ((OF_RECORD, self.records), (OF_BATCH, self.batches)):
            if set(found) != set(names):
                odd = sorted(set(names) ^ set(found))[0]
                raise ValueError(
                    f"the figures lack {odd}" if odd in names else f"no figure is named {one_line(odd, 40)}"
                )
            for name, values in found.items():
                if None in values and name not in _OPTIONAL:
                    raise ValueError(f"{name} has a record without a figure")
        done = {len(values) for values in self.batches.values()}
        count = next(iter(done))
        if len(done) > 1 or count > len(self.sizes):
            raise ValueError("its figures are not of the batches in sizes")
        if {len(values) for values in self.records.values()} != {sum(self.sizes[:count])}:
            raise ValueError("its figures are not of the records in sizes")
        return self


class _File(FiguresFile):
    holds = "figures of npt bench editing"
    rows: list[_Row]


@dataclass
class Kept:
    """A file of figures.

    about: the base, the text, the versions and the machine. arguments: those of the command that decide the figures.
    """

    about: dict[str, Any]
    arguments: dict[str, Any]
    rows: list[Row]


def write_kept(path: Path, kept: Kept) -> None:
    """Writes the figures of every record, a line for each figure.

    Raises:
        RunError: the disk is full or gone; the old file is as it was.
    """
    rows = []
    for row in kept.rows:
        own = {name: getattr(row, name) for name in ("method", "batch", "sequential", "sizes", "asked")}
        starts = [sum(row.sizes[:number]) for number in range(row.done)]
        parts = {
            "records": {name: [_short(getattr(o, name)) for o in row.outcomes] for name in OF_RECORD},
            "batches": {name: [_short(getattr(row.outcomes[at], name)) for at in starts] for name in OF_BATCH},
        }
        columns = [
            f'"{part}": {{\n' + ",\n".join(f'"{name}": {line_of(values)}' for name, values in found.items()) + "}"
            for part, found in parts.items()
        ]
        examples = ",\n".join(line_of(asdict(example)) for example in row.examples)
        rows.append(f"{line_of(own)[:-1]},\n" + ",\n".join(columns) + f',\n"examples": [{examples}]}}')
    write_figures(path, kept.about, kept.arguments, "rows", rows)


def write_figures(
    path: Path, about: Mapping[str, Any], arguments: Mapping[str, Any], name: str, parts: Sequence[str]
) -> None:
    """Writes a file of figures, a line for each thing in it.

    Args:
        path: the file. about, arguments: see `Kept`. name: of the list behind them. parts: its items, in JSON.

    Raises:
        RunError: the disk is full or gone; the old file is as it was.
    """
    lines = [
        f'{{"format_version": {FORMAT},',
        f'"about": {line_of(about)},',
        f'"arguments": {line_of(arguments)},',
        f'"{name}": [',
    ]
    write_text(path, "\n".join([*lines, ",\n".join(parts), "]}", ""]))


def line_of(value: Any) -> str:
    """JSON on one line."""
    return json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(", ", ": "))


def _short(value: float | None) -> float | int | None:
    return int(value) if value is not None and float(value).is_integer() else value


def read_kept(path: Path, option: str) -> Kept:
    """The figures that `write_kept` wrote.

    Args:
        option: the command's option that named the file.

    Raises:
        DataError: missing, damaged, or of a newer format.
    """
    file = read_figures(path, option, _File)
    return Kept(file.about, file.arguments, [_row(row) for row in file.rows])


def read_figures(path: Path, option: str, kind: type[File]) -> File:
    """A file of figures, checked.

    Args:
        path, option: see `read_kept`. kind: the file's form.

    Raises:
        DataError: missing, damaged, or of a newer format.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(found, dict) and isinstance(version := found.get("format_version"), int) and version > FORMAT:
            raise DataError(f"{option} {path}: format_version={version} was written by a newer npt; upgrade npt")
        return kind.model_validate(found)
    except OSError as error:
        raise DataError(
            f"{option} {path}: can't be read ({error.strerror or error}); name a file of --output"
        ) from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise DataError(
            f"{option} {path}: holds no {kind.holds} ({one_line(where, 60)}: {one_line(first['msg'], 80)}); "
            "name a file of --output"
        ) from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, NPTError):
            raise
        raise DataError(f"{option} {path}: not JSON ({one_line(error, 80)}); name a file of --output") from error


def _row(file: _Row) -> Row:
    row = Row(file.method, file.batch, file.sequential, file.sizes, file.asked)
    row.examples = [Example(**example.model_dump()) for example in file.examples]
    done = len(file.batches["kl"])
    at = 0
    for group in range(done):
        shared = {name: values[group] for name, values in file.batches.items()}
        for _ in range(file.sizes[group]):
            own = {name: values[at] for name, values in file.records.items()}
            row.outcomes.append(Outcome(group, **own, **shared))  # type: ignore[arg-type]
            at += 1
    return row


def joined(files: Mapping[Path, Kept]) -> Kept:
    """The rows of several files as one.

    Raises:
        NPTError: a file whose command did not come to its end; files of different bases, texts, records or batches.
    """
    (first, whole), *others = files.items()
    for path, kept in files.items():
        for row in kept.rows:
            if row.done < len(row.sizes):
                raise NPTError(
                    f"--from {path}: {row.method} has {row.done} of {len(row.sizes)} batches; run its command again, which "
                    "goes on where it stopped"
                )
        if not kept.rows:
            raise NPTError(f"--from {path}: holds no row; run its command again")
    asked = {(row.batch, row.sequential): row.asked for row in reversed(whole.rows)}
    rows, labels = list(whole.rows), {(row.method, row.batch, row.sequential) for row in whole.rows}
    for path, kept in others:
        for name in ("base_fingerprint", "text"):
            if kept.about.get(name) != whole.about.get(name):
                what = "another base" if name == "base_fingerprint" else "other running text"
                raise NPTError(f"--from {path}: is of {what} than {first}; join figures of the same")
        for row in kept.rows:
            if asked.setdefault((row.batch, row.sequential), row.asked) != row.asked:
                raise NPTError(
                    f"--from {path}: its batches of {row.batch} hold other records than those of {first}; join figures of the "
                    "same --records, --limit and --draws"
                )
            if (row.method, row.batch, row.sequential) in labels:
                row.method = f"{row.method} ({path.stem})"
            labels.add((row.method, row.batch, row.sequential))
            rows.append(row)
    return Kept(whole.about, whole.arguments, rows)
