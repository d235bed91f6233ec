"""Plots of an evaluation report: how far apart the models are, where, and how large the weight deltas are.

Each function draws into a figure and returns a description in words, or "" where there is nothing to draw.
"""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from npt.report.run_files import Report, Rows, section
from npt.report.style import BLUE, COLOURS, GREEN, LINES, ORANGE, Series, bars, block_number, plain


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
    axes.legend()
    return f"Histogram of the KL divergence per token, logarithmic; means: {', '.join(means)}"


def kl_by_position(figure: Figure, rows: Rows, report: Report) -> str:
    """Mean KL over the position in the context, marked where it exceeds the length used for calibration."""
    data = section(report, "evaluations", "kl_by_position")
    if not data.get("mean_kl"):
        return ""
    axes, starts, length = figure.subplots(), data["from"], data["calibration_length"]
    axes.plot(starts, data["mean_kl"], color=BLUE, marker="o")
    if data["context_length"] > length:
        axes.axvline(length, color=ORANGE, linestyle="--", label="length of calibration and training")
        axes.legend()
    axes.set(xlabel="position", ylabel="mean KL, nats", ylim=(0, None), title="KL by position in the context")
    return (
        f"Mean KL by position up to {data['context_length']} tokens; calibration used {length}; "
        f"first bin {data['mean_kl'][0]:.2g}, last {data['mean_kl'][-1]:.2g}"
    )


def layer_error(figure: Figure, rows: Rows, report: Report) -> str:
    """Relative error of each converted block's update: before and after calibration, and at the end."""
    calibration: Report = next((row["calibration"] for row in rows if "calibration" in row), {})
    layers: Report = report.get("evaluations", {}).get("layer_equivalence") or {}
    names = sorted({*calibration, *layers}, key=block_number)
    series: list[Series] = [
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
    bars(axes, names, series)
    axes.set(xlabel="block", ylabel="error of the update", title="Error of each block's update, relative")
    if any(value for _, values, _ in series for value in values):
        axes.set_yscale("log")
    return "Relative error of each converted block's update: " + ", ".join(label for label, *_ in series)


def residual_stream(figure: Figure, rows: Rows, report: Report) -> str:
    """Relative error of the residual stream after each block: how errors add up over the depth."""
    stream = section(report, "evaluations", "residual_stream")
    if not stream:
        return ""
    names = sorted(stream, key=block_number)
    values = [stream[name]["relative_error"] for name in names]
    axes = figure.subplots()
    axes.plot([block_number(name)[0] for name in names], values, color=BLUE, marker="o")
    axes.set(xlabel="after block", ylabel="relative error", ylim=(0, None), title="Error of the residual stream")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return f"Relative error of the residual stream after each block, from {values[0]:.2g} to {values[-1]:.2g}"


def delta_distribution(figure: Figure, rows: Rows, report: Report) -> str:
    """Spread of |dW| over tokens, per block and projection, beside that of the exact value's dW."""
    per_layer = section(report, "evaluations", "weight_delta_stats", "per_layer")
    entries: list[tuple[str, Report, Report | None]] = [
        (f"{block_number(layer)[0]} {name}", f["distribution"], f.get("exact_distribution"))
        for layer in sorted(per_layer, key=block_number)
        for name, f in per_layer[layer].items()
        if f.get("distribution")
    ]
    if not entries:
        return ""
    figure.set_size_inches(max(6.4, 0.45 * len(entries)), 3.6)
    axes = figure.subplots()
    _spreads(axes, [own for _, own, _ in entries], -0.16, BLUE, "o", "NPT")
    _spreads(axes, [exact for _, _, exact in entries], 0.16, ORANGE, "D", "exact")
    axes.set_xticks(range(len(entries)), [name for name, *_ in entries], rotation=60, fontsize="small")
    axes.set(ylabel="norm of the weight delta", ylim=(0, None), title="Over tokens: median, 5 to 95 %")
    axes.legend()
    return "Spread of the weight delta's norm over tokens, per block and projection, NPT beside the exact reference"


def _spreads(axes: Axes, spreads: Sequence[Report | None], shift: float, colour: str, marker: str, label: str) -> None:
    """One bar from the 5th to the 95th percentile and a marker at the median per entry, beside its tick by `shift`."""
    for x, spread in enumerate(spreads):
        if spread is None:
            continue
        ends, text = [spread["p5"], spread["p95"]], label if x == 0 else None
        axes.plot([x + shift] * 2, ends, color=colour, linewidth=5, alpha=0.45, solid_capstyle="butt")
        axes.plot(x + shift, spread["median"], color=colour, marker=marker, markersize=4, linestyle="none", label=text)


def _short(name: str) -> str:
    """A corpus's name in a legend: the end of it where it is long, as paths are."""
    name = plain(name)
    return name if len(name) <= 28 else "..." + name[-25:]
