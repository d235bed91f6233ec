"""How plots look: colours, lines, text that follows a page's light or dark theme, and the drawing of one picture."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from npt.common.display import visible
from npt.report.run_files import Report, Rows

logger = logging.getLogger(__name__)

#: The colours of Okabe and Ito, which colour-blind readers can tell apart.
BLUE, ORANGE, GREEN, PINK, GREY = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#888888"
#: Of the first, second, ... line of a plot with one line per corpus or run.
COLOURS = (BLUE, ORANGE, GREEN, PINK, "#56B4E9", "#D55E00")
LINES = ("-", "--", ":", "-.")
#: Axes and letters. A colour of its own, so that it can be found in an SVG and replaced by the page's.
INK = "#1b1c1d"
_STYLE: Any = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
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

#: Draws into a figure and returns a description in words, or "" where there is nothing to draw.
Draw = Callable[[Figure, Rows, Report], str]
#: Bars of one kind: (label, one value per block or None, colour).
Series = tuple[str, list[float | None], str]


@dataclass
class Picture:
    """A drawn plot.

    name: the file name without its suffix. alt: what the plot shows, in words. png: the PNG file; empty where it was not
    asked for. svg: the SVG element. wide: True for a plot that takes a page's whole width.
    """

    name: str
    alt: str
    png: bytes
    svg: str
    wide: bool


def draw_picture(name: str, draw: Draw, rows: Rows, report: Report, with_png: bool) -> Picture | None:
    """One plot as PNG and SVG; None where there is nothing to draw. The same data give the same bytes."""
    with matplotlib.rc_context(_STYLE):
        # Without pyplot there is no figure to close, and the caller's backend stays as it is.
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
    width, height = figure.get_size_inches()
    return Picture(name, alt, png.getvalue(), _themed(svg.getvalue()), wide=width > 2.5 * height)


def _themed(svg: str) -> str:
    """The SVG element alone, with its own style sheet and colours that follow the page's theme."""
    for colour, (variable, *_) in _THEME.items():
        svg = svg.replace(colour.lower(), f"var({variable})")
    return svg[svg.index("<svg") :].replace("<defs>", f"{_SVG_STYLE}<defs>", 1)


def bars(axes: Axes, names: Sequence[str], series: Sequence[Series]) -> None:
    """Draws one group of bars per block. A block without a value keeps its place, empty."""
    width = 0.8 / len(series)
    for index, (label, values, colour) in enumerate(series):
        points = [(x + index * width, value) for x, value in enumerate(values) if value is not None]
        axes.bar([x for x, _ in points], [value for _, value in points], width, label=label, color=colour)
    middle = width * (len(series) - 1) / 2
    axes.set_xticks([x + middle for x in range(len(names))], [name.removeprefix("layer_") for name in names])
    axes.margins(y=0.35)  # room for the legend
    axes.legend(ncols=len(series), fontsize="small")


def block_number(name: str) -> tuple[int, str]:
    """A key that sorts a report's blocks by their number: layer_10 comes after layer_9."""
    digits = name.removeprefix("layer_")
    return (int(digits) if digits.isdigit() else 0, name)


def plain(text: str) -> str:
    """Text that can be shown in a plot: made visible, and no dollar sign begins a formula."""
    return visible(text).replace("$", r"\$")
