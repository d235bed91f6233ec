"""hatchling's hook: the wheel holds the configurations that `npt init` writes. A clone reads them where they are."""

from __future__ import annotations

from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class Configurations(BuildHookInterface):  # type: ignore[type-arg]
    """An editable installation needs no copies, which would grow old."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called before a wheel is built; `version` is "standard" or "editable"."""
        if version == "standard":
            for name in ("config.yaml", "config_small.yaml", "config_optimized.yaml", "config_finetune.yaml"):
                build_data["force_include"][name] = f"npt/config/preset_files/{name}"
