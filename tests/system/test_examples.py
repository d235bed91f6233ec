"""The example notebook and scripts run as they are, and show what they claim."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

from scripts.marked import ROOT

EXAMPLES = ROOT / "examples"


def kinds(notebook: Any) -> list[list[str]]:
    """The kinds of outputs of each code cell."""
    return [[output.output_type for output in cell.outputs] for cell in notebook.cells if cell.cell_type == "code"]


def test_the_notebook_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    nbformat = pytest.importorskip("nbformat")
    from scripts.notebook import NOTEBOOK, executed

    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    kept, fresh = nbformat.read(NOTEBOOK, as_version=4), executed(NOTEBOOK)
    nbformat.validate(kept)
    assert kinds(kept) == kinds(fresh), "the notebook is kept with its outputs: python -m scripts.notebook"
    assert all(kinds(fresh)), "every code cell shows something"
    assert not any(cell.metadata for cell in (*kept.cells, *fresh.cells)), "times are left out"
    assert NOTEBOOK.stat().st_size < 100_000
    for notebook in (kept, fresh):
        printed = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
        assert "same logits: True" in printed
        by_hand, without = (float(x) for x in re.findall(r"largest difference (\S+)", printed))
        assert by_hand < 1e-4 < 0.1 < without
        assert re.findall(r"rank (\d+), norm", printed) == ["1", "1", "1"]
        assert all(float(after) < 0.2 * float(before) for before, after in re.findall(r": (\S+) -> (\S+) on", printed))
        assert "site-packages" not in printed and "Warning" not in printed


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs a script of examples/ in an empty folder and returns what it printed."""

    def call(name: str) -> str:
        text = (EXAMPLES / name).read_text(encoding="utf-8")
        assert text.count("\n") < 60 and '\nMODEL = "builtin:tiny"' in text
        monkeypatch.chdir(tmp_path)
        torch.manual_seed(0)
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return call


@pytest.mark.usefixtures("quick_reports")
def test_trainers(run: Any, tmp_path: Path) -> None:
    printed = run("transformers_trainer.py")
    found = re.findall(r"perplexity (\S+), the original's (\S+); KL from the original (\S+)", printed)
    (equal, original, small), (lower, _, large) = [[float(x) for x in row] for row in found]
    assert equal == pytest.approx(original, rel=0.01) and lower < original
    assert small < 0.005 < large
    assert (tmp_path / "outputs" / "adapter" / "adapter_model.safetensors").is_file()


def test_trl(run: Any) -> None:
    pytest.importorskip("trl")
    answers = dict(re.findall(r"^(before|after|original): +(.*)$", run("trl_sft.py"), re.MULTILINE))
    assert answers["after"].endswith("a small green frog.")
    assert answers["original"] == answers["before"] != answers["after"]


def test_harness(run: Any) -> None:
    pytest.importorskip("lm_eval")
    found = re.findall(r"^(\w+): toys, accuracy (\S+)$", run("harness.py"), re.MULTILINE)
    scores = {name: float(score) for name, score in found}
    assert set(scores) == {"original", "NPT"} and scores["original"] > 0.4
    assert scores["NPT"] == pytest.approx(scores["original"], abs=0.1)


def test_the_index_of_examples_lists_every_file() -> None:
    text = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| \[([\w.]+)\]\(([\w.]+)\) \|", text, re.MULTILINE)
    files = {path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".ipynb")}
    assert {link for _, link in listed} == files == {name for name, _ in listed}
