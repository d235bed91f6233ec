"""Plans and memory rows as tables and lines in the terminal, and all that `npt memory` prints.

The tables draw this package's own dataclasses, which is why they are here and not in `npt.report`: that package comes before
this one and may not import it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from npt.common.display import human_bytes, visible
from npt.config import RunConfig
from npt.planning.advice import advice
from npt.planning.devices import Launch, machine_speed
from npt.planning.formed_deltas import MemoryRow
from npt.planning.plan import OVERHEAD, Plan, plan_run
from npt.planning.shapes import dtype_of, load_shapes, with_own_dtype
from npt.planning.shards import ALONE, FSDP2, ShardUnit
from npt.planning.timing import memory_limit, time_lines
from npt.runs.base_model import default_device


def print_line(console: Console, line: str) -> None:
    """Prints one line as it is, without markup, and leaves folding to the terminal."""
    console.print(escape(visible(line)), soft_wrap=True, highlight=False)


def unit_table(units: tuple[ShardUnit, ...], processes: int) -> Table:
    """A table of FSDP2's units: neighbours of equal size in one row, the largest marked."""
    table = Table(title=f"shard plan over {processes} processes", title_justify="left")
    for column in ("unit", "whole", "in each process", ""):
        table.add_column(column, justify="left" if column in ("unit", "") else "right")
    largest = max(unit.full for unit in units)
    for (full, local), group in groupby(units, key=lambda unit: (unit.full, unit.local)):
        first, *others = group
        name = first.name
        if others:
            last = others[-1]
            name += f" to {last.name if last.block is None else last.block}, each"
        table.add_row(name, human_bytes(full), human_bytes(local), "largest" if full == largest else "")
    table.add_section()
    whole, local = sum(unit.full for unit in units), sum(unit.local for unit in units)
    table.add_row(f"all {len(units)} units", human_bytes(whole), human_bytes(local), "")
    return table


def spread_lines(plan: Plan) -> list[str]:
    """Lines that say how a run lies on its processes and how much they send; none for one process."""
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
    """A table of the memory of one process: its phases, and what stays allocated beside them."""
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
    """Prints the plan of a run, and the settings that would make it fit where it does not.

    Args:
        limit: bytes that a process may use; None for the device's memory.

    Raises:
        NPTError: the model's configuration can't be loaded, or the model can't be converted.
    """
    device = default_device()
    hf_config = load_shapes(config)
    if launch.device is None:
        config = with_own_dtype(config, hf_config)
    with console.status("running the run's code on shapes"):
        plan = plan_run(config, hf_config, launch.processes)
    console.print(plan_table(plan, f"what `npt train` needs for {config.model.base_model_name}"))
    for line in spread_lines(plan):
        print_line(console, line)
    dtype = dtype_of(config.model.dtype, hf_config)
    for line in time_lines(plan, config, launch, str(dtype).removeprefix("torch.")):
        print_line(console, line)
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
    if plan.temporary:
        console.print(f"temporary files of calibration: {human_bytes(plan.temporary)}, in the folder that TMPDIR names")
    limit = memory_limit(launch, limit)
    if plan.peak <= limit:
        console.print(f"fits: {human_bytes(limit)} available")
        return
    with console.status("looking for what would fit"):
        changes, least = advice(config, limit, hf_config, plan)
    verdict = "fits with" if least.peak <= limit else "does not fit even with"
    options = " ".join(f"--set {change}" for change in changes)
    print_line(console, f"{human_bytes(limit)} available: {verdict} {options} ({human_bytes(least.peak)})")


def render_memory(rows: Sequence[MemoryRow], console: Console) -> None:
    """Prints the memory of formed weight deltas beside that of this implementation."""
    table = Table(title="memory of per-token weight deltas", title_justify="left")
    for column in ("what", "bytes", "how"):
        table.add_column(column, justify="right" if column == "bytes" else "left")
    for row in rows:
        table.add_row(escape(row.what), human_bytes(row.bytes), escape(row.how))
    console.print(table)
