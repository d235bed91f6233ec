"""What a run needs, before it starts and from shapes alone: memory of each of its phases, time of a step, and which
option helps when it does not fit.

Memory is that of the run's own code on the meta device, allocations counted (`npt.planning.shapes`). Time is the step's
floating point operations and bytes moved, over what this machine does in a short measurement (over a data sheet:
`npt.planning.timing`).
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import datasets
import psutil  # type: ignore[import-untyped]
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from npt.block.families import blocks_of
from npt.block.modes import Mode
from npt.config import RunConfig, with_overrides
from npt.data.sampling import default_batch, draw, preallocated_cache
from npt.equivalence.calibration import SLICE_TOKENS, calibrate, first_tokens
from npt.equivalence.objectives import Objective, objective_class
from npt.equivalence.teacher import bytes_per_block
from npt.errors import NPTError
from npt.evaluation.block_errors import layer_equivalence, residual_stream
from npt.evaluation.divergence import token_divergences
from npt.evaluation.evaluate import DETAIL_BLOCKS
from npt.evaluation.weight_deltas import delta_records
from npt.planning.shapes import (
    AllocationCounter,
    PretendValues,
    dtype_of,
    enable_checkpointing,
    load_shapes,
    quiet,
    shapes_of,
)
from npt.planning.shards import DDP, FSDP2, Spread, spread_over, strategy_of
from npt.tuner.converted import active_layers, eval_mode

#: Bytes per weight of a quantised linear: 8 bits and a scale per row; 4 bits and a float32 scale per 64 weights.
BYTES_8BIT, BYTES_4BIT = 1.0, 0.5 + 4 / 64
#: What the libraries keep once they have worked: kernels' buffers, threads, modules imported on the way.
OVERHEAD = 220 * 2**20
#: Of a batch.
COLUMNS = ("input_ids", "attention_mask", "labels")


@dataclass(frozen=True)
class Phase:
    """A part of a run and the bytes it allocates above what stays."""

    name: str
    bytes: int


@dataclass(frozen=True)
class Plan:
    """What each process of a run needs, in bytes above a process that has imported its libraries.

    weights: of base and components on the device. optimizer: AdamW's moments. phases: above those. step_flops and
    step_traffic: floating point operations and bytes moved by one micro-batch's forward and backward. disk: bytes of
    teacher targets per block of text, 0 where none are kept. spread: how weights and work lie on the processes.
    """

    weights: int
    optimizer: int
    phases: tuple[Phase, ...]
    step_flops: float
    step_traffic: float
    disk: int
    spread: Spread

    def step_seconds(self, flops: float, traffic: float) -> float:
        """Of one micro-batch, on a machine of so many floating point operations and bytes moved per second."""
        return self.step_flops / flops + self.step_traffic / traffic

    @property
    def peak(self) -> int:
        """Of the whole run."""
        above = max(p.bytes + self.optimizer * _has_optimizer(p) for p in self.phases)
        return self.weights + self.spread.gathered + OVERHEAD + above


def _has_optimizer(phase: Phase) -> bool:
    return phase.name not in ("loading", "sampling text", "calibration")


def plan_run(config: RunConfig, hf_config: Any = None, processes: int = 1, strategy: str | None = None) -> Plan:
    """The plan of `npt train` with this configuration.

    processes: that the run is started with. strategy: of `npt.planning.shards`; None for the configuration's.

    Raises:
        NPTError: the model's configuration can't be loaded, or the model can't be converted.
    """
    strategy = strategy_of(config, processes) if strategy is None else strategy
    hf_config = load_shapes(config) if hf_config is None else hf_config
    model = shapes_of(hf_config, config.model, dtype_of(config.model.dtype, hf_config))
    return plan_model(model, config, processes, strategy)


def plan_model(model: Any, config: RunConfig, processes: int, strategy: str) -> Plan:
    """The plan of a run with a model of `shapes_of`, which is left with gradient checkpointing as the run has it."""
    t, optimization = config.training, config.optimization
    spread = spread_over(model, config, processes, weight_bytes(model, optimization), strategy)
    step = _Work()
    phases = [Phase("loading", 0)]
    for name, more, run in _runs(model, config, step, processes):
        with quiet("npt.equivalence.calibration"), PretendValues(), AllocationCounter() as counter:
            run()
        phases.append(Phase(name, more + counter.peak))
        model.zero_grad(set_to_none=True)
    return Plan(
        # DDP keeps a second copy of the gradients, in the buckets it sends.
        weights=spread.base + 4 * spread.own * (2 if strategy == DDP else 1),
        optimizer=8 * spread.own if t.num_train_steps != 0 else 0,
        phases=tuple(phases),
        step_flops=step.flops,
        step_traffic=step.traffic,
        disk=_target_bytes(model, config),
        spread=spread,
    )


def _target_bytes(model: Any, config: RunConfig) -> int:
    if config.paths.teacher_cache is None:
        return 0
    kinds = {objective_class(name).teacher_kind for name in config.training.objectives()}
    return sum(bytes_per_block(model, kind, config.training.teacher_top_k, config.data.max_length) for kind in kinds)


def weight_bytes(model: Any, optimization: Any) -> int:
    """Bytes of the frozen base on the device."""
    ours = {id(p) for layer in active_layers(model) for p in layer.parameters()}
    blocks: Any = blocks_of(model.get_base_model())
    linear = {
        id(module.weight): layer
        for layer, block in enumerate(blocks)
        for module in block.modules()
        if isinstance(getattr(module, "weight", None), Tensor) and module.weight.dim() == 2
    }
    per_weight = BYTES_8BIT if optimization.use_8bit else BYTES_4BIT if optimization.use_4bit else None
    total = 0.0
    per_block: dict[int, float] = {}
    for parameter in {id(p): p for p in model.parameters() if id(p) not in ours}.values():
        size = parameter.numel() * (per_weight if per_weight and id(parameter) in linear else parameter.element_size())
        if optimization.use_cpu_offload and id(parameter) in linear:
            block = linear[id(parameter)]
            per_block[block] = max(per_block.get(block, 0), size)
        else:
            total += size
    return int(total + max(per_block.values(), default=0))


def _runs(
    model: Any, config: RunConfig, step: _Work, processes: int = 1
) -> Iterator[tuple[str, int, Callable[[], Any]]]:
    """(phase, bytes beside those the run below allocates, what it runs), in the order of a run."""
    t, length = config.training, config.data.max_length
    objective = {"auto": "logits"}.get(t.objective, t.objective)

    def batch(rows: int = t.batch_size) -> dict[str, Tensor]:
        return {name: torch.ones(rows, length, dtype=torch.long, device="meta") for name in COLUMNS}

    if config.data.dataset_name == "self":
        yield "sampling text", 0, lambda: _sample_step(model, config)
    if t.calibrate and config.model.carry != "exact":
        hidden = active_layers(model)[0].shape("up")[0]
        at_once = t.batch_size * length
        tokens = min(first_tokens(hidden), config.data.num_calibration_samples * length)
        tokens = -(-tokens // processes)  # each keeps its own batches' part of them
        # Followed for a few batches; what is not, is h and a of further tokens kept before the first fit.
        batches = -(-min(tokens, SLICE_TOKENS) // at_once)
        kept = 2 * hidden * model.dtype.itemsize * len(active_layers(model)) * max(0, tokens - batches * at_once)
        kept += 16 * hidden**2 * (processes > 1)  # the sums of one block, copied to be added up over the processes
        text = [batch() for _ in range(batches + 1)]
        yield "calibration", kept, lambda: calibrate(model, text, chunk_tokens=batches * at_once)
    if t.num_train_steps != 0 and config.model.carry != "exact":

        def train() -> None:
            scales = {layer.index: 1.0 for layer in active_layers(model)}
            with step:
                loss = Objective(objective, scales=scales, regularization_weight=t.regularization_weight)
                loss(model, batch(), float(t.batch_size * length)).total.backward()

        if t.gradient_checkpointing:
            enable_checkpointing(model.get_base_model())
        model.train()  # after it, as Trainer does: the adapter looks then at what is on
        yield "training step", 0, train
    detail = [batch(min(DETAIL_BLOCKS, t.batch_size))]
    with eval_mode(model):
        # Positions past the training length are evaluated too, where the model reaches that far.
        context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 0
        ones = [1] * (2 * length if context >= 2 * length else length)
        longest = datasets.Dataset.from_dict({name: [ones] * t.batch_size for name in COLUMNS})
        yield "evaluation: divergence", 0, lambda: token_divergences(model, longest, batch_size=t.batch_size)
        yield "evaluation: blocks", 0, lambda: (layer_equivalence(model, detail), residual_stream(model, detail))
        yield "evaluation: weight deltas", 0, lambda: _deltas(model, detail)


def _deltas(model: Any, batches: list[dict[str, Tensor]]) -> Any:
    return delta_records(model, batches), delta_records(model, batches, Mode.EXACT)


#: Fused attention, which torch's counter does not know for the CPU: (floating point operations, tensors they depend on).
_ATTENTION: dict[Any, tuple[Callable[..., Any], int]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default: (sdpa_flop_count, 3),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default: (sdpa_backward_flop_count, 4),
}


class _Work(TorchDispatchMode):
    """Counts floating point operations and the bytes that all other operators read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.flops, self.traffic = 0.0, 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            self.flops += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=result)
        elif func in _ATTENTION:  # causal: half of the products are left out
            count, first = _ATTENTION[func]
            self.flops += count(*(tensor.shape for tensor in args[:first])) / 2
        elif not any(r.alias_info for r in func._schema.returns if not r.alias_info or not r.alias_info.is_write):
            tensors = [t for t in tree_iter((args, kwargs, result)) if isinstance(t, Tensor)]
            self.traffic += sum(t.numel() * t.element_size() for t in tensors)
        return result


@torch.no_grad()
def _sample_step(model: Any, config: RunConfig) -> None:
    """The first token: the cache is allocated whole."""
    base, length = model.get_base_model(), config.data.max_length
    rows = min(default_batch(base, length), config.data.num_train_samples or 1)
    cache = preallocated_cache(base, length - 1)
    ids = torch.ones(rows, 1, dtype=torch.long, device="meta")
    logits = base(input_ids=ids, past_key_values=cache, use_cache=True).logits[:, -1]
    draw(logits, torch.ones(rows, device="meta"))


def device_memory(device: torch.device) -> int:
    """Bytes a run may use on this machine: the GPU's memory, or what main memory has left."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return int(psutil.virtual_memory().available)


#: What saves memory, in the order in which it costs least: (keys to set, whether it is for this run).
_SAVINGS: list[tuple[dict[str, Any], Callable[[RunConfig], bool]]] = [
    ({"model.dtype": "bfloat16"}, lambda c: c.model.dtype != "bfloat16"),
    ({"training.gradient_checkpointing": True}, lambda c: c.training.objective != "local"),
    ({"training.batch_size": 1}, lambda c: c.training.batch_size > 1),
    ({"training.objective": "local"}, lambda c: c.training.objective in ("auto", "logits")),
    ({"optimization.use_8bit": True}, lambda c: not c.optimization.use_cpu_offload),
    ({"optimization.use_8bit": False, "optimization.use_4bit": True}, lambda c: not c.optimization.use_cpu_offload),
    ({"optimization.use_4bit": False, "optimization.use_cpu_offload": True}, lambda c: True),
]
#: Of several processes, in the place of the last three, which don't go with it.
_SHARDED: tuple[dict[str, Any], Callable[[RunConfig], bool]] = (
    {"optimization.fsdp": True},
    lambda c: not any(getattr(c.optimization, name) for name in ("fsdp", "use_8bit", "use_4bit", "use_cpu_offload")),
)


def advice(config: RunConfig, limit: int, hf_config: Any = None, plan: Plan | None = None) -> tuple[list[str], Plan]:
    """(overrides that bring the run's memory under `limit` bytes, its plan then); all of them where none suffices.

    plan: the configuration's, where it is known already; that of one process otherwise.
    """
    changes: dict[str, Any] = {}
    plan = plan_run(config, hf_config) if plan is None else plan
    processes, strategy = plan.spread.processes, plan.spread.strategy
    for values, concerns in _SAVINGS if processes == 1 else [*_SAVINGS[:-3], _SHARDED]:
        if plan.peak <= limit:
            break
        if not concerns(config):
            continue
        changes |= values
        if "training.batch_size" in values:
            changes["training.gradient_accumulation_steps"] = (
                config.training.batch_size * config.training.gradient_accumulation_steps
            )
        config = with_overrides(config, changes)
        plan = plan_run(config, hf_config, processes, FSDP2 if config.optimization.fsdp else strategy)
    return [f"{key}={str(value).lower()}" for key, value in changes.items() if value is not False], plan


@torch.no_grad()
def machine_speed(device: torch.device, dtype: torch.dtype, seconds: float = 0.5) -> tuple[float, float]:
    """(floating point operations, bytes moved) per second of this machine, in products and sums of middling size."""
    x, w = (torch.ones(shape, dtype=dtype, device=device) for shape in ((1024, 1024), (1024, 2816)))
    wide = torch.ones(2**23, dtype=dtype, device=device)
    products = _rate(lambda: x @ w, 2 * x.shape[0] * w.numel(), seconds, device)
    return products, _rate(lambda: wide + wide, 3 * wide.numel() * wide.element_size(), seconds, device)


def _rate(run: Callable[[], Any], work: float, seconds: float, device: torch.device) -> float:
    times: list[float] = []
    run()
    while sum(times) < seconds:
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return work / sorted(times)[len(times) // 2]


def parse_bytes(text: str) -> int:
    """ "24GiB" or "24 GB" in bytes.

    Raises:
        NPTError: not a size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", text.strip(), re.IGNORECASE)
    if match is None:
        raise NPTError(f"--limit {text}: not a size; write a number and a unit, such as 24GiB")
    number, unit, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** ("KMGT".index(unit.upper()) + 1 if unit else 0))
