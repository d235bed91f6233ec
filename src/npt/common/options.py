"""The options of a neuro-plastic block: names, allowed values, defaults and the one rule across them, declared once.

`ComponentSpec` (the maths), `NPTConfig` (the adapter's file) and the `model` section of a run configuration take them from
here. docs/maths.md says what each value means.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, fields
from typing import Literal, TypeGuard, get_args

Key = Literal["input", "tied", "learned"]
Carry = Literal["none", "diagonal", "exact"]
Gain = Literal["none", "norm", "overlap", "state", "denominator"]
LowRankSite = Literal["input", "projection"]
Projection = Literal["gate", "up", "down"]
#: The tokens of a chat whose prediction counts, `data.score`; no option of a block.
Score = Literal["all", "replies"]

KEYS: tuple[str, ...] = get_args(Key)
CARRIES: tuple[str, ...] = get_args(Carry)
GAINS: tuple[str, ...] = get_args(Gain)
LOW_RANK_SITES: tuple[str, ...] = get_args(LowRankSite)
PROJECTIONS: tuple[str, ...] = get_args(Projection)


@dataclass(frozen=True)
class Options:
    """The options, each with its default."""

    npt_layers: Literal["upper_half", "lower_half", "all"] = "upper_half"
    rank: int = 16
    modulation_scale: float = 1.0
    key: Key = "input"
    carry: Carry = "diagonal"
    gain: Gain = "state"
    gain_units: int = 64
    low_rank_at: LowRankSite = "input"
    target_projections: tuple[Projection, ...] = ("gate", "up", "down")


DEFAULTS = Options()
#: The names a person chooses values for, in their order.
OPTIONS = tuple(field.name for field in fields(Options))
#: {option: its allowed values}, of the options that name one of a few.
ALLOWED = {"key": KEYS, "carry": CARRIES, "gain": GAINS, "low_rank_at": LOW_RANK_SITES}


def is_automatic(npt_layers: str | list[int]) -> TypeGuard[str]:
    """True for "auto" and "auto:N"."""
    return isinstance(npt_layers, str) and npt_layers.partition(":")[0] == "auto"


def is_calibrated(carry: str, gain: str) -> bool:
    """False for components that are exact from the start: there is nothing for a calibration to fit."""
    return carry != "exact" and (carry, gain) != ("diagonal", "denominator")


def tied_targets_down(key: str, projections: Collection[str], rank: int, carry: str) -> bool:
    """True for options that contradict each other: a tied key reads a projection's input through A, which has as many rows as
    the hidden size, and the input of `down` is wider.
    """
    return key == "tied" and "down" in projections and rank > 0 and carry != "exact"
