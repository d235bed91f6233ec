"""What Trainer's own callbacks don't send to a tracker: the evaluation's figures, sample text and plots."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from npt.common.display import visible
from npt.report.curves import Picture

SAMPLE_COLUMNS = ("prompt", "npt", "original", "matching_tokens")


def log_evaluation(
    report: Mapping[str, Any], pictures: Sequence[Picture], step: int, folder: Path, names: Sequence[str]
) -> None:
    """Sends a report to the trackers among `names` (wandb, tensorboard); others get nothing.

    Args:
        pictures: the plots. step: of training. folder: where tensorboard keeps this evaluation's events.
    """
    figures = dict(flat_figures(report.get("evaluations") or {}))
    if "wandb" in names:
        _to_wandb(report, figures, pictures)
    if "tensorboard" in names:
        _to_tensorboard(report, figures, pictures, step, folder)


def flat_figures(evaluations: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """(path with slashes, number) of every number in nested sections; lists are left out."""
    for key, value in evaluations.items():
        if isinstance(value, Mapping):
            yield from flat_figures(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{prefix}{key}", value


def sample_rows(report: Mapping[str, Any]) -> list[list[Any]]:
    """Rows of `SAMPLE_COLUMNS` of the greedy samples."""
    s = (report.get("evaluations") or {}).get("generation_samples") or {}
    columns = [s.get(key) or [] for key in ("prompts", "npt_generations", "original_generations", "matching_tokens")]
    return [list(row) for row in zip(*columns, strict=False)]


def _to_wandb(report: Mapping[str, Any], figures: Mapping[str, float], pictures: Sequence[Picture]) -> None:
    import wandb
    from PIL import Image

    if wandb.run is None:
        return
    images = {f"plots/{p.name}": wandb.Image(Image.open(io.BytesIO(p.png)), caption=p.alt) for p in pictures}
    table = wandb.Table(columns=list(SAMPLE_COLUMNS), data=sample_rows(report))
    wandb.run.log({"generation_samples": table, **images})
    wandb.run.summary.update({f"evaluation/{name}": value for name, value in figures.items()})


def _to_tensorboard(
    report: Mapping[str, Any], figures: Mapping[str, float], pictures: Sequence[Picture], step: int, folder: Path
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
