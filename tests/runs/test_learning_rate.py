"""`training.learning_rate: auto` becomes a number that falls with the hidden size; a number stays."""

from __future__ import annotations

from pathlib import Path

import pytest

from npt.config import load_config
from npt.runs.arguments import automatic_rate, training_arguments, with_learning_rate
from tests.helpers import settings


@pytest.mark.parametrize("size, rate", [(64, 3e-4), (640, 1e-4), (4096, 1.5625e-5)])
def test_the_rate_falls_with_the_size(size: int, rate: float) -> None:
    assert automatic_rate(size) == pytest.approx(rate)


@pytest.mark.parametrize("given, expected", [("auto", 3e-4), (0.5, 0.5)])
def test_run_and_trainer_have_the_same_number(
    given: object, expected: float, local_model: Path, tmp_path: Path
) -> None:
    config = load_config(None, settings(local_model, tmp_path, training__learning_rate=given)[1::2])
    arguments = training_arguments(config)
    assert with_learning_rate(config, arguments).training.learning_rate == arguments.learning_rate == expected
