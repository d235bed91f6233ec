"""The run's own code timed on a little text, on the machine and with the model that the run is for."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import datasets
import torch
from torch import Tensor

from npt.block.families import blocks_of
from npt.common.display import quiet
from npt.common.options import is_calibrated
from npt.common.processes import any_process, first_does, world
from npt.common.sharded import through
from npt.config import RunConfig
from npt.data.batches import batches_of
from npt.data.sampling import default_batch, seconds_per_draw
from npt.equivalence.calibration_time import FitSeconds, fit_seconds
from npt.equivalence.objectives import Objective
from npt.equivalence.prediction import passes_alone
from npt.evaluation.details import Details
from npt.evaluation.divergence import token_divergences
from npt.evaluation.generation import DEFAULT_PROMPTS, side_by_side
from npt.evaluation.least_norm import LeastNorms
from npt.evaluation.look import observe
from npt.evaluation.weight_deltas import WeightDeltas
from npt.finetuning.anchor import ANCHOR
from npt.finetuning.objective import LanguageModelObjective
from npt.runs.texts import own_train_blocks
from npt.tuner.converted import active_layers, adapter_config, device_of, eval_mode, run_backbone

#: Seconds that a timed call should last, so that what is done once in it does not count; the text is chosen for that.
TIMED_SECONDS = 0.1
#: A call that took longer is not repeated.
LONG_SECONDS = 0.5
#: Tokens that each model writes in the timing of a sample, and in a sample.
TIMED_TOKENS, SAMPLE_TOKENS = 4, 48
#: Backward passes cost about two forward passes where they can't be timed alone (several processes).
STEP_FORWARDS = 3.0
#: A checkpointed backward pass runs each block's forward once more.
CHECKPOINTING = 4 / 3

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Rates:
    """Seconds of a run's parts on this machine.

    timed_tokens: of the text that was timed. draw: a token of each of `draw_rows` texts that the model writes, draw_one: of
    a single one. forward: a token through the original's blocks. blocks: of the model. alone: a token through the model
    with each converted block alone, twice in half precision. fit: of the calibration of all blocks, above the forward.
    compare: a token through both models. step: {objective: a token through a training step}. detail: a token of the report's
    figures by block, and detail_once once. sample: a prompt continued by both models.
    """

    timed_tokens: int
    draw: float
    draw_one: float
    draw_rows: int
    forward: float
    fit: FitSeconds
    blocks: int
    alone: float
    compare: float
    step: dict[str, float]
    detail: float
    detail_once: float
    sample: float

    def writing(self, blocks: int, length: int) -> float:
        """Seconds in which the model writes so many blocks of `length` tokens, `draw_rows` at once."""
        if not blocks:
            return 0.0
        per_row = (self.draw - self.draw_one) / max(1, self.draw_rows - 1)
        batches = -(-blocks // self.draw_rows)
        return (length - 1) * (batches * (self.draw_one - per_row) + blocks * per_row)


def measure(
    model: Any, tokenizer: Any, config: RunConfig, trains: bool = True, tuned_by: LanguageModelObjective | None = None
) -> Rates:
    """Times a converted model; leaves weights, modes and random numbers as they were. All processes call it.

    Args:
        trains: False where nothing is calibrated or trained. tuned_by: the objective of a fine-tuning, which the figures by
            block are no part of.
    """
    with _undisturbed(model):
        trains = trains and config.model.carry != "exact"
        return through(model, lambda: _measure(model, tokenizer, config, trains, tuned_by))


def _measure(
    model: Any, tokenizer: Any, config: RunConfig, trains: bool, tuned_by: LanguageModelObjective | None
) -> Rates:
    device, base, length = device_of(model), model.get_base_model(), config.data.max_length
    batch = _text(tokenizer, 1, length, device)
    one = _seconds(lambda: _forward(model, batch), device)
    rows = first_does(lambda: max(1, min(config.training.batch_size, round(TIMED_SECONDS / max(one, 1e-9)))))
    batch = _text(tokenizer, rows, length, device)
    blocks = datasets.Dataset.from_dict({name: x.tolist() for name, x in batch.items()})
    tokens = rows * length
    forward = one if rows == 1 else _seconds(lambda: _forward(model, batch), device)
    calibrates = trains and config.training.calibrate and is_calibrated(config.model.carry, config.model.gain)
    objectives = _objectives(config, tuned_by) if trains and config.training.num_train_steps != 0 else []
    compare = _seconds(lambda: token_divergences(model, blocks, batch_size=rows), device)
    detail, detail_once = (0.0, 0.0) if tuned_by else _detail(model, tokenizer, blocks, device)
    sample = _seconds(lambda: side_by_side(model, tokenizer, DEFAULT_PROMPTS[:1], TIMED_TOKENS), device)
    draw_rows, draws = 0, (0.0, 0.0)
    to_draw = _blocks_to_draw(config, tuned_by)
    if to_draw:
        draw_rows = min(to_draw, default_batch(base, length))
        draws = seconds_per_draw(base, 1, length), seconds_per_draw(base, draw_rows, length)
    return Rates(
        timed_tokens=tokens,
        draw=draws[1],
        draw_one=draws[0],
        draw_rows=draw_rows,
        forward=forward / tokens,
        fit=fit_seconds(active_layers(model)) if calibrates and world()[1] == 1 else FitSeconds(),
        blocks=len(blocks_of(base)),
        alone=(passes_alone(model) + 1) * compare / tokens / 2 if calibrates else 0.0,
        compare=compare / tokens,
        step={own.name: _step(model, own, batch, forward, config) / tokens for own in objectives},
        # The last of its figures, by position, is a comparison.
        detail=0.0 if tuned_by else detail / length + compare / tokens,
        detail_once=detail_once,
        sample=sample / TIMED_TOKENS * SAMPLE_TOKENS,
    )


def _detail(model: Any, tokenizer: Any, blocks: datasets.Dataset, device: torch.device) -> tuple[float, float]:
    """Seconds that the figures by block add to one block of text, without those by position, and once for all text.

    What is done once is timed for one converted block and counted for each.
    """
    layers, batch = active_layers(model), next(batches_of(blocks, 1, device))
    last = [layers[-1].index]
    with eval_mode(model):
        alone = _seconds(lambda: observe(model, [batch], []), device)
        details = _seconds(lambda: observe(model, [batch], Details(model).observers), device)
        deltas, norms = WeightDeltas(model), LeastNorms(model, last)
        observe(model, [batch], [deltas, norms])
        once = _seconds(lambda: (deltas.figures(tokenizer, last), norms.figures()), device)
    return max(0.0, details - alone), len(layers) * once


def _text(tokenizer: Any, rows: int, length: int, device: torch.device) -> Batch:
    """Blocks of plain text, over and over: any id might be one that stands for a picture."""
    written = tokenizer(" ".join(DEFAULT_PROMPTS), add_special_tokens=False)["input_ids"] or [0]
    ids = torch.tensor(written, device=device).repeat(-(-rows * length // len(written)))[: rows * length]
    ids = ids.view(rows, length)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def _forward(model: Any, batch: Batch) -> None:
    with eval_mode(model), torch.no_grad():
        run_backbone(model, {name: x for name, x in batch.items() if name != "labels"})


def _objectives(config: RunConfig, tuned_by: LanguageModelObjective | None) -> list[Any]:
    """The objectives of the run's training."""
    t = config.training
    if tuned_by is not None:
        return [tuned_by]
    options: Any = {"regularization_weight": t.regularization_weight, "regularizer": t.regularizer}
    return [Objective(name, **options) for name in t.objectives()]


def _blocks_to_draw(config: RunConfig, tuned_by: LanguageModelObjective | None) -> int:
    """The most blocks of one text that the base writes; 0 where it writes none."""
    if tuned_by is not None:
        return config.finetuning.num_anchor_samples if tuned_by.anchor_weight else 0
    return (own_train_blocks(config) or 1) if config.data.dataset_name == "self" else 0


def _step(model: Any, objective: Any, batch: Batch, forward: float, config: RunConfig) -> float:
    """Seconds of a training step's forward and backward on a batch."""
    if world()[1] > 1:
        anchored = bool(getattr(objective, "anchor_weight", 0))  # a forward of the original, and a step
        return (STEP_FORWARDS + anchored * (STEP_FORWARDS + 1)) * forward
    t, device = config.training, device_of(model)
    batch = {**batch, ANCHOR: batch["input_ids"]}
    objective.prepare(model, batch)
    kind = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(config.optimization.mixed_precision)

    def step() -> None:
        with nullcontext() if kind is None else torch.autocast(device.type, kind):
            loss = objective(model, batch, float(batch["input_ids"].numel())).total
        if loss.requires_grad:
            loss.backward()

    model.train()
    return _seconds(step, device) * (CHECKPOINTING if t.gradient_checkpointing else 1)


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of a call; of the second one where the first was short, since libraries do much at a first call."""
    found = 0.0
    for _ in range(2):
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found = time.perf_counter() - start
        if any_process(found > LONG_SECONDS):
            break
    return found


@contextmanager
def _undisturbed(model: Any) -> Iterator[None]:
    """Puts back the trained values, their gradients, the modes and the random state."""
    modes = {module: module.training for module in model.modules()}
    own = {name: p for name, p in model.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in own.items()}
    adapter, record = adapter_config(model), adapter_config(model).text_record
    adapter.text_record = None  # the text is none that the run is about
    devices = [device_of(model)] if device_of(model).type == "cuda" else []
    with torch.random.fork_rng(devices), quiet("npt.equivalence.calibration"):
        try:
            yield
        finally:
            with torch.no_grad():
                for name, p in own.items():
                    p.copy_(before[name])
                    p.grad = None
            adapter.text_record = record
            for module, training in modes.items():
                module.training = training
