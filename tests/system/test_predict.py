"""`npt predict`, and runs whose blocks are chosen: what they print, keep and go on with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from npt.cli import main
from tests.helpers import quick_reports, settings


def test_predict_says_what_each_block_costs(
    local_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "prediction.json"
    words = settings(local_model, tmp_path, model__npt_layers="auto:1", data__num_train_samples=96)
    assert main(["predict", *words, "--output", str(output)]) == 0
    found, shown = json.loads(output.read_text()), capsys.readouterr().out
    alone = found["alone"]
    assert list(alone) == [f"layer_{i}" for i in range(4)] and all(cost > 0 for cost in alone.values())
    (chosen,) = found["chosen"]
    assert found["blocks"] == [chosen] and found["mean_kl"] == pytest.approx(alone[f"layer_{chosen}"])
    assert alone[f"layer_{chosen}"] == min(alone.values()) and found["texts"] == 8 and found["tokens"] == 8 * 31
    assert shown.count("left as it is") == 3
    assert f"converting block {chosen} of" in " ".join(shown.split())
    assert not (tmp_path / "outputs").exists() and not (tmp_path / "checkpoints").exists()


def test_a_prediction_needs_a_calibration(
    local_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["predict", *settings(local_model, tmp_path, training__calibrate="false")]) == 2
    assert "training.calibrate=false: a prediction is made from a calibration" in capsys.readouterr().err


def test_a_run_keeps_the_chosen_blocks_and_goes_on_with_them(local_model: Path, tmp_path: Path) -> None:
    """Report and adapter name them; what was predicted stands beside what was measured; --resume chooses nothing anew."""
    words = settings(
        local_model, tmp_path, model__npt_layers="auto", data__num_train_samples=96, paths__cache_dir=tmp_path / "c"
    )
    with quick_reports():
        assert main(["train", *words]) == 0
        report = json.loads((tmp_path / "outputs" / "evaluation_report.json").read_text())
        config = json.loads((tmp_path / "checkpoints" / "best_model" / "adapter_config.json").read_text())
        rows = [json.loads(line) for line in (tmp_path / "outputs" / "metrics.jsonl").read_text().splitlines()]
        prediction = report["prediction"]
        assert report["model_config"]["npt_layers"] == config["npt_layers"] == prediction["chosen"]
        assert len(config["npt_layers"]) == 2 and config["target_modules"] == [
            f"model.layers.{i}" for i in config["npt_layers"]
        ]
        assert prediction["measured"] == next(row["eval_mean_kl"] for row in rows if "eval_mean_kl" in row)
        assert {name: value for name, value in prediction.items() if name != "measured"} == rows[0]["prediction"]
        page = (tmp_path / "outputs" / "report.html").read_text()
        assert "held back; measured before training" in page
        assert main(["train", *words, "--set", "training.num_train_steps=6", "--resume"]) == 0
    resumed = json.loads((tmp_path / "outputs" / "evaluation_report.json").read_text())
    assert resumed["model_config"]["npt_layers"] == config["npt_layers"] and resumed["prediction"] == prediction
