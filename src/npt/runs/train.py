"""`npt train`: load, convert, calibrate, train, evaluate, from a configuration to files."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model
from transformers import TrainingArguments, set_seed

from npt.adapters.folder import RUN_CONFIG
from npt.adapters.settings import as_recorded
from npt.adapters.weights import load_weights, share_record
from npt.common.display import blocks_text
from npt.common.files import append_json, only_run, write_json
from npt.common.memory import release_memory
from npt.common.options import is_automatic, is_calibrated
from npt.common.processes import any_process, first_does, is_first
from npt.common.sharded import through
from npt.common.stopwatch import Stopwatch
from npt.config import RunConfig, save_config, shortened
from npt.config.finetuning import check_no_finetuning
from npt.equivalence.calibration import check_calibration_room
from npt.equivalence.objectives import objective_class
from npt.equivalence.teacher import check_teacher_cache
from npt.equivalence.trainer import EquivalenceTrainer
from npt.report.page import write_page
from npt.report.plots import draw_run
from npt.report.run_files import read_json_lines
from npt.report.trackers import log_evaluation
from npt.runs.arguments import (
    as_launched,
    check_trackers,
    objective_schedule,
    prepare_wandb,
    start,
    trackers,
    with_learning_rate,
    with_precision,
)
from npt.runs.base_model import default_device, load_base, load_tokenizer, offload_frozen
from npt.runs.calibrate import calibrate_run, prediction_of
from npt.runs.corpora import Corpus, calibration_batches, load_corpus, own_counts, still_to_write
from npt.runs.estimate import (
    EVALUATION,
    PAGE,
    SAMPLING,
    TARGETS,
    Part,
    parts_of,
    say_plan,
    say_times,
    sizes_of,
)
from npt.runs.evaluate import evaluate_corpora
from npt.runs.folders import checkpoint_to_resume, prepare_folders
from npt.runs.processes import shard_base, shards_base, tell_processes
from npt.runs.resume import check_configuration, run_settings, settings_of_objectives, text_settings
from npt.runs.texts import RunTexts, own_train_blocks
from npt.runs.timing import measure
from npt.runs.tracker_runs import TRACKER_RUNS, RememberTrackers, continued
from npt.runs.training import TENSORBOARD, evaluate_and_train, evaluate_last, place_tensorboard
from npt.training.callbacks import BestAdapterCallback, JsonLinesCallback, SamplesCallback
from npt.training.checkpoints import step_of
from npt.training.resume import adapter_blocks, check_adapter
from npt.training.signals import StopSignals
from npt.tuner.card import write_model_card
from npt.tuner.config import NPTConfig
from npt.tuner.converted import adapter_config, device_of, parameter_counts

logger = logging.getLogger(__name__)

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
    check_no_finetuning(config)
    output, checkpoints = Path(config.paths.output_dir), Path(config.paths.checkpoint_dir)
    texts, spent = RunTexts.of(config), Stopwatch()
    texts.check_enough(config.model)
    arguments = start(config)
    config = as_launched(config)
    last = first_does(lambda: checkpoint_to_resume(output, checkpoints)) if resume else None
    texts.check()
    check_trackers(config.training.report_to)
    if last is not None:
        config = with_learning_rate(config, arguments)
        first_does(lambda: check_configuration(config, arguments, last, settings_of_objectives(config)))
    set_seed(config.training.seed)
    same = continued(output, trackers(config)) if resume else nullcontext()
    with StopSignals() as signals, same:
        with spent.timing("reading text"):
            corpus = given_corpus(config, texts)
        config = with_learning_rate(config, arguments)  # it reads the base's configuration
        with spent.timing("loading the base"):
            model, tokenizer = convert_base(config, last)
        if last is not None:
            first_does(lambda: check_adapter(last, adapter_config(model)))
        tell_processes(arguments)
        with only_run(output, checkpoints):
            if shards_base(config.optimization.fsdp):
                shard_base(model, arguments)
            parts = plan(config, texts, model, tokenizer, corpus, last, spent)
            with spent.timing(SAMPLING):
                corpus = corpus or through(model, lambda: load_corpus(texts, model, tokenizer))
            adapter_config(model).text_record = corpus.record
            release_memory()
            if config.data.num_train_samples is None:
                check_targets(config, model, corpus.trained_blocks)
            trainer = make_trainer(config, arguments, model, tokenizer, corpus, signals, last)
            config = with_precision(config, trainer.accelerator.mixed_precision)
            if last is not None:
                trainer.check_resume(last)
            first_does(lambda: prepare_folders(config, output, checkpoints, last))
            notes = fit(config, trainer, texts, corpus, last, spent)
            if any_process(signals.received is not None):
                step = trainer.state.global_step
                raise signals.stopped(
                    f"after step {step}; {checkpoints}/checkpoint-{step} is saved: go on with --resume"
                )
            report = report_best(config, trainer, tokenizer, corpus, notes, spent)
            first_does(lambda: say_times(parts, spent, output))
            return report


def plan(
    config: RunConfig,
    texts: RunTexts,
    model: Any,
    tokenizer: Any,
    corpus: Corpus | None,
    last: Path | None,
    spent: Stopwatch,
) -> list[Part]:
    """Logs the parts of the run with the time that each will take, from timing a little text; returns them.

    Args:
        corpus: None where the base writes the text. last: the checkpoint that the run goes on from.
    """
    with spent.timing("timing"):
        rates = measure(model, tokenizer, config)
        to_write = through(model, lambda: still_to_write(texts, model, tokenizer, own_counts(texts, ("train", "eval"))))
    sizes = sizes_of(config, corpus, to_write, None if last is None else step_of(last))
    parts = parts_of(config, sizes, rates)
    quick = None
    if last is None and config.training.num_train_steps != 0:
        little = shortened(config)
        sampled = [own_train_blocks(little), little.data.num_eval_samples or 0] if corpus is None else []
        quick = sum(part.seconds for part in parts_of(little, sizes_of(little, None, sampled), rates))
    say_plan(config, model.get_base_model(), parts, rates, quick)
    return parts


def given_corpus(config: RunConfig, texts: RunTexts) -> Corpus | None:
    """The blocks of a run, before the base's weights are read; None where the base writes the text itself.

    Raises:
        DataError: see `RunTexts.check_model` and `load_corpus`.
    """
    if config.data.dataset_name == "self":
        return None
    texts.check_model(config.model)
    return load_corpus(texts, None, load_tokenizer(config.model, config.paths.cache_dir))


def convert_base(config: RunConfig, last: Path | None = None) -> tuple[PeftModel, Any]:
    """(converted model on its device, tokenizer) of a configuration.

    Args:
        last: the checkpoint that a run goes on from; the blocks that were chosen for it are not chosen again.
    """
    adapter = NPTConfig.from_options(config.model)
    if last is not None and is_automatic(adapter.npt_layers):
        adapter.npt_layers = first_does(lambda: adapter_blocks(last))
    if is_first():
        prepare_wandb(config)
    base, tokenizer = load_base(config.model, config.optimization, config.paths.cache_dir)
    model: Any = get_peft_model(base, adapter)
    if config.optimization.use_cpu_offload:
        offload_frozen(model, default_device())
    own, frozen = parameter_counts(model)
    logger.info(
        "%s now neuro-plastic: %s new parameters (%.3g %% of %s)",
        blocks_text(adapter_config(model).npt_layers, verb=True), f"{own:,}", 100 * own / frozen, f"{frozen:,}",
    )  # fmt: skip
    if last is None and config.training.calibrate:
        length = config.data.max_length
        check_calibration_room(model, config.data.num_calibration_samples * length, config.training.batch_size * length)
    if config.data.num_train_samples is not None:
        check_targets(config, model, config.data.num_train_samples)
    return model, tokenizer


def fit(
    config: RunConfig,
    trainer: EquivalenceTrainer,
    texts: RunTexts,
    corpus: Corpus,
    last: Path | None,
    spent: Stopwatch,
) -> list[str]:
    """Calibrates, evaluates once and trains, or trains the rest from checkpoint `last`.

    Returns:
        notes on the training, for the report.
    """
    model, output = trainer.model, Path(config.paths.output_dir)
    trains = trainer.args.max_steps != 0 and config.model.carry != "exact"
    if trains:
        with spent.timing(TARGETS):
            trainer.read_teacher()
    if last is None and config.training.calibrate and is_calibrated(config.model.carry, config.model.gain):
        text = calibration_batches(texts, corpus, config.training.batch_size, device_of(model))
        errors, prediction = calibrate_run(model, text, spent)
        row = {"step": 0, "calibration": errors, "prediction": prediction}
        first_does(lambda: append_json(output / "metrics.jsonl", row))
    release_memory()
    return evaluate_and_train(trainer, last, spent, trains=trains)


def report_best(
    config: RunConfig,
    trainer: EquivalenceTrainer,
    tokenizer: Any,
    corpus: Corpus,
    notes: list[str],
    spent: Stopwatch,
) -> dict[str, Any]:
    """Evaluates the last step, if that is still due, then the best adapter, and writes everything that describes it.

    Returns:
        the evaluation report.
    """
    evaluate_last(config, trainer, spent)
    model, output, best = trainer.model, Path(config.paths.output_dir), Path(config.paths.checkpoint_dir) / "best_model"
    load_weights(model, best)
    share_record(model)
    release_memory()
    with spent.timing(EVALUATION):
        report = evaluate_corpora(model, tokenizer, corpus.scored(config.data.dataset_name), config)
    report["notes"] = [*notes, *corpus.unseen.notes, *report["notes"]]
    report["prediction"] = prediction_of(read_json_lines(output / "metrics.jsonl"))
    report["protocol"]["training_precision"] = config.optimization.mixed_precision

    def write() -> None:
        save_config(as_recorded(config), best / RUN_CONFIG)
        tokenizer.save_pretrained(str(best))
        write_json(output / "evaluation_report.json", report)
        write_model_card(best, adapter_config(model), report)
        write_page(output)
        if names := trackers(config):
            pictures = draw_run(read_json_lines(output / "metrics.jsonl"), report)
            log_evaluation(report, pictures, trainer.state.global_step, output / TENSORBOARD, names)

    with spent.timing(PAGE):
        first_does(write)
    return report


def make_trainer(
    config: RunConfig,
    arguments: TrainingArguments,
    model: Any,
    tokenizer: Any,
    corpus: Corpus,
    signals: StopSignals,
    last: Path | None = None,
) -> EquivalenceTrainer:
    """The trainer with its callbacks.

    Args:
        last: the checkpoint that it will go on from.
    """
    output, t = Path(config.paths.output_dir), config.training
    trainer = EquivalenceTrainer(
        model,
        arguments,
        objective_schedule(t, corpus.trained_blocks),
        teacher_cache=config.paths.teacher_cache,
        teacher_top_k=t.teacher_top_k,
        settings=run_settings(config),
        text_settings=text_settings(config.data),
        progress=True,
        train_dataset=corpus.train,
        eval_dataset=corpus.chosen_by,
        callbacks=[
            signals,
            JsonLinesCallback(output / "metrics.jsonl"),
            RememberTrackers(output / TRACKER_RUNS),
            SamplesCallback(output / "samples.jsonl", model, tokenizer, t.prediction_logging_steps),
            BestAdapterCallback(
                Path(config.paths.checkpoint_dir) / "best_model", model, PATIENCE if t.objective == "auto" else None
            ),
        ],
    )
    place_tensorboard(trainer, output, last)
    return trainer


def check_targets(config: RunConfig, model: Any, blocks: int) -> None:
    """Logs how large the teacher targets of so many blocks will be, where they are wanted; stops where they can't be kept."""
    if config.paths.teacher_cache is not None:
        kinds = list(dict.fromkeys(objective_class(name).teacher_kind for name in config.training.objectives()))
        check_teacher_cache(
            config.paths.teacher_cache, model, kinds, config.training.teacher_top_k, blocks, config.data.max_length
        )
