"""Plots of an evaluation report: how far apart the models are, where, and how large the weight deltas."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from npt.common.display import visible

#: Okabe-Ito: told apart by colour-blind readers too.
BLUE, ORANGE, GREEN, PINK, GREY = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#888888"
COLOURS = (BLUE, ORANGE, GREEN, PINK, "#56B4E9", "#D55E00")
LINES = ("-", "--", ":", "-.")
Rows = list[dict[str, Any]]


def _evaluations(report: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = report.get("evaluations") or {}
    return found


def kl_histogram(figure: Figure, rows: Rows, report: dict[str, Any]) -> str:
    """Share of tokens per third of a decade of KL, one line per corpus."""
    corpora: dict[str, Any] = _evaluations(report).get("corpora") or {}
    histograms: dict[str, Any] = {n: (c.get("divergence") or {}).get("kl_histogram") for n, c in corpora.items()}
    histograms = {n: h for n, h in histograms.items() if h and sum(h["counts"])}
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


def kl_by_position(figure: Figure, rows: Rows, report: dict[str, Any]) -> str:
    """Mean KL over the position in the context, past the length of calibration where it was measured."""
    data = _evaluations(report).get("kl_by_position") or {}
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


def residual_stream(figure: Figure, rows: Rows, report: dict[str, Any]) -> str:
    """How the error of the residual stream adds up over the blocks."""
    stream = _evaluations(report).get("residual_stream") or {}
    if not stream:
        return ""
    names = sorted(stream, key=block_number)
    values = [stream[name]["relative_error"] for name in names]
    axes = figure.subplots()
    axes.plot([block_number(name)[0] for name in names], values, color=BLUE, marker="o")
    axes.set(xlabel="after block", ylabel="relative error", ylim=(0, None), title="Error of the residual stream")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return f"Relative error of the residual stream after each block, from {values[0]:.2g} to {values[-1]:.2g}"


def delta_distribution(figure: Figure, rows: Rows, report: dict[str, Any]) -> str:
    """Per block and projection, the spread of |dW| over tokens beside that of the exact reference."""
    per_layer = (_evaluations(report).get("weight_delta_stats") or {}).get("per_layer") or {}
    entries: list[tuple[Any, ...]] = [
        (f"{block_number(layer)[0]} {name}", f["distribution"], f.get("exact_distribution"))
        for layer in sorted(per_layer, key=block_number)
        for name, f in per_layer[layer].items()
        if f.get("distribution")
    ]
    if not entries:
        return ""
    figure.set_size_inches(max(6.4, 0.45 * len(entries)), 3.6)
    axes = figure.subplots()
    for shift, colour, which, label in ((-0.16, BLUE, 1, "NPT"), (0.16, ORANGE, 2, "exact")):
        for x, entry in enumerate(entries):
            d = entry[which]
            if d is None:
                continue
            axes.plot(
                [x + shift] * 2, [d["p5"], d["p95"]], color=colour, linewidth=5, alpha=0.45, solid_capstyle="butt"
            )
            marker: dict[str, Any] = {"marker": "o" if which == 1 else "D", "markersize": 4, "linestyle": "none"}
            axes.plot(x + shift, d["median"], color=colour, **marker, label=label if x == 0 else None)
    axes.set_xticks(range(len(entries)), [name for name, *_ in entries], rotation=60, fontsize="small")
    axes.set(ylabel="norm of the weight delta", ylim=(0, None), title="Over tokens: median, 5 to 95 %")
    axes.legend()
    return "Spread of the weight delta's norm over tokens, per block and projection, NPT beside the exact reference"


def bars(axes: Any, names: list[str], series: list[tuple[str, list[float | None], str]]) -> None:
    """Groups of bars; a block without a value keeps its place, empty."""
    width = 0.8 / len(series)
    for index, (label, values, colour) in enumerate(series):
        points = [(x + index * width, value) for x, value in enumerate(values) if value is not None]
        axes.bar([x for x, _ in points], [value for _, value in points], width, label=label, color=colour)
    middle = width * (len(series) - 1) / 2
    axes.set_xticks([x + middle for x in range(len(names))], [name.removeprefix("layer_") for name in names])
    axes.margins(y=0.35)  # room for the legend
    axes.legend(ncols=len(series), fontsize="small")


def block_number(name: str) -> tuple[int, str]:
    """layer_10 comes after layer_9."""
    digits = name.removeprefix("layer_")
    return (int(digits) if digits.isdigit() else 0, name)


def _short(name: str) -> str:
    """A corpus by the end of its name: paths are long. Dollars would begin a formula."""
    name = visible(name).replace("$", r"\$")
    return name if len(name) <= 28 else "..." + name[-25:]
