"""Options, defaults and allowed values are the same wherever a person meets them; the shipped files hold what they say."""

from __future__ import annotations

import re
from dataclasses import fields
from typing import Any, Literal, get_args, get_origin

import pytest
import yaml

from npt.block.spec import ComponentSpec
from npt.common.options import ALLOWED, DEFAULTS, OPTIONS, PROJECTIONS
from npt.config import RunConfig, known_keys, load_config
from npt.config.sections import SECTIONS
from npt.tuner.config import NPTConfig
from tests.helpers import REPOSITORY

#: What the smaller files change, as {key: value}; everything else is a default.
SMALL = {
    "model.base_model_name": "gpt2",
    "training.batch_size": 8,
    "training.gradient_accumulation_steps": 2,
    "data.dataset_name": "Salesforce/wikitext",
    "data.dataset_config": "wikitext-2-raw-v1",
}
OPTIMIZED = {
    "model.base_model_name": "meta-llama/Llama-2-7b-hf",
    "model.dtype": "bfloat16",
    "training.batch_size": 1,
    "training.gradient_accumulation_steps": 16,
    "training.objective": "local",
    "training.gradient_checkpointing": True,
    "optimization.use_cpu_offload": True,
    "optimization.mixed_precision": "bf16",
}
FINETUNED = {
    "model.base_model_name": "builtin:smollm2-135m",
    "model.npt_layers": "all",
    "model.gain": "denominator",
    "model.key": "learned",
    "training.batch_size": 8,
    "training.num_epochs": 2.0,
    "training.calibrate": False,
    "data.dataset_name": "text",
    "data.data_files": ["chats.jsonl"],
    "data.score": "replies",
    "data.num_train_samples": None,
    "data.num_eval_samples": 64,
    "finetuning.anchor_weight": 0.1,
    "finetuning.compare": ["lora"],
}


def test_names_and_defaults_are_those_of_every_class() -> None:
    model, adapter = RunConfig().model, NPTConfig()
    spec = {field.name: field.default for field in fields(ComponentSpec)}
    for name in OPTIONS:
        default = getattr(DEFAULTS, name)
        default = list(default) if isinstance(default, tuple) else default
        assert getattr(model, name) == getattr(adapter, name) == default, name
    for name in set(OPTIONS) - {"npt_layers", "target_projections"}:
        assert spec[name] == getattr(DEFAULTS, name), name
    assert spec["projections"] == DEFAULTS.target_projections == PROJECTIONS


@pytest.mark.parametrize("name", sorted(ALLOWED))
def test_every_allowed_value_is_taken_and_no_other(name: str) -> None:
    for value in ALLOWED[name]:
        options = {name: value, "target_projections": ["gate", "up"]}
        assert getattr(NPTConfig(**options), name) == value
        assert getattr(load_config(None, [f"model.{k}={v}" for k, v in options.items()]).model, name) == value
    with pytest.raises(ValueError, match=f"{name}='other': use one of {', '.join(ALLOWED[name])}"):
        NPTConfig(**{name: "other"})
    with pytest.raises(ValueError, match=rf'model\.{name}: "other": use {expected(ALLOWED[name])}'):
        load_config(None, [f"model.{name}=other"])


def expected(values: tuple[str, ...]) -> str:
    """As pydantic lists them."""
    quoted = [f"'{value}'" for value in values]
    return f"{', '.join(quoted[:-1])} or {quoted[-1]}"


def test_sections_and_their_keys_are_those_of_config_yaml() -> None:
    values = yaml.safe_load((REPOSITORY / "config.yaml").read_text())
    assert list(values) == list(SECTIONS) == list(RunConfig.model_fields)
    assert {f"{section}.{key}" for section, keys in values.items() for key in keys} == set(known_keys())
    assert load_config(REPOSITORY / "config.yaml") == RunConfig()


def literals() -> dict[str, tuple[Any, ...]]:
    """{"section.key": its values} of the keys that take one of a few words."""
    found = {name: section.model_fields[name.partition(".")[2]].annotation for name, section in known_keys().items()}
    return {name: get_args(kind) for name, kind in found.items() if get_origin(kind) is Literal}


@pytest.mark.parametrize("name", sorted(literals()))
def test_comments_of_config_yaml_list_the_allowed_values(name: str) -> None:
    section, _, key = name.partition(".")
    text = (REPOSITORY / "config.yaml").read_text().partition(f"\n{section}:\n")[2]
    comment = re.search(rf"^  {key}: [^#\n]*#(.*)$", text, re.MULTILINE)
    assert comment is not None
    named = [word.strip() for word in re.sub(r"\(.*?\)", "", comment[1]).split(",")]
    assert sorted(named) == sorted(literals()[name])


@pytest.mark.parametrize(
    ("name", "changes"),
    [("config_small.yaml", SMALL), ("config_optimized.yaml", OPTIMIZED), ("config_finetune.yaml", FINETUNED)],
)
def test_smaller_files_hold_what_differs_and_nothing_else(name: str, changes: dict[str, Any]) -> None:
    written = yaml.safe_load((REPOSITORY / name).read_text())
    assert {f"{section}.{key}": value for section, keys in written.items() for key, value in keys.items()} == changes
    resolved, default = load_config(REPOSITORY / name).model_dump(), RunConfig().model_dump()
    for key in known_keys():
        section, _, leaf = key.partition(".")
        assert resolved[section][leaf] == changes.get(key, default[section][leaf]), key
        assert key not in changes or changes[key] != default[section][leaf], key
