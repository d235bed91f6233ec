"""`npt absorb`: from files to a store that other programs load, with a page about what came out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader
from peft import PeftModel
from transformers import AutoModelForCausalLM

from npt.cli import main
from npt.report.absorbed import write_absorbed_page

IDS = torch.arange(3, 40)[None]
OPTIONS = ["--number", "6", "--new-tokens", "4", "--blocks", "1,2", "--mu", "1", "--steps", "2", "--start", "closed"]


@pytest.fixture(scope="module")
def store(local_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with one context; tests only read it."""
    folder = tmp_path_factory.mktemp("absorbed")
    (folder / "c.txt").write_text("Bo is a cat <b>.")
    (folder / "q.txt").write_text("Is Bo?\nWho is Bo?\nIs it so?\n")
    (folder / "t.txt").write_text("a river flows by the old town")
    files = [
        "--context",
        str(folder / "c.txt"),
        "--questions",
        str(folder / "q.txt"),
        "--statistics",
        str(folder / "t.txt"),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NPT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        patch.setattr("npt.editing.absorbing.questions.TOKENS", 6)
        target = ["--store", str(folder / "s"), "--model", str(local_model)]
        assert main(["--quiet", "absorb", *files, *target, *OPTIONS]) == 0
    return folder / "s"


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NPT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def logits(local_model: Path, folder: Path | None = None) -> torch.Tensor:
    base = AutoModelForCausalLM.from_pretrained(local_model)
    model = base if folder is None else PeftModel.from_pretrained(base, str(folder))
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS).logits
    return found


def test_a_context_is_a_lora_on_several_projections(store: Path, local_model: Path) -> None:
    record = json.loads((store / "edits.json").read_text())
    assert record["format_version"] == 2 and record["edits"] == [] and record["layer"] is None
    assert record["modules"] == ["model.layers.1.mlp.down_proj", "model.layers.2.mlp.down_proj"]
    assert float((logits(local_model, store) - logits(local_model)).abs().max()) > 1e-3


def test_list_and_show(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (one,) = json.loads((store / "edits.json").read_text())["contexts"]
    assert main(["edit", "list", "--store", str(store)]) == 0
    assert capsys.readouterr().out.startswith(f"{one['id']}  context Bo is a cat <b>.")
    assert main(["edit", "show", one["id"], "--store", str(store)]) == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("before ", "context ", "after ", "recovered", "blocks 1 and 2, mu 1"))


def test_the_page_has_every_reported_question_and_escapes_text(store: Path, tmp_path: Path) -> None:
    page = (store / "report.html").read_text()
    (one,) = json.loads((store / "edits.json").read_text())["contexts"]
    assert one["compared"] and "Bo is a cat &lt;b&gt;." in page and "<b>." not in page and "<script" not in page
    assert page.count('<td class="text">') == 4 * len(one["compared"]) and "data:image/svg+xml" in page
    assert "&mu; 1" in page and "2 steps by gradient" in page
    one["setting"]["start"] = "zero"
    assert "&mu;" not in write_absorbed_page(tmp_path / "p.html", [one], None).read_text()


def test_verify_export_and_undo(
    store: Path, local_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (one,) = json.loads((store / "edits.json").read_text())["contexts"]
    assert main(["--quiet", "edit", "verify", "--store", str(store)]) == (0 if one["holds"] else 1)
    assert f"{int(one['holds'])} of 1 edits hold" in capsys.readouterr().out
    output = str(tmp_path / "e.gguf")
    assert main(["edit", "export", "--store", str(store), "--format", "gguf", "-o", output]) == 0
    names = {tensor.name for tensor in GGUFReader(output).tensors}
    assert names == {f"blk.{block}.ffn_down.weight.lora_{part}" for block in (1, 2) for part in "ab"}
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in store.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    assert main(["--quiet", "edit", "undo", one["id"], "--store", str(copy)]) == 0
    assert torch.equal(logits(local_model, copy), logits(local_model))
    assert "holds no absorbed context" in (copy / "report.html").read_text()
