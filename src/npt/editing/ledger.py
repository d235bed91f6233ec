"""The content of a store: edits, keys and values of facts, absorbed contexts, and the weight delta they make together."""

from __future__ import annotations

from npt.editing.absorbing.contexts import Contexts
from npt.editing.bench import Bench
from npt.editing.joint import Joint, together
from npt.editing.solve import Factors, Pairs, solve
from npt.editing.writing import Edit
from npt.errors import NPTError


class Ledger:
    """The facts and absorbed contexts of one model.

    Args:
        contexts: those that are absorbed.
        bench: the model at the blocks that facts are in; None where these are not chosen yet.
    """

    def __init__(self, contexts: Contexts, bench: Bench | None):
        self.contexts, self._bench, self.joint = contexts, bench, Joint()
        self._edits: dict[str, Edit] = {}
        self._pairs: dict[str, dict[int, Pairs]] = {}

    @property
    def edits(self) -> list[Edit]:
        """The edits, in the order in which they were written; those of `absorb` are `Absorbed`."""
        return [self.contexts.ledger.get(id, edit) for id, edit in self._edits.items()]

    @property
    def facts(self) -> list[Edit]:
        """The edits of `write` alone."""
        return [edit for id, edit in self._edits.items() if id in self._pairs]

    @property
    def layers(self) -> tuple[int, ...]:
        """The blocks that facts are in, rising; none until `layer="auto"` has chosen them."""
        return () if self._bench is None else self._bench.layers

    @property
    def pairs(self) -> dict[int, Pairs]:
        """{block: keys and values of all facts}, in an order that does not depend on that of writing; empty without one."""
        return together(self.bench, self._pairs, self.joint.cap) if self._pairs else {}

    def pairs_of(self, id: str) -> dict[int, Pairs]:
        """{block: keys and values} of one edit, those that it protects included."""
        return self._pairs[id]

    @property
    def chosen_ridge(self) -> float:
        """The ridge at work."""
        return self.joint.ridge

    @property
    def factors(self) -> dict[int, Factors]:
        """{block: weight delta of all facts}, left (d, n) and right (n, f), float64; empty without one."""
        solved = {} if self.joint.trained else self.pairs
        return {layer: solve(pairs, self.joint.ridge) for layer, pairs in solved.items()} or dict(self.joint.trained)

    @property
    def bench(self) -> Bench:
        """The model at the edited blocks.

        Raises:
            NPTError: no block is chosen yet.
        """
        if self._bench is None:
            raise NPTError("layer='auto': no block is chosen before the first edit; write one, or name a layer")
        return self._bench
