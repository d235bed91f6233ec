"""What a run needs, before it starts and from shapes alone: memory of each of its phases, time of a step, and which
option helps when it does not fit.

Memory is that of the run's own code on the meta device, allocations counted (`npt.meta`). Time is the step's floating
point operations and bytes moved, over what this machine does in a short measurement.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import datasets
import psutil
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode

from npt.calibration import calibrate, first_tokens
from npt.config import RunConfig
from npt.data.batches import batches_of
from npt.data.sampling import _draw, default_batch, preallocated_cache
from npt.evaluation.deltas import weight_delta_stats
from npt.evaluation.divergence import token_divergences
from npt.evaluation.layers import layer_equivalence, residual_stream
from npt.evaluation.report import DETAIL_BLOCKS
from npt.meta import AllocationCounter, PretendValues, dtype_of, enable_checkpointing, load_shapes, shapes_of
from npt.objectives import Objective
from npt.tuner import active_layers, eval_mode, parameter_counts

#: Bytes per weight of a quantised linear: 8 bits and a scale per row; 4 bits and a float32 scale per 64 weights.
BYTES_8BIT, BYTES_4BIT = 1.0, 0.5 + 4 / 64
#: What the libraries keep once they have worked: kernels' buffers, threads, modules imported on the way.
OVERHEAD = 160 * 2**20


@dataclass(frozen=True)
class Phase:
    """A part of a run and the bytes it allocates above what stays."""

    name: str
    bytes: int


@dataclass(frozen=True)
class Plan:
    """What a run needs, in bytes above a process that has imported its libraries.

    weights: of base and components on the device. optimizer: AdamW's moments. phases: above those. step_flops and
    step_traffic: floating point operations and bytes moved by one micro-batch's forward and backward.
    """

    weights: int
    optimizer: int
    phases: tuple[Phase, ...]
    step_flops: float
    step_traffic: float

    @property
    def peak(self) -> int:
        """Of the whole run."""
        return self.weights + OVERHEAD + max(p.bytes + self.optimizer * _has_optimizer(p) for p in self.phases)


def _has_optimizer(phase: Phase) -> bool:
    return phase.name not in ("loading", "sampling text", "calibration")


def plan_run(config: RunConfig, hf_config: Any = None) -> Plan:
    """The plan of `npt train` with this configuration.

    Raises:
        NPTError: the model's configuration can't be loaded, or the model can't be converted.
    """
    hf_config = load_shapes(config) if hf_config is None else hf_config
    model = shapes_of(hf_config, config.model, dtype_of(config.model.dtype, hf_config))
    t, optimization = config.training, config.optimization
    own, _ = parameter_counts(model)
    step = _Work()
    phases = [Phase("loading", 0)]
    for name, run in _runs(model, config, step):
        with PretendValues(), AllocationCounter() as counter:
            run()
        phases.append(Phase(name, counter.peak))
        model.zero_grad(set_to_none=True)
    return Plan(
        weights=weight_bytes(model, optimization) + 4 * own,
        optimizer=8 * own if t.num_train_steps != 0 else 0,
        phases=tuple(phases),
        step_flops=step.flops,
        step_traffic=step.traffic,
    )


def weight_bytes(model: Any, optimization: Any) -> int:
    """Bytes of the frozen base on the device."""
    ours = {id(p) for layer in active_layers(model) for p in layer.parameters()}
    linear = {
        id(module.weight): layer
        for layer, block in enumerate(_blocks(model))
        for module in block.modules()
        if isinstance(getattr(module, "weight", None), Tensor) and module.weight.dim() == 2
    }
    per_weight = BYTES_8BIT if optimization.use_8bit else BYTES_4BIT if optimization.use_4bit else None
    total, per_block = 0.0, {}
    for parameter in {id(p): p for p in model.parameters() if id(p) not in ours}.values():
        size = parameter.numel() * (per_weight if per_weight and id(parameter) in linear else parameter.element_size())
        if optimization.use_cpu_offload and id(parameter) in linear:
            block = linear[id(parameter)]
            per_block[block] = max(per_block.get(block, 0), size)
        else:
            total += size
    return int(total + max(per_block.values(), default=0))


def _blocks(model: Any) -> list[Any]:
    from npt.families import blocks_of

    return list(blocks_of(model.get_base_model()))


def _runs(model: Any, config: RunConfig, step: _Work) -> Iterator[tuple[str, Callable[[], Any]]]:
    """(phase, what it runs), in the order of a run."""
    t, length = config.training, config.data.max_length
    objective = {"auto": "logits"}.get(t.objective, t.objective)

    def batch(rows: int) -> dict[str, Tensor]:
        return {n: torch.ones(rows, length, dtype=torch.long, device="meta") for n in ("input_ids", "attention_mask", "labels")}

    if config.data.dataset_name == "self":
        yield "sampling text", lambda: _sample_step(model, config)
    if t.calibrate and config.model.carry != "exact":
        hidden = active_layers(model)[0].shape("up")[0]
        tokens = min(first_tokens(hidden), config.data.num_calibration_samples * length)
        batches = -(-tokens // (t.batch_size * length)) + 1
        yield "calibration", lambda: calibrate(model, [batch(t.batch_size) for _ in range(batches)])
    if t.num_train_steps != 0 and config.model.carry != "exact":

        def train() -> None:
            scales = {layer.index: 1.0 for layer in active_layers(model)}
            with step:
                loss = Objective(objective, scales=scales, regularization_weight=t.regularization_weight)
                loss(model, batch(t.batch_size), float(t.batch_size * length)).total.backward()

        if t.gradient_checkpointing:
            enable_checkpointing(model.get_base_model())
        yield "training step", train
    rows = min(DETAIL_BLOCKS, config.data.num_eval_samples or DETAIL_BLOCKS)
    detail = list(batches_of([{n: x.tolist() for n, x in _row(length).items()}] * rows, t.batch_size, torch.device("meta")))
    with eval_mode(model):
        yield "evaluation: divergence", lambda: token_divergences(model, _row_blocks(length, t.batch_size), batch_size=t.batch_size)
        yield "evaluation: blocks", lambda: (layer_equivalence(model, detail), residual_stream(model, detail))
        yield "evaluation: weight deltas", lambda: weight_delta_stats(model, detail)


def _row(length: int) -> dict[str, Tensor]:
    return {name: torch.ones(length, dtype=torch.long) for name in ("input_ids", "attention_mask", "labels")}


def _row_blocks(length: int, rows: int) -> datasets.Dataset:
    return datasets.Dataset.from_dict({n: [x.tolist()] * rows for n, x in _row(length).items()})


@torch.no_grad()
def _sample_step(model: Any, config: RunConfig) -> None:
    """The first token: the cache is allocated whole."""
    base, length = model.get_base_model(), config.data.max_length
    rows = min(default_batch(base, length), config.data.num_train_samples or 1)
    cache = preallocated_cache(base, length - 1)
    ids = torch.ones(rows, 1, dtype=torch.long, device="meta")
    logits = base(input_ids=ids, past_key_values=cache, use_cache=True).logits[:, -1]
    _draw(logits, torch.ones(rows, device="meta"))
