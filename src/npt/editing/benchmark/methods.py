"""Methods of editing with one interface: `write_many(requests)`, `model` to call behind `text(prompt)`, `undo()`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from npt import EditStore
from npt.block.families import blocks_of, family_of
from npt.block.outputs import first_tensor
from npt.block.probing import find
from npt.editing.adapter import DownAdapter
from npt.editing.bench import Bench, chunks
from npt.editing.export import rank_for
from npt.editing.joint import Joint
from npt.editing.keys import Place, Target
from npt.editing.metrics import Source
from npt.editing.requests import Request, continued
from npt.editing.solve import EPSILON, Factors, Metric
from npt.editing.trial import Problem, Settings, Trial
from npt.editing.values import descend
from npt.editing.writing import PREFIX_TOKENS, PREFIXES
from npt.errors import NPTError
from npt.tuner.converted import base_of

#: A step of `refine` reads about as many tokens as so many passes of one fact.
STEP = 20


@dataclass
class Setup:
    """The model that every method edits, and the text that none shall disturb.

    layers: the blocks of methods that edit several, rising; the middle one is that of methods that edit one. prefixes: how
    many short texts of the base keys are averaged behind, beside nothing. value_prefixes: the same for values that are
    searched for; None for as many. epsilon: see `Metric`.
    """

    model: Any
    tokenizer: Any
    source: Source
    layers: tuple[int, ...]
    prefixes: int = PREFIXES
    value_prefixes: int | None = None
    epsilon: float = EPSILON
    #: {(block, request, settings): (value, passes)} of `best_output` on the base, for methods that share it.
    known: dict[Any, tuple[Tensor, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        count = len(blocks_of(base_of(self.model)))
        if not self.layers or list(self.layers) != sorted(set(self.layers)) or self.layers[0] < 0:
            raise NPTError(f"layers={self.layers}: use block indices from 0, each once, in rising order")
        if self.layers[-1] >= count:
            raise NPTError(f"layers={self.layers}: the model has {count} blocks; use 0 to {count - 1}")

    @property
    def middle(self) -> int:
        """The block of methods that edit one."""
        return self.layers[len(self.layers) // 2]

    def down(self, layer: int) -> nn.Module:
        """A block's `down`."""
        base = base_of(self.model)
        return find(blocks_of(base)[layer], family_of(base), "down")

    @cached_property
    def contexts(self) -> list[str]:
        """Nothing, and short texts that the base writes."""
        return ["", *(self.source.prefixes(self.prefixes, PREFIX_TOKENS) if self.prefixes else [])]

    @cached_property
    def moments(self) -> dict[int, Tensor]:
        """C (f, f) of every layer, in float64; empty for the metric "identity"."""
        return self.source.moments({layer: self.down(layer) for layer in self.layers})

    def metric(self, layer: int) -> Metric:
        """M at a block."""
        return Metric(self.moments.get(layer), self.epsilon)


class Deltas:
    """Weight deltas at work on several blocks of a model at once; what is added to a block joins what is there."""

    def __init__(self, setup: Setup):
        self._setup = setup
        self._adapters: dict[int, DownAdapter] = {}
        self._factors: dict[int, Factors] = {}

    def add(self, layer: int, factors: Factors) -> None:
        """Adds a weight delta to a block's."""
        if layer not in self._adapters:
            down = self._setup.down(layer)
            self._adapters[layer], self._factors[layer] = DownAdapter(down, down), factors
        else:
            old = self._factors[layer]
            self._factors[layer] = Factors(
                torch.cat([old.left, factors.left], 1), torch.cat([old.right, factors.right])
            )
        self._adapters[layer].set(self._factors[layer])

    def of(self, layer: int) -> Tensor:
        """A block's weight delta (d, f)."""
        return self._factors[layer].delta

    def __len__(self) -> int:
        return len(self._adapters)

    @property
    def bytes(self) -> int:
        """Bytes of all weight deltas in float32, each in two factors or whole, whichever is less."""
        return sum(
            4 * min(f.left.numel() + f.right.numel(), len(f.left) * f.right.shape[1]) for f in self._factors.values()
        )

    def clear(self) -> None:
        """Takes all of them off: the base, bit for bit."""
        for adapter in self._adapters.values():
            adapter.close()
        self._adapters, self._factors = {}, {}

    @contextmanager
    def off(self) -> Iterator[None]:
        """The base within a `with` block."""
        with ExitStack() as stack:
            for adapter in self._adapters.values():
                stack.enter_context(adapter.off())
            yield


class Method:
    """A way to write facts into a model.

    Args:
        setup: the model and what belongs to it; nothing may be written on it.
    """

    #: True where edits that were taken back still decide how later ones come out.
    carries = False

    def __init__(self, setup: Setup):
        self.setup, self.model = setup, setup.model
        self.deltas = Deltas(setup)
        #: Passes forward and backward of all edits so far.
        self.passes = 0

    def write_many(self, requests: Sequence[Request]) -> None:
        """Writes facts beside those that are written."""
        raise NotImplementedError

    def undo(self) -> None:
        """Takes every fact back: `model` is the base again, bit for bit."""
        self.deltas.clear()

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The base within a `with` block."""
        with self.deltas.off():
            yield

    def text(self, prompt: str) -> str:
        """The text that `model` is given for a prompt."""
        return prompt

    @property
    def bytes(self) -> int:
        """Bytes of what is written now."""
        return self.deltas.bytes

    # -- shared by methods that look for values --------------------------------------------------------------------------

    @contextmanager
    def at(self, layer: int) -> Iterator[Bench]:
        """The model at a block, with the weight deltas that are at work."""
        bench = Bench(self.model, self.setup.tokenizer, layer)
        try:
            yield bench
        finally:
            bench.adapter.close()

    def places(self, bench: Bench, request: Request) -> list[Place]:
        """The subject's last token in the prompt, bare first and behind every prefix."""
        return [bench.prompts.place(request.prompt, request.subject, prefix) for prefix in self.setup.contexts]

    def rows(self, bench: Bench, request: Request) -> list[Target]:
        """The prompt with its target, bare first and behind the prefixes of values."""
        return [
            bench.prompts.target(prefix + request.prompt, request.target, None) for prefix in self._contexts_of_values()
        ]

    def _contexts_of_values(self) -> list[str]:
        count = self.setup.value_prefixes
        return self.setup.contexts if count is None else self.setup.contexts[: count + 1]

    def mean_key(self, bench: Bench, request: Request) -> Tensor:
        """The mean of the keys at `places`, (f,)."""
        return bench.keys(self.places(bench, request))[0].mean(1)

    def best_output(self, bench: Bench, request: Request, settings: Settings, length: float | None = None) -> Tensor:
        """The vector (d,) that, added to `down`'s output at the subject's token, makes the target follow: ROME's v* less W k.

        Args:
            length: of what weight decay and clamp are relative to; None for that of the projection's own output.
        """
        name = (bench.layers, request, settings, len(self._contexts_of_values()), length)
        if len(self.deltas):  # the model is not the base any more
            value, passes = self._searched(bench, request, settings, length)
        else:
            if name not in self.setup.known:
                self.setup.known[name] = self._searched(bench, request, settings, length)
            value, passes = self.setup.known[name]
        self.passes += passes
        return value

    def _searched(self, bench: Bench, request: Request, settings: Settings, length: float | None) -> tuple[Tensor, int]:
        extra = []
        if request.subject is not None and settings.essence > 0:
            extra = [bench.prompts.place(f"{request.subject} is a", request.subject, first=True)]
        problem = _problem(bench, request, settings)
        places = self.places(bench, request)[: len(self._contexts_of_values())]
        only = [place.position for place in (*places, *extra)]
        trial = Trial(problem, self.rows(bench, request), extra, only)
        if length is not None:
            trial.lengths = torch.tensor([length])
        values, passes = descend(problem, trial)
        return values[0], passes


def _problem(bench: Bench, request: Request, settings: Settings) -> Problem:
    """An edit without a key: what is tried is added at given tokens alone."""
    nothing = torch.zeros(bench.first.width, dtype=torch.float64)
    return Problem(bench, request, settings, (Metric(None),), (nothing,), (nothing[:, None][:, :0],))


def targets_at(bench: Bench, requests: Sequence[Request], settings: Settings) -> Trial:
    """Prompts with their targets, recorded up to the bench's block."""
    rows = [bench.prompts.target(request.prompt, request.target, None) for request in requests]
    return Trial(_problem(bench, requests[0], settings), rows, only=[row.start - 1 for row in rows])


def block_outputs(bench: Bench, places: Sequence[Place]) -> Tensor:
    """The bench's block's output at each place, (d, places), float64 on the CPU."""
    found, seen = [], list[Tensor]()
    block = bench.blocks[bench.layers[0]]
    handle = block.register_forward_hook(lambda module, args, output: seen.append(first_tensor(output).detach()))
    try:
        for part in chunks(places):
            bench.inside([place.ids for place in part])
            found += [seen[-1][row, place.position].cpu().double() for row, place in enumerate(part)]
    finally:
        handle.remove()
    return torch.stack(found, 1)


class Store(Method):
    """`npt.EditStore` at the setup's layers.

    Args:
        setup: see `Method`.
        several: False for a strategy that edits the middle one alone.
        options: of `EditStore`.
    """

    def __init__(self, setup: Setup, several: bool = True, **options: Any):
        super().__init__(setup)
        options = {"layer": setup.layers if several else setup.middle, "progress": False, "read_back": False, **options}
        self._store = EditStore(self.model, setup.tokenizer, **options)
        self._store.source = setup.source  # its statistics are known
        self._store.close()  # until something is written

    def write_many(self, requests: Sequence[Request]) -> None:
        self._store.reopen()
        self.passes += sum(edit.passes for edit in self._store.write_many(requests))
        if self._store.joint.trained:
            self.passes += STEP * self._store.refining.steps

    def undo(self) -> None:
        self._store.restore([], {}, Joint())
        self._store.close()

    @property
    def bytes(self) -> int:
        """Bytes of the weights of the LoRA that `EditStore.save` writes."""
        pairs = self._store.pairs
        return sum(4 * rank_for(len(pairs[s.layer])) * (s.width + s.size) for s in self._store.bench.sites if pairs)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        with self._store.disabled():
            yield


class Context(Method):
    """The statements in front of every prompt: what the model makes of facts that it is told. No weight changes."""

    def __init__(self, setup: Setup):
        super().__init__(setup)
        self._statements: list[str] = []

    def write_many(self, requests: Sequence[Request]) -> None:
        self._statements += [f"{continued(request.prompt, request.target)}." for request in requests]

    def undo(self) -> None:
        self._statements = []

    def text(self, prompt: str) -> str:
        return " ".join([*self._statements, prompt])

    @property
    def bytes(self) -> int:
        """Bytes of the statements' text."""
        return sum(len(statement.encode()) for statement in self._statements)
