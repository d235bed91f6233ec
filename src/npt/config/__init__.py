"""The run configuration: its sections, and how a YAML file with overrides becomes one."""

from npt.config.load import given_keys, load_config, option_problems, save_config, with_overrides
from npt.config.quick import QUICK, left_out, shortened
from npt.config.sections import (
    DataSection,
    FinetuningSection,
    ModelSection,
    OptimizationSection,
    PathsSection,
    RunConfig,
    TrainingSection,
    WandbSection,
    known_keys,
)

__all__ = [
    "QUICK",
    "DataSection",
    "FinetuningSection",
    "ModelSection",
    "OptimizationSection",
    "PathsSection",
    "RunConfig",
    "TrainingSection",
    "WandbSection",
    "given_keys",
    "known_keys",
    "left_out",
    "load_config",
    "option_problems",
    "save_config",
    "shortened",
    "with_overrides",
]
