"""Commands of the first minutes: a configuration to start from, which models work, a check of the installation."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from npt.cli.app import app, console, load, say
from npt.cli.options import Config, Set, place_of
from npt.common.distribution import DISTRIBUTION
from npt.errors import NPTError


class Preset(str, Enum):
    """The configurations of `npt.config.presets`."""

    FULL = "full"
    SMALL = "small"
    OPTIMIZED = "optimized"
    QUICK = "quick"
    FINETUNE = "finetune"


@app.command()
def init(
    file: Annotated[Path, typer.Argument(help="Where it goes; - prints it.", callback=place_of)] = Path("config.yaml"),
    preset: Annotated[
        Preset,
        typer.Option(
            "--preset",
            help="full: every key; small: GPT-2; optimized: 7 billion parameters in little memory; quick: a first look; "
            "finetune: chats of your own.",
        ),
    ] = Preset.FULL,
    model: Annotated[
        str | None, typer.Option("--model", metavar="NAME", help="The base: model.base_model_name.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Write over a file that is there.")] = False,
) -> None:
    """Writes a commented configuration to start from."""
    from npt.config.presets import preset_text

    text = preset_text(preset.value, model)
    if str(file) == "-":
        print(text, end="")
        return
    from npt.common.files import write_text
    from npt.common.writable import check_file

    check_file("npt init", file, ".yaml", ".yml")
    if file.exists() and not force:
        raise NPTError(f"{file}: is there already; name another file, or give --force to write over it")
    write_text(file, text)
    command = "finetune" if preset is Preset.FINETUNE else "train"
    say(f"{file}: edit it, then: npt {command} --config {file}")


class Standing(str, Enum):
    """The states of `npt.block.known_types`."""

    CONVERTED = "converted"
    REFUSED = "refused"
    NOT_TRIED = "not-tried"


@app.command()
def families(
    only: Annotated[Standing | None, typer.Option("--only", help="The types of one state.")] = None,
) -> None:
    """Lists model types: converted, refused, not tried.

    All causal types of the installed transformers, each judged by its default configuration.
    """
    from rich.table import Table

    from npt.block.known_types import standings

    groups: dict[tuple[str, str], list[str]] = {}
    for one in standings():
        groups.setdefault((one.state.value, one.reason), []).append(one.model_type)
    table = Table("types", "state", "model types", "why not")
    for (state, reason), types in sorted(groups.items()):
        if only is None or state == only.value.replace("-", " "):
            table.add_row(str(len(types)), state, ", ".join(types), reason)
    console().print(table)


@app.command()
def check(config: Config = None, set_: Set = None) -> None:
    """Checks the installation on a small random model.

    Converts it and tests what the conversion promises.
    """
    load(config, set_)
    from npt.selfcheck import run_checks

    failed = 0
    for name, problem in run_checks():
        say(f"{'ok  ' if problem is None else 'FAIL'}  {name}{'' if problem is None else ': ' + problem}")
        failed += problem is not None
    if failed:
        raise NPTError(
            f"{failed} check(s) failed; reinstall with: pip install --force-reinstall {DISTRIBUTION}, or in a clone "
            "pip install -c constraints.txt -e ."
        )
