"""Configuration files and overrides report every problem at once, each with key, value and remedy."""

from __future__ import annotations

from pathlib import Path

import pytest

from npt.config import RunConfig, known_keys, load_config, save_config
from npt.errors import ConfigError
from npt.tuner.config import OPTIONS, NPTConfig
from tests.helpers import REPOSITORY

ORIGINAL_KEYS = """
model: base_model_name npt_layers rank modulation_scale
training: batch_size gradient_accumulation_steps learning_rate num_epochs warmup_steps weight_decay max_grad_norm
 equivalence_weight regularization_weight logging_steps prediction_logging_steps eval_steps save_steps
data: dataset_name dataset_config max_length num_train_samples num_eval_samples
wandb: enabled project entity tags
optimization: use_cpu_offload use_8bit use_4bit mixed_precision
paths: output_dir cache_dir checkpoint_dir
"""


def test_all_keys_of_the_original_description_exist() -> None:
    section = ""
    for word in ORIGINAL_KEYS.split():
        if word.endswith(":"):
            section = word[:-1]
        else:
            assert f"{section}.{word}" in known_keys()


@pytest.mark.parametrize("name", ["config.yaml", "config_small.yaml", "config_optimized.yaml", "config_finetune.yaml"])
def test_shipped_files_load_and_keep_the_fixed_values(name: str) -> None:
    config = load_config(REPOSITORY / name)
    assert not config.wandb.enabled
    assert (config.paths.output_dir, config.paths.checkpoint_dir) == ("outputs", "checkpoints")


def test_defaults_are_those_of_the_adapter_and_of_config_yaml() -> None:
    model, adapter = RunConfig().model, NPTConfig()
    assert OPTIONS == (
        "npt_layers",
        "rank",
        "modulation_scale",
        "key",
        "carry",
        "gain",
        "gain_units",
        "low_rank_at",
        "target_projections",
    )
    for name in OPTIONS:
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
            "data.dataset_name=text",
            "data.data_files=[a.txt]",
            "wandb.tags=[x, y]",
        ],
    )
    assert config.training.learning_rate == 1e-4 and config.training.num_train_steps == 0
    assert (
        config.model.npt_layers == [2, -1] and config.data.data_files == ["a.txt"] and config.wandb.tags == ["x", "y"]
    )


def test_one_file_need_not_be_a_list() -> None:
    config = load_config(None, ["data.dataset_name=text", "data.data_files=a.txt", "data.calibration_files=b.txt"])
    assert config.data.data_files == ["a.txt"] and config.data.calibration_files == ["b.txt"]


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
        (
            "model.npt_layers=middle",
            'model.npt_layers: "middle": use upper_half, lower_half, all, auto, auto:N, or a list',
        ),
        ("model.npt_layers=[]", "model.npt_layers: []: use upper_half"),
        ("model.npt_layers=[1, 1]", "model.npt_layers: [1, 1]: names an entry twice"),
        ("model.gain=loud", "model.gain: \"loud\": use 'none', 'norm', 'overlap', 'state' or 'denominator'"),
        ("model.target_projections=[side]", "model.target_projections: \"side\": use 'gate', 'up' or 'down'"),
        ("model.key=tied", "set model.target_projections=[gate, up] or model.key=input"),
        ("training.learning_rate=.nan", "training.learning_rate: NaN: use a finite number"),
        ("training.learning_rate=fast", 'training.learning_rate: "fast": use auto or a number above 0'),
        ("training.learning_rate=0", "training.learning_rate: 0: use a value above 0"),
        ("training.batch_size=0", "training.batch_size: 0: use a value of 1 or more"),
        ("training.objective=magic", "training.objective: \"magic\": use 'auto', 'local', 'logits' or 'composite'"),
        ("optimization.mixed_precision=true", "optimization.mixed_precision: true: use 'no', 'fp16' or 'bf16'"),
        ("data.dataset_name=text", "set data.data_files=[FILE, ...]"),
        # A bare `yes` is a boolean in YAML 1.1, as a bare `no` is, which is taken for the word.
        (
            "optimization.mixed_precision=yes",
            "optimization.mixed_precision: true: use 'no', 'fp16' or 'bf16', in quotes",
        ),
        ("data.data_files=3", "data.data_files: 3: use a list"),
        ("data.num_train_samples=null", "data.num_train_samples: null has no end with data.dataset_name=self"),
        ("model.target_projections=[]", "model.target_projections: []: use at least 1 entry"),
        ("model.target_projections=[up, up]", 'model.target_projections: ["up", "up"]: names an entry twice'),
        ("model.npt_layers=[true]", "model.npt_layers: [true]: use upper_half"),
        ("model.rank='16'", 'model.rank: "16": use a whole number'),
        ("training.learning_rate=.inf", "training.learning_rate: Infinity: use a finite number"),
        ("training.learning_rate=inf", 'training.learning_rate: "inf": use auto or a number above 0'),
        ("training.learning_rate=true", "training.learning_rate: true: use a number"),
        ("training.num_train_steps=-1", "training.num_train_steps: -1: use a value of 0 or more"),
        ("training.seed=4294967296", "training.seed: 4294967296: use a value below 4294967296"),
        ("paths.output_dir=", "paths.output_dir: null: use text"),
        ("paths.output_dir=''", 'paths.output_dir: "": must not be empty'),
        ("data.max_length=1", "data.max_length: 1: use a value of 2 or more"),
        ("wandb.enabled=1", "wandb.enabled: 1: use true or false"),
        ("rank=3", "rank: unknown key; did you mean model.rank?"),
        ("training.learning_rat=1", "training.learning_rat: unknown key; did you mean training.learning_rate?"),
        ("model.zzz=1", "model.zzz: unknown key; remove it (the sections are model, training, data"),
        ("training.warmup.steps=1", "training.warmup.steps: unknown key"),
        ("training=1", "training is a section; write training.key=value"),
        ("model.rank", "write section.key=value"),
        ("model.rank=[", "the value is not YAML"),
        ("model.rank={a: 1, a: 2}", "'a' stands twice"),
        ("wandb.project=2020-13-45", "the value is not YAML"),
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


def test_a_wrong_value_does_not_hide_what_contradicts_beside_it() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, ["model.rank=-1", "model.key=tied", "training.seed=x", "data.dataset_name=text"])
    for words in ("model.rank: -1", 'model.key: "tied" can\'t target down', "training.seed", "set data.data_files="):
        assert str(caught.value).count(words) == 1
    # What depends on the wrong value itself waits until that is right.
    with pytest.raises(ConfigError) as caught:
        load_config(None, ["data.dataset_name=text", "data.data_files=3"])
    assert "use a list" in str(caught.value) and "needs files" not in str(caught.value)


def test_8_bit_and_offload_exclude_each_other() -> None:
    switches = ["optimization.use_8bit=true", "optimization.use_cpu_offload=true"]
    for switch in switches:
        load_config(None, [switch])
    with pytest.raises(ConfigError, match=r"optimization\.use_8bit: true can't .* set one of them to false"):
        load_config(None, switches)


def test_tied_key_is_allowed_where_nothing_reads_it_or_down_is_left_out() -> None:
    for extra in ("model.target_projections=[gate]", "model.rank=0", "model.carry=exact"):
        assert load_config(None, ["model.key=tied", extra]).model.key == "tied"


def test_files_take_defaults_exponents_anchors_and_overrides(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("model:\n  # rank: 3\ntraining: {learning_rate: 1e-3, batch_size: 4}\n")
    config = load_config(path, ["training.batch_size=2", "model.rank=5"])
    assert (config.training.learning_rate, config.training.batch_size, config.model.rank) == (1e-3, 2, 5)
    assert config.data == RunConfig().data
    path.write_text("")
    assert load_config(path) == RunConfig()
    path.write_text("training: {<<: &all {seed: 3}, seed: 4}\nmodel: {rank: 7}\n")
    assert load_config(path).training.seed == 4


def test_an_override_mends_a_wrong_value_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("model: {rank: many}\n")
    assert load_config(path, ["model.rank=2"]).model.rank == 2


@pytest.mark.parametrize(
    "text,words",
    [
        ("model: {rank: 1}\nmodel: {rank: 2}\n", "'model' stands twice"),
        ("model:\n  rank: 1\n  rank: 2\n", "'rank' stands twice"),
        ("- a\n", "expected sections"),
        ("model: [1]\n", r"model: \[1\]: not a section; write `model:`"),
        ("model: 3\nlearning_rate: 1\n", r"learning_rate: unknown key; did you mean training\.learning_rate"),
        ("wandb: {project: 2020-13-45}\n", "not readable as YAML"),
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
