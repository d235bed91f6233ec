"""LoRA and DoRA beside an NPT adapter: PEFT's own, on the same blocks' projections, with as many trained parameters."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from peft import LoraConfig, PeftModel, get_peft_model

from npt.block.families import blocks_of, family_of, refuse_mixture
from npt.block.probing import find, linear_shape

#: lora_alpha over the rank: the update is scaled by it.
ALPHA = 2
METHODS = ("lora", "dora")


class Place(NamedTuple):
    """A projection that gets an adapter: its module's name, and its (in, out)."""

    name: str
    size_in: int
    size_out: int


def places_of(base: Any, blocks: Collection[int], projections: Sequence[str]) -> list[Place]:
    """The projections of some blocks, each module once.

    Args:
        base: the causal LM. blocks: indices. projections: of gate, up, down; those that the family lacks are left out.
    """
    refuse_mixture(
        base, "LoRA and DoRA beside it would be on the projections of one MLP, and it has those of each expert"
    )
    family = family_of(base)
    names = {id(module): name for name, module in base.named_modules()}
    found: dict[str, Place] = {}
    for index, block in enumerate(blocks_of(base)):
        for projection in projections if index in blocks else ():
            if projection in family.projections:
                module = find(block, family, projection)
                name = names[id(module)]
                found[name] = Place(name, *linear_shape(module))
    return list(found.values())


def trained_parameters(method: str, rank: int, places: Sequence[Place]) -> int:
    """The number of parameters that a method trains: rank (in + out) a projection, DoRA's magnitudes (out) beside."""
    magnitudes = sum(place.size_out for place in places) if method == "dora" else 0
    return magnitudes + rank * sum(place.size_in + place.size_out for place in places)


def matching_rank(method: str, wanted: int, places: Sequence[Place]) -> int:
    """The rank, 1 or more, with which a method trains as near to `wanted` parameters as it can."""
    fixed = trained_parameters(method, 0, places)
    per_rank = trained_parameters(method, 1, places) - fixed
    return max(1, round((wanted - fixed) / per_rank))


def adapted(base: Any, method: str, rank: int, places: Sequence[Place]) -> PeftModel:
    """The base with PEFT's LoRA or DoRA: zero at its start, no dropout, lora_alpha `ALPHA` times the rank."""
    transposed = any(hasattr(base.get_submodule(place.name), "nf") for place in places)  # transformers' Conv1D
    config = LoraConfig(
        r=rank, lora_alpha=ALPHA * rank, lora_dropout=0.0, target_modules=[place.name for place in places],
        use_dora=method == "dora", fan_in_fan_out=transposed, task_type="CAUSAL_LM",
    )  # fmt: skip
    model: Any = get_peft_model(base, config)
    return model
