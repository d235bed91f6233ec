"""A model laid open at one block: its projection's inputs, passes from the block on, and text it writes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from npt.block.families import blocks_of, family_of
from npt.block.probing import find, linear_shape
from npt.common.fingerprint import base_record
from npt.common.sharded import is_sharded
from npt.editing.adapter import DownAdapter
from npt.editing.keys import Place, Prompts
from npt.editing.replay import Recording, record, run_again
from npt.editing.statistics import padded
from npt.errors import ConversionError
from npt.evaluation.generation import continue_text
from npt.tuner.converted import base_of, device_of, eval_mode, vocabulary_size

#: Rows of a batch of prompts.
ROWS = 32


@dataclass(frozen=True)
class Inside:
    """One pass of the base over rows of prompts, in the projection's own place.

    recording: to run it again from the block on. inputs: (rows, tokens, f). outputs: (rows, tokens, d), the projection's.
    """

    recording: Recording
    inputs: Tensor
    outputs: Tensor


class Bench:
    """One block of a causal LM, plain or inside a PEFT model, and its `down`.

    Args:
        model: as `EditStore` takes it. tokenizer: the model's. layer: the block's index.

    Raises:
        ConversionError: no such block, or its projection is neither Linear nor Conv1D. NPTError: edits are at work already.
    """

    def __init__(self, model: Any, tokenizer: Any, layer: int):
        self.model, self.tokenizer, self.layer = model, tokenizer, layer
        self.base = base_of(model)
        check_whole(self.base)
        self.blocks = list(blocks_of(self.base))
        if not 0 <= layer < len(self.blocks):
            raise ConversionError(
                f"layer={layer}: the model has {len(self.blocks)} blocks; use 0 to {len(self.blocks) - 1}, or 'auto'"
            )
        self.down = find(self.blocks[layer], family_of(self.base), "down")
        self.width, self.size = linear_shape(self.down)
        self.prompts = Prompts(tokenizer, self.base.config, vocabulary_size(self.base))
        self.adapter = DownAdapter(self.down, self.base)

    @cached_property
    def fingerprint(self) -> dict[str, Any] | None:
        """The record that files of edits keep of the base (see `npt.common.fingerprint.base_record`)."""
        return base_record(self.base)

    @property
    def module(self) -> str:
        """The projection's name in the base."""
        return next(name for name, module in self.base.named_modules() if module is self.down)

    def batch(self, rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        """Token ids as the model takes them."""
        return padded(rows, device_of(self.base))

    def inside(self, rows: Sequence[Sequence[int]], whole: bool = True) -> Inside:
        """One pass of the base, without any edit.

        Args:
            rows: token ids.
            whole: False ends it behind the projection, without logits.
        """
        batch, seen, given = self.batch(rows), list[Tensor](), list[Tensor]()
        handle = self.down.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
        after = self.down.register_forward_hook(lambda module, args, output: given.append(output.detach()))
        try:
            with eval_mode(self.base), self.adapter.off():
                found = record(self.base, self.blocks, self.layer, batch, None if whole else self.down)
        finally:
            handle.remove()
            after.remove()
        shape = batch["input_ids"].shape
        return Inside(found, seen[-1].reshape(*shape, -1), given[-1].reshape(*shape, -1))

    def again(self, recording: Recording, positions: Tensor | None = None) -> Tensor:
        """Logits of a recorded batch with what is at work now: edits, a trial or nothing; see `run_again`."""
        with eval_mode(self.base):
            return run_again(self.base, self.blocks, recording, positions)

    def keys(self, places: Sequence[Place]) -> Tensor:
        """The projection's input at each place, (f, places), float64 on the CPU."""
        found = []
        for part in chunks(places):
            inputs = self.inside([place.ids for place in part], whole=False).inputs
            found += [inputs[row, place.position].cpu().double() for row, place in enumerate(part)]
        return torch.stack(found, 1)

    def write(self, prompt: str, new_tokens: int) -> str:
        """The text that the model puts behind a prompt, greedily; special tokens are left out."""
        return written(self.base, self.tokenizer, prompt, new_tokens)


def written(
    base: Any, tokenizer: Any, prompt: str, new_tokens: int, enough: Callable[[str], bool] | None = None
) -> str:
    """The text that a causal LM puts behind a prompt, greedily; special tokens are left out.

    `enough` ends it where it says so of the text so far.
    """

    def text(ids: list[int]) -> str:
        found: str = tokenizer.decode(ids, skip_special_tokens=True)
        return found

    with eval_mode(base):
        stop = None if enough is None else lambda ids: enough(text(ids))
        return text(continue_text(base, tokenizer, prompt, new_tokens, enough=stop)[1])


def check_whole(base: Any) -> None:
    """Checks that a model's weights are here, whole.

    Raises:
        ConversionError: they are spread over processes, or nowhere.
    """
    if is_sharded(base) or any(parameter.is_meta for parameter in base.parameters()):
        raise ConversionError(
            "edits need the whole model in one process; load it without sharding or offloading to disk, then write them"
        )


def chunks(items: Sequence[Any], size: int = ROWS) -> Iterator[Sequence[Any]]:
    """Parts of a sequence, in order."""
    for start in range(0, len(items), size):
        yield items[start : start + size]
