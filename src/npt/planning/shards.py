"""How a run spreads over several processes: what each holds, and what they send one another.

DDP: every process holds the whole model and sums its gradients with the others once per optimiser step. FSDP2: every
process holds a part of each parameter, and a unit (a block, an embedding, the head) is gathered whole while it is used.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from npt.block.families import blocks_of
from npt.config import RunConfig
from npt.equivalence.objectives import objective_class
from npt.errors import NPTError
from npt.tuner.converted import active_layers, parameter_counts

DDP, FSDP2, ALONE = "DDP", "FSDP2", "one process"
#: Names of units beside "block <i>".
EMBEDDING, HEAD, TIED, REST = "embedding", "head", "embedding and head", "rest"


@dataclass(frozen=True)
class ShardUnit:
    """What FSDP2 gathers and lets go of at once.

    name: of the unit. full: bytes of its whole parameters. local: bytes that each process keeps of them, padding included.
    base, own: numbers a process keeps of the frozen model's bytes and of the adapter's parameters (a count).
    """

    name: str
    full: int
    local: int
    base: int
    own: int


@dataclass(frozen=True)
class Spread:
    """One process's share of a run.

    base: bytes it holds of the frozen model. own: adapter parameters (a count) it holds and updates. gathered: most bytes
    of gathered units at once. forward_bytes: sent and received by it per micro-batch for weights; step_bytes: per optimiser
    step for gradients. units: in the order of a forward; none without FSDP2.
    """

    strategy: str
    processes: int
    base: int
    own: int
    gathered: int = 0
    forward_bytes: float = 0.0
    step_bytes: float = 0.0
    units: tuple[ShardUnit, ...] = ()


def strategy_of(config: RunConfig, processes: int, asked: bool = False) -> str:
    """`DDP`, `FSDP2` or `ALONE`; asked: the launcher wants FSDP whatever the configuration says.

    Raises:
        NPTError: FSDP2 with one process.
    """
    if config.optimization.fsdp or asked:
        if processes < 2:
            raise NPTError(
                "optimization.fsdp=true with one process: there is nothing to shard over; give --processes N, or set it "
                "to false"
            )
        return FSDP2
    return ALONE if processes == 1 else DDP


def local_size(parameter: Tensor, processes: int) -> int:
    """Numbers that each process keeps of a parameter: its rows in `processes` equal parts, the last one padded."""
    rows = parameter.shape[0] if parameter.dim() else 1
    return -(-rows // processes) * (parameter.numel() // rows if rows else 0)


def shard_units(model: Any, processes: int) -> tuple[ShardUnit, ...]:
    """The units that accelerate (1.15, `fsdp2_prepare_model`) cuts a converted model into: the input embedding, every
    block, the final norm and the head (one unit with the embedding where they are tied), and the rest as the root's own.
    """
    ours = {id(p) for layer in active_layers(model) for p in layer.parameters()}
    embedding, head, norm = model.get_input_embeddings(), model.get_output_embeddings(), _final_norm(model)
    blocks: Any = blocks_of(model.get_base_model())
    tied = head is not None and head.weight is embedding.weight
    tail = [module for module in (norm, head) if module is not None]
    parts: list[tuple[str, list[Any]]] = [(TIED, [embedding, *tail]) if tied else (EMBEDDING, [embedding])]
    parts += [(f"block {index}", [block]) for index, block in enumerate(blocks)]
    parts += [(HEAD, [] if tied else tail), (REST, [model])]
    seen: set[int] = set()
    units = []
    for name, modules in parts:
        found = {id(p): p for module in modules for p in module.parameters() if id(p) not in seen}
        seen |= set(found)
        if found:
            units.append(_unit(name, list(found.values()), ours, processes))
    return tuple(units)


def _final_norm(model: Any) -> Any:
    """The norm before the head, where accelerate finds it: under PEFT's wrapper it misses one in a child named `model`."""
    inner = getattr(model, model.base_model_prefix, None)
    norms = [m for _, m in inner.named_children() if "Norm" in type(m).__name__] if inner is not None else []
    return norms[-1] if norms else None


def _unit(name: str, parameters: list[Tensor], ours: set[int], processes: int) -> ShardUnit:
    local = [(p, local_size(p, processes)) for p in parameters]
    return ShardUnit(
        name,
        full=sum(p.numel() * p.element_size() for p in parameters),
        local=sum(size * p.element_size() for p, size in local),
        base=sum(size * p.element_size() for p, size in local if id(p) not in ours),
        own=sum(size for p, size in local if id(p) in ours),
    )


def spread_over(model: Any, config: RunConfig, processes: int, base: int, strategy: str) -> Spread:
    """One process's share. base: bytes of the frozen model where it is whole."""
    own, _ = parameter_counts(model)
    around = (processes - 1) / processes
    if strategy != FSDP2:
        return Spread(strategy, processes, base, own, step_bytes=2 * around * 4 * own)
    units = shard_units(model, processes)
    local = sum(unit.own for unit in units)
    return Spread(
        strategy,
        processes,
        base=sum(unit.base for unit in units),
        own=local,
        gathered=_gathered_at_once(units),
        forward_bytes=around * _gathered_per_batch(units, config, active_layers(model)[0].index),
        step_bytes=around * 4 * own,
        units=units,
    )


def _gathered_at_once(units: tuple[ShardUnit, ...]) -> int:
    """The weights in use and the buffer they came in, or two buffers as the next ones come; beside a tied embedding, which
    stays."""
    stays = sum(unit.full for unit in units if unit.name == TIED)
    return max(2 * max(unit.full for unit in units), stays + 2 * max(unit.full for unit in units if unit.name != TIED))


def _gathered_per_batch(units: tuple[ShardUnit, ...], config: RunConfig, first: int) -> int:
    """Bytes of units gathered in one micro-batch. first: the first converted block, down to which a backward goes.

    `local`: one frozen forward without the head. `logits`: two forwards and the blocks that a gradient crosses once more;
    the head, the root and a tied embedding are kept between the two.
    """
    local = objective_class(config.training.objectives()[-1]).per_block
    # With gradient checkpointing the embedding's output asks for a gradient, and all blocks are crossed.
    first = 0 if config.training.gradient_checkpointing else first
    total = 0
    for unit in units:
        if local or unit.name in (HEAD, TIED, REST):
            total += unit.full * (unit.name != HEAD or not local)
        else:
            crossed = unit.name.startswith("block") and int(unit.name.split()[1]) >= first
            total += (2 + crossed) * unit.full
    return total
