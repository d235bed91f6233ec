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
        ("model.rnak=3", "model.rnak: unknown key; did you mean model.rank?"),
        ("model.learning_rate=3", "did you mean training.learning_rate?"),
        ("modle.rank=3", "modle: unknown key; did you mean model?"),
        ("model.rank=-1", "model.rank: -1: use a value of 0 or more"),
        ("model.rank=true", "model.rank: true: use a whole number"),
        ("model.rank=2.5", "model.rank: 2.5: use a whole number"),
        ("model.npt_layers=middle", 'model.npt_layers: "middle": use upper_half, lower_half, all, or a list'),
        ("model.npt_layers=[]", "model.npt_layers: []: use upper_half"),
        ("model.npt_layers=[1, 1]", "model.npt_layers: [1, 1]: names an entry twice"),
        ("model.gain=loud", "model.gain: \"loud\": use 'none', 'norm', 'overlap' or 'state'"),
        ("model.target_projections=[side]", "model.target_projections: \"side\": use 'gate', 'up' or 'down'"),
        ("model.key=tied", "set model.target_projections=[gate, up] or model.key=input"),
        ("training.learning_rate=.nan", "training.learning_rate: NaN: use a finite number"),
        ("training.learning_rate=fast", 'training.learning_rate: "fast": use a number'),
        ("training.learning_rate=0", "training.learning_rate: 0: use a value above 0"),
        ("training.batch_size=0", "training.batch_size: 0: use a value of 1 or more"),
        ("training.objective=magic", "training.objective: \"magic\": use 'auto', 'local', 'logits' or 'composite'"),
        ("optimization.mixed_precision=true", "optimization.mixed_precision: true: use 'no', 'fp16' or 'bf16'"),
        ("data.dataset_name=text", "set data.data_files=[FILE, ...]"),
        ("data.max_length=1", "data.max_length: 1: use a value of 2 or more"),
        ("wandb.enabled=1", "wandb.enabled: 1: use true or false"),
        ("rank=3", "rank: unknown key; did you mean model.rank?"),
        ("model.rank", "write section.key=value"),
        ("model.rank=[", "the value is not YAML"),
    ],
)
def test_bad_overrides(override: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, [override])
    assert words in str(caught.value) and "\n" not in str(caught.value)


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
        'data.max_length: "x"',
        'wandb.enabled: "maybe"',
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
