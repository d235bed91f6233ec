"""Plots of a run, drawn from metrics.jsonl and, where there is one, evaluation_report.json."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from npt.common.display import one_line
from npt.errors import NPTError
from npt.report import distributions as figures

logger = logging.getLogger(__name__)

#: Okabe-Ito: told apart by colour-blind readers too.
BLUE, ORANGE, GREEN, GREY = figures.BLUE, figures.ORANGE, figures.GREEN, figures.GREY
Rows = list[dict[str, Any]]
#: Draws into a figure and returns the picture in words, "" where there is nothing to draw.
Draw = Callable[[Figure, Rows, dict[str, Any]], str]
#: Axes and letters, recognisable in SVG, where they take the page's colour.
INK = "#1b1c1d"
_STYLE: Any = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
    "legend.framealpha": 0.0,
    "svg.fonttype": "none",
    "svg.hashsalt": "npt",
}
#: Colours an SVG takes from its own style sheet, so that they suit a dark page too: (light, dark).
_THEME = {INK: ("--ink", INK, "#e8e8e6"), BLUE: ("--blue", BLUE, "#56a8de"), GREEN: ("--green", GREEN, "#3fc39c")}
_SVG_STYLE = (
    "<style>svg{{font-family:system-ui,sans-serif;{}}}@media (prefers-color-scheme:dark){{svg{{{}}}}}</style>".format(
        *(";".join(f"{entry[0]}:{entry[i]}" for entry in _THEME.values()) for i in (1, 2))
    )
)


@dataclass
class Picture:
    """A drawn plot: its file name, what it shows in words, and both formats (PNG where it was asked for)."""

    name: str
    alt: str
    png: bytes
    svg: str
    wide: bool


def draw_run(rows: Rows, report: dict[str, Any], *, png: bool = True) -> list[Picture]:
    """All plots there is data for, in the order of `PLOTS`."""
    drawn = (_picture(name, draw, rows, report, png) for name, draw in PLOTS.items())
    return [picture for picture in drawn if picture is not None]


def _picture(name: str, draw: Draw, rows: Rows, report: dict[str, Any], with_png: bool) -> Picture | None:
    with matplotlib.rc_context(_STYLE):
        # Outside pyplot: nothing to close, and whatever backend a caller uses stays as it is.
        figure = Figure(figsize=(6.4, 3.6), layout="constrained")
        FigureCanvasAgg(figure)
        alt = draw(figure, rows, report)
        if not alt:
            logger.info("%s: nothing to draw", name)
            return None
        for axes in figure.axes:
            axes.grid(alpha=0.3)
        png, svg = io.BytesIO(), io.StringIO()
        if with_png:
            figure.savefig(png, dpi=150, format="png")
        figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = svg.getvalue()
    for colour, (variable, *_) in _THEME.items():
        text = text.replace(colour.lower(), f"var({variable})")
    text = text[text.index("<svg") :].replace("<defs>", f"{_SVG_STYLE}<defs>", 1)
    width, height = figure.get_size_inches()
    return Picture(name, alt, png.getvalue(), text, wide=width > 2.5 * height)


@contextmanager
def malformed(place: Path | str) -> Iterator[None]:
    """Files of a run are read as what npt writes; where they hold something else, that is one line and no traceback.

    Raises:
        NPTError: names the place.
    """
    try:
        yield
    except NPTError:
        raise
    except (AttributeError, IndexError, KeyError, OverflowError, TypeError, ValueError) as error:
        reason = one_line(error, 120)
        raise NPTError(
            f"{place}: a figure in metrics.jsonl or evaluation_report.json is malformed ({type(error).__name__}: {reason}); "
            "restore the file, or run again"
        ) from error


def plot_run(output_dir: Path, destination: Path | None = None) -> list[Path]:
    """Draws what the run's files hold into <output_dir>/plots, as PNG and SVG; what has no data is skipped.

    Returns:
        The PNG paths; each has its SVG beside it.

    Raises:
        NPTError: no such folder, or no metrics in it.
    """
    metrics = Path(output_dir) / "metrics.jsonl"
    if not metrics.is_file():
        raise NPTError(f"{output_dir}: no metrics.jsonl there; run `npt train` first or name its output folder")
    rows = read_json_lines(metrics)
    report = read_report(Path(output_dir) / "evaluation_report.json")
    folder = Path(output_dir) / "plots" if destination is None else destination
    written = []
    with malformed(output_dir):
        pictures = draw_run(rows, report)
    for picture in pictures:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{picture.name}.png").write_bytes(picture.png)
        (folder / f"{picture.name}.svg").write_text(picture.svg, encoding="utf-8")
        written.append(folder / f"{picture.name}.png")
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
    """The evaluation report, empty where there is none."""
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


def curve(rows: Rows, key: str) -> tuple[list[float], list[float]]:
    """Steps, ascending, and values; of a step that a resumed run logged again, the later value counts."""
    points = {row["step"]: row[key] for row in rows if "step" in row and row.get(key) is not None}
    steps = sorted(points)
    return steps, [points[step] for step in steps]


def _loss(figure: Figure, rows: Rows, report: dict[str, Any]) -> str:
    curves = [
        (key, *curve(rows, key), colour, style)
        for key, colour, style in (
            ("loss", BLUE, "--"),
            ("equivalence_loss", GREEN, "-"),
            ("regularization_loss", ORANGE, "-"),
        )
    ]
    # A logarithmic axis has no place for a loss that is zero throughout.
    curves = [curve for curve in curves if any(value > 0 for value in curve[2])]
    if not curves:
        return ""
    axes = figure.subplots()
    for key, steps, values, colour, style in curves:
        axes.plot(steps, values, color=colour, linestyle=style, marker=".", label=key.replace("_", " "))
    axes.set(xlabel="step", ylabel="loss", yscale="log", title="Training loss")
    axes.legend()
    return "Training loss over steps: " + ", ".join(
        f"{key} from {values[0]:.3g} to {values[-1]:.3g}" for key, _, values, *_ in curves
    )


def _ratio(figure: Figure, rows: Rows, report: dict[str, Any]) -> str:
    steps, values = curve(rows, "eval_perplexity_ratio")
    if not steps:
        return ""
    axes = figure.subplots()
    axes.axhspan(0.95, 1.05, color=GREY, alpha=0.12, label="target, 1.0 ± 0.05")
    axes.axhline(1, color=GREY, linewidth=1)
    axes.plot(steps, values, color=BLUE, marker="o", label="NPT / original")
    axes.set(xlabel="step", ylabel="perplexity ratio", title="Perplexity of the NPT model over the original's")
    axes.legend()
    return f"Perplexity ratio over steps, from {values[0]:.5f} to {values[-1]:.5f}, with the target band 0.95 to 1.05"


def _weight_delta(figure: Figure, rows: Rows, report: dict[str, Any]) -> str:
    """Over steps, and beside it per block, each with the norm of the exact value's delta."""
    steps, values = curve(rows, "mean_delta_norm")
    stats = report.get("evaluations", {}).get("weight_delta_stats") or {}
    per_layer = stats.get("per_layer") or {}
    lines = bool(steps) or "mean_frobenius" in stats
    panels = lines + bool(per_layer)
    if not panels:
        return ""
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
        figures.bars(axes[0], names, series)
        axes[0].set(xlabel="block", ylabel="mean over projections")
    return "Norm of the weight delta beside that of the exact reference, over steps and per block"


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


def _learning_rate(figure: Figure, rows: Rows, report: dict[str, Any]) -> str:
    steps, values = curve(rows, "learning_rate")
    if not steps:
        return ""
    axes = figure.subplots()
    axes.plot(steps, values, color=BLUE, marker=".")
    axes.set(xlabel="step", ylabel="learning rate", title="Learning rate")
    return f"Learning rate over steps, from {values[0]:.3g} to {values[-1]:.3g}"


def _layer_error(figure: Figure, rows: Rows, report: dict[str, Any]) -> str:
    calibration: dict[str, Any] = next((row["calibration"] for row in rows if "calibration" in row), {})
    layers: dict[str, Any] = report.get("evaluations", {}).get("layer_equivalence") or {}
    names = sorted({*calibration, *layers}, key=figures.block_number)
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
        return ""
    axes = figure.subplots()
    figures.bars(axes, names, series)
    axes.set(xlabel="block", ylabel="error of the update", title="Error of each block's update, relative")
    if any(value for _, values, _ in series for value in values):
        axes.set_yscale("log")
    return "Relative error of each converted block's update: " + ", ".join(label for label, *_ in series)


#: File name -> what draws it.
PLOTS: dict[str, Draw] = {
    "perplexity_ratio": _ratio,
    "loss": _loss,
    "kl_histogram": figures.kl_histogram,
    "kl_by_position": figures.kl_by_position,
    "layer_error": _layer_error,
    "residual_stream": figures.residual_stream,
    "weight_delta": _weight_delta,
    "delta_distribution": figures.delta_distribution,
    "learning_rate": _learning_rate,
}
