"""The plan of a run that is about to start, with the time that each part will take; in the end, that beside the time taken."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from npt.common.display import duration
from npt.common.files import write_json
from npt.common.options import is_calibrated
from npt.common.precision import DTYPE_REASON
from npt.common.processes import world
from npt.common.stopwatch import Stopwatch
from npt.config import RunConfig
from npt.equivalence.prediction import probe_texts
from npt.evaluation.generation import DEFAULT_PROMPTS
from npt.runs.corpora import Corpus
from npt.runs.texts import own_train_blocks
from npt.runs.timing import Rates
from npt.training.steps import held_back, run_steps

logger = logging.getLogger(__name__)

#: The file of a run's folder that holds the estimated and the taken times.
TIMING = "timing.json"
#: Names of a run's parts, as the plan and the times taken have them.
SAMPLING, TARGETS, CALIBRATION, PREDICTION = "sampling text", "teacher targets", "calibration", "prediction"
TRAINING, EVALUATION, PAGE = "training", "evaluation", "report page"
#: Seconds for the page, its plots and the library that draws them. They do not depend on the model and are not timed.
PAGE_SECONDS = 1.5
#: Above so many seconds the plan says what would shorten the run.
LONG = 600.0


@dataclass(frozen=True)
class Part:
    """A part of a run. work: the text it takes, in words. seconds: estimated."""

    name: str
    work: str
    seconds: float


@dataclass(frozen=True)
class Sizes:
    """Blocks of text in a run, and the steps that are left to train.

    sampled: numbers of blocks that the model writes, one for each text. scored: of all texts together, detailed: of those
    with figures by block.
    """

    sampled: tuple[int, ...] = ()
    trained: int = 0
    chosen_by: int = 0
    calibration: int = 0
    scored: int = 0
    detailed: int = 0
    steps: int = 0


def sizes_of(
    config: RunConfig, corpus: Corpus | None, sampled: Sequence[int] = (), last_step: int | None = None
) -> Sizes:
    """The sizes of a run.

    Args:
        corpus: its text; None where the base still has to write it. sampled: blocks of each text that it writes.
        last_step: the step from which a resumed run goes on.
    """
    d, t = config.data, config.training
    if corpus is None:
        blocks, held_out = own_train_blocks(config), d.num_eval_samples or 0
        chosen_by, calibration, scored = held_back(blocks), blocks, held_out * (1 + len(d.eval_texts))
        trained = blocks - chosen_by
    else:
        trained, chosen_by, held_out = corpus.trained_blocks, len(corpus.chosen_by), len(corpus.held_out)
        calibration = len(corpus.calibration) + len(corpus.prose or ())
        scored = held_out + sum(map(len, corpus.further.values()))
    per_step = t.batch_size * t.gradient_accumulation_steps * world()[1]
    steps = run_steps(trained, per_step, t.num_epochs, t.num_train_steps)
    calibrates = t.calibrate and last_step is None and is_calibrated(config.model.carry, config.model.gain)
    return Sizes(
        sampled=tuple(sampled),
        trained=trained,
        chosen_by=chosen_by,
        calibration=min(d.num_calibration_samples, calibration) if calibrates else 0,
        scored=scored,
        detailed=min(d.num_detail_samples, held_out),
        steps=0 if config.model.carry == "exact" else max(0, steps - (last_step or 0)),
    )


def parts_of(config: RunConfig, sizes: Sizes, rates: Rates) -> list[Part]:
    """The parts of a run in their order, those that it does not have left out."""
    return [part for part in _parts(config, sizes, rates) if part.seconds > 0]


def _parts(config: RunConfig, sizes: Sizes, rates: Rates) -> Iterator[Part]:
    t, length, processes = config.training, config.data.max_length, world()[1]
    tokens = length * sum(sizes.sampled)
    yield Part(
        SAMPLING, f"{tokens:,} tokens", sum(rates.writing(blocks, length) for blocks in sizes.sampled) / processes
    )
    tokens = length * sizes.calibration
    fitting = (tokens * rates.forward + rates.fit.of(tokens)) / processes if tokens else 0.0
    yield Part(CALIBRATION, f"{tokens:,} tokens", fitting)
    tokens = length * min(probe_texts(rates.blocks, sizes.calibration), sizes.calibration)
    yield Part(PREDICTION, f"{tokens:,} tokens, each block", tokens * rates.alone)
    steps = sizes.steps
    if steps and config.paths.teacher_cache is not None:
        tokens = length * sizes.trained
        yield Part(TARGETS, f"{tokens:,} tokens", len(t.objectives()) * tokens * rates.forward / processes)
    evaluation = sizes.chosen_by * length * rates.compare / processes
    per_step = length * t.batch_size * t.gradient_accumulation_steps
    of_step = sum(rates.step.values()) / max(1, len(rates.step))
    samples = steps // t.prediction_logging_steps * len(DEFAULT_PROMPTS) * rates.sample
    training = steps * per_step * of_step + math.ceil(steps / t.eval_steps) * evaluation + samples
    yield Part(TRAINING, f"{steps:,} steps of {per_step * processes:,} tokens", training)
    tokens = length * sizes.scored
    report = tokens * rates.compare / processes + length * sizes.detailed * rates.detail + rates.detail_once
    yield Part(EVALUATION, f"{tokens:,} tokens", evaluation + report + 2 * len(DEFAULT_PROMPTS) * rates.sample)
    yield Part(PAGE, "", PAGE_SECONDS)


def say_plan(config: RunConfig, base: Any, parts: Sequence[Part], rates: Rates, quick: float | None = None) -> None:
    """Logs a run's parts with their estimated times and, where they are long, the settings that would shorten it.

    Args:
        base: the model that is converted.
        quick: estimated seconds of the same run with `--quick`; None where that is no choice.
    """
    whole, reason = sum(part.seconds for part in parts), getattr(base, DTYPE_REASON, None)
    wide = max(len(part.work) for part in parts)
    lines = [f"{part.name:<16}{part.work:<{wide}}  {duration(part.seconds):>8}" for part in parts]
    logger.info(
        "plan for %s in %s%s; times from timing %s tokens of text on this machine:\n%s",
        config.model.base_model_name, str(base.dtype).removeprefix("torch."), "" if reason is None else f" ({reason})",
        f"{rates.timed_tokens:,}",
        "\n".join([*(f"  {line}" for line in lines), f"  {'together':<16}{'':<{wide}}  {duration(whole):>8}"]),
    )  # fmt: skip
    if whole > LONG and (advice := list(_shorter(config, parts, whole, quick))):
        logger.info("shorter: %s", "; ".join(advice))


def _shorter(config: RunConfig, parts: Sequence[Part], whole: float, quick: float | None) -> Iterator[str]:
    """The settings to turn, those of the parts that take a fifth of the run or more."""
    t, d = config.training, config.data
    if quick is not None and quick < whole / 2:
        yield f"--quick ({duration(quick)}: calibration on little text, no training)"
    less = own_train_blocks(config) < (d.num_train_samples or 0)
    name = "num_calibration_samples" if less else "num_train_samples"
    turn = {
        SAMPLING: f"data.{name}={getattr(d, name)} and data.num_eval_samples={d.num_eval_samples}, or text of "
        "your own with data.dataset_name=text",
        CALIBRATION: f"data.num_calibration_samples={d.num_calibration_samples}",
        TARGETS: f"data.num_train_samples={d.num_train_samples}",
        TRAINING: f"training.num_train_steps={'null' if t.num_train_steps is None else t.num_train_steps}",
        EVALUATION: f"data.num_eval_samples={'null' if d.num_eval_samples is None else d.num_eval_samples}",
    }
    for part in sorted(parts, key=lambda part: -part.seconds):
        if part.name in turn and part.seconds >= whole / 5:
            yield f"{part.name}: lower {turn[part.name]}"


def say_times(parts: Sequence[Part], taken: Stopwatch, folder: Path | None = None) -> None:
    """Logs each part's estimate beside the time it took, and keeps both in a run's folder, if one is given."""
    estimated = {part.name: part.seconds for part in parts}
    names = [name for name in taken.seconds if name in estimated]
    rows = [(name, estimated[name], taken.seconds[name]) for name in names]
    rows.append(("together", sum(row[1] for row in rows), sum(row[2] for row in rows)))
    logger.info(
        "times, estimated and taken:\n%s",
        "\n".join(f"  {name:<16}{duration(guess):>8}  {duration(seconds):>8}" for name, guess, seconds in rows),
    )
    found = {name: {"estimated_seconds": guess, "seconds": seconds} for name, guess, seconds in rows}
    if folder is None:
        return
    others = {name: {"seconds": seconds} for name, seconds in taken.seconds.items() if name not in estimated}
    write_json(folder / TIMING, {**others, **found})
