"""Bases in float16 and bfloat16 with massive activations: figures and gradients are those of the same model in float64."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor

from npt import NPTConfig
from npt.block.weight_delta import WeightDelta
from npt.editing.absorbing.lesson import difference
from npt.equivalence.objectives import Objective, update_scales
from npt.evaluation.block_errors import BlockErrors
from npt.evaluation.look import look
from npt.tuner.converted import active_layers
from tests.helpers import random_base, trainer

HALF = [torch.float16, torch.bfloat16]
#: Of the tokens, one in eight is massive.
IDS = torch.arange(3, 67).view(2, 32)


def massive(dtype: torch.dtype, **options: Any) -> Any:
    """A converted model whose token 5 and those after it, eight apart, have a hidden state that rounds updates away."""
    base = random_base("llama", dtype)
    with torch.no_grad():
        base.get_input_embeddings().weight[5::8, :6] = 4 / torch.finfo(dtype).eps
    return get_peft_model(base, NPTConfig(npt_layers="all", **options)).eval()


def batch() -> dict[str, Tensor]:
    return {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": IDS}


@pytest.mark.parametrize("dtype", HALF)
def test_norms_of_weight_deltas_leave_the_format_s_range(dtype: torch.dtype) -> None:
    value, x = 300 * torch.ones(2, 3).to(dtype), torch.full((2, 4), 1e-4).to(dtype)
    x[0, 1] = 1000.0
    low_rank = tuple(part.to(dtype) for part in (torch.ones(2, 1), torch.ones(4, 1), torch.ones(1, 3)))
    for factors in (None, low_rank):
        found = WeightDelta(value, x, factors)
        wide = None if factors is None else tuple(part.double() for part in low_rank)
        expected = WeightDelta(value.double(), x.double(), wide)
        torch.testing.assert_close(found.frobenius_norm().double(), expected.frobenius_norm(), rtol=1e-4, atol=0)
        torch.testing.assert_close(found.matrix(0).double(), expected.matrix(0), rtol=1e-2, atol=1e-6)
        assert not found.skipped.any()


@pytest.mark.parametrize("dtype", HALF)
def test_a_block_that_is_exact_has_no_error(dtype: torch.dtype) -> None:
    errors = BlockErrors(model := massive(dtype, carry="exact", gain="denominator"))
    with torch.no_grad():
        look(model, batch(), [errors])
    for figures in errors.figures().values():
        assert figures["relative_error"] < 0.02 and figures["own_stream"]["relative_error"] < 0.02
        assert figures["cosine_similarity"] > 0.999999  # of outputs, of which h is most


@pytest.mark.parametrize("dtype", HALF)
def test_an_exact_block_has_nothing_to_learn(dtype: torch.dtype) -> None:
    model = massive(dtype, carry="exact", gain="denominator")
    scales = update_scales(model, batch())
    with torch.no_grad():
        loss = Objective("local", scales=scales)(model, batch(), 62).equivalence
    assert float(loss) < 1e-3


@pytest.mark.parametrize("autocast", [False, True])
def test_gradients_in_float16_do_not_vanish(autocast: bool) -> None:
    """A step of a million tokens: the gradient of their mean is below the least number of float16."""
    gradients = []
    for half in (True, False):
        model = massive(torch.float16) if half and not autocast else massive(torch.float16).float()
        objective = Objective("local", scales=dict.fromkeys(range(4), 30.0))
        with torch.autocast("cpu", torch.float16, enabled=half and autocast):
            losses = objective(model, batch(), 2.0**20)
        losses.total.backward()
        gradients.append([p.grad.double() for layer in active_layers(model) for p in layer.own.parameters()])
    for found, whole in zip(*gradients, strict=True):
        assert (found - whole).norm() <= 0.1 * whole.norm()


@pytest.mark.parametrize(
    "dtype, objective, lost",
    [(torch.float16, "logits", True), (torch.float16, "local", False), (torch.bfloat16, "logits", False)],
)
def test_a_loss_that_is_not_scaled_in_float16_is_said(
    dtype: torch.dtype, objective: str, lost: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="npt"):
        trainer(tmp_path, dtype=dtype, objective=objective)
    assert ("small gradients will be lost" in caplog.text) == lost


@pytest.mark.parametrize("dtype", HALF)
def test_a_difference_is_more_than_rounding(dtype: torch.dtype) -> None:
    spacing = 2048 * torch.finfo(dtype).eps
    one = torch.tensor([2048.0 + spacing, 2048.0 + 2 * spacing, 1.0]).to(dtype)
    other = torch.tensor([2048.0, 2048.0, 0.5]).to(dtype)
    assert difference(one, other).tolist() == [0, 2 * spacing, 0.5]
    assert difference(one.float(), other.float()).tolist() == [spacing, 2 * spacing, 0.5]
