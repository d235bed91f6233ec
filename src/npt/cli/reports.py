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
    """Draws the plots of a run from metrics.jsonl and, if there is one, its report, as PNG and SVG."""
    from npt.common.writable import check_folders
    from npt.report.plots import plot_run

    folder = output_dir if run is None else run
    if folder.is_dir():
        check_folders({"run": folder})
    for path in plot_run(folder):
        say(str(path))


@app.command()
def report(run: Run = Path("outputs")) -> None:
    """Writes report.html, one self-contained page, from what a run's output folder holds."""
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
    """Runs side by side: one table, and one plot of perplexity ratio and KL over steps."""
    from npt.common.writable import check_file
    from npt.report.compare import PLOT_KINDS, comparison_table, plot_comparison, read_runs
    from npt.report.run_files import malformed

    found = read_runs(runs)
    check_file("--output", output, *PLOT_KINDS)
    with malformed(", ".join(map(str, runs))):
        table, path = comparison_table(found), plot_comparison(found, output)
    console.print(table)
    say(f"plot: {path}" if path else "plot: none of the runs has an evaluation over steps to draw")


@app.command()
def watch(
    run: Run = Path("outputs"),
    interval: Annotated[float, typer.Option("--interval", min=0.1, max=3600, help="Seconds between two looks.")] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="Show it once and leave.")] = False,
) -> None:
    """Shows a live run: step, loss, perplexity ratio, KL, calibration; leaves when the report is written."""
    from npt.report.watch import watch_run

    watch_run(run, console, interval=interval, once=once)
