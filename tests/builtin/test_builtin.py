"""The builtin model, its card and its text work without a download, and its script makes the same model again."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from npt import builtin
from npt.cli import main
from npt.config import load_config
from npt.errors import ConfigError, DataError, NPTError
from npt.runs.corpora import further_corpora
from npt.runs.texts import RunTexts
from tests.helpers import REPOSITORY

TINY = builtin.MODELS["builtin:tiny"]


def test_the_model_is_what_its_card_says() -> None:
    card, weights = (TINY / "README.md").read_text("utf-8"), TINY / "model.safetensors"
    assert hashlib.sha256(weights.read_bytes()).hexdigest() in card
    assert f"{weights.stat().st_size:,} bytes" in card and weights.stat().st_size <= 8_000_000
    model = AutoModelForCausalLM.from_pretrained(TINY)
    count = sum(p.numel() for p in model.parameters())
    assert f"{count:,} parameters" in card and 1_000_000 <= count <= 4_000_000
    with safe_open(weights, framework="pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118
    assert model.dtype == torch.float32, "bfloat16 is for the wheel's size; it is slow on many CPUs"
    assert len(re.findall(r"^> ", card, re.MULTILINE)) >= 5


@torch.no_grad()
def test_the_model_has_learned_english() -> None:
    """A model that knows only which tokens are frequent has a loss near 5.7 on the language reference, 5.0 on stories."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(TINY), AutoTokenizer.from_pretrained(TINY)

    def loss(text: str) -> float:
        ids = tokenizer(text, return_tensors="pt").input_ids[:, :512]
        return float(model(ids, labels=ids).loss)

    story = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park."
    assert loss(story) < 1.5
    assert loss(" ".join(builtin.documents("builtin:python-docs")[0].split())) < 4.5


def test_any_text_survives_its_tokenizer() -> None:
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    for text in ("Once upon a time", "x = 1234\n\ty", "naïve café, 日本語, \u200b", "  two  spaces "):
        ids = tokenizer(text).input_ids
        assert ids[0] == tokenizer.bos_token_id and tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer.eos_token_id not in (None, tokenizer.bos_token_id)


def test_python_docs_are_there_and_real_text() -> None:
    texts = builtin.documents("builtin:python-docs")
    assert sum(map(len, texts)) > 200_000 and all(text.strip() for text in texts)


def test_a_python_without_its_docs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(DataError, match="without pydoc_data.*data.eval_texts"):
        builtin.documents("builtin:python-docs")


def test_missing_weights_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(builtin.MODELS, "builtin:tiny", tmp_path)
    with pytest.raises(NPTError, match="weights are missing.*reinstall"):
        builtin.source_of("builtin:tiny")


def test_evaluation_text_that_was_trained_on_is_refused_or_left_out(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.eval_texts: a\.txt would be evaluated on after training on it"):
        load_config(None, ["data.calibration_files=[a.txt]", "data.eval_texts=[a.txt]"])
    config = load_config(None, ["data.dataset_name=builtin:python-docs"])
    assert further_corpora(RunTexts.of(config), AutoTokenizer.from_pretrained(TINY)) == {}


def test_two_files_of_one_name_stay_two(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "t.txt").write_text(f"In folder {folder} there was a text. " * 40)
    names = [str(tmp_path / folder / "t.txt") for folder in ("a", "b")]
    config = load_config(None, [f"data.eval_texts=[{names[0]}]", "data.max_length=32"])
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    assert list(further_corpora(RunTexts.of(config), tokenizer, [names[1]])) == names
    assert list(further_corpora(RunTexts.of(config), tokenizer)) == ["t"]
    own = config.model_copy(update={"data": config.data.model_copy(update={"dataset_name": "t"})})
    assert list(further_corpora(RunTexts.of(own), tokenizer)) == [names[0]], (
        "it would take the held-out text's place in the report"
    )


@pytest.mark.usefixtures("quick_reports")
def test_train_needs_nothing_but_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From an empty folder, without arguments but for the size."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    sizes = ["max_length=128", "num_train_samples=96", "num_eval_samples=32", "num_calibration_samples=64"]
    arguments = [word for size in sizes for word in ("--set", f"data.{size}")]
    assert main(["--quiet", "train", *arguments, "--set", "training.num_train_steps=2"]) == 0
    report = json.loads(Path("outputs/evaluation_report.json").read_text())
    assert report["model_config"]["base_model"] == "builtin:tiny"
    corpora = report["evaluations"]["corpora"]
    assert list(corpora) == ["self", "builtin:python-docs"]
    assert corpora["self"]["perplexity"]["perplexity_ratio"] <= 1.005
    assert corpora["self"]["divergence"]["mean_kl"] <= 0.005
    assert corpora["builtin:python-docs"]["divergence"]["mean_kl"] <= 0.02
    assert all(outcome["met"] for outcome in report["expected_outcomes"].values())


@pytest.mark.usefixtures("quick_reports")
def test_training_on_python_docs_holds_a_part_out(tmp_path: Path) -> None:
    overrides = {
        "data.dataset_name": "builtin:python-docs", "data.num_train_samples": 64, "data.num_eval_samples": 16,
        "data.num_calibration_samples": 16, "data.max_length": 128, "training.num_train_steps": 0,
        "paths.output_dir": tmp_path / "o", "paths.checkpoint_dir": tmp_path / "c",
    }  # fmt: skip
    assert main(["--quiet", "train", *(w for k, v in overrides.items() for w in ("--set", f"{k}={v}"))]) == 0
    corpora = json.loads((tmp_path / "o" / "evaluation_report.json").read_text())["evaluations"]["corpora"]
    assert list(corpora) == ["builtin:python-docs"] and corpora["builtin:python-docs"]["tokens"] < 16 * 128


@pytest.mark.slow
def test_the_training_script_gives_the_same_weights_again(tmp_path: Path) -> None:
    """A few steps, from its seed, twice; the shipped model plays the teacher."""
    digests = []
    for attempt in ("first", "second"):
        out = tmp_path / attempt / "model"
        command = [
            sys.executable, str(REPOSITORY / "scripts" / "train_builtin.py"), "--teacher", str(TINY), "--out", str(out),
            "--work", str(tmp_path / attempt / "work"), "--megabytes", "0.01", "--story-batch", "24", "--steps", "3",
            "--batch", "2",
        ]  # fmt: skip
        result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        digests.append(hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest())
        card = (out / "README.md").read_text("utf-8")
        assert digests[-1] in card and "held-out perplexity" in card
    assert digests[0] == digests[1]


@pytest.mark.slow
def test_the_wheel_is_small_and_works_alone(tmp_path: Path) -> None:
    """Built, unpacked into an empty folder and run from another one, against the installed dependencies."""
    build = [sys.executable, "-m", "pip", "wheel", str(REPOSITORY), "--no-deps", "--wheel-dir", str(tmp_path)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("npt-*.whl")
    assert wheel.stat().st_size < 12_000_000
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--no-deps", "--target", str(tmp_path / "site"), str(wheel)],
        check=True, capture_output=True,
    )  # fmt: skip
    (tmp_path / "empty").mkdir()
    code = f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r}); import npt; from npt.cli import main; "
    arguments = ["train", "--set", "training.num_train_steps=20", "--set", "data.num_eval_samples=32"]
    result = subprocess.run(
        [sys.executable, "-c", f"{code}print(npt.__file__); sys.exit(main({arguments!r}))"],
        cwd=tmp_path / "empty", capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0 and str(tmp_path / "site") in result.stdout, result.stderr
    assert (tmp_path / "empty" / "checkpoints" / "best_model" / "adapter_model.safetensors").is_file()
