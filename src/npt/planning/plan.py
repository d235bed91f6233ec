"""The plan of a run, made before it starts and from shapes alone: memory of each of its phases and work of a step.

Memory is that of the run's own code on the meta device, with allocations counted (`npt.planning.counters`). Work is the
floating point operations and bytes moved by a training step; `npt.planning.timing` turns it into time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import datasets
import torch
from torch import Tensor

from npt.block.families import blocks_of
from npt.common.limits import check_length
from npt.common.options import is_calibrated
from npt.config import DataSection, OptimizationSection, RunConfig, TrainingSection
from npt.data.sampling import default_batch, draw, preallocated_cache
from npt.equivalence.block_fit import first_bytes, first_tokens
from npt.equivalence.calibration import fit_components
from npt.equivalence.objectives import Objective, objective_class
from npt.equivalence.parts import SLICE_TOKENS
from npt.equivalence.scale import CHECKED_EVERY, TOKENS_PER_UNIT
from npt.equivalence.teacher import bytes_per_block
from npt.evaluation.details import Details
from npt.evaluation.divergence import token_divergences
from npt.evaluation.look import STREAM_ROWS
from npt.finetuning.anchor import ANCHOR
from npt.finetuning.objective import LanguageModelObjective
from npt.planning.counters import AllocationCounter, PretendValues, WorkCounter
from npt.planning.shapes import (
    MOMENTS_BYTES,
    OWN_BYTES,
    dtype_of,
    enable_checkpointing,
    load_shapes,
    quiet,
    shapes_of,
)
from npt.planning.shards import DDP, Spread, spread_over, strategy_of
from npt.runs.texts import own_train_blocks
from npt.tuner.converted import active_layers, adapter_config, component_ids, eval_mode, hidden_dtype

#: Bytes per weight of a quantised linear: 8 bits and a scale per row; 4 bits and a float32 scale per 64 weights.
BYTES_8BIT, BYTES_4BIT = 1.0, 0.5 + 4 / 64
#: Bytes that the libraries keep once they have worked: kernels' buffers, threads, modules imported on the way.
OVERHEAD = 220 * 2**20
#: The tensors of a batch.
COLUMNS = ("input_ids", "attention_mask", "labels")

Batch = dict[str, Tensor]
#: While hidden units are fitted, the share of a block's inputs that checks them is copied. Several processes hold
#: the inputs of all tokens twice more: as they came, and in order.
CHECKED_COPIES, GATHERED_COPIES = 1 / CHECKED_EVERY, 2


@dataclass(frozen=True)
class Phase:
    """A part of a run.

    bytes: allocated by it above the weights. optimizer: True where AdamW's moments are on the device beside them.
    """

    name: str
    bytes: int
    optimizer: bool = True


@dataclass(frozen=True)
class Plan:
    """The needs of each process of a run, in bytes above those of a process that has imported its libraries.

    weights: of base and components on the device. optimizer: AdamW's moments. phases: above those. step_flops and
    step_traffic: floating point operations and bytes moved by one micro-batch's forward and backward. disk: bytes of
    teacher targets per block of text, 0 where none are kept. temporary: bytes of the files that all processes keep until
    the end of calibration. spread: how weights and work lie on the processes.
    """

    weights: int
    optimizer: int
    phases: tuple[Phase, ...]
    step_flops: float
    step_traffic: float
    disk: int
    temporary: int
    spread: Spread

    def step_seconds(self, flops: float, traffic: float) -> float:
        """Seconds of one micro-batch on a machine of so many floating point operations and bytes moved per second."""
        return self.step_flops / flops + self.step_traffic / traffic

    @property
    def peak(self) -> int:
        """Most bytes that a process has allocated at once in the whole run."""
        above = max(phase.bytes + self.optimizer * phase.optimizer for phase in self.phases)
        return self.weights + self.spread.gathered + OVERHEAD + above


def plan_run(config: RunConfig, hf_config: Any = None, processes: int = 1, strategy: str | None = None) -> Plan:
    """The plan of `npt train` with this configuration.

    Args:
        hf_config: the base's configuration, where it is loaded already. processes: that the run is started with.
        strategy: of `npt.planning.shards`; None for the configuration's.

    Raises:
        NPTError: the model's configuration can't be loaded, or the model can't be converted.
    """
    strategy = strategy_of(config.optimization.fsdp, processes) if strategy is None else strategy
    hf_config = load_shapes(config) if hf_config is None else hf_config
    model = shapes_of(hf_config, config.model, dtype_of(config.model.dtype, hf_config))
    return plan_model(model, config, processes, strategy)


def plan_model(
    model: Any, config: RunConfig, processes: int, strategy: str, tuned_by: LanguageModelObjective | None = None
) -> Plan:
    """The plan of a run with a model of `shapes_of`, which is left with gradient checkpointing as the run has it.

    Args:
        tuned_by: the objective of a fine-tuning; None for an equivalence training.

    Raises:
        DataError: blocks of `data.max_length` are longer than the model's context.
    """
    training, data = config.training, config.data
    check_length(model.config, data.max_length, "data.max_length")
    spread = spread_over(model, training, processes, weight_bytes(model, config.optimization), strategy)
    work = WorkCounter()
    phases = tuple(_phases(model, config, processes, work, tuned_by))
    return Plan(
        # DDP keeps a second copy of the gradients, in the buckets it sends.
        weights=spread.base + OWN_BYTES * spread.own * (2 if strategy == DDP else 1),
        optimizer=MOMENTS_BYTES * spread.own if training.num_train_steps != 0 else 0,
        phases=phases,
        step_flops=work.flops,
        step_traffic=work.traffic,
        disk=0 if config.paths.teacher_cache is None else _target_bytes(model, training, data.max_length),
        temporary=_temporary(model, config, processes) if tuned_by is None else 0,
        spread=spread,
    )


def _temporary(model: Any, config: RunConfig, processes: int) -> int:
    """Bytes of calibration's temporary files, of all processes together."""
    training, data = config.training, config.data
    if not (training.calibrate and is_calibrated(config.model.carry, config.model.gain)):
        return 0
    at_once = processes * training.batch_size * data.max_length
    tokens = data.num_calibration_samples * data.max_length
    return first_bytes(active_layers(model), tokens, at_once, hidden_dtype(model))


def _target_bytes(model: Any, training: TrainingSection, length: int) -> int:
    """Bytes of teacher targets per block of text, for all objectives of the run."""
    kinds = {objective_class(name).teacher_kind for name in training.objectives()}
    return sum(bytes_per_block(model, kind, training.teacher_top_k, length) for kind in kinds)


def weight_bytes(model: Any, optimization: OptimizationSection) -> int:
    """Bytes of the frozen base on the device: quantised, or all blocks' linears but the largest offloaded, as asked."""
    ours = component_ids(model)
    blocks: Any = blocks_of(model.get_base_model())
    linear = {
        id(module.weight): layer
        for layer, block in enumerate(blocks)
        for module in block.modules()
        if isinstance(getattr(module, "weight", None), Tensor) and module.weight.dim() == 2
    }
    per_weight = BYTES_8BIT if optimization.use_8bit else BYTES_4BIT if optimization.use_4bit else None
    total = 0.0
    largest: dict[int, float] = {}
    for parameter in {id(p): p for p in model.parameters() if id(p) not in ours}.values():
        size = parameter.numel() * (per_weight if per_weight and id(parameter) in linear else parameter.element_size())
        if optimization.use_cpu_offload and id(parameter) in linear:
            block = linear[id(parameter)]
            largest[block] = max(largest.get(block, 0), size)
        else:
            total += size
    return int(total + max(largest.values(), default=0))


def allocation_peak(model: Any, run: Callable[[], object]) -> int:
    """Most bytes that a call allocates at once, on a model of `shapes_of`; the model's gradients are dropped after it."""
    with quiet("npt.equivalence.calibration"), PretendValues(), AllocationCounter() as counter:
        run()
    model.zero_grad(set_to_none=True)
    return counter.peak


def training_step_peak(
    model: Any,
    objective: str | LanguageModelObjective,
    make_batch: Callable[[], Batch],
    tokens: int,
    *,
    regularization_weight: float = 0.0,
    work: WorkCounter | None = None,
) -> int:
    """Most bytes that one micro-batch's forward and backward allocate at once, with the real objective.

    Args:
        objective: one of `npt.equivalence.objectives.OBJECTIVES`, or that of a fine-tuning. tokens: of the batch.
        make_batch: called while allocations are counted; a batch that exists before the call does not count.
        work: counts the step's operations too.
    """

    def step() -> None:
        scales = {layer.index: 1.0 for layer in active_layers(model)}
        with nullcontext() if work is None else work:
            loss: Any = objective
            if isinstance(objective, str):
                loss = Objective(objective, scales=scales, regularization_weight=regularization_weight)
            total = loss(model, make_batch(), float(tokens)).total
            if total.requires_grad:
                total.backward()

    model.train()
    return allocation_peak(model, step)


def _phases(
    model: Any, config: RunConfig, processes: int, work: WorkCounter, tuned_by: LanguageModelObjective | None
) -> Iterator[Phase]:
    """The phases of a run, in their order. work: counts the training step. tuned_by: as `plan_model`."""
    training, data = config.training, config.data
    size, length, adapter = training.batch_size, data.max_length, adapter_config(model)
    exact = adapter.carry == "exact"
    yield Phase("loading", 0, optimizer=False)
    anchored = tuned_by is not None and tuned_by.anchor_weight > 0
    if data.dataset_name == "self" or anchored:
        blocks = config.finetuning.num_anchor_samples if anchored else own_train_blocks(config) or 1
        rows = min(default_batch(model.get_base_model(), length), blocks)
        yield Phase("sampling text", allocation_peak(model, lambda: _first_token(model, rows, length)), optimizer=False)
    if training.calibrate and is_calibrated(adapter.carry, adapter.gain):
        yield Phase("calibration", _calibration_peak(model, size, data, processes), optimizer=False)
    if training.num_train_steps != 0 and not exact:
        if training.gradient_checkpointing:
            # Before `train()`, as Trainer does it: the adapter looks then whether it is on.
            enable_checkpointing(model.get_base_model())
        peak = training_step_peak(
            model,
            training.objectives()[-1] if tuned_by is None else tuned_by,
            lambda: _batch(size, length, (*COLUMNS, ANCHOR) if anchored else COLUMNS),
            size * length,
            regularization_weight=training.regularization_weight,
            work=work,
        )
        yield Phase("training step", peak)
    yield from _evaluation_phases(model, size, length, with_blocks=tuned_by is None)


def _batch(rows: int, length: int, columns: Sequence[str] = COLUMNS) -> Batch:
    """A batch without values."""
    return {name: torch.ones(rows, length, dtype=torch.long, device="meta") for name in columns}


@torch.no_grad()
def _first_token(model: Any, rows: int, length: int) -> None:
    """Samples the first token of `rows` texts; the cache is allocated whole before it."""
    base = model.get_base_model()
    cache = preallocated_cache(base, length - 1)
    ids = torch.ones(rows, 1, dtype=torch.long, device="meta")
    logits = base(input_ids=ids, past_key_values=cache, use_cache=True).logits[:, -1]
    draw(logits, torch.ones(rows, device="meta"))


def _calibration_peak(model: Any, rows: int, data: DataSection, processes: int) -> int:
    """Most bytes of calibration: measured over its first batches, with what the further ones keep added.

    Until the first fit, h and a of every token are in a temporary file; the fit of a block reads them part by part.
    """
    layers = active_layers(model)
    hidden, at_once = layers[0].shape("up")[0], rows * data.max_length
    tokens = min(first_tokens(layers), data.num_calibration_samples * data.max_length)
    own, spec = -(-tokens // processes), layers[0].own.spec
    batches = -(-min(own, SLICE_TOKENS) // at_once)
    inputs = float(max(0, own - batches * at_once) * (spec.gain == "state"))  # of one block, for the scale
    if layers[0].own.hidden_units is not None and tokens >= TOKENS_PER_UNIT * spec.gain_units:
        inputs += tokens * (CHECKED_COPIES + GATHERED_COPIES * (processes > 1))
    kept = 4 * hidden * inputs
    kept += 16 * hidden**2 * (processes > 1)  # the sums of one block, copied to be added up over the processes
    text = [_batch(rows, data.max_length) for _ in range(batches + 1)]
    return int(kept) + allocation_peak(model, lambda: fit_components(model, text, chunk_tokens=batches * at_once))


def _evaluation_phases(model: Any, rows: int, length: int, *, with_blocks: bool) -> Iterator[Phase]:
    """The phases of the evaluation. rows: of a batch. with_blocks: True where there are figures by block."""
    with eval_mode(model):
        # Positions past the training length are evaluated too, where the model reaches that far.
        context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 0
        longest = _blocks(rows, 2 * length if context >= 2 * length else length)
        runs: dict[str, Callable[[], object]] = {
            "divergence": lambda: token_divergences(model, longest, batch_size=rows),
            "blocks and weight deltas": lambda: _observed(model, _blocks(min(rows, STREAM_ROWS), length)),
        }
        for name, run in runs.items() if with_blocks else [("divergence", runs["divergence"])]:
            yield Phase(f"evaluation: {name}", allocation_peak(model, run))


def _blocks(rows: int, length: int) -> datasets.Dataset:
    """Blocks of text without a meaning."""
    return datasets.Dataset.from_dict({name: [[1] * length] * rows for name in COLUMNS})


def _observed(model: Any, blocks: datasets.Dataset) -> None:
    """One batch of the evaluation of which the figures by block are taken too."""
    token_divergences(model, blocks, batch_size=len(blocks), observers=Details(model).observers, observed=len(blocks))
