"""Plots of a run, drawn from metrics.jsonl and, where there is one, evaluation_report.json."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

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
    path = Path(output_dir) / "evaluation_report.json"
    report = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
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
        figure, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
        if draw(axes, rows, report):
            axes.grid(alpha=0.3)
            figure.savefig(folder / f"{name}.png", dpi=150)
            written.append(folder / f"{name}.png")
        else:
            logger.info("%s: nothing to draw", name)
        plt.close(figure)
    if not written:
        raise NPTError(f"{metrics}: no logged step to draw; lower training.logging_steps or train longer")
    return written


def read_json_lines(path: Path) -> Rows:
    """The objects of a JSON lines file; a torn last line is left out with a warning."""
    rows = []
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise NPTError(f"{path} line {number}: not JSON ({error.msg}); remove the line") from error
            logger.warning("%s: the last line is torn and left out", path)
    return rows


def _curve(rows: Rows, key: str) -> tuple[list[float], list[float]]:
    points = [(row["step"], row[key]) for row in rows if key in row]
    return [p[0] for p in points], [p[1] for p in points]


def _loss(axes: Any, rows: Rows, report: dict[str, Any]) -> bool:
    drawn = False
    for key, colour in (("loss", BLUE), ("equivalence_loss", GREEN), ("regularization_loss", ORANGE)):
        steps, values = _curve(rows, key)
        if steps:
            axes.plot(
                steps, values, color=colour, label=key.replace("_", " "), linestyle="--" if key == "loss" else "-"
            )
            drawn = True
    if drawn:
        axes.set(xlabel="step", ylabel="loss", yscale="log", title="Training loss")
        axes.legend()
    return drawn


def _ratio(axes: Any, rows: Rows, report: dict[str, Any]) -> bool:
    steps, values = _curve(rows, "eval_perplexity_ratio")
    if not steps:
        return False
    axes.axhspan(0.95, 1.05, color=GREY, alpha=0.12, label="target, 1.0 ± 0.05")
    axes.axhline(1, color=GREY, linewidth=1)
    axes.plot(steps, values, color=BLUE, marker="o", label="NPT / original")
    axes.set(xlabel="step", ylabel="perplexity ratio", title="Perplexity of the NPT model over the original's")
    axes.legend()
    return True


def _weight_delta(axes: Any, rows: Rows, report: dict[str, Any]) -> bool:
    steps, values = _curve(rows, "mean_delta_norm")
    stats = report.get("evaluations", {}).get("weight_delta_stats")
    if steps:
        axes.plot(steps, values, color=BLUE, label="NPT, last training batch")
    if stats:
        axes.axhline(stats["exact_frobenius"], color=ORANGE, label="exact, evaluation text")
        axes.axhline(stats["mean_frobenius"], color=BLUE, linestyle=":", label="NPT, evaluation text")
    if not steps and not stats:
        return False
    axes.set(xlabel="step", ylabel="mean Frobenius norm", title="Norm of the weight delta per token", ylim=(0, None))
    axes.legend()
    return True


def _learning_rate(axes: Any, rows: Rows, report: dict[str, Any]) -> bool:
    steps, values = _curve(rows, "learning_rate")
    axes.plot(steps, values, color=BLUE)
    axes.set(xlabel="step", ylabel="learning rate", title="Learning rate")
    return bool(steps)


def _layer_error(axes: Any, rows: Rows, report: dict[str, Any]) -> bool:
    calibration: dict[str, Any] = next((row["calibration"] for row in rows if "calibration" in row), {})
    layers = report.get("evaluations", {}).get("layer_equivalence", {})
    names = list(layers or calibration)
    if not names:
        return False
    series = []
    if calibration:
        series += [
            ("before calibration", [calibration[n]["error_before"] for n in names if n in calibration], ORANGE),
            ("after calibration", [calibration[n]["error_after"] for n in names if n in calibration], GREEN),
        ]
    if layers:
        series.append(("at the end", [layers[n]["relative_error"] for n in names], BLUE))
    width = 0.8 / len(series)
    for index, (label, values, colour) in enumerate(series):
        axes.bar([x + index * width for x in range(len(values))], values, width, label=label, color=colour)
    axes.set_xticks(
        [x + width * (len(series) - 1) / 2 for x in range(len(names))], [n.removeprefix("layer_") for n in names]
    )
    axes.set(xlabel="block", ylabel="error of the update", yscale="log", title="Error of each block's update, relative")
    axes.legend()
    return True
