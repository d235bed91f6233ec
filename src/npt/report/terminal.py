"""An evaluation report as a table in the terminal."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice, zip_longest
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from npt.common.display import visible
from npt.report.run_files import Report, section

#: Stands for a figure that a report lacks.
NOT_MEASURED = "not measured"


def render_report(report: Report, console: Console, prompts: int = 2) -> None:
    """Prints a report: its main figures, the verdict on each expected outcome, and text of both models.

    A figure that the report lacks is shown as "not measured". prompts: how many prompts' texts are shown.
    """
    evaluations = section(report, "evaluations")
    console.print(_headline(section(report, "model_config")))
    console.print(_corpora_table(section(report, "protocol"), evaluations))
    console.print(_delta_line(section(evaluations, "weight_delta_stats")))
    if grade := section(report, "grade").get("text"):
        console.print(f"The converted model is {_text(grade)}.")
    for note in report.get("notes") or []:
        console.print(f"[bold]note[/bold]  {_text(note)}")
    for name, outcome in section(report, "expected_outcomes").items():
        console.print(_verdict(name, outcome))
    samples = section(evaluations, "generation_samples")
    columns = (samples.get(key) or [] for key in ("npt_generations", "original_generations"))
    for npt, original in islice(zip_longest(*columns, fillvalue=NOT_MEASURED), prompts):
        same = "the same text" if npt == original else "different text"
        console.print(f"\n[bold]NPT[/bold]       {_text(npt)}\n[bold]original[/bold]  {_text(original)}\n({same})")


def _headline(model: Report) -> str:
    """The converted blocks, the base, and the number of new parameters."""
    own, base = model.get("trainable_parameters"), model.get("base_parameters")
    share = f"{100 * own / base:.3g} %" if own is not None and base else f"share {NOT_MEASURED}"
    count = NOT_MEASURED if own is None else f"{own:,}"
    return (
        f"\nBlocks [bold]{_text(model.get('npt_layers'))}[/bold] of {_text(model.get('base_model'))} are neuro-plastic: "
        f"{count} new parameters ({share}), rank {_text(model.get('rank'))}"
    )


def _corpora_table(protocol: Report, evaluations: Report) -> Table:
    """One row per figure and one column per corpus, so that it fits a narrow terminal."""
    corpora = evaluations.get("corpora") or {"": {**evaluations, "tokens": protocol.get("tokens")}}
    context, stride, dtype, seed = (_text(protocol.get(k)) for k in ("context_length", "stride", "dtype", "seed"))
    table = Table(
        caption=f"context {context}, stride {stride}, {dtype}, seed {seed}; ± one standard error over blocks",
        caption_justify="left",
    )
    table.add_column("")
    for name in corpora:
        table.add_column(escape(visible(name)), justify="right")
    rows: tuple[tuple[str, str, str, Callable[[Any], str]], ...] = (
        ("perplexity, original", "perplexity", "original_perplexity", "{:.4f}".format),
        ("perplexity, NPT", "perplexity", "npt_perplexity", "{:.4f}".format),
        ("perplexity ratio", "perplexity", "perplexity_ratio", "{:.5f}".format),
        ("mean KL", "divergence", "mean_kl", "{:.5f}".format),
        ("median KL", "divergence", "median_kl", "{:.5f}".format),
        ("KL, 99 %", "divergence", "kl_p99", "{:.4f}".format),
        ("same top token", "divergence", "top1_agreement", "{:.2%}".format),
    )
    table.add_row("scored tokens", *(figure_with_error(result, "tokens", "{:,}".format) for result in corpora.values()))
    for label, group, key, show in rows:
        table.add_row(label, *(figure_with_error(section(result, group), key, show) for result in corpora.values()))
    return table


def figure_with_error(figures: Report, key: str, show: Callable[[Any], str]) -> str:
    """A figure as `show` writes it, with its standard error where the report has one."""
    value, error = figures.get(key), figures.get(f"{key}_standard_error")
    if value is None:
        return NOT_MEASURED
    return (show(value) + ("" if error is None else f" ± {show(error)}")).replace("%", " %")


def _delta_line(stats: Report) -> str:
    """The size of the weight deltas in one line."""
    if not stats:
        return f"weight delta: {NOT_MEASURED}"
    relative = stats.get("relative_frobenius")
    share = NOT_MEASURED if relative is None else f"{100 * relative:.2f} %"
    return (
        f"weight delta: mean norm {number(stats.get('mean_frobenius'))} (exact reference "
        f"{number(stats.get('exact_frobenius'))}), {share} of the weight's, "
        f"root-mean-square entry {number(stats.get('rms_entry'))}"
    )


def _verdict(name: str, outcome: Report) -> str:
    """One expected outcome: its value, its target, and whether it was met."""
    met = outcome.get("met")
    mark = NOT_MEASURED if met is None else "[green]met[/green]" if met else "[red]not met[/red]"
    value, target = escape(number(outcome.get("value"))), _text(outcome.get("target"))
    error = outcome.get("standard_error")
    value += "" if error is None else f" ± {error:.1g}"
    return f"  {escape(name):<22} {value:>18}  target {target}: {mark}"


def _text(value: Any) -> str:
    """Text of a report as it is: nothing in it is taken for rich's markup."""
    return NOT_MEASURED if value is None else escape(visible(value))


def number(value: Any) -> str:
    """A float with five significant digits; a whole number or text as it is."""
    return f"{value:.5g}" if isinstance(value, float) else NOT_MEASURED if value is None else str(value)
