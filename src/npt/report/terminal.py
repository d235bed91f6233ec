"""An evaluation report as a table in the terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice, zip_longest
from typing import Any, TypeVar

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from npt.common.display import blocks_text, model_name, visible
from npt.report.run_files import Report, section

T = TypeVar("T")

#: Stands for a figure that a report lacks.
NOT_MEASURED = "not measured"


def render_report(report: Report, console: Console, prompts: int = 2) -> None:
    """Prints a report: its main figures, the verdict on each expected outcome, and text of both models.

    A figure that the report lacks is shown as "not measured". prompts: how many prompts' texts are shown.
    """
    evaluations = section(report, "evaluations")
    for line in _model_lines(section(report, "model_config")):
        console.print(line)
    for table in _corpora_tables(section(report, "protocol"), evaluations, console.width):
        console.print(table)
    console.print(_delta_line(section(evaluations, "weight_delta_stats")))
    if prediction := section(report, "prediction"):
        console.print(_prediction_line(prediction))
    if grade := section(report, "grade").get("text"):
        console.print(f"The converted model is {_text(grade)}.")
    for note in report.get("notes") or []:
        console.print(f"[bold]note[/bold]  {_text(note)}")
    verdicts = Table.grid(padding=(0, 2))
    for name, outcome in section(report, "expected_outcomes").items():
        verdicts.add_row(f"  {escape(name)}", *_verdict(outcome))
    console.print(verdicts)
    samples = section(evaluations, "generation_samples")
    columns = (samples.get(key) or [] for key in ("npt_generations", "original_generations"))
    for npt, original in islice(zip_longest(*columns, fillvalue=NOT_MEASURED), prompts):
        same = "the same text" if npt == original else "different text"
        console.print(f"\n[bold]NPT[/bold]       {_text(npt)}\n[bold]original[/bold]  {_text(original)}\n({same})")


def headline(model: Report) -> str:
    """The converted blocks and their base in one sentence, from a report's model_config; empty where it names no blocks."""
    layers = model.get("npt_layers")
    base = model_name(model.get("base_model") or "the base model")
    text = blocks_text(layers, of=base, verb=True, most=8)
    return f"{text[0].upper()}{text[1:]} neuro-plastic" if layers else ""


def _model_lines(model: Report) -> Iterator[str]:
    """The converted blocks, the number of new parameters, and the base's whole name where the first line shortens it."""
    own, base = model.get("trainable_parameters"), model.get("base_parameters")
    share = f"{100 * own / base:.3g} %" if own is not None and base else f"share {NOT_MEASURED}"
    count = NOT_MEASURED if own is None else f"{own:,}"
    said = _text(headline(model) or f"converted blocks {NOT_MEASURED}")
    yield f"\n[bold]{said}[/bold]: {count} new parameters ({share}), rank {_text(model.get('rank'))}"
    name = model.get("base_model")
    if name and model_name(name) != name:
        yield f"base model: {_text(name)}"


def _corpora_tables(protocol: Report, evaluations: Report, width: int) -> Iterator[Table]:
    """One row per figure and one column per corpus; several tables where one would be wider than the terminal."""
    corpora = evaluations.get("corpora") or {"": {**evaluations, "tokens": protocol.get("tokens")}}
    context, stride, dtype, seed = (_text(protocol.get(k)) for k in ("context_length", "stride", "dtype", "seed"))
    groups = in_groups(list(corpora), width)
    for names in groups:
        table = _corpora_table({name: corpora[name] for name in names})
        if names is groups[-1]:
            table.caption = (
                f"context {context}, stride {stride}, {dtype}, seed {seed}; ± one standard error over blocks"
            )
            table.caption_justify = "left"
        yield table


def in_groups(columns: list[T], width: int) -> list[list[T]]:
    """The columns of figures in groups that fit a terminal of so many letters, beside a first column of labels."""
    size = max(1, (width - 24) // 23)
    return [columns[at : at + size] for at in range(0, len(columns), size)]


def _corpora_table(corpora: Report) -> Table:
    table = Table()
    table.add_column("")
    for name in corpora:
        table.add_column(escape(visible(name)), justify="right", overflow="fold")
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


def render_prediction(found: Report, console: Console) -> None:
    """Prints what `npt predict` found: each block's cost, and that of the converted ones together."""
    table = Table()
    for name in ("block", "mean KL alone", "share"):
        table.add_column(name, justify="right")
    alone = found["alone"]
    whole = sum(alone.values()) or 1.0
    for name, cost in alone.items():
        block = int(name.removeprefix("layer_"))
        chosen = "" if found["chosen"] is None or block in found["chosen"] else "  left as it is"
        table.add_row(str(block), f"{cost:.2e}", f"{100 * cost / whole:.1f} %{chosen}")
    console.print(table)
    named = blocks_text(found["blocks"], of=model_name(found.get("base_model") or "the base model"), most=8)
    console.print(f"converting {_text(named)}: mean KL {_predicted(found)}")


def _predicted(found: Report) -> str:
    mean, error = (number(found.get(key)) for key in ("mean_kl", "standard_error"))
    return f"{mean} ± {error} nats a token, from {number(found.get('tokens'))} tokens of calibration text held back"


def _prediction_line(found: Report) -> str:
    """The mean KL predicted of the calibrated model beside the measured one."""
    return f"after calibration: mean KL predicted {_predicted(found)}; measured {number(found.get('measured'))}"


def _verdict(outcome: Report) -> tuple[str, str]:
    """(value, target and whether it was met) of an expected outcome."""
    met = outcome.get("met")
    mark = NOT_MEASURED if met is None else "[green]met[/green]" if met else "[red]not met[/red]"
    value, target = escape(number(outcome.get("value"))), _text(outcome.get("target"))
    error = outcome.get("standard_error")
    return value + ("" if error is None else f" ± {error:.1g}"), f"target {target}: {mark}"


def _text(value: Any) -> str:
    """Text of a report as it is: nothing in it is taken for rich's markup."""
    return NOT_MEASURED if value is None else escape(visible(value))


def number(value: Any) -> str:
    """A float with five significant digits; a whole number or text as it is."""
    return f"{value:.5g}" if isinstance(value, float) else NOT_MEASURED if value is None else str(value)
