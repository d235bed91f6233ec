"""`npt train` stopped by a full disk, a signal, a kill or a second run loses nothing and resumes to the same bits."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from npt.adapters.weights import save_adapter
from npt.cli import main
from npt.common.files import is_sealed, only_run
from npt.errors import NPTError
from npt.training.callbacks import JsonLinesCallback
from npt.training.checkpoints import last_checkpoint
from tests.helpers import REPOSITORY, quick_reports, settings, trainer

pytestmark = pytest.mark.usefixtures("quick_reports")


def test_a_run_on_a_full_disk_ends_in_one_line(
    local_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("npt.training.checkpoints.save_state", full)
    status = main(["--quiet", "train", *settings(local_model, tmp_path)])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("npt: ")]
    assert status == 1 and len(lines) == 1 and "checkpoint-2: the disk is full" in lines[0] and "needed" in lines[0]
    assert (tmp_path / "checkpoints" / "best_model" / "adapter_model.safetensors").is_file()


def test_a_disk_without_room_for_calibration_s_files_is_said_before_any_text_is_sampled(
    local_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("npt.equivalence.spill.shutil.disk_usage", lambda _: SimpleNamespace(free=2**24 + 2**10))
    monkeypatch.setattr("npt.runs.train.load_corpus", lambda *_: pytest.fail("text was sampled"))
    own_text = ["--set", "data.dataset_name=self", "--set", "data.data_files=null"]
    assert main(["--quiet", "train", *settings(local_model, tmp_path), *own_text]) == 1
    assert "the disk has 1.00 KiB to spare; make room, let TMPDIR name" in capsys.readouterr().err


def test_a_drive_that_goes_away_anywhere_is_one_line(
    local_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def gone(*_: Any, **__: Any) -> None:
        raise OSError(errno.EIO, "Input/output error", "/media/drive/tokenizer.json")

    monkeypatch.setattr("transformers.PreTrainedTokenizerBase.save_pretrained", gone)
    assert main(["--quiet", "train", *settings(local_model, tmp_path)]) == 1
    error = capsys.readouterr().err
    assert "npt: /media/drive/tokenizer.json: Input/output error; what was saved before is whole" in error
    assert last_checkpoint(tmp_path / "checkpoints") == tmp_path / "checkpoints" / "checkpoint-4"


def test_a_second_run_on_the_same_folder_is_refused(
    local_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for held in ("outputs", "checkpoints"):
        with only_run(tmp_path / held):
            before = sorted(tmp_path.rglob("*"))
            assert main(["--quiet", "train", *settings(local_model, tmp_path)]) == 2
            assert f"{held}: another run is writing there" in capsys.readouterr().err.replace("\n", " ")
            assert [
                p for p in sorted(tmp_path.rglob("*")) if p.is_file() and p not in before and p.name != ".lock"
            ] == []
    with only_run(tmp_path / "outputs", tmp_path / "outputs"):
        pass
    (tmp_path / "file").write_text("")
    with pytest.raises(NPTError, match="can't be written to"), only_run(tmp_path / "file" / "x"):
        pass


@pytest.fixture(scope="module")
def unbroken(local_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing stopped."""
    folder = tmp_path_factory.mktemp("unbroken")
    with quick_reports():
        assert main(["--quiet", "train", *settings(local_model, folder)]) == 0
    return folder


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_during_training_saves_and_resumes_to_the_same_bits(
    number: signal.Signals, status: int, unbroken: Path, local_model: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    before = signal.signal(number, signal.default_int_handler)  # a test run in the background has SIGINT ignored
    request.addfinalizer(lambda: signal.signal(number, before))
    original = JsonLinesCallback.on_step_begin

    def send(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            signal.raise_signal(number)

    monkeypatch.setattr(JsonLinesCallback, "on_step_begin", send)
    arguments = ["--quiet", "train", *settings(local_model, tmp_path / "cut")]
    capsys.readouterr()
    assert main(arguments) == status
    error = capsys.readouterr().err
    checkpoint = tmp_path / "cut" / "checkpoints" / "checkpoint-3"
    assert f"npt: stopped by {number.name} after step 3; {checkpoint} is saved: go on with --resume" in error
    assert is_sealed(checkpoint) and "Traceback" not in error
    monkeypatch.setattr(JsonLinesCallback, "on_step_begin", original)
    assert signal.getsignal(number) is signal.default_int_handler
    assert main([*arguments, "--resume"]) == 0
    whole, cut = (
        load_file(folder / "checkpoints/best_model/adapter_model.safetensors")
        for folder in (unbroken, tmp_path / "cut")
    )
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    rows = [
        [json.loads(r) for r in (folder / "outputs/metrics.jsonl").read_text().splitlines()]
        for folder in (unbroken, tmp_path / "cut")
    ]
    figures = [[(r["step"], r["eval_mean_kl"]) for r in found if "eval_mean_kl" in r] for found in rows]
    assert figures[0] == figures[1] and [step for step, _ in figures[0]] == [0, 2, 4]


@pytest.mark.parametrize(
    "where", ["npt.runs.train.load_corpus", "npt.runs.calibrate.fit_components", "npt.runs.evaluate.evaluate"]
)
def test_a_signal_elsewhere_leaves_at_once(
    where: str, local_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(where, lambda *_, **__: signal.raise_signal(signal.SIGTERM))
    assert main(["--quiet", "train", *settings(local_model, tmp_path)]) == 143
    error = capsys.readouterr().err
    assert "npt: stopped by SIGTERM at once" in error and "Traceback" not in error


def test_resume_begins_again_where_no_checkpoint_was_reached(
    local_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--quiet", "train", *settings(local_model, tmp_path), "--resume"]
    assert main(arguments) == 2  # nothing ever began there
    monkeypatch.setattr("npt.runs.calibrate.fit_components", lambda *_, **__: signal.raise_signal(signal.SIGTERM))
    assert main(arguments[:-1]) == 143
    monkeypatch.undo()
    assert main(arguments) == 0
    # Resumed again after it was finished, it changes nothing but its report.
    before = (tmp_path / "outputs" / "metrics.jsonl").read_text()
    assert main(arguments) == 0
    assert (tmp_path / "outputs" / "metrics.jsonl").read_text() == before


def test_sigterm_to_the_real_command(local_model: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "npt.cli",
        "train",
        *settings(local_model, tmp_path, training__num_train_steps=100_000),
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=tmp_path)
    metrics, end = tmp_path / "outputs" / "metrics.jsonl", time.monotonic() + 120
    while process.poll() is None and time.monotonic() < end:
        if metrics.is_file() and '"loss"' in metrics.read_text():
            process.terminate()
            break
        time.sleep(0.05)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 143 and "Traceback" not in error, error[-2000:]
    assert last_checkpoint(tmp_path / "checkpoints") is not None and "npt: stopped by SIGTERM after step" in error


def test_no_memory_is_one_line(
    local_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    monkeypatch.setattr("npt.runs.calibrate.fit_components", fail)
    assert main(["--quiet", "train", *settings(local_model, tmp_path)]) == 1
    error = capsys.readouterr().err
    assert "npt: out of memory (CUDA out of memory. Tried to allocate 2.00 GiB.)" in error and "npt memory" in error


@pytest.mark.parametrize("count", [1, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_runs_resume_to_the_same_bits(count: int) -> None:
    """A short version of `python -m scripts.kill_runs`."""
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    command = [sys.executable, "-m", "scripts.kill_runs", "--runs", str(count), "--seed", "1"]
    found = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=500)
    assert found.returncode == 0, found.stdout + found.stderr[-2000:]
    assert f"{count} resumed with the same bits, 0 lost" in found.stdout


def test_the_kill_script_notices_a_lost_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its comparison sees a bit, a missing line and a step taken twice."""
    from scripts.kill_runs import STEPS, outcome

    run = trainer(tmp_path, steps=STEPS)
    run.train()
    save_adapter(run.model, tmp_path / "checkpoints" / "best_model")
    (tmp_path / "outputs").mkdir()
    (tmp_path / "metrics.jsonl").rename(tmp_path / "outputs" / "metrics.jsonl")
    first = outcome(tmp_path)
    assert outcome(tmp_path) == first
    path = tmp_path / "checkpoints" / f"checkpoint-{STEPS}" / "optimizer.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    assert outcome(tmp_path) != first
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    lines = (tmp_path / "outputs" / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "outputs" / "metrics.jsonl").write_text("".join(lines[:-2] + lines[-1:]))
    assert outcome(tmp_path) != first
