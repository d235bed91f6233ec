"""The sizes and options of one NP component."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from npt.common.options import DEFAULTS, is_calibrated

INPUT_PROJECTIONS = ("gate", "up")


@dataclass(frozen=True)
class ComponentSpec:
    """Sizes and options of one component: they fix its parameters and their shapes.

    Args:
        hidden_size: d. intermediate_size: f. projections: the subset of gate, up and down that receives a delta.
        rank: r, 0 for no low-rank part. modulation_scale: s in s tanh(a A). key, carry, gain, gain_units,
            low_rank_at: see `NPComponent` and docs/maths.md.
        centered: Norm2 subtracts the mean (LayerNorm), so the mean of `a` is taken out too.
        reads: input of the original MLP: "norm(h + a)"; "h + a" where no norm stands before the MLP (no gain then); or
            "h" in a parallel block, where attention leaves the MLP's input alone (no carry for gate and up either).
    """

    hidden_size: int
    intermediate_size: int
    projections: tuple[str, ...] = DEFAULTS.target_projections
    rank: int = DEFAULTS.rank
    modulation_scale: float = DEFAULTS.modulation_scale
    key: str = DEFAULTS.key
    carry: str = DEFAULTS.carry
    gain: str = DEFAULTS.gain
    gain_units: int = DEFAULTS.gain_units
    low_rank_at: str = DEFAULTS.low_rank_at
    centered: bool = False
    reads: str = "norm(h + a)"

    @cached_property
    def input_projections(self) -> tuple[str, ...]:
        """The targeted projections that read z."""
        return tuple(name for name in INPUT_PROJECTIONS if name in self.projections)

    @property
    def is_calibrated(self) -> bool:
        """False where the component is exact from the start."""
        return is_calibrated(self.carry, self.gain)

    @cached_property
    def has_low_rank(self) -> bool:
        """True where there is a low-rank part (`exact` has none)."""
        return self.rank > 0 and self.carry != "exact"
