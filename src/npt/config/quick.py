"""The settings of `npt train --quick`: calibration only, on little text, with a short report."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from npt.config.sections import RunConfig

#: {"section.key": value}. A `--set` of the same key wins over them, and they win over a file.
QUICK: dict[str, Any] = {
    "training.num_train_steps": 0,
    "data.num_train_samples": 96,
    "data.num_calibration_samples": 64,
    "data.num_eval_samples": 24,
    "data.num_detail_samples": 4,
}


def quick_overrides() -> list[str]:
    """The settings as "section.key=value"."""
    return [f"{key}={value}" for key, value in QUICK.items()]


def left_out(quick: RunConfig, whole: RunConfig) -> Iterator[str]:
    """What a quick run leaves out of the whole one, one setting after the other: "key=value (value of the whole run)"."""
    for name in QUICK:
        section, key = name.split(".")
        mine, theirs = (getattr(getattr(config, section), key) for config in (quick, whole))
        if mine != theirs:
            yield f"{name}={mine} ({'null' if theirs is None else theirs} without it)"
