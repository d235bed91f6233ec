"""Commands that load an adapter take its base and settings from its folder, below what a person gives."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from npt.adapters.settings import as_recorded, load_settings
from npt.cli import main
from npt.config import load_config
from npt.errors import CheckpointError, ConfigError


@pytest.fixture
def best(finished_run: Path, tmp_path: Path) -> Path:
    """A copy of the adapter of a finished run."""
    return shutil.copytree(finished_run / "checkpoints" / "best_model", tmp_path / "best")


def recorded(folder: Path, **changes: Any) -> None:
    """Other values in npt_run.yaml."""
    values = yaml.safe_load((folder / "npt_run.yaml").read_text())
    for key, value in changes.items():
        section, name = key.split("__")
        values[section][name] = value
    (folder / "npt_run.yaml").write_text(yaml.safe_dump(values))


def test_base_and_settings_come_from_the_folder(
    best: Path, local_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of what the run had: the base, its number format, the text, its seed; nothing of where it wrote to."""
    recorded(best, model__dtype="bfloat16", training__seed=7, paths__output_dir="elsewhere", wandb__enabled=True)
    monkeypatch.chdir(tmp_path)
    run = load_settings("best")
    assert run.model.base_model_name == str(local_model) and run.model.dtype == "bfloat16"
    assert (run.training.seed, run.data.max_length, run.data.num_eval_samples, run.training.batch_size) == (7, 32, 8, 4)
    assert run.paths.output_dir == "outputs" and not run.wandb.enabled
    run = load_settings("best", sections=("model", "optimization"))
    assert run.model.dtype == "bfloat16" and (run.training.seed, run.data.max_length) == (0, 256)


def test_what_a_person_gives_wins(best: Path, tmp_path: Path) -> None:
    recorded(best, model__dtype="bfloat16")
    run = load_settings(best, None, ["model.dtype=float32", "model.base_model_name=builtin:tiny", "data.max_length=16"])
    assert (run.model.dtype, run.model.base_model_name, run.data.max_length) == ("float32", "builtin:tiny", 16)
    assert run.data.num_eval_samples == 8
    (tmp_path / "c.yaml").write_text("data: {max_length: 24}\n")
    run = load_settings(best, tmp_path / "c.yaml")
    assert run.model.base_model_name != "builtin:tiny", "the file names none"
    assert (run.data.max_length, run.data.num_eval_samples, run.model.dtype) == (24, 400, "auto"), (
        "a file is the record"
    )
    (tmp_path / "c.yaml").write_text("model: {base_model_name: builtin:tiny}\n")
    assert load_settings(best, tmp_path / "c.yaml").model.base_model_name == "builtin:tiny"
    with pytest.raises(ConfigError, match="model.rnak: unknown key"):
        load_settings(best, None, ["model.rnak=3"])


def test_nothing_that_runs_code_or_skips_a_check_comes_from_a_folder(best: Path) -> None:
    recorded(best, model__trust_remote_code=True, model__allow_other_base=True, optimization__fsdp=True)
    recorded(best, training__report_to=["wandb"])
    run = load_settings(best)
    assert not (run.model.trust_remote_code or run.model.allow_other_base or run.optimization.fsdp)
    assert run.training.report_to == []


@pytest.mark.parametrize("given", ["data.data_files=[b.txt]", "data.dataset_name=self", "data.dataset_config=x"])
def test_other_text_drops_the_names_of_the_recorded_text(given: str, best: Path, tmp_path: Path) -> None:
    """One that is named in a part only would contradict the rest of the record, which the person never wrote."""
    files = [str(tmp_path / "a.txt")]
    recorded(
        best, data__dataset_name="text", data__data_files=files, data__text_column="body", data__eval_texts=files[:0]
    )
    assert load_settings(best).data.data_files == files
    more = ["data.dataset_name=text"] if "files" in given else []
    data = load_settings(best, None, [given, *more]).data
    assert data.data_files == (["b.txt"] if "files" in given else None) and data.text_column == "text"
    assert data.num_eval_samples == 8, "how much of it stays"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"base_model_name_or_path": None}, "does not say which base it was made for; name it: --set"),
        (
            {"base_model_name_or_path": "/gone/model"},
            "made for the base /gone/model, which is not there any more; name",
        ),
    ],
)
def test_a_base_that_is_not_there_is_asked_for(
    change: dict[str, Any], words: str, best: Path, local_model: Path
) -> None:
    values = json.loads((best / "adapter_config.json").read_text())
    (best / "adapter_config.json").write_text(json.dumps(values | change))
    (best / "npt_run.yaml").unlink()
    with pytest.raises(CheckpointError, match=words):
        load_settings(best)
    remedy = [f"model.base_model_name={local_model}"]
    assert load_settings(best, None, remedy).model.base_model_name == str(local_model)


def test_a_record_of_another_npt_can_be_passed_by(best: Path, tmp_path: Path) -> None:
    (best / "npt_run.yaml").write_text("model: {wings: 2}\n")
    with pytest.raises(CheckpointError, match="model.wings: unknown key.*give --config FILE"):
        load_settings(best)
    (tmp_path / "c.yaml").write_text("data: {max_length: 32}\n")
    assert load_settings(best, tmp_path / "c.yaml").data.max_length == 32


def test_a_record_s_places_mean_the_same_everywhere(local_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(local_model.parent)
    names = [f"model.base_model_name={local_model.name}", "data.dataset_name=text", "data.data_files=[a/*.txt]"]
    record = as_recorded(load_config(None, [*names, "data.eval_texts=[builtin:python-docs, e.txt]"]))
    assert record.model.base_model_name == str(local_model)
    assert record.data.data_files == [str(local_model.parent / "a" / "*.txt")] and record.data.calibration_files is None
    assert record.data.eval_texts == ["builtin:python-docs", str(local_model.parent / "e.txt")]
    assert as_recorded(load_config(None)).model.base_model_name == "builtin:tiny"


def test_commands_without_a_config(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """generate and evaluate from another folder; the log says what was taken from where."""
    monkeypatch.chdir(tmp_path)
    best = str(finished_run / "checkpoints" / "best_model")
    assert main(["generate", "The cat", "--checkpoint", best, "--max-new-tokens", "3"]) == 0
    err = "".join(capfd.readouterr().err.split())
    assert f"from{best}:" in err and "model.base_model_name=" in err and "data." not in err
    assert main(["evaluate", "--checkpoint", best, "--set", "data.eval_texts=[]"]) == 0
    err = "".join(capfd.readouterr().err.split())
    assert "data.max_length=32" in err and "data.num_eval_samples=8" in err
    mine, theirs = (
        json.loads(path.read_text())["evaluations"]
        for path in (tmp_path / "evaluation_report.json", finished_run / "outputs" / "evaluation_report.json")
    )
    assert mine["perplexity"] == theirs["perplexity"] and mine["divergence"] == theirs["divergence"]


def test_the_harness_takes_base_and_number_format_from_the_folder(best: Path) -> None:
    pytest.importorskip("lm_eval")
    from npt.integrations.lm_eval import NPTLM

    recorded(best, model__dtype="bfloat16")
    own = NPTLM(peft=str(best), device="cpu")
    assert own.model.dtype == torch.bfloat16 and own.model.get_base_model().config.num_hidden_layers == 4
    assert NPTLM(peft=str(best), dtype="float32", device="cpu").model.dtype == torch.float32
    with pytest.raises(CheckpointError, match="made for a base"):
        NPTLM(peft=str(best), pretrained="builtin:tiny", device="cpu")
    values = json.loads((best / "adapter_config.json").read_text())
    (best / "adapter_config.json").write_text(json.dumps(values | {"base_model_name_or_path": "/gone/model"}))
    with pytest.raises(CheckpointError, match="not there any more"):
        NPTLM(peft=str(best), device="cpu")
