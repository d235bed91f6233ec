"""What a per-token weight delta would cost if it were formed, and what this implementation allocates, measured.

Measured means counted in tensor allocations by torch's own profiler, not in the process's resident size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from npt.attach import linear_shape
from npt.component import ComponentSpec, NPComponent
from npt.errors import NPTError
from npt.families import blocks_of, family_of, resolve_layers

#: Shapes of Llama-2-7b, so that no hub is needed to talk about 7B.
LLAMA_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "vocab_size": 32000}
BATCH, TOKENS = 4, 512


@dataclass(frozen=True)
class MemoryRow:
    """One line of the table; `how` is "computed" or "measured"."""

    what: str
    bytes: float
    how: str


class AllocationCounter(TorchDispatchMode):
    """Counts bytes of tensor storage alive at once, above what was alive on entry."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {t.untyped_storage().data_ptr() for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in known | self._seen:
                self._watch(tensor)
        return result

    def _watch(self, tensor: Tensor) -> None:
        import weakref

        storage = tensor.untyped_storage()
        pointer, size = storage.data_ptr(), storage.nbytes()
        self._seen.add(pointer)
        self.live += size
        self.peak = max(self.peak, self.live)

        def freed() -> None:
            self._seen.discard(pointer)
            self.live -= size

        weakref.finalize(storage, freed)


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
    """Bytes of one (out, in) matrix per token, layer and projection."""
    return hidden_size * intermediate_size * num_projections * layers * batch * tokens * bytes_per_element


def example(
    hidden_size: int, intermediate_size: int, rank: int, tokens: int
) -> tuple[NPComponent, Tensor, Tensor, Tensor]:
    """(component with random values, a (tokens, d), z (tokens, d), i (tokens, f)), float32, seeded."""
    generator = torch.Generator().manual_seed(0)
    spec = ComponentSpec(hidden_size, intermediate_size, rank=rank)
    component = NPComponent(spec, torch.ones(hidden_size))
    with torch.no_grad():
        for parameter in component.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
    sizes = (hidden_size, hidden_size, intermediate_size)
    a, z, i = (torch.randn(tokens, size, generator=generator) for size in sizes)
    return component, a, z, i


@torch.no_grad()
def measure_component(hidden_size: int, intermediate_size: int, rank: int = 16, tokens: int = BATCH * TOKENS) -> int:
    """Peak bytes one block's values take beyond inputs and weights, for `tokens` tokens at once."""
    component, a, z, i = example(hidden_size, intermediate_size, rank, tokens)
    with AllocationCounter() as counter:
        values = component(a, z, "input")
        component(a, i, "down", modulation=values.modulation)
    return counter.peak


@torch.no_grad()
def measure_materialized(
    hidden_size: int, intermediate_size: int, rank: int = 16, tokens: int = 64
) -> tuple[int, float]:
    """(peak bytes, largest relative difference to the component) of forming each token's dW of `down` and applying it."""
    component, a, _, i = example(hidden_size, intermediate_size, rank, tokens)
    expected = component(a, i, "down")
    with AllocationCounter() as counter:
        key = i / i.square().sum(-1, keepdim=True)
        delta = expected[:, :, None] * key[:, None, :]
        product = torch.bmm(delta, i[:, :, None])[..., 0]
    return counter.peak, float((product - expected).norm() / expected.norm())


def memory_table(config: Any = None) -> list[MemoryRow]:
    """The rows of `npt memory`, for the model of a run configuration, or 7B shapes without one.

    Raises:
        NPTError: the model's configuration can't be loaded.
    """
    hf_config = LlamaConfig(**LLAMA_7B) if config is None else _load_hf_config(config)
    with init_empty_weights():
        model: Any = AutoModelForCausalLM.from_config(hf_config)
    blocks, family = blocks_of(model), family_of(model)
    hidden, intermediate = linear_shape(blocks[0].get_submodule(family.up))
    layers = resolve_layers("upper_half" if config is None else config.model.npt_layers, len(blocks))
    rank = 16 if config is None else config.model.rank
    batch, tokens = (BATCH, TOKENS) if config is None else (config.training.batch_size, config.data.max_length)
    count = len(family.projections)
    spec = ComponentSpec(hidden, intermediate, tuple(family.projections), rank)
    parameters = sum(p.numel() for p in NPComponent(spec, torch.ones(hidden, device="meta")).parameters())
    one = materialized_delta_bytes(hidden, intermediate, count, batch=batch, tokens=tokens)
    shape = f"batch {batch} x {tokens} tokens, d {hidden}, f {intermediate}"
    values = measure_component(hidden, intermediate, rank, batch * tokens)
    small, _ = measure_materialized(512, 1376)
    small_ours = measure_component(512, 1376, tokens=64)
    return [
        MemoryRow(f"base weights, {len(blocks)} blocks, bfloat16", 2 * sum(p.numel() for p in model.parameters()), "computed"),
        MemoryRow(f"formed dW, one block ({shape})", one, "computed"),
        MemoryRow(f"formed dW, {len(layers)} converted blocks", one * len(layers), "computed"),
        MemoryRow(f"npt values, one block ({shape}, rank {rank})", values, "measured"),
        MemoryRow(f"npt parameters, {len(layers)} blocks, float32", 4 * parameters * len(layers), "computed"),
        MemoryRow("formed dW of down, d 512, f 1376, 64 tokens", small, "measured"),
        MemoryRow("npt values, d 512, f 1376, 64 tokens", small_ours, "measured"),
    ]  # fmt: skip


def _load_hf_config(config: Any) -> Any:
    name = config.model.base_model_name
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=config.model.trust_remote_code)
    except (OSError, ValueError) as error:
        raise NPTError(
            f"model.base_model_name={name!r}: its configuration can't be loaded ({' '.join(str(error).split())[:120]}); "
            "check the name or the network, give a local folder, or leave out --config for 7B shapes"
        ) from error
