"""Runs npt commands, each in a process of its own: python -m tests.commands JOBS.

JOBS is a JSON file with a list of [folder to run in, arguments]. The libraries are imported once; each command then gets a
fork of this process. Beside JOBS, N.json is [exit status, stdout, stderr] of command N.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path

import datasets  # noqa: F401  this and the next two: imported here once, not in each fork
import matplotlib.figure  # noqa: F401
import transformers.trainer  # noqa: F401

from npt.cli import console_main


def run(folder: str, arguments: list[str], out: Path, err: Path) -> None:
    """The command in its folder with its streams; ends this process with its status."""
    status: int | str | None = 1
    try:
        for stream, path in ((1, out), (2, err)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), stream)
        os.chdir(folder)
        sys.argv = ["npt", *arguments]
        console_main()
    except SystemExit as ended:
        status = ended.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status if isinstance(status, int) else 99)


def main() -> None:
    jobs = Path(sys.argv[1]).resolve()
    for number, (folder, arguments) in enumerate(json.loads(jobs.read_text())):
        out, err = (jobs.with_name(f"{number}.{name}") for name in ("out", "err"))
        process = os.fork()
        if not process:
            run(folder, arguments, out, err)
        status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        jobs.with_name(f"{number}.json").write_text(json.dumps([status, out.read_text(), err.read_text()]))


if __name__ == "__main__":
    main()
