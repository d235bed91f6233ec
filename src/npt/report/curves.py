"""Plots over the steps of a run: loss, perplexity ratio, norm of the weight delta, learning rate.

Each function draws into a figure and returns a description in words, "" where there is nothing to draw, or a single point's
figures.
"""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from npt.report.run_files import Report, Rows, curve
from npt.report.style import (
    BLUE,
    GREEN,
    GREY,
    HEIGHT,
    ORANGE,
    WIDTH,
    Series,
    Single,
    block_number,
    legend_below,
    logarithmic,
    per_block,
)


def loss(figure: Figure, rows: Rows, report: Report) -> str | Single:
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
    if all(len(steps) == 1 for _, steps, *_ in curves):
        parts = {key.replace("_", " "): values[0] for key, _, values, *_ in curves}
        return Single("Training loss", parts, f"at step {curves[0][1][0]}")
    axes = figure.subplots()
    for key, steps, values, colour, style in curves:
        axes.plot(
            steps,
            values,
            color=colour,
            linestyle=style,
            marker=".",
            label=key.replace("_", " "),
            zorder=2 + (style == "--"),
        )
    axes.set(ylabel="loss", title="Training loss")
    logarithmic(axes)
    _over_steps(axes)
    legend_below(figure, axes)
    return "Training loss over steps: " + ", ".join(
        f"{key} from {values[0]:.3g} to {values[-1]:.3g}" for key, _, values, *_ in curves
    )


def perplexity_ratio(figure: Figure, rows: Rows, report: Report) -> str | Single:
    """Perplexity of the NPT model over the original's, with the target band."""
    steps, values = curve(rows, "eval_perplexity_ratio")
    if not steps:
        return ""
    if len(steps) == 1:
        return Single("Perplexity of the NPT model over the original's", {"": values[0]}, f"at step {steps[0]}")
    axes = figure.subplots()
    axes.axhspan(0.95, 1.05, color=GREY, alpha=0.12, label="target, 1.0 ± 0.05")
    axes.axhline(1, color=GREY, linewidth=1)
    axes.plot(steps, values, color=BLUE, marker="o", label="NPT / original")
    axes.set(ylabel="perplexity ratio", title="Perplexity of the NPT model over the original's")
    _over_steps(axes)
    legend_below(figure, axes)
    return f"Perplexity ratio over steps, from {values[0]:.5f} to {values[-1]:.5f}, with the target band 0.95 to 1.05"


def held_out_loss(figure: Figure, rows: Rows, report: Report) -> str | Single:
    """The loss on the text that chooses the best adapter of a fine-tuning, and the base's."""
    steps, values = curve(rows, "eval_loss")
    base = curve(rows, "eval_base_loss")[1]
    if not steps or not base:
        return ""
    if len(steps) == 1:
        return Single("Loss on the text that chooses the adapter", {"": values[0]}, f"at step {steps[0]}")
    axes = figure.subplots()
    axes.axhline(base[-1], color=GREY, linewidth=1, label="base")
    axes.plot(steps, values, color=BLUE, marker="o", label="fine-tuned")
    axes.set(ylabel="nats per token", title="Loss on the text that chooses the adapter")
    _over_steps(axes)
    legend_below(figure, axes)
    return f"Loss over steps, from {values[0]:.4f} to {values[-1]:.4f}; the base's is {base[-1]:.4f}"


def weight_delta(figure: Figure, rows: Rows, report: Report) -> str | Single:
    """Mean norm of dW over steps and, in a second panel, per block; each beside that of the exact value's dW."""
    steps, values = curve(rows, "mean_delta_norm")
    stats = report.get("evaluations", {}).get("weight_delta_stats") or {}
    per_layer = stats.get("per_layer") or {}
    lines, blocks = len(steps) > 1, len(per_layer) > 1
    if not lines and not blocks:
        return _single_delta(steps, values, stats, per_layer)
    panels = lines + blocks
    figure.set_size_inches(WIDTH, (1 + 0.7 * (panels - 1)) * HEIGHT)
    axes = list(figure.subplots(panels, 1, squeeze=False)[:, 0])
    axes[0].set_title("Norm of the weight delta per token")
    if lines:
        _delta_over_steps(axes[0], steps, values, stats)
        axes[0].legend()
    if blocks:
        names = sorted(per_layer, key=block_number)
        series: list[Series] = [
            (label, [_mean_over_projections(per_layer[name], key) for name in names], colour, marker)
            for label, key, colour, marker in (
                ("exact", "exact_frobenius", ORANGE, "D"),
                ("NPT", "frobenius", BLUE, "o"),
            )
        ]
        per_block(axes[-1], [block_number(name)[0] for name in names], series)
        axes[-1].set(
            ylabel="mean over projections", ylim=(0, 1.25 * axes[-1].dataLim.y1 or None)
        )  # room for the legend
        axes[-1].legend(ncols=2)
    where = " and ".join(["over steps"] * lines + ["per block"] * blocks)
    return f"Norm of the weight delta beside that of the exact reference, {where}"


def _single_delta(steps: list[float], values: list[float], stats: Report, per_layer: Report) -> Single | str:
    """The weight delta of a run with a single step logged and a single block, or one of the two."""
    if "mean_frobenius" in stats:
        found = {"NPT": stats["mean_frobenius"], "exact": stats.get("exact_frobenius")}
        where = f"in block {block_number(next(iter(per_layer)))[0]}" if per_layer else "over all blocks"
    elif steps:
        found, where = {"NPT": values[0]}, f"at step {steps[0]}"
    else:
        return ""
    return Single("Norm of the weight delta per token", {k: v for k, v in found.items() if v is not None}, where)


def _delta_over_steps(axes: Axes, steps: list[float], values: list[float], stats: Report) -> None:
    axes.plot(steps, values, color=BLUE, marker=".", label="NPT, last training batch")
    if "exact_frobenius" in stats:
        axes.axhline(stats["exact_frobenius"], color=ORANGE, linestyle="--", label="exact, evaluation text")
    if "mean_frobenius" in stats:
        axes.axhline(stats["mean_frobenius"], color=BLUE, linestyle=":", label="NPT, evaluation text")
    highest = max([*values, stats.get("exact_frobenius", 0), stats.get("mean_frobenius", 0)])
    axes.set(ylabel="mean Frobenius norm", ylim=(0, 1.6 * highest or None))  # room for the legend
    _over_steps(axes)


def _mean_over_projections(projections: Mapping[str, Mapping[str, float]], key: str) -> float | None:
    values = [figures[key] for figures in projections.values() if figures.get(key) is not None]
    return sum(values) / len(values) if values else None


def learning_rate(figure: Figure, rows: Rows, report: Report) -> str | Single:
    """The learning rate."""
    steps, values = curve(rows, "learning_rate")
    if not steps:
        return ""
    if len(steps) == 1:
        return Single("Learning rate", {"": values[0]}, f"at step {steps[0]}")
    axes = figure.subplots()
    axes.plot(steps, values, color=BLUE, marker=".")
    axes.set(ylabel="learning rate", title="Learning rate")
    _over_steps(axes)
    return f"Learning rate over steps, from {values[0]:.3g} to {values[-1]:.3g}"


def _over_steps(axes: Axes) -> None:
    """Labels an axis of training steps: whole numbers."""
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
