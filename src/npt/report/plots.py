"""Plots of a run, drawn from metrics.jsonl and, where there is one, evaluation_report.json."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from npt.errors import NPTError

logger = logging.getLogger(__name__)

#: Okabe-Ito: told apart by colour-blind readers too.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#E69F00", "#009E73", "#666666"
Rows = list[dict[str, Any]]


def plot_run(output_dir: Path, destination: Path | None = None) -> list[Path]:
    """Draws what the run's files hold into <output_dir>/plots and returns the paths; what has no data is skipped.

    Raises:
        NPTError: no such folder, or no metrics in it.
    """
    metrics = Path(output_dir) / "metrics.jsonl"
    if not metrics.is_file():
        raise NPTError(
            f"--output-dir {output_dir}: no metrics.jsonl there; run `npt train` first or name its output folder"
        )
    rows = read_json_lines(metrics)
    report = _read_report(Path(output_dir) / "evaluation_report.json")
    folder = Path(output_dir) / "plots" if destination is None else destination
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, draw in (
        ("loss", _loss),
        ("perplexity_ratio", _ratio),
        ("weight_delta", _weight_delta),
        ("learning_rate", _learning_rate),
        ("layer_error", _layer_error),
    ):
        # Outside pyplot: nothing to close, and whatever backend a caller uses stays as it is.
        figure = Figure(figsize=(6.4, 3.6), layout="constrained")
        FigureCanvasAgg(figure)
        if draw(figure, rows, report):
            for axes in figure.axes:
                axes.grid(alpha=0.3)
            figure.savefig(folder / f"{name}.png", dpi=150)
            written.append(folder / f"{name}.png")
        else:
            logger.info("%s: nothing to draw", name)
    if not written:
        raise NPTError(f"{metrics}: no logged step to draw; lower training.logging_steps or train longer")
    return written


def read_json_lines(path: Path) -> Rows:
    """The objects of a JSON lines file; a torn last line is left out with a warning.

    Raises:
        NPTError: any other line that is no JSON object.
    """
    rows = []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise NPTError(f"{path} line {number}: not JSON ({error.msg}); remove the line") from error
            logger.warning("%s: the last line is torn and left out", path)
            continue
        if not isinstance(row, dict):
            raise NPTError(f"{path} line {number}: not a JSON object but {type(row).__name__}; remove the line")
        rows.append(row)
    return rows


def _read_report(path: Path) -> dict[str, Any]:
    """The evaluation report, empty where there is none."""
    if not path.is_file():
        return {}
    try:
        report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise NPTError(f"{path}: not JSON ({error.msg}); write it again with `npt evaluate`, or remove it") from error
    return report


def _curve(rows: Rows, key: str) -> tuple[list[float], list[float]]:
    """Steps, ascending, and values; of a step that a resumed run logged again, the later value counts."""
    points = {row["step"]: row[key] for row in rows if "step" in row and row.get(key) is not None}
    steps = sorted(points)
    return steps, [points[step] for step in steps]


def _loss(figure: Figure, rows: Rows, report: dict[str, Any]) -> bool:
    curves = [
        (key, *_curve(rows, key), colour, style)
        for key, colour, style in (
            ("loss", BLUE, "--"),
            ("equivalence_loss", GREEN, "-"),
            ("regularization_loss", ORANGE, "-"),
        )
    ]
    # A logarithmic axis has no place for a loss that is zero throughout.
    curves = [curve for curve in curves if any(value > 0 for value in curve[2])]
    if not curves:
        return False
    axes = figure.subplots()
    for key, steps, values, colour, style in curves:
        axes.plot(steps, values, color=colour, linestyle=style, marker=".", label=key.replace("_", " "))
    axes.set(xlabel="step", ylabel="loss", yscale="log", title="Training loss")
    axes.legend()
    return True


def _ratio(figure: Figure, rows: Rows, report: dict[str, Any]) -> bool:
    steps, values = _curve(rows, "eval_perplexity_ratio")
    if not steps:
        return False
    axes = figure.subplots()
    axes.axhspan(0.95, 1.05, color=GREY, alpha=0.12, label="target, 1.0 ± 0.05")
    axes.axhline(1, color=GREY, linewidth=1)
    axes.plot(steps, values, color=BLUE, marker="o", label="NPT / original")
    axes.set(xlabel="step", ylabel="perplexity ratio", title="Perplexity of the NPT model over the original's")
    axes.legend()
    return True


def _weight_delta(figure: Figure, rows: Rows, report: dict[str, Any]) -> bool:
    """Over steps, and beside it per block, each with the norm of the exact value's delta."""
    steps, values = _curve(rows, "mean_delta_norm")
    stats = report.get("evaluations", {}).get("weight_delta_stats") or {}
    per_layer = stats.get("per_layer") or {}
    lines = bool(steps) or "mean_frobenius" in stats
    panels = lines + bool(per_layer)
    if not panels:
        return False
    figure.set_size_inches(6.4 * panels, 3.6)
    axes = list(figure.subplots(1, panels, squeeze=False)[0])
    figure.suptitle("Norm of the weight delta per token")
    if lines:
        _delta_over_steps(axes.pop(0), steps, values, stats)
    if per_layer:
        names = list(per_layer)
        series = [
            (label, [_mean_over_projections(per_layer[name], key) for name in names], colour)
            for label, key, colour in (("NPT", "frobenius", BLUE), ("exact", "exact_frobenius", ORANGE))
        ]
        _bars(axes[0], names, series)
        axes[0].set(xlabel="block", ylabel="mean over projections")
    return True


def _delta_over_steps(axes: Any, steps: list[float], values: list[float], stats: dict[str, Any]) -> None:
    if steps:
        axes.plot(steps, values, color=BLUE, marker=".", label="NPT, last training batch")
    if "exact_frobenius" in stats:
        axes.axhline(stats["exact_frobenius"], color=ORANGE, label="exact, evaluation text")
    if "mean_frobenius" in stats:
        axes.axhline(stats["mean_frobenius"], color=BLUE, linestyle=":", label="NPT, evaluation text")
    highest = max([*values, stats.get("exact_frobenius", 0), stats.get("mean_frobenius", 0)])
    axes.set(xlabel="step", ylabel="mean Frobenius norm", ylim=(0, 1.4 * highest or None))  # room for the legend
    axes.legend()


def _mean_over_projections(projections: dict[str, dict[str, float]], key: str) -> float | None:
    values = [figures[key] for figures in projections.values() if figures.get(key) is not None]
    return sum(values) / len(values) if values else None


def _learning_rate(figure: Figure, rows: Rows, report: dict[str, Any]) -> bool:
    steps, values = _curve(rows, "learning_rate")
    if not steps:
        return False
    axes = figure.subplots()
    axes.plot(steps, values, color=BLUE, marker=".")
    axes.set(xlabel="step", ylabel="learning rate", title="Learning rate")
    return True


def _layer_error(figure: Figure, rows: Rows, report: dict[str, Any]) -> bool:
    calibration: dict[str, Any] = next((row["calibration"] for row in rows if "calibration" in row), {})
    layers: dict[str, Any] = report.get("evaluations", {}).get("layer_equivalence") or {}
    names = sorted({*calibration, *layers}, key=_block_number)
    series = [
        (label, [source.get(name, {}).get(key) for name in names], colour)
        for label, source, key, colour in (
            ("before calibration", calibration, "error_before", ORANGE),
            ("after calibration", calibration, "error_after", GREEN),
            ("at the end", layers, "relative_error", BLUE),
        )
    ]
    series = [(label, values, colour) for label, values, colour in series if any(v is not None for v in values)]
    if not series:
        return False
    axes = figure.subplots()
    _bars(axes, names, series)
    axes.set(xlabel="block", ylabel="error of the update", title="Error of each block's update, relative")
    if any(value for _, values, _ in series for value in values):
        axes.set_yscale("log")
    return True


def _bars(axes: Any, names: list[str], series: list[tuple[str, list[float | None], str]]) -> None:
    """Groups of bars; a block without a value keeps its place, empty."""
    width = 0.8 / len(series)
    for index, (label, values, colour) in enumerate(series):
        points = [(x + index * width, value) for x, value in enumerate(values) if value is not None]
        axes.bar([x for x, _ in points], [value for _, value in points], width, label=label, color=colour)
    middle = width * (len(series) - 1) / 2
    axes.set_xticks([x + middle for x in range(len(names))], [name.removeprefix("layer_") for name in names])
    axes.margins(y=0.35)  # room for the legend
    axes.legend(ncols=len(series), fontsize="small")


def _block_number(name: str) -> tuple[int, str]:
    """layer_10 comes after layer_9."""
    digits = name.removeprefix("layer_")
    return (int(digits) if digits.isdigit() else 0, name)
