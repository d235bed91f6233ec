"""The choice of blocks for `npt_layers: auto`: all are calibrated, and those that cost least KL together are kept."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain

from torch import Tensor

from npt.block.families import blocks_of
from npt.common.display import blocks_text
from npt.common.processes import from_first
from npt.common.sharded import is_sharded
from npt.equivalence.prediction import Interactions, probe_texts
from npt.errors import ConversionError
from npt.tuner.converted import ConvertedModel, adapter_config, base_of, keep_blocks

logger = logging.getLogger(__name__)

Batch = Mapping[str, Tensor]


def without_probes(model: ConvertedModel, batches: Sequence[Batch]) -> tuple[list[Batch], Iterator[Batch]]:
    """Returns (batches that the blocks are measured on, those to calibrate on) of a calibration text (`probe_texts`)."""
    texts = sum(len(batch["input_ids"]) for batch in batches)
    return hold_back(batches, probe_texts(len(blocks_of(base_of(model))), texts))


def hold_back(batches: Iterable[Batch], count: int) -> tuple[list[Batch], Iterator[Batch]]:
    """Returns (batches with the first `count` rows, the others). Text that has no more rows than those is in both."""
    source, held, rows = iter(batches), list[Batch](), 0
    for batch in source:
        wanted = count - rows
        rows += min(wanted, len(batch["input_ids"]))
        held.append({name: x[:wanted] for name, x in batch.items()})
        rest = {name: x[wanted:] for name, x in batch.items()}
        if rows == count:
            source = chain([rest] if len(rest["input_ids"]) else [], source)
            break
    first = next(source, None)
    if first is None:
        logger.warning(
            "the calibration text has %d blocks: the prediction is made on the text that is calibrated on, and is too low; "
            "give more than %d (data.num_calibration_samples)", rows, count,
        )  # fmt: skip
    return held, iter(held) if first is None else chain([first], source)


def check_undivided(model: ConvertedModel) -> None:
    """Raises ConversionError where blocks are still to be chosen in a model whose parameters are sharded."""
    if adapter_config(model).undecided is not None and is_sharded(model):
        raise ConversionError(
            "npt_layers='auto' takes blocks out of the model, which sharding (FSDP) does not allow; choose them with "
            "`npt predict` on one process and give the list of indices"
        )


def settle_blocks(model: ConvertedModel, found: Interactions) -> list[int]:
    """Keeps the blocks that `auto` chooses, in place, and logs what each one costs alone.

    Returns:
        The blocks of the active adapter; all that it had, where none were to be chosen.
    """
    config = adapter_config(model)
    if config.undecided is None:
        return found.blocks
    chosen = from_first(found.choose(config.undecided))
    keep_blocks(model, chosen)
    rows = (f"  {block:>5}  {kl:.2e}  {'converted' if block in chosen else ''}" for block, kl in found.alone().items())
    logger.info("mean KL of each block converted alone, in nats:\n%s", "\n".join(row.rstrip() for row in rows))
    logger.info("chosen: %s of %d", blocks_text(chosen), len(found.blocks))
    return chosen
