"""CPU seconds of the command's quick answers: python -m benchmarks.command [--source SRC --label NAME]

Each command runs in a process of its own, in turn with the others and with the reference, `import typer, rich, pydantic`.
Figures are medians of user and system time. Writes benchmarks/results/command.json and the table in docs/speed.md; another
checkout's src is measured beside, under a label of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median

from benchmarks.tables import REFERENCE, RESULTS, command_table
from scripts.marked import ROOT, write_section

KEPT = RESULTS / "command.json"
COMMANDS = {
    REFERENCE: ["-c", "import typer, rich, pydantic"],
    "npt --help": ["-m", "npt.cli", "--help"],
    "npt --version": ["-m", "npt.cli", "--version"],
    "npt train --help": ["-m", "npt.cli", "train", "--help"],
    "npt train --confg x": ["-m", "npt.cli", "train", "--confg", "x"],
    "npt train --set model.rnak=3": ["-m", "npt.cli", "train", "--set", "model.rnak=3"],
    "npt trian": ["-m", "npt.cli", "trian"],
}
#: Those that end with an error.
REFUSED = ("npt train --confg x", "npt train --set model.rnak=3", "npt trian")


def cpu_seconds(arguments: list[str], source: Path) -> tuple[float, int]:
    """(user and system time, exit status) of a Python process with `source` first on its path."""
    environment = {**os.environ, "PYTHONPATH": str(source)}
    process = subprocess.Popen(
        [sys.executable, *arguments], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return usage.ru_utime + usage.ru_stime, process.returncode


def measure(source: Path, rounds: int) -> dict[str, float]:
    """{command: its median CPU seconds}, after one round that fills the caches of files and bytecode.

    What a checkout does not know yet, `npt --version` for one, is left out.
    """
    found: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for number in range(rounds + 1):
        for name, arguments in COMMANDS.items():
            seconds, status = cpu_seconds(arguments, source)
            if number and (status == 0) == (name not in REFUSED):
                found[name].append(seconds)
    return {name: round(median(times), 4) for name, times in found.items() if times}


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--source", type=Path, default=ROOT / "src", help="the src folder of a checkout")
    parser.add_argument("--label", default="now", help="of the column")
    parser.add_argument("--rounds", type=int, default=11)
    options = parser.parse_args()
    kept = json.loads(KEPT.read_text(encoding="utf-8")) if KEPT.is_file() else {}
    kept[options.label] = measure(options.source.resolve(), options.rounds)
    kept["now"] = kept.pop("now", kept[options.label])  # the last column
    KEPT.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
    write_section("docs/speed.md", "command", command_table(kept))
    print(command_table(kept))


if __name__ == "__main__":
    main()
