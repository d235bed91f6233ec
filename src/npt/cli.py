"""The `npt` command: parse, call, print."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape

from npt.common.display import blocks_text, one_line, visible
from npt.common.files import AGAIN, DISK_ERRORS
from npt.common.launch import is_first_launched, process_label
from npt.common.places import place
from npt.errors import NPTError, RunError, Stopped

logger = logging.getLogger("npt")
app = typer.Typer(
    name="npt",
    help="Neuro-Plastic Transformer: attention that writes transient weight deltas for the MLP.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
#: Of the processes that torchrun or accelerate launch, the first one talks; the others only when something is wrong.
TALKS = is_first_launched()
console = Console(quiet=not TALKS)
#: Newer versions of typer carry click inside, older ones import it; the exported exception has the same parent.
UsageError: type[Exception] = typer.BadParameter.__mro__[1]


def _place(param: typer.CallbackParam, value: Any) -> Any:
    """The path or paths of an option or argument, so that `--output=~/r.json` means what it does in a configuration."""
    if value is None:
        return None
    option = next((f"{name} " for name in param.opts if name.startswith("--")), "")
    try:
        return [place(each) for each in value] if isinstance(value, list | tuple) else place(value)
    except NPTError as error:
        raise NPTError(f"{option}{error}") from error


Config = Annotated[
    Path | None,
    typer.Option("--config", help="YAML file; without one, the defaults: those of config.yaml.", callback=_place),
]
OwnConfig = Annotated[
    Path | None,
    typer.Option(
        "--config", help="YAML file; without one, the settings that the adapter's folder records.", callback=_place
    ),
]
Set = Annotated[list[str] | None, typer.Option("--set", help="dotted.key=value, the value in YAML; the last one wins.")]
Checkpoint = Annotated[
    Path,
    typer.Option("--checkpoint", help="Adapter folder; a .pt name means the folder of that name.", callback=_place),
]
Limit = Annotated[
    str | None, typer.Option("--limit", help="Memory of the device the run is for, such as 24GiB; this machine's else.")
]
Processes = Annotated[
    int | None, typer.Option("--processes", min=1, help="Processes the run is planned for, one per device.")
]
Nodes = Annotated[int | None, typer.Option("--nodes", min=1, help="Machines these processes are spread over.")]
DeviceName = Annotated[
    str | None, typer.Option("--device", help="Device the run is planned for: a100-80gb, h100-80gb or h200.")
]


class Decoding(str, Enum):
    """How `npt generate` chooses the next token; `sampled` is at temperature 1 from the whole distribution."""

    GREEDY = "greedy"
    SAMPLED = "sampled"
    BASE = "base"


class _VisibleFormatter(logging.Formatter):
    """Log lines hold file names and text of models; none of it may steer the terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record))


@app.callback()
def _setup(quiet: Annotated[bool, typer.Option("--quiet", help="Only warnings and results.")] = False) -> None:
    # peft 0.21 still calls transformers by an older name; nothing a user could change.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
    level = logging.ERROR if not TALKS else logging.WARNING if quiet else logging.INFO
    handler = RichHandler(console=Console(stderr=True), show_path=False, markup=False)
    handler.setFormatter(_VisibleFormatter("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("npt").setLevel(level)


@app.command()
def train(
    config: Config = None,
    set_: Set = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the last checkpoint.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what the run would do and need; read no weights, write nothing.")
    ] = False,
    processes: Processes = None,
    nodes: Nodes = None,
    device: DeviceName = None,
    limit: Limit = None,
) -> None:
    """Phase 1: convert, calibrate, train, evaluate; writes best_model/ and evaluation_report.json."""
    planned = {"--processes": processes, "--nodes": nodes, "--device": device, "--limit": limit}
    if dry_run:
        return _dry_run(config, set_, resume, **{name.removeprefix("--"): value for name, value in planned.items()})
    for name, value in planned.items():
        if value is not None:
            raise NPTError(
                f"{name} {value}: goes with --dry-run or npt memory; start a run with torchrun or accelerate"
            )
    from npt.common.writable import check_folders

    run = _load(config, set_)
    check_folders({f"paths.{name}": folder for name, folder in run.paths if folder is not None})
    from npt.report.terminal import render_report  # these two import what training needs
    from npt.runs.train import run_training

    found = run_training(run, resume=resume)
    render_report(found, console)
    _say(f"adapter: {Path(run.paths.checkpoint_dir) / 'best_model'}")
    _say(f"report:  {Path(run.paths.output_dir) / 'report.html'}, figures in evaluation_report.json beside it")


def _dry_run(config: Path | None, set_: list[str] | None, resume: bool, **planned: Any) -> None:
    from npt.planning.devices import parse_bytes
    from npt.planning.dry_run import dry_run, launch_here

    if resume:
        raise NPTError("--dry-run --resume: a dry run starts no run to go on with; leave one of the two out")
    limit = planned.pop("limit")
    size = None if limit is None else parse_bytes(limit)
    launch, run = launch_here(**planned), _load(config, set_)
    if is_first_launched():
        dry_run(run, launch, size, console)


@app.command()
def evaluate(
    checkpoint: Checkpoint,
    config: OwnConfig = None,
    output: Annotated[Path, typer.Option("--output", help="Where the report goes.", callback=_place)] = Path(
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
    render_report(run_evaluation(run, checkpoint, output, more_text=text or ()), console)
    _say(f"report: {output.with_suffix('.html')}, figures in {output}")


@app.command("merge-adapters")
def merge_adapters(
    adapters: Annotated[list[Path], typer.Argument(help="Two adapter folders or more.", callback=_place)],
    output: Annotated[Path, typer.Option("--output", "-o", help="The new adapter's folder.", callback=_place)],
) -> None:
    """Joins adapters of disjoint blocks of one base, trained by separate jobs, into one."""
    from npt.adapters.join import join

    parts = join(adapters, output)
    for part in parts:
        _say(f"{blocks_text(part.blocks)} of {part.folder}: {part.parameters:,} parameters")
    blocks = sorted(block for part in parts for block in part.blocks)
    _say(f"adapter: {output}, {blocks_text(blocks)}: {sum(part.parameters for part in parts):,} parameters")


@app.command()
def generate(
    prompts: Annotated[list[str], typer.Argument(help="One or more prompts.")],
    checkpoint: Checkpoint = Path("checkpoints/best_model"),
    config: OwnConfig = None,
    set_: Set = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1)] = 64,
    decoding: Annotated[
        Decoding, typer.Option("--decoding", help="base: by the settings of the base's own generation_config.json.")
    ] = Decoding.GREEDY,
) -> None:
    """Continues prompts with the NPT model and with the original, side by side."""
    from npt.adapters.settings import load_settings
    from npt.evaluation.generation import check_context, check_prompts, own_settings, side_by_side
    from npt.runs.evaluate import load_npt

    check_prompts(prompts)
    run = load_settings(checkpoint, config, set_ or (), ("model", "optimization"))
    model, tokenizer = load_npt(run, checkpoint)
    check_context(model, tokenizer, prompts, max_new_tokens)
    seed, own = None if decoding is Decoding.GREEDY else run.training.seed, decoding is Decoding.BASE
    if own:
        logger.info("decoding by the base's own settings: %s", own_settings(model) or "none beside the defaults")
    for sample in side_by_side(model, tokenizer, prompts, max_new_tokens, seed, own):
        for name in ("npt", "original"):
            console.print(f"[bold]{name:>8}[/bold]  {escape(visible(sample[name]))}")


Run = Annotated[Path, typer.Argument(help="A run's output folder.", callback=_place)]


@app.command()
def plot(
    run: Annotated[Path | None, typer.Argument(help="A run's output folder.", callback=_place)] = None,
    output_dir: Annotated[Path, typer.Option("--output-dir", help="The same, as an option.", callback=_place)] = Path(
        "outputs"
    ),
) -> None:
    """Draws the plots of a run from metrics.jsonl and, if there is one, its report, as PNG and SVG."""
    from npt.common.writable import check_folders
    from npt.report.plots import plot_run

    folder = output_dir if run is None else run
    if folder.is_dir():
        check_folders({"run": folder})
    for path in plot_run(folder):
        _say(str(path))


@app.command()
def report(run: Run = Path("outputs")) -> None:
    """Writes report.html, one self-contained page, from what a run's output folder holds."""
    from npt.common.writable import check_folders
    from npt.report.page import write_page

    if run.is_dir():
        check_folders({"run": run})
    _say(f"report: {write_page(run)}")


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Output folders of runs.", callback=_place)],
    output: Annotated[Path, typer.Option("--output", help="Where the plot goes.", callback=_place)] = Path(
        "comparison.png"
    ),
) -> None:
    """Runs side by side: one table, and one plot of perplexity ratio and KL over steps."""
    from npt.common.writable import check_file
    from npt.report.compare import PLOT_KINDS, comparison_tables, plot_comparison, read_runs
    from npt.report.run_files import malformed

    found = read_runs(runs)
    check_file("--output", output, *PLOT_KINDS)
    with malformed(", ".join(map(str, runs))):
        tables, path = list(comparison_tables(found, console.width)), plot_comparison(found, output)
    for table in tables:
        console.print(table)
    _say(f"plot: {path}" if path else "plot: none of the runs has two evaluations over steps to draw")


@app.command()
def watch(
    run: Run = Path("outputs"),
    interval: Annotated[float, typer.Option("--interval", min=0.1, max=3600, help="Seconds between two looks.")] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="Show it once and leave.")] = False,
) -> None:
    """Shows a live run: step, loss, perplexity ratio, KL, calibration; leaves when the report is written."""
    from npt.report.watch import watch_run

    watch_run(run, console, interval=interval, once=once)


@app.command()
def memory(
    config: Config = None,
    set_: Set = None,
    limit: Limit = None,
    processes: Processes = None,
    nodes: Nodes = None,
    device: DeviceName = None,
) -> None:
    """Predicts what a run will need, phase by phase, and what formed weight deltas would cost."""
    from npt.planning.devices import parse_bytes, planned_launch
    from npt.planning.formed_deltas import memory_table
    from npt.planning.tables import render_memory, render_plan

    size = None if limit is None else parse_bytes(limit)
    launch = planned_launch(processes or 1, nodes or 1, device)
    asked = (limit, processes, nodes, device) != (None,) * 4
    run = _load(config, set_) if config or set_ or asked else None
    if run is not None:
        render_plan(run, size, console, launch)
    render_memory(memory_table(run), console)


@app.command()
def check(config: Config = None, set_: Set = None) -> None:
    """Checks the installation: converts a small random model and tests what the conversion promises."""
    _load(config, set_)
    from npt.selfcheck import run_checks

    failed = 0
    for name, problem in run_checks():
        _say(f"{'ok  ' if problem is None else 'FAIL'}  {name}{'' if problem is None else ': ' + problem}")
        failed += problem is not None
    if failed:
        raise NPTError(f"{failed} check(s) failed; reinstall with: pip install -c constraints.txt -e .")


@app.command(
    "lm-eval",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    options_metavar="--model_args peft=FOLDER --tasks NAMES [options of the harness]",
)
def lm_eval(context: typer.Context) -> None:
    """lm-evaluation-harness on an NPT model: its own command and options, with the model type npt."""
    try:
        from npt.integrations.lm_eval import run_harness
    except ImportError as error:
        raise NPTError(f"npt lm-eval needs lm-evaluation-harness ({error}): pip install 'npt[lm-eval]'") from error
    run_harness(context.args)


def _load(config: Path | None, overrides: Sequence[str] | None) -> Any:
    from npt.config import load_config

    return load_config(config, overrides or ())


def _say(text: str) -> None:
    console.print(escape(visible(text)), soft_wrap=True, highlight=False)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status, with one line on stderr where it is not 0: 2 for bad input, 1 for a run
    that can't go on (a full disk, no memory, numbers that are not finite), 128 + the signal's number for a stop.
    """
    try:
        result = app(args=None if argv is None else list(argv), standalone_mode=False)
    except NPTError as error:
        _complain(str(error))
        return 128 + error.signal_number if isinstance(error, Stopped) else 1 if isinstance(error, RunError) else 2
    except MemoryError as error:
        _complain(_out_of_memory(error))
        return 1
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        _complain(
            f"{error.filename or 'a file'}: {error.strerror}; what was saved before is whole. Mend the disk or make room, "
            f"then {AGAIN}"
        )
        return 1
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError" and "can't allocate memory" not in str(error):
            raise
        _complain(_out_of_memory(error))
        return 1
    except (KeyboardInterrupt, typer.Abort):
        print("npt: interrupted", file=sys.stderr)
        return 130
    except UsageError as error:
        message = error.format_message()  # type: ignore[attr-defined]
        is_help = type(error).__name__ == "NoArgsIsHelpError"
        print(message if is_help else f"npt: {one_line(message)} (see npt --help)", file=sys.stderr)
        return 2
    return result if isinstance(result, int) else 0


def _complain(text: str) -> None:
    print(f"npt{process_label()}: {one_line(text)}", file=sys.stderr)


def _out_of_memory(error: BaseException) -> str:
    return (
        f"out of memory ({str(error).splitlines()[0][:160] if str(error) else 'main memory'}); what was saved before is "
        f"whole. `npt memory --config FILE` says what a run needs and which options help; then {AGAIN}"
    )


def console_main() -> None:
    """The installed `npt` script."""
    sys.exit(main())


if __name__ == "__main__":
    console_main()
