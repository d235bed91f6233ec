"""Tables and plots of benchmarks/results/absorbing-*--test.json, for docs/editing.md: python -m benchmarks.absorbing.tables"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.absorbing.__main__ import KIND
from benchmarks.absorbing.cases import FILES
from benchmarks.absorbing.choice import ARMS, Chosen, caught_up, curve, left_out, measured, summary
from benchmarks.kept import Kept, Record, reported
from benchmarks.tables import RESULTS
from npt.common.display import human_bytes, markdown
from npt.common.files import write_text
from npt.report.run_files import Report, Rows
from npt.report.style import BLUE, COLOURS, Picture, draw_picture, legend_below
from scripts.marked import ROOT, write_section

DOCUMENT = "docs/editing.md"
LABELS = {
    "nothing": "nothing", "context": "context in front", "absorb": "absorb, closed form", "descended": "absorb",
    "gradient": "LoRA by gradient",
}  # fmt: skip
HEAD = ("arm", "KL recovered", "right answers given", "KL on general text", "seconds", "peak memory")


def kept_absorbing(folder: Path = RESULTS) -> dict[str, Kept]:
    """{model's name in its file: its figures on the test contexts}."""
    return reported(KIND, folder)


def section_of(name: str) -> str:
    """The name of a table's markers."""
    return f"absorbing {name}"


def plot_of(name: str) -> Path:
    """The file of a model's plot."""
    return RESULTS / f"absorbing-{name}.svg"


def absorbing_section(name: str, kept: Kept) -> str:
    """The tables of both kinds of context, what was left out, and the plot."""
    parts = [text for kind in FILES if (text := kind_table(kind, kept))]
    alt = "Share of the KL recovered over seconds, absorb and the LoRA by gradient"
    return "\n\n".join([*parts, f"![{alt}](../{plot_of(name).relative_to(ROOT)})"])


def kind_table(kind: str, kept: Kept) -> str:
    """The table of one kind of context, "" where none was tried."""
    found, small = measured(kept.contexts, kind), left_out(kept.contexts, kind)
    if not found and not small:
        return ""
    chosen, limit = Chosen(**kept.about["chosen"][kind]), kept.about["limit"]
    names = ", ".join(f"{name} ({effect:.2f} nats)" for name, effect in small.items())
    note = f"Left out, as the context itself moves the model too little: {names}." if small else "None was left out."
    if not found:
        return f"**{kind.capitalize()}s.** {note}"
    rows = summary(list(found.values()), chosen)
    line = (
        f"**{len(found)} {kind}s**, `{kept.about['model']}`, {kept.about['machine']['device']}. LoRA by gradient: rate "
        f"{chosen.rate:g}, beta {chosen.beta:g}, {chosen.steps} steps, {chosen.tokens} tokens. {note}"
    )
    cells = [
        [
            LABELS[arm], shown(rows[arm]["recovered"], "percent"), shown(rows[arm]["given"], "percent"),
            shown(rows[arm]["text_kl"], "kl"), shown(rows[arm]["seconds"], "seconds"), shown(rows[arm]["peak"], "bytes"),
        ]
        for arm in ARMS
        if rows[arm]["recovered"] is not None
    ]  # fmt: skip
    steps = kept.about["steps"][-1]
    caught = f"Within {steps} steps the LoRA gets as far as {_caught(found, 'absorb', chosen, limit)}"
    if all("descended" in record for record in found.values()):
        caught += f", and as far as {_caught(found, 'descended', chosen, limit)}"
    return "\n\n".join([line, markdown(HEAD, cells), f"{caught}."])


def _caught(found: Mapping[str, Record], arm: str, chosen: Chosen, limit: float) -> str:
    count, ratio = caught_up(list(found.values()), arm, chosen, limit)
    times = "" if ratio is None else f", after a median of {ratio:.1f} times its seconds"
    return f"`{LABELS[arm]}` in {count} of {len(found)} contexts{times}"


def shown(value: tuple[float, float] | None, form: str) -> str:
    """A mean with its standard error, "" where there is none."""
    if value is None:
        return ""
    mean, error = value
    if form == "bytes":
        return human_bytes(mean)
    scale, digits, unit = {"percent": (100, 1, " %"), "loss": (1, 3, ""), "kl": (1, 4, ""), "seconds": (1, 1, "")}[form]
    error_text = "" if math.isnan(error) else f" ± {scale * error:.{digits}f}"
    return f"{scale * mean:.{digits}f}{error_text}{unit}"


def drawn(kept: Kept) -> Picture:
    """The share of the KL recovered over seconds: the gradient's curve, and absorbing's point."""

    def draw(figure: Figure, rows: Rows, report: Report) -> str:
        axes = figure.subplots()
        for colour, kind in zip((BLUE, COLOURS[1]), FILES, strict=True):
            records = list(measured(kept.contexts, kind).values())
            if not records:
                continue
            chosen = Chosen(**kept.about["chosen"][kind])
            steps = list(curve(records, chosen))
            times, shares, errors = [s[1] for s in steps], [s[2][0] for s in steps], [_error(s[2]) for s in steps]
            axes.errorbar(times, shares, errors, color=colour, marker="o", label=f"{kind}s, LoRA by gradient")
            means = summary(records, chosen)
            for arm, marker in (("absorb", "*"), ("descended", "P")):
                seconds, share = means[arm]["seconds"], means[arm]["recovered"]
                if seconds is not None and share is not None:
                    label, error = f"{kind}s, {LABELS[arm]}", [_error(share)]
                    axes.errorbar(
                        [seconds[0]], [share[0]], error, color=colour, marker=marker, ms=11, ls="", label=label
                    )
        axes.set_xscale("log")
        axes.set_xlabel("seconds, without those of questions and answers")
        axes.set_ylabel("share of the KL recovered")
        legend_below(figure, axes)
        return "Share of the KL recovered over seconds, absorb and the LoRA by gradient"

    picture = draw_picture("absorbing", draw, [], {}, with_png=False)
    assert isinstance(picture, Picture)
    return picture


def _error(value: tuple[float, float]) -> float:
    return 0.0 if math.isnan(value[1]) else value[1]


def write_tables(kept: Mapping[str, Kept]) -> None:
    """Writes every table whose markers stand in the document, and the plots."""
    for name, found in kept.items():
        if any(measured(found.contexts, kind) for kind in FILES):
            write_text(plot_of(name), drawn(found).svg)
            write_section(DOCUMENT, section_of(name), absorbing_section(name, found))


def main() -> None:
    """Writes the tables and plots of what is kept."""
    write_tables(kept_absorbing())


if __name__ == "__main__":
    main()
