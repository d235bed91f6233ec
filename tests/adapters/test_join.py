"""Adapters of blocks trained by separate jobs join to the jointly trained one bit for bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from npt import EquivalenceTrainer, NPTConfig, Objective, calibrate, merge_adapters
from npt.adapters.weights import save_adapter
from npt.data import pack
from npt.data.batches import batches_of
from npt.tuner.converted import active_layers
from tests.helpers import blocks, logits_of, random_base

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
CLIP = 1e-3


class Job:
    """One training run on some blocks of a base, which is made anew for it.

    Args:
        text: blocks to calibrate with and to train on; the first 16 calibrate.
    """

    def __init__(self, base: Callable[[], Any], text: Any, folder: Path):
        self.base, self.text, self.folder = base, text, folder

    def __call__(
        self, layers: list[int], *, calibrated: bool = True, clip: float = CLIP, objective: Any = None, **options: Any
    ) -> Path:
        """Trains, and returns the adapter's folder."""
        folder = self.folder / "-".join(map(str, layers))
        torch.manual_seed(0)
        model = get_peft_model(self.base(), NPTConfig(**{"npt_layers": layers, "rank": 3, **options}))
        if calibrated:
            calibrate(model, list(batches_of(self.text.select(range(16)), 4, torch.device("cpu"))))
        args = TrainingArguments(
            output_dir=str(folder), per_device_train_batch_size=4, gradient_accumulation_steps=2, max_steps=8,
            learning_rate=5e-3, warmup_steps=2, weight_decay=0.1, max_grad_norm=clip, logging_steps=1, report_to=[],
            disable_tqdm=True, use_cpu=True, seed=1, save_strategy="no",
        )  # fmt: skip
        trainer = EquivalenceTrainer(
            model, args, objective or Objective("local"), train_dataset=self.text, eval_dataset=self.text.select([0])
        )
        trainer.evaluate()
        trainer.train()
        norms = [row["grad_norm"] for row in trainer.state.log_history if "grad_norm" in row]
        assert len(norms) == 8 and min(norms) > clip, "clipping does not bind"
        save_adapter(model, folder)
        return folder


@pytest.fixture
def job(tmp_path: Path) -> Job:
    """Jobs on a random Llama of four blocks."""
    return Job(lambda: random_base("llama", torch.float32), blocks(32), tmp_path)


def check_the_same(job: Job, parts: list[list[int]], ids: torch.Tensor, **options: Any) -> Path:
    """Trains all blocks together and in parts; compares to the last bit."""
    whole = job(sorted(block for part in parts for block in part), **options)
    joined = merge_adapters([job(part, **options) for part in parts], job.folder / "joined")
    assert torch.equal(logits_of(job.base(), whole, ids), logits_of(job.base(), joined, ids))
    assert (joined / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()
    assert json.loads((joined / CONFIG).read_text()) == json.loads((whole / CONFIG).read_text())
    return joined


@pytest.mark.parametrize("objective", ["local", "composite"])
@pytest.mark.parametrize("regularizer", ["delta", "factors"])
def test_blocks_trained_apart_are_the_jointly_trained_ones(
    objective: str, regularizer: str, job: Job, token_ids: torch.Tensor
) -> None:
    loss = {"regularizer": regularizer, "regularization_weight": 0.1}
    joined = check_the_same(job, [[3], [1, 2]], token_ids, objective=Objective(objective, **loss))
    model = PeftModel.from_pretrained(job.base(), str(joined))
    assert [layer.index for layer in active_layers(model)] == [1, 2, 3]


def test_a_random_start_does_not_depend_on_the_other_blocks(job: Job, token_ids: torch.Tensor) -> None:
    """Without calibration, and with the matrices that calibration leaves alone."""
    options = {"key": "learned", "low_rank_at": "projection"}
    check_the_same(job, [[0], [3], [1]], token_ids, calibrated=False, **options)


def test_two_adapters_start_differently() -> None:
    model = get_peft_model(random_base("llama"), NPTConfig(npt_layers=[1, 2]))
    first = [layer.component.A.clone() for layer in active_layers(model)]
    assert not torch.equal(*first)
    model.add_adapter("second", NPTConfig(npt_layers=[1, 2]))
    model.set_adapter("second")
    assert not torch.equal(first[0], active_layers(model)[0].component.A)


def test_on_a_real_checkpoint_and_real_text(stories: Path, shared_dir: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(stories)
    text = (shared_dir / "data" / "text" / "grimms-fairy-tales.txt").read_text(encoding="utf-8")
    job = Job(
        lambda: AutoModelForCausalLM.from_pretrained(stories, dtype=torch.float32).eval(),
        pack([text[5_000:60_000]], tokenizer, 64, max_blocks=64),
        tmp_path,
    )
    ids = torch.tensor(job.text[:4]["input_ids"])
    check_the_same(job, [[2], [3, 4]], ids, rank=16)


def test_one_norm_for_all_blocks_would_not_do(
    job: Job, token_ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that the tests above say something about clipping."""
    monkeypatch.delattr(EquivalenceTrainer, "_clip_grad_norm")
    with pytest.raises(AssertionError):
        check_the_same(job, [[3], [1, 2]], token_ids)
