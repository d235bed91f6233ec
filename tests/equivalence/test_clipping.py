"""Each block's gradients are clipped by their own norm where each block has a loss of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import TrainingArguments

from npt import EquivalenceTrainer, NPTConfig, Objective
from npt.tuner.converted import active_layers
from tests.distributed_worker import work
from tests.helpers import blocks, random_base

CLIP = 1e-3


def clipping(folder: Path, name: str) -> tuple[EquivalenceTrainer, list[list[Any]]]:
    """A trainer whose parameters have gradients of known sizes, and its parameters by block."""
    model = get_peft_model(random_base("llama", torch.float32), NPTConfig(npt_layers=[1, 3], rank=3))
    args = TrainingArguments(output_dir=str(folder), max_grad_norm=0.5, use_cpu=True, report_to=[])
    trainer = EquivalenceTrainer(model, args, Objective(name), train_dataset=blocks())
    groups: list[list[Any]] = [list(layer.component.parameters()) for layer in active_layers(model)]
    for index, group in enumerate(groups):
        for parameter in group:
            # The first block's norm is below the limit.
            parameter.grad = (1e-4, 1.0)[index] * torch.randn_like(parameter)
    return trainer, groups


def norm(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([t.flatten() for t in tensors]).norm()


@pytest.mark.parametrize("name", ["local", "composite"])
def test_every_block_is_clipped_by_itself(name: str, tmp_path: Path) -> None:
    trainer, groups = clipping(tmp_path, name)
    before = [[p.grad.clone() for p in group] for group in groups]
    found = trainer._clip_grad_norm(trainer.model)
    torch.testing.assert_close(found, norm([g for group in before for g in group]))
    assert norm(before[0]) < 0.5 < norm(before[1])
    for group, old in zip(groups, before, strict=True):
        factor = min(1.0, 0.5 / float(norm(old)))
        for parameter, gradient in zip(group, old, strict=True):
            torch.testing.assert_close(parameter.grad, gradient * factor, rtol=1e-5, atol=0)


def test_logits_is_clipped_by_one_norm(tmp_path: Path) -> None:
    trainer, groups = clipping(tmp_path, "logits")
    before = [p.grad.clone() for group in groups for p in group]
    trainer._clip_grad_norm(trainer.model)
    after = [p.grad for group in groups for p in group]
    for gradient, old in zip(after, before, strict=True):
        torch.testing.assert_close(gradient, old * float(0.5 / norm(before)), rtol=1e-5, atol=0)


def test_a_scaled_gradient_is_unscaled_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, groups = clipping(tmp_path, "local")
    before = norm([p.grad for group in groups for p in group])

    def unscale() -> None:
        for parameter in (p for group in groups for p in group):
            parameter.grad /= 8

    monkeypatch.setattr(trainer.accelerator, "unscale_gradients", unscale)
    torch.testing.assert_close(trainer._clip_grad_norm(trainer.model), before / 8)


def test_sharded_gradients_are_clipped_alike(tmp_path: Path) -> None:
    """Two processes with FSDP2, where gradients are DTensors, and one process: the same adapter to rounding."""
    found = []
    for sharded in ("", "early"):
        spec = {
            "folder": str(tmp_path / f"run{sharded}"), "objective": "local", "sharded": sharded, "steps": 4,
            "arguments": {"max_grad_norm": CLIP},
        }  # fmt: skip
        work(2 if sharded else 1, [spec])
        rows = [json.loads(line) for line in (Path(spec["folder"]) / "metrics.jsonl").read_text().splitlines()]
        norms = [row["grad_norm"] for row in rows if "grad_norm" in row]
        assert min(norms) > CLIP
        found.append((norms, load_file(Path(spec["folder"]) / "adapter.safetensors")))
    (norms, one), (others, two) = found
    assert norms == pytest.approx(others, rel=1e-6)
    for name, value in one.items():
        torch.testing.assert_close(value, two[name], rtol=1e-7, atol=1e-10)
