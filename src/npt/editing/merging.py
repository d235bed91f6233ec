"""Two stores of one base made one."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from npt.editing.requests import check_together
from npt.errors import NPTError

if TYPE_CHECKING:
    from npt.editing.store import EditStore


def check_mergeable(store: EditStore, other: EditStore) -> None:
    """Checks that a store can take over the edits of another one.

    Raises:
        NPTError: other blocks, another metric or text, or the same prompt with two targets.
    """
    if other.facts:
        if store.layers not in ((), other.layers):
            one, two = (" ".join(map(str, layers)) for layers in (store.layers, other.layers))
            raise NPTError(f"the stores edit blocks {one} and {two}; write one's edits anew in the other")
        if store.metric != other.metric:
            raise NPTError(
                f"the stores have the metrics {store.metric} and {other.metric}; write one's edits anew in the other"
            )
        new = [edit for edit in other.facts if edit not in store.facts]
        check_together([e.request for e in new], [f"edit {e.id}" for e in new], [e.request for e in store.facts])
    store.contexts.check_mergeable(other.contexts)


def take_over(store: EditStore, other: EditStore) -> None:
    """See `EditStore.merge`."""
    check_mergeable(store, other)
    known = {edit.id for edit in store.edits}
    new = [edit for edit in other.edits if edit.id not in known]
    store.refining = replace(store.refining, steps=max(store.refining.steps, other.refining.steps))
    store.contexts.merge(other.contexts)
    store.adopt(new, {edit.id: other.pairs_of(edit.id) for edit in other.facts if edit.id not in known}, other.layers)
