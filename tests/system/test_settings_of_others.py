"""Settings that another library decides: each is taken over into the run's records, has no effect, or ends in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from npt import NPTConfig, calibrate, evaluate
from npt.cli import main
from npt.common.precision import matmul_precision
from npt.config import load_config
from npt.data.batches import batches_of
from npt.errors import CheckpointError, NPTError
from npt.runs.arguments import as_launched
from npt.training.resume import RECORD
from tests.helpers import blocks, logged, settings, trainer


@pytest.mark.usefixtures("quick_reports")
def test_the_mixed_precision_of_accelerate_is_recorded(
    local_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """In the configuration that was used, beside the adapter, in the report and in the checkpoints."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    words = ["--quiet", "train", *settings(local_model, tmp_path)]
    assert main(words) == 0
    checkpoints, outputs = tmp_path / "checkpoints", tmp_path / "outputs"
    for path in (outputs / "config.yaml", checkpoints / "best_model" / "npt_run.yaml"):
        assert load_config(path).optimization.mixed_precision == "bf16"
    protocol = json.loads((outputs / "evaluation_report.json").read_text())["protocol"]
    assert protocol["training_precision"] == "bf16" and protocol["computed_in"] == protocol["dtype"] == "float32"
    record = json.loads((checkpoints / "checkpoint-4" / RECORD).read_text())
    assert record["settings"]["optimization.mixed_precision"] == "bf16"
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    assert main([*words, "--resume"]) == 2
    assert 'optimization.mixed_precision is "no" here and "bf16"' in capfd.readouterr().err
    assert main([*words, "--resume", "--set", "optimization.mixed_precision=bf16"]) == 0, "the saved one resumes"


@pytest.mark.usefixtures("quick_reports")
def test_a_precision_that_accelerate_settles_later_is_recorded(
    local_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DeepSpeed's configuration decides it, once the trainer is made."""
    monkeypatch.setattr("accelerate.Accelerator.mixed_precision", property(lambda self: "bf16"))
    assert main(["--quiet", "train", *settings(local_model, tmp_path, training__num_train_steps=0)]) == 0
    assert load_config(tmp_path / "outputs" / "config.yaml").optimization.mixed_precision == "bf16"


def test_a_precision_npt_has_not_is_told_before_the_weights_are_loaded(
    local_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    monkeypatch.setattr("npt.runs.train.load_base", None)
    assert main(["--quiet", "train", *settings(local_model, tmp_path)]) == 2
    assert "npt: accelerate's mixed precision 'fp8'" in capfd.readouterr().err
    assert not list(tmp_path.iterdir())


def test_what_accelerate_asks_for_and_npt_has_not_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def launched(*overrides: str) -> Any:
        return as_launched(load_config(None, list(overrides))).optimization

    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    with pytest.raises(NPTError, match="mixed precision 'fp8'.*use no, fp16, bf16"):
        launched()
    assert launched("optimization.mixed_precision=fp16").mixed_precision == "fp16", (
        "the configuration's own comes first"
    )
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "8")
    with pytest.raises(NPTError, match="STEPS=8, and training.gradient_accumulation_steps=1: .*give both the same"):
        launched()
    assert launched("training.gradient_accumulation_steps=8")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "auto")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert launched().fsdp is True
    with pytest.raises(NPTError, match="optimization.fsdp: true can't be combined with optimization.use_4bit=true"):
        launched("optimization.use_4bit=true")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_torchs_default_dtype_changes_nothing(dtype: torch.dtype, local_model: Path) -> None:
    """Conversion, calibration and evaluation give what they give without it."""
    tokenizer = AutoTokenizer.from_pretrained(local_model)
    reports = []
    for default in (torch.float32, dtype):
        torch.set_default_dtype(default)
        try:
            base = AutoModelForCausalLM.from_pretrained(local_model, dtype=torch.float32)
            torch.manual_seed(0)
            model = get_peft_model(base, NPTConfig(rank=3))
            calibrate(model, list(batches_of(blocks(8), 4, torch.device("cpu"))))
            reports.append(evaluate(model, tokenizer, blocks(8, 1), context_length=16, prompts=["a"]))
        finally:
            torch.set_default_dtype(torch.float32)
        assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert json.dumps(reports[0]) == json.dumps(reports[1])


def test_the_protocol_says_how_figures_were_computed(local_model: Path) -> None:
    """An evaluation within somebody's autocast, another attention, and a lowered precision of products."""
    tokenizer = AutoTokenizer.from_pretrained(local_model)

    def protocol(**loading: Any) -> Any:
        base = AutoModelForCausalLM.from_pretrained(local_model, dtype=torch.float32, **loading)
        model = get_peft_model(base, NPTConfig(rank=3))
        with torch.autocast("cpu", torch.bfloat16, enabled=not loading):
            return evaluate(model, tokenizer, blocks(4), context_length=16, prompts=["a"])["protocol"]

    inside, eager = protocol(), protocol(attn_implementation="eager")
    assert (inside["dtype"], inside["computed_in"], inside["attention"]) == ("float32", "bfloat16", "sdpa")
    assert (eager["dtype"], eager["computed_in"], eager["attention"]) == ("float32", "float32", "eager")
    assert eager["matmul_precision"] == "ieee" and eager["quantization"] is None


def test_the_precision_of_products_is_recorded_and_compared(tmp_path: Path) -> None:
    cpu = torch.device("cpu")
    trainer(tmp_path, steps=4).train()
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert matmul_precision(cpu) == "bf16" and matmul_precision(torch.device("cuda")) == "tf32"
        with pytest.raises(CheckpointError, match='matrix products is "bf16" here and "ieee" in the checkpoint'):
            trainer(tmp_path).train(resume_from_checkpoint=True)
    finally:
        torch.set_float32_matmul_precision(before)
    assert matmul_precision(cpu) == "ieee"


def test_several_gpus_of_one_process_do_not_multiply_the_batch(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """HF's Trainer would take training.batch_size on each of them in one step; a step is what the configuration says."""

    class TwoGpus(TrainingArguments):  # type: ignore[misc]
        def __post_init__(self) -> None:
            super().__post_init__()
            self._n_gpu = self.device and 2

    whole = trainer(tmp_path / "one", steps=2)
    monkeypatch.setattr("tests.helpers.TrainingArguments", TwoGpus)
    run = trainer(tmp_path / "two", steps=2)
    assert run.args.train_batch_size == whole.args.train_batch_size == 4
    assert "one of the 2 GPUs is used" in caplog.text
    for each in (whole, run):
        each.train()
    assert logged(tmp_path / "one") == logged(tmp_path / "two")
