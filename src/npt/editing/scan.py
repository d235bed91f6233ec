"""The block to edit: where the key of a subject is like that in other wordings, and unlike that of its neighbours.

Neither an edit nor a gradient is needed. With a = M k / (k^T M k), a k' is the share of an edit that another token k' gets.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from npt.block.families import blocks_of, family_of
from npt.block.probing import find, linear_shape
from npt.editing.keys import Place, Prompts
from npt.editing.metrics import Source
from npt.editing.probes import probes
from npt.editing.requests import Request
from npt.editing.solve import Metric
from npt.editing.statistics import padded
from npt.errors import DataError
from npt.tuner.converted import base_of, device_of, eval_mode, vocabulary_size

logger = logging.getLogger(__name__)

#: Blocks that are compared, and the part of the depth they are spread over: below, little has been read; above, few are left.
CANDIDATES, LOWEST, HIGHEST = 8, 0.2, 0.7
MOMENT_BYTES = 4 << 30
#: Neighbouring blocks that are chosen where several can share a fact.
SPREAD = 3
#: The depth at which an edit without a subject works best.
WITHOUT_SUBJECT = 0.85


def candidates(blocks: int, width: int) -> list[int]:
    """Blocks to compare, of so many.

    Args:
        width: numbers of a key; their second moments have to fit `MOMENT_BYTES` together.
    """
    low, high = int(LOWEST * blocks), max(int(HIGHEST * blocks), int(LOWEST * blocks))
    most = max(2, min(CANDIDATES, MOMENT_BYTES // (8 * width * width)))
    steps = torch.linspace(low, high, min(most, high - low + 1))
    return sorted({round(float(step)) for step in steps})


def choose_layers(source: Source, requests: Sequence[Request], count: int = 1) -> tuple[int, ...]:
    """So many neighbouring blocks for a store whose first edits are these, the best one in the middle."""
    best, blocks = choose_layer(source, requests), len(blocks_of(base_of(source.model)))
    count = min(count, blocks)
    lowest = min(max(0, best - count // 2), blocks - count)
    found = tuple(range(lowest, lowest + count))
    source.only(found)
    return found


def choose_layer(source: Source, requests: Sequence[Request]) -> int:
    """The best block for a store whose first edits are these."""
    base = base_of(source.model)
    blocks = len(blocks_of(base))
    if requests and requests[0].subject is None:
        chosen = min(blocks - 1, round(WITHOUT_SUBJECT * blocks))
        logger.info("layer: %d of %d, as the first edit names no subject", chosen, blocks)
        return chosen
    width = linear_shape(find(blocks_of(base)[0], family_of(base), "down"))[0]
    found = overlaps(source, candidates(blocks, width))
    chosen = max(found, key=lambda block: score(*found[block]))
    shown = ", ".join(f"{block} {one:.2f}/{other:.2f}" for block, (one, other) in found.items())
    logger.info("layer: %d of %d (overlap with another wording / with a neighbour: %s)", chosen, blocks, shown)
    return chosen


def score(paraphrase: float, neighbour: float) -> float:
    """How well a block tells a subject from its neighbours, from the two mean overlaps."""
    return paraphrase / max(neighbour, 0.02)


@torch.no_grad()
def overlaps(source: Source, layers: Sequence[int]) -> dict[int, tuple[float, float]]:
    """{block: (mean overlap of a subject's key with that in another wording, mean largest one in a neighbour's prompt)}."""
    base = base_of(source.model)
    family = family_of(base)
    downs = {layer: find(blocks_of(base)[layer], family, "down") for layer in layers}
    metrics = {layer: Metric(moment) for layer, moment in source.moments(downs).items()}
    prompts = Prompts(source.tokenizer, base.config, vocabulary_size(base))
    sums: dict[int, list[tuple[float, float]]] = {layer: [] for layer in layers}
    with eval_mode(base):
        for probe in probes():
            try:
                one = prompts.place(probe.prompt, probe.subject)
                other = prompts.place(probe.paraphrase, probe.subject)
            except DataError:
                continue  # a subject that is one token, at a text's start
            near = Place(prompts.ids(probe.neighbour), -1)
            seen = _inputs(base, downs, [one, other, near])
            for layer, inputs in seen.items():
                key = inputs[0, one.position]
                row = metrics[layer](key[:, None])[:, 0] if layer in metrics else key
                row = row / (row @ key)
                moved = (inputs[2, : len(near.ids)] @ row).abs().max()
                sums[layer].append((float(inputs[1, other.position] @ row), float(moved)))
    if not sums[layers[0]]:
        raise DataError("layer='auto': the tokenizer makes one token of every subject tried; name a layer")
    return {
        layer: tuple(sum(pair[i] for pair in pairs) / len(pairs) for i in (0, 1))  # type: ignore[misc]
        for layer, pairs in sums.items()
    }


def _inputs(base: Any, downs: Mapping[int, nn.Module], places: Sequence[Place]) -> dict[int, Tensor]:
    """The input of each projection on texts, (rows, tokens, f) float64 on the CPU."""
    batch, seen = padded([place.ids for place in places], device_of(base)), dict[int, Tensor]()

    def keep(layer: int) -> Any:
        return lambda module, args: seen.__setitem__(layer, args[0])

    handles = [down.register_forward_pre_hook(keep(layer)) for layer, down in downs.items()]
    try:
        base(**batch, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return {layer: x.reshape(*batch["input_ids"].shape, -1).cpu().double() for layer, x in seen.items()}
