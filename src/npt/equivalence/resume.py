"""The part of a checkpoint's record that the objectives decide (`npt.training.resume`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from npt.equivalence.objectives import Objective

#: Fields of an objective that decide what is trained.
_FIELDS = ("equivalence_weight", "regularization_weight", "regularizer")


def objective_settings(objectives: Sequence[Objective], top_k: int | None) -> dict[str, Any]:
    """{name as in a configuration: value}; of several objectives with different values a list.

    Args:
        top_k: tokens kept of each next-token distribution where teacher targets come from disk, None where they don't.
    """
    found: dict[str, Any] = {"training.objective": [objective.name for objective in objectives]}
    for name in _FIELDS:
        values = list(dict.fromkeys(getattr(objective, name) for objective in objectives))
        found[f"training.{name}"] = values[0] if len(values) == 1 else values
    reads = any(objective.teacher_kind == "logits" for objective in objectives)
    found["training.teacher_top_k (with paths.teacher_cache)"] = top_k if reads else None
    return found
