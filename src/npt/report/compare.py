"""`npt compare`: several runs side by side, in one table and one plot."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.markup import escape
from rich.table import Table

from npt.common.display import model_name, ranges, visible
from npt.common.places import place
from npt.errors import NPTError
from npt.evaluation.verdict import UNKNOWN_SHARE, grade
from npt.report.run_files import METRICS, REPORT_JSON, Report, Rows, curve, read_json_lines, read_report, section
from npt.report.style import COLOURS, LINES, MARKERS, plain
from npt.report.terminal import NOT_MEASURED, figure_with_error, in_groups, number

#: Suffixes of the files that a plot can be written to.
PLOT_KINDS = (".png", ".svg", ".pdf", ".jpg")
#: (name, evaluation report, rows of metrics.jsonl)
Run = tuple[str, Report, Rows]
#: Options of a conversion; those that differ between the runs are shown.
_OPTIONS = (
    "base_model",
    "npt_layers",
    "rank",
    "key",
    "carry",
    "gain",
    "gain_units",
    "low_rank_at",
    "target_projections",
)


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """The runs of these output folders. Where one of a run's two files is missing, its report or rows are empty.

    Raises:
        NPTError: a folder has neither file, or one is damaged.
    """
    runs: list[Run] = []
    for folder in folders:
        metrics, report = place(folder) / METRICS, place(folder) / REPORT_JSON
        if not metrics.is_file() and not report.is_file():
            raise NPTError(f"{folder}: neither {REPORT_JSON} nor {METRICS} there; name a run's output folder")
        rows = read_json_lines(metrics) if metrics.is_file() else []
        runs.append((str(folder), read_report(report), rows))
    return runs


def comparison_tables(runs: Sequence[Run], width: int) -> Iterator[Table]:
    """One row per figure and one column per run; of the options only those that differ.

    width: letters of the terminal. Runs that do not fit beside each other come in further tables.
    """
    rows = list(_rows(runs))
    for columns in in_groups(list(range(len(runs))), width):
        table = Table()
        table.add_column("", overflow="fold")
        for column in columns:
            table.add_column(escape(visible(runs[column][0])), justify="right", overflow="fold")
        for label, values in rows:
            if values is None:
                table.add_section()
            if label:
                table.add_row(label, *(values[column] for column in columns if values))
        yield table


def _rows(runs: Sequence[Run]) -> Iterator[tuple[str, Sequence[str] | None]]:
    """(label, one text per run) of every row. A row without texts begins a section, with its label where it has one."""
    configs = [section(report, "model_config") for _, report, _ in runs]
    for option in _OPTIONS:
        values = [config.get(option) for config in configs]
        known = [value for value, config in zip(values, configs, strict=True) if config]
        if any(value != known[0] for value in known):
            yield option, [escape(_option(option, value, known)) for value in values]
    yield "new parameters", [number(config.get("trainable_parameters")) for config in configs]
    for corpus in dict.fromkeys(name for _, report, _ in runs for name in _corpora(report)):
        found = [section(_corpora(report), corpus) for _, report, _ in runs]
        yield f"[bold]{escape(visible(corpus))}[/bold]", None
        for label, group, key, show in (
            ("perplexity ratio", "perplexity", "perplexity_ratio", "{:.5f}".format),
            ("mean KL", "divergence", "mean_kl", "{:.5f}".format),
            ("KL, 99.9 %", "divergence", "kl_p999", "{:.4f}".format),
            ("same top token", "divergence", "top1_agreement", "{:.2%}".format),
        ):
            yield label, [figure_with_error(section(figures, group), key, show) for figures in found]
    yield "", None
    stats = [section(report, "evaluations", "weight_delta_stats") for _, report, _ in runs]
    for label, key in (
        ("RMS entry of dW", "rms_entry"),
        ("norm of dW", "mean_frobenius"),
        ("exact", "exact_frobenius"),
    ):
        yield label, [number(s.get(key)) for s in stats]
    yield "as near as", [_grade(report) for _, report, _ in runs]


def _option(name: str, value: Any, values: Sequence[Any]) -> str:
    """A run's option in a cell: blocks as ranges, and a base's short name where that tells the bases apart."""
    if value is None:
        return NOT_MEASURED
    if name == "npt_layers":
        return ranges(value)
    if name == "base_model" and len(set(map(model_name, values))) == len(set(map(str, values))):
        return model_name(value)
    return visible(number(value))


def _corpora(report: Report) -> Report:
    """{corpus: its figures}."""
    return section(report, "evaluations", "corpora")


def _grade(report: Report) -> str:
    """The quantisation that is as near to the original as the run's model is; a question mark after it where the scored text
    is one that the vocabulary does not know.
    """
    kl = section(report, "evaluations", "divergence").get("mean_kl")
    if kl is None:
        return number(None)
    bits = grade(kl)["bits"]
    first: dict[str, Any] = next(iter(_corpora(report).values()), {})
    spoilt = " (?)" if first.get("unknown_tokens", 0) > UNKNOWN_SHARE else ""
    return ("further than 2-bit" if bits is None else f"{bits}-bit") + spoilt


def plot_comparison(runs: Sequence[Run], path: Path) -> Path | None:
    """Writes perplexity ratio and mean KL over steps, one line per run; None where no run has two evaluations to join."""
    panels = (("eval_perplexity_ratio", "perplexity ratio"), ("eval_mean_kl", "mean KL, nats"))
    curves = {(i, key): curve(rows, key) for i, (_, _, rows) in enumerate(runs) for key, _ in panels}
    if all(len(steps) < 2 for steps, _ in curves.values()):
        return None
    figure = Figure(figsize=(9.6, 3.8 + 0.2 * len(runs)), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (key, label) in zip(figure.subplots(1, 2), panels, strict=True):
        for i, (name, _, _) in enumerate(runs):
            steps, values = curves[i, key]
            if steps:
                look = {"color": COLOURS[i % 6], "linestyle": LINES[i % 4], "marker": MARKERS[i % 5], "markersize": 4}
                axes.plot(steps, values, label=plain(name), **look)
        axes.set(xlabel="step", ylabel=label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return path
