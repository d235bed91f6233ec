"""`npt watch`: a live run in the terminal, read from the files that it writes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median

import yaml
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from npt.common.display import visible
from npt.common.places import place
from npt.config.strict_yaml import MAX_BYTES, parse_yaml
from npt.errors import NPTError
from npt.report.run_files import CONFIG, METRICS, REPORT_JSON, Report, Rows, curve, malformed, read_json_lines
from npt.report.style import block_number
from npt.report.terminal import number

#: Eighths of a line's height, from low to high.
_LEVELS = "▁▂▃▄▅▆▇█"
#: Blocks that are shown one by one.
MOST_BLOCKS = 8
#: (key in metrics.jsonl, label) of the figures that are shown.
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
    sleep: Callable[[float], object] = time.sleep,
) -> None:
    """Shows a run until it has written its report.

    Args:
        interval: seconds between two looks. once: show it a single time and return. sleep: waits so many seconds.

    Raises:
        NPTError: no metrics.jsonl in the folder, or an interval that is no number.
    """
    output_dir = place(output_dir)
    metrics = output_dir / METRICS
    if not metrics.is_file():
        raise NPTError(f"{output_dir}: no {METRICS} there; start `npt train`, or name the output folder of a run")
    if not interval < math.inf:
        raise NPTError(f"--interval {interval}: no number of seconds; write one such as 2")
    if once:
        with malformed(output_dir):
            console.print(_view(output_dir))
        return
    with Live(_view(output_dir), console=console, auto_refresh=False) as live:
        while not _finished(output_dir):
            sleep(interval)
            live.update(_view(output_dir), refresh=True)


def _finished(folder: Path) -> bool:
    """True once the report is at least as new as the metrics: a resumed run has an old report at first."""
    report, metrics = folder / REPORT_JSON, folder / METRICS
    return report.is_file() and metrics.is_file() and report.stat().st_mtime >= metrics.stat().st_mtime


def _view(folder: Path) -> RenderableType:
    """The run as it is now: a headline, a progress bar where the number of steps is known, and its figures."""
    metrics = folder / METRICS
    rows = read_json_lines(metrics) if metrics.is_file() else []
    steps = [row["step"] for row in rows if isinstance(row.get("step"), int)]
    step, total = max(steps, default=0), _total_steps(folder)
    state = "finished" if _finished(folder) else f"last line {time.time() - metrics.stat().st_mtime:.0f} s ago"
    head = Text(f"{visible(folder)}: step {step}" + (f" of {total}" if total else "") + f", {state}")
    parts: list[RenderableType] = [head]
    if total:
        parts.append(ProgressBar(total=total, completed=step, width=60))
    return Group(*parts, _figures(rows))


def _figures(rows: Rows) -> Table:
    """Each logged figure's first and last value and its course, and the blocks' errors before and after calibration."""
    table = Table(box=None, pad_edge=False)
    for column in ("", "first", "now", ""):
        table.add_column(column, justify="right" if column else "left")
    for key, label in _SHOWN:
        _, values = curve(rows, key)
        if values:
            table.add_row(
                label, number(float(values[0])), number(float(values[-1])), sparkline(values) if len(values) > 1 else ""
            )
    for row in _block_rows(_calibration(rows)):
        table.add_row(*row)
    return table


def _block_rows(calibration: Report) -> Iterator[tuple[str, ...]]:
    """The blocks' errors before and after calibration; of more than `MOST_BLOCKS` the median, its course and the largest."""
    errors = {
        block_number(name)[0]: (figures.get("error_before"), figures.get("error_after"))
        for name, figures in sorted(calibration.items(), key=lambda item: block_number(item[0]))
    }
    known = {block: pair for block, pair in errors.items() if None not in pair}
    if len(errors) <= MOST_BLOCKS or not known:
        for block, pair in errors.items():
            yield f"calibration, block {block}", *map(number, pair), ""
        return
    before, after = zip(*known.values(), strict=True)
    yield "calibration, median", number(median(before)), number(median(after)), sparkline(_thinned(after))
    worst = max(known, key=lambda block: known[block][1])
    yield f"calibration, block {worst}", *map(number, known[worst]), f"the largest of {len(known)} blocks"


def _thinned(values: Sequence[float], width: int = 32) -> list[float]:
    """At most `width` values: each the largest of its neighbours."""
    size = math.ceil(len(values) / width)
    return [max(values[at : at + size]) for at in range(0, len(values), size)]


def _calibration(rows: Rows) -> Report:
    """{block: {"error_before", "error_after"}} as calibration logged it; empty before it has."""
    return next((row["calibration"] for row in rows if isinstance(row.get("calibration"), dict)), {})


def _total_steps(folder: Path) -> int | None:
    """training.num_train_steps of the run's configuration; None where the length is given in epochs or can't be read."""
    path = folder / CONFIG
    if not path.is_file() or path.stat().st_size > MAX_BYTES:
        return None
    try:
        config = parse_yaml(path.read_text(encoding="utf-8"))
        steps = config["training"]["num_train_steps"]
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError):
        return None
    return steps if isinstance(steps, int) and steps > 0 else None


def sparkline(values: list[float], width: int = 32) -> str:
    """The course of the last `width` values as one line of block characters, from the lowest to the highest of them."""
    values = [value for value in values if isinstance(value, int | float)][-width:]
    low, high = min(values), max(values)
    span = high - low
    return "".join(_LEVELS[int((value - low) / span * 7) if span else 0] for value in values)
