"""The files of a run's output folder: their names, and how they are read when they may be damaged."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from npt.common.display import one_line
from npt.errors import NPTError

logger = logging.getLogger(__name__)

#: Written while training: one JSON object per logged step, and one per set of sample texts.
METRICS, SAMPLES = "metrics.jsonl", "samples.jsonl"
#: Written at the end: the evaluation report and the page made from all files.
REPORT_JSON, PAGE = "evaluation_report.json", "report.html"
#: The report of a fine-tuning, in the place of an evaluation report.
FINETUNE_JSON = "finetune_report.json"
#: The run's configuration as it was used, and the folder of `npt plot`.
CONFIG, PLOTS_FOLDER = "config.yaml", "plots"

#: The objects of metrics.jsonl, in the order in which they were logged.
Rows = list[dict[str, Any]]
#: An evaluation report, or one of its sections.
Report = Mapping[str, Any]


def read_json_lines(path: Path) -> Rows:
    """The objects of a JSON lines file. A torn last line, as a live run may leave it, is left out with a warning.

    Raises:
        NPTError: any other line is not a JSON object.
    """
    rows = []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            if number < len(lines):
                raise NPTError(f"{path} line {number}: not JSON ({one_line(error, 80)}); remove the line") from error
            logger.warning("%s: the last line is torn and left out", path)
            continue
        if not isinstance(row, dict):
            raise NPTError(f"{path} line {number}: not a JSON object but {type(row).__name__}; remove the line")
        rows.append(row)
    return rows


def read_report(path: Path) -> dict[str, Any]:
    """The evaluation report; empty where the file does not exist.

    Raises:
        NPTError: the file is not a JSON object.
    """
    if not path.is_file():
        return {}
    try:
        report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        reason = "not UTF-8" if isinstance(error, UnicodeDecodeError) else one_line(error, 80)
        raise NPTError(f"{path}: not JSON ({reason}); write it again with `npt evaluate`, or remove it") from error
    if not isinstance(report, dict):
        raise NPTError(f"{path}: not a JSON object; write it again with `npt evaluate`, or remove it")
    return report


def section(report: Report, *path: str) -> Report:
    """The section of a report that lies under these keys; empty where one of them is missing or null."""
    found = report
    for key in path:
        found = found.get(key) or {}
    return found


def curve(rows: Rows, key: str) -> tuple[list[float], list[float]]:
    """(steps in ascending order, values of `key`). Where a resumed run logged a step again, the later value counts."""
    points = {row["step"]: row[key] for row in rows if "step" in row and row.get(key) is not None}
    steps = sorted(points)
    return steps, [points[step] for step in steps]


@contextmanager
def malformed(place: Path | str) -> Iterator[None]:
    """Turns errors from values of an unexpected type in a run's files into one error with a remedy.

    Raises:
        NPTError: names `place`, the folder or folders that are read.
    """
    try:
        yield
    except NPTError:
        raise
    except (AttributeError, IndexError, KeyError, OverflowError, TypeError, ValueError) as error:
        reason = one_line(error, 120)
        raise NPTError(
            f"{place}: a figure in {METRICS} or {REPORT_JSON} is malformed ({type(error).__name__}: {reason}); "
            "restore the file, or run again"
        ) from error
