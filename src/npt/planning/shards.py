"""How a run spreads over several processes: the parts that each of them holds, and the bytes that they send one another.

DDP: every process holds the whole model and sums its gradients with the others once per optimiser step. FSDP2: every
process holds a part of each parameter, and a unit (a block, an embedding, the head) is gathered whole while it is used.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

from torch import Tensor, nn

from npt.block.families import blocks_of
from npt.config import TrainingSection
from npt.equivalence.objectives import objective_class
from npt.errors import NPTError
from npt.planning.shapes import OWN_BYTES
from npt.tuner.converted import active_layers, component_ids, parameter_counts

DDP, FSDP2, ALONE = "DDP", "FSDP2", "one process"


class UnitKind(Enum):
    """The kinds of FSDP2 units, with the names they are printed by.

    EMBEDDING: the input embedding. BLOCK: a transformer block. HEAD: the final norm and the language-model head. TIED: both
    of these in one, where they share their weight. REST: all other parameters, which the root holds.
    """

    EMBEDDING = "embedding"
    BLOCK = "block"
    HEAD = "head"
    TIED = "embedding and head"
    REST = "rest"


@dataclass(frozen=True)
class ShardUnit:
    """Parameters that FSDP2 gathers and frees together.

    kind: of the unit. block: the index of a block; None for other kinds. full: bytes of its whole parameters. local: bytes
    that each process keeps of them, padding included; of these, base: bytes of the frozen model, and own: the number of the
    adapter's parameters.
    """

    kind: UnitKind
    block: int | None
    full: int
    local: int
    base: int
    own: int

    @property
    def name(self) -> str:
        """The unit's name as it is printed: "embedding", "block 3"."""
        return self.kind.value if self.block is None else f"{self.kind.value} {self.block}"


@dataclass(frozen=True)
class Spread:
    """One process's share of a run.

    base: bytes it holds of the frozen model. own: number of adapter parameters that it holds and updates. gathered: most
    bytes of gathered units at once. forward_bytes: sent and received by it per micro-batch for weights; step_bytes: per
    optimiser step for gradients. units: in the order of a forward; empty without FSDP2.
    """

    strategy: str
    processes: int
    base: int
    own: int
    gathered: int = 0
    forward_bytes: float = 0.0
    step_bytes: float = 0.0
    units: tuple[ShardUnit, ...] = ()


def strategy_of(fsdp: bool, processes: int) -> str:
    """`DDP`, `FSDP2` or `ALONE`. fsdp: the configuration or the launcher asks for it.

    Raises:
        NPTError: FSDP2 with one process.
    """
    if fsdp:
        if processes < 2:
            raise NPTError(
                "optimization.fsdp=true with one process: there is nothing to shard over; give --processes N, or set it "
                "to false"
            )
        return FSDP2
    return ALONE if processes == 1 else DDP


def local_size(parameter: Tensor, processes: int) -> int:
    """The count of numbers that each process keeps of a parameter: its rows in equal parts, the last one padded."""
    rows = parameter.shape[0] if parameter.dim() else 1
    return -(-rows // processes) * (parameter.numel() // rows if rows else 0)


def shard_units(model: Any, processes: int) -> tuple[ShardUnit, ...]:
    """The units that accelerate (1.15, `fsdp2_prepare_model`) cuts a converted model into, in the order of a forward."""
    ours = component_ids(model)
    seen: set[int] = set()
    units = []
    for kind, block, modules in _parts(model):
        found = {id(p): p for module in modules for p in module.parameters() if id(p) not in seen}
        seen |= set(found)
        if found:
            units.append(_unit(kind, block, list(found.values()), ours, processes))
    return tuple(units)


def _parts(model: Any) -> list[tuple[UnitKind, int | None, list[nn.Module]]]:
    """(kind, block, modules) of every unit. A parameter belongs to the first unit that has it."""
    embedding, head, norm = model.get_input_embeddings(), model.get_output_embeddings(), _final_norm(model)
    tied = head is not None and head.weight is embedding.weight
    tail = [module for module in (norm, head) if module is not None]
    first = (UnitKind.TIED, None, [embedding, *tail]) if tied else (UnitKind.EMBEDDING, None, [embedding])
    blocks = [(UnitKind.BLOCK, index, [block]) for index, block in enumerate(blocks_of(model.get_base_model()))]
    return [first, *blocks, (UnitKind.HEAD, None, [] if tied else tail), (UnitKind.REST, None, [model])]


def _final_norm(model: Any) -> nn.Module | None:
    """The norm before the head, where accelerate finds it: under PEFT's wrapper it misses one in a child named `model`."""
    inner = getattr(model, model.base_model_prefix, None)
    norms = [m for _, m in inner.named_children() if "Norm" in type(m).__name__] if inner is not None else []
    return norms[-1] if norms else None


def _unit(kind: UnitKind, block: int | None, parameters: list[Tensor], ours: set[int], processes: int) -> ShardUnit:
    """The unit of these parameters. ours: the `id` of every parameter of a component."""
    local = [(p, local_size(p, processes)) for p in parameters]
    return ShardUnit(
        kind,
        block,
        full=sum(p.numel() * p.element_size() for p in parameters),
        local=sum(size * p.element_size() for p, size in local),
        base=sum(size * p.element_size() for p, size in local if id(p) not in ours),
        own=sum(size for p, size in local if id(p) in ours),
    )


def spread_over(model: Any, training: TrainingSection, processes: int, base: int, strategy: str) -> Spread:
    """One process's share of a run. base: bytes of the whole frozen model."""
    own, _ = parameter_counts(model)
    around = (processes - 1) / processes
    if strategy != FSDP2:
        return Spread(strategy, processes, base, own, step_bytes=2 * around * OWN_BYTES * own)
    units = shard_units(model, processes)
    local = sum(unit.own for unit in units)
    return Spread(
        strategy,
        processes,
        base=sum(unit.base for unit in units),
        own=local,
        gathered=_gathered_at_once(units),
        forward_bytes=around * _gathered_per_batch(units, training, active_layers(model)[0].index),
        step_bytes=around * OWN_BYTES * own,
        units=units,
    )


def _gathered_at_once(units: tuple[ShardUnit, ...]) -> int:
    """Most bytes of gathered units at once: the weights in use and the buffer they came in, or two buffers while the next
    ones arrive; a tied embedding stays beside them."""
    stays = sum(unit.full for unit in units if unit.kind is UnitKind.TIED)
    others = max(unit.full for unit in units if unit.kind is not UnitKind.TIED)
    return max(2 * max(unit.full for unit in units), stays + 2 * others)


def _gathered_per_batch(units: tuple[ShardUnit, ...], training: TrainingSection, first: int) -> int:
    """Bytes of units gathered in one micro-batch. first: the first converted block, down to which a backward goes.

    `local`: one frozen forward without the head. `logits`: two forwards, and once more the blocks that a gradient crosses;
    the head, the root and a tied embedding are kept between the two.
    """
    local = objective_class(training.objectives()[-1]).per_block
    if local:
        return sum(unit.full for unit in units if unit.kind is not UnitKind.HEAD)
    # With gradient checkpointing the embedding's output asks for a gradient, and all blocks are crossed.
    first = 0 if training.gradient_checkpointing else first
    total = 0
    for unit in units:
        if unit.kind in (UnitKind.HEAD, UnitKind.TIED, UnitKind.REST):
            total += unit.full
        else:
            crossed = unit.block is not None and unit.block >= first
            total += (2 + crossed) * unit.full
    return total
