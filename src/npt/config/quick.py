"""The settings of `npt train --quick`: calibration only, on little text, with a short report."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from npt.config.load import with_overrides
from npt.config.sections import RunConfig

#: {"section.key": value}; numbers are the most that is taken.
QUICK: dict[str, Any] = {
    "training.calibrate": True,
    "training.num_train_steps": 0,
    "data.num_train_samples": 96,
    "data.num_calibration_samples": 64,
    "data.num_eval_samples": 24,
    "data.num_detail_samples": 4,
}


def shortened(config: RunConfig, kept: Collection[str] = ()) -> RunConfig:
    """The configuration with the settings of `QUICK`, where they make it shorter.

    Args:
        kept: "section.key" of settings that stay as they are.
    """
    changes = {key: value for key, value in QUICK.items() if key not in kept and _is_longer(_value(config, key), value)}
    return with_overrides(config, changes)


def left_out(short: RunConfig, whole: RunConfig) -> Iterator[str]:
    """The settings of `QUICK` in which a short run differs from the whole one, each in words."""
    for key in QUICK:
        mine, theirs = _value(short, key), _value(whole, key)
        if mine != theirs:
            yield f"{key}={mine} in place of {'null' if theirs is None else theirs}"


def _is_longer(value: Any, short: Any) -> bool:
    """True for None, which is "all" or "as long as it takes", for a larger number, and for a switch set otherwise."""
    return value is None or (value != short if isinstance(short, bool) else value > short)


def _value(config: RunConfig, name: str) -> Any:
    section, key = name.split(".")
    return getattr(getattr(config, section), key)
