"""A run configuration in the words of Hugging Face's Trainer: its arguments, its trackers, its objectives over the steps."""

from __future__ import annotations

import logging
import os
from typing import Any, get_args

import torch
from transformers import TrainingArguments
from transformers.integrations import get_available_reporting_integrations

from npt.common.distribution import install_extra
from npt.common.launch import check_launch
from npt.common.processes import env_flag, world
from npt.config import OptimizationSection, RunConfig, TrainingSection, with_overrides
from npt.equivalence.objectives import Objective
from npt.errors import ConfigError, NPTError
from npt.runs.base_model import base_config
from npt.runs.processes import shards_base, start_processes
from npt.training.steps import run_steps

logger = logging.getLogger(__name__)

#: Where accelerate's configuration says how many micro-batches make a step.
_ACCUMULATION = "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"
PRECISIONS: tuple[str, ...] = get_args(OptimizationSection.model_fields["mixed_precision"].annotation)
#: `training.learning_rate: auto` is the second over the hidden size, at most the first.
MOST_RATE, RATE_TIMES_SIZE = 3e-4, 0.064
#: TrainingArguments of `optimization.fsdp`; an FSDP configuration of accelerate's own decides the details itself.
FSDP_ARGUMENTS: dict[str, Any] = {"fsdp": True, "fsdp_config": {"version": 2, "reshard_after_forward": True}}


def start(config: RunConfig) -> TrainingArguments:
    """Builds the TrainingArguments; building them joins the process group.

    Raises:
        NPTError: a launch whose processes can't or don't find one another.
    """
    check_launch()
    arguments = training_arguments(config)
    start_processes(arguments)
    return arguments


def as_launched(config: RunConfig) -> RunConfig:
    """The configuration with what accelerate's own decided, so that every record of the run says how it was computed.

    Raises:
        NPTError: accelerate asks for a mixed precision npt does not have, or for another accumulation than the `training`
            section; what it asks for and another key exclude each other.
    """
    asked = os.environ.get(_ACCUMULATION, "")
    own = config.training.gradient_accumulation_steps
    if asked.isdigit() and int(asked) != own and (int(asked) > 1 or env_flag("ACCELERATE_USE_DEEPSPEED")):
        raise NPTError(
            f"{_ACCUMULATION}={asked}, and training.gradient_accumulation_steps={own}: accelerate asks for another number of "
            "micro-batches in a step; give both the same"
        )
    if shards_base(config.optimization.fsdp) and not config.optimization.fsdp:
        config = with_overrides(config, {"optimization.fsdp": True})
    if config.optimization.mixed_precision == "no":  # else the configuration decides
        config = with_precision(config, os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower())
    return config


def with_precision(config: RunConfig, precision: str) -> RunConfig:
    """The configuration with the mixed precision that accelerate uses.

    Raises:
        NPTError: npt does not have it, or this machine has no device for it.
    """
    if precision not in PRECISIONS:
        raise NPTError(
            f"accelerate's mixed precision {precision!r} (ACCELERATE_MIXED_PRECISION, or its own configuration) is none of "
            f"npt's; use {', '.join(PRECISIONS)}"
        )
    if precision == config.optimization.mixed_precision:
        return config
    logger.info("optimization.mixed_precision=%s, as accelerate's configuration says", precision)
    return with_overrides(config, {"optimization.mixed_precision": precision})


def with_learning_rate(config: RunConfig, arguments: TrainingArguments) -> RunConfig:
    """The configuration with `training.learning_rate: auto` as a number, which the arguments get too."""
    if not isinstance(config.training.learning_rate, str):
        return config
    size = getattr(base_config(config.model, config.paths.cache_dir).get_text_config(), "hidden_size", None)
    rate = MOST_RATE if size is None else automatic_rate(size)
    arguments.learning_rate = rate
    return with_overrides(config, {"training.learning_rate": rate})


def automatic_rate(hidden_size: int) -> float:
    """The learning rate of `auto`.

    A step of Adam moves each of the d weights of a sum by the learning rate, and the sum by up to d times as much; so the
    rate falls with 1 / d (arXiv 2203.03466, table 3). Its size was measured: docs/experiments.md.
    """
    return min(MOST_RATE, RATE_TIMES_SIZE / hidden_size)


def training_arguments(config: RunConfig) -> TrainingArguments:
    """HF's TrainingArguments from the `training`, `optimization` and `wandb` sections."""
    t = config.training
    return TrainingArguments(
        output_dir=config.paths.checkpoint_dir,
        per_device_train_batch_size=t.batch_size,
        per_device_eval_batch_size=t.batch_size,
        gradient_accumulation_steps=t.gradient_accumulation_steps,
        learning_rate=MOST_RATE if isinstance(t.learning_rate, str) else t.learning_rate,
        lr_scheduler_type=t.lr_scheduler_type,
        num_train_epochs=t.num_epochs,
        max_steps=-1 if t.num_train_steps is None else t.num_train_steps,
        warmup_steps=t.warmup_steps,
        weight_decay=t.weight_decay,
        max_grad_norm=t.max_grad_norm,
        logging_steps=t.logging_steps,
        eval_strategy="steps",
        eval_steps=t.eval_steps,
        save_steps=t.save_steps,
        save_total_limit=3,
        seed=t.seed,
        fp16=config.optimization.mixed_precision == "fp16",
        bf16=config.optimization.mixed_precision == "bf16",
        # The old name draws a warning in transformers 5.23, and the new one does not exist before it.
        **({"gradient_checkpointing": True} if t.gradient_checkpointing else {}),
        use_cpu=not torch.cuda.is_available(),
        **FSDP_ARGUMENTS if shards_base(config.optimization.fsdp) and config.optimization.fsdp else {},
        report_to=trackers(config),
        dataloader_pin_memory=torch.cuda.is_available(),
    )


def trackers(config: RunConfig) -> list[str]:
    """The names of the trackers that are switched on."""
    return [*config.training.report_to, *(["wandb"] if config.wandb.enabled else [])]


def check_trackers(names: list[str]) -> None:
    """Checks the trackers of `training.report_to`, which Trainer would only miss after sampling and calibration.

    Raises:
        ConfigError: a name that is unknown or whose package is not installed.
    """
    available = get_available_reporting_integrations()
    missing = [name for name in names if name not in available]
    if missing:
        raise ConfigError(
            f"training.report_to={missing}: not installed or unknown; installed: {', '.join(available) or 'none'}; "
            "install the package or take the name out"
        )


def prepare_wandb(config: RunConfig) -> None:
    """Starts the run HF's callback will log to. WANDB_MODE=offline works as usual.

    Raises:
        ConfigError: wandb is switched on but not installed.
    """
    w, run = config.wandb, os.environ.get("WANDB_RUN_ID")
    resume: Any = os.environ.get("WANDB_RESUME")
    # HF's callback begins a run by itself, but wandb reads its variables once in a process, and may have done so before.
    if not w.enabled and not (run and "wandb" in config.training.report_to):
        return
    try:
        import wandb
    except ImportError as error:
        raise ConfigError(
            f"wandb.enabled=true needs the package: {install_extra('wandb')}, or set it to false"
        ) from error
    own = {"project": w.project, "entity": w.entity, "tags": list(w.tags or ()), "config": config.model_dump()}
    theirs = {"project": os.environ.get("WANDB_PROJECT", "huggingface")}
    wandb.init(id=run, resume=resume, **(own if w.enabled else theirs))


def objective_schedule(t: TrainingSection, blocks: int) -> list[tuple[int, Objective]]:
    """[(first step, objective)]. `auto` is `logits` after a calibration; without one, `local` for the first half.

    Args:
        blocks: training blocks, which count where no number of steps is given.
    """
    per_step = t.batch_size * t.gradient_accumulation_steps * world()[1]
    steps = run_steps(blocks, per_step, t.num_epochs, t.num_train_steps)
    names = t.objectives()
    return [
        (
            index * steps // len(names),
            Objective(
                name,
                equivalence_weight=t.equivalence_weight,
                regularization_weight=t.regularization_weight,
                regularizer=t.regularizer,
            ),
        )
        for index, name in enumerate(names)
    ]
