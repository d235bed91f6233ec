"""Figures that a benchmark keeps in a file, measurement by measurement, so that a command that was killed goes on.

The files are benchmarks/results/KIND-MODEL--PART.json: choices are made on the development part, the test part is reported.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.tables import RESULTS
from npt.common.display import one_line
from npt.common.files import write_json
from npt.errors import NPTError

PARTS = ("development", "test")
Record = Mapping[str, Any]


@dataclass
class Kept:
    """The figures in a file. about: what they were measured with. contexts: {a measurement's name: its record}."""

    about: dict[str, Any]
    contexts: dict[str, Record]

    def measured(self, name: str, measure: Callable[[], Record], path: Path) -> Record:
        """The record of a name; where there is none it is measured, and the file written."""
        if name not in self.contexts:
            self.contexts[name] = measure()
            write_json(path, asdict(self))
        return self.contexts[name]


def file_of(kind: str, model: str, part: str) -> Path:
    """The file in which a part is kept."""
    return RESULTS / f"{kind}-{model.replace(':', '-').replace('/', '-')}--{part}.json"


def reported(kind: str, folder: Path = RESULTS) -> dict[str, Kept]:
    """{model's name in its file: its figures} of the test part."""
    paths = sorted(folder.glob(f"{kind}-*--test.json"))
    return {path.stem.removeprefix(f"{kind}-").removesuffix("--test"): read_kept(path) for path in paths}


def read_kept(path: Path) -> Kept:
    """The figures in a file.

    Raises:
        NPTError: it can't be read, or is of another kind.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return Kept(values["about"], values["contexts"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        problem = one_line(repr(error), 80)
        raise NPTError(f"{path}: holds no figures of this benchmark ({problem}); measure them first") from error


def opened(path: Path, about: dict[str, Any]) -> Kept:
    """The figures to go on with, none where there is no file.

    Raises:
        NPTError: the file was measured with something else.
    """
    if not path.exists():
        return Kept(about, {})
    kept = read_kept(path)
    other = [name for name in about if kept.about.get(name) != about[name]]
    if other:
        was, now = (one_line(repr(one.get(other[0])), 60) for one in (kept.about, about))
        raise NPTError(f"{path}: was measured with {other[0]} {was}, not {now}; give that, or another --output")
    return kept


def ended(run: Callable[[], None]) -> int:
    """The exit status of a command: 1 for an error, which is said in one line."""
    try:
        run()
    except NPTError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
