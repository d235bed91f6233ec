"""The report of a fine-tuning, as a table in the terminal and as a page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from npt.common.display import visible
from npt.common.files import write_text
from npt.report.curves import held_out_loss, learning_rate, loss
from npt.report.page import page_environment, plots_of
from npt.report.run_files import FINETUNE_JSON, METRICS, PAGE, Report, malformed, read_json_lines, read_report, section
from npt.report.style import Draw
from npt.report.terminal import NOT_MEASURED, figure_with_error, headline

#: The plots of the page, in their order.
PLOTS: dict[str, Draw] = {"held_out_loss": held_out_loss, "loss": loss, "learning_rate": learning_rate}
#: {method: its name for readers}.
NAMES = {"base": "base", "npt": "NPT", "lora": "LoRA", "dora": "DoRA"}


def render_finetuning(report: Report, console: Console) -> None:
    """Prints a report: the start, and per corpus a table with a row for each method."""
    console.print(f"\n[bold]{escape(visible(headline(section(report, 'model_config'))))}[/bold], fine-tuned")
    console.print(escape(start_line(report)))
    for name, rows in tables(report).items():
        table = Table(title=escape(visible(name)), title_justify="left")
        for column in rows[0]:
            table.add_column(column, justify="left" if column == "method" else "right")
        for row in rows:
            table.add_row(*(escape(value) for value in row.values()))
        console.print(table)
    console.print("± one standard error over blocks; differences are paired with the base's")
    for note in report.get("notes") or []:
        console.print(f"[bold]note[/bold]  {escape(visible(note))}")


def write_finetune_page(output_dir: Path, destination: Path | None = None) -> Path:
    """Writes <output_dir>/report.html, or `destination`, from finetune_report.json and metrics.jsonl there.

    Raises:
        NPTError: the report is damaged.
    """
    report, missing = read_report(output_dir / FINETUNE_JSON), list[str]()
    metrics = output_dir / METRICS
    rows = read_json_lines(metrics) if metrics.is_file() else []
    target = output_dir / PAGE if destination is None else destination
    with malformed(output_dir):
        images, _, missing = plots_of(rows, {}, missing, PLOTS)
        page = (
            page_environment()
            .get_template("finetune.html.j2")
            .render(
                **{"model_config": {}, "protocol": {}, "methods": {}, **report},
                headline=headline(section(report, "model_config")),
                first=start_line(report),
                tables=tables(report),
                images=images,
                missing=missing,
                not_measured=NOT_MEASURED,
            )
        )
    write_text(target, page)
    return target


def start_line(report: Report) -> str:
    """The first step's loss beside the base's, in one sentence."""
    start = section(report, "start")
    first, base = start.get("first_loss"), start.get("first_base_loss")
    if first is None or base is None:
        return f"first loss: {NOT_MEASURED}"
    return f"first loss {first:.5f}, the base's on the same tokens {base:.5f}"


def tables(report: Report) -> dict[str, list[dict[str, str]]]:
    """{title: rows} of every corpus: what was gained on held-out text, then what was lost on each general text."""
    methods, held_out = section(report, "methods"), section(report, "protocol").get("held_out")
    found = {}
    for name in section(methods, "npt", "figures"):
        gained = name == held_out
        title = f"gained: held-out text of {name}" if gained else f"lost: {name}"
        found[title] = [_row(method, figures, name, gained) for method, figures in methods.items()]
    return found


def _row(method: str, of_method: Mapping[str, Any], corpus: str, gained: bool) -> dict[str, str]:
    figures = section(of_method, "figures", corpus)
    trained, rank, rate = (of_method.get(name) for name in ("trained_parameters", "rank", "learning_rate"))
    row = {
        "method": NAMES.get(method, method),
        "trained": "0" if trained is None else f"{trained:,}",
        "rank": "" if rank is None else str(rank),
        "learning rate": "" if rate is None else f"{rate:g}",
    }
    return row | dict(_gained(method, figures) if gained else _lost(method, figures))


def _gained(method: str, figures: Report) -> Iterator[tuple[str, str]]:
    is_base = method == "base"
    yield "loss", figure_with_error(figures, "loss", "{:.4f}".format)
    yield "vs base", "" if is_base else _signed(figures, "loss_difference")
    yield "right tokens", figure_with_error(figures, "accuracy", "{:.1%}".format)


def _lost(method: str, figures: Report) -> Iterator[tuple[str, str]]:
    is_base = method == "base"
    yield "mean KL", "0" if is_base else figure_with_error(figures, "mean_kl", "{:.5f}".format)
    yield "perplexity ratio", "1" if is_base else figure_with_error(figures, "perplexity_ratio", "{:.4f}".format)
    yield "loss", figure_with_error(figures, "loss", "{:.4f}".format)


def _signed(figures: Report, key: str) -> str:
    """A difference with its sign, and its standard error without."""
    value = figures.get(key)
    shown = figure_with_error(figures, key, "{:.4f}".format)
    return f"+{shown}" if isinstance(value, float) and value > 0 else shown
