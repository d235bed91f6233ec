"""One trunk: below the first converted block, an NPT model and its original are the same function of the same input."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from npt.block.families import blocks_of, decoder_of, hand_on
from npt.block.outputs import with_first
from npt.tuner.converted import active_layers, base_of, npt_layers, own_parameters

#: Held while stand-ins are put on or taken off, which several threads may do at once.
_CHANGING = threading.RLock()


@contextmanager
def shared_trunk(model: Any) -> Iterator[None]:
    """Runs the blocks below the first converted one in the first forward only; later ones get what they gave then.

        with shared_trunk(model):
            with as_original(model):
                teacher = base(**inputs)  # all blocks
            student = base(**inputs)  # from the first converted block on

    Every forward within it has to be of the same inputs, in the same dtype and mode. It holds for the calling thread; other
    threads run the whole model. It changes nothing where there is nothing to share: block 0 is converted, the adapter is of
    another method than NPT, the model is compiled in place, something beside NPT's components is trained, or blocks read keys
    and values of lower ones. What later forwards get of the trunk carries no gradient.
    """
    with ExitStack() as stack:
        for bypass in _bypasses(model):
            stack.enter_context(bypass.at_work())
        yield


def _bypasses(model: Any) -> Sequence[_Bypass]:
    """One for each block of the trunk."""
    if not npt_layers(model) or hand_on(base_of(model)):
        return ()
    own = own_parameters(model)
    if torch.is_grad_enabled() and any(p.requires_grad for p in model.parameters() if p not in own):
        return ()
    base, first = base_of(model), active_layers(model)[0].index
    trunk = list(blocks_of(base))[:first]
    whole = (model, base, decoder_of(base), *trunk)
    compiled = any(getattr(m, "_compiled_call_impl", None) is not None for m in whole)
    if compiled or torch.compiler.is_compiling():
        return ()
    return [_Bypass(block, last=index == first - 1) for index, block in enumerate(trunk)]


class _Bypass:
    """Stands in for a block of the trunk from its second call on.

    Args:
        block: the decoder block. last: its output is kept; any other block's hidden states are what came in, which nobody
            reads, and only what it returns beside them is kept.
    """

    def __init__(self, block: nn.Module, last: bool):
        self.block, self.last, self.has_run = block, last, False
        self.kept: Any = None

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Puts itself in the place of the block's forward, for the calling thread."""
        switch = _Switch.on(self.block)
        try:
            switch.stand_ins[threading.get_ident()] = self
            yield
        finally:
            switch.off(self.block)

    def run(self, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The block's output."""
        if not self.has_run:
            output, self.has_run = forward(*args, **kwargs), True
            # A tensor that some block above changes in place would not be the trunk's any more.
            self.kept = with_first(output, lambda x: x.detach().clone() if self.last else None)
            return output
        hidden = args[0] if args else kwargs["hidden_states"]
        return with_first(self.kept, torch.clone if self.last else lambda _: hidden)


class _Switch:
    """A block's forward while some thread shares its trunk: the stand-in's for such a thread, the block's own for others."""

    def __init__(self, block: nn.Module):
        self.own = vars(block).get("forward")  # accelerate's, where it moves weights; else the class has it
        self.forward = block.forward
        self.stand_ins: dict[int, _Bypass] = {}

    @staticmethod
    def on(block: nn.Module) -> _Switch:
        """The block's switch, which is put on where there is none."""
        with _CHANGING:
            found = vars(block).get("forward")
            if not isinstance(found, _Switch):
                found = _Switch(block)
                vars(block)["forward"] = found
            return found

    def off(self, block: nn.Module) -> None:
        """Ends the calling thread's stand-in; the last one takes the switch off."""
        with _CHANGING:
            self.stand_ins.pop(threading.get_ident(), None)
            if self.stand_ins or vars(block).get("forward") is not self:
                return
            if self.own is None:
                del vars(block)["forward"]
            else:
                vars(block)["forward"] = self.own

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        stand_in = self.stand_ins.get(threading.get_ident())
        return self.forward(*args, **kwargs) if stand_in is None else stand_in.run(self.forward, args, kwargs)
