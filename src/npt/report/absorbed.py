"""The page about absorbed contexts: divergence by question, the texts without, with and after, and what general text lost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from npt.common.display import model_name, one_line
from npt.common.files import write_text
from npt.report.page import images_of, page_environment
from npt.report.run_files import Report, Rows
from npt.report.style import BLUE, GREEN, Picture, draw_picture, plain

#: Letters of a question in the plot.
_LETTERS = 40


def write_absorbed_page(path: Path, contexts: Sequence[Mapping[str, Any]], base: str | None) -> Path:
    """Writes the page.

    Args:
        path: the file.
        contexts: as a store's edits.json holds them.
        base: the name of the model; None where it has none.
    """
    pictures = [_picture(number, one) for number, one in enumerate(contexts, 1)]
    shown = [
        {**one, "recovered": _recovered(one["figures"]), "solved": _is_solved(one["setting"]), "image": picture}
        for one, picture in zip(contexts, images_of([p for p in pictures if p is not None]), strict=True)
    ]
    template = page_environment().get_template("absorbed.html.j2")
    write_text(path, template.render(contexts=shown, base=model_name(base or "a model")))
    return path


def _is_solved(setting: Mapping[str, Any]) -> bool:
    return setting.get("start", "closed") == "closed" or not setting.get("steps")


def _recovered(figures: Mapping[str, Any]) -> float:
    before = figures["kl_before"]
    return 1 - figures["kl_after"] / before if before > 0 else 0.0


def _picture(number: int, one: Mapping[str, Any]) -> Picture | None:
    """KL of every reported question before and after."""

    def draw(figure: Figure, rows: Rows, report: Report) -> str:
        axes = figure.subplots()
        compared = sorted(one["compared"], key=lambda row: row["kl_before"])
        places = range(len(compared))
        for name, colour, marker, label in (("kl_before", BLUE, "o", "before"), ("kl_after", GREEN, "s", "after")):
            axes.plot([max(row[name], 1e-4) for row in compared], places, marker, color=colour, label=label)
        axes.set_yticks(
            list(places), [plain(one_line(row["question"], _LETTERS)) for row in compared], fontsize="x-small"
        )
        axes.set_xscale("log")
        axes.set_xlabel("KL to the model with the context, nats a token")
        axes.legend()
        return f"KL to the model with the context, before and after, of {len(compared)} questions"

    found = draw_picture(f"absorbed-{number}", draw, [], {}, False)
    return found if isinstance(found, Picture) else None
