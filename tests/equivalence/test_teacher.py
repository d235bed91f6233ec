"""Teacher targets on disk give the same training without the frozen forward, and an error when they don't fit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model

from npt import NPTConfig, Objective
from npt.block.modes import Mode, running_as, watching
from npt.data.batches import batches_of
from npt.equivalence.objectives import objective_class, update_scales
from npt.equivalence.teacher import (
    ROW,
    bytes_per_block,
    check_teacher_cache,
    grouped,
    shard_path,
    targets,
    teacher_cache,
    with_rows,
)
from npt.errors import DataError
from npt.tuner.converted import active_layers, run_backbone
from tests.helpers import blocks, converted, logged, random_base, randomize, trainer

CPU = torch.device("cpu")


def rows_of(dataset: Any, rows: list[int]) -> dict[str, torch.Tensor]:
    batch = next(batches_of(dataset.select(rows), len(rows), CPU))
    return {**batch, ROW: torch.tensor(rows)}


def losses(model: Any, name: str, batch: dict[str, torch.Tensor], teacher: Any, **options: Any) -> Any:
    scales = update_scales(model, batch) if name == "local" else {}
    model.zero_grad()
    found = Objective(name, scales=scales, teacher=teacher, **options)(model, batch, 60.0)
    found.total.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return float(found.equivalence), float(found.regularization), gradients


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma4_text"])
@pytest.mark.parametrize("name", ["local", "composite"])
@pytest.mark.parametrize("layers", [[1, 2], [0, 3], "all"])
def test_block_objectives_are_the_same_with_targets_from_disk(
    kind: str, name: str, layers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses and gradients in float64, across shards, in another order; without running the frozen model."""
    monkeypatch.setattr("npt.equivalence.teacher.SHARD_BYTES", 40_000)
    model, text = converted(kind, npt_layers=layers), blocks(12)
    cache = teacher_cache(tmp_path, model, text, "hidden", batch_size=5)
    assert len(list((tmp_path / "hidden").glob("shard-*"))) > 1
    batch = rows_of(text, [7, 0, 11, 4])
    live = losses(model, name, batch, None, regularizer="delta", regularization_weight=0.1)
    monkeypatch.setattr("npt.equivalence.objectives.update_scales", None)
    scales = update_scales(model, batch) if name == "local" else {}
    monkeypatch.setattr("npt.equivalence.objectives.run_backbone", lambda *_: pytest.fail("the frozen model ran"))
    model.zero_grad()
    objective = Objective(name, scales=scales, teacher=cache, regularizer="delta", regularization_weight=0.1)
    read = objective(model, batch, 60.0)
    read.total.backward()
    assert float(read.equivalence) == pytest.approx(live[0], rel=1e-6)
    assert float(read.regularization) == pytest.approx(live[1], rel=1e-6)
    for n, p in model.named_parameters():
        if n in live[2]:
            torch.testing.assert_close(p.grad, live[2][n], rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("top_k", [1, 8, 95])
def test_top_k_kl_against_the_formula(top_k: int, tmp_path: Path) -> None:
    """KL over the k most probable tokens and the rest as one; k = vocabulary - 1 is the whole KL."""
    model, text = converted("llama"), blocks(6)
    cache = teacher_cache(tmp_path, model, text, "logits", top_k=top_k)
    batch = rows_of(text, [5, 2, 3])
    read = losses(model, "logits", batch, cache)
    with torch.no_grad():
        student = model(input_ids=batch["input_ids"]).logits.log_softmax(-1)
        with model.disable_adapter():
            teacher = model(input_ids=batch["input_ids"]).logits.log_softmax(-1)
    counted = torch.nn.functional.pad(batch["labels"][:, 1:] != -100, (0, 1))
    expected = 0.0
    for t, s in zip(teacher[counted], student[counted], strict=True):
        ids = t.topk(top_k).indices
        p, q = t.exp(), s.exp()
        expected += float((p[ids] * (t[ids] - s[ids])).sum())
        expected += float((1 - p[ids].sum()) * ((1 - p[ids].sum()).log() - (1 - q[ids].sum()).log()))
    assert read[0] == pytest.approx(expected / 60, rel=1e-4)
    live = losses(model, "logits", batch, None)
    if top_k == 95:
        assert read[0] == pytest.approx(live[0], rel=1e-5)
        for n, gradient in live[2].items():
            torch.testing.assert_close(read[2][n], gradient, rtol=1e-3, atol=1e-5 * float(gradient.abs().max()))
    else:
        assert read[0] < live[0]


def test_grouped_outcomes_are_a_distribution() -> None:
    log_probabilities = torch.randn(3, 50, dtype=torch.float64).mul(4).log_softmax(-1)
    ids = log_probabilities.topk(5).indices
    assert torch.allclose(grouped(log_probabilities, ids).exp().sum(-1), torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("objective", ["local", "logits"])
def test_a_second_run_reads_what_the_first_one_wrote(
    objective: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training with targets from disk lowers the loss like training without; the second run makes none."""
    runs = {}
    for name in ("first", "second"):
        run = trainer(
            tmp_path / name, objective=objective, trainer_options={"teacher_cache": tmp_path / "c", "teacher_top_k": 90}
        )
        if name == "second":
            monkeypatch.setattr("npt.equivalence.teacher.targets", lambda *_: pytest.fail("targets were made again"))
            modes: list[Any] = []
            monkeypatch.setattr("npt.equivalence.objectives.run_backbone", record_mode(modes))
        run.train()
        runs[name] = logged(tmp_path / name)
    # The original ran once, for the constants of `local`, and never in a step.
    assert modes.count(Mode.ORIGINAL) == (objective == "local")
    plain = trainer(tmp_path / "plain", objective=objective)
    plain.train()
    assert runs["first"] == runs["second"]
    for (_, one), (_, other) in zip(runs["first"], logged(tmp_path / "plain"), strict=True):
        assert one == pytest.approx(other, rel=2e-2 if objective == "logits" else 1e-3)


def record_mode(modes: list[Any]) -> Any:
    def run(model: Any, inputs: Any) -> Any:
        modes.append(active_layers(model)[0].mode)
        return run_backbone(model, inputs)

    return run


def test_targets_for_more_blocks_serve_fewer(tmp_path: Path) -> None:
    text = blocks(4)
    wide = get_peft_model(random_base("llama"), NPTConfig(npt_layers="all", rank=3))
    teacher_cache(tmp_path, wide, text, "hidden")
    narrow = converted("llama", npt_layers=[1, 3])
    cache, batch = teacher_cache(tmp_path, narrow, text, "hidden"), rows_of(text, [2, 1])
    assert losses(narrow, "local", batch, cache)[0] == pytest.approx(losses(narrow, "local", batch, None)[0], rel=1e-6)
    with pytest.raises(DataError, match=r"blocks 1 and 3, and this run converts block 2"):
        other = tmp_path / "narrow"
        teacher_cache(other, narrow, text, "hidden")
        teacher_cache(other, converted("llama", npt_layers=[2]), text, "hidden")


@pytest.mark.parametrize(
    ("change", "named"), [("base", "another base model"), ("text", "other text"), ("top_k", "training.teacher_top_k")]
)
def test_a_changed_base_or_text_is_an_error(change: str, named: str, tmp_path: Path) -> None:
    model, text = converted("llama"), blocks(4)
    teacher_cache(tmp_path, model, text, "logits", top_k=4)
    teacher_cache(tmp_path, model, text, "logits", top_k=4)
    if change == "base":
        with torch.no_grad():
            model.get_base_model().lm_head.weight[3, 5] += 1e-6
    if change == "text":
        text = blocks(4, seed=1)
    with pytest.raises(DataError, match=named) as error:
        teacher_cache(tmp_path, model, text, "logits", top_k=5 if change == "top_k" else 4)
    assert str(tmp_path) in str(error.value) and "delete" in str(error.value)
    if change == "base":  # told before text is sampled and packed
        with pytest.raises(DataError, match=named):
            check_teacher_cache(tmp_path, model, ["logits"], 4, 4, 16)


def test_new_values_of_the_components_change_nothing(tmp_path: Path) -> None:
    model, text = converted("llama"), blocks(4)
    teacher_cache(tmp_path, model, text, "hidden")
    randomize(model, seed=9)
    teacher_cache(tmp_path, model, text, "hidden")


@pytest.mark.parametrize("damage", ["cut", "gone", "noise"])
def test_a_damaged_shard_is_made_again(damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("npt.equivalence.teacher.SHARD_BYTES", 20_000)
    model, text = converted("llama"), blocks(8)
    teacher_cache(tmp_path, model, text, "hidden")
    path = shard_path(tmp_path / "hidden", 1)
    whole = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(whole[: len(whole) // 2] if damage == "cut" else b"\xff" * 64)
    made: list[int] = []
    monkeypatch.setattr(
        "npt.equivalence.teacher.targets", lambda *a: (made.append(len(a[1]["input_ids"])), targets(*a))[1]
    )
    cache = teacher_cache(tmp_path, model, text, "hidden")
    assert path.read_bytes() == whole
    assert sum(made) == cache.manifest.shard_blocks


def test_a_full_disk_keeps_what_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("npt.equivalence.teacher.SHARD_BYTES", 20_000)
    model, text = converted("llama"), blocks(8)
    from npt.equivalence import teacher

    saved, calls = teacher.save_file, []

    def full(tensors: Any, path: Any) -> None:
        calls.append(path)
        if len(calls) == 2:
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        saved(tensors, path)

    monkeypatch.setattr(teacher, "save_file", full)
    with pytest.raises(DataError, match="No space left on device"):
        teacher_cache(tmp_path, model, text, "hidden")
    left = sorted(p.name for p in (tmp_path / "hidden").iterdir())
    assert left == ["shard-00000.safetensors", "targets.json"]
    teacher_cache(tmp_path, model, text, "hidden")
    assert not any(str(path).endswith("00000.safetensors.part") for path in calls[2:])


@pytest.mark.parametrize("base", ["llama", "gemma4_text"])
def test_size_is_known_before_and_a_small_disk_stops_the_run(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, text = converted(base, npt_layers=[0, 1, 3]), blocks(6)
    for kind in ("hidden", "logits"):
        teacher_cache(tmp_path, model, text, kind, top_k=7)
        size = sum(p.stat().st_size for p in (tmp_path / kind).glob("*.safetensors"))
        assert size == pytest.approx(6 * bytes_per_block(model, kind, 7, 16), rel=0.05)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=2**20 * 65))
    with pytest.raises(DataError, match=r"the targets need .* MiB and the disk has 1\.00 MiB to spare"):
        check_teacher_cache(tmp_path, model, ["hidden"], 7, 10_000, 16)
    with pytest.raises(DataError, match="teacher_top_k=96: use 1 to 95"):
        check_teacher_cache(tmp_path, model, ["logits"], 96, 1, 16)


def test_a_folder_without_its_record_is_not_trusted(tmp_path: Path) -> None:
    model, text = converted("llama"), blocks(4)
    teacher_cache(tmp_path, model, text, "hidden")
    record = tmp_path / "hidden" / "targets.json"
    content = json.loads(record.read_text())
    record.write_text("{")
    with pytest.raises(DataError, match="not readable"):
        teacher_cache(tmp_path, model, text, "hidden")
    record.write_text(json.dumps({**content, "more": 1}))
    with pytest.raises(DataError, match="not readable"):
        teacher_cache(tmp_path, model, text, "hidden")
    record.unlink()
    with pytest.raises(DataError, match="unknown origin"):
        teacher_cache(tmp_path, model, text, "hidden")


def test_processes_share_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("npt.equivalence.teacher.SHARD_BYTES", 20_000)
    model, text = converted("llama"), blocks(8)
    with monkeypatch.context() as second:
        second.setattr("npt.common.processes.world", lambda: (1, 2))
        second.setattr("npt.common.processes.from_first", lambda value: value)
        second.setattr("npt.common.processes.is_first", lambda: True)
        second.setattr("npt.equivalence.teacher.barrier", lambda: None)
        teacher_cache(tmp_path, model, text, "hidden")
    first = {p.name for p in (tmp_path / "hidden").glob("shard-*")}
    assert "shard-00000.safetensors" not in first and first
    teacher_cache(tmp_path, model, text, "hidden")
    assert first < {p.name for p in (tmp_path / "hidden").glob("shard-*")}


def test_kinds_and_rows() -> None:
    assert [objective_class(name).teacher_kind for name in ("local", "composite", "logits")] == [
        "hidden",
        "hidden",
        "logits",
    ]
    assert with_rows(blocks(3))[ROW] == [0, 1, 2]


def test_targets_are_the_original_blocks_own(tmp_path: Path) -> None:
    model, text = converted("gpt2", npt_layers=[2]), blocks(2)
    record = teacher_cache(tmp_path, model, text, "hidden").record(2, torch.tensor([1, 0]), CPU)
    seen: list[Any] = []
    batch = rows_of(text, [1, 0])
    with (
        torch.no_grad(),
        running_as(active_layers(model), Mode.ORIGINAL),
        watching(active_layers(model), lambda _, r: seen.append(r)),
    ):
        run_backbone(model, batch)
    for name in ("hidden_states", "attention", "output"):
        torch.testing.assert_close(getattr(record, name), getattr(seen[0], name), rtol=1e-12, atol=1e-12)
