"""The sizes and options of one NP component."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from npt.common.options import DEFAULTS

INPUT_PROJECTIONS = ("gate", "up")


@dataclass(frozen=True)
class ComponentSpec:
    """Everything that fixes a component's parameters and shapes.

    `hidden_size` d, `intermediate_size` f; `projections` is the subset of gate, up, down that receives a delta;
    `centered` says that Norm2 subtracts the mean (LayerNorm), so the mean of `a` is taken out too. `reads` is what the
    original MLP reads: "norm(h + a)", "h + a" (no norm before the MLP: no gain) or "h" (a parallel block: attention
    leaves the MLP's input alone, so gate and up need no carry either).
    """

    hidden_size: int
    intermediate_size: int
    projections: tuple[str, ...] = DEFAULTS.target_projections
    rank: int = DEFAULTS.rank
    modulation_scale: float = DEFAULTS.modulation_scale
    key: str = DEFAULTS.key
    carry: str = DEFAULTS.carry
    gain: str = DEFAULTS.gain
    low_rank_at: str = DEFAULTS.low_rank_at
    centered: bool = False
    reads: str = "norm(h + a)"

    @cached_property
    def input_projections(self) -> tuple[str, ...]:
        """The targeted projections that read z."""
        return tuple(name for name in INPUT_PROJECTIONS if name in self.projections)

    @cached_property
    def has_low_rank(self) -> bool:
        """True where there is a low-rank part (`exact` has none)."""
        return self.rank > 0 and self.carry != "exact"
