"""Closed-form calibration: one pass of the frozen model over text, no gradient step (docs/maths.md, section 4).

Per converted block, with h and a from the unconverted model and D = Norm2(h + a) - z:

1. on a first chunk of tokens: gain and carry, least squares of D on what they can write;
2. over all text, in float64: S = a^T a and T = a^T R, where R is what step 1 leaves of D (and of a, for down);
3. a reduced-rank regression of R on a.

Tokens are weighted so that a few extreme ones (attention sinks, massive activations) cannot dominate the fit. The
formulas are in `npt.equivalence.closed_form`; this module passes the text and puts the solutions into the components.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from npt.block.component import NPComponent
from npt.block.layer import BlockRecord, NPTLayer
from npt.block.modes import Mode, running_as, watching
from npt.common.processes import world
from npt.common.progress import tracked
from npt.common.sharded import full_tensor, like, same_everywhere
from npt.data.batches import with_mask
from npt.data.inputs import as_batches
from npt.equivalence.block_fit import BlockFit, first_bytes, first_tokens
from npt.equivalence.choice import check_undivided, settle_blocks, without_probes
from npt.equivalence.parts import TextPart
from npt.equivalence.prediction import measure_interactions
from npt.equivalence.spill import check_room
from npt.errors import REMEDY, NPTError, RunError
from npt.tuner.checks import renew_record
from npt.tuner.converted import (
    ConvertedModel,
    active_layers,
    adapter_config,
    base_of,
    check_batch,
    context_length_of,
    device_of,
    eval_mode,
    hidden_dtype,
    run_backbone,
)
from npt.tuner.nonfinite import find_nonfinite

logger = logging.getLogger(__name__)

T = TypeVar("T")


def calibrate(
    model: ConvertedModel,
    batches: Any,
    *,
    tokenizer: Any = None,
    chunk_tokens: int | None = None,
    progress: bool = False,
) -> dict[str, dict[str, float]]:
    """Fits the active adapter of a converted model to the model it was made from, in place.

    With npt_layers "auto" it then keeps the blocks that cost least KL together; the first 8 to 32 rows of text tell.

    Several processes share the batches, and their sums are added: the fit is that of one process. All call it with the
    same batches; a sharded model's inside `npt.common.sharded.through`.

    Args:
        model: a PEFT model with an active NPT adapter; its base is not changed.
        batches: of {"input_ids" (batch, tokens), "attention_mask" (the same; optional)}; padding is left out. Or what
            `npt.data.inputs` lists: text, with its `tokenizer`, in blocks of 256 tokens or of the model's context.
        chunk_tokens: tokens per block kept for gain and carry, in a temporary file; None for `block_fit.first_tokens`.
        progress: shows a bar.

    Returns:
        For each block, as `layer_<i>`, its error_before, error_after (of y - h, relative, root of summed squares) and tokens.

    Raises:
        ConversionError: blocks of a sharded model are to be chosen.
        NPTError: no text, text without a tokenizer or beyond the model's limits, or so degenerate that the fit is not finite.
        RunError: the model's own hidden states are not finite, or the temporary file can't be written.
    """
    check_undivided(model)
    batches = as_batches(batches, tokenizer, min(256, context_length_of(model) or 256), "calibrate(batches=...)")
    if adapter_config(model).undecided is None:
        return fit_components(model, batches, chunk_tokens=chunk_tokens, progress=progress)
    probes, batches = without_probes(model, list(batches))
    errors = fit_components(model, batches, chunk_tokens=chunk_tokens, progress=progress)
    settle_blocks(model, measure_interactions(model, probes, progress=progress))
    return errors


def check_calibration_room(model: ConvertedModel, tokens: int, at_once: int) -> None:
    """Stops before a calibration on so many tokens whose temporary files find no room on this machine.

    Args:
        at_once: tokens of a batch of one process.

    Raises:
        RunError: with what is needed and what is free.
    """
    if layers := _calibrated(model):
        processes = world()[1]
        here = min(processes, int(os.environ.get("LOCAL_WORLD_SIZE", processes)))
        needed = first_bytes(layers, tokens, at_once * processes, hidden_dtype(model))
        check_room(needed * here // processes)


@torch.no_grad()
def fit_components(
    model: ConvertedModel,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    chunk_tokens: int | None = None,
    progress: bool = False,
) -> dict[str, dict[str, float]]:
    """`calibrate` on batches, for the blocks that the adapter has: none is taken out."""
    layers = _calibrated(model)
    with _whole_components(layers):
        fits = {layer.index: BlockFit(layer, chunk_tokens or first_tokens(layers)) for layer in layers}
        seen = _collect(model, fits, batches, progress)
        if not seen:
            raise NPTError("calibration got no text: pass at least one batch with real tokens")
        logger.info("calibrating on %d tokens", seen)
        figures = {f"layer_{index}": fit.finish() for index, fit in fits.items()}
        # Two kinds of processors may solve the same equations to other last digits.
        same_everywhere({f"{layer.index}.{n}": p for layer in layers for n, p in layer.own.named_parameters()})
    renew_record(base_of(model), adapter_config(model))
    return figures


def _calibrated(model: ConvertedModel) -> list[NPTLayer]:
    return [layer for layer in active_layers(model) if layer.own.spec.is_calibrated]


def _collect(
    model: ConvertedModel, fits: dict[int, BlockFit], batches: Iterable[Mapping[str, Tensor]], progress: bool
) -> int:
    """Shows the text to the fits, each process its share, and to the adapter's record. Returns all processes' tokens."""
    device, seen, (rank, count), record = device_of(model), 0, world(), adapter_config(model).text_record
    layers = [fit.layer for fit in fits.values()]

    def see(layer: NPTLayer, record: BlockRecord) -> None:
        fits[layer.index].see(record, mask, part)

    with eval_mode(model), running_as(active_layers(model), Mode.ORIGINAL), watching(layers, see):
        for group in _groups(tracked(batches, "Calibrating", progress, unit="batches"), count):
            texts = [with_mask(batch) for batch in group]
            for text in texts:
                check_batch(model, text["input_ids"], "calibration text")
                if record is not None:
                    record.add_batch(text)
            masks = [text["attention_mask"] for text in texts]
            # On shapes alone all tokens count.
            sizes = [mask.numel() if mask.is_meta else int(mask.sum()) for mask in masks]
            part = TextPart(seen + sum(sizes[:rank]), seen + sum(sizes), rank < len(group))
            seen += sum(sizes)
            text = {name: x.to(device) for name, x in texts[min(rank, len(group) - 1)].items() if name != "labels"}
            mask = text["attention_mask"].bool()
            if not run_backbone(model, text)[mask].isfinite().all():
                where = find_nonfinite(model, text)
                raise RunError(f"calibration, after {seen} tokens: hidden states are not finite, {where}; {REMEDY}")
    return seen


def _groups(items: Iterable[T], size: int) -> Iterator[list[T]]:
    iterator = iter(items)
    while group := list(islice(iterator, size)):
        yield group


@contextmanager
def _whole_components(layers: list[NPTLayer]) -> Iterator[None]:
    """Puts whole components in the place of sharded ones; at the end, cuts the fitted values into the shards again."""
    before: list[tuple[NPTLayer, str, NPComponent]] = []
    for layer in layers:
        name, component = layer.active_name, layer.own
        if name is None or not isinstance(layer.get_base_layer(), FSDPModule):
            continue
        whole = layer.new_component(component.spec).requires_grad_(False)
        whole.load_state_dict({n: full_tensor(p) for n, p in component.named_parameters()})
        before.append((layer, name, component))
        layer.npt_components[name] = whole
    try:
        yield
        for layer, name, component in before:
            fitted = layer.npt_components[name]
            for n, parameter in component.named_parameters():
                parameter.copy_(like(fitted.get_parameter(n), parameter))
    finally:
        for layer, name, component in before:
            layer.npt_components[name] = component
