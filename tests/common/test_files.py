"""Files are replaced whole, checkpoints are sealed, a folder has one run, and a full disk loses nothing."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from npt.adapters.weights import save_adapter
from npt.common import files as durable
from npt.common.files import append_json, is_sealed, keep_lines, only_run, seal, write_json, write_text
from npt.errors import CheckpointError, NPTError, RunError
from npt.training.checkpoints import last_checkpoint
from npt.training.signals import StopSignals
from npt.training.state_file import load_state, save_state
from tests.helpers import trainer


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"old": 1})

    def half(temporary: Path) -> None:
        temporary.write_text("{")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(RunError, match=r"a\.json: the disk is full; what was saved before is whole"):
        durable.write_file(path, half)
    assert json.loads(path.read_text()) == {"old": 1} and [p.name for p in tmp_path.iterdir()] == ["a.json"]
    # The content is on the disk before the name points to it.
    order: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda handle: order.append("flush"))
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda *names: (order.append("rename"), replace(*names)))
    write_text(path, "new")
    assert order == ["flush", "rename", "flush"] and path.read_text() == "new"


def test_a_link_is_replaced_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "outside").write_text("mine")
    (tmp_path / "report.json").symlink_to(tmp_path / "outside")
    write_json(tmp_path / "report.json", 1)
    assert (tmp_path / "outside").read_text() == "mine" and not (tmp_path / "report.json").is_symlink()


@pytest.mark.parametrize("torn", ["", '{"step": 3, "lo', "\x00" * 40, '{"a": "' + "x" * 10_000])
def test_a_torn_last_line_is_cut_off(torn: str, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n' + torn)
    append_json(path, {"step": 3})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]
    path.write_text(torn)
    append_json(path, {"step": 1})
    assert path.read_text() == '{"step": 1}\n'


def test_lines_are_kept_or_dropped(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\nnoise\n{"step": 5}\n[1]\n{"step": 2')
    keep_lines(path, lambda row: row["step"] < 3)
    assert path.read_text() == '{"step": 1}\n'
    keep_lines(tmp_path / "none.jsonl", lambda row: True)


def test_a_seal_holds_for_exactly_what_was_there(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-4"
    (folder / "inner").mkdir(parents=True)
    (folder / "a").write_text("one")
    (folder / "inner" / "b").write_text("two")
    assert not is_sealed(folder)
    seal(folder)
    assert is_sealed(folder)
    for path, text in ((folder / "a", "One"), (folder / "inner" / "b", "")):
        before = path.read_text()
        path.write_text(text)
        assert not is_sealed(folder)
        path.write_text(before)
    (folder / "inner" / "b").unlink()
    assert not is_sealed(folder)
    outside = tmp_path / "secret"
    outside.write_text("x")
    write_json(folder / durable.SEAL, {"../secret": durable._identity(outside)})
    assert not is_sealed(folder)
    for damage in ("[1]", "{", '{"a": 1}'):
        (folder / durable.SEAL).write_text(damage)
        assert not is_sealed(folder)


def test_the_last_checkpoint_is_the_last_finished_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert last_checkpoint(tmp_path / "none") is None
    for step in (9, 10, 100):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "w").write_text(str(step))
        seal(tmp_path / f"checkpoint-{step}")
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-100"
    (tmp_path / "checkpoint-100" / "w").write_text("torn")
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-10" and "checkpoint-100 was not finished" in caplog.text


def test_state_is_read_back_exactly(tmp_path: Path) -> None:
    import random

    import numpy as np

    state = {
        "rng": (random.getstate(), np.random.get_state()), "np": np.float64(0.1),
        3: {"step": torch.tensor(2.0), "m": torch.randn(3, 4).bfloat16()},
        "groups": [{"lr": 0.1 + 0.2, "betas": (0.9, 0.999), "on": True, "none": None, "params": [0, 1]}],
    }  # fmt: skip
    save_state(tmp_path / "s.safetensors", state)
    found = load_state(tmp_path / "s.safetensors")
    assert found["groups"] == state["groups"] and found["rng"][0] == state["rng"][0] and found["np"] == 0.1
    assert all(np.array_equal(a, b) for a, b in zip(found["rng"][1], state["rng"][1], strict=True))
    assert torch.equal(found[3]["m"], state[3]["m"]) and found[3]["m"].dtype == torch.bfloat16
    random.setstate(found["rng"][0])
    with pytest.raises(TypeError, match="object"):
        save_state(tmp_path / "x.safetensors", {"o": object()})
    (tmp_path / "s.safetensors").write_bytes(b"\x80\x04cposix\nsystem\n")
    with pytest.raises(CheckpointError, match="resume from an earlier checkpoint"):
        load_state(tmp_path / "s.safetensors")


def test_no_checkpoint_holds_or_reads_a_pickle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trainer(tmp_path, steps=4)
    monkeypatch.setattr(torch, "save", lambda *_, **__: pytest.fail("torch.save"))
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("torch.load"))
    run.train()
    names = {p.name for p in (tmp_path / "checkpoints" / "checkpoint-4").iterdir()}
    assert names == {
        "README.md", "adapter_config.json", "adapter_model.safetensors", "complete.json", "optimizer.safetensors",
        "npt_training.json", "rng_state_0.safetensors", "seen_text.safetensors", "trainer_state.json",
    }  # fmt: skip
    trainer(tmp_path, steps=8).train(resume_from_checkpoint=str(tmp_path / "checkpoints" / "checkpoint-4"))
    assert last_checkpoint(tmp_path / "checkpoints") == tmp_path / "checkpoints" / "checkpoint-8"


def test_older_checkpoints_go_only_when_the_new_one_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "checkpoints"
    trainer(tmp_path, steps=8, save_steps=2, save_total_limit=1).train()
    assert [p.name for p in folder.glob("checkpoint-*")] == ["checkpoint-8"]
    (folder / "checkpoint-5").mkdir()  # left unfinished by a killed run
    run = trainer(tmp_path, steps=10, save_steps=2, save_total_limit=1)
    monkeypatch.setattr(
        "npt.training.checkpoints.seal", lambda _: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error"))
    )
    with pytest.raises(RunError, match=r"checkpoint-10: can't be written \(Input/output error\)"):
        run.train(resume_from_checkpoint=str(folder / "checkpoint-8"))
    assert last_checkpoint(folder) == folder / "checkpoint-8" and not (folder / "checkpoint-10").exists()
    monkeypatch.undo()
    run = trainer(tmp_path, steps=10, save_steps=2, save_total_limit=1)
    run.train(resume_from_checkpoint=str(folder / "checkpoint-8"))
    assert [p.name for p in folder.glob("checkpoint-*")] == ["checkpoint-10"]


# -- a full disk -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small file system can be mounted by root on Linux only")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_space_is_checked_before_a_save(small_disk: Path) -> None:
    run = trainer(small_disk, steps=8)
    with pytest.raises(RunError, match=r"checkpoint-4 needs .* MiB .* and the disk has .* free; .* --resume"):
        run.train()
    assert not list((small_disk / "checkpoints").glob("checkpoint-*"))


def test_a_disk_that_fills_during_a_save(small_disk: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The check is fooled, the second save meets a disk that is really full: the first checkpoint loads, the run goes on from
    it when there is room, and ends where a run without a full disk ends."""
    monkeypatch.setattr("npt.training.checkpoints.check_space", lambda *_: None)
    folder, run = small_disk / "checkpoints", trainer(small_disk, steps=8)
    filler, save = small_disk / "filler", type(run)._save_optimizer_and_scheduler

    def fill(self: Any, output_dir: str) -> None:
        if output_dir.endswith("-8"):
            with filler.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
                while True:
                    file.write(b"\0" * 4096)
        save(self, output_dir)

    monkeypatch.setattr(type(run), "_save_optimizer_and_scheduler", fill)
    with pytest.raises(RunError, match=r"checkpoint-8: the disk is full \(1\.\d+ MiB needed\); what was saved"):
        run.train()
    assert last_checkpoint(folder) == folder / "checkpoint-4" and not (folder / "checkpoint-8").exists()
    filler.unlink()
    monkeypatch.undo()
    monkeypatch.setattr("npt.training.checkpoints.check_space", lambda *_: None)
    trainer(small_disk, steps=8).train(resume_from_checkpoint=str(folder / "checkpoint-4"))
    trainer(tmp_path / "other", steps=8).train()
    weights = [
        load_file(f / "checkpoints" / "checkpoint-8" / "adapter_model.safetensors")
        for f in (small_disk, tmp_path / "other")
    ]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])


def test_a_full_disk_keeps_the_best_adapter_and_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trainer(tmp_path, steps=4)
    save_adapter(run.model, tmp_path / "best")
    before = {p.name: p.read_bytes() for p in (tmp_path / "best").iterdir()}

    def full(folder: str, **_: Any) -> None:
        (Path(folder) / "adapter_model.safetensors").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(run.model, "save_pretrained", full)
    with pytest.raises(RunError, match="best: the disk is full"):
        save_adapter(run.model, tmp_path / "best")
    assert {p.name: p.read_bytes() for p in (tmp_path / "best").iterdir()} == before
    assert not (tmp_path / "best.part").exists()


# -- two runs, and signals ---------------------------------------------------------------------------------------------------


def test_processes_of_one_run_share_its_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with only_run(tmp_path):
        monkeypatch.setenv("RANK", "1")
        with only_run(tmp_path):
            pass
        monkeypatch.setenv("RANK", "0")
        with pytest.raises(NPTError, match="another run"), only_run(tmp_path):
            pass


def test_a_lock_ends_with_its_process(tmp_path: Path) -> None:
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    reader, writer = os.pipe()
    process = os.fork()
    if not process:
        try:
            with only_run(tmp_path):
                os.write(writer, b"held")
                time.sleep(60)
        finally:
            os._exit(1)
    os.close(writer)
    assert os.read(reader, 4) == b"held"
    with pytest.raises(NPTError, match="another run"), only_run(tmp_path):
        pass
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    os.close(reader)
    with only_run(tmp_path):
        pass


def test_an_ignored_signal_stays_ignored(request: pytest.FixtureRequest) -> None:
    """nohup, and a shell's background jobs."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    with StopSignals() as signals:
        signal.raise_signal(signal.SIGINT)
        assert signals.received is None and signal.getsignal(signal.SIGTERM) == signals._handle
