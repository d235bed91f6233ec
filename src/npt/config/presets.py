"""Configurations to start from, with their comments: those of the repository, which a wheel holds as well."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from npt.config.load import with_overrides
from npt.config.quick import QUICK
from npt.config.sections import RunConfig
from npt.errors import NPTError

_HERE = Path(__file__).resolve()
#: Where the files are: in an installed wheel, in a clone.
_FOLDERS = (_HERE.parent / "preset_files", _HERE.parents[3])
#: {preset: its file}. `quick` is the full one with the settings of `npt train --quick`.
PRESETS = {
    "full": "config.yaml",
    "small": "config_small.yaml",
    "optimized": "config_optimized.yaml",
    "finetune": "config_finetune.yaml",
    "quick": "config.yaml",
}
_HEAD = {"quick": "# With the settings of npt train --quick: calibration only, on little text, with a short report.\n"}
BASE = "model.base_model_name"


def preset_text(preset: str, base: str | None = None) -> str:
    """The YAML of a preset, comments and all.

    Args:
        preset: one of `PRESETS`. base: `model.base_model_name` in place of the preset's own.

    Raises:
        NPTError: the installation lacks the file. ConfigError: no such builtin base.
    """
    changes: dict[str, Any] = dict(QUICK) if preset == "quick" else {}
    if base is not None:
        with_overrides(RunConfig(), {BASE: base})
        changes[BASE] = base
    return _HEAD.get(preset, "") + _with_values(_file(PRESETS[preset]).read_text(encoding="utf-8"), changes)


def _file(name: str) -> Path:
    for folder in _FOLDERS:
        if (folder / name).is_file():
            return folder / name
    raise NPTError(f"{name}: is missing from {_FOLDERS[0]}; reinstall the package")


def _with_values(text: str, changes: Mapping[str, Any]) -> str:
    """A configuration's text with other values of keys that stand in it; the comment behind a base goes with the base."""
    section, lines = "", []
    for line in text.splitlines():
        if found := re.match(r"(\w+):", line):
            section = found[1]
        found = re.match(r"(  (\w+): )(\S+)(.*)", line)
        key = f"{section}.{found[2]}" if found else ""
        if found and key in changes:
            value = yaml.safe_dump(changes[key], default_flow_style=True, width=2**16, allow_unicode=True)
            rest = "" if key == BASE else found[4]
            line = found[1] + value.removesuffix("...\n").strip() + rest
        lines.append(line)
    return "\n".join(lines) + "\n"
