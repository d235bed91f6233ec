"""`npt train --resume` goes on with the run that began, or says in one line what differs, before anything is written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from npt.cli import main
from npt.common.files import seal
from npt.training.resume import RECORD
from tests.helpers import quick_reports, settings

LINES = "".join(f"Line {n} of the story: the cat number {n * 7 % 13} sat on mat {n * 5 % 11}.\n" for n in range(120))
OF_TEXT: dict[str, Any] = {"data__dataset_name": "text", "data__num_train_samples": "null"}


def words(model: Path, folder: Path, **more: Any) -> list[str]:
    return [
        "--quiet",
        "train",
        *settings(model, folder, **{**OF_TEXT, "data__data_files": f"[{folder}/a.txt]", **more}),
    ]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


@pytest.fixture(scope="module")
def begun(local_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of four steps; tests only read it."""
    folder = tmp_path_factory.mktemp("begun")
    (folder / "a.txt").write_text(LINES)
    (folder / "prose.txt").write_text(LINES[::-1])
    with quick_reports():
        assert main(words(local_model, folder, data__calibration_files=f"[{folder}/prose.txt]")) == 0
    return folder


#: Another setting, and the words of the line that names it with both values.
OTHERS: list[tuple[dict[str, Any], str]] = [
    ({"model__modulation_scale": 0.5}, "model.modulation_scale is 0.5 here and 1.0 in the checkpoint"),
    ({"model__gain": "norm"}, 'model.gain is "norm" here and "state" in the checkpoint'),
    ({"model__npt_layers": "[1, 3]"}, "model.npt_layers is [1, 3] here and [2, 3] in the checkpoint"),
    ({"model__target_projections": "[gate]"}, "model.target_projections is"),
    ({"model__rank": 2}, "model.rank is 2 here and 3 in the checkpoint"),
    ({"model__dtype": "bfloat16"}, 'model.dtype is "bfloat16" here and "float32" in the checkpoint'),
    ({"training__learning_rate": 0.1}, "training.learning_rate is 0.1 here and 0.0003 in the checkpoint"),
    ({"training__lr_scheduler_type": "linear"}, "training.lr_scheduler_type is"),
    ({"training__warmup_steps": 1}, "training.warmup_steps is 1 here and 0"),
    ({"training__weight_decay": 0.1}, "training.weight_decay is 0.1 here and 0.0"),
    ({"training__max_grad_norm": 2.0}, "training.max_grad_norm is 2.0 here and 1.0"),
    ({"training__seed": 1}, "training.seed is 1 here and 0"),
    ({"training__objective": "local"}, 'training.objective is ["local"] here and ["logits"]'),
    ({"training__regularization_weight": 0.1}, "training.regularization_weight is 0.1 here and 0.0"),
    ({"training__regularizer": "factors"}, "training.regularizer is"),
    ({"training__calibrate": "false"}, "training.calibrate is false here and true"),
    (
        {"training__batch_size": 8},
        "training.batch_size x training.gradient_accumulation_steps x processes is 8 here and 4",
    ),
    ({"optimization__mixed_precision": "bf16"}, 'optimization.mixed_precision is "bf16" here and "no"'),
    ({"paths__teacher_cache": "t"}, "training.teacher_top_k (with paths.teacher_cache) is 64 here and null"),
    ({"data__max_length": 16}, "data.max_length is 16 here and 32"),
    ({"data__dataset_name": "self", "data__data_files": "null", "data__num_train_samples": 48}, "data.dataset_name is"),
    ({"data__num_calibration_samples": 8}, "data.num_calibration_samples is 8 here and 24"),
    ({"data__calibration_files": "null"}, "data.calibration_files (their content) is null here and"),
    ({"data__streaming": "true"}, "data.streaming is true here and false"),
    ({"data__num_train_samples": 60}, "the training text is another: "),
    ({"data__num_eval_samples": 9}, "data.num_eval_samples is 9 here and 8 in the checkpoint"),
    ({"training__num_train_steps": 3}, "training.num_train_steps is 3 here and 4 steps are taken already"),
    ({"training__num_train_steps": 0}, "training.num_train_steps is 0 here and 4 steps are taken already"),
]


@pytest.mark.parametrize("change, message", OTHERS, ids=lambda value: str(value)[:40])
def test_another_setting_is_one_line(
    change: dict[str, Any], message: str, begun: Path, local_model: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = contents(begun)
    same = {"data__calibration_files": f"[{begun}/prose.txt]"}
    arguments = [*words(local_model, begun, **{**same, "training__num_train_steps": 6, **change}), "--resume"]
    capfd.readouterr()
    assert main(arguments) == 2
    err = capfd.readouterr().err.splitlines()[-1]
    assert err.startswith("npt: ") and f"{begun / 'checkpoints'}/checkpoint-4: " in err and message in err
    assert err.endswith("set that back, or start a new run without --resume (resume_from_checkpoint)")
    assert contents(begun) == before, "nothing is written"


@pytest.mark.parametrize(
    "change",
    [
        {"model__npt_layers": "[1, 3]"},
        {"training__learning_rate": 0.1},
        {"training__objective": "local"},
        {"training__num_train_steps": 3},
        {"data__max_length": 16},
        {"data__num_calibration_samples": 8},
        {"optimization__mixed_precision": "bf16"},
    ],
    ids=str,
)
def test_settings_are_compared_before_the_weights_are_loaded(
    change: dict[str, Any], begun: Path, local_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: Any) -> None:
        raise AssertionError("the weights are loaded")

    monkeypatch.setattr("npt.runs.train.load_base", load)
    same = {"data__calibration_files": f"[{begun}/prose.txt]"}
    assert main([*words(local_model, begun, **{**same, **change}), "--resume"]) == 2
    with pytest.raises(AssertionError, match="the weights are loaded"):
        main([*words(local_model, begun, **same), "--resume"])


def copy_of(begun: Path, folder: Path) -> Path:
    return shutil.copytree(begun, folder / "copy", ignore=shutil.ignore_patterns(".lock"))


@pytest.mark.usefixtures("quick_reports")
def test_more_steps_other_logs_and_other_places_are_the_same_run(
    begun: Path, local_model: Path, tmp_path: Path
) -> None:
    """Also fewer blocks at a time with as many a step, the same blocks and files under other names."""
    folder, model = copy_of(begun, tmp_path), shutil.copytree(local_model, tmp_path / "model")
    (folder / "a.txt").rename(folder / "b.txt")
    (folder / "prose.txt").rename(folder / "c.txt")
    more = {
        "data__data_files": f"[{folder}/b.txt]", "data__calibration_files": f"[{folder}/c.txt]",
        "training__num_train_steps": 6, "training__logging_steps": 1, "training__eval_steps": 3,
        "training__save_steps": 3, "training__prediction_logging_steps": 5, "training__batch_size": 2,
        "training__gradient_accumulation_steps": 2, "model__npt_layers": "[3, -2]", "paths__cache_dir": folder / "k",
        "model__target_projections": "[down, up, gate]",
    }  # fmt: skip
    assert main([*words(model, folder, **more), "--resume"]) == 0
    rows = [json.loads(line) for line in (folder / "outputs" / "metrics.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in rows if "eval_mean_kl" in row]
    assert steps == [0, 2, 4, 6], "also the evaluations of the steps that were taken stay"


def other_base(folder: Path, local_model: Path) -> Path:
    model = AutoModelForCausalLM.from_pretrained(local_model)
    model.model.layers[0].mlp.up_proj.weight.data.mul_(1.5)
    shutil.copytree(local_model, folder / "other")
    model.save_pretrained(str(folder / "other"))
    return folder / "other"


@pytest.mark.parametrize("allowed", ["false", "true"])
def test_another_base_of_the_same_sizes_is_one_line(
    allowed: str, begun: Path, local_model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Also where an adapter may be loaded on it: the optimiser's state and the figures so far are of the first one."""
    model, before = other_base(tmp_path, local_model), contents(begun)
    more = {"data__calibration_files": f"[{begun}/prose.txt]", "model__allow_other_base": allowed}
    assert main([*words(model, begun, **more), "--resume"]) == 2
    err = capfd.readouterr().err.splitlines()[-1]
    assert f"model.base_model_name={model} is another base than the checkpoint's ({local_model})" in err
    assert contents(begun) == before


def test_other_content_of_the_same_file_is_one_line(
    begun: Path, local_model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = copy_of(begun, tmp_path)
    more = {"data__calibration_files": f"[{folder}/prose.txt]"}
    (folder / "a.txt").write_text(LINES.replace("cat", "dog"))
    assert main([*words(local_model, folder, **more), "--resume"]) == 2
    err = capfd.readouterr().err.splitlines()[-1]
    assert (
        "the training text is another: " in err and "blocks, " in err and "digest" in err and "data.data_files" in err
    )
    (folder / "a.txt").write_text(LINES)
    (folder / "prose.txt").write_text(LINES)
    assert main([*words(local_model, folder, **more), "--resume"]) == 2
    assert "data.calibration_files (their content) is" in capfd.readouterr().err.splitlines()[-1]


@pytest.mark.usefixtures("quick_reports")
def test_a_checkpoint_without_a_record_goes_on_with_one_note(
    begun: Path, local_model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = copy_of(begun, tmp_path)
    more = {"data__calibration_files": f"[{folder}/prose.txt]", "training__num_train_steps": 5}
    for checkpoint in (folder / "checkpoints").glob("checkpoint-*"):
        (checkpoint / RECORD).unlink()
        seal(checkpoint)
    assert main([*words(local_model, folder, **more, model__modulation_scale=0.5), "--resume"]) == 2
    assert "model.modulation_scale is 0.5 here and 1.0" in capfd.readouterr().err
    assert main([*words(local_model, folder, **more, training__learning_rate=0.5), "--resume"]) == 0
    log = "".join(capfd.readouterr().err.split())  # the lines are wrapped
    assert log.count("wassavedbyanearliernpt") == 1 and "optionsandbasealonearecompared" in log


@pytest.mark.parametrize("content", ["[1]", '{"settings": []}', "{", '{"settings": {}, "text": 3}'])
def test_a_damaged_record_is_one_line(
    content: str, begun: Path, local_model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = copy_of(begun, tmp_path)
    checkpoint = folder / "checkpoints" / "checkpoint-4"
    (checkpoint / RECORD).write_text(content)
    seal(checkpoint)
    more = {"data__calibration_files": f"[{folder}/prose.txt]"}
    assert main([*words(local_model, folder, **more), "--resume"]) == 2
    assert f"checkpoint-4/{RECORD}: not" in capfd.readouterr().err.splitlines()[-1]


def test_streamed_text_is_compared_too(local_model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """By what was held out, by the files' sizes and by the order in which documents come."""
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text(
            "".join(json.dumps({"text": f"{name}{line}"}) + "\n" for line in LINES.splitlines())
        )
    more: dict[str, Any] = {
        "data__dataset_name": "text", "data__data_files": f"[{tmp_path}/a.jsonl, {tmp_path}/b.jsonl]",
        "data__streaming": "true", "data__shuffle_window": 20, "data__num_calibration_samples": 8,
    }  # fmt: skip
    with quick_reports():
        assert main(["--quiet", "train", *settings(local_model, tmp_path, **more)]) == 0
    for change, message in (
        ({"data__shuffle_window": 30}, "data.shuffle_window is 30 here and 20"),
        ({"data__data_files": f"[{tmp_path}/a.jsonl]"}, "data.data_files (their sizes) is"),
    ):
        assert main(["--quiet", "train", *settings(local_model, tmp_path, **{**more, **change}), "--resume"]) == 2
        assert message in capfd.readouterr().err.splitlines()[-1]
