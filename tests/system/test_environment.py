"""scripts/environment.sh tells a user in one line what the machine lacks; every tool it calls is a stand-in."""

from __future__ import annotations

import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path

import pytest

from scripts.versions import missed
from tests.helpers import REPOSITORY

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")

PYTHON = r"""#!/bin/sh
echo "$@" >>"$CALLS"
case "$*" in
  --version) echo "Python $VERSION" ;;
  *version_info*) [ "$VERSION" != 3.8.1 ] ;;
  "-c import torch") exit 1 ;;
  *"m.distribution('npt')"*) [ -f "$CALLS.earlier" ] ;;
  "-m pip uninstall "*) rm "$CALLS.earlier" ;;
  "-c import npt"*) [ -f "$CALLS.installed" ] ;;
  "-m venv "*)
    mkdir -p "$3/bin"
    echo "VIRTUAL_ENV='$3'" >"$3/bin/activate" ;;
  "-m pip install "*)
    if [ -n "$PIP_SAYS" ]; then echo "$PIP_SAYS" >&2; exit 1; fi
    echo "Collecting something"; echo "Requirement already satisfied: noise"
    touch "$CALLS.installed" ;;
esac
"""


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A folder with stand-ins for python3 and df beside the real small tools, and a clone's pinned files."""
    tools, root = tmp_path / "bin", tmp_path / "clone"
    tools.mkdir()
    root.mkdir()
    for name in ("sh", "bash", "sed", "awk", "cat", "cksum", "grep", "head", "cut", "uname", "rm", "mkdir", "touch"):
        found = shutil.which(name)
        assert found is not None
        (tools / name).symlink_to(found)
    for name in ("python3", "python"):
        (tools / name).write_text(PYTHON)
        (tools / name).chmod(0o755)
    (tools / "df").write_text('#!/bin/sh\necho "Filesystem"\necho "/dev/x 1 1 ${FREE_KB:-99000000} 1% /"\n')
    (tools / "df").chmod(0o755)
    for name in ("pyproject.toml", "constraints.txt", "requirements.txt", "requirements-test.txt"):
        shutil.copy(REPOSITORY / name, root)
    return tmp_path


def prepare(machine: Path, requirements: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    script = REPOSITORY / "scripts" / "environment.sh"
    variables = {
        "PATH": str(machine / "bin"), "CALLS": str(machine / "calls"), "TMPDIR": str(machine), "VERSION": "3.11.2",
        "PIP_SAYS": "",
    }  # fmt: skip
    return subprocess.run(
        ["bash", "-c", f"set -euo pipefail; . {script}; prepare_environment {machine / 'clone'} {requirements}; echo ready"],
        env={**variables, **environment}, capture_output=True, text=True,
    )  # fmt: skip


@pytest.mark.parametrize(
    "environment,words",
    [
        ({"VERSION": "3.8.1"}, "needs Python 3.10 or later, and found python3 (Python 3.8.1)"),
        ({"FREE_KB": "900000"}, "the disk is too full: 0 GB free"),
        ({"PIP_SAYS": "ERROR: [Errno 28] No space left on device"}, "the disk is full"),
        (
            {"PIP_SAYS": "ERROR: Could not find a version\nERROR: No matching distribution"},
            "reach the package registry",
        ),
        ({"PIP_SAYS": "WARNING: Retrying after connection broken by NewConnectionError"}, "reach the package registry"),
        ({"PIP_SAYS": "ERROR: the wheel is broken"}, "pip failed: ERROR: the wheel is broken"),
    ],
)
def test_one_readable_line(machine: Path, environment: dict[str, str], words: str) -> None:
    result = prepare(machine, **environment)
    lines = result.stderr.splitlines()
    assert result.returncode == 1 and "ready" not in result.stdout
    assert len(lines) == 1 and lines[0].startswith("npt: ") and words in lines[0], result.stderr


def test_it_says_what_it_does_and_does_it_once(machine: Path) -> None:
    first = prepare(machine)
    assert first.returncode == 0, first.stderr
    for words in ("making", "installing torch", "no GPU here", "installing the pinned dependencies", "ready"):
        assert words in first.stdout
    assert "Collecting something" in first.stdout and "noise" not in first.stdout
    calls = (machine / "calls").read_text()
    assert "--index-url https://download.pytorch.org/whl/cpu" in calls
    second = prepare(machine)
    assert second.stdout == "ready\n" and second.returncode == 0
    constraints = machine / "clone" / "constraints.txt"
    constraints.write_text(constraints.read_text() + "new==1.0\n")
    assert "installing the pinned dependencies" in prepare(machine).stdout


def test_the_tests_need_more_than_training(machine: Path) -> None:
    assert prepare(machine).returncode == 0
    result = prepare(machine, "requirements-test.txt")
    assert "installing the pinned dependencies of requirements-test.txt" in result.stdout
    assert "pip install" in (calls := (machine / "calls").read_text()) and "-r requirements-test.txt" in calls
    for requirements in ("", "requirements-test.txt"):
        assert prepare(machine, requirements).stdout == "ready\n", "each is installed once"


def test_an_installation_under_the_earlier_name_is_removed(machine: Path) -> None:
    (machine / "calls.earlier").touch()
    result = prepare(machine)
    assert result.returncode == 0 and "earlier name, npt" in result.stdout, result.stderr
    calls = (machine / "calls").read_text()
    assert calls.index("pip uninstall") < calls.index("pip install") and calls.count("pip uninstall") == 1
    assert "uninstall" not in prepare(machine, "requirements-test.txt").stdout


def test_a_gpu_takes_the_cuda_build(machine: Path) -> None:
    smi = machine / "bin" / "nvidia-smi"
    smi.write_text("#!/bin/sh\nexit 0\n")
    smi.chmod(0o755)
    result = prepare(machine)
    assert result.returncode == 0 and "with CUDA" in result.stdout
    assert "index-url" not in (machine / "calls").read_text()


def test_a_lower_bound_that_was_not_installed_is_named() -> None:
    there = version("numpy")
    assert list(missed([f"numpy>={there}", "numpy", "wings>=1 ; extra == 'nowhere'"])) == []
    (line,) = missed(["numpy>=0.1,<99"])
    assert "numpy" in line and "0.1" in line and there in line


def test_the_matrix_refuses_a_set_it_does_not_know() -> None:
    found = subprocess.run([str(REPOSITORY / ".ci" / "matrix"), "newst"], capture_output=True, text=True)
    assert found.returncode == 1 and "newst" in found.stderr and "newest, oldest" in found.stderr
