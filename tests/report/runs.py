"""Files of finished runs for tests of reports: as a run writes them, and as one of many blocks would."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROWS: list[dict[str, Any]] = [
    {"step": 0, "calibration": {"layer_2": {"error_before": 0.3, "error_after": 0.03}}},
    {"step": 0, "eval_perplexity_ratio": 1.01, "eval_mean_kl": 0.02},
    {"step": 2, "loss": 0.5, "equivalence_loss": 0.4, "learning_rate": 0.1, "mean_delta_norm": 0.5},
    {"step": 4, "loss": 0.4, "equivalence_loss": 0.3, "learning_rate": 0.05, "mean_delta_norm": 0.6},
    {"step": 4, "eval_perplexity_ratio": 1.004, "eval_mean_kl": 0.01},
]
#: The sections of a report with one entry per block.
PER_BLOCK = ("layer_equivalence", "residual_stream")
PER_BLOCK_DELTAS = ("per_layer", "least_joint_norm")


def write(folder: Path, report: Any, rows: list[dict[str, Any]] = ROWS) -> Path:
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "evaluation_report.json").write_text(json.dumps(report))  # last, as a run does
    return folder


def with_blocks(
    report: dict[str, Any], blocks: Iterable[int], base: str = "some/base"
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(report, rows of metrics.jsonl) of a run that converted these blocks: those of `report`, repeated and scaled."""
    report, rows, blocks = copy.deepcopy(report), copy.deepcopy(ROWS), list(blocks)
    stats = report["evaluations"]["weight_delta_stats"]
    for place, names in ((report["evaluations"], PER_BLOCK), (stats, PER_BLOCK_DELTAS)):
        for name in names:
            place[name] = _spread(place[name], blocks)
    rows[0]["calibration"] = _spread(rows[0]["calibration"], blocks)
    report["model_config"] |= {"npt_layers": blocks, "base_model": base}
    return report, rows


def _spread(figures: dict[str, Any], blocks: list[int]) -> dict[str, Any]:
    known = list(figures.values())
    return {f"layer_{block}": _scaled(known[i % len(known)], 1.5 + math.sin(i / 9)) for i, block in enumerate(blocks)}


def _scaled(value: Any, factor: float) -> Any:
    if isinstance(value, dict):
        return {key: _scaled(item, factor) for key, item in value.items()}
    return value * factor if isinstance(value, float) else value
