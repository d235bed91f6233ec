"""Fine-tunes plastic blocks on tasks, beside LoRA and DoRA: python -m benchmarks.plasticity --model builtin:tiny

    python -m benchmarks.plasticity --part development
    python -m benchmarks.plasticity --part test --seed 0 1 2
    python -m benchmarks.plasticity.tables

The development part trains every method with every rate, on a seed of its own; the test part takes for each task and method
the rate with the lowest held-out loss there. Prints a line for each run and keeps the figures in
benchmarks/results/plasticity-MODEL--PART.json; a command that was killed goes on with the next run.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.__main__ import machine
from benchmarks.kept import PARTS, Kept, ended, file_of, opened, read_kept
from benchmarks.plasticity.arms import ARMS, Size, base_with_template, measure
from benchmarks.plasticity.tasks import TASKS
from npt.errors import NPTError

KIND = "plasticity"
#: The seed on which rates are chosen; others are reported.
DEVELOPMENT = 1000
#: What both parts have to be measured with.
SAME = ("model", "size", "set")


def chosen_rates(records: Mapping[str, Mapping[str, Any]], task: str) -> dict[str, float]:
    """{arm: the rate with the lowest held-out loss} on a task.

    Args:
        records: of the development part.
        task: the task.

    Raises:
        NPTError: the task was not measured there.
    """
    own = [record["arms"] for record in records.values() if record["task"] == task]
    if not own:
        raise NPTError(f"{task}: the development part does not hold it; measure it there first")
    return {arm: min((arms[arm] for arms in own), key=lambda figures: float(figures["loss"]))["rate"] for arm in ARMS}


def tried_rates(records: Mapping[str, Mapping[str, Any]]) -> list[float]:
    """The rates of the development part, rising."""
    return sorted({figures["rate"] for record in records.values() for figures in record["arms"].values()})


def line_of(place: str, record: Mapping[str, Any]) -> str:
    """One run's figures on a line."""
    parts = [
        f"{arm} {100 * fmean(f['right']):.1f} % right, loss {f['loss']:.3f}, KL {f['kl']:.4f}"
        for arm, f in record["arms"].items()
    ]
    return f"{place}: {'; '.join(parts)}"


def runs_of(given: argparse.Namespace, tuned: Kept | None) -> dict[str, tuple[str, int, dict[str, float]]]:
    """{place: (task, seed, {arm: rate})} of all runs."""
    found = {}
    for task in given.task:
        if tuned is None:
            for rate in given.rates:
                found[f"{task}, rate {rate:g}"] = (task, DEVELOPMENT, dict.fromkeys(ARMS, rate))
            continue
        for seed in given.seed:
            found[f"{task}, seed {seed}"] = (task, seed, chosen_rates(tuned.contexts, task))
    return found


def run(given: argparse.Namespace, tuned: Kept | None, kept: Kept, path: Path, size: Size) -> None:
    """Measures what is not in the file yet, and keeps each run's figures."""
    runs = runs_of(given, tuned)
    with tempfile.TemporaryDirectory() as scratch:
        base = base_with_template(given.model, Path(scratch))
        for place, (task, seed, rates) in runs.items():
            how = partial(measure, base, task, seed, given.part, rates, size, given.set, Path(scratch) / "run")
            own = {"task": task, "seed": seed}
            found = kept.measured(place, lambda own=own, how=how: {**own, "arms": how()}, path)  # type: ignore[misc]
            print(line_of(place, found), flush=True)


def parser() -> argparse.ArgumentParser:
    """The options of the command."""
    found = argparse.ArgumentParser(prog="python -m benchmarks.plasticity", description=str(__doc__).splitlines()[0])
    add = found.add_argument
    add("--model", default="builtin:tiny", help="default: builtin:tiny")
    add("--part", choices=PARTS, default=PARTS[0], help="development chooses rates (default)")
    add("--task", nargs="+", choices=list(TASKS), default=list(TASKS), help="default: all")
    add("--seed", type=int, nargs="+", default=[0, 1, 2], help="of the test part (default: 0 1 2)")
    add("--rates", type=float, nargs="+", default=[3e-4, 1e-3, 3e-3, 1e-2], help="to choose from, the same for all")
    add("--steps", type=int, default=Size.steps, help=f"default: {Size.steps}")
    add("--batch", type=int, default=Size.batch, help=f"blocks of a step (default: {Size.batch})")
    add("--examples", type=int, default=Size.examples, help=f"that training may read (default: {Size.examples})")
    add("--rank", type=int, default=Size.rank, help=f"of the NPT adapter (default: {Size.rank})")
    add("--set", nargs="+", default=[], metavar="KEY=VALUE", help="further settings, such as model.key=input")
    add("--output", type=Path, help="the file of the figures (default: in benchmarks/results)")
    add("--tuned-on", type=Path, help="with --part test: the file of the development part")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; 1 for an error that is said in one line."""
    given = parser().parse_args(arguments)
    return ended(lambda: command(given))


def command(given: argparse.Namespace) -> None:
    """Measures what the command line asks for."""
    path = given.output or file_of(KIND, given.model, given.part)
    if min(given.steps, given.batch, given.examples, given.rank) < 1 or min(given.rates) <= 0:
        raise NPTError("--steps, --batch, --examples, --rank, --rates: use whole numbers from 1, and rates above 0")
    if given.part == PARTS[1] and DEVELOPMENT in given.seed:
        raise NPTError(f"--seed {DEVELOPMENT}: rates were chosen on it; use others")
    tuned = None if given.part == PARTS[0] else read_kept(given.tuned_on or file_of(KIND, given.model, PARTS[0]))
    size = Size(steps=given.steps, batch=given.batch, examples=given.examples, rank=given.rank)
    about = {"model": given.model, "part": given.part, "size": asdict(size), "set": given.set, "machine": machine()}
    if tuned is not None:
        if other := [name for name in SAME if tuned.about[name] != about[name]]:
            raise NPTError(f"the development part was measured with another {other[0]}; measure it again with this one")
        about["rates"] = tried_rates(tuned.contexts)  # a rate that is tried later may change the choice
    run(given, tuned, opened(path, about), path, size)


if __name__ == "__main__":
    sys.exit(main())
