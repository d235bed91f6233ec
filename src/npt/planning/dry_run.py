"""`npt train --dry-run`: prints what a run would do, from its model on the meta device, converted and spread over processes.

No weights are read, no text is tokenised and nothing is written. Only the base's config.json is needed.
"""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console

from npt.block.families import blocks_of, family_of
from npt.block.mixture import unused_parameters
from npt.common.display import human_bytes, ranges
from npt.common.launch import local_world_size, world_size
from npt.common.processes import env_flag
from npt.config import RunConfig
from npt.errors import NPTError
from npt.finetuning.low_rank import train_low_rank
from npt.finetuning.objective import LanguageModelObjective
from npt.planning.devices import Launch, planned_launch
from npt.planning.plan import Plan, plan_model
from npt.planning.shapes import OWN_BYTES, dtype_of, load_shapes, shapes_of, with_own_dtype
from npt.planning.shards import strategy_of
from npt.planning.tables import plan_table, print_line, spread_lines, unit_table
from npt.planning.timing import memory_limit, time_lines
from npt.runs.texts import own_train_blocks
from npt.tuner.converted import active_layers, parameter_counts


def launch_here(processes: int | None, nodes: int | None, device: str | None) -> Launch:
    """The launch that the options ask for. Without options, the one in which torchrun or accelerate started this process.

    Raises:
        NPTError: see `planned_launch`.
    """
    if processes is None:
        processes, nodes = world_size(), (world_size() // local_world_size() if nodes is None else nodes)
    return planned_launch(processes, 1 if nodes is None else nodes, device)


def dry_run(config: RunConfig, launch: Launch, limit: int | None, console: Console, *, tunes: bool = False) -> Plan:
    """Prints what `npt train` would do with this configuration and launch, and returns its plan.

    Args:
        tunes: says it of `npt finetune`, without the methods of `finetuning.compare`.
        limit: bytes that a process may use; None for the device's memory.

    Raises:
        NPTError: the model's configuration can't be loaded, or the model can't be converted, or it can't be
            sharded over one process.
    """
    if env_flag("ACCELERATE_USE_DEEPSPEED"):
        raise NPTError(
            "--dry-run: this is a launch of DeepSpeed, and only DDP and FSDP2 are planned; start it without, and give "
            "--processes N"
        )
    strategy = strategy_of(config.optimization.fsdp or env_flag("ACCELERATE_USE_FSDP"), launch.processes)
    hf_config = load_shapes(config)
    if launch.device is None:
        config = with_own_dtype(config, hf_config)
    dtype = dtype_of(config.model.dtype, hf_config)
    with console.status("running the run's code on shapes"):
        model = shapes_of(hf_config, config.model, dtype)
        tuned_by = LanguageModelObjective(config.finetuning.anchor_weight) if tunes else None
        trained = train_low_rank(model) if tunes else None
        plan = plan_model(model, config, launch.processes, strategy, tuned_by)
    own, base = parameter_counts(model)
    name = str(dtype).removeprefix("torch.")
    unused = unused_parameters(blocks_of(model.get_base_model()), family_of(model.get_base_model()))
    converted = [layer.index for layer in active_layers(model)]
    depth = model.config.get_text_config().num_hidden_layers
    for line in (
        "dry run: no weights are read, nothing is trained or written; every figure is predicted",
        f"model: {config.model.base_model_name}, {base:,} parameters in {name}"
        + (f", of which a token uses {base - unused:,}" if unused else ""),
        f"converted blocks: {ranges(converted)} ({len(converted)} of {depth})",
        f"new parameters: {own:,} ({100 * own / base:.3g} %)",
        *([] if trained is None else [f"of these trained, the low-rank part: {trained:,}"]),
        *data_lines(config, launch.processes, tunes=tunes),
        f"strategy: {strategy}, world size {launch.processes} on {launch.nodes} node{'s' * (launch.nodes > 1)}",
        f"each process holds: base {human_bytes(plan.spread.base)}, adapter {human_bytes(OWN_BYTES * plan.spread.own)}, "
        f"optimizer {human_bytes(plan.optimizer)}",
    ):
        print_line(console, line)
    if plan.spread.units:
        console.print(unit_table(plan.spread.units, launch.processes))
    console.print(plan_table(plan, "memory of one process"))
    for line in (*spread_lines(plan), *time_lines(plan, config, launch, name), fit_line(plan, launch, limit)):
        print_line(console, line)
    return plan


def data_lines(config: RunConfig, processes: int, *, tunes: bool = False) -> Iterator[str]:
    """Lines that name the run's text, its objectives and the size of a step."""
    data, t = config.data, config.training
    source = data.dataset_name + (f" ({data.dataset_config})" if data.dataset_config else "")
    source += f": {', '.join(data.data_files)}" if data.data_files else ""
    count = own_train_blocks(config) if data.dataset_name == "self" else data.num_train_samples
    blocks = "all its" if count is None else f"{count:,}"
    yield f"data: {source}{', streamed' if data.streaming else ''}, {blocks} blocks of {data.max_length:,} tokens"
    calibration = f"calibration on {data.num_calibration_samples:,} blocks" if t.calibrate else "no calibration"
    f = config.finetuning
    if tunes:
        anchor = (
            f"anchor of weight {f.anchor_weight:g} on {f.num_anchor_samples:,} blocks"
            if f.anchor_weight
            else "no anchor"
        )
        beside = f"; beside it, not planned: {', '.join(f.compare)}" if f.compare else ""
        yield f"objective: language model, {anchor}{beside}"
    else:
        yield f"objective: {calibration}, then {', then '.join(t.objectives())}"
    size = t.batch_size * t.gradient_accumulation_steps * processes
    yield (
        f"a step: {t.batch_size} blocks x {t.gradient_accumulation_steps} micro-batches x {processes} processes = "
        f"{size * data.max_length:,} tokens"
    )


def fit_line(plan: Plan, launch: Launch, limit: int | None) -> str:
    """A line that says whether the peak fits the device, or `limit` bytes where that is given."""
    size = memory_limit(launch, limit)
    device = "this machine" if launch.device is None else launch.device.name
    where = device if limit is None else "--limit"
    fits = "fits" if plan.peak <= size else "DOES NOT FIT"
    more = "" if plan.peak <= size else "; npt memory with the same options names what would help"
    return f"predicted peak {human_bytes(plan.peak)} {fits} {where}: {human_bytes(size)}{more}"
