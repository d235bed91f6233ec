"""Plots of an evaluation report: how far apart the models are, where, and how large the weight deltas are.

Each function draws into a figure and returns a description in words, "" where there is nothing to draw, or a single point's
figures.
"""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from npt.report.run_files import Report, Rows, section
from npt.report.style import (
    BLUE,
    COLOURS,
    GREEN,
    HEIGHT,
    LINES,
    ORANGE,
    WIDTH,
    Series,
    Single,
    block_number,
    block_ticks,
    legend_below,
    logarithmic,
    per_block,
    plain,
    spacing,
)


def kl_histogram(figure: Figure, rows: Rows, report: Report) -> str:
    """Share of tokens per third of a decade of KL, one line per corpus."""
    corpora = section(report, "evaluations", "corpora")
    histograms = {name: section(corpus, "divergence", "kl_histogram") for name, corpus in corpora.items()}
    histograms = {name: histogram for name, histogram in histograms.items() if histogram and sum(histogram["counts"])}
    if not histograms:
        return ""
    axes, means = figure.subplots(), []
    for i, (name, histogram) in enumerate(histograms.items()):
        total, edges = sum(histogram["counts"]), histogram["edges"]
        share = [count / total for count in histogram["counts"]]
        mean = corpora[name]["divergence"]["mean_kl"]
        means.append(f"{_short(name)} {mean:.2g}")
        axes.stairs(
            share, edges, color=COLOURS[i % 6], linestyle=LINES[i % 4], label=f"{_short(name)}, mean {mean:.2g}"
        )
    axes.set(xscale="log", xlabel="KL divergence of a token, nats", ylabel="share of tokens", title="KL per token")
    legend_below(figure, axes)
    return f"Histogram of the KL divergence per token, logarithmic; means: {', '.join(means)}"


def kl_by_position(figure: Figure, rows: Rows, report: Report) -> str | Single:
    """Mean KL over the position in the context, marked where it exceeds the length used for calibration."""
    data = section(report, "evaluations", "kl_by_position")
    if not data.get("mean_kl"):
        return ""
    starts, length = data["from"], data["calibration_length"]
    if len(data["mean_kl"]) == 1:
        return Single(
            "Mean KL", {"": data["mean_kl"][0]}, f"over all {data['context_length']} positions of the context"
        )
    axes = figure.subplots()
    axes.plot(starts, data["mean_kl"], color=BLUE, marker="o", markersize=4)
    if data["context_length"] > length:
        axes.axvline(length, color=ORANGE, linestyle="--", label="length of calibration and training")
        legend_below(figure, axes)
    axes.set(xlabel="position", ylabel="mean KL, nats", ylim=(0, None), title="KL by position in the context")
    return (
        f"Mean KL by position up to {data['context_length']} tokens; calibration used {length}; "
        f"first bin {data['mean_kl'][0]:.2g}, last {data['mean_kl'][-1]:.2g}"
    )


def layer_error(figure: Figure, rows: Rows, report: Report) -> str | Single:
    """Relative error of each converted block's update: before and after calibration, and at the end."""
    calibration: Report = next((row["calibration"] for row in rows if "calibration" in row), {})
    layers: Report = report.get("evaluations", {}).get("layer_equivalence") or {}
    names = sorted({*calibration, *layers}, key=block_number)
    series: list[Series] = [
        (label, [source.get(name, {}).get(key) for name in names], colour, marker)
        for label, source, key, colour, marker in (
            ("before calibration", calibration, "error_before", ORANGE, "D"),
            ("after calibration", calibration, "error_after", GREEN, "s"),
            ("at the end", layers, "relative_error", BLUE, "o"),
        )
    ]
    series = [one for one in series if any(value is not None for value in one[1])]
    if not series:
        return ""
    blocks = [block_number(name)[0] for name in names]
    if len(blocks) == 1:
        values = {label: value for label, (value,), *_ in series if value is not None}
        return Single("Relative error of the update", values, f"of block {blocks[0]}")
    axes = figure.subplots()
    per_block(axes, blocks, series)
    axes.set(ylabel="error of the update", title="Error of each block's update, relative")
    if any(value for _, values, *_ in series for value in values):
        logarithmic(axes)
    legend_below(figure, axes)
    return "Relative error of each converted block's update: " + ", ".join(label for label, *_ in series)


def residual_stream(figure: Figure, rows: Rows, report: Report) -> str | Single:
    """Relative error of the residual stream after each block: how errors add up over the depth."""
    stream = section(report, "evaluations", "residual_stream")
    if not stream:
        return ""
    names = sorted(stream, key=block_number)
    blocks, values = [block_number(name)[0] for name in names], [stream[name]["relative_error"] for name in names]
    if len(blocks) == 1:
        return Single("Relative error of the residual stream", {"": values[0]}, f"after block {blocks[0]}")
    axes = figure.subplots()
    per_block(axes, blocks, [("NPT", values, BLUE, "o")])
    axes.set(xlabel="after block", ylabel="relative error", ylim=(0, None), title="Error of the residual stream")
    return f"Relative error of the residual stream after each block, from {values[0]:.2g} to {values[-1]:.2g}"


def delta_distribution(figure: Figure, rows: Rows, report: Report) -> str:
    """Spread of |dW| over tokens, per block, beside that of the exact value's dW: one panel per projection."""
    per_layer = section(report, "evaluations", "weight_delta_stats", "per_layer")
    found: dict[str, list[tuple[int, Report, Report | None]]] = {}
    for layer in sorted(per_layer, key=block_number):
        for name, f in per_layer[layer].items():
            if f.get("distribution"):
                found.setdefault(name, []).append(
                    (block_number(layer)[0], f["distribution"], f.get("exact_distribution"))
                )
    if not found:
        return ""
    blocks = sorted({block for entries in found.values() for block, *_ in entries})
    figure.set_size_inches(WIDTH, HEIGHT * (0.45 + 0.45 * len(found)))
    panels = figure.subplots(len(found), 1, squeeze=False, sharex=True)[:, 0]
    for axes, (name, entries) in zip(panels, found.items(), strict=True):
        _spreads(axes, [(block, own) for block, own, _ in entries], -0.22, blocks, (BLUE, "o", "NPT"))
        _spreads(axes, [(block, exact) for block, _, exact in entries], 0.22, blocks, (ORANGE, "D", "exact"))
        axes.set(ylabel=plain(name), ylim=(0, None))
    block_ticks(panels[-1], blocks)
    panels[0].set_title("Norm of the weight delta over tokens: median, 5 to 95 %")
    legend_below(figure, panels[0])
    return f"Spread of the weight delta's norm over tokens, per block, for {', '.join(found)}, NPT beside the exact reference"


def _spreads(
    axes: Axes,
    spreads: Sequence[tuple[int, Report | None]],
    shift: float,
    blocks: Sequence[int],
    look: tuple[str, str, str],
) -> None:
    """Per block a bar from the 5th to the 95th percentile and a marker at the median, beside its tick by `shift`."""
    known, (colour, marker, label) = [(block + shift, spread) for block, spread in spreads if spread], look
    at, width = [x for x, _ in known], min(5.0, 0.38 * spacing(blocks))
    low, high = ([spread[key] for _, spread in known] for key in ("p5", "p95"))
    axes.vlines(at, low, high, color=colour, linewidth=width, alpha=0.45)
    medians = [spread["median"] for _, spread in known]
    axes.plot(at, medians, color=colour, marker=marker, markersize=max(1.6, width), linestyle="none", label=label)


def _short(name: str) -> str:
    """A corpus's name in a legend: the end of it where it is long, as paths are."""
    name = plain(name)
    return name if len(name) <= 28 else "..." + name[-25:]
