"""Plots over the steps of a run: loss, perplexity ratio, norm of the weight delta, learning rate.

Each function draws into a figure and returns a description in words, or "" where there is nothing to draw.
"""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from npt.report.run_files import Report, Rows, curve
from npt.report.style import BLUE, GREEN, GREY, ORANGE, Series, bars


def loss(figure: Figure, rows: Rows, report: Report) -> str:
    """The training loss and its parts, on a logarithmic axis."""
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


def perplexity_ratio(figure: Figure, rows: Rows, report: Report) -> str:
    """Perplexity of the NPT model over the original's, with the target band."""
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


def weight_delta(figure: Figure, rows: Rows, report: Report) -> str:
    """Mean norm of dW over steps and, in a second panel, per block; each beside that of the exact value's dW."""
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
        series: list[Series] = [
            (label, [_mean_over_projections(per_layer[name], key) for name in names], colour)
            for label, key, colour in (("NPT", "frobenius", BLUE), ("exact", "exact_frobenius", ORANGE))
        ]
        bars(axes[0], names, series)
        axes[0].set(xlabel="block", ylabel="mean over projections")
    return "Norm of the weight delta beside that of the exact reference, over steps and per block"


def _delta_over_steps(axes: Axes, steps: list[float], values: list[float], stats: Report) -> None:
    if steps:
        axes.plot(steps, values, color=BLUE, marker=".", label="NPT, last training batch")
    if "exact_frobenius" in stats:
        axes.axhline(stats["exact_frobenius"], color=ORANGE, label="exact, evaluation text")
    if "mean_frobenius" in stats:
        axes.axhline(stats["mean_frobenius"], color=BLUE, linestyle=":", label="NPT, evaluation text")
    highest = max([*values, stats.get("exact_frobenius", 0), stats.get("mean_frobenius", 0)])
    axes.set(xlabel="step", ylabel="mean Frobenius norm", ylim=(0, 1.4 * highest or None))  # room for the legend
    axes.legend()


def _mean_over_projections(projections: Mapping[str, Mapping[str, float]], key: str) -> float | None:
    values = [figures[key] for figures in projections.values() if figures.get(key) is not None]
    return sum(values) / len(values) if values else None


def learning_rate(figure: Figure, rows: Rows, report: Report) -> str:
    """The learning rate."""
    steps, values = curve(rows, "learning_rate")
    if not steps:
        return ""
    axes = figure.subplots()
    axes.plot(steps, values, color=BLUE, marker=".")
    axes.set(xlabel="step", ylabel="learning rate", title="Learning rate")
    return f"Learning rate over steps, from {values[0]:.3g} to {values[-1]:.3g}"
