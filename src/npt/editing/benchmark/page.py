"""The page of a comparison: table, plot, texts before and after, what was lost. No script, no network, all text escaped."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from npt.common.display import model_name
from npt.common.files import write_text
from npt.common.places import place
from npt.editing.benchmark.figures import score, with_error
from npt.editing.benchmark.rows import Kept, Row, cells
from npt.report.page import images_of, page_environment
from npt.report.run_files import Report, Rows
from npt.report.style import COLOURS, HEIGHT, MARKERS, WIDTH, Picture, draw_picture, legend_below, plain

#: What the figures mean, beside docs/editing.md.
MEANINGS = (
    ("efficacy, paraphrase", "the text written behind the prompt, or behind another wording, begins with the target"),
    ("locality", "behind a neighbour's prompt, the same sentence as the base's"),
    ("ordering", "behind a neighbour's prompt, what is right stays likelier than the target"),
    ("S", "harmonic mean of efficacy, paraphrase and locality"),
    ("forced, forced all, gap", "share of the target's tokens, and of whole targets, that are the likeliest when those before "
     "are given; the latter less efficacy"),
    ("kl, perplexity", "divergence from the base over running text, in nats a token; its perplexity over the base's"),
    ("fluency, skill", "n-gram entropy of longer text, in bits; share right on prompts that hold their own answer"),
    ("passes, seconds, bytes", "cost of one edit; size of all that is written together"),
)  # fmt: skip


def write_page(kept: Kept, path: Path) -> Path:
    """Writes one HTML page of the rows; its path.

    Raises:
        RunError: the disk is full or gone.
    """
    path = place(path)
    write_text(path, render(kept))
    return path


def render(kept: Kept) -> str:
    """The page's HTML."""
    head, lines = cells(kept.rows)
    picture = draw_picture("score", draw_scores, [], {"rows": kept.rows}, False)
    records = max(len(row.outcomes) for row in kept.rows)
    methods = len({row.method for row in kept.rows})
    return page_environment().get_template("editing.html.j2").render(
        model=model_name(kept.about.get("model", "a model")),
        lead=f"{methods} method{'s' * (methods > 1)}, up to {records} records each.",
        head=head,
        lines=lines,
        meanings=MEANINGS,
        images=images_of([picture] if isinstance(picture, Picture) else []),
        rows=[_texts(row) for row in kept.rows],
        protocol=list(_protocol(kept)),
    )  # fmt: skip


def label_of(row: Row) -> str:
    """A row's method and batch size."""
    if row.batch == 1:
        return f"{row.method}, single edits"
    return f"{row.method}, {row.batch} {'one after the other' if row.sequential else 'together'}"


def _texts(row: Row) -> dict[str, Any]:
    count = len(row.outcomes)
    failed = sum(outcome.efficacy < 1 for outcome in row.outcomes)
    moved = sum(outcome.locality is not None and outcome.locality < 1 for outcome in row.outcomes)
    return {
        "label": label_of(row),
        "shown": [example for example in row.examples if example.right],
        "wrong": [example for example in row.examples if not example.right],
        "lost": f"{failed} of {count} facts do not hold; of {moved} records some neighbour's text changed.",
    }


def _protocol(kept: Kept) -> list[tuple[str, str]]:
    found = {**kept.about, **kept.arguments}
    return [(name, _said(value)) for name, value in found.items() if value not in (None, [], "")]


def _said(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {inner}" for name, inner in value.items())
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def draw_scores(figure: Figure, _: Rows, report: Report) -> str:
    """S of every row with its standard error, a line for each method and a colour for each batch size."""
    rows: Sequence[Row] = report["rows"]
    methods = list(dict.fromkeys(row.method for row in rows))
    kinds = list(dict.fromkeys((row.batch, row.sequential) for row in rows))
    figure.set_size_inches(WIDTH, max(HEIGHT, 0.8 + 0.3 * len(methods) * max(1.0, 0.6 * len(kinds))))
    axes, said = figure.subplots(), []
    for number, kind in enumerate(kinds):
        own = [row for row in rows if (row.batch, row.sequential) == kind]
        found = [with_error(row.outcomes, score) for row in own]
        shift = 0.6 * ((number + 0.5) / len(kinds) - 0.5)
        axes.errorbar(
            [value for value, _ in found],
            [methods.index(row.method) + shift for row in own],
            xerr=[0.0 if error != error else error for _, error in found],
            fmt=MARKERS[number % len(MARKERS)], color=COLOURS[number % len(COLOURS)], capsize=2, markersize=4,
            label=plain(label_of(own[0]).split(", ", 1)[1]),
        )  # fmt: skip
        said += [f"{label_of(row)} {value:.3g}" for row, (value, _) in zip(own, found, strict=True)]
    axes.set_yticks(range(len(methods)), [plain(method) for method in methods])
    axes.set_ylim(len(methods) - 0.4, -0.6)
    axes.set(xlabel="S", xlim=(-0.02, 1.02), title="S by method")
    legend_below(figure, axes)
    return "S by method: " + ", ".join(said)
