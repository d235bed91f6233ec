"""Commands that show runs: plots, the page, a comparison, a live view."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from npt.cli.app import app, console, say
from npt.cli.options import Run, place_of


@app.command()
def plot(
    run: Annotated[Path | None, typer.Argument(help="A run's output folder.", callback=place_of)] = None,
    output_dir: Annotated[Path, typer.Option("--output-dir", help="The same, as an option.", callback=place_of)] = Path(
        "outputs"
    ),
) -> None:
    """Draws the plots of a run, as PNG and SVG.

    They show metrics.jsonl and, if there is one, the report.
    """
    from npt.common.writable import check_folders
    from npt.report.plots import plot_run

    folder = output_dir if run is None else run
    if folder.is_dir():
        check_folders({"run": folder})
    for path in plot_run(folder):
        say(str(path))


@app.command()
def report(run: Run = Path("outputs")) -> None:
    """Writes report.html from what a run's output folder holds."""
    from npt.common.writable import check_folders
    from npt.report.page import write_page

    if run.is_dir():
        check_folders({"run": run})
    say(f"report: {write_page(run)}")


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Output folders of runs.", callback=place_of)],
    output: Annotated[Path, typer.Option("--output", help="Where the plot goes.", callback=place_of)] = Path(
        "comparison.png"
    ),
) -> None:
    """Sets runs side by side, in a table and a plot.

    The plot shows perplexity ratio and KL over steps.
    """
    from npt.common.writable import check_file
    from npt.report.compare import PLOT_KINDS, comparison_tables, plot_comparison, read_runs
    from npt.report.run_files import malformed

    found = read_runs(runs)
    check_file("--output", output, *PLOT_KINDS)
    with malformed(", ".join(map(str, runs))):
        tables, path = list(comparison_tables(found, console().width)), plot_comparison(found, output)
    for table in tables:
        console().print(table)
    say(f"plot: {path}" if path else "plot: none of the runs has two evaluations over steps to draw")


@app.command()
def watch(
    run: Run = Path("outputs"),
    interval: Annotated[float, typer.Option("--interval", min=0.1, max=3600, help="Seconds between two looks.")] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="Show it once and leave.")] = False,
) -> None:
    """Shows a live run until its report is written.

    Step, loss, perplexity ratio, KL and calibration.
    """
    from npt.report.watch import watch_run

    watch_run(run, console(), interval=interval, once=once)
