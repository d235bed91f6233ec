"""Options and arguments that commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from npt.common.places import place
from npt.errors import NPTError

#: The names of `npt.planning.devices`, which imports torch.
DEVICES = ("a100-80gb", "h100-80gb", "h200")


def place_of(param: typer.CallbackParam, value: Any) -> Any:
    """The path or paths of an option or argument, so that `--output=~/r.json` means what it does in a configuration."""
    if value is None:
        return None
    option = next((f"{name} " for name in param.opts if name.startswith("--")), "")
    try:
        return [place(each) for each in value] if isinstance(value, list | tuple) else place(value)
    except NPTError as error:
        raise NPTError(f"{option}{error}") from error


def _keys(incomplete: str) -> list[str]:
    """The keys that a shell offers behind --set."""
    from npt.config import known_keys

    return [f"{key}=" for key in known_keys() if key.startswith(incomplete)]


Config = Annotated[
    Path | None,
    typer.Option("--config", help="YAML file; without one, the defaults: those of config.yaml.", callback=place_of),
]
FinetuneConfig = Annotated[
    Path | None,
    typer.Option("--config", help="YAML file; without one, the defaults: docs/finetuning.md.", callback=place_of),
]
OwnConfig = Annotated[
    Path | None,
    typer.Option(
        "--config", help="YAML file; without one, the settings that the adapter's folder records.", callback=place_of
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="section.key=value, the value in YAML; the last one wins.",
        autocompletion=_keys,
    ),
]
Checkpoint = Annotated[
    Path,
    typer.Option("--checkpoint", help="Adapter folder; a .pt name means the folder of that name.", callback=place_of),
]
Limit = Annotated[
    str | None,
    typer.Option(
        "--limit", metavar="SIZE", help="Memory of the device the run is for, such as 24GiB; this machine's else."
    ),
]
Processes = Annotated[
    int | None, typer.Option("--processes", min=1, help="Processes the run is planned for, one per device.")
]
Nodes = Annotated[int | None, typer.Option("--nodes", min=1, help="Machines these processes are spread over.")]
DeviceName = Annotated[
    str | None,
    typer.Option(
        "--device",
        metavar="NAME",
        help=f"Device the run is planned for: {', '.join(DEVICES[:-1])} or {DEVICES[-1]}.",
        autocompletion=lambda: list(DEVICES),
    ),
]
Run = Annotated[Path, typer.Argument(help="A run's output folder.", callback=place_of)]
