"""EquivalenceTrainer resumes exactly, keeps the base frozen, logs every field and keeps the best adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainingArguments

from npt import EquivalenceTrainer, Objective
from npt.data.batches import batches_of
from npt.equivalence.objectives import update_scales
from npt.errors import ConversionError
from npt.training.callbacks import BestAdapterCallback
from npt.tuner.converted import active_layers
from tests.helpers import StopAt, blocks, logged, random_base, trainer


@pytest.mark.parametrize("objective", ["logits", "local", "composite"])
def test_resume_is_exact(objective: str, tmp_path: Path) -> None:
    """Stopping at a checkpoint and resuming gives the losses and the weights of an unbroken run, bit for bit."""
    whole = trainer(tmp_path / "whole", objective=objective)
    whole.train()
    first = trainer(tmp_path / "parts", objective=objective)
    first.args.max_steps = 8
    first.add_callback(StopAt(4))
    first.train()
    second = trainer(tmp_path / "parts", objective=objective)
    with torch.no_grad():
        for layer in active_layers(second.model):
            for parameter in layer.component.parameters():
                parameter.add_(1.0)  # whatever it had before must be replaced by the checkpoint's
    second.train(resume_from_checkpoint=True)
    for key in ("loss", "equivalence_loss", "regularization_loss", "mean_delta_norm"):
        assert logged(tmp_path / "parts", key) == logged(tmp_path / "whole", key), key
    assert len(logged(tmp_path / "whole")) == 8
    for one, other in zip(whole.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("objective", ["logits", "local", "composite"])
def test_training_lowers_its_objective(objective: str, tmp_path: Path) -> None:
    run = trainer(tmp_path, objective=objective, steps=40)
    held_out = next(batches_of(blocks(16, 5), 16, torch.device("cpu")))
    run.objective.scales = update_scales(run.model, held_out)

    def value() -> float:
        with torch.no_grad():
            return float(run.objective(run.model, held_out, 1.0).total)

    before = value()
    run.train()
    assert value() < 0.8 * before


def test_schedule_switches_objectives_and_survives_resume(tmp_path: Path) -> None:
    whole = trainer(tmp_path / "whole")
    whole.schedule = [(0, Objective("local")), (5, Objective("logits"))]
    whole.train()
    rows = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert [row["objective"] for row in rows if "loss" in row] == ["local"] * 5 + ["logits"] * 3
    parts = trainer(tmp_path / "parts")
    parts.schedule = [(0, Objective("local")), (5, Objective("logits"))]
    parts.add_callback(StopAt(4))
    parts.train()
    again = trainer(tmp_path / "parts")
    again.schedule = [(0, Objective("local")), (5, Objective("logits"))]
    again.train(resume_from_checkpoint=True)
    assert logged(tmp_path / "parts") == logged(tmp_path / "whole")


def test_patience_stops_what_no_longer_helps(tmp_path: Path) -> None:
    run = trainer(tmp_path, steps=50, learning_rate=1e-9, eval_strategy="steps", eval_steps=2)
    run.pop_callback(BestAdapterCallback)
    run.add_callback(BestAdapterCallback(tmp_path / "best_model", run.model, patience=2))
    run.evaluate()
    (tmp_path / "best_model" / "best.json").write_text('{"step": 0, "eval_mean_kl": 0.0}')
    run.train()
    assert run.state.global_step == 4


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_not_one_bit_of_the_base_changes(kind: str, tmp_path: Path) -> None:
    run = trainer(tmp_path, kind=kind, steps=3, weight_decay=0.1)
    own = {id(p) for layer in active_layers(run.model) for p in layer.component.parameters()}
    before = {n: p.detach().clone() for n, p in run.model.named_parameters()}
    run.train()
    for name, parameter in run.model.named_parameters():
        assert torch.equal(parameter, before[name]) == (id(parameter) not in own), name


def test_accumulated_and_whole_batches_train_alike(tmp_path: Path) -> None:
    """16 rows at once and 4 x 4 rows: the same losses and, to rounding, the same weights."""
    one = trainer(tmp_path / "one", steps=3, per_device_train_batch_size=16)
    four = trainer(tmp_path / "four", steps=3, per_device_train_batch_size=4, gradient_accumulation_steps=4)
    for run in (one, four):
        run.train()
    for (_, a), (_, b) in zip(logged(tmp_path / "one"), logged(tmp_path / "four"), strict=True):
        assert abs(a - b) <= 1e-5 * abs(a)
    for a, b in zip(one.model.parameters(), four.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_every_logged_step_has_the_fields(tmp_path: Path) -> None:
    run = trainer(tmp_path, steps=2, eval_strategy="steps", eval_steps=2)
    run.objective.regularization_weight, run.objective.regularizer = 0.01, "delta"
    run.train()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    step = next(row for row in rows if "loss" in row)
    for key in (
        "equivalence_loss",
        "regularization_loss",
        "learning_rate",
        "grad_norm",
        "mean_delta_norm",
        "world_size",
    ):
        assert isinstance(step[key], (int, float)), key
    assert abs(step["loss"] - step["equivalence_loss"] - 0.01 * step["regularization_loss"]) < 1e-4 * step["loss"]
    evaluation = next(row for row in rows if "eval_perplexity_ratio" in row)
    ratio = evaluation["eval_npt_perplexity"] / evaluation["eval_original_perplexity"]
    assert abs(ratio - evaluation["eval_perplexity_ratio"]) < 1e-9


def test_blocks_without_labels_or_mask_train_the_same(tmp_path: Path) -> None:
    """Plain token ids are enough, also accumulated."""
    bare = [{"input_ids": row} for row in blocks()["input_ids"]]
    runs = [trainer(tmp_path / name, steps=3, gradient_accumulation_steps=2) for name in ("whole", "bare")]
    runs[1].train_dataset = bare
    for run in runs:
        run.train()
    for (_, a), (_, b) in zip(logged(tmp_path / "whole"), logged(tmp_path / "bare"), strict=True):
        assert abs(a - b) <= 1e-5 * abs(a)


def test_a_regulariser_shrinks_the_delta(tmp_path: Path) -> None:
    norms = {}
    for weight in (0.0, 10.0):
        run = trainer(tmp_path / str(weight), steps=20, learning_rate=0.02)
        run.objective.regularization_weight = weight
        run.train()
        norms[weight] = logged(tmp_path / str(weight), "mean_delta_norm")[-1][1]
    assert norms[10.0] < 0.9 * norms[0.0]


def test_best_adapter_is_kept(tmp_path: Path) -> None:
    run = trainer(tmp_path, steps=1)
    best = BestAdapterCallback(tmp_path / "best_model", run.model)
    run.evaluate()
    kept = (tmp_path / "best_model" / "adapter_model.safetensors").read_bytes()
    before = best.best()
    with torch.no_grad():
        for layer in active_layers(run.model):
            for parameter in layer.component.parameters():
                parameter.add_(1.0)
    assert run.evaluate()["eval_mean_kl"] > before == best.best()
    assert (tmp_path / "best_model" / "adapter_model.safetensors").read_bytes() == kept


def test_an_unconverted_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="no active NPT adapter"):
        EquivalenceTrainer(random_base("llama"), TrainingArguments(output_dir=str(tmp_path), use_cpu=True))


@pytest.mark.parametrize("objective", ["logits", "local"])
def test_mixed_precision_reaches_the_objective(objective: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The objectives call what lies inside the model whose forward accelerate wraps in autocast."""
    seen: list[bool] = []
    original = Objective.__call__

    def call(self: Any, *args: Any) -> Any:
        seen.append(torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16)
        return original(self, *args)

    monkeypatch.setattr(Objective, "__call__", call)
    run = trainer(tmp_path, objective=objective, steps=4, bf16=True)
    run.train()
    assert seen and all(seen)
    assert all(value == value for _, value in logged(tmp_path))
