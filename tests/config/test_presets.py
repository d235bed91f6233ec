"""`npt init` writes the repository's configurations, which load, and nothing over what is there."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from npt.cli import main
from npt.config import QUICK, RunConfig, load_config, shortened, with_overrides
from npt.config.presets import PRESETS, preset_text
from scripts.marked import ROOT


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("preset", [name for name in PRESETS if name != "quick"])
def test_a_preset_is_the_repository_s_file(preset: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", "--preset", preset]) == 0
    assert (folder / "config.yaml").read_text() == (ROOT / PRESETS[preset]).read_text()
    assert load_config("config.yaml") == load_config(ROOT / PRESETS[preset])
    command = "finetune" if preset == "finetune" else "train"
    assert f"npt {command} --config config.yaml" in capsys.readouterr().out


def test_without_a_preset_every_key_stands_there_with_its_comment(folder: Path) -> None:
    assert main(["init", "run.yaml"]) == 0
    assert load_config("run.yaml") == RunConfig()
    text = (folder / "run.yaml").read_text()
    sections = yaml.safe_load(text)
    assert {name: set(keys) for name, keys in sections.items()} == {
        name: set(keys) for name, keys in RunConfig().model_dump().items()
    }
    assert text.count("#") > 30


def test_the_quick_preset_is_what_train_quick_makes_of_the_defaults(folder: Path) -> None:
    assert main(["init", "--preset", "quick"]) == 0
    assert load_config("config.yaml") == shortened(RunConfig()) != RunConfig()
    loaded = yaml.safe_load((folder / "config.yaml").read_text())
    assert {key: loaded[key.split(".")[0]][key.split(".")[1]] for key in QUICK} == QUICK


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("base", ["org/model-1", "builtin:tiny", "/a folder/with: colon # and hash", "no", "3"])
def test_the_base_is_set_and_nothing_else(preset: str, base: str, folder: Path) -> None:
    plain, other = preset_text(preset), preset_text(preset, base)
    (folder / "a.yaml").write_text(plain)
    (folder / "b.yaml").write_text(other)
    changes = {"model.base_model_name": base}
    assert load_config("b.yaml") == with_overrides(load_config("a.yaml"), changes)
    assert len(plain.splitlines()) == len(other.splitlines())
    assert sum(a != b for a, b in zip(plain.splitlines(), other.splitlines(), strict=True)) <= 1


def test_it_goes_to_stdout_too(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", "-", "--model", "gpt2"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["model"]["base_model_name"] == "gpt2"
    assert list(folder.iterdir()) == []


def test_what_is_there_stays_without_force(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "config.yaml").write_text("mine")
    assert main(["init"]) == 2 and (folder / "config.yaml").read_text() == "mine"
    assert "--force" in capsys.readouterr().err
    assert main(["init", "--force"]) == 0 and load_config("config.yaml") == RunConfig()
