"""A run's figures, samples and plots reach TensorBoard and Weights & Biases; without either, its own files hold them."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from npt.cli import main
from npt.runs.tracker_runs import continued
from tests.helpers import settings

TRAIN = ["--quiet", "train"]
SAMPLES = {"training__prediction_logging_steps": 4}


@pytest.fixture(scope="module")
def tracked(local_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a run that TensorBoard and Weights & Biases followed, started in it; wandb still has it open."""
    pytest.importorskip("tensorboard")
    wandb: Any = pytest.importorskip("wandb")
    folder = tmp_path_factory.mktemp("tracked")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_DIR", str(tmp_path_factory.mktemp("wandb")))
        patch.setenv("WANDB_SILENT", "true")
        try:
            both = settings(local_model, folder, training__report_to="[tensorboard, wandb]", **SAMPLES)
            assert main([*TRAIN, *both]) == 0
            yield folder
        finally:
            wandb.finish()


def test_tensorboard_gets_figures_samples_and_plots(tracked: Path) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = event_accumulator.EventAccumulator(str(tracked / "outputs" / "tensorboard"))
    events.Reload()
    tags = events.Tags()
    assert {path.name for path in tracked.iterdir()} == {"outputs", "checkpoints"}, "nothing where the command ran"
    assert {"train/loss", "eval/perplexity_ratio"} <= set(tags["scalars"]), "the curves of training lie with them"
    assert "evaluation/divergence/mean_kl" in tags["scalars"] and "plots/kl_histogram" in tags["images"]
    assert any("generation_samples" in tag for tag in tags["tensors"])
    report = json.loads((tracked / "outputs" / "evaluation_report.json").read_text())
    (figure,) = events.Scalars("evaluation/divergence/mean_kl")
    assert abs(figure.value - report["evaluations"]["divergence"]["mean_kl"]) < 1e-6


def test_wandb_offline_gets_figures_samples_and_plots(tracked: Path) -> None:
    wandb: Any = pytest.importorskip("wandb")
    assert wandb.run.summary["evaluation/divergence/mean_kl"] > 0
    folder = Path(wandb.run.dir)
    names = {path.name.split("_")[0] for path in (folder / "media").rglob("*") if path.is_file()}
    assert {path.parent.name for path in (folder / "media").rglob("*.png")} == {"plots"}, names
    assert list((folder / "media" / "table").glob("generation_samples*"))
    wandb.finish()  # the next tests begin runs of their own


def test_a_resumed_run_goes_on_with_its_wandb_run(
    local_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick_reports: None
) -> None:
    """Switched on by either key. A new run on the same folder begins another; a person's own id stays."""
    wandb: Any = pytest.importorskip("wandb")
    monkeypatch.setattr("npt.runs.train.draw_run", lambda *_: [])
    for name, value in {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)
    on = settings(local_model, tmp_path, wandb__enabled="true")
    reported = settings(local_model, tmp_path, training__report_to="[wandb]")
    more = [["--set", f"training.num_train_steps={n}", "--resume"] for n in (6, 8, 10)]
    ids = []
    for arguments in (on, [*on, *more[0]], [*reported, *more[1]], on):
        try:
            assert main([*TRAIN, *arguments]) == 0
            ids.append(wandb.run.id)
        finally:
            wandb.finish()
        assert "WANDB_RUN_ID" not in os.environ and "WANDB_RESUME" not in os.environ
    assert ids[0] == ids[1] == ids[2] != ids[3]
    monkeypatch.setenv("WANDB_RUN_ID", "mine")
    try:
        assert main([*TRAIN, *on, *more[0]]) == 0
        assert wandb.run.id == os.environ["WANDB_RUN_ID"] == "mine"
    finally:
        wandb.finish()


class FakeMlflow(ModuleType):
    """The part of MLflow that transformers' callback uses, with its rules about runs and parameters."""

    __version__ = "3.0.0"

    def __init__(self) -> None:
        super().__init__("mlflow")
        self.__spec__ = ModuleSpec("mlflow", None)
        self.utils = SimpleNamespace(
            validation=SimpleNamespace(MAX_PARAM_VAL_LENGTH=500, MAX_PARAMS_TAGS_PER_BATCH=100)
        )
        self.logged: dict[str, list[int]] = {}
        self.parameters: dict[str, dict[str, str]] = {}
        self.active: str | None = None

    def is_tracking_uri_set(self) -> bool:
        return True

    def get_tracking_uri(self) -> str:
        return ""

    def active_run(self) -> Any:
        return None if self.active is None else SimpleNamespace(info=SimpleNamespace(run_id=self.active))

    def start_run(self, **_: Any) -> None:
        self.active = os.environ.pop("MLFLOW_RUN_ID", None) or f"run-{len(self.logged)}"
        self.logged.setdefault(self.active, [])

    def end_run(self) -> None:
        self.active = None

    def log_params(self, values: dict[str, Any], **_: Any) -> None:
        kept = self.parameters.setdefault(self.active or "", {})
        assert all(kept.get(k, str(v)) == str(v) for k, v in values.items()), "MLflow refuses another value"
        kept |= {k: str(v) for k, v in values.items()}

    def log_metrics(self, metrics: dict[str, float], step: int, **_: Any) -> None:
        if self.active is None:
            self.start_run()
        self.logged[self.active or ""].append(step)


def test_a_resumed_run_goes_on_with_its_mlflow_run(
    local_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick_reports: None
) -> None:
    """Also the last evaluation, which comes after the callback has ended its run."""
    mlflow = FakeMlflow()
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    options = {"training__report_to": "[mlflow]", "training__eval_steps": 3}
    assert main([*TRAIN, *settings(local_model, tmp_path, **options)]) == 0
    assert list(mlflow.logged) == ["run-0"] and mlflow.logged["run-0"][-1] == 4
    mlflow.end_run()
    more = settings(local_model, tmp_path, **options, training__num_train_steps=8)
    assert main([*TRAIN, *more, "--resume"]) == 0
    assert list(mlflow.logged) == ["run-0"] and mlflow.logged["run-0"][-1] == 8
    assert "MLFLOW_RUN_ID" not in os.environ and "MLFLOW_MAX_LOG_PARAMS" not in os.environ


def test_a_tracker_whose_run_is_not_known_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with continued(tmp_path, ["tensorboard", "clearml", "wandb"]):
        pass
    assert [record.args for record in caplog.records] == [("clearml",), ("wandb",)]
    (tmp_path / "trackers.json").write_text('{"wandb": 1}')
    with continued(tmp_path, []):
        assert "WANDB_RUN_ID" not in os.environ
    assert "not readable; trackers begin new runs" in caplog.text


def test_tensorboard_hides_what_was_logged_after_the_checkpoint(
    local_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick_reports: None
) -> None:
    monkeypatch.setattr("npt.runs.train.draw_run", lambda *_: [])
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    options = {"training__report_to": "[tensorboard]", "training__logging_steps": 1}
    arguments = settings(local_model, tmp_path, **options)
    assert main([*TRAIN, *arguments]) == 0
    shutil.rmtree(tmp_path / "checkpoints" / "checkpoint-4")
    assert main([*TRAIN, *arguments, "--resume"]) == 0
    events = event_accumulator.EventAccumulator(str(tmp_path / "outputs" / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/equivalence_loss")] == [1, 2, 3, 4]


def test_without_a_tracker_nothing_is_lost(
    finished_run: Path, local_model: Path, tmp_path: Path, quick_reports: None
) -> None:
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
