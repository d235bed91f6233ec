"""`npt train --dry-run` prints the plan from config.json alone, writes nothing, and refuses what makes no sense."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, MixtralConfig

from npt.cli import main
from npt.common.display import human_bytes
from npt.config import load_config
from npt.errors import NPTError
from npt.planning.devices import planned_launch
from npt.planning.dry_run import data_lines, launch_here
from npt.planning.plan import plan_run
from tests.helpers import REPOSITORY

LLAMA = LlamaConfig(
    hidden_size=64, intermediate_size=172, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=509, max_position_embeddings=64, architectures=["LlamaForCausalLM"], dtype="bfloat16",
)  # fmt: skip
SMALL = ["data.max_length=64", "training.batch_size=2", "data.dataset_name=builtin:python-docs"]


@pytest.fixture
def shapes(tmp_path: Path, monkeypatch: Any) -> Path:
    """A folder with config.json alone: no weights, no tokenizer; and an empty working folder."""
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "RANK", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"):
        monkeypatch.delenv(name, raising=False)
    folder, here = tmp_path / "shapes", tmp_path / "here"
    LLAMA.save_pretrained(folder)
    here.mkdir()
    monkeypatch.chdir(here)
    return folder


def settings(shapes: Path, *more: str) -> list[str]:
    return [f"model.base_model_name={shapes}", *SMALL, *more]


def dry(shapes: Path, *arguments: str, more: tuple[str, ...] = ()) -> int:
    overrides = [part for setting in settings(shapes, *more) for part in ("--set", setting)]
    return main(["train", "--dry-run", *overrides, *arguments])


def test_it_prints_the_figures_of_the_plan(shapes: Path, capsys: Any) -> None:
    more = (
        "optimization.fsdp=true", "training.objective=local", "training.num_train_steps=50", "data.streaming=true",
        "data.dataset_name=some/text",
    )  # fmt: skip
    assert dry(shapes, "--processes", "4", "--nodes", "2", "--device", "a100-80gb", more=more) == 0
    shown = capsys.readouterr().out
    plan = plan_run(load_config(None, settings(shapes, *more)), None, 4)
    for text in (
        "converted blocks: 2 and 3 (2 of 4)",
        "new parameters: 14,980",
        "strategy: FSDP2, world size 4 on 2 nodes",
        f"base {human_bytes(plan.spread.base)}, adapter {human_bytes(4 * plan.spread.own)}",
        f"optimizer {human_bytes(plan.optimizer)}",
        "shard plan over 4 processes",
        "block 0 to 1, each",
        f"predicted peak {human_bytes(plan.peak)} fits a100-80gb: 74.51 GiB",
        "data: some/text, streamed, 512 blocks of 64 tokens",
        "then local",
        "x 4 processes = 512 tokens",
        "assumed: 40 % of a100-80gb's 312 TFLOP/s",
    ):
        assert text in shown, text
    largest = max(plan.spread.units, key=lambda unit: unit.full)
    assert any("largest" in line and human_bytes(largest.full) in line for line in shown.splitlines())


def test_it_reads_no_weights_and_writes_nothing(shapes: Path, capsys: Any) -> None:
    before = sorted(shapes.rglob("*"))
    assert [path.name for path in before] == ["config.json"]
    assert dry(shapes) == 0
    assert "strategy: one process" in capsys.readouterr().out
    assert list(Path.cwd().rglob("*")) == [] and sorted(shapes.rglob("*")) == before


def test_what_does_not_fit_is_said(shapes: Path, capsys: Any) -> None:
    assert dry(shapes, "--limit", "1MiB") == 0
    assert "DOES NOT FIT --limit: 1.00 MiB; npt memory" in capsys.readouterr().out


def test_a_launcher_says_how_many_processes_there_are(shapes: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("WORLD_SIZE", "6")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert launch_here(None, None, None) == planned_launch(6, 2)
    assert launch_here(8, None, None) == planned_launch(8, 1)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert dry(shapes) == 0
    assert "strategy: FSDP2, world size 6 on 2 nodes" in capsys.readouterr().out
    monkeypatch.setenv("RANK", "1")
    assert dry(shapes) == 0
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "b200"], "--device b200: not known; use one of a100-80gb"),
        (["--processes", "8", "--nodes", "3"], "--nodes 3: does not divide --processes 8"),
        (["--processes", "0"], "--processes"),
        (["--limit", "plenty"], "--limit plenty: not a size"),
        (["--resume"], "--dry-run --resume: a dry run starts no run"),
        (["--set", "optimization.fsdp=true"], "optimization.fsdp=true with one process"),
        (["--set", "model.base_model_name=./no/such/folder"], "llama-2-7b, llama-3.1-8b, llama-3.1-70b"),
    ],
)
def test_bad_options_are_one_line(shapes: Path, capsys: Any, arguments: list[str], message: str) -> None:
    assert dry(shapes, *arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize("option", ["--processes", "--nodes", "--device", "--limit"])
def test_options_of_a_plan_start_no_run(option: str, capsys: Any) -> None:
    assert main(["train", option, "2"]) == 2
    assert f"{option} 2: goes with --dry-run or npt memory" in capsys.readouterr().err


def test_deepspeed_is_not_planned(shapes: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    assert dry(shapes) == 2
    assert "this is a launch of DeepSpeed, and only DDP and FSDP2 are planned" in capsys.readouterr().err


def test_the_script_passes_the_option_on(shapes: Path) -> None:
    overrides = [part for setting in settings(shapes) for part in ("--set", setting)]
    script = [sys.executable, str(REPOSITORY / "train_npt_equivalence.py"), "--dry-run", *overrides]
    done = subprocess.run(script, capture_output=True, text=True, check=True, env={**os.environ, "COLUMNS": "120"})
    assert "dry run: no weights are read" in done.stdout and list(Path.cwd().rglob("*")) == []


def test_npt_memory_plans_the_same(shapes: Path, capsys: Any) -> None:
    overrides = [part for setting in settings(shapes, "optimization.fsdp=true") for part in ("--set", setting)]
    assert main(["memory", *overrides, "--processes", "4", "--device", "h200"]) == 0
    shown = capsys.readouterr().out
    plan = plan_run(load_config(None, settings(shapes, "optimization.fsdp=true")), None, 4)
    assert human_bytes(plan.peak) in shown and human_bytes(plan.spread.gathered) in shown
    assert "FSDP2 over 4 processes" in shown and "fits: 131.32 GiB available" in shown


def test_names_of_what_is_done() -> None:
    config = load_config(None, ["training.calibrate=false", "data.num_train_samples=8"])
    lines = list(data_lines(config, 2))
    assert lines[0] == "data: self, 8 blocks of 256 tokens"
    assert lines[1] == "objective: no calibration, then local, then logits"
    with pytest.raises(NPTError, match="--nodes 2: does not divide --processes 1"):
        launch_here(1, 2, None)


def test_a_fine_tuning_is_planned_with_its_own_step(shapes: Path, capsys: Any) -> None:
    """It trains the low-rank part alone, calibrates nothing and has no figures by block."""
    overrides = [part for setting in settings(shapes, "model.rank=4") for part in ("--set", setting)]
    peaks = []
    for weight in (0.0, 0.5):
        arguments = ["--dry-run", "--set", f"finetuning.anchor_weight={weight}", "--compare", "lora"]
        assert main(["finetune", *overrides, *arguments]) == 0
        shown = capsys.readouterr().out
        trained = 2 * 4 * (4 * 64 + 172)  # A, B_in, B_down, C_in and C_down of two blocks
        assert f"of these trained, the low-rank part: {trained:,}" in shown
        assert "objective: language model, " in shown and "beside it, not planned: lora" in shown
        assert "calibration" not in shown and "evaluation: blocks" not in shown
        assert ("sampling text" in shown) == (weight > 0) and list(Path.cwd().rglob("*")) == []
        peaks.append(next(line for line in shown.splitlines() if "training step" in line))
    assert peaks[0] != peaks[1], "an anchored step needs more"


def test_a_mixture_is_planned_and_says_what_a_token_uses(shapes: Path, capsys: Any, tmp_path: Path) -> None:
    folder = tmp_path / "mixture"
    MixtralConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        num_local_experts=8, num_experts_per_tok=2, vocab_size=509, max_position_embeddings=64,
        architectures=["MixtralForCausalLM"], dtype="bfloat16",
    ).save_pretrained(folder)  # fmt: skip
    assert dry(folder, "--device", "a100-80gb") == 0
    shown = capsys.readouterr().out
    whole = 4 * 8 * 3 * 96 * 64  # gate, up and down of eight experts in four blocks, of which a token uses a quarter
    rest = 4 * (64 * 64 * 2 + 2 * 32 * 64 + 8 * 64 + 2 * 64) + 2 * 509 * 64 + 64
    assert f"{whole + rest:,} parameters in bfloat16, of which a token uses {whole // 4 + rest:,}" in shown
    assert "blocks and weight deltas" in shown and "fits a100-80gb" in shown
