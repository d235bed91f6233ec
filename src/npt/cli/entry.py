"""The way in: the command called with its words, and what it says of an error."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import typer

from npt.cli.app import app
from npt.common.display import one_line
from npt.common.launch import process_label, wait_briefly
from npt.errors import NPTError, RunError, Stopped

# The commands, in the order of npt --help.
from npt.cli import runs, adapters, edits, bench, reports, installation  # noqa: F401  # isort: skip

#: Newer versions of typer carry click inside, older ones import it; the exported exception has the same parent.
UsageError: type[Exception] = typer.BadParameter.__mro__[1]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status, with one line on stderr where it is not 0: 2 for bad input, 1 for a run
    that can't go on (a full disk, no memory, numbers that are not finite), 128 + the signal's number for a stop.
    """
    try:
        result = app(args=None if argv is None else list(argv), prog_name="npt", standalone_mode=False)
    except NPTError as error:
        _complain(str(error))
        return 128 + error.signal_number if isinstance(error, Stopped) else 1 if isinstance(error, RunError) else 2
    except MemoryError as error:
        _complain(_out_of_memory(error))
        return 1
    except OSError as error:
        from npt.common.files import AGAIN, DISK_ERRORS

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
        print(_usage(error), file=sys.stderr)
        return 2
    return result if isinstance(result, int) else 0


def _usage(error: Any) -> str:
    """The words for a `UsageError`: the help where nothing was asked, else one line with the nearest name."""
    message, context = error.format_message(), error.ctx
    if type(error).__name__ == "NoArgsIsHelpError":
        return str(message)
    command = "npt" if context is None else context.command_path
    option, near = getattr(error, "option_name", None), getattr(error, "possibilities", None)
    outer = None if context is None else context.parent
    if option is not None and outer is not None and any(option in known.opts for known in outer.command.params):
        message = f"{option} goes before the command: npt {option} {context.info_name}"
    elif option is not None and near:
        message = f"No such option: {option}; did you mean {' or '.join(near)}?"
    return f"npt: {one_line(message)} (see {command} --help)"


def _complain(text: str) -> None:
    print(f"npt{process_label()}: {one_line(text)}", file=sys.stderr)


def _out_of_memory(error: BaseException) -> str:
    from npt.common.files import AGAIN

    return (
        f"out of memory ({str(error).splitlines()[0][:160] if str(error) else 'main memory'}); what was saved before is "
        f"whole. `npt memory --config FILE` says what a run needs and which options help; then {AGAIN}"
    )


def console_main() -> None:
    """The installed `npt` script."""
    wait_briefly()
    sys.exit(main())
