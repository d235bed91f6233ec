"""An adapter and its base in lm-evaluation-harness on tasks made of text, from the commands to the table."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model

from npt import NPTConfig, load_base
from npt.adapters.folder import load_adapter
from npt.builtin import documents
from npt.cli import main

pytest.importorskip("lm_eval")
NAMES = "cloze,continuation"


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """Two tasks of 12 items."""
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(documents("builtin:python-docs")[:20]), encoding="utf-8")
    options = ["--text", str(text), "--items", "12", "--words", "20"]
    assert main(["make-tasks", str(tmp_path / "tasks"), *options]) == 0
    return tmp_path / "tasks"


@pytest.fixture
def adapter(pretrained: Path, tmp_path: Path) -> Path:
    """An adapter as it is made, not calibrated, so that it answers unlike its base."""
    torch.manual_seed(0)
    base, _ = load_base(str(pretrained))
    get_peft_model(base, NPTConfig(rank=2, gain="norm")).save_pretrained(str(tmp_path / "adapter"))
    return tmp_path / "adapter"


def scored(folder: Path) -> dict[str, Any]:
    """The results that the harness wrote."""
    (path,) = folder.rglob("results*.json")
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def figures(results: dict[str, Any]) -> dict[tuple[str, str], float]:
    return {
        (task, key.partition(",")[0]): value
        for task, row in results["results"].items()
        for key, value in row.items()
        if key.endswith(",none") and "stderr" not in key
    }


def log_likelihoods(model: Any, tokenizer: Any, tasks: Path) -> list[float]:
    """Of the cloze's words, by one forward pass each."""
    found = []
    for line in (tasks / "cloze.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        before = tokenizer(row["context"])["input_ids"]
        ids = tokenizer(f"{row['context']} {row['word']}")["input_ids"]
        with torch.no_grad():
            logs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        found.append(sum(float(logs[at - 1, ids[at]]) for at in range(len(before), len(ids))))
    return found


@pytest.mark.usefixtures("own_tasks")
def test_base_and_npt_side_by_side(
    pretrained: Path, adapter: Path, tasks: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Each model's figures are those of a run of its own, and the cloze's are those of the models' own logits."""
    shared = ["--include-path", str(tasks), "--tasks", NAMES, "--batch_size", "4", "--device", "cpu"]
    capfd.readouterr()
    assert main(["lm-eval", "--checkpoint", str(adapter), *shared, "--output-path", str(tmp_path / "both")]) == 0
    printed = capfd.readouterr().out
    assert "cloze, 12 items" in printed and "continuation, 12 items" in printed and "NPT - original" in printed
    both = scored(tmp_path / "both")
    alone = {}
    for name, model in (("npt", f"peft={adapter}"), ("original", f"pretrained={pretrained}")):
        folder = tmp_path / name
        assert main(["lm-eval", "--model_args", model, *shared, "--output_path", str(folder)]) == 0
        alone[name] = figures(scored(folder))
        assert "comparison" not in scored(folder)
    assert "NPT - original" not in capfd.readouterr().out
    compared = {(row["task"], row["metric"]): row for row in both["comparison"]}
    assert set(compared) == set(alone["npt"]) == set(alone["original"]) and len(compared) == 4
    assert figures(both) == alone["npt"] and both["config"]["model"] == "npt" and "samples" not in both
    for name, expected in alone.items():
        assert {key: row[name]["value"] for key, row in compared.items()} == pytest.approx(expected, rel=1e-6), name

    base, tokenizer = load_base(str(pretrained))
    original = torch.tensor(log_likelihoods(base, tokenizer, tasks))
    npt = torch.tensor(log_likelihoods(load_adapter(base, adapter).eval(), tokenizer, tasks))
    row = compared["cloze", "perplexity"]
    assert row["original"]["value"] == pytest.approx(float(torch.exp(-original.mean())), rel=1e-4)
    assert row["npt"]["value"] == pytest.approx(float(torch.exp(-npt.mean())), rel=1e-4)
    assert row["changed"] == 12 and row["items"] == 12
    additions = row["original"]["value"] * original - row["npt"]["value"] * npt
    assert row["difference"]["error"] == pytest.approx(float(additions.std()) / math.sqrt(12), rel=1e-3)


@pytest.mark.usefixtures("own_tasks")
@pytest.mark.parametrize("pretrained", ["builtin:tiny"], indirect=True)
def test_without_the_base_and_with_files_of_answers(
    adapter: Path, tasks: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """--no-base scores one model. Kept answers are one model's, and logged samples the NPT model's."""
    shared = ["--checkpoint", str(adapter), "--include_path", str(tasks), "--tasks", "cloze", "--device", "cpu"]
    assert main(["lm-eval", *shared, "--no-base"]) == 0
    assert "NPT - original" not in capfd.readouterr().out
    kept = ["--use_cache", str(tmp_path / "answers"), "--log_samples", "--output_path", str(tmp_path / "out")]
    assert main(["lm-eval", *shared, *kept]) == 0
    row = scored(tmp_path / "out")["comparison"][0]
    assert row["changed"] == 12 and row["npt"]["value"] != row["original"]["value"]
    (samples,) = (tmp_path / "out").rglob("samples_cloze*.jsonl")
    items = [json.loads(line)["perplexity"] for line in samples.read_text(encoding="utf-8").splitlines()]
    assert row["npt"]["value"] == pytest.approx(math.exp(-sum(items) / len(items)), rel=1e-6)
