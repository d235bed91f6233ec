"""Every malformed input of the catalogue gives one line and exit status 2, writes nothing, shows no traceback."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from npt import NPTConfig
from npt.cli import _setup, main
from npt.config import load_config
from npt.runs.base_model import load_base
from tests.catalogue import CATALOGUE, Entry, Kit, tensors
from tests.helpers import REPOSITORY


@pytest.fixture(scope="module")
def kit(local_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Kit:
    """A base and an adapter on its upper half."""
    folder = tmp_path_factory.mktemp("kit") / "adapter"
    base = AutoModelForCausalLM.from_pretrained(local_model)
    get_peft_model(base, NPTConfig(rank=3)).save_pretrained(str(folder))
    return Kit(local_model, folder)


def laid_out(entry: Entry, folder: Path, kit: Kit) -> list[str]:
    """The entry's files in its folder; its command line."""
    for name, content in entry.files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    if entry.prepare is not None:
        entry.prepare(folder, kit)
    places = {"{model}": str(kit.model), "{adapter}": str(kit.adapter)}
    words = list(entry.arguments)
    for mark, path in places.items():
        words = [word.replace(mark, path) for word in words]
    return words


def contents(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def check(entry: Entry, status: int, out: str, err: str) -> None:
    assert status == 2, err
    assert out == ""
    assert err.startswith("npt: ") and err.count("\n") == 1 and err.endswith("\n"), err
    assert "Traceback" not in err and err.rstrip("\n").isprintable(), err
    missing = [word for word in entry.words if word not in err]
    assert not missing, (missing, err)


@pytest.mark.parametrize("entry", CATALOGUE, ids=lambda entry: entry.name)
def test_one_line_and_nothing_written(
    entry: Entry, kit: Kit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    arguments = laid_out(entry, tmp_path, kit)
    before = contents(tmp_path)
    capfd.readouterr()
    status = main(arguments)
    out, err = capfd.readouterr()
    check(entry, status, out, err)
    assert contents(tmp_path) == before


SCRIPTS = [entry for entry in CATALOGUE if entry.script]


def process(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *arguments], cwd=folder, env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip


def test_the_command_itself(kit: Kit, tmp_path: Path) -> None:
    """A fresh interpreter, with one entry; the others run in forks of one that has npt.cli imported."""
    arguments = laid_out(SCRIPTS[0], tmp_path, kit)
    before = contents(tmp_path)
    result = process("npt.cli", *arguments, folder=tmp_path)
    check(SCRIPTS[0], result.returncode, result.stdout, result.stderr)
    assert contents(tmp_path) == before


@pytest.fixture(scope="module")
def commands(kit: Kit, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where `tests.commands` left N.json of entry N, and the entry's folder N."""
    folder = tmp_path_factory.mktemp("commands")
    jobs = []
    for number, entry in enumerate(SCRIPTS):
        (folder / str(number)).mkdir()
        jobs.append([str(folder / str(number)), laid_out(entry, folder / str(number), kit)])
    (folder / "jobs.json").write_text(json.dumps(jobs))
    result = process("tests.commands", str(folder / "jobs.json"), folder=REPOSITORY)
    assert result.returncode == 0 and result.stdout == result.stderr == "", result.stderr
    return folder


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.parametrize("number", range(len(SCRIPTS)), ids=lambda number: SCRIPTS[number].name)
def test_commands_in_processes_of_their_own(number: int, commands: Path, kit: Kit, tmp_path: Path) -> None:
    status, out, err = json.loads((commands / f"{number}.json").read_text())
    check(SCRIPTS[number], status, out, err)
    laid_out(SCRIPTS[number], tmp_path, kit)
    assert contents(commands / str(number)) == contents(tmp_path)


def test_the_catalogue_is_as_large_as_it_says() -> None:
    names = [entry.name for entry in CATALOGUE]
    assert len(set(names)) == len(names) >= 130 and sum(entry.script for entry in CATALOGUE) >= 12
    assert all(entry.words and all(entry.words) for entry in CATALOGUE)


def test_the_kit_itself_is_good(kit: Kit, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """So that an entry fails for what it changes."""
    adapter = shutil.copytree(kit.adapter, tmp_path / "adapter")
    options = ["--checkpoint", str(adapter), "--set", f"model.base_model_name={kit.model}", "--max-new-tokens", "2"]
    assert main(["--quiet", "generate", "hello", *options]) == 0
    assert "original" in capsys.readouterr().out


@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may read and write everything")
@pytest.mark.parametrize("what", ["read", "write"])
def test_permissions(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "d").mkdir()
    (tmp_path / ("a.txt" if what == "read" else "d")).chmod(0)
    overrides = {
        "read": ["data.dataset_name=text", "data.data_files=[a.txt]"],
        "write": ["paths.output_dir=d/outputs"],
    }[what]
    assert main(["train", *(word for override in overrides for word in ("--set", override))]) == 2
    err = capfd.readouterr().err
    (tmp_path / "d").chmod(0o700)
    assert err.count("\n") == 1 and ("a.txt: can't be read" if what == "read" else "paths.output_dir=d") in err


def test_weights_that_are_left_over_are_told(kit: Kit, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = shutil.copytree(kit.model, tmp_path / "base")
    tensors("model.safetensors", lambda values: values.update(odd=torch.ones(2)))(folder)
    config = load_config(None, [f"model.base_model_name={folder}"])
    load_base(config.model, config.optimization)
    assert "1 weights of the checkpoint have no place in the model, first odd" in caplog.text


def test_log_lines_show_what_would_steer_a_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    _setup()
    logging.getLogger("npt").warning("file %s", "a\x1b[31mb\u202ec")
    err = capfd.readouterr().err
    assert "file a\\x1b[31mb\\u202ec" in err and "\x1b[31m" not in err and "\u202e" not in err


def test_generated_text_does_not_steer_the_terminal(
    kit: Kit, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sample = {"npt": "a\x1b[31mb", "original": "\u202ec [bold]d"}
    monkeypatch.setattr("npt.evaluation.generation.side_by_side", lambda *arguments: [sample])
    assert main(["generate", "a", "--checkpoint", str(kit.adapter), "--set", f"model.base_model_name={kit.model}"]) == 0
    out = capsys.readouterr().out
    assert "a\\x1b[31mb" in out and "\\u202ec [bold]d" in out and "\x1b[31m" not in out
