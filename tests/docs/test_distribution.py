"""The name under which pip knows the package, and the metadata that its page shows."""

from __future__ import annotations

import re
from collections.abc import Iterator
from email.message import Message
from pathlib import Path
from typing import Any

import pytest

import npt
from npt.common.distribution import DISTRIBUTION, LIBRARIES, install_extra, versions
from scripts.distribution import dead_links, metadata_problems
from scripts.marked import ROOT

FOLDERS = ("src", "docs", "recipes", "scripts", "benchmarks", "fuzz", ".ci", ".github")
#: What pip is told to install on one line, up to the end of the command.
PIP = re.compile(r"\bpip3?[ \t]+(?:install|download|show)\b([^`#;)&\n]*)")
NAMES_NPT = re.compile(r"(?<![\w./=-])npt(?![\w./-])")


def texts() -> Iterator[tuple[str, str]]:
    """(path, text) of every file that a user may read a command in."""
    paths = [path for path in ROOT.glob("*") if path.suffix in (".md", ".py", ".sh", ".txt", ".toml", ".yaml")]
    paths += [path for folder in FOLDERS for path in (ROOT / folder).rglob("*")]
    for path in sorted(paths):
        if path.is_file() and path.suffix not in (".safetensors", ".png", ".pyc") and "corpus" not in path.parts:
            yield str(path.relative_to(ROOT)), path.read_text(encoding="utf-8")


def names_npt(text: str) -> list[str]:
    """What pip would be told in `text`, where that is the package npt."""
    return [command for command in PIP.findall(text) if NAMES_NPT.search(command)]


def test_nothing_tells_pip_to_install_npt() -> None:
    found = [f"{name}: pip install{command}" for name, text in texts() for command in names_npt(text)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "line",
    [
        "pip install npt",
        "pip install 'npt[wandb]'",
        "(pip install -U npt)",
        "`pip download npt==0.8.1`",
        "pip install x npt",
    ],
)
def test_a_line_that_does_is_found(line: str) -> None:
    assert names_npt(line)


@pytest.mark.parametrize(
    "line",
    [
        "pip install neuroplastic",
        "`pip install .` brings `npt`",
        "pip install -e . && npt train",
        "pip install ./npt-1",
    ],
)
def test_other_lines_are_left_alone(line: str) -> None:
    assert not names_npt(line)


def extras() -> set[str]:
    """The names of the optional dependencies."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    found = re.search(r"^\[project\.optional-dependencies\]\n(.*?)^\[", text, re.MULTILINE | re.DOTALL)
    assert found is not None
    return set(re.findall(r"^([\w-]+) = ", found.group(1), re.MULTILINE))


def test_every_extra_that_is_named_exists() -> None:
    named = {name for _, text in texts() for name in re.findall(r"neuroplastic\[([\w-]+)\]", text)}
    named |= {name for _, text in texts() for name in re.findall(r"install_extra\(['\"]([\w-]+)['\"]\)", text)}
    assert {"wandb", "lm-eval", "quantization"} <= named <= extras()
    assert install_extra("wandb") == "pip install 'neuroplastic[wandb]'"


def test_versions_import_nothing_and_are_those_of_the_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    import peft
    import torch
    import transformers

    modules = {"npt": npt, "torch": torch, "transformers": transformers, "peft": peft}
    assert versions() == {name: module.__version__ for name, module in modules.items()}
    monkeypatch.setattr("npt.common.distribution.LIBRARIES", (*LIBRARIES, "no-such-distribution"))
    assert versions()["no-such-distribution"] == "not installed"


def project() -> dict[str, Any]:
    tomllib = pytest.importorskip("tomllib", reason="tomllib came with Python 3.11")
    loaded: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return loaded


def test_the_description_links_to_nothing_that_is_only_in_a_clone() -> None:
    hook = project()["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(dead_links(text)) > 10
    for rule in hook["substitutions"]:
        text = re.sub(rule["pattern"], rule["replacement"], text)
    assert dead_links(text) == []
    assert "commands (`docs/commands.md`)" in text and "`CONTRIBUTING.md`, `CHANGELOG.md`" in text


def test_the_metadata_is_complete() -> None:
    settings = project()
    assert settings["project"]["name"] == DISTRIBUTION and settings["project"]["scripts"] == {
        "npt": "npt.cli:console_main"
    }
    assert settings["tool"]["hatch"]["version"]["path"] == str(Path(npt.__file__).relative_to(ROOT))
    assert (Path(npt.__file__).parent / "py.typed").is_file()
    assert {"Programming Language :: Python :: 3.10", "Typing :: Typed"} <= set(settings["project"]["classifiers"])


def test_a_page_that_lacks_something_is_found() -> None:
    metadata = Message()
    for name in ("Summary", "Author", "License-Expression", "Requires-Python", "Project-URL", "Classifier", "Keywords"):
        metadata[name] = "x"
    metadata["Name"], metadata["Description-Content-Type"] = DISTRIBUTION, "text/markdown"
    metadata.set_payload("words " * 1000)
    assert metadata_problems(metadata) == []
    metadata.set_payload("words " * 1000 + "[a page](docs/page.md)")
    del metadata["Project-URL"]
    metadata.replace_header("Name", "npt")
    assert metadata_problems(metadata) == [
        "the metadata has no Project-URL", "the name is npt", "the description links to docs/page.md",
    ]  # fmt: skip
