"""Sends an evaluation's figures, sample text and plots to wandb and tensorboard; Trainer's own callbacks send the curves."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from npt.common.display import visible
from npt.report.run_files import Report, section
from npt.report.style import Picture

#: Of the table of greedy continuations.
SAMPLE_COLUMNS = ("prompt", "npt", "original", "matching_tokens")


def log_evaluation(report: Report, pictures: Sequence[Picture], step: int, folder: Path, names: Sequence[str]) -> None:
    """Sends a report to those of `names` that are wandb or tensorboard; other trackers get nothing.

    Args:
        pictures: the plots. step: of training. folder: where tensorboard keeps this evaluation's events.
    """
    figures = dict(flat_figures(section(report, "evaluations")))
    if "wandb" in names:
        _to_wandb(report, figures, pictures)
    if "tensorboard" in names:
        _to_tensorboard(report, figures, pictures, step, folder)


def flat_figures(evaluations: Report, prefix: str = "") -> Iterator[tuple[str, float]]:
    """(path with slashes, number) of every number in nested sections. Lists are left out."""
    for key, value in evaluations.items():
        if isinstance(value, Mapping):
            yield from flat_figures(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{prefix}{key}", value


def sample_rows(report: Report) -> list[list[Any]]:
    """One row per prompt, with the columns of `SAMPLE_COLUMNS`."""
    s = section(report, "evaluations", "generation_samples")
    columns = [s.get(key) or [] for key in ("prompts", "npt_generations", "original_generations", "matching_tokens")]
    return [list(row) for row in zip(*columns, strict=False)]


def _to_wandb(report: Report, figures: Mapping[str, float], pictures: Sequence[Picture]) -> None:
    import wandb
    from PIL import Image

    if wandb.run is None:
        return
    images = {f"plots/{p.name}": wandb.Image(Image.open(io.BytesIO(p.png)), caption=p.alt) for p in pictures}
    table = wandb.Table(columns=list(SAMPLE_COLUMNS), data=sample_rows(report))
    wandb.run.log({"generation_samples": table, **images})
    wandb.run.summary.update({f"evaluation/{name}": value for name, value in figures.items()})


def _to_tensorboard(
    report: Report, figures: Mapping[str, float], pictures: Sequence[Picture], step: int, folder: Path
) -> None:
    import numpy as np
    from PIL import Image
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder)) as writer:
        for name, value in figures.items():
            writer.add_scalar(f"evaluation/{name}", value, step)
        for picture in pictures:
            pixels = np.asarray(Image.open(io.BytesIO(picture.png)).convert("RGB"))
            writer.add_image(f"plots/{picture.name}", pixels, step, dataformats="HWC")
        lines = ["| " + " | ".join(SAMPLE_COLUMNS) + " |", "|---" * len(SAMPLE_COLUMNS) + "|"]
        for row in sample_rows(report):
            lines.append("| " + " | ".join(visible(cell).replace("|", "\\|").replace("\n", " ") for cell in row) + " |")
        writer.add_text("generation_samples", "\n".join(lines), step)
