"""Configuration files and overrides: every problem at once, each with key, value and remedy."""

from __future__ import annotations

from pathlib import Path

import pytest

from npt.config import RunConfig, known_keys, load_config, save_config
from npt.errors import ConfigError
from npt.tuner import NPTConfig
from tests.conftest import REPOSITORY

ORIGINAL_KEYS = """
model: base_model_name npt_layers rank modulation_scale
training: batch_size gradient_accumulation_steps learning_rate num_epochs warmup_steps weight_decay max_grad_norm
 equivalence_weight regularization_weight logging_steps prediction_logging_steps eval_steps save_steps
data: dataset_name dataset_config max_length num_train_samples num_eval_samples
wandb: enabled project entity tags
optimization: use_cpu_offload use_8bit mixed_precision
paths: output_dir cache_dir checkpoint_dir
"""


def test_all_keys_of_the_original_description_exist() -> None:
    section = ""
    for word in ORIGINAL_KEYS.split():
        if word.endswith(":"):
            section = word[:-1]
        else:
            assert f"{section}.{word}" in known_keys()


@pytest.mark.parametrize("name", ["config.yaml", "config_small.yaml", "config_optimized.yaml"])
def test_shipped_files_load_and_keep_the_fixed_values(name: str) -> None:
    config = load_config(REPOSITORY / name)
    assert not config.wandb.enabled
    assert (config.paths.output_dir, config.paths.checkpoint_dir) == ("outputs", "checkpoints")


def test_defaults_are_those_of_the_adapter_and_of_config_yaml() -> None:
    model, adapter = RunConfig().model, NPTConfig()
    for name in ("npt_layers", "rank", "modulation_scale", "key", "carry", "gain", "low_rank_at", "target_projections"):
        assert getattr(model, name) == getattr(adapter, name), name
    assert load_config(REPOSITORY / "config.yaml") == RunConfig()


def test_overrides_are_yaml_and_the_last_wins() -> None:
    config = load_config(
        None,
        [
            "training.learning_rate=1e-4",
            "training.num_train_steps=5",
            "training.num_train_steps=0",
            "model.npt_layers=[2, -1]",
            "data.data_files=[a.txt]",
            "wandb.tags=[x, y]",
        ],
    )
    assert config.training.learning_rate == 1e-4 and config.training.num_train_steps == 0
    assert (
        config.model.npt_layers == [2, -1] and config.data.data_files == ["a.txt"] and config.wandb.tags == ["x", "y"]
    )


def test_saved_configuration_is_read_back(tmp_path: Path) -> None:
    config = load_config(None, ["model.rank=3", "training.learning_rate=3e-5", "model.npt_layers=[0]"])
    save_config(config, tmp_path / "c.yaml")
    assert load_config(tmp_path / "c.yaml") == config


@pytest.mark.parametrize(
    "override,words",
    [
        ("model.rnak=3", r"model\.rnak: unknown key; did you mean model\.rank\?"),
        ("model.learning_rate=3", r"did you mean training\.learning_rate\?"),
        ("modle.rank=3", r"modle: unknown key; did you mean model\?"),
        ("model.rank=-1", r"model\.rank: -1: .*greater than or equal to 0"),
        ("model.rank=true", r"model\.rank: True: .*integer"),
        ("model.rank=2.5", r"model\.rank: 2\.5: .*integer"),
        ("model.npt_layers=middle", r"model\.npt_layers: 'middle': .*'upper_half'"),
        ("model.npt_layers=[]", r"model\.npt_layers: \[\]: .*at least 1"),
        ("model.npt_layers=[1, 1]", "names an entry twice"),
        ("model.gain=loud", r"model\.gain: 'loud': .*'overlap' or 'state'"),
        ("model.target_projections=[side]", r"model\.target_projections: 'side'"),
        ("model.key=tied", r"target_projections=\[gate, up\]"),
        ("training.learning_rate=.nan", r"training\.learning_rate: nan: .*finite"),
        ("training.learning_rate=fast", r"training\.learning_rate: 'fast': .*number"),
        ("training.learning_rate=0", r"training\.learning_rate: 0: .*greater than 0"),
        ("training.batch_size=0", r"training\.batch_size: 0"),
        ("training.objective=magic", r"training\.objective: 'magic'"),
        ("optimization.mixed_precision=true", r"optimization\.mixed_precision: True: .*'no', 'fp16' or 'bf16'"),
        ("data.dataset_name=text", r"data\.data_files=\[FILE"),
        ("data.max_length=1", r"data\.max_length: 1"),
        ("wandb.enabled=1", r"wandb\.enabled: 1"),
        ("rank=3", r"write section\.key=value"),
        ("model.rank", r"write section\.key=value"),
        ("model.rank=[", "the value is not YAML"),
    ],
)
def test_bad_overrides(override: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        load_config(None, [override])
    assert "\n" not in str(caught.value)


def test_all_problems_are_reported_at_once(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("model: {rank: -2, colour: red}\ntraning: {}\ndata: {max_length: x}\n")
    with pytest.raises(ConfigError) as caught:
        load_config(path, ["wandb.enabled=maybe"])
    for words in (
        str(path),
        "model.rank: -2",
        "model.colour",
        "traning",
        "data.max_length: 'x'",
        "wandb.enabled: 'maybe'",
    ):
        assert words in str(caught.value)


@pytest.mark.parametrize(
    "text,words",
    [
        ("model: {rank: 1}\nmodel: {rank: 2}\n", "'model' stands twice"),
        ("model:\n  rank: 1\n  rank: 2\n", "'rank' stands twice"),
        ("- a\n", "expected sections"),
        ("model: [1]\n", "model"),
        ("model: {rank: 1\n", "not readable as YAML"),
        ("model: !!python/object:os.system {}\n", "not readable as YAML"),
        ("1: 2\n", "is not text"),
    ],
)
def test_bad_files(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words):
        load_config(path)


def test_missing_file() -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: no such file"):
        load_config("nowhere.yaml")
