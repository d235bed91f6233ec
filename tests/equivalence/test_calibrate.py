"""`calibrate` as it is called: twice, on lists and padding, with a bar, on the oracle and on half-precision models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor

from npt import NPTConfig, calibrate
from npt.equivalence import calibration
from tests.helpers import random_base


def text(rows: int = 4, seed: int = 0) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(1, 96, (rows, 32), generator=torch.Generator().manual_seed(seed))}


def parameters(model: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if "npt_components" in name}


@pytest.mark.parametrize("chunk", [None, 100])
def test_calibrating_again_changes_nothing(chunk: int | None, caplog: pytest.LogCaptureFixture) -> None:
    """The fit reads the original model, whatever the adapter does by now."""
    model = get_peft_model(random_base("llama"), NPTConfig(npt_layers="all", rank=4))
    batches = [text(), text(seed=1)]
    first = calibrate(model, batches, chunk_tokens=chunk)
    once = parameters(model)
    with caplog.at_level("INFO", "npt.equivalence.calibration"):
        second = calibrate(model, batches, chunk_tokens=chunk)
    assert "calibrating on 256 tokens" in caplog.text
    for name, value in parameters(model).items():
        torch.testing.assert_close(value.abs(), once[name].abs(), rtol=1e-6, atol=1e-8, msg=name)
    for name, figures in second.items():
        assert figures["error_before"] == pytest.approx(first[name]["error_after"])


def test_the_oracle_has_nothing_to_calibrate() -> None:
    model = get_peft_model(random_base("llama"), NPTConfig(carry="exact"))
    assert calibrate(model, [text()]) == {}


def test_lists_and_batches_of_padding_are_taken() -> None:
    one, other = (get_peft_model(random_base("llama"), NPTConfig(rank=4)) for _ in range(2))
    other.load_state_dict(one.state_dict())
    batch = text()
    padding = {"input_ids": torch.zeros(2, 8, dtype=torch.long), "attention_mask": torch.zeros(2, 8, dtype=torch.long)}
    expected = calibrate(one, [batch])
    assert calibrate(other, [{"input_ids": batch["input_ids"].tolist()}, padding]) == expected
    assert all(torch.equal(value, parameters(one)[name]) for name, value in parameters(other).items())


def test_a_bar_is_shown_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    shown_each = []
    monkeypatch.setattr(calibration, "tracked", lambda batches, _, shown, **__: shown_each.append(shown) or batches)
    model = get_peft_model(random_base("llama"), NPTConfig(rank=4))
    for progress in ({}, {"progress": True}):
        calibrate(model, [text()], **progress)
    assert shown_each == [False, True]


@pytest.mark.parametrize("options", [{}, {"carry": "none", "low_rank_at": "projection"}], ids=str)
def test_half_precision_parameters_are_fitted_in_float32(options: Any) -> None:
    """And stay what they were: the fit of a bfloat16 model comes as near as its numbers allow."""
    errors = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = get_peft_model(random_base("llama"), NPTConfig(npt_layers="all", rank=4, **options)).to(dtype)
        errors[dtype] = calibrate(model, [text(), text(seed=1)])
        assert {p.dtype for p in parameters(model).values()} == {dtype}
    for name, figures in errors[torch.float32].items():
        assert errors[torch.bfloat16][name]["error_after"] < 1.2 * figures["error_after"] + 0.05, errors
