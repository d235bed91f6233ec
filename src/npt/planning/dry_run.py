"""`npt train --dry-run`: the run's model on the meta device, converted and cut over its processes, and what would happen.

No weights are read, no text is tokenised and nothing is written: config.json of the base is all that is needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from npt.common.display import human_bytes, visible
from npt.common.launch import local_world_size, world_size
from npt.common.processes import env_flag
from npt.config import RunConfig
from npt.errors import NPTError
from npt.planning.devices import Launch, planned_launch
from npt.planning.plan import Plan, plan_model
from npt.planning.shapes import dtype_of, load_shapes, shapes_of
from npt.planning.shards import ShardUnit, strategy_of
from npt.planning.timing import memory_limit, plan_table, spread_lines, time_lines
from npt.tuner.converted import active_layers, parameter_counts


def launch_here(processes: int | None, nodes: int | None, device: str | None) -> Launch:
    """The launch that was asked for; what was not, as torchrun or accelerate started this process.

    Raises:
        NPTError: see `planned_launch`.
    """
    if processes is None:
        processes, nodes = world_size(), (world_size() // local_world_size() if nodes is None else nodes)
    return planned_launch(processes, 1 if nodes is None else nodes, device)


def dry_run(config: RunConfig, launch: Launch, limit: int | None, console: Console) -> Plan:
    """Prints what `npt train` would do with this configuration and launch; returns its plan.

    Raises:
        NPTError: the model's configuration can't be loaded, or the model can't be converted or cut so.
    """
    if env_flag("ACCELERATE_USE_DEEPSPEED"):
        raise NPTError(
            "--dry-run: this is a launch of DeepSpeed, and only DDP and FSDP2 are planned; start it without, and give "
            "--processes N"
        )
    strategy = strategy_of(config, launch.processes, env_flag("ACCELERATE_USE_FSDP"))
    hf_config = load_shapes(config)
    dtype = dtype_of(config.model.dtype, hf_config)
    with console.status("running the run's code on shapes"):
        model = shapes_of(hf_config, config.model, dtype)
        plan = plan_model(model, config, launch.processes, strategy)
    own, base = parameter_counts(model)
    name = str(dtype).removeprefix("torch.")
    converted = [layer.index for layer in active_layers(model)]
    depth = model.config.get_text_config().num_hidden_layers
    for line in (
        "dry run: no weights are read, nothing is trained or written; every figure is predicted",
        f"model: {config.model.base_model_name}, {base:,} parameters in {name}",
        f"converted blocks: {ranges(converted)} ({len(converted)} of {depth})",
        f"new parameters: {own:,} ({100 * own / base:.3g} %)",
        *data_lines(config, launch),
        f"strategy: {strategy}, world size {launch.processes} on {launch.nodes} node{'s' * (launch.nodes > 1)}",
        f"each process holds: base {human_bytes(plan.spread.base)}, adapter {human_bytes(4 * plan.spread.own)}, "
        f"optimizer {human_bytes(plan.optimizer)}",
    ):
        _print(console, line)
    if plan.spread.units:
        console.print(unit_table(plan.spread.units, launch.processes))
    console.print(plan_table(plan, "memory of one process"))
    for line in (*spread_lines(plan), *time_lines(plan, config, launch, name), fit_line(plan, launch, limit)):
        _print(console, line)
    return plan


def data_lines(config: RunConfig, launch: Launch) -> Iterator[str]:
    """Which text and objective the run would use."""
    data, t = config.data, config.training
    source = data.dataset_name + (f" ({data.dataset_config})" if data.dataset_config else "")
    source += f": {', '.join(data.data_files)}" if data.data_files else ""
    blocks = "all its" if data.num_train_samples is None else f"{data.num_train_samples:,}"
    yield f"data: {source}{', streamed' if data.streaming else ''}, {blocks} blocks of {data.max_length:,} tokens"
    calibration = f"calibration on {data.num_calibration_samples:,} blocks" if t.calibrate else "no calibration"
    yield f"objective: {calibration}, then {', then '.join(t.objectives())}"
    size = t.batch_size * t.gradient_accumulation_steps * launch.processes
    yield (
        f"a step: {t.batch_size} blocks x {t.gradient_accumulation_steps} micro-batches x {launch.processes} processes = "
        f"{size * data.max_length:,} tokens"
    )


def unit_table(units: tuple[ShardUnit, ...], processes: int) -> Table:
    """FSDP2's units, equal blocks in one line, the largest marked."""
    table = Table(title=f"shard plan over {processes} processes", title_justify="left")
    for column in ("unit", "whole", "in each process", ""):
        table.add_column(column, justify="left" if column in ("unit", "") else "right")
    largest = max(unit.full for unit in units)
    for (full, local), group in groupby(units, key=lambda unit: (unit.full, unit.local)):
        names = [unit.name for unit in group]
        name = names[0] if len(names) == 1 else f"{names[0]} to {names[-1].removeprefix('block ')}, each"
        table.add_row(name, human_bytes(full), human_bytes(local), "largest" if full == largest else "")
    table.add_section()
    whole, local = sum(unit.full for unit in units), sum(unit.local for unit in units)
    table.add_row(f"all {len(units)} units", human_bytes(whole), human_bytes(local), "")
    return table


def fit_line(plan: Plan, launch: Launch, limit: int | None) -> str:
    """Whether the peak fits the device."""
    size = memory_limit(launch, limit)
    device = "this machine" if launch.device is None else launch.device.name
    where = device if limit is None else "--limit"
    fits = "fits" if plan.peak <= size else "DOES NOT FIT"
    more = "" if plan.peak <= size else "; npt memory with the same options names what would help"
    return f"predicted peak {human_bytes(plan.peak)} {fits} {where}: {human_bytes(size)}{more}"


def ranges(indices: Sequence[int]) -> str:
    """[2, 3, 4, 7] -> "2-4, 7"."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][-1] + 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _print(console: Console, line: str) -> None:
    console.print(escape(visible(line)), soft_wrap=True, highlight=False)
