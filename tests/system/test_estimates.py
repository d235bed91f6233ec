"""The plan that a run prints before it starts, the lines while it runs, and the times beside the estimates after it."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from npt import NPTConfig
from npt.cli import main
from npt.common import progress
from npt.common.precision import DTYPE_REASON
from npt.common.stopwatch import Stopwatch
from npt.config import load_config
from npt.equivalence.calibration_time import FitSeconds
from npt.runs import estimate
from npt.runs.estimate import (
    CALIBRATION,
    EVALUATION,
    PAGE,
    PREDICTION,
    SAMPLING,
    TARGETS,
    TRAINING,
    Part,
    parts_of,
    sizes_of,
)
from npt.runs.timing import Rates, measure
from tests.helpers import settings

RATES = Rates(
    timed_tokens=256,
    draw=2.0,
    draw_one=0.98,
    draw_rows=256,
    forward=0.001,
    fit=FitSeconds(once=7.0, chunk=0.002, later=0.001, chunk_tokens=2000, step=0.01),
    blocks=3,
    alone=0.02,
    compare=0.01,
    step={"logits": 0.1},
    detail=0.05,
    detail_once=11.0,
    sample=3.0,
)


def seconds(options: list[str], sampled: tuple[int, ...] = (), last_step: int | None = None) -> dict[str, float]:
    config = load_config(None, ["data.max_length=100", "data.eval_texts=[]", *options])
    return {part.name: part.seconds for part in parts_of(config, sizes_of(config, None, sampled, last_step), RATES)}


def test_the_parts_of_a_run_add_up() -> None:
    sizes = ["data.num_train_samples=320", "data.num_eval_samples=40", "data.num_calibration_samples=30"]
    steps = ["training.num_train_steps=20", "training.eval_steps=10", "training.batch_size=8"]
    found = seconds([*sizes, *steps, "training.prediction_logging_steps=20", "paths.teacher_cache=t"], (320, 40))
    # 32 of 320 blocks choose the best adapter. A batch of n texts takes 0.976 + 0.004 n s a token; there are three.
    chosen_by = 32 * 100 * 0.01
    assert found == pytest.approx(
        {
            SAMPLING: 99 * (3 * 0.976 + 360 * 0.004),
            CALIBRATION: 30 * 100 * 0.001 + 7 + 2000 * 0.002 + 1000 * 0.001 + 500 * 0.01,
            PREDICTION: 12 * 100 * 0.02,
            TARGETS: 288 * 100 * 0.001,
            TRAINING: 20 * 8 * 100 * 0.1 + 2 * chosen_by + 4 * 3.0,
            EVALUATION: chosen_by + 40 * 100 * 0.01 + 32 * 100 * 0.05 + 11 + 8 * 3.0,
            PAGE: estimate.PAGE_SECONDS,
        }
    )


def test_what_a_run_does_not_do_is_no_part_of_its_plan() -> None:
    assert set(seconds(["training.num_train_steps=0"])) == {CALIBRATION, PREDICTION, EVALUATION, PAGE}
    assert set(seconds(["model.carry=exact"])) == {EVALUATION, PAGE}
    assert not {CALIBRATION, PREDICTION} & set(seconds(["training.calibrate=false"]))
    resumed = seconds(["training.num_train_steps=20", "training.eval_steps=100"], last_step=15)
    assert CALIBRATION not in resumed and resumed[TRAINING] == pytest.approx(5 * 16 * 100 * 0.1 + 32 * 100 * 0.01)


def test_a_long_run_is_told_what_to_turn(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "npt")
    config, base = load_config(), SimpleNamespace(dtype=torch.float32, **{DTYPE_REASON: "no units"})
    estimate.say_plan(config, base, [Part(SAMPLING, "9 tokens", 900.0), Part(EVALUATION, "", 10.0)], RATES, quick=60.0)
    estimate.say_plan(config, base, [Part(SAMPLING, "9 tokens", 90.0)], RATES, quick=60.0)
    assert caplog.messages[0].startswith("plan for builtin:tiny in float32 (no units); times from timing 256 tokens")
    told = [message for message in caplog.messages if message.startswith("shorter")]
    assert len(told) == 1 and "--quick (60 s" in told[0] and "data.num_train_samples=512" in told[0]
    assert "num_calibration_samples" not in told[0] and "evaluation:" not in told[0]


def test_measuring_leaves_the_model_as_it_was(local_model: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(local_model)
    model: Any = get_peft_model(base, NPTConfig(npt_layers=[1, 3], rank=2))
    before = {name: x.clone() for name, x in model.state_dict().items()}
    record = model.peft_config["default"].text_record
    modes, torch_state = [m.training for m in model.modules()], torch.get_rng_state()
    config = load_config(None, ["data.max_length=16", "training.batch_size=2"])
    rates = measure(model, AutoTokenizer.from_pretrained(local_model), config)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert modes == [m.training for m in model.modules()] and torch.equal(torch_state, torch.get_rng_state())
    assert model.peft_config["default"].text_record is record and not len(record.trained.hashes)
    assert set(rates.step) == {"logits"} and rates.draw_rows == 256
    for name in ("draw", "forward", "compare", "detail", "sample"):
        assert getattr(rates, name) > 0
    assert rates.fit.once > 0 and rates.fit.chunk_tokens == 65536
    only_evaluated = measure(model, AutoTokenizer.from_pretrained(local_model), config, trains=False)
    assert (only_evaluated.step, only_evaluated.fit) == ({}, FitSeconds()) and FitSeconds().of(9) == 0


def test_a_run_tells_its_plan_then_each_phase_then_its_times(
    local_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    options = settings(local_model, tmp_path, paths__teacher_cache="targets", training__num_train_steps=2)
    assert main(["train", *options]) == 0
    log = capsys.readouterr().err
    marks = (
        "plan for", "Sampling train text:", "Sampling eval text:", "Teacher targets", "Calibrating:", "Evaluating:",
        "Training: 1 of 2 steps", "step 2: perplexity ratio", "times, estimated and taken",
    )  # fmt: skip
    places = [log.find(mark) for mark in marks]
    assert -1 not in places and places == sorted(places), dict(zip(marks, places, strict=True))
    times = json.loads((tmp_path / "outputs" / estimate.TIMING).read_text())
    parts = {SAMPLING, TARGETS, CALIBRATION, PREDICTION, TRAINING, EVALUATION, PAGE}
    assert {name for name, row in times.items() if "estimated_seconds" in row} == {*parts, "together"}
    assert times["together"]["seconds"] == pytest.approx(sum(times[name]["seconds"] for name in parts))
    assert main(["evaluate", "--checkpoint", "checkpoints/best_model", "--output", "again.json"]) == 0
    log = capsys.readouterr().err
    assert "plan for" in log and "times, estimated and taken" in log
    assert json.loads((tmp_path / "outputs" / estimate.TIMING).read_text()) == times


def test_a_stopwatch_adds_up_by_name() -> None:
    watch = Stopwatch()
    for name in ("a", "b", "a"):
        with watch.timing(name):
            pass
    assert list(watch.seconds) == ["a", "b"]
    with pytest.raises(ZeroDivisionError), watch.timing("c"):
        raise ZeroDivisionError
    assert "c" in watch.seconds
