"""Runs from a configuration: load, convert, calibrate, train, evaluate. The command is a thin layer over this."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from transformers import TrainingArguments, set_seed
from transformers.integrations import TensorBoardCallback, get_available_reporting_integrations

from npt.adapters.folder import load_adapter, resolve_checkpoint, set_aside
from npt.common.files import append_json, keep_lines, only_run, write_json
from npt.common.launch import check_launch
from npt.common.processes import any_process, first_does, is_first, world
from npt.common.sharded import full_tensor, through
from npt.config import RunConfig, save_config
from npt.equivalence.calibration import calibrate
from npt.equivalence.objectives import Objective, objective_class
from npt.equivalence.teacher import check_teacher_cache
from npt.equivalence.trainer import EquivalenceTrainer
from npt.errors import CheckpointError, ConfigError
from npt.evaluation import evaluate
from npt.report.page import write_page
from npt.report.plots import draw_run
from npt.report.run_files import read_json_lines
from npt.report.trackers import log_evaluation
from npt.runs.base_model import default_device, load_base, offload_frozen, release_memory
from npt.runs.corpora import (
    RUN_CONFIG,
    Corpus,
    calibration_batches,
    check_text_files,
    evaluation_blocks,
    further_corpora,
    load_corpus,
)
from npt.runs.processes import shard_base, shards_base, start_processes, tell_processes
from npt.training.callbacks import BEST_METRIC, BestAdapterCallback, JsonLinesCallback, SamplesCallback
from npt.training.checkpoints import last_checkpoint, load_weights, step_of
from npt.training.signals import StopSignals
from npt.tuner.card import write_model_card
from npt.tuner.config import NPTConfig
from npt.tuner.converted import adapter_config, device_of, parameter_counts

logger = logging.getLogger(__name__)

#: Folder of tensorboard's events in a run's output folder.
TENSORBOARD = "tensorboard"
#: Change of the parameters, relative to their norm, below which training did nothing.
NO_CHANGE = 1e-7
#: TrainingArguments of `optimization.fsdp`; under accelerate's own FSDP configuration, that says how.
FSDP_ARGUMENTS: dict[str, Any] = {"fsdp": True, "fsdp_config": {"version": 2, "reshard_after_forward": True}}
#: Evaluations without a new best after which objective `auto` stops.
PATIENCE = 4


def run_training(config: RunConfig, *, resume: bool = False) -> dict[str, Any]:
    """Phase 1 from a configuration; returns the evaluation report it also writes.

    Leaves the adapter in <checkpoint_dir>/best_model and config.yaml, metrics.jsonl, samples.jsonl and
    evaluation_report.json in <output_dir>. What an earlier run left there is moved to `previous-<n>`.

    Raises:
        NPTError: bad input, before any long work; `resume` where no run began.
        RunError: a full disk, or numbers that are not finite; what was saved before is whole.
        Stopped: SIGTERM or Ctrl-C; during training a checkpoint has been saved.
    """
    output, checkpoints = Path(config.paths.output_dir), Path(config.paths.checkpoint_dir)
    arguments = start(config)
    last = first_does(lambda: checkpoint_to_resume(output, checkpoints)) if resume else None
    check_text_files(config)
    check_trackers(config)
    set_seed(config.training.seed)
    with StopSignals() as signals:
        model, tokenizer = convert_base(config)
        tell_processes(arguments)
        with only_run(output, checkpoints):
            if shards_base(config.optimization.fsdp):
                shard_base(model, arguments)
            corpus = through(model, lambda: load_corpus(config, model, tokenizer))
            release_memory()
            if config.data.num_train_samples is None:
                check_targets(config, model, len(corpus.train))
            first_does(lambda: prepare_folders(config, output, checkpoints, last))
            trainer = make_trainer(config, arguments, model, tokenizer, corpus, signals)
            notes = fit(config, trainer, tokenizer, corpus, last)
            if any_process(signals.received is not None):
                step = trainer.state.global_step
                raise signals.stopped(
                    f"after step {step}; {checkpoints}/checkpoint-{step} is saved: go on with --resume"
                )
            return report_best(config, trainer, tokenizer, corpus, notes)


def start(config: RunConfig) -> TrainingArguments:
    """Joins the processes of this launch; the arguments of the trainer, whose making it is.

    Raises:
        NPTError: a launch whose processes can't or don't find one another.
    """
    check_launch()
    arguments = training_arguments(config)
    start_processes(arguments)
    return arguments


def prepare_folders(config: RunConfig, output: Path, checkpoints: Path, last: Path | None) -> None:
    """Moves an earlier run's files aside, or takes back what was logged after the checkpoint a run goes on from."""
    if last is None:
        set_aside(output, ("metrics.jsonl", "samples.jsonl", "evaluation_report.json", "report.html", "plots"))
        set_aside(checkpoints, ("best_model", "checkpoint-*"))
    else:
        rewind(output, step_of(last), config.training.eval_steps)
    save_config(config, output / "config.yaml")


def checkpoint_to_resume(output: Path, checkpoints: Path) -> Path | None:
    """The newest finished checkpoint; None where a run began and was stopped before its first one.

    Raises:
        CheckpointError: no run has begun there.
    """
    last = last_checkpoint(checkpoints)
    if last is not None:
        logger.info("resuming from %s", last)
    elif (output / "config.yaml").is_file():
        logger.warning("%s: the run there was stopped before its first checkpoint; starting from the beginning", output)
    else:
        raise CheckpointError(f"paths.checkpoint_dir={checkpoints} holds no checkpoint to resume; run without --resume")
    return last


def convert_base(config: RunConfig) -> tuple[PeftModel, Any]:
    """(converted model, tokenizer) of a configuration, on its device."""
    adapter = NPTConfig.from_options(config.model)
    if is_first():
        prepare_wandb(config)
    base, tokenizer = load_base(config)
    model: Any = get_peft_model(base, adapter)
    # As the user named it: the place of a builtin model differs from machine to machine.
    adapter.base_model_name_or_path = config.model.base_model_name
    if config.optimization.use_cpu_offload:
        offload_frozen(model, default_device())
    own, frozen = parameter_counts(model)
    logger.info(
        "blocks %s are now neuro-plastic: %s new parameters (%.3g %% of %s)",
        adapter_config(model).npt_layers, f"{own:,}", 100 * own / frozen, f"{frozen:,}",
    )  # fmt: skip
    if config.data.num_train_samples is not None:
        check_targets(config, model, config.data.num_train_samples)
    return model, tokenizer


def rewind(output: Path, step: int, eval_steps: int) -> None:
    """Takes out of a run's records what was logged after the checkpoint it goes on from: it comes again."""

    def keep(row: dict[str, Any]) -> bool:
        # The one evaluation that follows its step's checkpoint is the last one, where it is not due by eval_steps.
        late = BEST_METRIC in row and step % eval_steps != 0
        return not isinstance(row.get("step"), int) or row["step"] < step + (not late)

    for name in ("metrics.jsonl", "samples.jsonl"):
        keep_lines(output / name, keep)


def fit(config: RunConfig, trainer: EquivalenceTrainer, tokenizer: Any, corpus: Corpus, last: Path | None) -> list[str]:
    """Calibration, the first evaluation and training, or the rest of it from checkpoint `last`; what a person should know."""
    model, output, notes = trainer.model, Path(config.paths.output_dir), []
    trains = trainer.args.max_steps != 0 and config.model.carry != "exact"
    if trains:
        trainer.read_teacher()
    if last is None and config.training.calibrate and config.model.carry != "exact":
        text = calibration_batches(config, tokenizer, corpus.calibration, device_of(model))
        errors = through(model, lambda: calibrate(model, text, progress=is_first()))
        first_does(lambda: append_json(output / "metrics.jsonl", {"step": 0, "calibration": errors}))
        for name, figures in errors.items():
            logger.info("%s: update error %.4f -> %.4f", name, figures["error_before"], figures["error_after"])
    release_memory()
    if last is None:
        trainer.evaluate()
        release_memory()
    if last is not None and trainer.is_finished(last):
        trainer.state.global_step = step_of(last)
    elif trains:
        before = trained_values(model)
        trainer.train(resume_from_checkpoint=None if last is None else str(last))
        moved = (trained_values(model) - before).norm() / before.norm()
        if trainer.state.global_step and moved < NO_CHANGE:
            notes.append(
                f"{trainer.state.global_step} training steps moved the parameters by {moved:.1g} of their norm; see "
                "training.learning_rate"
            )
    return notes


def trained_values(model: Any) -> torch.Tensor:
    """All numbers that training may change, in one vector on the CPU."""
    return torch.cat([full_tensor(p).flatten().double().cpu() for p in model.parameters() if p.requires_grad])


def report_best(
    config: RunConfig, trainer: EquivalenceTrainer, tokenizer: Any, corpus: Corpus, notes: list[str]
) -> dict[str, Any]:
    """Looks at the last step too, then evaluates the best adapter and writes everything that describes it."""
    if trainer.state.global_step % config.training.eval_steps:
        trainer.evaluate()
    model, output, best = trainer.model, Path(config.paths.output_dir), Path(config.paths.checkpoint_dir) / "best_model"
    load_weights(model, best)
    release_memory()
    report = evaluate_corpora(
        config, model, tokenizer, {config.data.dataset_name: corpus.held_out} | further_corpora(config, tokenizer)
    )
    report["notes"] = [*notes, *report["notes"]]

    def write() -> None:
        save_config(config, best / RUN_CONFIG)
        tokenizer.save_pretrained(str(best))
        write_json(output / "evaluation_report.json", report)
        write_model_card(best, adapter_config(model), report)
        write_page(output)
        names = [*config.training.report_to, *(["wandb"] if config.wandb.enabled else [])]
        if names:
            pictures = draw_run(read_json_lines(output / "metrics.jsonl"), report)
            log_evaluation(report, pictures, trainer.state.global_step, output / TENSORBOARD, names)

    first_does(write)
    return report


def evaluate_corpora(config: RunConfig, model: Any, tokenizer: Any, corpora: dict[str, Any]) -> dict[str, Any]:
    """The report, by all processes together."""
    data, t = config.data, config.training
    return through(
        model,
        lambda: evaluate(
            model, tokenizer, corpora, context_length=data.max_length, batch_size=t.batch_size, seed=t.seed,
            progress=is_first(),
        ),
    )  # fmt: skip


def make_trainer(
    config: RunConfig,
    arguments: TrainingArguments,
    model: Any,
    tokenizer: Any,
    corpus: Corpus,
    signals: StopSignals,
) -> EquivalenceTrainer:
    """The trainer with its callbacks."""
    output, t = Path(config.paths.output_dir), config.training
    trainer = EquivalenceTrainer(
        model,
        arguments,
        objective_schedule(config, 0 if config.data.streaming else len(corpus.train)),
        teacher_cache=config.paths.teacher_cache,
        teacher_top_k=t.teacher_top_k,
        train_dataset=corpus.train,
        eval_dataset=corpus.chosen_by,
        callbacks=[
            signals,
            JsonLinesCallback(output / "metrics.jsonl"),
            SamplesCallback(output / "samples.jsonl", model, tokenizer, t.prediction_logging_steps),
            BestAdapterCallback(
                Path(config.paths.checkpoint_dir) / "best_model", model, PATIENCE if t.objective == "auto" else None
            ),
        ],
    )
    for callback in trainer.callback_handler.callbacks:
        # The evaluation before training would make it write to ./runs, wherever that is.
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
            callback.logging_dir = str(output / TENSORBOARD)
    return trainer


def check_targets(config: RunConfig, model: Any, blocks: int) -> None:
    """Where teacher targets are wanted: says how large they will be for so many blocks, and stops where they can't be."""
    if config.paths.teacher_cache is not None:
        kinds = list(dict.fromkeys(objective_class(name).teacher_kind for name in config.training.objectives()))
        check_teacher_cache(
            config.paths.teacher_cache, model, kinds, config.training.teacher_top_k, blocks, config.data.max_length
        )


def objective_schedule(config: RunConfig, blocks: int) -> list[tuple[int, Objective]]:
    """[(first step, objective)]. `auto` is `logits` after a calibration; without one, `local` for the first half."""
    t = config.training
    per_epoch = -(-blocks // (t.batch_size * t.gradient_accumulation_steps * world()[1]))
    steps = int(per_epoch * t.num_epochs) if t.num_train_steps is None else t.num_train_steps
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


def training_arguments(config: RunConfig) -> TrainingArguments:
    """HF's TrainingArguments from the `training`, `optimization` and `wandb` sections."""
    t = config.training
    return TrainingArguments(
        output_dir=config.paths.checkpoint_dir,
        per_device_train_batch_size=t.batch_size,
        per_device_eval_batch_size=t.batch_size,
        gradient_accumulation_steps=t.gradient_accumulation_steps,
        learning_rate=t.learning_rate,
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
        report_to=[*t.report_to, *(["wandb"] if config.wandb.enabled else [])],
        dataloader_pin_memory=torch.cuda.is_available(),
    )


def check_trackers(config: RunConfig) -> None:
    """Trackers that Trainer would only miss after sampling and calibration.

    Raises:
        ConfigError: a name that is unknown or whose package is not installed.
    """
    available = get_available_reporting_integrations()
    missing = [name for name in config.training.report_to if name not in available]
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
    if not config.wandb.enabled:
        return
    try:
        import wandb
    except ImportError as error:
        raise ConfigError(
            "wandb.enabled=true needs the package: pip install 'npt[wandb]', or set it to false"
        ) from error
    w = config.wandb
    wandb.init(project=w.project, entity=w.entity, tags=list(w.tags or ()), config=config.model_dump())


def load_npt(config: RunConfig, checkpoint: str | Path) -> tuple[PeftModel, Any]:
    """(NPT model, tokenizer): the base of the configuration with the adapter at `checkpoint` (see `load_adapter`)."""
    folder = resolve_checkpoint(checkpoint)  # a missing one is named before the base is loaded
    base, tokenizer = load_base(config)
    model = load_adapter(base, folder, allow_other_base=config.model.allow_other_base)
    if config.optimization.use_cpu_offload:
        offload_frozen(model, default_device())
    return model, tokenizer


def run_evaluation(
    config: RunConfig, checkpoint: str | Path, output: str | Path, *, more_text: Sequence[str | Path] = ()
) -> dict[str, Any]:
    """Evaluates a checkpoint on the configuration's data, beside on its eval_texts and `more_text`; writes the report.

    Text the adapter was trained on is split as in training and only its held-out part is used; other text is used
    whole, up to data.num_eval_samples blocks.
    """
    arguments = start(config)
    check_text_files(config, more_text)
    model, tokenizer = load_npt(config, checkpoint)
    if shards_base(config.optimization.fsdp):
        shard_base(model, arguments)
    own = through(model, lambda: evaluation_blocks(config, checkpoint, model, tokenizer))
    corpora = {config.data.dataset_name: own} | further_corpora(config, tokenizer, more_text)
    report = evaluate_corpora(config, model, tokenizer, corpora)

    def write() -> None:
        write_json(Path(output), report)
        # The curves of training belong to the page when the report lies with them.
        write_page(Path(output).parent, Path(output), Path(output).with_suffix(".html"))

    first_does(write)
    return report
