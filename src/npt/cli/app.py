"""The `npt` command itself: the options before a command, where it prints, its log."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from npt.common.display import visible
from npt.common.launch import is_first_launched

if TYPE_CHECKING:
    from rich.console import Console

app = typer.Typer(
    name="npt",
    help="Neuro-Plastic Transformer: attention that writes transient weight deltas for the MLP.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
#: Of the processes that torchrun or accelerate launch, the first one talks; the others only when something is wrong.
TALKS = is_first_launched()


@cache
def console() -> Console:
    """Where results go. Made when it is first needed, as `npt --help` needs none."""
    from rich.console import Console

    return Console(quiet=not TALKS)


class _VisibleFormatter(logging.Formatter):
    """Log lines hold file names and text of models; none of it may steer the terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record))


class _Log(logging.Handler):
    """The log on stderr: in columns on a terminal, which takes rich; in a file, a line each, whole and with its date."""

    @cached_property
    def _handler(self) -> logging.Handler:
        from rich.console import Console

        errors = Console(stderr=True)
        if errors.is_terminal:
            from rich.logging import RichHandler

            handler: logging.Handler = RichHandler(console=errors, show_path=False, markup=False)
            handler.setFormatter(_VisibleFormatter("%(message)s"))
        else:
            handler = logging.StreamHandler()
            handler.setFormatter(_VisibleFormatter("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S"))
        return handler

    def emit(self, record: logging.LogRecord) -> None:
        self._handler.emit(record)


def _version(asked: bool) -> None:
    if asked:
        from npt.common.distribution import DISTRIBUTION, versions

        own, *libraries = versions().items()
        print(f"{DISTRIBUTION} {own[1]} ({', '.join(' '.join(library) for library in libraries)})")
        raise typer.Exit


@app.callback()
def _setup(
    quiet: Annotated[bool, typer.Option("--quiet", help="Only warnings and results.")] = False,
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_version, help="Show versions and exit.")
    ] = False,
) -> None:
    # peft 0.21 still calls transformers by an older name; nothing a user could change.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
    level = logging.ERROR if not TALKS else logging.WARNING if quiet else logging.INFO
    logging.basicConfig(level=logging.WARNING, handlers=[_Log()], force=True)
    logging.getLogger("npt").setLevel(level)
    # They warn at every import that an optional package of faster CPU kernels is missing, and at every product that float32
    # is cast, neither of which a user could change.
    for name in ("bitsandbytes.backends.cpu.ops", "bitsandbytes.autograd._functions"):
        logging.getLogger(name).setLevel(logging.ERROR)


def load(config: Path | None, overrides: Sequence[str] | None) -> Any:
    from npt.config import load_config

    return load_config(config, overrides or ())


def say(text: str) -> None:
    from rich.markup import escape

    console().print(escape(visible(text)), soft_wrap=True, highlight=False)
