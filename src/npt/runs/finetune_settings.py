"""The settings of `npt finetune`, with those that the adapter it starts from decides."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from npt.adapters.folder import CONFIG, WEIGHTS, find_adapter
from npt.adapters.settings import BASE, base_named
from npt.common.options import OPTIONS
from npt.config import RunConfig, given_keys, load_config, with_overrides
from npt.config.finetuning import FINETUNE, check_finetuning
from npt.errors import ConfigError


def finetune_settings(path: str | Path | None, overrides: Sequence[str] = ()) -> RunConfig:
    """The configuration of a fine-tuning from a file and overrides, below which `FINETUNE` holds.

    With `finetuning.adapter`, the adapter's own file decides the options of its blocks, and the base, unless one is given.

    Raises:
        ConfigError: as `load_config`; keys that contradict fine-tuning, or the adapter.
        CheckpointError: the adapter is missing or damaged.
    """
    config = load_config(path, overrides, below=FINETUNE)
    if config.finetuning.adapter is not None:
        config = _with_adapter(config, given_keys(path, overrides))
    check_finetuning(config)
    return config


def _with_adapter(config: RunConfig, given: Collection[str]) -> RunConfig:
    """The configuration with the options of `finetuning.adapter`.

    Raises:
        ConfigError: an option that is given is another than the adapter's, or it has no low-rank part.
    """
    named = config.finetuning.adapter
    assert named is not None
    folder = find_adapter(named)
    values = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    options: dict[str, Any] = {f"model.{name}": values[name] for name in OPTIONS if name in values}
    if values.get("rank", 1) == 0 or values.get("carry") == "exact":
        raise ConfigError(
            f"finetuning.adapter={named}: has no low-rank part, which is what is trained; name one with a rank above 0"
        )
    for key, value in options.items():
        mine = getattr(config.model, key.removeprefix("model."))
        if key in given and not isinstance(mine, list) and key != "model.npt_layers" and mine != value:
            raise ConfigError(
                f"{key}={mine}: the adapter in finetuning.adapter={named} has {value}; take it out, or start without one"
            )
    if BASE not in given:
        options[BASE] = base_named(folder)
    return with_overrides(config, {**options, "training.calibrate": False})


def start_settings(config: RunConfig) -> dict[str, Any]:
    """{name: value} of what decides a fine-tuning beside the settings of any run; compared where one goes on."""
    f = config.finetuning
    digest = None if f.adapter is None else _digest(find_adapter(f.adapter) / WEIGHTS)
    samples = f.num_anchor_samples if f.anchor_weight else None
    return {"finetuning.adapter (its weights)": digest, "finetuning.num_anchor_samples": samples}


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
