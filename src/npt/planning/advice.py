"""The settings that bring a run's memory under a limit, tried in the order in which they cost least."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from npt.config import RunConfig, with_overrides
from npt.planning.plan import Plan, plan_run
from npt.planning.shards import FSDP2


class Saving(NamedTuple):
    """A change that saves memory.

    changes: {dotted key: value}. helps: True for a configuration that it makes smaller. shrinks_base: it makes the base
    smaller on one device, which can't be combined with sharding.
    """

    changes: dict[str, Any]
    helps: Callable[[RunConfig], bool]
    shrinks_base: bool = False


#: In the order in which they cost least.
_SAVINGS = (
    Saving({"model.dtype": "bfloat16"}, lambda c: c.model.dtype != "bfloat16"),
    Saving({"training.gradient_checkpointing": True}, lambda c: c.training.objective != "local"),
    Saving({"training.batch_size": 1}, lambda c: c.training.batch_size > 1),
    Saving({"training.objective": "local"}, lambda c: c.training.objective in ("auto", "logits")),
    Saving({"optimization.use_8bit": True}, lambda c: not c.optimization.use_cpu_offload, True),
    Saving(
        {"optimization.use_8bit": False, "optimization.use_4bit": True},
        lambda c: not c.optimization.use_cpu_offload,
        True,
    ),
    Saving({"optimization.use_4bit": False, "optimization.use_cpu_offload": True}, lambda c: True, True),
)
#: Takes the place of those that shrink the base where there are several processes.
_SHARDED = Saving(
    {"optimization.fsdp": True},
    lambda c: not any(getattr(c.optimization, name) for name in ("fsdp", "use_8bit", "use_4bit", "use_cpu_offload")),
)


def advice(config: RunConfig, limit: int, hf_config: Any = None, plan: Plan | None = None) -> tuple[list[str], Plan]:
    """(overrides that bring the run's memory under `limit` bytes, the plan with them); all that help where none suffices.

    Args:
        hf_config: the base's configuration, where it is loaded already.
        plan: of `config`, where it is known already; otherwise a plan of one process is made.
    """
    changes: dict[str, Any] = {}
    plan = plan_run(config, hf_config) if plan is None else plan
    processes, strategy = plan.spread.processes, plan.spread.strategy
    several = [*(saving for saving in _SAVINGS if not saving.shrinks_base), _SHARDED]
    for saving in _SAVINGS if processes == 1 else several:
        if plan.peak <= limit:
            break
        if not saving.helps(config):
            continue
        changes |= saving.changes
        if "training.batch_size" in saving.changes:
            changes["training.gradient_accumulation_steps"] = (
                config.training.batch_size * config.training.gradient_accumulation_steps
            )
        config = with_overrides(config, changes)
        plan = plan_run(config, hf_config, processes, FSDP2 if config.optimization.fsdp else strategy)
    return [f"{key}={str(value).lower()}" for key, value in changes.items() if value is not False], plan
