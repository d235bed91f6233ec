"""A model laid open at one or more blocks: their projections' inputs, passes from the lowest on, and text it writes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from npt.block.families import blocks_of, family_of
from npt.block.probing import find, linear_shape
from npt.common.sharded import is_sharded
from npt.editing.adapter import DownAdapter
from npt.editing.keys import Place, Prompts
from npt.editing.replay import Recording, record, run_again
from npt.editing.solve import Factors
from npt.editing.statistics import padded
from npt.errors import ConversionError
from npt.evaluation.generation import continue_text
from npt.tuner.converted import base_of, device_of, eval_mode, vocabulary_size

#: Rows of a batch of prompts.
ROWS = 32


@dataclass(frozen=True)
class Inside:
    """One pass of the base over rows of prompts, in the place of each projection.

    recording: to run it again from the lowest block on. inputs: of each projection, (rows, tokens, f). outputs: of each,
    (rows, tokens, d).
    """

    recording: Recording
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]


@dataclass(frozen=True)
class Site:
    """One block that is edited. down: its projection, from `width` numbers to `size`. adapter: the hook on it."""

    layer: int
    down: nn.Module
    adapter: DownAdapter
    width: int
    size: int


class Bench:
    """Blocks of a causal LM, plain or inside a PEFT model, and the `down` of each.

    Args:
        model: as `EditStore` takes it. tokenizer: the model's. layers: indices of the blocks, rising.
        together: see `DownAdapter`.

    Raises:
        ConversionError: no such block, or its projection is neither Linear nor Conv1D. NPTError: edits are at work already.
    """

    def __init__(
        self, model: Any, tokenizer: Any, layers: int | Sequence[int], together: list[DownAdapter] | None = None
    ):
        self.model, self.tokenizer = model, tokenizer
        self.layers = (layers,) if isinstance(layers, int) else tuple(layers)
        self.base = base_of(model)
        check_whole(self.base)
        self.blocks = list(blocks_of(self.base))
        for layer in self.layers:
            if not 0 <= layer < len(self.blocks):
                raise ConversionError(
                    f"layer={layer}: the model has {len(self.blocks)} blocks; use 0 to {len(self.blocks) - 1}, or 'auto'"
                )
        family, together = family_of(self.base), [] if together is None else together
        downs = [find(self.blocks[layer], family, "down") for layer in self.layers]
        shapes = [linear_shape(down) for down in downs]
        self.prompts = Prompts(tokenizer, self.base.config, vocabulary_size(self.base))
        self.sites = tuple(
            Site(layer, down, DownAdapter(down, self.base, together=together), *shape)
            for layer, down, shape in zip(self.layers, downs, shapes, strict=True)
        )

    @property
    def first(self) -> Site:
        """The lowest block, or the only one."""
        return self.sites[0]

    @property
    def adapter(self) -> DownAdapter:
        """The hook on the lowest block's projection."""
        return self.first.adapter

    def set(self, factors: Mapping[int, Factors]) -> None:
        """Puts {block: weight delta} to work; a block that is not named is the base's."""
        for site in self.sites:
            site.adapter.set(factors.get(site.layer))

    @contextmanager
    def off(self) -> Iterator[None]:
        """The base alone within a `with` block."""
        with ExitStack() as stack:
            for site in self.sites:
                stack.enter_context(site.adapter.off())
            yield

    @contextmanager
    def trying(self, adds: Sequence[Callable[[Tensor], Tensor]]) -> Iterator[None]:
        """Each block's projection of input x adds its own `add(x)` instead of the edits."""
        with ExitStack() as stack:
            for site, add in zip(self.sites, adds, strict=True):
                stack.enter_context(site.adapter.trying(add))
            yield

    def open(self) -> None:
        """Puts the hooks on; see `DownAdapter.open`."""
        for site in self.sites:
            site.adapter.open()

    @property
    def is_open(self) -> bool:
        """True while the hooks are on."""
        return all(site.adapter.at_work for site in self.sites)

    def close(self) -> None:
        """Takes the hooks off."""
        for site in self.sites:
            site.adapter.close()

    def batch(self, rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        """Token ids as the model takes them."""
        return padded(rows, device_of(self.base))

    def inside(self, rows: Sequence[Sequence[int]], whole: bool = True) -> Inside:
        """One pass of the base, without any edit.

        Args:
            rows: token ids.
            whole: False ends it behind the highest projection, without logits.
        """
        batch, seen, given = self.batch(rows), dict[int, Tensor](), dict[int, Tensor]()
        handles = [handle for site in self.sites for handle in _watched(site, seen, given)]
        try:
            with eval_mode(self.base), self.off():
                found = record(self.base, self.blocks, self.layers[0], batch, None if whole else self.sites[-1].down)
        finally:
            for handle in handles:
                handle.remove()
        shape = batch["input_ids"].shape
        return Inside(found, *(tuple(of[n].reshape(*shape, -1) for n in self.layers) for of in (seen, given)))

    def again(self, recording: Recording, positions: Tensor | None = None) -> Tensor:
        """Logits of a recorded batch with what is at work now: edits, a trial or nothing; see `run_again`."""
        with eval_mode(self.base):
            return run_again(self.base, self.blocks, recording, positions)

    def keys(self, places: Sequence[Place]) -> tuple[Tensor, ...]:
        """Each projection's input at each place, (f, places), float64 on the CPU."""
        found: list[list[Tensor]] = [[] for _ in self.sites]
        for part in chunks(places):
            for own, inputs in zip(found, self.inside([place.ids for place in part], whole=False).inputs, strict=True):
                own += [inputs[row, place.position].cpu().double() for row, place in enumerate(part)]
        return tuple(torch.stack(own, 1) for own in found)

    def write(self, prompt: str, new_tokens: int) -> str:
        """The text that the model puts behind a prompt, greedily; special tokens are left out."""
        return written(self.base, self.tokenizer, prompt, new_tokens)


def _watched(site: Site, seen: dict[int, Tensor], given: dict[int, Tensor]) -> list[RemovableHandle]:
    """Hooks that keep what a block's projection is given, and gives."""
    return [
        site.down.register_forward_pre_hook(lambda module, args: seen.__setitem__(site.layer, args[0].detach())),
        site.down.register_forward_hook(lambda module, args, output: given.__setitem__(site.layer, output.detach())),
    ]


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
