"""Commands about a run: carry it out, say before what it needs, measure its result."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from npt.cli.app import app, console, load, say
from npt.cli.options import (
    Checkpoint,
    Config,
    DeviceName,
    FinetuneConfig,
    Limit,
    Nodes,
    OwnConfig,
    Processes,
    Set,
    place_of,
)
from npt.common.launch import is_first_launched
from npt.errors import NPTError

logger = logging.getLogger("npt")


Resume = Annotated[bool, typer.Option("--resume", help="Continue from the last checkpoint.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Say what the run would do and need; read no weights, write nothing.")
]


@app.command()
def train(
    config: Config = None,
    set_: Set = None,
    resume: Resume = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="Calibration only, on little text, with a short report; --set wins over it.")
    ] = False,
    dry_run: DryRun = False,
    processes: Processes = None,
    nodes: Nodes = None,
    device: DeviceName = None,
    limit: Limit = None,
) -> None:
    """Phase 1: convert, calibrate, train and evaluate.

    Writes the adapter, best_model/, and the report: evaluation_report.json and report.html.
    """
    planned = {"--processes": processes, "--nodes": nodes, "--device": device, "--limit": limit}
    if dry_run:
        return _dry_run(lambda: _run_config(config, set_, quick), resume, planned)
    _refuse_planned(planned)
    from npt.common.writable import check_folders

    run = _run_config(config, set_, quick)
    check_folders({f"paths.{name}": folder for name, folder in run.paths if folder is not None})
    from npt.report.terminal import render_report  # these two import what training needs
    from npt.runs.train import run_training

    found = run_training(run, resume=resume)
    render_report(found, console())
    say(f"adapter: {Path(run.paths.checkpoint_dir) / 'best_model'}")
    say(f"report:  {Path(run.paths.output_dir) / 'report.html'}, figures in evaluation_report.json beside it")


@app.command()
def finetune(
    config: FinetuneConfig = None,
    set_: Set = None,
    resume: Resume = False,
    compare: Annotated[
        str | None,
        typer.Option(
            "--compare", metavar="METHODS", help="lora, dora or lora,dora: trained beside, on the same batches."
        ),
    ] = None,
    dry_run: DryRun = False,
    processes: Processes = None,
    nodes: Nodes = None,
    device: DeviceName = None,
    limit: Limit = None,
) -> None:
    """Phase 2: fine-tune the low-rank part on text or chats.

    Starts as the original, or from an adapter (finetuning.adapter). Writes the adapter, best_model/, and the report of what
    was gained and lost: finetune_report.json and report.html.
    """
    from npt.common.writable import check_folders
    from npt.runs.finetune_settings import finetune_settings

    overrides = [*(set_ or ()), *([] if compare is None else [f"finetuning.compare=[{compare}]"])]
    planned = {"--processes": processes, "--nodes": nodes, "--device": device, "--limit": limit}
    if dry_run:
        return _dry_run(lambda: finetune_settings(config, overrides), resume, planned, tunes=True)
    _refuse_planned(planned)
    run = finetune_settings(config, overrides)
    check_folders({f"paths.{name}": folder for name, folder in run.paths if folder is not None})
    from npt.report.finetune import render_finetuning
    from npt.runs.finetune import run_finetuning

    found = run_finetuning(run, resume=resume)
    render_finetuning(found, console())
    say(f"adapter: {Path(run.paths.checkpoint_dir) / 'best_model'}")
    say(f"report:  {Path(run.paths.output_dir) / 'report.html'}, figures in finetune_report.json beside it")


def _run_config(config: Path | None, set_: list[str] | None, quick: bool) -> Any:
    """The configuration of a run; what `--quick` changes in it is logged."""
    from npt.config import given_keys, left_out, shortened

    whole = load(config, set_)
    if not quick:
        return whole
    short = shortened(whole, kept=given_keys(None, set_ or ()))
    logger.info(
        "--quick: %s; run without it for the whole", ", ".join(left_out(short, whole)) or "changes nothing here"
    )
    return short


def _refuse_planned(planned: Mapping[str, Any]) -> None:
    """Refuses options of a planned launch, {option: value}, without --dry-run."""
    for name, value in planned.items():
        if value is not None:
            raise NPTError(
                f"{name} {value}: goes with --dry-run or npt memory; start a run with torchrun or accelerate"
            )


def _dry_run(configured: Callable[[], Any], resume: bool, planned: Mapping[str, Any], *, tunes: bool = False) -> None:
    """Says what a run would do. configured: reads its configuration. planned: {option: value} of the launch."""
    from npt.planning.devices import parse_bytes
    from npt.planning.dry_run import dry_run, launch_here

    if resume:
        raise NPTError("--dry-run --resume: a dry run starts no run to go on with; leave one of the two out")
    limit = planned["--limit"]
    size = None if limit is None else parse_bytes(limit)
    launch = launch_here(planned["--processes"], planned["--nodes"], planned["--device"])
    run = configured()
    if is_first_launched():
        dry_run(run, launch, size, console(), tunes=tunes)


@app.command()
def evaluate(
    checkpoint: Checkpoint,
    config: OwnConfig = None,
    output: Annotated[Path, typer.Option("--output", help="Where the report goes.", callback=place_of)] = Path(
        "evaluation_report.json"
    ),
    text: Annotated[
        list[str] | None, typer.Option("--text", help="A further text file (or builtin:python-docs), reported beside.")
    ] = None,
    set_: Set = None,
) -> None:
    """Compares a checkpoint with the model it was made from."""
    from npt.adapters.settings import load_settings
    from npt.common.writable import check_file
    from npt.report.terminal import render_report
    from npt.runs.evaluate import run_evaluation

    check_file("--output", output, ".json")
    run = load_settings(checkpoint, config, set_ or ())
    render_report(run_evaluation(run, checkpoint, output, more_text=text or ()), console())
    say(f"report: {output.with_suffix('.html')}, figures in {output}")


@app.command()
def predict(
    config: Config = None,
    set_: Set = None,
    quick: Annotated[bool, typer.Option("--quick", help="Calibrates on little text; --set wins over it.")] = False,
    output: Annotated[
        Path | None, typer.Option("--output", help="A JSON file for the figures.", callback=place_of)
    ] = None,
) -> None:
    """Predicts the mean KL of a conversion, block by block.

    Calibrates, then measures what each block alone costs; evaluates and trains nothing.
    """
    from npt.common.writable import check_file
    from npt.report.terminal import render_prediction
    from npt.runs.predict import run_prediction

    if output is not None:
        check_file("--output", output, ".json")
    render_prediction(run_prediction(_run_config(config, set_, quick), output), console())


@app.command()
def memory(
    config: Config = None,
    set_: Set = None,
    limit: Limit = None,
    processes: Processes = None,
    nodes: Nodes = None,
    device: DeviceName = None,
) -> None:
    """Predicts what a run will need, phase by phase.

    Also says what formed weight deltas would cost.
    """
    from npt.planning.devices import parse_bytes, planned_launch
    from npt.planning.formed_deltas import memory_table
    from npt.planning.tables import render_memory, render_plan

    size = None if limit is None else parse_bytes(limit)
    launch = planned_launch(processes or 1, nodes or 1, device)
    asked = (limit, processes, nodes, device) != (None,) * 4
    run = load(config, set_) if config or set_ or asked else None
    if run is not None:
        render_plan(run, size, console(), launch)
    render_memory(memory_table(run, here=launch.device is None), console())
