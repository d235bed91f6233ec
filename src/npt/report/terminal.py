"""Reports and memory tables for the terminal."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import islice, zip_longest
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from npt.common.display import human_bytes, visible

NOT_MEASURED = "not measured"


def render_report(report: dict[str, Any], console: Console, prompts: int = 2) -> None:
    """A short table of an evaluation report, the verdict on each expected outcome, and text of both models.

    A field the report lacks is shown as "not measured".
    """
    evaluations = report.get("evaluations") or {}
    console.print(_headline(report.get("model_config") or {}))
    console.print(_corpora_table(report.get("protocol") or {}, evaluations))
    console.print(_delta_line(evaluations.get("weight_delta_stats") or {}))
    if (report.get("grade") or {}).get("text"):
        console.print(f"The converted model is {_text(report['grade']['text'])}.")
    for note in report.get("notes") or []:
        console.print(f"[bold]note[/bold]  {_text(note)}")
    for name, outcome in (report.get("expected_outcomes") or {}).items():
        console.print(_verdict(name, outcome))
    samples = evaluations.get("generation_samples") or {}
    columns = (samples.get(key) or [] for key in ("npt_generations", "original_generations"))
    for npt, original in islice(zip_longest(*columns, fillvalue=NOT_MEASURED), prompts):
        same = "the same text" if npt == original else "different text"
        console.print(f"\n[bold]NPT[/bold]       {_text(npt)}\n[bold]original[/bold]  {_text(original)}\n({same})")


def _headline(model: Mapping[str, Any]) -> str:
    own, base = model.get("trainable_parameters"), model.get("base_parameters")
    share = f"{100 * own / base:.3g} %" if own is not None and base else f"share {NOT_MEASURED}"
    count = NOT_MEASURED if own is None else f"{own:,}"
    return (
        f"\nBlocks [bold]{_text(model.get('npt_layers'))}[/bold] of {_text(model.get('base_model'))} are neuro-plastic: "
        f"{count} new parameters ({share}), rank {_text(model.get('rank'))}"
    )


def _corpora_table(protocol: Mapping[str, Any], evaluations: Mapping[str, Any]) -> Table:
    """Figures down, corpora across: it fits a narrow terminal."""
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
        table.add_row(label, *(figure_with_error(result.get(group) or {}, key, show) for result in corpora.values()))
    return table


def figure_with_error(figures: Mapping[str, Any], key: str, show: Callable[[Any], str]) -> str:
    """One figure with its standard error, where there is one."""
    value, error = figures.get(key), figures.get(f"{key}_standard_error")
    if value is None:
        return NOT_MEASURED
    return (show(value) + ("" if error is None else f" ± {show(error)}")).replace("%", " %")


def _delta_line(stats: Mapping[str, Any]) -> str:
    if not stats:
        return f"weight delta: {NOT_MEASURED}"
    relative = stats.get("relative_frobenius")
    share = NOT_MEASURED if relative is None else f"{100 * relative:.2f} %"
    return (
        f"weight delta: mean norm {number(stats.get('mean_frobenius'))} (exact reference "
        f"{number(stats.get('exact_frobenius'))}), {share} of the weight's, "
        f"root-mean-square entry {number(stats.get('rms_entry'))}"
    )


def _verdict(name: str, outcome: Mapping[str, Any]) -> str:
    met = outcome.get("met")
    mark = NOT_MEASURED if met is None else "[green]met[/green]" if met else "[red]not met[/red]"
    value, target = escape(number(outcome.get("value"))), _text(outcome.get("target"))
    error = outcome.get("standard_error")
    value += "" if error is None else f" ± {error:.1g}"
    return f"  {escape(name):<22} {value:>18}  target {target}: {mark}"


def _text(value: Any) -> str:
    """Text of a model or a file name is never markup."""
    return NOT_MEASURED if value is None else escape(visible(value))


def number(value: Any) -> str:
    """A figure with five significant digits, a whole number or text as it is."""
    return f"{value:.5g}" if isinstance(value, float) else NOT_MEASURED if value is None else str(value)


def render_memory(rows: Sequence[Any], console: Console) -> None:
    """A table of `npt.planning.formed_deltas.MemoryRow`s."""
    table = Table(title="memory of per-token weight deltas", title_justify="left")
    for column in ("what", "bytes", "how"):
        table.add_column(column, justify="right" if column == "bytes" else "left")
    for row in rows:
        table.add_row(escape(row.what), human_bytes(row.bytes), escape(row.how))
    console.print(table)
