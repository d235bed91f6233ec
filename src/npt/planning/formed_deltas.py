"""The memory that per-token weight deltas would take if they were formed, beside what this implementation allocates.

Measured: tensors really allocated on the CPU, counted at every operator (not the process's resident size). Computed:
arithmetic on shapes, or the same code run on the meta device, where tensors have sizes but no memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig

from npt.block.component import ComponentSpec, NPComponent
from npt.block.deltas import down_deltas
from npt.config import OptimizationSection, RunConfig
from npt.planning.counters import AllocationCounter
from npt.planning.plan import Batch, training_step_peak, weight_bytes
from npt.planning.shapes import (
    LLAMA_7B,
    MOMENTS_BYTES,
    OWN_BYTES,
    dtype_of,
    enable_checkpointing,
    load_shapes,
    shapes_of,
    with_own_dtype,
)
from npt.tuner.converted import active_layers, parameter_counts

#: Blocks of a batch, and tokens of a block, where no configuration says otherwise.
BATCH, TOKENS = 4, 512
#: Most tokens that are measured at once. More are computed, so that a large batch does not fill the memory it asks about.
MEASURED_TOKENS = BATCH * TOKENS


@dataclass(frozen=True)
class MemoryRow:
    """One line of the table; `how` is "computed" or "measured"."""

    what: str
    bytes: float
    how: str


@dataclass(frozen=True)
class MemoryEstimate:
    """The memory of a training run, in bytes, computed from shapes. Steps are the peak above the weights: activations and
    gradients.

    layers: converted blocks. spec: of one component. base_*: the frozen model in its dtype. new_*: all components,
    float32. optimizer: AdamW's two moments. materialized: one (out, in) float32 matrix per token, block and projection.
    Not included: autocast's copies of weights, workspace inside kernels, what an allocator keeps in reserve.
    """

    layers: list[int]
    spec: ComponentSpec
    base_parameters: int
    base_bytes: int
    new_parameters: int
    new_bytes: int
    optimizer_bytes: int
    local_step_bytes: int
    logits_step_bytes: int
    logits_checkpointed_bytes: int
    materialized_bytes: int


def materialized_delta_bytes(
    hidden_size: int,
    intermediate_size: int,
    num_projections: int = 3,
    *,
    layers: int = 1,
    batch: int = BATCH,
    tokens: int = TOKENS,
    bytes_per_element: int = 4,
) -> int:
    """Bytes of one formed (out, in) matrix per token, layer and projection."""
    return hidden_size * intermediate_size * num_projections * layers * batch * tokens * bytes_per_element


def example(
    spec: ComponentSpec, tokens: int, *, seed: int = 0, device: str = "cpu"
) -> tuple[NPComponent, Tensor, Tensor, Tensor]:
    """(component with random values, a (tokens, d), z (tokens, d), i (tokens, f)), float32, seeded."""
    d, f = spec.hidden_size, spec.intermediate_size
    component = NPComponent(spec, torch.ones(d, device=device))
    if device == "meta":
        a, z, i = (torch.empty(tokens, size, device=device) for size in (d, d, f))
        return component, a, z, i
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in component.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
    a, z, i = (torch.randn(tokens, size, generator=generator) for size in (d, d, f))
    return component, a, z, i


@torch.no_grad()
def values_peak(spec: ComponentSpec, tokens: int, *, seed: int = 0, device: str = "cpu") -> int:
    """Peak bytes that one block's NPT part allocates beside inputs and weights: its values, and their sums with the outputs.

    The sums are those of the hooks, in float32 and for all tokens at once: z + shift, each projection's output + value.
    """
    component, a, z, i = example(spec, tokens, seed=seed, device=device)
    with AllocationCounter() as counter:
        values = component.input_values(a, z, exact_input=a, scale=a[..., :1])
        shifted = z if values.shift is None else z + values.shift
        added = [i + value for value in values.values.values()]  # i has the shape of gate's and up's output
        down = component.down_value(a, i, values.modulation)
        output = z if down is None else z + down
        del shifted, added, down, output
    return counter.peak


def component_bytes(spec: ComponentSpec, tokens: int, *, bytes_per_parameter: int = 4) -> tuple[int, int]:
    """(bytes of one component's parameters, peak bytes of its values for `tokens` tokens), computed."""
    parameters = sum(p.numel() for p in NPComponent(spec, torch.ones(spec.hidden_size, device="meta")).parameters())
    return parameters * bytes_per_parameter, values_peak(spec, tokens, device="meta")


def measure_component(
    hidden_size: int, intermediate_size: int, rank: int = 16, tokens: int = MEASURED_TOKENS, seed: int = 0
) -> int:
    """`values_peak` of a component with default options, really run on the CPU."""
    return values_peak(ComponentSpec(hidden_size, intermediate_size, rank=rank), tokens, seed=seed)


@torch.no_grad()
def measure_materialized(
    hidden_size: int, intermediate_size: int, rank: int = 16, tokens: int = 64, seed: int = 0
) -> tuple[int, float]:
    """(peak bytes, relative difference to the component) of forming each token's dW of `down` and applying it."""
    spec = ComponentSpec(hidden_size, intermediate_size, rank=rank)
    component, a, _, i = example(spec, tokens, seed=seed)
    (delta_in_factors,) = down_deltas(component, a, i).values()
    expected = delta_in_factors.apply()
    with AllocationCounter() as counter:
        key = i / i.square().sum(-1, keepdim=True)
        delta = expected[:, :, None] * key[:, None, :]
        product = torch.bmm(delta, i[:, :, None])[..., 0]
    return counter.peak, float((product - expected).norm() / expected.norm())


def estimate(
    hf_config: Any,
    options: Any = None,
    batch: int = BATCH,
    tokens: int = TOKENS,
    dtype: torch.dtype = torch.bfloat16,
) -> MemoryEstimate:
    """The memory of a training step of `batch` x `tokens` with a model of these shapes; no weights are loaded.

    Args:
        hf_config: a transformers configuration. dtype: of the base.
        options: a `ModelSection`, an `NPTConfig`, a mapping of its fields, or None for its defaults.

    Raises:
        NPTError: no causal LM has this configuration, or it can't be converted with these options.
    """
    model = shapes_of(hf_config, options, dtype)
    layers = active_layers(model)
    own, base = parameter_counts(model)
    spec: ComponentSpec = layers[0].component.spec  # type: ignore[union-attr]
    local, logits = (_step_peak(model, name, batch, tokens) for name in ("local", "logits"))
    enable_checkpointing(model.get_base_model())
    formed = materialized_delta_bytes(
        spec.hidden_size, spec.intermediate_size, len(spec.projections), layers=len(layers), batch=batch, tokens=tokens
    )
    return MemoryEstimate(
        layers=[layer.index for layer in layers],
        spec=spec,
        base_parameters=base,
        base_bytes=weight_bytes(model, OptimizationSection()),
        new_parameters=own,
        new_bytes=OWN_BYTES * own,
        optimizer_bytes=MOMENTS_BYTES * own,
        local_step_bytes=local,
        logits_step_bytes=logits,
        logits_checkpointed_bytes=_step_peak(model, "logits", batch, tokens),
        materialized_bytes=formed,
    )


def _step_peak(model: Any, objective: str, batch: int, tokens: int) -> int:
    """Peak bytes of a training step beside its inputs."""
    inputs: Batch = {
        name: torch.zeros(batch, tokens, dtype=torch.long, device="meta") for name in ("input_ids", "labels")
    }
    # A mask of four dimensions is used unchanged; transformers would read the values of any other.
    inputs["attention_mask"] = torch.ones(batch, 1, tokens, tokens, dtype=torch.bool, device="meta")
    return training_step_peak(model, objective, lambda: inputs, batch * tokens)


def memory_table(config: RunConfig | None = None, here: bool = False) -> list[MemoryRow]:
    """The rows of `npt memory`, for the model of a run configuration, or for 7B shapes without one.

    Args:
        here: the run is to be on this machine, which decides what `model.dtype: auto` is.

    Raises:
        NPTError: the model's configuration can't be loaded, or the model can't be converted.
    """
    hf_config = LlamaConfig(**LLAMA_7B) if config is None else load_shapes(config)
    if config is not None and here:
        config = with_own_dtype(config, hf_config)
    batch, tokens = (BATCH, TOKENS) if config is None else (config.training.batch_size, config.data.max_length)
    dtype = torch.bfloat16 if config is None else dtype_of(config.model.dtype, hf_config)
    found = estimate(hf_config, None if config is None else config.model, batch, tokens, dtype)
    spec, count = found.spec, len(found.layers)
    shape = f"batch {batch} x {tokens} tokens, d {spec.hidden_size}, f {spec.intermediate_size}"
    step = f"step of batch {batch} x {tokens}"
    depth = hf_config.num_hidden_layers
    small, _ = measure_materialized(512, 1376)
    small_ours = measure_component(512, 1376, tokens=64)
    return [
        MemoryRow(f"base weights, {depth} blocks, {str(dtype).removeprefix('torch.')}", found.base_bytes, "computed"),
        MemoryRow(f"formed dW, one block ({shape})", found.materialized_bytes // count, "computed"),
        MemoryRow(f"formed dW, {count} converted blocks", found.materialized_bytes, "computed"),
        *_value_rows(spec, shape, batch * tokens),
        MemoryRow(f"npt parameters, {count} blocks, float32", found.new_bytes, "computed"),
        MemoryRow("AdamW's two moments, float32", found.optimizer_bytes, "computed"),
        MemoryRow(f"{step}, objective local", found.local_step_bytes, "computed"),
        MemoryRow(f"{step}, objective logits", found.logits_step_bytes, "computed"),
        MemoryRow("the same with gradient checkpointing", found.logits_checkpointed_bytes, "computed"),
        MemoryRow("formed dW of down, d 512, f 1376, 64 tokens", small, "measured"),
        MemoryRow("npt values, d 512, f 1376, 64 tokens", small_ours, "measured"),
    ]


def _value_rows(spec: ComponentSpec, shape: str, tokens: int) -> list[MemoryRow]:
    """The rows of one block's values: measured, or computed with a measured part where there are too many tokens."""
    what = f"npt values, one block ({shape}, rank {spec.rank})"
    if tokens <= MEASURED_TOKENS:
        return [MemoryRow(what, values_peak(spec, tokens), "measured")]
    part = f"npt values, one block, the first {MEASURED_TOKENS:,} of these tokens"
    return [
        MemoryRow(what, component_bytes(spec, tokens)[1], "computed"),
        MemoryRow(part, values_peak(spec, MEASURED_TOKENS), "measured"),
    ]
