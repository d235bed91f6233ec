"""`EquivalenceTrainer.train(resume_from_checkpoint=...)` compares what decides the result with the checkpoint's record."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from peft import get_peft_model
from torch.utils.data import Dataset as TorchDataset

from npt import NPTConfig, Objective
from npt.errors import CheckpointError
from npt.training.callbacks import BestAdapterCallback
from npt.training.resume import RECORD, text_record
from npt.tuner.converted import active_layers
from tests.helpers import blocks, random_base, trainer


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a training of four steps."""
    folder = tmp_path_factory.mktemp("begun")
    trainer(folder, steps=4).train()
    return folder


@pytest.mark.parametrize(
    "options, message",
    [
        ({"learning_rate": 1e-2}, "training.learning_rate is 0.01 here and 0.005 in the checkpoint"),
        ({"adam_beta2": 0.9}, "TrainingArguments.adam_beta2 is 0.9 here and 0.999"),
        ({"optim": "adafactor"}, 'TrainingArguments.optim is "adafactor" here and'),
        ({"data_seed": 3}, "TrainingArguments.data_seed is 3 here and null"),
        ({"lr_scheduler_type": "constant"}, "training.lr_scheduler_type is"),
        ({"per_device_train_batch_size": 2}, "processes is 2 here and 4"),
        ({"bf16": True}, 'optimization.mixed_precision is "bf16" here and "no"'),
        ({"objective": "composite"}, "training.objective is"),
        ({"steps": 3}, "training.num_train_steps is 3 here and 4 steps are taken already"),
        ({"trainer_options": {"teacher_cache": "t"}}, "with paths.teacher_cache) is 64 here and null"),
        ({"trainer_options": {"settings": {"mine": 2}}}, None),
    ],
    ids=str,
)
def test_other_arguments_are_one_line(
    options: dict[str, Any], message: str | None, begun: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = trainer(tmp_path, **{"steps": 8, **options})
    checkpoint = str(begun / "checkpoints" / "checkpoint-4")
    if message is None:  # a setting that the first training did not name is no difference
        run.check_resume(Path(checkpoint))
        return
    with pytest.raises(CheckpointError) as error:
        run.train(resume_from_checkpoint=checkpoint)
    assert message in str(error.value) and str(error.value).startswith(f"{checkpoint}: ")
    assert run.state.global_step == 0 and not list(tmp_path.rglob("*.safetensors"))


def with_adapter(folder: Path, kind: str, seed: int = 0, **options: Any) -> Any:
    run = trainer(folder, kind=kind)
    run.model = get_peft_model(
        random_base(kind, torch.float32, seed), NPTConfig(**{"npt_layers": [1, 3], "rank": 3, **options})
    )
    return run


@pytest.mark.parametrize(
    "options, message",
    [
        ({"modulation_scale": 0.5}, "model.modulation_scale is 0.5 here and 1.0"),
        ({"gain": "none"}, "model.gain is"),
        ({"key": "learned"}, "model.key is"),
        ({"carry": "none"}, "model.carry is"),
        ({"low_rank_at": "projection"}, "model.low_rank_at is"),
        ({"npt_layers": [0, 1]}, "model.npt_layers is [0, 1] here and [1, 3]"),
        ({"seed": 1}, "is another base than the checkpoint's"),
        ({"seed": 1, "allow_other_base": True}, "is another base than the checkpoint's"),
    ],
    ids=str,
)
def test_another_adapter_or_base_is_one_line(
    options: dict[str, Any], message: str, begun: Path, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError) as error:
        with_adapter(tmp_path, "llama", **options).train(str(begun / "checkpoints" / "checkpoint-4"))
    assert message in str(error.value)


@pytest.mark.parametrize("change", ["order", "labels", "one token", "fewer", "chosen by"])
def test_other_text_is_one_line(change: str, begun: Path, tmp_path: Path) -> None:
    run, rows = trainer(tmp_path), blocks()
    if change == "order":
        run.train_dataset = rows.shuffle(seed=1)
    elif change == "fewer":
        run.train_dataset = rows.select(range(31))
    elif change == "chosen by":
        run.eval_dataset = blocks(8, 10)
    else:
        name = "labels" if change == "labels" else "input_ids"
        values = rows.to_list()
        values[5][name][3] = -100 if change == "labels" else 95 - values[5][name][3] % 50
        run.train_dataset = datasets.Dataset.from_list(values)
    with pytest.raises(CheckpointError, match="is another: .* here, .* in the checkpoint"):
        run.train(resume_from_checkpoint=str(begun / "checkpoints" / "checkpoint-4"))
    if change == "chosen by":
        run.pop_callback(BestAdapterCallback)
        run.check_resume(begun / "checkpoints" / "checkpoint-4")


def test_a_schedule_with_other_first_steps_is_one_line(tmp_path: Path) -> None:
    runs = [trainer(tmp_path) for _ in range(3)]
    for run, start, steps in zip(runs, (5, 4, 4), (8, 8, 16), strict=True):
        run.schedule, run.args.max_steps = [(0, Objective("local")), (start, Objective("logits"))], steps
    runs[0].train()
    with pytest.raises(CheckpointError, match=r"the objectives' first steps is \[0, 4\] here and \[0, 5\]"):
        runs[1].train(resume_from_checkpoint=str(tmp_path / "checkpoints" / "checkpoint-4"))
    runs[2].check_resume(tmp_path / "checkpoints" / "checkpoint-4")  # they move with the number of steps


def test_true_means_the_newest_finished_checkpoint(
    begun: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that was cut off while it was written is passed over; a folder may be named from the home folder."""
    shutil.copytree(begun, tmp_path / "run")
    shutil.copytree(tmp_path / "run/checkpoints/checkpoint-4", tmp_path / "run/checkpoints/checkpoint-6")
    (tmp_path / "run/checkpoints/checkpoint-6/optimizer.safetensors").write_bytes(b"cut")
    monkeypatch.setenv("HOME", str(tmp_path))
    values = []
    for folder, place in ((tmp_path / "run", True), (tmp_path / "again", "~/run/checkpoints/checkpoint-4")):
        run = trainer(folder, steps=5)
        run.train(resume_from_checkpoint=place)
        assert run.state.global_step == 5
        values.append(torch.cat([p.flatten() for layer in active_layers(run.model) for p in layer.own.parameters()]))
    assert torch.equal(*values)


def test_a_checkpoint_that_was_never_finished_is_one_line(begun: Path, tmp_path: Path) -> None:
    """HF's Trainer would read what is there."""
    checkpoint = shutil.copytree(begun / "checkpoints" / "checkpoint-4", tmp_path / "checkpoints" / "checkpoint-4")
    (checkpoint / "complete.json").unlink()
    run = trainer(tmp_path)
    for place, message in (
        (True, "holds no finished checkpoint; train without"),
        (str(checkpoint), r"checkpoint-4: no finished checkpoint \(complete.json is missing\)"),
        (str(tmp_path / "nowhere"), "nowhere: no finished checkpoint"),
    ):
        with pytest.raises(CheckpointError, match=message):
            run.train(resume_from_checkpoint=place)


def test_every_checkpoint_holds_the_record(begun: Path) -> None:
    checkpoint = begun / "checkpoints" / "checkpoint-4"
    record = json.loads((checkpoint / RECORD).read_text())
    assert RECORD in json.loads((checkpoint / "complete.json").read_text())
    assert record["step"] == 4 and record["text"]["train"]["blocks"] == 32 and record["text"]["train"]["tokens"] == 512


def test_text_is_known_by_its_content_in_every_form() -> None:
    """A data set, a list of rows, rows of several lengths; what can't be read before training has no record."""
    rows = blocks(5)
    assert text_record(rows) == text_record(rows.to_list()) == text_record(rows.select(range(5)))
    one, other = [{"input_ids": [1, 2]}, {"input_ids": [3]}], [{"input_ids": [1]}, {"input_ids": [2, 3]}]
    assert text_record(one)["tokens"] == 3 and text_record(one) != text_record(other)
    assert text_record(datasets.Dataset.from_list(one)) == text_record(one)
    assert text_record(rows.to_iterable_dataset()) == text_record([]) == {}
    assert text_record([{"text": "a"}]) != text_record([{"text": "b"}])

    class Rows(TorchDataset):  # type: ignore[type-arg]
        def __len__(self) -> int:
            return 5

        def __getitem__(self, i: int) -> Any:
            return rows[i]

    assert text_record(Rows()) == text_record(rows)
