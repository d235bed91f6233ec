"""EquivalenceTrainer takes rows of different length as its data_collator joins them, in every part that reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from transformers import DataCollatorForLanguageModeling, DataCollatorForSeq2Seq
from transformers.data.data_collator import default_data_collator

from npt.data.batches import batches_of
from npt.equivalence.objectives import update_scales
from npt.errors import DataError
from npt.evaluation.divergence import token_divergences
from tests.helpers import blocks, logged, trainer

LENGTHS = [16, 9, 12, 5, 16, 7, 11, 14]


def pad(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Pads on the right with token 0 and masks it."""
    width = max(len(row["input_ids"]) for row in rows)
    ids = [[*row["input_ids"], *[0] * (width - len(row["input_ids"]))] for row in rows]
    mask = [[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in rows]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def ragged() -> list[dict[str, Any]]:
    return [{"input_ids": row[:n]} for row, n in zip(blocks(8)["input_ids"], LENGTHS, strict=True)]


def padded() -> Any:
    """The same rows as blocks of one length."""
    joined = pad(ragged())
    return datasets.Dataset.from_dict({name: values.tolist() for name, values in joined.items()})


@pytest.mark.parametrize("objective", ["local", "composite", "logits"])
def test_ragged_rows_train_as_padded_blocks_do(objective: str, tmp_path: Path) -> None:
    runs = [
        trainer(tmp_path / name, objective=objective, steps=2, trainer_options={"data_collator": collator})
        for name, collator in (("ragged", pad), ("padded", default_data_collator))
    ]
    for run, rows in zip(runs, (ragged(), padded()), strict=True):
        run.train_dataset = run.eval_dataset = rows
        run.train()
    assert runs[0].objective.scales == pytest.approx(runs[1].objective.scales, rel=1e-6)
    found, expected = (dict(logged(tmp_path / name)) for name in ("ragged", "padded"))
    assert found == pytest.approx(expected, rel=1e-5)
    one, other = (run.evaluate() for run in runs)
    assert one == pytest.approx(other, rel=1e-5)


@pytest.mark.parametrize("kind", ["dataset", "iterable"])
def test_the_constants_come_from_the_collated_rows(kind: str, tmp_path: Path) -> None:
    """Of a data set with rows of several lengths, and of one that is only iterated over."""
    run = trainer(tmp_path, objective="local", steps=1, trainer_options={"data_collator": pad})
    rows = datasets.Dataset.from_list(ragged())
    run.train_dataset = rows if kind == "dataset" else rows.to_iterable_dataset()
    run.train()
    first = next(batches_of(padded(), 8, torch.device("cpu")))
    assert run.objective.scales.keys() == {1, 3}
    fresh = trainer(tmp_path / "fresh", objective="local")
    assert run.objective.scales == pytest.approx(update_scales(fresh.model, first), rel=1e-6)


def test_collators_of_transformers_serve(local_model: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(local_model)
    for number, collator in enumerate(
        (DataCollatorForLanguageModeling(tokenizer, mlm=False), DataCollatorForSeq2Seq(tokenizer, padding=True))
    ):
        run = trainer(tmp_path / str(number), objective="local", steps=1, trainer_options={"data_collator": collator})
        rows = [{**row, "labels": row["input_ids"]} if number else row for row in ragged()]
        run.train_dataset = run.eval_dataset = rows
        run.train()
        figures = token_divergences(run.model, rows, batch_size=3, collate=collator)
        assert len(figures["kl"]) == sum(LENGTHS) - len(LENGTHS), "padding does not count"
        assert run.evaluate()["eval_mean_kl"] == pytest.approx(float(figures["kl"].mean()), rel=1e-5)


@pytest.mark.parametrize("what", ["train", "evaluate", "divergences"])
def test_rows_that_nothing_pads_are_one_line(what: str, tmp_path: Path) -> None:
    run = trainer(tmp_path, objective="local", steps=1)
    run.train_dataset = run.eval_dataset = ragged()
    with pytest.raises(DataError, match=r"rows .*5 to 16 tokens.*npt\.data\.pack.*data_collator that pads"):
        if what == "divergences":
            token_divergences(run.model, ragged())
        else:
            getattr(run, what)()


def test_teacher_targets_need_blocks_of_one_length(tmp_path: Path) -> None:
    options = {"data_collator": pad, "teacher_cache": tmp_path / "teacher"}
    run = trainer(tmp_path, objective="local", steps=1, trainer_options=options)
    run.train_dataset = datasets.Dataset.from_list(ragged())
    with pytest.raises(DataError, match="teacher_cache.*5 to 16 tokens"):
        run.train()
    assert not (tmp_path / "teacher").exists()
