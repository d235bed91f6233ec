"""Commands on a GGUF base: train, evaluate and generate, and the adapter that names the file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from peft import AutoPeftModelForCausalLM

import npt
from npt.adapters.folder import load_adapter
from npt.cli import main
from tests.gguf_files import random_llama, write_gguf
from tests.helpers import quick_reports

IDS = torch.arange(2, 40)[None]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: one GGUF file and a text."""
    write_gguf(tmp_path / "m.gguf", random_llama(), "Q8_0")
    lines = [f"the {i} hats, the {i * 7 % 11} cats and the {i * 5 % 13} bats\n" for i in range(200)]
    (tmp_path / "t.txt").write_text("".join(lines))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NPT_CACHE", str(tmp_path / "cache"))
    return tmp_path


def options(base: str) -> list[str]:
    settings = {
        "model.base_model_name": base, "model.rank": 4, "data.dataset_name": "text", "data.data_files": "[t.txt]",
        "data.eval_texts": "[]", "data.max_length": 32, "data.num_train_samples": 48, "data.num_eval_samples": 8,
        "data.num_calibration_samples": 32, "training.num_train_steps": 2, "training.batch_size": 4,
    }  # fmt: skip
    return [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]


def test_train_evaluate_generate(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with quick_reports():
        assert main(["--quiet", "train", *options("m.gguf")]) == 0
    adapter, file = folder / "checkpoints" / "best_model", str(folder / "m.gguf")
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == file
    assert yaml.safe_load((adapter / "npt_run.yaml").read_text())["model"]["base_model_name"] == file
    report = json.loads((folder / "outputs" / "evaluation_report.json").read_text())
    assert report["model_config"]["base_model"] == file
    assert report["protocol"]["dtype"] == "float32" and report["protocol"]["dtype_reason"] == "as the checkpoint"
    card = (adapter / "README.md").read_text()
    assert f"npt.load_base({file!r})" in card and "base_model:" not in card
    again = ["--checkpoint", str(adapter)]
    with quick_reports():
        assert main(["--quiet", "evaluate", *again, "--output", "again.json"]) == 0
    figures = [json.loads(Path(name).read_text())["evaluations"]["divergence"]["mean_kl"]
               for name in ("again.json", "outputs/evaluation_report.json")]  # fmt: skip
    assert figures[0] == pytest.approx(figures[1], rel=1e-4)
    capsys.readouterr()
    assert main(["generate", "the ", *again, "--max-new-tokens", "3"]) == 0
    assert capsys.readouterr().out
    # PEFT finds the kept safetensors by the file's name.
    ours = load_adapter(npt.load_base(file)[0], adapter)
    theirs = AutoPeftModelForCausalLM.from_pretrained(adapter).eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(IDS).logits, ours(IDS).logits)
