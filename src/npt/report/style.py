"""How plots look: colours, lines, text that follows a page's light or dark theme, and the drawing of one picture."""

from __future__ import annotations

import io
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from npt.common.display import visible
from npt.report.run_files import Report, Rows

logger = logging.getLogger(__name__)

#: The colours of Okabe and Ito, which colour-blind readers can tell apart.
BLUE, ORANGE, GREEN, PINK, GREY = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#888888"
#: Of the first, second, ... line of a plot with one line per corpus or run.
COLOURS = (BLUE, ORANGE, GREEN, PINK, "#56B4E9", "#D55E00")
LINES = ("-", "--", ":", "-.")
MARKERS = ("o", "s", "D", "^", "v")
#: Inches of a plot. So narrow that its letters stay readable on a phone, where a picture is as wide as the page.
WIDTH, HEIGHT = 5.0, 3.1
#: Axes and letters. A colour of its own, so that it can be found in an SVG and replaced by the page's.
INK = "#1b1c1d"
_STYLE: Any = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
    "axes.titlesize": "medium",
    "legend.fontsize": "small",
    "legend.framealpha": 0.0,
    "svg.fonttype": "none",
    "svg.hashsalt": "npt",
}
#: Colours that an SVG takes from its own style sheet: {colour: (CSS variable, on a light page, on a dark page)}.
_THEME = {INK: ("--ink", INK, "#e8e8e6"), BLUE: ("--blue", BLUE, "#56a8de"), GREEN: ("--green", GREEN, "#3fc39c")}
_SVG_STYLE = (
    "<style>svg{{font-family:system-ui,sans-serif;{}}}@media (prefers-color-scheme:dark){{svg{{{}}}}}</style>".format(
        *(";".join(f"{entry[0]}:{entry[i]}" for entry in _THEME.values()) for i in (1, 2))
    )
)

#: Values of one kind: (label, one per block or None, colour, marker).
Series = tuple[str, Sequence[float | None], str, str]


@dataclass
class Picture:
    """A drawn plot.

    name: the file name without its suffix. alt: what the plot shows, in words. png: the PNG file; empty where it was not
    asked for. svg: the SVG element.
    """

    name: str
    alt: str
    png: bytes
    svg: str


@dataclass(frozen=True)
class Single:
    """The figures of a plot that would have a single point, to be written as text.

    title: what is measured. values: {label: number}. where: the point, such as "at step 0". name: the plot's, set by
    `draw_picture`.
    """

    title: str
    values: Mapping[str, float]
    where: str
    name: str = ""

    def __str__(self) -> str:
        values = ", ".join(f"{label} {value:.5g}".strip() for label, value in self.values.items())
        return f"{self.title} {self.where}: {values}"


#: Draws into a figure and returns a description in words, "" where there is nothing to draw, or a single point's figures.
Draw = Callable[[Figure, Rows, Report], str | Single]


def draw_picture(name: str, draw: Draw, rows: Rows, report: Report, with_png: bool) -> Picture | Single | None:
    """One plot as PNG and SVG; None where there is nothing to draw. The same data give the same bytes."""
    with matplotlib.rc_context(_STYLE):
        # Without pyplot there is no figure to close, and the caller's backend stays as it is.
        figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
        FigureCanvasAgg(figure)
        drawn = draw(figure, rows, report)
        if isinstance(drawn, Single):
            single = replace(drawn, name=name, values={label: float(value) for label, value in drawn.values.items()})
            logger.info("%s: a single point, so no plot: %s", name, single)
            return single
        if not drawn:
            logger.info("%s: nothing to draw", name)
            return None
        for axes in figure.axes:
            axes.grid(alpha=0.3)
        png, svg = io.BytesIO(), io.StringIO()
        if with_png:
            figure.savefig(png, dpi=200, format="png")
        figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return Picture(name, drawn, png.getvalue(), _themed(svg.getvalue()))


def _themed(svg: str) -> str:
    """The SVG element alone, with its own style sheet and colours that follow the page's theme."""
    for colour, (variable, *_) in _THEME.items():
        svg = svg.replace(colour.lower(), f"var({variable})")
    return svg[svg.index("<svg") :].replace("<defs>", f"{_SVG_STYLE}<defs>", 1)


def per_block(axes: Axes, blocks: Sequence[int], series: Sequence[Series]) -> None:
    """Draws one marker per block, at the block's number, and lines between neighbours. A block without a value has none."""
    size = marker_size(blocks)
    for index, (label, values, colour, marker) in enumerate(series):
        points: list[tuple[float, float]] = []
        for block, value in zip(blocks, values, strict=True):
            if value is None:
                continue
            if points and block > points[-1][0] + 1:
                points.append((block - 0.5, math.nan))  # no line across blocks that are not converted
            points.append((block, value))
        axes.plot(
            [x for x, _ in points], [y for _, y in points], color=colour, linestyle=LINES[index % 4], linewidth=1,
            marker=marker, markersize=size * (1 + 0.4 * (len(series) - 1 - index)), label=label,
            fillstyle="full" if index == len(series) - 1 else "none",  # equal values: the last one lies within the others
        )  # fmt: skip
    block_ticks(axes, blocks)


def marker_size(blocks: Sequence[int]) -> float:
    """Points across a marker, so that those of neighbouring blocks stay apart. blocks: ascending."""
    return min(5.0, max(2.0, 0.7 * spacing(blocks)))


def spacing(blocks: Sequence[int]) -> float:
    """Points between two neighbouring blocks on a plot's axis."""
    return 60 * WIDTH / (blocks[-1] - blocks[0] + 1.4)


def block_ticks(axes: Axes, blocks: Sequence[int]) -> None:
    """Ticks at whole numbers: every block where there is room, a few round numbers otherwise. blocks: ascending."""
    axes.set_xlim(blocks[0] - 0.7, blocks[-1] + 0.7)
    if blocks[-1] - blocks[0] < 16:
        axes.set_xticks(blocks)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    axes.set_xlabel("block")


def legend_below(figure: Figure, axes: Axes) -> None:
    """A legend under the plot, where it hides no line; the figure grows by its rows."""
    handles, labels = axes.get_legend_handles_labels()
    rows = next(rows for rows in range(1, len(labels) + 1) if _legend_width(labels, rows) < 72 or rows == len(labels))
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + 0.2 * rows)
    figure.legend(handles, labels, loc="outside lower center", ncols=math.ceil(len(labels) / rows))


def _legend_width(labels: Sequence[str], rows: int) -> int:
    """Letters across a legend of so many rows; a column's line and gap take as much as eight letters."""
    return sum(8 + max(map(len, labels[at : at + rows])) for at in range(0, len(labels), rows))


def logarithmic(axes: Axes) -> None:
    """A logarithmic y axis with numbers such as 0.02 at its ticks, also where it covers less than a decade."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def block_number(name: str) -> tuple[int, str]:
    """A key that sorts a report's blocks by their number: layer_10 comes after layer_9."""
    digits = name.removeprefix("layer_")
    return (int(digits) if digits.isdigit() else 0, name)


def plain(text: str) -> str:
    """Text that can be shown in a plot: made visible, and no dollar sign begins a formula."""
    return visible(text).replace("$", r"\$")
