"""The `npt` command itself: the options before a command, where it prints, its log."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape

from npt.common.display import visible
from npt.common.launch import is_first_launched

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


class _VisibleFormatter(logging.Formatter):
    """Log lines hold file names and text of models; none of it may steer the terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record))


@app.callback()
def _setup(quiet: Annotated[bool, typer.Option("--quiet", help="Only warnings and results.")] = False) -> None:
    # peft 0.21 still calls transformers by an older name; nothing a user could change.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
    level = logging.ERROR if not TALKS else logging.WARNING if quiet else logging.INFO
    handler = _log_handler()
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("npt").setLevel(level)


def _log_handler() -> logging.Handler:
    """Log lines in columns on a terminal; in a file, a line each, whole and with its date."""
    errors = Console(stderr=True)
    if errors.is_terminal:
        handler: logging.Handler = RichHandler(console=errors, show_path=False, markup=False)
        handler.setFormatter(_VisibleFormatter("%(message)s"))
    else:
        handler = logging.StreamHandler()
        handler.setFormatter(_VisibleFormatter("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    return handler


def load(config: Path | None, overrides: Sequence[str] | None) -> Any:
    from npt.config import load_config

    return load_config(config, overrides or ())


def say(text: str) -> None:
    console.print(escape(visible(text)), soft_wrap=True, highlight=False)
