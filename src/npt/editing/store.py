"""`EditStore`: facts written into one block of a model, proved, undone, saved and loaded."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from npt.common.display import one_line
from npt.common.places import place
from npt.common.progress import tracked
from npt.common.writable import check_file
from npt.editing.bench import Bench
from npt.editing.measure import RIDGES, Preview, Verification, follows, holding, largest_ridge, mean_kl, previewed
from npt.editing.metrics import Source
from npt.editing.requests import NAMES, Request, check_together, request_of
from npt.editing.scan import choose_layer
from npt.editing.solve import Factors, Pairs, joined, solve
from npt.editing.values import Settings, settings_of
from npt.editing.writing import Edit, Writer, note_on
from npt.errors import NPTError

logger = logging.getLogger(__name__)

#: Tokens that are written behind a prompt, beside those of its target, to show the text before and after.
SHOWN = 12


class EditStore:
    """Permanent weight deltas on one block of a model: an adapter that is on or off, never a write to the base's weights.

    Args:
        model: a causal language model, or a PEFT model around one. Its keys and values are found with its adapters as they
            are now.
        tokenizer: the model's.
        layer: the block to edit, 0-based; "auto" finds it at the first edit, by the overlap of keys.
        metric: the text that edits must not disturb: "domain" (text, and prompts like the edits'), "text" or "identity".
        statistics: that text: "self" (the base writes it) or a list of texts.
        domain: prompts like the edits'; None for those of the package.
        values: the strategy: "newton", "optimised", "margin" or "naive".
        ridge: how far edits whose keys overlap give way to each other; "auto" is the largest at which all hold.
        cache_dir: a folder that keeps statistics for the next store; None keeps them in memory alone.
        read_back: write down the text before and after each new edit; False leaves both blank, and asks one pass if it holds.
        progress: show progress bars.
        settings: of the strategy: see `npt.editing.values.Settings`.

    Raises:
        NPTError: an argument out of range, or edits are at work on the model already.
        ConversionError: a model of an unknown family, or one that is not here as a whole.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        layer: int | str = "auto",
        metric: str = "domain",
        statistics: str | Sequence[str] = "self",
        domain: Sequence[str] | None = None,
        values: str = "newton",
        ridge: float | str = "auto",
        cache_dir: str | Path | None = None,
        read_back: bool = True,
        progress: bool = True,
        **settings: Any,
    ):
        self.model, self.tokenizer = model, tokenizer
        self.settings: Settings = settings_of(values, settings)
        self.values, self.ridge, self.read_back, self.progress = values, _ridge(ridge), read_back, progress
        _check_layer(layer)
        self.source = Source(model, tokenizer, metric, statistics, domain, cache_dir, progress)
        self._bench: Bench | None = None if layer == "auto" else Bench(model, tokenizer, int(layer))
        self._finds: Writer | None = None
        self._edits: dict[str, Edit] = {}
        self._pairs: dict[str, Pairs] = {}
        self._refusal = ""
        self.chosen_ridge = 0.0

    # -- what is in it -----------------------------------------------------------------------------------------------------

    @property
    def edits(self) -> list[Edit]:
        """The edits, in the order in which they were written."""
        return list(self._edits.values())

    @property
    def layer(self) -> int | None:
        """The block that is edited; None until `layer="auto"` has chosen one."""
        return None if self._bench is None else self._bench.layer

    @property
    def pairs(self) -> Pairs | None:
        """The keys and values of all edits, in an order that does not depend on that of writing; None without an edit."""
        return joined([self._pairs[id] for id in sorted(self._pairs)]) if self._pairs else None

    def pairs_of(self, id: str) -> Pairs:
        """The keys and values of one edit, those that it protects included."""
        return self._pairs[id]

    @property
    def factors(self) -> Factors | None:
        """The weight delta of all edits, left (d, n) and right (n, f), float64; None without an edit."""
        pairs = self.pairs
        return None if pairs is None else solve(pairs, self.chosen_ridge)

    @property
    def bench(self) -> Bench:
        """The model at the edited block.

        Raises:
            NPTError: no block is chosen yet.
        """
        if self._bench is None:
            raise NPTError("layer='auto': no block is chosen before the first edit; write one, or name a layer")
        return self._bench

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The base without edits within a `with` block."""
        if self._bench is None:
            yield
            return
        with self._bench.adapter.off():
            yield

    def close(self) -> None:
        """Takes the edits off the model, until `reopen`."""
        if self._bench is not None:
            self._bench.adapter.close()

    def reopen(self) -> None:
        """Puts the edits to work again after `close`.

        Raises:
            NPTError: another store is at work on the model.
        """
        if self._bench is not None:
            self._bench.adapter.open()

    # -- writing -----------------------------------------------------------------------------------------------------------

    def write(
        self,
        prompt: str,
        subject: str | None = None,
        target: str = "",
        paraphrases: Sequence[str] | None = None,
        protect: Sequence[str] | None = None,
    ) -> Edit:
        """Writes one fact: after the prompt, the model says the target.

        Args:
            prompt: the text before the target.
            subject: the part of the prompt that the fact is about. Without one the edit sits at the prompt's last token, and
                other wordings will mostly not follow.
            target: what shall follow.
            paraphrases: other prompts for the same target, whose keys are averaged in.
            protect: prompts after which nothing shall change.

        Raises:
            DataError: a blank or contradictory argument; a subject that is the text's first token.
            NPTError: this prompt has another target already.
        """
        values = dict(zip(NAMES, (prompt, target, subject, paraphrases, protect), strict=True))
        return self.write_many([values])[0]

    def write_many(self, records: Iterable[Mapping[str, Any] | Request]) -> list[Edit]:
        """Writes many facts at once, which is the same as one after the other and takes one solve.

        Args:
            records: requests, or dicts with the names of `write`'s arguments.

        Returns:
            the new edits, in the records' order.

        Raises:
            DataError, NPTError: as `write`; nothing is written then.
        """
        if self._refusal:
            raise NPTError(self._refusal)
        records = list(records)
        where = [f"edit {number}" for number in range(1, len(records) + 1)]
        requests = [r if isinstance(r, Request) else request_of(r, w) for r, w in zip(records, where, strict=True)]
        check_together(requests, where, [edit.request for edit in self.edits])
        if not requests:
            return []
        if self._bench is None:
            self._bench = Bench(self.model, self.tokenizer, choose_layer(self.source, requests))
        writer = self._writer()
        for request in requests:  # before any long work
            writer.check(request)
        found = {}
        for request in tracked(requests, "Writing edits", self.progress and len(requests) > 1, unit="edits"):
            found[request.id] = writer.alone(request)
        before = dict(self._edits), dict(self._pairs), self.chosen_ridge
        try:
            for request in requests:
                self._pairs[request.id] = found[request.id].pairs
                self._edits[request.id] = Edit(
                    request.id, request, self.bench.layer, self.values, found[request.id].passes, "", "", False,
                    note_on(request),
                )  # fmt: skip
            self._apply()
            self._tell(requests)
        except BaseException:
            self._edits, self._pairs, self.chosen_ridge = before
            self._set()
            raise
        return [self._edits[request.id] for request in requests]

    def undo(self, id: str) -> None:
        """Takes one edit back: as if it had never been written. Without any edit left, the base is bit for bit itself.

        Raises:
            NPTError: no edit has that id.
        """
        if id not in self._edits:
            raise NPTError(f"{one_line(repr(id), 40)}: no edit has that id; {_known(self._edits)}")
        del self._edits[id], self._pairs[id]
        self._apply()

    def merge(self, other: EditStore) -> None:
        """Takes over the edits of another store of the same base, layer and metric: afterwards this one is their union.

        Raises:
            NPTError: another layer or metric, or the same prompt with two targets.
        """
        if other.layer is None or not other._pairs:
            return
        if self.layer not in (None, other.layer):
            raise NPTError(
                f"the stores edit blocks {self.layer} and {other.layer}; write one's edits anew in the other"
            )
        if self.source.name != other.source.name:
            raise NPTError(
                f"the stores have the metrics {self.source.name} and {other.source.name}; write one's edits anew in the other"
            )
        new = [edit for edit in other.edits if edit.id not in self._edits]
        check_together([e.request for e in new], [f"edit {e.id}" for e in new], [e.request for e in self.edits])
        if self._bench is None:
            self._bench = Bench(self.model, self.tokenizer, other.layer)
        self._edits.update({edit.id: edit for edit in new})
        self._pairs.update({edit.id: other._pairs[edit.id] for edit in new})
        self._apply()

    # -- proving -----------------------------------------------------------------------------------------------------------

    def preview(self, text: str, new_tokens: int = 24) -> Preview:
        """The text that the base and the edited model write behind a text, and how far apart they are on it.

        The logits of both come from one pass of the base, of which the edited model runs the blocks from the edited one on.
        """
        return previewed(self.bench, text, new_tokens)

    def verify(self) -> list[Verification]:
        """Every edit's text before and after, with all edits at work, and whether it holds."""
        found = []
        for edit in tracked(self.edits, "Verifying", self.progress and len(self._edits) > 8, unit="edits"):
            after = self.bench.write(edit.request.prompt, self._shown(edit.request))
            holds = follows(after, edit.request.target)
            found.append(Verification(edit.id, edit.request.prompt, edit.request.target, edit.before, after, holds))
        return found

    def divergence(self, texts: Sequence[str]) -> float:
        """Mean KL of the edited model's next-token distributions from the base's over texts, in nats a token."""
        return mean_kl(self.bench, texts)

    # -- files -------------------------------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> Path:
        """Writes a folder that plain PEFT loads as a LoRA, with edits.json and what undoing needs beside it.

        Raises:
            NPTError: there is no edit. RunError: the disk is full or gone; what was there is whole.
        """
        from npt.editing.folder import save_store

        return save_store(self, Path(folder))

    def export_gguf(self, file: str | Path) -> Path:
        """Writes the edits as a GGUF LoRA, for `llama-server --lora FILE` on any GGUF file of the base, quantised ones too.

        Raises:
            NPTError: another suffix than .gguf, or llama.cpp has no model of this family. RunError: as `save`.
        """
        from npt.editing.export import lora_of, write_gguf

        path = place(file)
        check_file("export_gguf", path, ".gguf")
        write_gguf(lora_of(self), path, self.bench.module, self.bench.base.config)
        return path

    @classmethod
    def load(cls, model: Any, tokenizer: Any, folder: str | Path, **options: Any) -> EditStore:
        """The store in a folder, on the base it was written for.

        Args:
            model: see `EditStore`.
            tokenizer: the model's.
            folder: of `save`.
            options: of `EditStore`, for later edits.

        Raises:
            CheckpointError: missing, damaged, or of another base.
        """
        from npt.editing.folder import load_store

        return load_store(cls, model, tokenizer, Path(folder), options)

    def restore(self, edits: Sequence[Edit], pairs: Mapping[str, Pairs], ridge: float) -> None:
        """Puts edits to work that were written before, for `load`."""
        self._edits, self._pairs = {edit.id: edit for edit in edits}, dict(pairs)
        self.chosen_ridge = ridge
        self._set()

    def refuse_writing(self, why: str) -> None:
        """Makes every further write an error that says why."""
        self._refusal = why

    # -- pieces ------------------------------------------------------------------------------------------------------------

    def _writer(self) -> Writer:
        """Finds the pairs of single edits; made when the block is known."""
        if self._finds is None:
            self._finds = Writer(self.source, self.bench, self.values, self.settings)
        return self._finds

    def _apply(self) -> None:
        """Chooses the ridge and puts the joint weight delta to work."""
        if not self._pairs:
            self.chosen_ridge = 0.0
        elif self.ridge != "auto":
            self.chosen_ridge = float(self.ridge)
        elif len(self._pairs) == 1:
            self.chosen_ridge = 0.0 if not self.edits[0].request.protect else RIDGES[-1]
        else:
            requests = [self._edits[id].request for id in sorted(self._pairs)]
            pairs = joined([self._pairs[id] for id in sorted(self._pairs)])
            self.chosen_ridge = largest_ridge(self.bench, pairs, requests)
        self._set()

    def _set(self) -> None:
        self.bench.adapter.set(self.factors)

    def _shown(self, request: Request) -> int:
        return SHOWN + len(self.bench.prompts.target(request.prompt, request.target, None).targets)

    def _tell(self, requests: Sequence[Request]) -> None:
        """Writes down the text before and after of new edits."""
        if not self.read_back:
            for request, holds in zip(requests, holding(self.bench, requests)(), strict=True):
                self._edits[request.id] = replace(self._edits[request.id], holds=holds)
            return
        for request in tracked(requests, "Reading back", self.progress and len(requests) > 1, unit="edits"):
            with self.disabled():
                before = self.bench.write(request.prompt, self._shown(request))
            after = self.bench.write(request.prompt, self._shown(request))
            self._edits[request.id] = replace(
                self._edits[request.id], before=before, after=after, holds=follows(after, request.target)
            )


def _known(edits: Mapping[str, Edit]) -> str:
    return f"use one of {one_line(', '.join(edits), 120)}" if edits else "the store has none"


def _ridge(ridge: float | str) -> float | str:
    if ridge == "auto" or (
        isinstance(ridge, int | float) and not isinstance(ridge, bool) and 0 <= ridge < float("inf")
    ):
        return ridge
    raise NPTError(f"ridge={ridge!r}: use 'auto', or a number from 0")


def _check_layer(layer: int | str) -> None:
    if layer != "auto" and type(layer) is not int:
        raise NPTError(f"layer={layer!r}: use 'auto', or the index of a block")
