"""The time that a planned run takes on devices of which a data sheet is known.

Every figure here is predicted: operations and bytes counted on shapes, divided by the data sheet's figures and by the share of
them that is assumed to be reached (`npt.planning.devices`).
"""

from __future__ import annotations

from dataclasses import dataclass

from npt.common.display import duration
from npt.config import RunConfig
from npt.planning.devices import BANDWIDTH_SHARE, EFFICIENCY, Launch, device_memory
from npt.planning.plan import Plan
from npt.runs.base_model import default_device
from npt.training.steps import held_back, run_steps


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimiser step: of its products, of other operators' memory traffic, and of communication."""

    products: float
    traffic: float
    communication: float

    @property
    def most(self) -> float:
        """Seconds where nothing overlaps."""
        return self.products + self.traffic + self.communication

    @property
    def least(self) -> float:
        """Seconds where communication overlaps wholly with computing."""
        return max(self.products + self.traffic, self.communication)


def step_time(plan: Plan, micro_batches: int, launch: Launch) -> StepTime:
    """The time of an optimiser step of so many micro-batches.

    Raises:
        ValueError: the launch names no device.
    """
    device, wire, spread = launch.device, launch.wire, plan.spread
    if device is None or wire is None:
        raise ValueError("the launch names no device, so there is no data sheet to predict a time from")
    return StepTime(
        micro_batches * plan.step_flops / (EFFICIENCY * device.flops),
        micro_batches * plan.step_traffic / (BANDWIDTH_SHARE * device.bandwidth),
        (micro_batches * spread.forward_bytes + spread.step_bytes) / wire,
    )


def planned_steps(config: RunConfig, processes: int) -> int | None:
    """Optimiser steps of a planned run; None where the text's length decides."""
    t, samples = config.training, config.data.num_train_samples
    if samples is None and t.num_train_steps is None:
        return None
    blocks = 0 if samples is None else samples - held_back(samples)
    return run_steps(blocks, processes * t.batch_size * t.gradient_accumulation_steps, t.num_epochs, t.num_train_steps)


def time_lines(plan: Plan, config: RunConfig, launch: Launch, dtype: str) -> list[str]:
    """Lines that predict the time of a step and of the training; none where the launch names no device.

    dtype: the name of the base's.
    """
    device, t = launch.device, config.training
    if device is None or not plan.step_flops:
        return []
    if dtype == "float32" and config.optimization.mixed_precision == "no":
        return [
            f"no time is predicted: {device.name}'s figure is for 16-bit products and these are float32; see "
            "model.dtype"
        ]
    found = step_time(plan, t.gradient_accumulation_steps, launch)
    steps = planned_steps(config, launch.processes)
    tokens = launch.processes * t.batch_size * t.gradient_accumulation_steps * config.data.max_length
    lines = [
        f"predicted, a step of {tokens:,} tokens: {duration(found.most)} (products {duration(found.products)}, memory "
        f"traffic {duration(found.traffic)}, communication {duration(found.communication)}), {duration(found.least)} where "
        "communication overlaps wholly",
        f"assumed: {EFFICIENCY:.0%} of {device.name}'s {device.flops / 1e12:.0f} TFLOP/s, "
        f"{BANDWIDTH_SHARE:.0%} of its memory's and links' bandwidth".replace("%", " %"),
    ]
    if steps is None:
        return [*lines, "predicted, the whole run: unknown, as the text's length decides; see training.num_train_steps"]
    return [
        *lines,
        f"predicted, the training of {steps:,} steps: {duration(steps * found.most)}; calibration and evaluation come on top",
    ]


def memory_limit(launch: Launch, limit: int | None = None) -> int:
    """Bytes that a process may use: `limit` where it is given, else the memory of the launch's device or of this machine."""
    if limit is not None:
        return limit
    return device_memory(default_device()) if launch.device is None else launch.device.memory
