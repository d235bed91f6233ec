"""Quick answers of the command: help, versions, nearest names, completions in a shell; all without a heavy import."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import npt
from npt.cli import main
from npt.cli.options import DEVICES
from npt.common.launch import SPINS, wait_briefly

HEAVY = {
    "torch",
    "peft",
    "transformers",
    "datasets",
    "matplotlib",
    "accelerate",
    "numpy",
    "safetensors",
    "filelock",
    "gguf",
}


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_quick_answers_import_no_heavy_library() -> None:
    code = (
        f"import sys; from npt.cli import main; heavy = {HEAVY}\n"
        "assert main(['--help']) == 0\n"
        "assert not {'pydantic', 'yaml', 'rich.console', 'importlib.resources', 'importlib.metadata'} & set(sys.modules)\n"
        "assert main(['--version']) == main(['train', '--help']) == 0\n"
        "assert main(['train', '--confg', 'x']) == main(['trian']) == main(['train', '--set', 'model.rnak=3']) == 2\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    found = run(code)
    assert found.returncode == 0, found.stderr
    for words in ("did you mean --config?", "Did you mean 'train'?", "did you mean model.rank?"):
        assert words in found.stderr, words


@pytest.mark.parametrize("option", ["--help", "-h"])
def test_every_command_is_listed_with_a_whole_sentence(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([option]) == 0
    text = capsys.readouterr().out
    assert text.startswith("Usage: npt ") and "..." not in text.replace("[ARGS]...", "")
    own = (
        "train",
        "evaluate",
        "generate",
        "merge-adapters",
        "lm-eval",
        "make-tasks",
        "plot",
        "report",
        "watch",
        "check",
    )
    for command in own:
        assert f"\n  {command} " in text


def test_versions(capsys: pytest.CaptureFixture[str]) -> None:
    import peft
    import torch
    import transformers

    assert main(["--version"]) == 0
    libraries = f"torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}"
    assert capsys.readouterr().out == f"neuroplastic {npt.__version__} ({libraries})\n"


def test_devices_are_those_that_can_be_planned_for() -> None:
    from npt.planning.devices import DEVICES as KNOWN

    assert tuple(KNOWN) == DEVICES


def offered(words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What bash is offered for the last of the words."""
    monkeypatch.setenv("_NPT_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(len(words.split(" ")) - 1))
    with pytest.raises(SystemExit) as stopped:
        main([])
    assert stopped.value.code == 0
    return capsys.readouterr().out.split()


@pytest.mark.parametrize(
    "words,expected",
    [
        ("npt tr", ["train"]),
        ("npt train --res", ["--resume"]),
        ("npt train --set model.ra", ["model.rank="]),
        ("npt memory --device h", ["h100-80gb", "h200"]),
        ("npt generate x --decoding s", ["sampled"]),
    ],
)
def test_completions(
    words: str, expected: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert offered(words, monkeypatch, capsys) == expected


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_bash_completes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The script of --show-completion, sourced by a bash in which `npt` is this package's command."""
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")  # else an option without a value
    monkeypatch.setenv("_NPT_COMPLETE", "source_bash")
    with pytest.raises(SystemExit):
        main([])
    command = tmp_path / "npt"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m npt.cli "$@"\n')
    command.chmod(0o755)
    script = (
        capsys.readouterr().out
        + f'COMP_WORDS=("{command}" ev); COMP_CWORD=1; _npt_completion "{command}"; echo "${{COMPREPLY[@]}}"'
    )
    monkeypatch.delenv("_NPT_COMPLETE")
    found = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    assert found.stdout == "evaluate\n", found.stderr


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({}, f"GOMP_SPINCOUNT = '{SPINS}'"),
        ({"OMP_WAIT_POLICY": "passive"}, "GOMP_SPINCOUNT = '0'"),
        ({"GOMP_SPINCOUNT": "7"}, "GOMP_SPINCOUNT = '7'"),
    ],
)
def test_threads_spin_briefly_unless_the_environment_says_how_they_wait(given: dict[str, str], line: str) -> None:
    code = "import npt.cli.entry as e; e.main = lambda: 0\ntry: e.console_main()\nexcept SystemExit: import torch"
    kept = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    environment = kept | given | {"OMP_DISPLAY_ENV": "verbose"}  # OpenMP's library says what it read
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment
    )  # fmt: skip
    if "GOMP_SPINCOUNT" not in done.stderr:
        pytest.skip("this torch waits with another library than libgomp")
    assert line in done.stderr, done.stderr


def test_nothing_is_set_once_torch_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    assert "torch" in sys.modules
    wait_briefly()
    assert "GOMP_SPINCOUNT" not in os.environ
