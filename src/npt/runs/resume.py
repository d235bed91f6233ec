"""The comparison of a configuration with the checkpoint that its run goes on from, as far as no weights are needed for it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from npt.block.families import resolve_layers
from npt.common.launch import world_size
from npt.common.options import OPTIONS, is_automatic
from npt.config import DataSection, RunConfig
from npt.data.sources import expand_files
from npt.equivalence.resume import objective_settings
from npt.runs.arguments import objective_schedule
from npt.runs.base_model import base_config
from npt.training.resume import argument_settings, check_options, differences, read_record, refuse, steps_missing

#: Keys that decide the text which the frozen model writes, and of those the ones that decide any text.
_OF_SAMPLED = ("data.dataset_name", "data.max_length", "data.num_train_samples")
_OF_ANY = ("data.max_length",)


def run_settings(config: RunConfig) -> dict[str, Any]:
    """{key: value} of the settings that decide a run's result and are neither the trainer's nor the text's own."""
    data, training = config.data, config.training
    found: dict[str, Any] = {
        "training.calibrate": training.calibrate,
        "data.streaming": data.streaming,
        "optimization.use_8bit": config.optimization.use_8bit,
        "optimization.use_4bit": config.optimization.use_4bit,
    }
    if is_automatic(config.model.npt_layers):
        found["model.npt_layers (as asked for)"] = config.model.npt_layers
    if training.calibrate:
        found["data.num_calibration_samples"] = data.num_calibration_samples
        found["data.calibration_files (their content)"] = content_of(data.calibration_files or ())
    if data.streaming:  # the text itself is not read before it is trained on
        for name in ("dataset_config", "text_column", "score", "shuffle_window"):
            found[f"data.{name}"] = getattr(data, name)
        found["data.data_files (their sizes)"] = sizes_of(data.data_files or ())
    return found


def text_settings(data: DataSection) -> dict[str, Any]:
    """{key: value} of the keys that choose the training text."""
    scored = ("eval_texts", "score_seen_text")
    return {f"data.{name}": value for name, value in data.model_dump().items() if name not in scored}


def content_of(files: Iterable[str]) -> str | None:
    """A digest of the bytes of files, wherever they lie; None for no file."""
    digest, paths = hashlib.sha256(), expand_files(list(files), "data.calibration_files")[0]
    for path in paths:
        with path.open("rb") as file:
            while part := file.read(2**20):
                digest.update(part)
    return digest.hexdigest()[:16] if paths else None


def sizes_of(files: Iterable[str]) -> str | None:
    """The number of files, their bytes and a digest of each one's, in their order; None for no file."""
    sizes = [path.stat().st_size for path in expand_files(list(files), "data.data_files")[0]]
    digest = hashlib.sha256(str(sizes).encode()).hexdigest()[:8]
    return f"{len(sizes)} files, {sum(sizes)} bytes, {digest}" if sizes else None


def settings_of_objectives(config: RunConfig) -> dict[str, Any]:
    """{key: value} of the settings that the objectives of an equivalence training decide."""
    top_k = None if config.paths.teacher_cache is None else config.training.teacher_top_k
    return objective_settings([objective for _, objective in objective_schedule(config.training, 1)], top_k)


def check_configuration(
    config: RunConfig, arguments: TrainingArguments, checkpoint: Path, phase: Mapping[str, Any]
) -> None:
    """Compares a configuration with a checkpoint before any weights are loaded. The base and the text are compared once they
    are read (`ObjectiveTrainer.check_resume`).

    Args:
        phase: the settings beside those of any run, by name.

    Raises:
        CheckpointError: an option of the adapter or a setting is another; fewer steps than are taken.
    """
    options = {name: getattr(config.model, name) for name in OPTIONS}
    count = getattr(base_config(config.model, config.paths.cache_dir).get_text_config(), "num_hidden_layers", None)
    if count is None or is_automatic(config.model.npt_layers):
        del options["npt_layers"]
    else:
        options["npt_layers"] = resolve_layers(config.model.npt_layers, count)
    check_options(checkpoint, options)
    record = read_record(checkpoint)
    here = {
        **argument_settings(arguments, config.optimization.mixed_precision, world_size()),
        **phase,
        **run_settings(config),
    }
    found = differences(record.get("settings") or {}, here)
    there, now = record.get("text_settings") or {}, text_settings(config.data)
    names = _OF_SAMPLED if "self" in (there.get("data.dataset_name"), config.data.dataset_name) else _OF_ANY
    found += differences(there, {name: now[name] for name in names})
    refuse(checkpoint, [*found, *steps_missing(record, config.training.num_train_steps)])
