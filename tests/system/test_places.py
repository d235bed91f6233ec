"""A place means one thing to all parts: `~` is the home folder in files, overrides, options and Python, and never a folder of
that name.
"""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from npt import NPTConfig, merge_adapters
from npt.adapters.folder import load_adapter, resolve_checkpoint
from npt.builtin import source_of
from npt.cli import main
from npt.common.places import expanded, place
from npt.config import RunConfig, load_config, save_config
from npt.data import load_documents, sample_blocks
from npt.data.sources import TextFiles
from npt.equivalence.teacher import teacher_cache
from npt.errors import ConfigError, DataError, NPTError
from npt.report.page import write_page
from npt.runs.evaluate import run_evaluation
from npt.training.callbacks import BestAdapterCallback, JsonLinesCallback
from tests.helpers import blocks, converted, random_base, settings

#: Every key that is a place, with a value of it.
KEYS = {
    "model.base_model_name": "~/m",
    "data.dataset_name": "~/d",
    "data.data_files": ["~/a.txt", "~/*.jsonl"],
    "data.calibration_files": ["~/b.txt"],
    "data.eval_texts": ["~/c.txt", "builtin:python-docs"],
    "paths.output_dir": "~/o",
    "paths.checkpoint_dir": "~/c",
    "paths.cache_dir": "~/k",  # a bare ~ is null in YAML
    "paths.teacher_cache": "~/t",
}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder of its own, and a working directory in which nothing may appear."""
    (tmp_path / "home").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "home"


def shown(value: Any) -> str:
    return str(value).replace("'", '"')


def test_expanded_knows_homes_and_leaves_other_names_alone(home: Path) -> None:
    assert expanded("~/x") == str(home / "x") and place("~") == home
    for name in ("gpt2", "org/model", "builtin:tiny", "a~b", "./~/x", "$HOME/x", "../x"):
        assert expanded(name) == name == source_of(name) or name == "builtin:tiny"
    with pytest.raises(
        NPTError, match="~no-such-user/x: there is no home folder for ~no-such-user; write the whole path"
    ):
        expanded("~no-such-user/x")


@pytest.mark.parametrize("key", KEYS)
def test_every_key_that_is_a_place_is_expanded(key: str, home: Path) -> None:
    """In a file, as an override, and in Python."""
    section, name = key.split(".")
    more = {"data.data_files": {"dataset_name": "text"}}.get(key, {})
    expected = str(KEYS[key]).replace("~", str(home))
    overrides = [f"{key}={shown(KEYS[key])}", *(f"{section}.{k}={v}" for k, v in more.items())]
    (home / "run.yaml").write_text(f"{section}: {shown({**more, name: KEYS[key]})}\n")
    for config in (
        load_config(None, overrides),
        load_config("~/run.yaml"),
        RunConfig.model_validate({section: {**more, name: KEYS[key]}}),
    ):
        assert str(getattr(getattr(config, section), name)) == expected
    with pytest.raises(ConfigError, match=f"{key}: .*there is no home folder for ~no-such-user"):
        load_config(None, [overrides[0].replace("~", "~no-such-user"), *overrides[1:]])


def test_text_that_is_also_trained_on_is_recognised_by_either_name(home: Path) -> None:
    with pytest.raises(ConfigError, match="would be evaluated on after training on it"):
        load_config(
            None, ["data.dataset_name=text", f"data.data_files=[{home}/a.txt]", "data.eval_texts=[~/a.txt]"]
        )  # fmt: skip


@pytest.mark.usefixtures("quick_reports")
def test_a_run_in_the_home_folder_is_resumed_and_evaluated_there(
    local_model: Path, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (home / "model").symlink_to(local_model)
    (home / "a.txt").write_text("".join(Random(0).choices("abcdefgh ", k=4000)))  # nothing comes twice
    words = settings(
        Path("~/model"), Path("~/run"), data__dataset_name="text", data__data_files="['~/*.txt']",
        paths__teacher_cache="~/teacher",
    )  # fmt: skip
    assert main(["--quiet", "train", *words]) == 0
    assert {path.name for path in (home / "run" / "checkpoints").iterdir()} >= {"best_model", "checkpoint-4"}
    assert (home / "run" / "outputs" / "evaluation_report.json").is_file() and (home / "teacher").is_dir()
    assert main(["--quiet", "train", *words, "--resume", "--set", "training.num_train_steps=6"]) == 0
    assert (home / "run" / "checkpoints" / "checkpoint-6").is_dir()
    save_config(load_config(None, words[1::2]), "~/c.yaml")
    options = ["--config=~/c.yaml", "--checkpoint=~/run/checkpoints/best_model", "--output=~/new/r.json"]
    assert main(["--quiet", "evaluate", *options, "--set", "training.batch_size=8"]) == 0
    assert (home / "new" / "r.json").is_file() and (home / "new" / "r.html").is_file()
    run_evaluation(load_config("~/c.yaml"), "~/run/checkpoints/best_model", "~/python/r.json")
    assert (home / "python" / "r.json").is_file()
    assert main(["report", "~/run/outputs"]) == 0
    assert main(["compare", "~/run/outputs", "~/new", "--output=~/x.png"]) in (0, 2)
    assert list((home.parent / "here").iterdir()) == [], "nothing where the command ran"


def test_python_takes_the_same_names(home: Path) -> None:
    model = converted("llama", npt_layers=[1])
    for index in (1, 2):
        converted("llama", npt_layers=[index]).save_pretrained(str(home / f"part{index}"))
    merged = merge_adapters(["~/part1", "~/part2"], "~/both")
    assert merged == home / "both" and resolve_checkpoint("~/both.pt") == home / "both"
    assert load_adapter(random_base("llama", torch.float64), "~/both")
    (home / "a.txt").write_text("text")
    assert list(load_documents("text", data_files=["~/a.txt"])) == ["text"]
    with pytest.raises(DataError, match="~no-such-user/a.txt: there is no home folder.*check data.data_files"):
        TextFiles(["~no-such-user/a.txt"])
    assert JsonLinesCallback("~/m.jsonl").path == home / "m.jsonl"
    assert BestAdapterCallback("~/best", model).folder == home / "best"
    teacher_cache("~/t", converted("llama", npt_layers=[1]), blocks(4), "hidden")
    assert (home / "t" / "hidden" / "targets.json").is_file()
    (home / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    assert write_page("~", destination="~/p/page.html") == home / "p" / "page.html"  # type: ignore[arg-type]
    assert list((home.parent / "here").iterdir()) == []


def test_sampled_text_and_a_base_from_the_home_folder(home: Path, local_model: Path) -> None:
    (home / "model").symlink_to(local_model)
    base = AutoModelForCausalLM.from_pretrained(source_of("~/model"))
    tokenizer = AutoTokenizer.from_pretrained(source_of("~/model"))
    sample_blocks(base, tokenizer, 2, 8, seed=0, cache_dir="~/cache", progress=False)
    assert len(list((home / "cache").iterdir())) == 1 and NPTConfig().rank
    assert list((home.parent / "here").iterdir()) == []
