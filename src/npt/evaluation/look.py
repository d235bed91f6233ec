"""One look at a batch: the trunk once, each upper half once; observers take what they need from the two passes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from npt.block.families import blocks_of, family_of
from npt.block.layer import BlockRecord, NPTLayer
from npt.block.mixture import routing_of
from npt.block.modes import watching, watching_deltas
from npt.block.outputs import first_tensor
from npt.block.probing import BlockParts
from npt.block.weight_delta import WeightDelta
from npt.tuner.converted import ConvertedModel, active_layers, as_original, base_of, npt_layers, run_backbone
from npt.tuner.trunk import shared_trunk

Batch = dict[str, Tensor]
Hook = Callable[[BlockParts, Callable[[Tensor], Tensor]], RemovableHandle | None]
#: Sequences whose hidden states of all blocks are held at once.
STREAM_ROWS = 4


class Observer:
    """Sees a batch: every method is called for each batch, in this order. Methods that a class leaves out cost nothing."""

    def begin(self, batch: Batch) -> None:
        """Takes the batch {"input_ids", "attention_mask"}, (rows, tokens) each."""

    def see_original(self, layer: NPTLayer, record: BlockRecord) -> None:
        """Takes the original's pass through a converted block."""

    def see_own(self, layer: NPTLayer, record: BlockRecord) -> None:
        """Takes the NPT model's pass through a converted block."""

    def see_deltas(self, layer: NPTLayer, deltas: dict[str, WeightDelta]) -> None:
        """Takes the weight deltas of the NPT model's pass."""

    def see_streams(self, original: dict[int, Tensor], own: dict[int, Tensor]) -> None:
        """Takes {block: output (rows, tokens, d)} of every block from the first converted one on, of both models."""

    def see_routes(self, original: dict[int, Tensor], own: dict[int, Tensor]) -> None:
        """Takes {block: experts (rows x tokens, k)} of every mixture from the first converted block on, of both models."""


def look(
    model: ConvertedModel,
    batch: Batch,
    observers: Sequence[Observer] = (),
    run: Callable[[ConvertedModel, Batch], Tensor] = run_backbone,
) -> tuple[Tensor, Tensor]:
    """Runs the original and the NPT model on a batch. Returns what `run` gives of each, in this order.

    Args:
        model: in evaluation mode, with an active adapter: NPT's, or without observers one of another method.
        observers: see the passes. run: (model, batch) -> hidden states or logits.
    """
    layers = active_layers(model) if npt_layers(model) else []
    for observer in observers:
        observer.begin(batch)
    kept = [(_watched(observers, "see_streams"), _on_output), (_watched(observers, "see_routes"), _on_routes)]
    with shared_trunk(model):
        with as_original(model), watching(layers, _all(observers, "see_original")), ExitStack() as stack:
            originals = [stack.enter_context(_kept(model, *one)) for one in kept]
            teacher = run(model, batch)
        deltas = watching_deltas(layers, _all(observers, "see_deltas"))
        with watching(layers, _all(observers, "see_own")), deltas, ExitStack() as stack:
            owns = [stack.enter_context(_kept(model, *one)) for one in kept]
            student = run(model, batch)
    for (watched, _), original, own in zip(kept, originals, owns, strict=True):
        for see in watched:
            see(original, own)
    return teacher, student


@torch.no_grad()
def observe(model: ConvertedModel, batches: Iterable[Batch], observers: Sequence[Observer]) -> None:
    """Shows batches to observers, a few rows at a time."""
    for batch in batches:
        for start in range(0, len(batch["input_ids"]), STREAM_ROWS):
            look(model, {key: value[start : start + STREAM_ROWS] for key, value in batch.items()}, observers)


def _watched(observers: Sequence[Observer], name: str) -> list[Callable[..., None]]:
    """The methods of this name, of the observers that have one of their own."""
    return [getattr(o, name) for o in observers if getattr(type(o), name) is not getattr(Observer, name)]


def _all(observers: Sequence[Observer], name: str) -> Callable[..., None] | None:
    """One function in the place of `_watched`; None where nobody watches."""
    watched = _watched(observers, name)

    def see(*values: Any) -> None:
        for method in watched:
            method(*values)

    return see if watched else None


@contextmanager
def _kept(model: ConvertedModel, wanted: Sequence[Any], hook: Hook) -> Iterator[dict[int, Tensor]]:
    """{block: what its hook keeps} of every block from the first converted one on, where it is wanted."""
    kept: dict[int, Tensor] = {}
    with ExitStack() as stack:
        if wanted:
            base = base_of(model)
            family = family_of(base)
            for index, block in list(enumerate(blocks_of(base)))[active_layers(model)[0].index :]:
                handle = hook(BlockParts(block, family), partial(kept.setdefault, index))
                if handle is not None:
                    stack.callback(handle.remove)
        yield kept


def _on_output(parts: BlockParts, keep: Callable[[Tensor], Tensor]) -> RemovableHandle:
    """Keeps the block's output."""

    def hook(module: Any, args: Any, output: Any) -> None:
        keep(first_tensor(output))

    return parts.block.register_forward_hook(hook)


def _on_routes(parts: BlockParts, keep: Callable[[Tensor], Tensor]) -> RemovableHandle | None:
    """Keeps which experts a mixture sends its tokens to, of the first call: observers may run the block again."""
    if parts.experts is None:
        return None
    mlp = parts.module("mlp")

    def hook(module: Any, args: Any) -> None:
        keep(routing_of(args, mlp).indices)

    handle: RemovableHandle = parts.experts.register_forward_pre_hook(hook)
    return handle
