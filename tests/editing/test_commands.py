"""`npt edit`: from a fact to a LoRA that other programs load, and back."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader
from peft import PeftModel
from transformers import AutoModelForCausalLM

from npt import EditStore
from npt.cli import main
from npt.cli.edits import _show as show_edit
from npt.editing.requests import Request
from npt.editing.writing import Edit

IDS = torch.arange(3, 40)[None]
FACT = ["--prompt", "the home of Ada is", "--subject", "Ada", "--target", "Oslo"]
MORE = [
    {"prompt": "the work of Ben Bo is", "subject": "Ben Bo", "target": "art", "paraphrases": ["a job of Ben Bo:"]},
    {"prompt": "the river of Cam is", "subject": "Cam", "target": "old", "protect": ["the river of Cot is"]},
]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("NPT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    yield


@pytest.fixture(scope="module")
def store(local_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with one fact; tests only read it."""
    folder = tmp_path_factory.mktemp("stores") / "one"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NPT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        assert main(["--quiet", "edit", "write", "--store", str(folder), "--model", str(local_model), *FACT]) == 0
    return folder


def logits(local_model: Path, folder: Path | None = None) -> torch.Tensor:
    base = AutoModelForCausalLM.from_pretrained(local_model)
    model = base if folder is None else PeftModel.from_pretrained(base, str(folder))
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS).logits
    return found


def edits(folder: Path) -> list[dict[str, object]]:
    found: list[dict[str, object]] = json.loads((folder / "edits.json").read_text())["edits"]
    return found


def test_a_fact_is_a_lora(store: Path, local_model: Path) -> None:
    (edit,) = edits(store)
    assert (edit["prompt"], edit["subject"], edit["target"]) == ("the home of Ada is", "Ada", "Oslo")
    assert float((logits(local_model, store) - logits(local_model)).abs().max()) > 1e-3


def test_an_edit_that_does_not_hold_names_a_remedy(capsys: pytest.CaptureFixture[str]) -> None:
    request = Request("the home of Ada is", "Oslo", "Ada")
    for values, holds in (("newton", False), ("newton", True), ("optimised", False)):
        show_edit(Edit(request.id, request, (1,), values, 10, "a", "b", holds))
        assert ("remedy  of many facts, npt edit refine" in capsys.readouterr().out) == (
            values == "newton" and not holds
        )


def test_list_and_show(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    id = str(edits(store)[0]["id"])
    assert main(["edit", "list", "--store", str(store)]) == 0
    listed = capsys.readouterr().out
    assert listed.startswith(f"{id}  the home of Ada is -> Oslo") and listed.count("\n") == 1
    assert main(["edit", "show", id, "--store", str(store)]) == 0
    shown = capsys.readouterr().out
    assert "subject: Ada" in shown and "target: Oslo" in shown and "before" in shown


def test_verify_says_what_holds(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = main(["--quiet", "edit", "verify", "--store", str(store)])
    said = capsys.readouterr().out
    holds = bool(edits(store)[0]["holds"])
    assert status == (0 if holds else 1)
    assert f"{int(holds)} of 1 edits hold" in said and "before" in said and "after" in said


def test_a_preview_writes_nothing(local_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "new"
    command = [
        "--quiet",
        "edit",
        "write",
        "--preview",
        "--store",
        str(folder),
        "--model",
        str(local_model),
        "--layer",
        "1",
    ]
    assert main([*command, *FACT]) == 0
    assert "the home of Ada is" in capsys.readouterr().out and list(tmp_path.iterdir()) == []


def test_a_file_of_edits_is_written_once_and_undone_in_any_order(
    store: Path, local_model: Path, tmp_path: Path
) -> None:
    folder, file = tmp_path / "more", tmp_path / "edits.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in MORE) + "\n\n")
    command = ["--quiet", "edit", "write", "--store", str(folder), "--file", str(file), "--layer"]
    layer = ",".join(map(str, json.loads((store / "edits.json").read_text())["layer"]))
    assert main([*command, layer, "--model", str(local_model)]) == 0
    first = (folder / "adapter_model.safetensors").read_bytes()
    assert main(["--quiet", "edit", "write", "--store", str(folder), "--file", str(file)]) == 0
    assert (folder / "adapter_model.safetensors").read_bytes() == first and len(edits(folder)) == 2
    assert main(["--quiet", "edit", "write", "--store", str(folder), *FACT]) == 0
    joined = tmp_path / "joined"
    two = tmp_path / "two"
    assert main(["--quiet", "edit", "write", "--store", str(two), "--model", str(local_model), "--layer", layer,
                 "--file", str(file)]) == 0  # fmt: skip
    assert main(["--quiet", "edit", "merge", str(store), str(two), "--store", str(joined)]) == 0
    union, one_by_one = logits(local_model, joined), logits(local_model, folder)
    assert torch.allclose(union, one_by_one, atol=1e-5)
    ids = [str(edit["id"]) for edit in edits(folder)]
    assert main(["--quiet", "edit", "undo", ids[0], ids[1], "--store", str(folder)]) == 0
    assert torch.allclose(logits(local_model, folder), logits(local_model, store), atol=1e-4)
    assert main(["--quiet", "edit", "undo", ids[2], "--store", str(folder)]) == 0
    assert edits(folder) == [] and torch.equal(logits(local_model, folder), logits(local_model))


def test_facts_are_trained_together_and_go_back(
    local_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, file = tmp_path / "more", tmp_path / "edits.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in MORE))
    write = ["--quiet", "edit", "write", "--store", str(folder), "--layer", "1"]
    assert main([*write, "--model", str(local_model), *FACT]) == 0
    refine = ["--quiet", "edit", "refine", "--store", str(folder)]
    assert main(refine) == 2 and "holds 1 fact, and two or more are trained together" in capsys.readouterr().err
    assert main([*refine, "--steps", "-1"]) == 2 and "--steps -1: use a whole number from 0" in capsys.readouterr().err
    monkeypatch.setattr("npt.runs.edits.MANY", 3)
    hint = f"3 facts at once disturb other text and each other: npt edit refine --store {folder}"
    assert hint not in capsys.readouterr().out
    assert main([*write, "--file", str(file)]) == 0 and hint in capsys.readouterr().out
    solved = (folder / "adapter_model.safetensors").read_bytes()
    assert main([*refine, "--steps", "2"]) == 0
    said = capsys.readouterr().out
    assert f"of {1 + len(MORE)} facts hold" in said and "nats a token" in said
    record, trained = (
        json.loads((folder / "edits.json").read_text()),
        (folder / "adapter_model.safetensors").read_bytes(),
    )
    assert record["refine"]["steps"] == 2 and record["trained"] == [1] and trained != solved
    ids = [str(edit["id"]) for edit in edits(folder)]
    assert main(["--quiet", "edit", "undo", ids[0], "--store", str(folder)]) == 0
    assert json.loads((folder / "edits.json").read_text())["trained"] == [1]
    assert main([*write, *FACT]) == 0 and hint not in capsys.readouterr().out
    assert (folder / "adapter_model.safetensors").read_bytes() == trained
    assert main([*refine, "--steps", "0"]) == 0
    assert (folder / "adapter_model.safetensors").read_bytes() == solved
    assert "trained" not in json.loads((folder / "edits.json").read_text())


def test_export(store: Path, local_model: Path, tmp_path: Path) -> None:
    assert main(["edit", "export", "--store", str(store), "-o", str(tmp_path / "lora")]) == 0
    assert torch.equal(logits(local_model, tmp_path / "lora"), logits(local_model, store))
    assert main(["edit", "export", "--store", str(store), "--format", "gguf", "-o", str(tmp_path / "e.gguf")]) == 0
    reader = GGUFReader(tmp_path / "e.gguf")
    layers = json.loads((store / "edits.json").read_text())["layer"]
    shapes = {tensor.name: tuple(map(int, tensor.shape)) for tensor in reader.tensors}
    # GGUF lists the fastest dimension first.
    parts = {"lora_a": (40, 8), "lora_b": (8, 24)}
    assert len(layers) == 3 and shapes == {
        f"blk.{layer}.ffn_down.weight.{part}": shape for layer in layers for part, shape in parts.items()
    }
    values = {key: reader.fields[key].contents() for key in ("general.type", "general.architecture", "adapter.type")}
    assert values == {"general.type": "adapter", "general.architecture": "llama", "adapter.type": "lora"}
    assert reader.fields["adapter.lora.alpha"].contents() == 8.0


def test_a_killed_write_goes_on_where_it_stopped(
    local_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "edits.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in MORE))
    command = ["--quiet", "edit", "write", "--layer", "1", "--model", str(local_model), "--file", str(file), "--store"]
    assert main([*command, str(tmp_path / "whole")]) == 0
    monkeypatch.setattr("npt.runs.edits.PART", 1)
    write_many, calls = EditStore.write_many, []

    def killed(self: EditStore, records: object, **options: object) -> object:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return write_many(self, records, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(EditStore, "write_many", killed)
    assert main([*command, str(tmp_path / "parts")]) == 130
    assert len(edits(tmp_path / "parts")) == 1
    assert main([*command, str(tmp_path / "parts")]) == 0
    assert len(edits(tmp_path / "parts")) == 2 and len(calls) == 3
    assert torch.allclose(logits(local_model, tmp_path / "parts"), logits(local_model, tmp_path / "whole"), atol=1e-5)
