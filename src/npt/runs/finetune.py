"""`npt finetune`: the low-rank part of an NPT adapter trained on text or chats, and other methods beside it."""

from __future__ import annotations

import logging
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import datasets
from peft import PeftModel, get_peft_model
from transformers import TrainingArguments, set_seed

from npt.adapters.folder import load_adapter
from npt.adapters.weights import load_weights, share_record
from npt.common.display import blocks_text
from npt.common.files import only_run
from npt.common.memory import release_memory
from npt.common.processes import any_process, first_does, is_first, world
from npt.common.sharded import through
from npt.common.stopwatch import Stopwatch
from npt.config import RunConfig, with_overrides
from npt.config.finetuning import check_finetuning
from npt.evaluation.generation import side_by_side_with_seeds
from npt.finetuning.figures import model_figures
from npt.finetuning.low_rank import train_low_rank
from npt.finetuning.objective import LanguageModelObjective
from npt.finetuning.other_methods import adapted, matching_rank, places_of, trained_parameters
from npt.finetuning.trainer import FinetuneTrainer
from npt.runs.arguments import (
    as_launched,
    check_trackers,
    prepare_wandb,
    start,
    trackers,
    training_arguments,
    with_learning_rate,
    with_precision,
)
from npt.runs.base_model import default_device, load_base, offload_frozen
from npt.runs.corpora import Corpus, own_text, still_to_write
from npt.runs.estimate import EVALUATION, PAGE, SAMPLING, TRAINING, Part, parts_of, say_plan, say_times, sizes_of
from npt.runs.finetune_report import Arm, write_report
from npt.runs.finetune_settings import start_settings
from npt.runs.folders import checkpoint_to_resume, prepare_folders
from npt.runs.processes import shard_base, shards_base, tell_processes
from npt.runs.resume import check_configuration, run_settings, text_settings
from npt.runs.texts import RunTexts
from npt.runs.timing import measure
from npt.runs.tracker_runs import TRACKER_RUNS, RememberTrackers, continued
from npt.runs.train import given_corpus
from npt.runs.training import evaluate_and_train, evaluate_last, place_tensorboard
from npt.training.callbacks import BestAdapterCallback, JsonLinesCallback, SamplesCallback
from npt.training.checkpoints import last_checkpoint, step_of
from npt.training.resume import check_adapter
from npt.training.signals import StopSignals
from npt.tuner.config import NPTConfig
from npt.tuner.converted import active_layers, adapter_config, npt_layers

logger = logging.getLogger(__name__)

#: The figure by which the best adapter is chosen; lower is better.
BEST = "eval_loss"


@dataclass(frozen=True)
class Shared:
    """All that the methods of one run have in common.

    corpus: the text. anchor: blocks of the original's own text, None without an anchor. tokenizer: the base's. signals: the
    run's. spent: the times of its parts.
    """

    corpus: Corpus
    anchor: datasets.Dataset | None
    tokenizer: Any
    signals: StopSignals
    spent: Stopwatch


def run_finetuning(config: RunConfig, *, resume: bool = False) -> dict[str, Any]:
    """Phase 2 from a configuration; returns the report that it also writes.

    Leaves the adapter in <checkpoint_dir>/best_model and config.yaml, metrics.jsonl, samples.jsonl, finetune_report.json and
    report.html in <output_dir>; of a method of `finetuning.compare`, adapter and metrics in folders of its name there.

    Args:
        config: as `npt.runs.finetune_settings.finetune_settings` gives it. resume: goes on from the last checkpoint.

    Raises:
        NPTError: bad input, before any long work; `resume` where no run began.
        RunError: a full disk, or numbers that are not finite; what was saved before is whole.
        Stopped: SIGTERM or Ctrl-C; during training a checkpoint has been saved.
    """
    check_finetuning(config)
    output, checkpoints = Path(config.paths.output_dir), Path(config.paths.checkpoint_dir)
    texts, spent = RunTexts.of(config), Stopwatch()
    texts.check_enough(config.model)
    arguments = start(config)
    config = as_launched(config)
    last = first_does(lambda: checkpoint_to_resume(output, checkpoints)) if resume else None
    texts.check()
    check_trackers(config.training.report_to)
    config = with_learning_rate(config, arguments)
    if last is not None:
        first_does(lambda: check_configuration(config, arguments, last, _settings(config)))
    set_seed(config.training.seed)
    same = continued(output, trackers(config)) if resume else nullcontext()
    with StopSignals() as signals, same:
        with spent.timing("reading text"):
            corpus = given_corpus(config, texts)
        assert corpus is not None  # only text of `self`, which is refused, waits for the base
        with ExitStack() as held:
            npt, shared, parts = train_npt(config, arguments, texts, corpus, signals, spent, last, held)
            arms = [npt, *train_others(config, shared, npt, last)]
            with spent.timing(PAGE):
                report = first_does(partial(write_report, config, arms, corpus))
            first_does(lambda: say_times(parts, spent, output))
            return report


def train_npt(
    config: RunConfig,
    arguments: TrainingArguments,
    texts: RunTexts,
    corpus: Corpus,
    signals: StopSignals,
    spent: Stopwatch,
    last: Path | None,
    held: ExitStack,
) -> tuple[Arm, Shared, list[Part]]:
    """Trains the NPT adapter; returns it with its figures, what other methods share with it, and the plan.

    The model is this function's own: it is gone before the base is loaded again.

    Args:
        last: the checkpoint that the run goes on from. held: gets the lock on the run's folders.
    """
    output, checkpoints = Path(config.paths.output_dir), Path(config.paths.checkpoint_dir)
    with spent.timing("loading the base"):
        model, tokenizer = start_model(config)
    if last is not None:
        first_does(lambda: check_adapter(last, adapter_config(model)))
    tell_processes(arguments)
    held.enter_context(only_run(output, checkpoints))
    if shards_base(config.optimization.fsdp):
        shard_base(model, arguments)
    parts = plan(config, texts, model, tokenizer, corpus, last, spent)
    anchor = None
    if config.finetuning.anchor_weight:
        count = config.finetuning.num_anchor_samples
        with spent.timing(SAMPLING):
            anchor = through(model, lambda: own_text(texts, model, tokenizer, count, "anchor"))
    earlier = adapter_config(model).text_record
    if config.finetuning.adapter is not None and earlier is not None:
        corpus.record.merge(earlier)
    adapter_config(model).text_record = corpus.record
    shared = Shared(corpus, anchor, tokenizer, signals, spent)
    blocks = [layer.index for layer in active_layers(model)]
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    arm = Arm("npt", trained, rank=config.model.rank, blocks=blocks)
    return train_arm(config, arguments, model, shared, last, arm), shared, parts


def plan(
    config: RunConfig, texts: RunTexts, model: Any, tokenizer: Any, corpus: Corpus, last: Path | None, spent: Stopwatch
) -> list[Part]:
    """Logs the parts of the run with the time that each will take, from timing a little text; returns them.

    A method of `finetuning.compare` is taken to train as fast as the NPT adapter.

    Args:
        last: the checkpoint that the run goes on from.
    """
    f = config.finetuning
    with spent.timing("timing"):
        rates = measure(model, tokenizer, config, tuned_by=LanguageModelObjective(f.anchor_weight))
        written = {"anchor": f.num_anchor_samples} if f.anchor_weight else {}
        sampled = through(model, lambda: still_to_write(texts, model, tokenizer, written))
    sizes = sizes_of(config, corpus, sampled, None if last is None else step_of(last))
    of_method = (sizes.scored + sizes.chosen_by) * config.data.max_length * rates.compare / world()[1]
    found: list[Part] = []
    for part in parts_of(config, sizes, rates):
        others = [replace(part, name=f"{TRAINING} {method}") for method in f.compare] if part.name == TRAINING else []
        more = of_method * len(f.compare) if part.name == EVALUATION else 0.0
        found += [replace(part, seconds=part.seconds + more), *others]
    say_plan(config, model.get_base_model(), found, rates)
    return found


def _settings(config: RunConfig) -> dict[str, Any]:
    """The settings of a fine-tuning beside those of any run, before there is a trainer."""
    weight = config.finetuning.anchor_weight
    return {
        "training.objective": ["language_model"],
        "finetuning.anchor_weight": weight,
        **start_settings(config),
    }


def start_model(config: RunConfig) -> tuple[PeftModel, Any]:
    """(model on its device, tokenizer): the base with the adapter that fine-tuning starts from; its low-rank part trains."""
    if is_first():
        prepare_wandb(config)
    base, tokenizer = load_base(config.model, config.optimization, config.paths.cache_dir)
    named = config.finetuning.adapter
    model: Any = (
        get_peft_model(base, NPTConfig.from_options(config.model))
        if named is None
        else load_adapter(base, named, allow_other_base=config.model.allow_other_base)
    )
    trained = train_low_rank(model)
    if config.optimization.use_cpu_offload:
        offload_frozen(model, default_device())
    blocks = blocks_text(adapter_config(model).npt_layers)
    logger.info("%s: %s parameters of the low-rank part are trained", blocks, f"{trained:,}")
    return model, tokenizer


def train_others(config: RunConfig, shared: Shared, npt: Arm, last: Path | None) -> list[Arm]:
    """Trains each method of `finetuning.compare` on a fresh base and on the batches of the NPT adapter.

    Args:
        npt: whose blocks and number of parameters they have. last: the checkpoint that the run goes on from.
    """
    found = []
    for method in config.finetuning.compare:
        release_memory()
        found.append(train_other(of_method(config, method), method, shared, npt, resumes=last is not None))
    return found


def train_other(config: RunConfig, method: str, shared: Shared, npt: Arm, *, resumes: bool) -> Arm:
    """Trains one other method; the model is this function's own.

    Args:
        config: with the method's folders. resumes: goes on from its last checkpoint, where there is one.
    """
    base, _ = load_base(config.model, config.optimization, config.paths.cache_dir)
    places = places_of(base, npt.blocks, config.model.target_projections)
    rank = matching_rank(method, npt.trained, places)
    arm = Arm(
        method, trained_parameters(method, rank, places), rank=rank, blocks=npt.blocks, places=[p.name for p in places]
    )
    logger.info(
        "%s of rank %d on %d projections: %s trained parameters beside NPT's %s",
        method, rank, len(places), f"{arm.trained:,}", f"{npt.trained:,}",
    )  # fmt: skip
    set_seed(config.training.seed)
    model = adapted(base, method, rank, places)
    # A new run's folders may still hold an earlier one's checkpoints.
    last = first_does(lambda: last_checkpoint(Path(config.paths.checkpoint_dir))) if resumes else None
    return train_arm(config, training_arguments(config), model, shared, last, arm)


def of_method(config: RunConfig, method: str) -> RunConfig:
    """The configuration with the folders and learning rate of a method of `finetuning.compare`, and without trackers."""
    folders = {f"paths.{n}": str(Path(getattr(config.paths, n)) / method) for n in ("output_dir", "checkpoint_dir")}
    f = config.finetuning
    rates = f.compare_learning_rates
    rate = rates[list[str](f.compare).index(method)] if rates else config.training.learning_rate
    own = {"training.learning_rate": rate, "training.report_to": [], "wandb.enabled": False}
    return with_overrides(config, {**folders, **own})


def train_arm(
    config: RunConfig, arguments: TrainingArguments, model: Any, shared: Shared, last: Path | None, arm: Arm
) -> Arm:
    """Trains one method and measures its best adapter; returns the arm with its figures.

    Args:
        config, arguments: with the method's own folders. last: the checkpoint it goes on from.

    Raises:
        Stopped: a signal came.
    """
    output, checkpoints = Path(config.paths.output_dir), Path(config.paths.checkpoint_dir)
    spent, corpus, is_npt = shared.spent, shared.corpus, bool(npt_layers(model))
    arm.learning_rate = arguments.learning_rate
    trainer = make_trainer(config, arguments, model, shared, last, arm)
    config = with_precision(config, trainer.accelerator.mixed_precision)
    if last is not None:
        trainer.check_resume(last)
    first_does(lambda: prepare_folders(config, output, checkpoints, last))
    part = TRAINING if is_npt else f"{TRAINING} {arm.name}"
    arm.notes = evaluate_and_train(trainer, last, spent, part=part)
    if any_process(shared.signals.received is not None):
        step = trainer.state.global_step
        raise shared.signals.stopped(
            f"after step {step}; {checkpoints}/checkpoint-{step} is saved: go on with --resume"
        )
    evaluate_last(config, trainer, spent)
    load_weights(model, checkpoints / "best_model")
    if is_npt:
        share_record(model)
    release_memory()
    corpora = corpus.scored(config.data.dataset_name)
    with spent.timing(EVALUATION):
        arm.figures, arm.base = model_figures(
            model, corpora, batch_size=config.training.batch_size, progress=is_first()
        )
        if is_npt:
            seeds = (None, config.training.seed)  # greedy, then sampled
            greedy_and_sampled = partial(side_by_side_with_seeds, model, shared.tokenizer, seeds=seeds)
            arm.samples = [sample for of_seed in through(model, greedy_and_sampled) for sample in of_seed]
    arm.seconds, arm.steps = spent.seconds.get(part, 0.0), trainer.state.global_step
    if is_npt:
        first_does(lambda: arm.keep(model, shared.tokenizer, config))
    return arm


def make_trainer(
    config: RunConfig, arguments: TrainingArguments, model: Any, shared: Shared, last: Path | None, arm: Arm
) -> FinetuneTrainer:
    """The trainer of one method with its callbacks."""
    output, is_npt = Path(config.paths.output_dir), bool(npt_layers(model))
    settings = {**run_settings(config), **start_settings(config)}
    samples = SamplesCallback(
        output / "samples.jsonl", model, shared.tokenizer, config.training.prediction_logging_steps
    )
    trainer = FinetuneTrainer(
        model,
        arguments,
        anchor_weight=config.finetuning.anchor_weight,
        anchor=shared.anchor,
        settings=settings if is_npt else {**settings, **arm.settings()},
        text_settings=text_settings(config.data),
        progress=True,
        train_dataset=shared.corpus.train,
        eval_dataset=shared.corpus.chosen_by,
        callbacks=[
            shared.signals,
            JsonLinesCallback(output / "metrics.jsonl"),
            RememberTrackers(output / TRACKER_RUNS),
            *([samples] if is_npt else []),
            BestAdapterCallback(Path(config.paths.checkpoint_dir) / "best_model", model, metric=BEST),
        ],
    )
    place_tensorboard(trainer, output, last)
    return trainer
