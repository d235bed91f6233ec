"""Reports and memory tables for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

NOT_MEASURED = "not measured"


def render_report(report: dict[str, Any], console: Console, prompts: int = 2) -> None:
    """A short table of an evaluation report, the verdict on each expected outcome, and text of both models."""
    model, evaluations = report["model_config"], report["evaluations"]
    share = 100 * model["trainable_parameters"] / max(1, model.get("base_parameters", 0))
    console.print(
        f"\nBlocks [bold]{model['npt_layers']}[/bold] of {escape(str(model['base_model']))} are neuro-plastic: "
        f"{model['trainable_parameters']:,} new parameters ({share:.3g} %), rank {model['rank']}"
    )
    console.print(_corpora_table(report))
    console.print(_delta_line(evaluations.get("weight_delta_stats")))
    for name, outcome in report["expected_outcomes"].items():
        mark = "[green]met[/green]" if outcome["met"] else "[red]not met[/red]"
        value = outcome["value"]
        console.print(f"  {name:<22} {_number(value):>9}  target {escape(str(outcome['target']))}: {mark}")
    samples = evaluations.get("generation_samples", {})
    columns = (samples.get(key, []) for key in ("prompts", "npt_generations", "original_generations"))
    for _prompt, npt, original in list(zip(*columns, strict=False))[:prompts]:
        same = "the same text" if npt == original else "different text"
        console.print(f"\n[bold]NPT[/bold]       {escape(npt)}\n[bold]original[/bold]  {escape(original)}\n({same})")


def _corpora_table(report: dict[str, Any]) -> Table:
    """Figures down, corpora across: it fits a narrow terminal."""
    protocol, corpora = report["protocol"], report["evaluations"]["corpora"]
    table = Table(
        caption=f"context {protocol['context_length']}, stride {protocol['stride']}, {protocol['dtype']}, "
        f"seed {protocol['seed']}; ± one standard error over blocks",
        caption_justify="left",
    )
    table.add_column("")
    for name in corpora:
        table.add_column(escape(name), justify="right")
    rows = (
        ("scored tokens", lambda r: f"{r['tokens']:,}"),
        ("perplexity, original", lambda r: f"{r['perplexity']['original_perplexity']:.4f}"),
        ("perplexity, NPT", lambda r: f"{r['perplexity']['npt_perplexity']:.4f}"),
        ("perplexity ratio", lambda r: _with_error(r["perplexity"], "perplexity_ratio")),
        ("mean KL", lambda r: _with_error(r["divergence"], "mean_kl")),
        ("median KL", lambda r: f"{r['divergence']['median_kl']:.5f}"),
        ("KL, 99 %", lambda r: f"{r['divergence']['kl_p99']:.4f}"),
        ("same top token", lambda r: f"{100 * r['divergence']['top1_agreement']:.2f} %"),
    )
    for label, value in rows:
        table.add_row(label, *(value(result) for result in corpora.values()))
    return table


def _with_error(figures: dict[str, float], name: str) -> str:
    error = figures.get(f"{name}_standard_error")
    return f"{figures[name]:.5f}" + ("" if error is None else f" ± {error:.5f}")


def _delta_line(stats: dict[str, Any] | None) -> str:
    if not stats:
        return f"weight delta: {NOT_MEASURED}"
    return (
        f"weight delta: mean norm {_number(stats['mean_frobenius'])} (exact reference "
        f"{_number(stats['exact_frobenius'])}), {100 * stats['relative_frobenius']:.2f} % of the weight's, "
        f"root-mean-square entry {_number(stats['rms_entry'])}"
    )


def _number(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else NOT_MEASURED if value is None else str(value)


def render_memory(rows: Sequence[Any], console: Console) -> None:
    """A table of `npt.memory.MemoryRow`s."""
    table = Table(title="memory of per-token weight deltas", title_justify="left")
    for column in ("what", "bytes", "how"):
        table.add_column(column, justify="right" if column == "bytes" else "left")
    for row in rows:
        table.add_row(escape(row.what), human_bytes(row.bytes), escape(row.how))
    console.print(table)


def human_bytes(count: float) -> str:
    """1536 -> "1.50 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1024
    return f"{count:.2f} TiB"
