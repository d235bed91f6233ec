"""The recipes load, name files that exist, and state the code's own predictions."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

from npt.config import load_config
from scripts.recipes_table import ROOT, TABLES, line, lines_of
from tests.helpers import REPOSITORY

RECIPES, README = ROOT / "recipes", ROOT / "recipes" / "README.md"
RUNS = sorted(RECIPES.glob("*.yaml"))
LAUNCHES = sorted((RECIPES / "accelerate").glob("*.yaml"))


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.name)
def test_run_configurations_load(path: Path) -> None:
    config = load_config(path)
    assert config.data.streaming and config.training.num_train_steps and config.model.dtype == "bfloat16"
    assert path.stem in {row.recipe for row in TABLES["recipes"][1]}


@pytest.mark.parametrize("path", LAUNCHES, ids=lambda path: path.name)
def test_accelerate_reads_its_configurations(path: Path) -> None:
    config = load_config_from_file(str(path))
    kind = path.name.split("_")[0]
    expected = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "deepspeed": "DEEPSPEED"}[kind]
    assert str(config.distributed_type).rpartition(".")[2] == expected and config.num_processes in (8, 16)
    if kind == "fsdp2":
        assert config.fsdp_config["fsdp_version"] == 2 and config.fsdp_config["fsdp_cpu_ram_efficient_loading"]
    if kind == "deepspeed":
        assert "ntested" in path.read_text()


def test_the_slurm_script_is_a_script() -> None:
    script = RECIPES / "slurm" / "train.sbatch"
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert "--requeue" in script.read_text() and "--resume" in script.read_text()


def test_the_readme_names_what_exists() -> None:
    named = set(re.findall(r"recipes/[\w./-]+\.(?:yaml|sbatch)", README.read_text()))
    assert named and all((REPOSITORY / name).is_file() for name in named)
    assert {f"recipes/{p.relative_to(RECIPES)}" for p in (*RUNS, *LAUNCHES)} - named <= {
        "recipes/accelerate/deepspeed_zero3.yaml"
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", TABLES)
def test_the_predictions_are_up_to_date(name: str) -> None:
    document, rows = TABLES[name]
    assert lines_of((ROOT / document).read_text(encoding="utf-8"), name) == [line(row) for row in rows]


@pytest.mark.slow
def test_the_first_prediction_is_up_to_date() -> None:
    document, rows = TABLES["recipes"]
    assert lines_of((ROOT / document).read_text(encoding="utf-8"), "recipes")[0] == line(rows[0])
