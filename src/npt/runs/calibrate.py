"""The calibration of a run, and the mean KL that it predicts before anything is evaluated."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any

from torch import Tensor

from npt.common.processes import is_first
from npt.common.sharded import through
from npt.common.stopwatch import Stopwatch
from npt.equivalence.calibration import fit_components
from npt.equivalence.choice import check_undivided, settle_blocks, without_probes
from npt.equivalence.prediction import measure_interactions
from npt.runs.estimate import CALIBRATION, PREDICTION
from npt.training.callbacks import BEST_METRIC
from npt.tuner.converted import adapter_config

logger = logging.getLogger(__name__)


def calibrate_run(
    model: Any, text: Sequence[Mapping[str, Tensor]], spent: Stopwatch
) -> tuple[dict[str, dict[str, float]], dict[str, Any]]:
    """Calibrates all blocks, measures what each costs, and keeps those that `npt_layers: auto` chooses.

    The first rows of the text (`probe_texts`) are not calibrated on: they are what the blocks are measured on.

    Returns:
        The errors by block, as `npt.calibrate` gives them, and the prediction as a report holds it: mean_kl and
        standard_error of the kept blocks in nats a token, texts and tokens measured, chosen (indices; null where no choice
        was asked for), and alone: {layer_<i>: mean KL of converting that block alone}.
    """
    check_undivided(model)
    probes, rest = without_probes(model, text)
    asked = adapter_config(model).undecided
    with spent.timing(CALIBRATION):
        errors = through(model, lambda: fit_components(model, rest, progress=is_first()))
    for name, figures in errors.items():
        logger.info("%s: update error %.4f -> %.4f", name, figures["error_before"], figures["error_after"])
    with spent.timing(PREDICTION):
        found = through(model, lambda: measure_interactions(model, probes, progress=is_first()))
    kept = settle_blocks(model, found)
    mean, error = found.predict(kept)
    logger.info("predicted mean KL of the calibrated model: %.5f ± %.5f (docs/law.md)", mean, error)
    return errors, {
        "mean_kl": mean,
        "standard_error": error if isfinite(error) else None,
        "texts": len(found.tokens),
        "tokens": int(found.tokens.sum()),
        "chosen": None if asked is None else kept,
        "alone": {f"layer_{block}": kl for block, kl in found.alone().items()},
    }


def prediction_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The prediction of a run with the mean KL that was measured of the calibrated model, `measured`; None for a run without.

    Args:
        rows: of metrics.jsonl.
    """
    found = next((row["prediction"] for row in rows if "prediction" in row), None)
    if found is None:
        return None
    measured = next((row[BEST_METRIC] for row in rows if row.get("step") == 0 and BEST_METRIC in row), None)
    return {**found, "measured": measured}
