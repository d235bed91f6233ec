"""The state of one pass through an NPT block. It belongs to the thread that runs the pass.

A model that several threads call at the same time, as a web server does, never hands one thread's tensors, mode or observers
to another.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from torch import Tensor

from npt.block.component import NPComponent
from npt.block.terms import InputValues
from npt.block.weight_delta import Routing, WeightDelta

if TYPE_CHECKING:
    from npt.block.layer import NPTLayer


class Mode(Enum):
    """A block's behaviour instead of its adapter's."""

    ORIGINAL = "original"  # the unconverted block
    EXACT = "exact"  # the exact value, which has no parameters: gives the unconverted block's output
    ZERO = "zero"  # attention and MLP both dropped: the block must be the identity


@dataclass
class BlockRecord:
    """One pass through a block: h, a and the stream behind the MLP, the block's output, each (batch, tokens, d).

    Where the family has a tail, `output` is what the tail reads.
    """

    hidden_states: Tensor
    attention: Tensor
    output: Tensor


BlockObserver = Callable[["NPTLayer", BlockRecord], None]
DeltaObserver = Callable[["NPTLayer", dict[str, WeightDelta]], None]


class Pass:
    """The values that the hooks of one block hand to each other during one forward, and what `npt.block.modes` sets around it.

    Not a module: setting a module's attribute costs as much as a small kernel.
    """

    def __init__(self) -> None:
        self.override: Mode | None = None
        self.disabled = False  # PEFT's disable_adapter() context
        self.on_block: BlockObserver | None = None
        self.on_deltas: DeltaObserver | None = None
        self.component: NPComponent | None = None
        self.mode: Mode | None = None
        self.multiplier = 1.0
        self.clear()

    def clear(self) -> None:
        """Lets go of every tensor."""
        self.drop()
        self.observed: Tensor | None = None
        self.added: Tensor | None = None

    def drop(self) -> None:
        """Lets go of every tensor that the block's last hook does not read."""
        self.attention: Tensor | None = None
        self.residual: Tensor | None = None
        self.values: InputValues | None = None
        self.down: Tensor | None = None
        self.beside: Tensor | None = None
        self.routing: Routing | None = None


class ThreadState(threading.local):
    """One `Pass` for each thread that runs the block.

    Only `__init__`, which Python calls in each thread on its own, writes `now`. torch.compile reads a thread's attribute
    rightly, and guards on it, but writes one that is new in a thread to a place that no thread reads.
    """

    def __init__(self) -> None:
        self.now = Pass()

    def __reduce__(self) -> tuple[type[ThreadState], tuple[()]]:
        return ThreadState, ()  # a copied or unpickled block starts with no pass
