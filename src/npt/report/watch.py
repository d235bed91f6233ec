"""A live run in the terminal, read from the files it writes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from npt.common.display import visible
from npt.errors import NPTError
from npt.report.curves import Rows, curve, malformed, read_json_lines
from npt.report.terminal import number

_LEVELS = "▁▂▃▄▅▆▇█"
_SHOWN = (
    ("loss", "loss"),
    ("equivalence_loss", "equivalence loss"),
    ("mean_delta_norm", "norm of dW"),
    ("learning_rate", "learning rate"),
    ("eval_perplexity_ratio", "perplexity ratio"),
    ("eval_mean_kl", "mean KL"),
)


def watch_run(
    output_dir: Path,
    console: Console,
    *,
    interval: float = 2.0,
    once: bool = False,
    sleep: Callable[[float], Any] = time.sleep,
) -> None:
    """Shows a run until it has written its report; `once` shows it a single time.

    Raises:
        NPTError: no metrics.jsonl in the folder.
    """
    metrics = Path(output_dir) / "metrics.jsonl"
    if not metrics.is_file():
        raise NPTError(f"{output_dir}: no metrics.jsonl there; start `npt train`, or name the output folder of a run")
    if not interval < math.inf:
        raise NPTError(f"--interval {interval}: no number of seconds; write one such as 2")
    if once:
        with malformed(output_dir):
            console.print(_view(Path(output_dir)))
        return
    with Live(_view(Path(output_dir)), console=console, auto_refresh=False) as live:
        while not _finished(Path(output_dir)):
            sleep(interval)
            live.update(_view(Path(output_dir)), refresh=True)


def _finished(folder: Path) -> bool:
    report, metrics = folder / "evaluation_report.json", folder / "metrics.jsonl"
    return report.is_file() and metrics.is_file() and report.stat().st_mtime >= metrics.stat().st_mtime


def _view(folder: Path) -> RenderableType:
    metrics = folder / "metrics.jsonl"
    rows = read_json_lines(metrics) if metrics.is_file() else []
    steps = [row["step"] for row in rows if isinstance(row.get("step"), int)]
    step, total = max(steps, default=0), _total_steps(folder)
    state = "finished" if _finished(folder) else f"last line {time.time() - metrics.stat().st_mtime:.0f} s ago"
    head = Text(f"{visible(folder)}: step {step}" + (f" of {total}" if total else "") + f", {state}")
    parts: list[RenderableType] = [head]
    if total:
        parts.append(ProgressBar(total=total, completed=step, width=60))
    table = Table(box=None, pad_edge=False)
    for column, justify in (("", "left"), ("first", "right"), ("now", "right"), ("", "left")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    for key, label in _SHOWN:
        _, values = curve(rows, key)
        if values:
            table.add_row(label, number(float(values[0])), number(float(values[-1])), sparkline(values))
    for name, figures in _calibration(rows).items():
        table.add_row(
            f"calibration, {name}", number(figures.get("error_before")), number(figures.get("error_after")), ""
        )
    return Group(*parts, table)


def _calibration(rows: Rows) -> dict[str, Any]:
    return next((row["calibration"] for row in rows if isinstance(row.get("calibration"), dict)), {})


def _total_steps(folder: Path) -> int | None:
    """num_train_steps of the run's configuration, where it was given in steps."""
    path = folder / "config.yaml"
    if not path.is_file():
        return None
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        steps = config["training"]["num_train_steps"]
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError):
        return None
    return steps if isinstance(steps, int) and steps > 0 else None


def sparkline(values: list[float], width: int = 32) -> str:
    """The course of values in one line of blocks, the last `width` of them."""
    values = [value for value in values if isinstance(value, int | float)][-width:]
    low, high = min(values), max(values)
    span = high - low
    return "".join(_LEVELS[int((value - low) / span * 7) if span else 0] for value in values)
