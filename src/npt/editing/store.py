"""`EditStore`: facts written into a few blocks of a model and contexts absorbed; proved, undone, saved and loaded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from npt.common.display import one_line
from npt.common.places import place
from npt.editing import measure
from npt.editing.absorbing.contexts import Contexts
from npt.editing.absorbing.whole import mean_kl_whole, previewed_whole
from npt.editing.adapter import DownAdapter
from npt.editing.bench import Bench
from npt.editing.checks import checked_layers, checked_limit, checked_ridge, checked_steps, known_ids
from npt.editing.joint import Joint, choose, warn_above
from npt.editing.ledger import Ledger
from npt.editing.measure import Preview, Verification
from npt.editing.metrics import Source
from npt.editing.refining import PIECES, Refining, check_refinable, refined
from npt.editing.requests import NAMES, Request, check_together, request_of
from npt.editing.scan import SPREAD, choose_layers
from npt.editing.solve import Pairs
from npt.editing.values import SHARING, settings_of
from npt.editing.writing import Edit, Writer, note_on
from npt.errors import NPTError


class EditStore(Ledger):
    """Permanent weight deltas: an adapter that is on or off, never a write to the base's weights. Facts (`write`) are in the
    same one or more blocks, absorbed contexts (`absorb`) in blocks of their own.

    Args:
        model: a causal language model, or a PEFT model around one. Its keys and values are found with its adapters as they
            are now.
        tokenizer: the model's.
        layer: the block for facts, 0-based, or several, which share each fact; "auto" finds them at the first one, by the
            overlap of keys.
        metric: the text that edits must not disturb: "domain" (text, and prompts like the edits'), "text" or "identity".
        statistics: that text: "self" (the base writes it) or a list of texts.
        domain: prompts like the edits'; None for those of the package.
        values: the strategy: "newton", "optimised", "margin" or "naive".
        ridge: how far edits whose keys overlap give way to each other; "auto" is the largest at which all hold.
        limit: the most that all facts may disturb the base's own text, mean KL in nats a token: values are shortened until
            they do not, and some may not hold then. None for no limit.
        refine: steps that train several facts together behind their solve, see `npt.editing.refining`; 0 for none.
        cache_dir: a folder that keeps statistics for the next store; None keeps them in memory alone.
        read_back: write down the text before and after each new edit; False leaves both blank, and asks one pass if it holds.
        progress: show progress bars.
        settings: of the strategy: see `npt.editing.trial.Settings`.

    Raises:
        NPTError: an argument out of range, or edits are at work on the model already.
        ConversionError: a model of an unknown family, or one that is not here as a whole.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        layer: int | Sequence[int] | str = "auto",
        metric: str = "domain",
        statistics: str | Sequence[str] = "self",
        domain: Sequence[str] | None = None,
        values: str = "newton",
        ridge: float | str = "auto",
        limit: float | None = None,
        refine: int = 0,
        cache_dir: str | Path | None = None,
        read_back: bool = True,
        progress: bool = True,
        **settings: Any,
    ):
        self.model, self.tokenizer = model, tokenizer
        self.settings = settings_of(values, settings)
        self.values, self.read_back, self.progress = values, read_back, progress
        self.ridge, self.limit = checked_ridge(ridge), checked_limit(limit)
        self.refining = Refining(checked_steps(refine), self.settings.terminator)
        self.source = Source(model, tokenizer, metric, statistics, domain, cache_dir, progress)
        self._together: list[DownAdapter] = []
        bench = None if layer == "auto" else self._opened(checked_layers(layer))
        shared = statistics, self.source.cache_dir, progress, self._together, self._facts_off
        super().__init__(Contexts(model, tokenizer, *shared), bench)
        self._finds: Writer | None = None
        self.text: list[list[int]] | None = None
        self.metric, self._refusal = self.source.name, ""

    # -- what is at work ---------------------------------------------------------------------------------------------------

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The base without edits within a `with` block."""
        with self._facts_off(), self.contexts.patches.off():
            yield

    def _facts_off(self) -> AbstractContextManager[None]:
        return nullcontext() if self._bench is None else self._bench.off()

    def close(self) -> None:
        """Takes the edits off the model, until `reopen`."""
        self.contexts.patches.close()
        if self._bench is not None:
            self._bench.close()

    def reopen(self) -> None:
        """Puts the edits to work again after `close`.

        Raises:
            NPTError: another store is at work on the model.
        """
        if self._bench is not None:
            self._bench.open()
        self.contexts.patches.open()

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

    def write_many(self, records: Iterable[Mapping[str, Any] | Request], *, refine: bool = True) -> list[Edit]:
        """Writes many facts at once, which is the same as one after the other and takes one solve.

        Args:
            records: requests, or dicts with the names of `write`'s arguments.
            refine: False leaves the store's steps by gradient to a later call.

        Returns:
            the new edits, in the records' order.

        Raises:
            DataError, NPTError: as `write`; nothing is written then.
        """
        if self._refusal:
            raise NPTError(self._refusal)
        requests = [r if isinstance(r, Request) else request_of(r, f"edit {i}") for i, r in enumerate(records, 1)]
        where = [f"edit {i}" for i in range(1, len(requests) + 1)]
        check_together(requests, where, [edit.request for edit in self.facts])
        if not requests:
            return []
        with self.contexts.patches.off():  # keys and values are the base's
            if self._bench is None:
                self._bench = self._opened(
                    choose_layers(self.source, requests, SPREAD if self.values in SHARING else 1)
                )
            if self.refining.steps and len(self._pairs) + len(requests) > 1:  # before any long work
                check_refinable(self.bench)
            found = self._writer().all(requests, self.progress)
        with self._unchanged_unless_done():
            for request in requests:
                self._pairs[request.id] = found[request.id].pairs
                self._edits[request.id] = Edit(
                    request.id, request, self.layers, self.values, found[request.id].passes, "", "", False,
                    note_on(request),
                )  # fmt: skip
            self._apply(refine)
            self._read(requests)
        return [self._edits[request.id] for request in requests]

    def _read(self, requests: Sequence[Request]) -> None:
        """Writes down what comes out of facts now."""
        told = measure.readings(self.bench, requests, self.disabled, self.read_back, self.progress) if requests else ()
        for request, fields in zip(requests, told, strict=True):
            self._edits[request.id] = replace(self._edits[request.id], **fields)

    def refine(self, steps: int) -> None:
        """Trains the facts together behind their solve, those that are written later too; 0 goes back to the solve.

        Args:
            steps: see `EditStore`.

        Raises:
            NPTError: no whole number from 0, or see `npt.editing.refining.refined`; the store is as before then.
        """
        with self._unchanged_unless_done():
            self.refining = replace(self.refining, steps=checked_steps(steps))
            self._apply()
            self._read([edit.request for edit in self.facts])

    def undo(self, id: str, *others: str) -> None:
        """Takes edits back: as if they had never been written. Without any edit left, the base is bit for bit itself.

        Args:
            id: of an edit.
            others: of more, which takes one solve together.

        Raises:
            NPTError: no edit has that id, or those that are left can't be trained together; nothing is undone then.
        """
        gone = {id, *others}
        for one in gone:
            if one not in self._edits:
                raise NPTError(f"{one_line(repr(one), 40)}: no edit has that id; {known_ids(self._edits)}")
        with self._unchanged_unless_done():
            self.contexts.undo(gone)
            self._edits = {one: edit for one, edit in self._edits.items() if one not in gone}
            if gone & set(self._pairs):
                self._pairs = {one: pairs for one, pairs in self._pairs.items() if one not in gone}
                self._apply()

    def absorb(
        self,
        context: str | Sequence[Mapping[str, str]],
        questions: Sequence[str] | None = None,
        answers: Sequence[str] | None = None,
        blocks: str | Sequence[int] = "auto",
        **options: Any,
    ) -> Edit:
        """Absorbs a context: without it, the model answers as it does with it in front. Their order does not matter.

        Args:
            context: a text (a page of facts, a system prompt), or the messages of a chat (examples). A text that is longer
                than the model's window is taught in chunks.
            questions: questions that matter; None has the model write them.
            answers: of the questions; None takes those that the model gives with the context in front.
            blocks: the blocks to patch; "auto" is ten of all but the lowest, or those that the closed form chooses.
            options: see `npt.editing.absorbing.settings.Options`.

        Raises:
            DataError: a blank or contradictory argument, one that the model's window does not hold, too few answers.
            NPTError: an unknown option or a value out of range, the context is absorbed already, other contexts were absorbed
                beside other text than `statistics`, the base has no gradient, or the store is closed.
            ConversionError: blocks that do more behind their MLP. Nothing is absorbed then.
        """
        with self._unchanged_unless_done():
            found = self.contexts.absorb(context, questions, answers, blocks, options)
            self._edits[found.id] = found
        return found

    def merge(self, other: EditStore) -> None:
        """Takes over the edits of another store of the same base, and of the same blocks and metric where both hold facts.

        Raises:
            NPTError: other blocks, another metric, the same prompt with two targets, or facts that can't be trained together.
        """
        from npt.editing.merging import take_over

        with self._unchanged_unless_done():
            take_over(self, other)

    def adopt(self, edits: Sequence[Edit], pairs: Mapping[str, dict[int, Pairs]], layers: tuple[int, ...]) -> None:
        """Puts edits of another store to work too, for `merge`; those that were absorbed are at work already."""
        if pairs and self._bench is None:
            self._bench = self._opened(layers)
        self._edits.update({edit.id: edit for edit in edits})
        if pairs:
            self._pairs.update(pairs)
            self._apply()

    # -- proving -----------------------------------------------------------------------------------------------------------

    def preview(self, text: str, new_tokens: int = 24) -> Preview:
        """The text that the base and the edited model write behind a text, and how far apart they are on it.

        One pass of the base gives the logits of both: the edited model goes on from the lowest edited block.
        """
        if self.contexts.ledger:
            return previewed_whole(self.contexts.blocks.base, self.tokenizer, self.disabled, text, new_tokens)
        return measure.previewed(self.bench, text, new_tokens)

    def verify(self) -> list[Verification]:
        """Every edit's text before and after, with all edits at work, and whether it holds."""
        facts = measure.verified(self.bench, self.facts, self.progress) if self._pairs else []
        return facts + self.contexts.verified()

    def divergence(self, texts: Sequence[str]) -> float:
        """Mean KL of the edited model's next-token distributions from the base's over texts, in nats a token."""
        if self.contexts.ledger:
            return mean_kl_whole(self.contexts.blocks.base, self.tokenizer, self.disabled, texts)
        return measure.mean_kl(self.bench, texts)

    # -- files -------------------------------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> Path:
        """Writes a folder that plain PEFT loads as a LoRA, with edits.json and what undoing needs beside it.

        Raises:
            NPTError: the folder holds something else. RunError: the disk is full or gone; what was there is whole.
        """
        from npt.editing.folder import save_store

        return save_store(self, Path(folder))

    def export_gguf(self, file: str | Path) -> Path:
        """Writes the edits as a GGUF LoRA, for `llama-server --lora FILE` on any GGUF file of the base, quantised ones too.

        Raises:
            NPTError: another suffix than .gguf, or llama.cpp has no model of this family. RunError: as `save`.
        """
        from npt.editing.export import store_as_gguf

        return store_as_gguf(self, place(file))

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

    def restore(
        self, edits: Sequence[Edit], pairs: Mapping[str, dict[int, Pairs]], joint: Joint, text: Any = None
    ) -> None:
        """Puts facts to work that were written before, and `text` of `beside`; `edits` names those absorbed too, in order."""
        self._edits, self._pairs = {edit.id: edit for edit in edits}, dict(pairs)
        self.joint, self.text = joint, text
        self._set()

    def refuse_writing(self, why: str, metric: str) -> None:
        """Makes every further write an error that says why, and names the metric of the facts that are there."""
        self._refusal, self.metric = why, metric

    def _opened(self, layers: tuple[int, ...]) -> Bench:
        return Bench(self.model, self.tokenizer, layers, self._together)

    def _writer(self) -> Writer:
        """Finds the pairs of single edits; made when the block is known."""
        if self._finds is None:
            self._finds = Writer(self.source, self.bench, self.values, self.settings)
        return self._finds

    @contextmanager
    def _unchanged_unless_done(self) -> Iterator[None]:
        """Puts edits, contexts and weight deltas back where a `with` block fails."""
        before = dict(self._edits), dict(self._pairs), self.joint, self.refining
        try:
            with self.contexts.unchanged_unless_done():
                yield
        except BaseException:
            self._edits, self._pairs, self.joint, self.refining = before
            self._set()
            raise

    def _apply(self, refine: bool = True) -> None:
        """Chooses how facts are solved for, trains them together, and puts the joint weight delta to work."""
        self.joint, requests = Joint(), {id: self._edits[id].request for id in self._pairs}
        watched = self.contexts.watched_rows
        with self.contexts.patches.off():  # all of it is about the base, whatever is absorbed
            if requests:
                self.joint = choose(self.bench, self._pairs, requests, self.ridge, self.limit, watched)
            if refine and self.refining.steps and len(requests) > 1:
                beside = self.beside(), self._writer().prefixes()
                trained = refined(self.bench, requests, self.factors, self.refining, *beside, self.progress)
                self.joint = replace(self.joint, trained=trained)
            self._set()
            if self.joint.trained and self.limit is not None:
                warn_above(self.limit, self.bench, watched())

    def beside(self) -> list[list[int]]:
        """Token ids of the text that training facts together reads, which the store's folder keeps.

        Raises:
            NPTError: the store was loaded with other text than its facts were written beside.
        """
        if self.text is None:
            if self._refusal:
                raise NPTError(self._refusal)
            with self.bench.off():
                self.text = self.source.text(self.bench.first.width)[:PIECES]
        return self.text

    def _set(self) -> None:
        if self._bench is not None:
            self._bench.set(self.factors)
