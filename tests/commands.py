"""Runs npt commands, each in a process of its own: python -m tests.commands JOBS.

JOBS is a JSON file with a list of [folder to run in, arguments]. The libraries are imported once; each command then gets a
fork of this process, which ends as the command does. Beside JOBS, N.json is [exit status, stdout, stderr] of command N.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from npt.cli import console_main


def started(folder: str, arguments: list[str], out: Path, err: Path) -> int:
    """The id of the new process; 0 in that process, where the command's folder and streams are in place."""
    process = os.fork()
    if not process:
        for stream, path in ((1, out), (2, err)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), stream)
        os.chdir(folder)
        sys.argv = ["npt", *arguments]
    return process


def main() -> None:
    jobs = Path(sys.argv[1]).resolve()
    for number, (folder, arguments) in enumerate(json.loads(jobs.read_text())):
        out, err = (jobs.with_name(f"{number}.{name}") for name in ("out", "err"))
        process = started(folder, arguments, out, err)
        if not process:
            return console_main()
        status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        jobs.with_name(f"{number}.json").write_text(json.dumps([status, out.read_text(), err.read_text()]))
    return None


if __name__ == "__main__":
    main()
