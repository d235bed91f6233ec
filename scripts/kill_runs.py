"""Kills small trainings at random moments and resumes them: python -m scripts.kill_runs --runs 100

Every run trains a few steps with a checkpoint at every second one, is killed with SIGKILL (half of them once or twice
more while they resume), and is then resumed to its end. Half of the kills come at a random time, half at a random one
of the run's own file operations: an open for writing, a rename, a removal. A run is lost if it can't be resumed, or if
its last adapter, its optimiser state, its best adapter or its log differ in one bit from those of a run nobody killed.
Children are forked from a process that has the libraries imported (Linux and macOS). The report at the end of a run is
left out: no resume reads it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from npt.config import RunConfig, load_config
from npt.errors import CheckpointError
from npt.runs import train as pipeline

STEPS = 8
SETTINGS = [
    "data.dataset_name=builtin:python-docs", "data.max_length=32", "data.num_train_samples=40", "data.num_eval_samples=4",
    "data.num_calibration_samples=8", "data.eval_texts=[]", "model.rank=4", "training.batch_size=2",
    f"training.num_train_steps={STEPS}", "training.save_steps=2", "training.eval_steps=2", "training.logging_steps=1",
    "training.warmup_steps=0", "training.prediction_logging_steps=1000",
]  # fmt: skip
#: What Python tells its audit hooks about changes to files; for "open" the mode decides.
OPERATIONS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "shutil.rmtree")


@dataclass
class Tally:
    """What happened."""

    runs: int = 0
    kills: dict[str, int] = field(
        default_factory=lambda: {"at a file operation": 0, "at a random time": 0, "while training": 0}
    )
    from_start: int = 0
    lost: list[str] = field(default_factory=list)


def configuration(folder: Path) -> RunConfig:
    """A small run that writes to a folder."""
    paths = [f"paths.output_dir={folder / 'outputs'}", f"paths.checkpoint_dir={folder / 'checkpoints'}"]
    return load_config(None, [*SETTINGS, *paths])


def train(folder: Path, resume: bool) -> None:
    """The run itself, but for its report."""
    pipeline.report_best = lambda *_: {}  # type: ignore[assignment]
    try:
        pipeline.run_training(configuration(folder), resume=resume)
    except CheckpointError:  # killed before anything was written
        pipeline.run_training(configuration(folder))


def watch_files(folder: Path, act: Any) -> None:
    """Calls act() before every operation that changes a file below a folder."""
    below = str(folder)

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event in OPERATIONS and str(args[0]).startswith(below) and (event != "open" or _writes(args)):
            act()

    sys.addaudithook(hook)


def _writes(args: tuple[Any, ...]) -> bool:
    mode, flags = args[1], args[2]
    return (
        any(letter in mode for letter in "wax+") if isinstance(mode, str) else bool(flags & (os.O_WRONLY | os.O_RDWR))
    )


def child(folder: Path, resume: bool, kill_at: int | None = None, count_to: Path | None = None) -> int:
    """Forks a run; in it, SIGKILL at file operation number kill_at, or their number written to count_to. Its process id."""
    process = os.fork()
    if process:
        return process
    seen = [0]

    def act() -> None:
        seen[0] += 1
        if seen[0] == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    status = 1
    try:
        log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        torch.set_num_threads(1)
        watch_files(folder / "outputs", act)
        watch_files(folder / "checkpoints", act)
        train(folder, resume)
        if count_to is not None:
            count_to.write_text(str(seen[0]))
        status = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def finish(process: int, kill_after: float | None = None, begun: Path | None = None) -> int:
    """Waits for a child; its exit status, -9 for a killed one.

    It is killed after so many seconds, counted from when the file `begun` has changed where one is given.
    """
    start, before, alive = time.monotonic(), _changed(begun), True
    while True:
        done, status = os.waitpid(process, 0 if kill_after is None or not alive else os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if begun is not None and _changed(begun) == before:
            start = time.monotonic()
        elif kill_after is not None and time.monotonic() > start + kill_after:
            os.kill(process, signal.SIGKILL)
            alive = False
        time.sleep(0.002)


def _changed(path: Path | None) -> int:
    try:
        return 0 if path is None else path.stat().st_mtime_ns
    except FileNotFoundError:  # not there yet, or just set aside
        return 0


def outcome(folder: Path) -> dict[str, Any]:
    """Everything that has to be alike: digests of the last checkpoint's tensors and the best adapter's, and the log."""
    checkpoints, found = folder / "checkpoints", {}
    for path in [
        checkpoints / f"checkpoint-{STEPS}" / "adapter_model.safetensors",
        checkpoints / f"checkpoint-{STEPS}" / "optimizer.safetensors",
        checkpoints / "best_model" / "adapter_model.safetensors",
    ]:
        digest = hashlib.sha256()
        with safe_open(path, framework="pt") as file:
            for name in sorted(file.keys()):
                digest.update(name.encode() + file.get_tensor(name).numpy().tobytes())
        found[f"{path.parent.name}/{path.name}"] = digest.hexdigest()
    timed = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss", "total_flos", "epoch")
    rows = [json.loads(line) for line in (folder / "outputs" / "metrics.jsonl").read_text().splitlines()]
    found["metrics"] = [{k: v for k, v in row.items() if k not in timed} for row in rows if "train_runtime" not in row]
    return found


def one_run(folder: Path, rng: random.Random, seconds: float, operations: int, tally: Tally) -> None:
    """Kills a run one to three times, resumes it to its end."""
    resume = False
    for _ in range(1 if rng.random() < 0.5 else rng.choice((2, 3))):
        how = rng.choice(list(tally.kills))
        if how == "at a file operation":
            status = finish(child(folder, resume, kill_at=rng.randint(1, operations)))
        elif how == "at a random time":
            status = finish(child(folder, resume), rng.uniform(0, seconds))
        else:  # from the log's first line, or that a resume takes out of it, on
            status = finish(child(folder, resume), rng.uniform(0, seconds / 2), folder / "outputs" / "metrics.jsonl")
        if status == -signal.SIGKILL:
            tally.kills[how] += 1
        elif status:
            tally.lost.append(f"{folder.name}: exit status {status}, see {folder}/log.txt")
            return
        resume = True
    tally.from_start += not any((folder / "checkpoints").glob("checkpoint-*/complete.json"))
    status = finish(child(folder, True))
    if status:
        tally.lost.append(f"{folder.name}: not resumed, exit status {status}, see {folder}/log.txt")


def main(arguments: list[str] | None = None) -> int:
    """Runs, kills, resumes, compares; 0 when nothing was lost."""
    parser = argparse.ArgumentParser(prog="python -m scripts.kill_runs", description=str(__doc__).splitlines()[0])
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where the runs lie, kept afterwards; a temporary one by default")
    options = parser.parse_args(arguments)
    rng, tally = random.Random(options.seed), Tally()
    with tempfile.TemporaryDirectory() as temporary:
        root = (options.folder or Path(temporary)).resolve()
        unbroken, count = root / "unbroken", root / "operations"
        unbroken.mkdir(parents=True, exist_ok=True)
        start = time.monotonic()
        if finish(child(unbroken, False, count_to=count)):
            print((unbroken / "log.txt").read_text(), file=sys.stderr)
            return 1
        seconds, expected = time.monotonic() - start, outcome(unbroken)
        print(f"unbroken: {seconds:.1f} s, {count.read_text()} file operations", flush=True)
        for number in range(options.runs):
            folder = root / f"run-{number}"
            folder.mkdir()
            lost = len(tally.lost)
            one_run(folder, rng, seconds, int(count.read_text()), tally)
            tally.runs += 1
            if len(tally.lost) == lost and (found := outcome(folder)) != expected:
                parts = [name for name in expected if found[name] != expected[name]]
                tally.lost.append(f"{folder.name}: {', '.join(parts)} differ, see {folder}/log.txt")
            if (number + 1) % 10 == 0:
                print(f"{number + 1} runs, {sum(tally.kills.values())} kills, {len(tally.lost)} lost", flush=True)
        for line in tally.lost:
            print(line)
        kills = ", ".join(f"{count} {how}" for how, count in tally.kills.items())
        print(
            f"{tally.runs} runs killed {sum(tally.kills.values())} times ({kills}; {tally.from_start} before their first "
            f"checkpoint): {tally.runs - len(tally.lost)} resumed with the same bits, {len(tally.lost)} lost"
        )
    return 1 if tally.lost else 0


if __name__ == "__main__":
    sys.exit(main())
