"""The settings of a command that loads an adapter: the adapter's own record, below those that a person gives."""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from npt.adapters.folder import CONFIG, RUN_CONFIG, find_adapter
from npt.builtin import PREFIX, recorded_name
from npt.common.display import one_line
from npt.config import RunConfig, given_keys, load_config, with_overrides
from npt.errors import CheckpointError, ConfigError
from npt.tuner.config import OPTIONS

logger = logging.getLogger(__name__)

BASE = "model.base_model_name"
#: The sections that an adapter's record gives settings of.
SECTIONS = ("model", "data", "training", "optimization")
#: Keys never taken from a record: they let code run or skip a check, belong to one launch, or name services.
NOT_TAKEN = ("model.trust_remote_code", "model.allow_other_base", "optimization.fsdp", "training.report_to")
#: Keys that name text. Whoever gives one of the first four names other text, and the record's names no longer hold.
TEXT_KEYS = ("data.dataset_name", "data.dataset_config", "data.data_files", "data.streaming")
TEXT_BESIDE = (*TEXT_KEYS, "data.calibration_files", "data.eval_texts", "data.text_column", "data.score")


def load_settings(
    checkpoint: str | Path,
    path: str | Path | None = None,
    overrides: Sequence[str] = (),
    sections: Collection[str] = SECTIONS,
) -> RunConfig:
    """The configuration for a command that loads the adapter at `checkpoint`; logs what its folder decided.

    The base is the one that adapter_config.json names, unless the file or an override names one. Without a file,
    other keys of `sections` that no override gives are those of npt_run.yaml beside it, where there is one.

    Args:
        path, overrides: as `load_config` takes them.

    Raises:
        CheckpointError: no adapter, a record that can't be read, or a base that nothing names or that is not there.
        ConfigError: as `load_config`.
    """
    folder = find_adapter(checkpoint)
    given = given_keys(path, overrides)
    record = {} if path is not None else _record(folder, sections, given)
    if BASE not in given:
        record[BASE] = base_named(folder, record.get(BASE))
    taken = {key: value for key, value in record.items() if key not in given}
    config = load_config(path, overrides, below=taken)
    if told := [f"{key}={value}" for key, value in taken.items() if _decides(key, value)]:
        logger.info("from %s: %s", folder, one_line(", ".join(told)))
    return config


def _decides(key: str, value: Any) -> bool:
    """True for what a person should be told of: the base, and what is not as it would be without the record.

    Options of the adapter are no news: its own file decides them, whatever is configured.
    """
    section, name = key.split(".")
    own = section == "model" and name in OPTIONS
    return key == BASE or not (own or value == getattr(getattr(RunConfig(), section), name))


def as_recorded(config: RunConfig) -> RunConfig:
    """The configuration as an adapter's folder keeps it: places of base and text mean the same from any working directory."""

    def placed(names: list[str] | None) -> list[str] | None:
        return names and [name if name.startswith(PREFIX) else str(Path(name).absolute()) for name in names]

    files = ("data_files", "calibration_files", "eval_texts")
    changes: dict[str, Any] = {f"data.{name}": placed(getattr(config.data, name)) for name in files}
    changes["finetuning.adapter"] = config.finetuning.adapter and str(Path(config.finetuning.adapter).absolute())
    return with_overrides(config, {**changes, BASE: recorded_name(config.model.base_model_name)})


def _record(folder: Path, sections: Collection[str], given: Collection[str]) -> dict[str, Any]:
    """{section.key: value} of npt_run.yaml, as far as they are to be taken."""
    path = folder / RUN_CONFIG
    if not path.is_file():
        return {}
    try:
        values = load_config(path).model_dump()
    except ConfigError as error:
        raise CheckpointError(
            f"checkpoint {folder}: {one_line(error, 300).removeprefix('--config ')}: a record of npt that this one can't "
            "use; give --config FILE, which is read instead of it"
        ) from error
    left_out = {*NOT_TAKEN, *(TEXT_BESIDE if set(TEXT_KEYS) & set(given) else ())}
    keys = {f"{section}.{key}": value for section in sections for key, value in values[section].items()}
    return {key: value for key, value in keys.items() if key not in left_out}


def base_named(folder: Path, recorded: str | None = None) -> str:
    """The base's name by the file of the adapter in a folder, else by the record of its run.

    Raises:
        CheckpointError: neither names one, or it is not there any more.
    """
    name = json.loads((folder / CONFIG).read_text(encoding="utf-8")).get("base_model_name_or_path") or recorded
    remedy = f"name it: --set {BASE}=FOLDER_OR_HUB_ID"
    if not name:
        raise CheckpointError(f"checkpoint {folder}: {CONFIG} does not say which base it was made for; {remedy}")
    if Path(name).is_absolute() and not Path(name).exists():
        raise CheckpointError(
            f"checkpoint {folder}: made for the base {one_line(name, 200)}, which is not there any more; {remedy}"
        )
    return str(name)
