"""How long a planned run takes on devices of a data sheet, and what `npt memory` prints of a plan.

Every figure here is predicted: operations and bytes counted on shapes, over the data sheet's figures and the assumed share
of them that is reached (`npt.planning.devices`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from npt.common.display import duration, human_bytes
from npt.config import RunConfig
from npt.planning.devices import BANDWIDTH_SHARE, EFFICIENCY, Device, Launch
from npt.planning.plan import OVERHEAD, Plan, advice, device_memory, machine_speed, plan_run
from npt.planning.shapes import dtype_of, load_shapes
from npt.planning.shards import ALONE, FSDP2
from npt.runs.base_model import default_device
from npt.runs.corpora import VALIDATION_BLOCKS


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimiser step, by what they go into."""

    products: float
    traffic: float
    communication: float

    @property
    def most(self) -> float:
        """Where nothing overlaps."""
        return self.products + self.traffic + self.communication

    @property
    def least(self) -> float:
        """Where communication hides behind computing, or computing behind it."""
        return max(self.products + self.traffic, self.communication)


def step_time(plan: Plan, config: RunConfig, launch: Launch) -> StepTime:
    """Of an optimiser step on the launch's device, whose data sheet has to be known."""
    device: Device = launch.device  # type: ignore[assignment]
    micro_batches, spread = config.training.gradient_accumulation_steps, plan.spread
    return StepTime(
        micro_batches * plan.step_flops / (EFFICIENCY * device.flops),
        micro_batches * plan.step_traffic / (BANDWIDTH_SHARE * device.bandwidth),
        (micro_batches * spread.forward_bytes + spread.step_bytes) / launch.wire,  # type: ignore[operator]
    )


def run_steps(config: RunConfig, processes: int) -> int | None:
    """Optimiser steps of a run, as Trainer counts them; None where the text's length decides."""
    t, samples = config.training, config.data.num_train_samples
    if t.num_train_steps is not None:
        return t.num_train_steps
    if samples is None:
        return None
    blocks = samples - min(VALIDATION_BLOCKS, max(1, samples // 10))
    batches = -(-blocks // (processes * t.batch_size))
    return math.ceil(t.num_epochs * -(-batches // t.gradient_accumulation_steps))


def time_lines(plan: Plan, config: RunConfig, launch: Launch, dtype: str) -> list[str]:
    """What is predicted of a step's and a run's time on the launch's device."""
    if launch.device is None or not plan.step_flops:
        return []
    if dtype == "float32" and config.optimization.mixed_precision == "no":
        return [
            f"no time is predicted: {launch.device.name}'s figure is for 16-bit products and these are float32; see "
            "model.dtype"
        ]
    found, steps = step_time(plan, config, launch), run_steps(config, launch.processes)
    tokens = (
        launch.processes * config.training.batch_size * config.training.gradient_accumulation_steps
    ) * config.data.max_length
    lines = [
        f"predicted, a step of {tokens:,} tokens: {duration(found.most)} (products {duration(found.products)}, memory "
        f"traffic {duration(found.traffic)}, communication {duration(found.communication)}), {duration(found.least)} where "
        "communication overlaps wholly",
        f"assumed: {EFFICIENCY:.0%} of {launch.device.name}'s {launch.device.flops / 1e12:.0f} TFLOP/s, "
        f"{BANDWIDTH_SHARE:.0%} of its memory's and links' bandwidth".replace("%", " %"),
    ]
    if steps is None:
        return [*lines, "predicted, the whole run: unknown, as the text's length decides; see training.num_train_steps"]
    return [
        *lines,
        f"predicted, the training of {steps:,} steps: {duration(steps * found.most)}; calibration and evaluation come on top",
    ]


def spread_lines(plan: Plan) -> list[str]:
    """How the run lies on its processes."""
    spread = plan.spread
    if spread.strategy == ALONE:
        return []
    weights = "each holds a part of the base" if spread.strategy == FSDP2 else "each holds the whole base"
    return [
        f"{spread.strategy} over {spread.processes} processes, {weights}; figures are of one process",
        f"sent and received by each: {human_bytes(spread.forward_bytes)} of weights a micro-batch, "
        f"{human_bytes(spread.step_bytes)} of gradients a step",
    ]


def plan_table(plan: Plan, title: str) -> Table:
    """Phases and what stays, in bytes of one process."""
    table = Table(title=escape(title), title_justify="left")
    table.add_column("phase")
    table.add_column("above the weights", justify="right")
    for phase in plan.phases:
        table.add_row(phase.name, human_bytes(phase.bytes))
    table.add_section()
    table.add_row("weights on the device", human_bytes(plan.weights))
    if plan.spread.gathered:
        table.add_row("gathered units, most at once", human_bytes(plan.spread.gathered))
    table.add_row("AdamW's moments, from training on", human_bytes(plan.optimizer))
    table.add_row("libraries at work", human_bytes(OVERHEAD))
    table.add_row("peak of the run, predicted", human_bytes(plan.peak), style="bold")
    return table


def render_plan(config: RunConfig, limit: int | None, console: Console, launch: Launch = Launch()) -> None:  # noqa: B008
    """Prints what the run needs, and what to turn on when it is more than `limit` bytes (None: the device's)."""
    device = default_device()
    hf_config = load_shapes(config)
    with console.status("running the run's code on shapes"):
        plan = plan_run(config, hf_config, launch.processes)
    console.print(plan_table(plan, f"what `npt train` needs for {config.model.base_model_name}"))
    for line in spread_lines(plan):
        _print(console, line)
    dtype = dtype_of(config.model.dtype, hf_config)
    for line in time_lines(plan, config, launch, str(dtype).removeprefix("torch.")):
        _print(console, line)
    if launch.device is None and plan.step_flops:
        speed = machine_speed(device, dtype)
        steps, seconds = config.training.gradient_accumulation_steps, plan.step_seconds(*speed)
        what = "" if plan.spread.strategy == ALONE else ", without communication"
        console.print(
            f"a training step on this machine{what}: about {steps * seconds:.2g} s ({steps} x {seconds:.2g} s)"
        )
    if plan.disk:
        blocks = config.data.num_train_samples
        total = "" if blocks is None else f", {human_bytes(blocks * plan.disk)} for {blocks:,} blocks"
        console.print(f"teacher targets on disk: {human_bytes(plan.disk)} per block of text{total}")
    limit = memory_limit(launch, limit)
    if plan.peak <= limit:
        console.print(f"fits: {human_bytes(limit)} available")
        return
    with console.status("looking for what would fit"):
        changes, least = advice(config, limit, hf_config, plan)
    verdict = "fits with" if least.peak <= limit else "does not fit even with"
    options = " ".join(f"--set {change}" for change in changes)
    _print(console, f"{human_bytes(limit)} available: {verdict} {options} ({human_bytes(least.peak)})")


def memory_limit(launch: Launch, limit: int | None = None) -> int:
    """Bytes a process may use: what was given, the known device's memory, or this machine's."""
    if limit is not None:
        return limit
    return device_memory(default_device()) if launch.device is None else launch.device.memory


def _print(console: Console, line: str) -> None:
    console.print(line, soft_wrap=True, highlight=False)
