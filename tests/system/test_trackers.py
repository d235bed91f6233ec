"""A run's figures, samples and plots reach TensorBoard and Weights & Biases; without either, its own files hold them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from npt.cli import main
from tests.helpers import settings

TRAIN = ["--quiet", "train"]
SAMPLES = {"training__prediction_logging_steps": 4}


def test_tensorboard_gets_figures_samples_and_plots(
    local_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    assert main([*TRAIN, *settings(local_model, tmp_path, training__report_to="[tensorboard]", **SAMPLES)]) == 0
    events = event_accumulator.EventAccumulator(str(tmp_path / "outputs" / "tensorboard"))
    events.Reload()
    tags = events.Tags()
    assert {path.name for path in tmp_path.iterdir()} == {"outputs", "checkpoints"}, "nothing where the command ran"
    assert {"train/loss", "eval/perplexity_ratio"} <= set(tags["scalars"]), "the curves of training lie with them"
    assert "evaluation/divergence/mean_kl" in tags["scalars"] and "plots/kl_histogram" in tags["images"]
    assert any("generation_samples" in tag for tag in tags["tensors"])
    report = json.loads((tmp_path / "outputs" / "evaluation_report.json").read_text())
    (figure,) = events.Scalars("evaluation/divergence/mean_kl")
    assert abs(figure.value - report["evaluations"]["divergence"]["mean_kl"]) < 1e-6


def test_wandb_offline_gets_figures_samples_and_plots(
    local_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb: Any = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    try:
        assert main([*TRAIN, *settings(local_model, tmp_path, wandb__enabled="true", **SAMPLES)]) == 0
        assert wandb.run.summary["evaluation/divergence/mean_kl"] > 0
        folder = Path(wandb.run.dir)
        names = {path.name.split("_")[0] for path in (folder / "media").rglob("*") if path.is_file()}
        assert {path.parent.name for path in (folder / "media").rglob("*.png")} == {"plots"}, names
        assert list((folder / "media" / "table").glob("generation_samples*"))
    finally:
        wandb.finish()


def test_without_a_tracker_nothing_is_lost(finished_run: Path, local_model: Path, tmp_path: Path) -> None:
    output = finished_run / "outputs"
    assert {p.name for p in output.iterdir()} >= {
        "report.html",
        "evaluation_report.json",
        "metrics.jsonl",
        "config.yaml",
    }
    assert 'id="missing"' not in (output / "report.html").read_text(encoding="utf-8")
    card = (finished_run / "checkpoints" / "best_model" / "README.md").read_text(encoding="utf-8")
    assert "perplexity ratio, NPT / base" in card
    target = tmp_path / "again" / "report.json"
    checkpoint = str(finished_run / "checkpoints" / "best_model")
    more = settings(local_model, tmp_path)
    assert main(["evaluate", "--checkpoint", checkpoint, "--output", str(target), *more]) == 0
    assert target.with_suffix(".html").is_file()
