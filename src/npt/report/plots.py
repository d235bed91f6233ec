"""All plots of a run: their order, and how they are drawn and written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from npt.common.places import place
from npt.errors import NPTError
from npt.report.curves import learning_rate, loss, perplexity_ratio, weight_delta
from npt.report.distributions import delta_distribution, kl_by_position, kl_histogram, layer_error, residual_stream
from npt.report.run_files import (
    METRICS,
    PLOTS_FOLDER,
    REPORT_JSON,
    Report,
    Rows,
    malformed,
    read_json_lines,
    read_report,
)
from npt.report.style import Draw, Picture, Single, draw_picture

#: {file name without suffix: the function that draws it}, in the order of the page.
PLOTS: dict[str, Draw] = {
    "perplexity_ratio": perplexity_ratio,
    "loss": loss,
    "kl_histogram": kl_histogram,
    "kl_by_position": kl_by_position,
    "layer_error": layer_error,
    "residual_stream": residual_stream,
    "weight_delta": weight_delta,
    "delta_distribution": delta_distribution,
    "learning_rate": learning_rate,
}


def draw_run(rows: Rows, report: Report) -> list[Picture]:
    """All plots that there are data for, in the order of `PLOTS`."""
    return draw_all(rows, report)[0]


def draw_all(
    rows: Rows, report: Report, *, png: bool = True, plots: Mapping[str, Draw] | None = None
) -> tuple[list[Picture], list[Single]]:
    """(the plots that there are data for, the figures of those that would have a single point), in the order of `plots`, which
    are `PLOTS` where none are given.
    """
    drawn = [draw_picture(name, draw, rows, report, png) for name, draw in (plots or PLOTS).items()]
    return [one for one in drawn if isinstance(one, Picture)], [one for one in drawn if isinstance(one, Single)]


def plot_run(output_dir: Path, destination: Path | None = None) -> list[Path]:
    """Draws what a run's files hold into <output_dir>/plots, as PNG and SVG. A plot without data, or with a single point, is
    skipped and logged; the log line of a single point holds its figures.

    Args:
        destination: another folder for the plots.

    Returns:
        The PNG paths; each has its SVG beside it.

    Raises:
        NPTError: no such folder, no metrics in it, or nothing to draw.
    """
    output_dir = place(output_dir)
    metrics = output_dir / METRICS
    if not metrics.is_file():
        raise NPTError(f"{output_dir}: no {METRICS} there; run `npt train` first or name its output folder")
    rows = read_json_lines(metrics)
    report = read_report(output_dir / REPORT_JSON)
    folder = output_dir / PLOTS_FOLDER if destination is None else place(destination)
    written = []
    with malformed(output_dir):
        pictures, singles = draw_all(rows, report)
    for picture in pictures:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{picture.name}.png").write_bytes(picture.png)
        (folder / f"{picture.name}.svg").write_text(picture.svg, encoding="utf-8")
        written.append(folder / f"{picture.name}.png")
    if not written:
        found = f"a single point each ({'; '.join(map(str, singles))})" if singles else "no logged step"
        raise NPTError(f"{metrics}: {found} to draw; lower training.logging_steps or train longer")
    return written
