"""Rows of tokens on their way through a model's blocks, one chosen block after the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from npt.block.families import blocks_of, decoder_of, family_of
from npt.block.outputs import first_tensor
from npt.block.probing import BlockParts, linear_shape, probe_norm
from npt.common.fingerprint import base_record
from npt.common.precision import wide
from npt.editing.replay import Recording, ending_at, skipping
from npt.editing.statistics import padded
from npt.tuner.converted import base_of, device_of, eval_mode, run_backbone

#: Rows of a batch.
ROWS = 8
#: The shortest common beginning of a batch's rows that is read once.
PREFIX = 16


class Blocks:
    """A causal LM's blocks and the `down` projection of each.

    Args:
        model: a causal LM, or a PEFT model around one.
    """

    def __init__(self, model: Any):
        self.base = base_of(model)
        self.modules = list(blocks_of(self.base))
        self.family = family_of(self.base)

    @cached_property
    def fingerprint(self) -> dict[str, Any] | None:
        """The record that files of edits keep of the base (see `npt.common.fingerprint.base_record`)."""
        return base_record(self.base)

    def __len__(self) -> int:
        return len(self.modules)

    def down(self, layer: int) -> Any:
        """The projection that is patched."""
        return self._parts(layer).module("down")

    def shape(self, layer: int) -> tuple[int, int]:
        """(f, d) of the projection."""
        return linear_shape(self.down(layer))

    def shapes(self, layers: Sequence[int]) -> dict[int, tuple[int, int]]:
        """{block: (f, d) of its projection} of some blocks."""
        return {layer: self.shape(layer) for layer in layers}

    def name(self, layer: int) -> str:
        """The projection's name in the base."""
        down = self.down(layer)
        return next(name for name, module in self.base.named_modules() if module is down)

    def _parts(self, layer: int) -> BlockParts:
        return BlockParts(self.modules[layer], self.family)

    def missing(self, layer: int, outputs: Tensor, gap: Tensor) -> Tensor:
        """The values (tokens, d) which, added to the projection's output, close a gap of the block's output.

        A norm behind the projection keeps its scale at every token: out(u) = w u / s(u) + b, so the value is s(u) gap / w to
        first order.

        Args:
            outputs: (tokens, d), the projection's.
            gap: (tokens, d), of the block's output.
        """
        parts = self._parts(layer)
        gap = wide(gap) / parts.multiplier
        if self.family.out is None:
            return gap
        out = parts.module("out")
        weight, bias, _ = probe_norm(out, gap.shape[1], outputs)
        normed = wide(out.forward(outputs))
        if bias is not None:
            normed = normed - bias
        # s(u) by least squares over the numbers of the token, each weighted by its own w.
        centered = wide(outputs)
        scale = (weight * normed * centered).sum(-1) / normed.square().sum(-1).clamp_min(1e-30)
        small = 1e-3 * weight.square().mean()
        return scale[:, None] * gap * weight / (weight.square() + small)


@dataclass(frozen=True)
class Passed:
    """One block, passed by the kept tokens of all rows: the projection's input (tokens, f) and output (tokens, d), and the
    block's output (tokens, d).
    """

    inputs: Tensor
    outputs: Tensor
    hidden: Tensor


class Stream:
    """Rows of tokens at the input of a block, with what is at work on the model.

    Args:
        blocks: the model's.
        rows: token ids of each row; rows of like lengths side by side waste least.
        kept: how many of a row's last tokens are read, from 1.
    """

    def __init__(self, blocks: Blocks, rows: Sequence[Sequence[int]], kept: Sequence[int]):
        self.blocks = blocks
        self._spots: list[tuple[Tensor, Tensor]] = []
        self._at: list[Recording] = []
        for start in range(0, len(rows), ROWS):
            part, tails = rows[start : start + ROWS], kept[start : start + ROWS]
            spots = [
                (i, t) for i, (row, tail) in enumerate(zip(part, tails, strict=True)) for t in range(len(row))[-tail:]
            ]
            own, at = (torch.tensor(column) for column in zip(*spots, strict=True))
            self._spots.append((own, at))
            self._at.append(Recording(padded(part, device_of(blocks.base)), None, (), None))

    def copy(self) -> Stream:
        """The same rows at the same block; the two go on apart."""
        other = object.__new__(Stream)
        other.__dict__.update(self.__dict__, _at=list(self._at))
        return other

    @torch.no_grad()
    def through(self, layer: int) -> Passed:
        """Runs all rows through a block, at or above the one that they are at; they stay at its input.

        Raises:
            RuntimeError: the block is below the one that the rows are at.
        """
        at = max((len(recording.rests) for recording in self._at), default=0)
        if layer < at:
            raise RuntimeError(
                f"block {layer} is below block {at}, which the rows are at; copy a stream before it goes on"
            )
        found = [self._one(number, layer) for number in range(len(self._at))]
        return Passed(*(torch.cat(parts) for parts in zip(*found, strict=True)))

    def _one(self, number: int, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        recording, modules, seen = self._at[number], self.blocks.modules, dict[str, Tensor]()
        at, rests = len(recording.rests), list(recording.rests)
        hidden = [recording.hidden]
        rows, tokens = self._spots[number]

        def keep(module: nn.Module, args: Any, output: Any) -> None:
            hidden[:] = [first_tensor(output)]
            rests.append(output[1:] if isinstance(output, tuple) else None)

        def look(module: nn.Module, args: Any, output: Any) -> None:
            shape = recording.batch["input_ids"].shape
            seen["inputs"], seen["outputs"] = (
                x.reshape(*shape, -1)[rows.to(x.device), tokens.to(x.device)] for x in (args[0], output)
            )

        def last(module: nn.Module, args: Any, output: Any) -> None:
            y = first_tensor(output)
            seen["hidden"] = y[rows.to(y.device), tokens.to(y.device)]

        handles = [module.register_forward_hook(keep) for module in modules[at:layer]]
        handles += [self.blocks.down(layer).register_forward_hook(look), modules[layer].register_forward_hook(last)]
        try:
            base = self.blocks.base
            with eval_mode(base), skipping(modules, recording), ending_at(base, modules[layer]):
                run_backbone(base, recording.batch)
        finally:
            for handle in handles:
                handle.remove()
        self._at[number] = replace(recording, hidden=hidden[0], rests=tuple(rests))
        return seen["inputs"], seen["outputs"], seen["hidden"]

    @torch.no_grad()
    def finish(self) -> Tensor:
        """The model's last hidden states (tokens, d) at the kept tokens."""
        return self.last()

    def last(self) -> Tensor:
        """`finish`, with a gradient where one is enabled."""
        found = []
        for recording, (rows, tokens) in zip(self._at, self._spots, strict=True):
            with eval_mode(self.blocks.base), skipping(self.blocks.modules, recording):
                last = run_backbone(self.blocks.base, recording.batch)
            found.append(last[rows.to(last.device), tokens.to(last.device)])
        return torch.cat(found)


@torch.no_grad()
def outputs_of(
    blocks: Blocks, rows: Sequence[Sequence[int]], kept: Sequence[int], layers: Sequence[int]
) -> tuple[Mapping[int, Tensor], Tensor]:
    """({block: its outputs (tokens, d)}, the last hidden states (tokens, d)) at the kept tokens, in one pass.

    The tokens stand in the order of a `Stream` over as many rows with the same tails.

    Args:
        blocks: the model's.
        rows: token ids of each row.
        kept: how many of a row's last tokens are read.
        layers: the blocks whose outputs are wanted.
    """
    found: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    seen: dict[int, Tensor] = {}

    def keep(layer: int) -> Any:
        return lambda module, args, output: seen.__setitem__(layer, first_tensor(output))

    handles = [blocks.modules[layer].register_forward_hook(keep(layer)) for layer in layers]
    last: list[Tensor] = []
    try:
        with eval_mode(blocks.base):
            for start in range(0, len(rows), ROWS):
                part, tails = rows[start : start + ROWS], kept[start : start + ROWS]
                hidden, skipped = _read(blocks.base, part, tails)
                for i, (row, tail) in enumerate(zip(part, tails, strict=True)):
                    own = slice(len(row) - tail - skipped, len(row) - skipped)
                    last.append(hidden[i, own])
                    for layer in layers:
                        found[layer].append(seen[layer][i, own])
    finally:
        for handle in handles:
            handle.remove()
    return {layer: torch.cat(parts) for layer, parts in found.items()}, torch.cat(last)


def _read(base: Any, rows: Sequence[Sequence[int]], kept: Sequence[int]) -> tuple[Tensor, int]:
    """(the last hidden states (rows, tokens, d) of a batch, so many first tokens left out of them).

    Tokens that all rows begin with, a context say, are read once for all of them.
    """
    most = min(len(row) - tail for row, tail in zip(rows, kept, strict=True))
    shared = next((n for n in range(most) if len({row[n] for row in rows}) > 1), most)
    cache = DynamicCache(config=base.config)
    if len(rows) == 1 or shared < PREFIX or not all(isinstance(layer, DynamicLayer) for layer in cache.layers):
        return run_backbone(base, padded(rows, device_of(base))), 0
    decoder = decoder_of(base)
    decoder(**padded([rows[0][:shared]], device_of(base)), past_key_values=cache, use_cache=True)
    cache.batch_repeat_interleave(len(rows))
    rest = padded([row[shared:] for row in rows], device_of(base))
    return decoder(**rest, past_key_values=cache, use_cache=True).last_hidden_state, shared
