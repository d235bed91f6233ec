"""`FinetuneTrainer`: the loss is the formula's, the start is the base's, the low-rank part alone moves, resume is exact."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import TrainingArguments

from npt import NPTConfig
from npt.errors import CheckpointError, NPTError
from npt.finetuning.anchor import ANCHOR, with_anchor
from npt.finetuning.low_rank import train_low_rank
from npt.finetuning.objective import LanguageModelObjective
from npt.finetuning.other_methods import adapted, matching_rank, places_of, trained_parameters
from npt.finetuning.trainer import FinetuneTrainer
from npt.training.callbacks import BestAdapterCallback, JsonLinesCallback
from npt.tuner.converted import as_original
from tests.helpers import StopAt, blocks, logged, random_base, randomize

OPTIONS: dict[str, Any] = {"npt_layers": [1, 3], "rank": 3, "gain": "denominator", "key": "learned"}


def tuned(method: str, kind: str = "llama", dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """A random base with an NPT adapter, LoRA or DoRA that trains."""
    base = random_base(kind, dtype)
    torch.manual_seed(3)
    if method != "npt":
        return adapted(base, method, 2, places_of(base, [1, 3], ["gate", "up", "down"]))
    model = get_peft_model(base, NPTConfig(**{**OPTIONS, **options}))
    train_low_rank(model)
    return model


def trainer(folder: Path, model: Any, *, steps: int = 4, callbacks: Any = (), **options: Any) -> FinetuneTrainer:
    own = {name: options.pop(name) for name in ("anchor", "anchor_weight") if name in options}
    arguments = {
        "per_device_train_batch_size": 4, "max_steps": steps, "learning_rate": 5e-3, "logging_steps": 1, "save_steps": 2,
        "save_strategy": "steps", "report_to": [], "disable_tqdm": True, "use_cpu": True, "seed": 1, **options,
    }  # fmt: skip
    return FinetuneTrainer(
        model,
        TrainingArguments(output_dir=str(folder / "checkpoints"), **arguments),
        train_dataset=blocks(),
        eval_dataset=blocks(4, 9),
        callbacks=[
            JsonLinesCallback(folder / "metrics.jsonl"),
            BestAdapterCallback(folder / "best_model", model, metric="eval_loss"),
            *callbacks,
        ],
        **own,
    )


def batch(rows: int = 3) -> dict[str, torch.Tensor]:
    """Rows of which the prompt, some places in the middle, and the end do not count, with an anchor."""
    found = {
        name: torch.tensor([blocks()[i][name] for i in range(rows)])
        for name in ("input_ids", "attention_mask", "labels")
    }
    found["labels"][:, :5] = found["labels"][0, 7:10] = found["labels"][1, -3:] = -100
    return {**found, ANCHOR: torch.tensor([row["input_ids"] for row in blocks(rows, 5)])}


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("method", ["npt", "lora", "dora"])
def test_the_loss_is_the_formula(kind: str, method: str) -> None:
    """Cross-entropy of the counted tokens, and each row's mean KL on its anchor block with the row's share of the tokens."""
    model = tuned(method, kind, torch.float64).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn_like(p))
    inputs, beta = batch(), 0.7
    found = LanguageModelObjective(beta, measures_base=True)(model, inputs, 50.0)
    with torch.no_grad():
        logits, ours = (model(input_ids=inputs[name]).logits for name in ("input_ids", ANCHOR))
        with as_original(model):
            base, theirs = (model(input_ids=inputs[name]).logits for name in ("input_ids", ANCHOR))

    def entropy(of: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(
            of[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten(), reduction="sum", ignore_index=-100
        )

    ours, theirs = ours.log_softmax(-1), theirs.log_softmax(-1)
    kl = (theirs.exp() * (theirs - ours)).sum(-1).mean(-1)
    anchor = ((inputs["labels"][:, 1:] != -100).sum(-1) / 50 * kl).sum()
    torch.testing.assert_close(found.language, entropy(logits) / 50)
    torch.testing.assert_close(found.base, entropy(base) / 50)
    torch.testing.assert_close(found.anchor, anchor)
    torch.testing.assert_close(found.total.detach(), entropy(logits) / 50 + beta * anchor)
    assert float(found.anchor) > 1e-4 and abs(float(found.language - found.base)) > 1e-4


def test_gradient_is_the_formulas() -> None:
    model = tuned("npt", dtype=torch.float64).eval()
    randomize(model)
    inputs = batch()
    own = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(LanguageModelObjective(0.5)(model, inputs, 20.0).total, own)
    logits, ours = (model(input_ids=inputs[name]).logits for name in ("input_ids", ANCHOR))
    with torch.no_grad(), as_original(model):
        theirs = model(input_ids=inputs[ANCHOR]).logits.log_softmax(-1)
    kl = (theirs.exp() * (theirs - ours.log_softmax(-1))).sum(-1).mean(-1)
    loss = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten(), reduction="sum", ignore_index=-100
    )
    loss = loss / 20 + 0.5 * ((inputs["labels"][:, 1:] != -100).sum(-1) / 20 * kl).sum()
    torch.testing.assert_close(found, torch.autograd.grad(loss, own))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_first_loss_is_the_bases_and_the_low_rank_part_alone_moves(kind: str, tmp_path: Path) -> None:
    model = tuned("npt", kind)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    run = trainer(tmp_path, model, anchor=blocks(3, 5), anchor_weight=0.5)
    run.train()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    first = next(row for row in rows if "base_loss" in row)
    assert first["step"] == 1 and abs(first["language_loss"] - first["base_loss"]) < 1e-4
    assert first["anchor_kl"] < 1e-6 and rows[-2]["anchor_kl"] > 1e-6
    assert sum("base_loss" in row for row in rows) == 1
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    names = ("A", "B_in", "B_down", "C_in", "C_down")
    assert moved == {name for name in before if name.rpartition(".")[2] in names and "npt_components" in name}


@pytest.mark.parametrize("method", ["npt", "dora"])
def test_resume_is_exact(method: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"anchor": blocks(5, 5), "anchor_weight": 0.5}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    first = tuned(method)
    trainer(whole, first, **options).train()
    trainer(parts, tuned(method), callbacks=[StopAt(2)], **options).train()
    again = tuned(method)
    run = trainer(parts, again, **options)
    assert run.is_finished(whole / "checkpoints" / "checkpoint-4")
    assert not run.is_finished(parts / "checkpoints" / "checkpoint-2")
    run.train(resume_from_checkpoint=str(parts / "checkpoints" / "checkpoint-2"))
    for (name, a), (_, b) in zip(first.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    assert logged(whole) == logged(parts)
    other = trainer(parts, tuned(method), **{**options, "anchor_weight": 0.4})
    with pytest.raises(CheckpointError, match=r"finetuning.anchor_weight is 0.4 here and 0.5 in the checkpoint"):
        other.train(resume_from_checkpoint=str(parts / "checkpoints" / "checkpoint-2"))


def test_micro_batches_make_the_same_step(tmp_path: Path) -> None:
    """Rows have different numbers of counted tokens."""
    found = []
    for size, number in ((4, 1), (2, 2)):
        model, folder = tuned("npt", dtype=torch.float64), tmp_path / str(size)
        run = trainer(
            folder, model, steps=2, per_device_train_batch_size=size, gradient_accumulation_steps=number,
            anchor=blocks(3, 5), anchor_weight=0.5,
        )  # fmt: skip
        masked = [[-100] * (i % 7) + row[i % 7 :] for i, row in enumerate(run.train_dataset["labels"])]
        run.train_dataset = run.train_dataset.remove_columns("labels").add_column("labels", masked)
        run.train()
        found.append(([loss for _, loss in logged(folder)], [p for p in model.parameters() if p.requires_grad]))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    for a, b in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_methods_see_the_same_batches(tmp_path: Path) -> None:
    seen: dict[str, list[torch.Tensor]] = {}
    for method in ("npt", "lora", "dora"):
        model = tuned(method)
        run = trainer(tmp_path / method, model)
        objective = run.objective.__call__

        def see(model: Any, inputs: Any, items: Any, own: Any = objective, name: str = method) -> Any:
            seen.setdefault(name, []).append(inputs["input_ids"])
            return own(model, inputs, items)

        class Watched(LanguageModelObjective):
            __call__ = staticmethod(see)

        run.schedule = [(0, Watched())]
        run.evaluate()
        run.train()
    assert len(seen["npt"]) == 4
    for method in ("lora", "dora"):
        assert all(torch.equal(a, b) for a, b in zip(seen["npt"], seen[method], strict=True))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_the_rank_is_the_one_nearest_in_trained_parameters(kind: str, method: str) -> None:
    wanted = sum(p.numel() for p in tuned("npt", kind, rank=7).parameters() if p.requires_grad)
    base = random_base(kind, torch.float32)
    places = places_of(base, [1, 3], ["gate", "up", "down"])
    assert len(places) == {"llama": 6, "gpt2": 4}[kind]
    rank = matching_rank(method, wanted, places)
    off = {r: abs(trained_parameters(method, r, places) - wanted) for r in range(1, 20)}
    assert rank == min(off, key=lambda r: off[r])
    model = adapted(base, method, rank, places)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == trained_parameters(method, rank, places)


def test_what_can_not_be_trained_is_one_line(tmp_path: Path) -> None:
    for options in ({"rank": 0}, {"carry": "exact"}):
        with pytest.raises(NPTError, match="no low-rank part"):
            tuned("npt", **options)
    model = tuned("npt")
    with pytest.raises(NPTError, match="anchor_weight=0.5 needs anchor blocks"):
        trainer(tmp_path, model, anchor_weight=0.5)
    with pytest.raises(NPTError, match="there is no anchor text"):
        with_anchor(blocks(), [])
    model.get_base_model().lm_head.weight.requires_grad_(True)
    with pytest.raises(NPTError, match="beside the NPT components are trained too"):
        trainer(tmp_path, model)
    model.requires_grad_(False)
    with pytest.raises(NPTError, match="nothing is trained"):
        trainer(tmp_path, model)
