"""The Slurm script does its steps in order, with stand-ins for Slurm and torchrun: a run that ends, fails, is stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "recipes" / "slurm" / "train.sbatch"
STAND_INS = {
    "srun": 'while [[ $1 == --* ]]; do shift; done; exec "$@"',
    "scontrol": 'if [[ $1 == show ]]; then printf "node7\\nnode8\\n"; else echo "scontrol $*" >> events; fi',
    # Like torchrun after a SIGTERM: waits for its processes, then fails.
    "torchrun": """
        echo "torchrun $*" >> events
        trap 'echo term >> events; sleep 0.3; exit 1' TERM
        touch started
        for _ in $(seq 100); do [[ -e finish ]] && exit "$(cat finish)"; sleep 0.1; done
    """,
}


@pytest.fixture
def job(tmp_path: Path) -> Any:
    """Starts the script in a folder of its own; returns (process, folder)."""
    started: list[subprocess.Popen[str]] = []
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, body in STAND_INS.items():
        (programs / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (programs / name).chmod(0o755)
    activate = tmp_path / ".venv" / "bin" / "activate"
    activate.parent.mkdir(parents=True)
    activate.write_text("")

    def start(*arguments: str, **variables: str) -> tuple[subprocess.Popen[str], Path]:
        slurm = {"SUBMIT_DIR": str(tmp_path), "JOB_ID": f"test{os.getpid()}", "JOB_NODELIST": "n", "JOB_NUM_NODES": "2"}
        env = {**os.environ, **{f"SLURM_{name}": value for name, value in slurm.items()}, **variables}
        env["PATH"] = f"{programs}:{os.environ['PATH']}"
        process = subprocess.Popen(["bash", str(SCRIPT), *arguments], env=env, text=True)
        started.append(process)
        deadline = time.monotonic() + 20
        while not (tmp_path / "started").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        return process, tmp_path

    yield start
    for process in started:
        process.kill()
        process.wait()
    Path(f"/tmp/npt-test{os.getpid()}.pid").unlink(missing_ok=True)


def events(folder: Path) -> list[str]:
    return (folder / "events").read_text().splitlines()


def test_a_run_that_ends_is_not_queued_again(job: Any) -> None:
    process, folder = job("--set", "training.seed=1")
    (folder / "finish").write_text("0")
    assert process.wait(20) == 0
    (call,) = events(folder)
    assert "--nnodes=2 --nproc-per-node=8" in call and "--rdzv-endpoint=node7:29500" in call
    assert call.endswith("--config recipes/llama-3.1-70b-2nodes.yaml --set training.seed=1")


def test_a_run_that_fails_is_not_queued_again(job: Any) -> None:
    process, folder = job()
    (folder / "finish").write_text("3")
    assert process.wait(20) == 3
    assert len(events(folder)) == 1


def test_before_the_limit_the_run_is_stopped_once_and_queued_again(job: Any) -> None:
    process, folder = job()
    process.send_signal(signal.SIGUSR1)
    assert process.wait(20) == 1
    assert events(folder)[1:] == ["term", f"scontrol requeue test{os.getpid()}"]


def test_a_job_that_was_queued_again_goes_on(job: Any) -> None:
    process, folder = job(SLURM_RESTART_COUNT="1")
    (folder / "finish").write_text("0")
    assert process.wait(20) == 0
    assert "--resume" in events(folder)[0]
