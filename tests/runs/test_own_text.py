"""The text that a base writes for its run: no more of it than the run reads."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors import safe_open

from npt.cli import main
from npt.config import load_config
from npt.runs.texts import own_train_blocks
from npt.training.steps import held_back, untrained_blocks
from tests.helpers import settings


@pytest.mark.parametrize(
    ("overrides", "blocks"),
    [
        ([], 512),
        (["training.num_train_steps=0"], 384 + 32),
        (["training.num_train_steps=0", "data.num_calibration_samples=20"], 20 + 2),
        (["training.num_train_steps=0", "training.calibrate=false"], 2),
        (["training.num_train_steps=0", "data.num_train_samples=50"], 50),
    ],
)
def test_a_run_without_a_step_asks_for_what_it_calibrates_on(overrides: list[str], blocks: int) -> None:
    assert own_train_blocks(load_config(None, overrides)) == blocks


def test_blocks_to_choose_by_are_not_calibrated_on() -> None:
    for calibration in range(1, 700):
        blocks = untrained_blocks(calibration)
        assert blocks - held_back(blocks) == calibration


@pytest.mark.usefixtures("quick_reports")
def test_the_base_writes_no_more(local_model: Path, tmp_path: Path) -> None:
    given = {
        "data__dataset_name": "self", "data__num_train_samples": 60, "data__num_calibration_samples": 9,
        "data__num_eval_samples": 4, "training__num_train_steps": 0, "paths__cache_dir": str(tmp_path / "cache"),
    }  # fmt: skip
    assert main(["--quiet", "train", *settings(local_model, tmp_path, **given)]) == 0
    rows = []
    for path in (tmp_path / "cache" / "npt_samples").glob("self-*.safetensors"):
        with safe_open(path, "pt") as file:
            rows.append(file.get_slice(next(iter(file.keys()))).get_shape()[0])
    assert sorted(rows) == [4, 10]
