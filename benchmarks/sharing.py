"""Two processes on the same cores, by how OpenMP's threads wait for one another: python -m benchmarks.sharing

torch's threads share the work of every operator and wait for the slowest at its end, by spinning. Of two processes with a
thread for each core, spinning threads keep those from the cores that they wait for. For each setting of the environment the
same work runs in one process, and in two at once; figures are medians of the wall's time. Writes
benchmarks/results/sharing.json and the table in docs/speed.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks import contenders as c
from benchmarks.tables import RESULTS, sharing_table
from benchmarks.timing import Run, timed
from npt.common.launch import SPINS
from npt.errors import NPTError
from scripts.marked import ROOT, write_section

KEPT = RESULTS / "sharing.json"
#: {label of a row: what it sets}. libgomp, which torch brings along, reads both when it is loaded.
SETTINGS: dict[str, dict[str, str]] = {
    "nothing set": {},
    f"GOMP_SPINCOUNT={SPINS}": {"GOMP_SPINCOUNT": str(SPINS)},
    "GOMP_SPINCOUNT=1500": {"GOMP_SPINCOUNT": "1500"},
    "OMP_WAIT_POLICY=passive": {"OMP_WAIT_POLICY": "passive"},
}
#: {work: how often it runs}.
ROUNDS = {"forward": 10, "decoding": 6, "training step": 5}
#: Of the environment, what the settings decide.
DECIDED = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME", "OMP_NUM_THREADS")


def runs_of(name: str) -> dict[str, Run]:
    """{work: a run of it} on a model: 4 x 256 tokens; 32 tokens one at a time; a step of objective `logits`."""
    base = c.frozen(name)
    model = c.converted(base)
    ids = torch.randint(3, base.config.vocab_size, (4, 256), generator=torch.Generator().manual_seed(1))
    return {
        "forward": c.forward(model, ids),
        "decoding": c.decode(model, ids[:1], 32),
        "training step": c.npt_steps(model, ids)["logits"],
    }


def work(name: str) -> None:
    """A process's part: for each line on standard input that names a work, its median seconds on a line."""
    runs = runs_of(name)
    print("ready", flush=True)
    for line in sys.stdin:
        asked = line.strip()
        timed(runs[asked])
        print(json.dumps(median(timed(runs[asked]) for _ in range(ROUNDS[asked]))), flush=True)


def started(name: str, setting: Mapping[str, str]) -> subprocess.Popen[str]:
    """A process that waits for work.

    Raises:
        NPTError: it ended before.
    """
    environment = {key: value for key, value in os.environ.items() if key not in DECIDED} | dict(setting)
    command = [sys.executable, "-m", "benchmarks.sharing", "--work", "--model", name]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    _answer(process)
    return process


def _answer(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    line = process.stdout.readline().strip()
    if not line:
        raise NPTError(f"a process of the benchmark ended with {process.wait()}; its message is above")
    return line


def seconds_of(processes: Sequence[subprocess.Popen[str]], asked: str) -> float:
    """The mean over processes of their median seconds of a work that all do at once."""
    for process in processes:
        assert process.stdin is not None
        print(asked, file=process.stdin, flush=True)
    return sum(float(_answer(process)) for process in processes) / len(processes)


def measure(name: str, settings: Mapping[str, Mapping[str, str]], repeats: int) -> dict[str, Any]:
    """{setting: {work: {"alone": seconds, "together": seconds}}}, medians over repeats in which the settings take turns."""
    found: dict[str, dict[str, dict[str, list[float]]]] = {
        label: {asked: {"alone": [], "together": []} for asked in ROUNDS} for label in settings
    }
    for _ in range(repeats):
        for label, setting in settings.items():
            processes = [started(name, setting) for _ in range(2)]
            try:
                for asked, times in found[label].items():
                    times["alone"].append(seconds_of(processes[:1], asked))
                    times["together"].append(seconds_of(processes, asked))
            finally:
                for process in processes:
                    process.terminate()
                    process.wait()
    return {
        label: {asked: {how: median(values) for how, values in times.items()} for asked, times in works.items()}
        for label, works in found.items()
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints, writes; 1 for an error that is said in one line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sharing", description=str(__doc__).splitlines()[0])
    parser.add_argument("--model", default="builtin:tiny")
    parser.add_argument("--repeats", type=int, default=3, help="of all settings in turn (default: 3)")
    parser.add_argument("--output", type=Path, default=KEPT)
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.work:
        work(options.model)
        return 0
    kept = json.loads(options.output.read_text(encoding="utf-8")) if options.output.is_file() else {}
    try:
        kept[options.model] = measure(options.model, SETTINGS, options.repeats)
    except NPTError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    options.output.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    print(sharing_table(kept))
    write_section("docs/speed.md", "sharing", sharing_table(kept))
    return 0


if __name__ == "__main__":
    sys.exit(main())
