"""The keys of `npt finetune`: its own defaults, and which keys contradict it or are another command's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from npt.common.options import is_calibrated
from npt.config.sections import FinetuningSection, RunConfig, TrainingSection
from npt.errors import ConfigError

#: {"section.key": value} that hold in `npt finetune` where neither a file nor an override says anything.
FINETUNE: dict[str, Any] = {
    "model.gain": "denominator",
    "model.key": "learned",
    "training.calibrate": False,
    "data.dataset_name": "text",
    "data.num_train_samples": None,
    "data.num_eval_samples": 64,
}
#: Keys of `training` that only an equivalence training reads.
_OF_EQUIVALENCE = ("objective", "regularizer", "equivalence_weight", "regularization_weight", "teacher_top_k")
_PROJECTIONS = {"gate", "up", "down"}


def check_finetuning(config: RunConfig) -> None:
    """Checks a configuration for `npt finetune`, apart from the adapter that it starts from.

    Raises:
        ConfigError: every problem in one message.
    """
    if problems := list(_problems(config)):
        raise ConfigError("; ".join(problems))


def check_no_finetuning(config: RunConfig) -> None:
    """Checks that a configuration of an equivalence training gives no key of `finetuning`, which would do nothing there.

    Raises:
        ConfigError: it does.
    """
    own, default = config.finetuning, FinetuningSection()
    given = [name for name in type(own).model_fields if getattr(own, name) != getattr(default, name)]
    if given:
        raise ConfigError(f"finetuning.{given[0]}={getattr(own, given[0])}: is for `npt finetune`; take it out")


def _problems(config: RunConfig) -> Iterator[str]:
    data, training, model = config.data, config.training, config.model
    if data.dataset_name == "self":
        yield (
            "data.dataset_name=self: the original's own text has nothing new to learn; name text with "
            "data.dataset_name=text and data.data_files=[FILE], or a hub data set"
        )
    for name in _OF_EQUIVALENCE:
        value, default = getattr(training, name), getattr(TrainingSection(), name)
        if value != default:
            yield f"training.{name}={value}: is for `npt train`; leave it at {default}"
    if config.paths.teacher_cache is not None:
        yield f"paths.teacher_cache={config.paths.teacher_cache}: is for `npt train`; take it out"
    if data.calibration_files:
        yield "data.calibration_files: nothing is calibrated here; take it out"
    if training.num_train_steps == 0:
        yield "training.num_train_steps=0: trains nothing; give a number of steps, or null for num_epochs"
    if config.finetuning.adapter is not None:
        return
    if model.rank == 0:
        yield "model.rank=0: the low-rank part is what is trained; use a rank above 0"
    if is_calibrated(model.carry, model.gain) or model.carry == "exact":
        yield (
            f"model.gain={model.gain} with model.carry={model.carry}: does not start as the original; use "
            "model.gain=denominator and model.carry=diagonal, or name a trained adapter in finetuning.adapter"
        )
    if missing := sorted(_PROJECTIONS - set(model.target_projections)):
        yield (
            f"model.target_projections: without {', '.join(missing)} the model does not start as the original; use "
            "[gate, up, down], or name a trained adapter in finetuning.adapter"
        )
