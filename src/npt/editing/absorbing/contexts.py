"""The absorbed contexts of a store: their ledger, and the weight deltas that are solved for all of them together.

The weight deltas are a function of the ledger: of its contexts in the order of their ids, each with the setting that was
chosen for it alone, on the base. So the order of absorbing does not matter, and undoing one is as if it had never been
absorbed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from npt.common.display import one_line
from npt.editing.absorbing.absorbed import Absorbed, Compared, Figures, id_of
from npt.editing.absorbing.choice import LAM, MU, Choice, block_sets, trained_blocks
from npt.editing.absorbing.dialogue import Conversation, Dialogue, context_from, shown
from npt.editing.absorbing.general import CHOOSING, REPORTING, WATCHED_FOR_FACTS, GeneralText
from npt.editing.absorbing.gradient import BETA, PIECES, Trained, Training, check_trainable
from npt.editing.absorbing.lesson import Apart, Lesson
from npt.editing.absorbing.patches import Patches
from npt.editing.absorbing.questions import Asked
from npt.editing.absorbing.settings import MOST_STEPS, Options, Setting, blocks_of_choice, options_of
from npt.editing.absorbing.stream import Blocks
from npt.editing.absorbing.teaching import Taught, Teacher, questions_from
from npt.editing.adapter import DownAdapter
from npt.editing.answers import continued
from npt.editing.bench import check_whole
from npt.editing.descent import balanced, zero
from npt.editing.export import RANKS
from npt.editing.measure import Verification
from npt.editing.requests import Request
from npt.editing.solve import Factors
from npt.errors import ConversionError, DataError, NPTError
from npt.tuner.converted import vocabulary_size

#: The least effect of a context, in nats, that is worth absorbing; below it, the edit's note says so.
LEAST = 0.1
#: The share of a context's effect that has to be recovered for it to hold.
HOLDS = 0.5
#: The most conversations that each trial of a setting solves for; all of them are solved for with the one that is chosen.
SOLVED = 48


class Contexts:
    """The absorbed contexts of one model.

    Args:
        model: as `EditStore` takes it.
        tokenizer: the model's.
        statistics: text that must not be disturbed: "self" or a list of texts.
        cache_dir: a folder that keeps statistics; None for none.
        progress: show progress bars.
        together: the adapters of the store.
        facts_off: leaves the store's facts out within a `with` block.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        statistics: str | Sequence[str],
        cache_dir: Path | None,
        progress: bool,
        together: list[DownAdapter],
        facts_off: Callable[[], AbstractContextManager[None]],
    ):
        self.model, self.tokenizer, self.progress, self.facts_off = model, tokenizer, progress, facts_off
        self.blocks = Blocks(model)
        self.patches = Patches(self.blocks, together)
        self.general = GeneralText(model, tokenizer, self.blocks, statistics, cache_dir, progress)
        self.ledger: dict[str, Absorbed] = {}
        self._watched: dict[int, Apart] = {}

    # -- what is at work ---------------------------------------------------------------------------------------------------

    @property
    def factors(self) -> dict[int, Factors]:
        """{block: its weight delta}, as it is computed."""
        return self.patches.factors

    def setting(self) -> Setting:
        """The setting of the joint solve.

        The blocks of any context, the largest mu and lambda of those in closed form, the sums of the ranks and of the steps,
        the largest rate of those with steps. Steps begin at zero where all contexts' do.
        """
        own = [one.setting for one in self.ledger.values()]
        blocks = tuple(sorted({block for one in own for block in one.blocks}))
        rank = min(sum(one.rank for one in own), RANKS[-1])
        steps, rate = min(sum(one.steps for one in own), MOST_STEPS), max((one.steps > 0, one.rate) for one in own)[1]
        solved = [one for one in own if one.is_solved]
        mu, lam = (max(getattr(one, name) for one in solved or own) for name in ("mu", "lam"))
        return Setting(blocks, mu, lam, rank, steps, rate, "closed" if solved else "zero")

    def resolve(self) -> None:
        """Solves for the contexts in the ledger and puts their weight deltas to work, and nothing else."""
        if not self.ledger:
            self.patches.set({})
            return
        own = [self.ledger[id] for id in sorted(self.ledger)]
        setting = self.setting()
        if setting.steps:
            check_trainable(self.blocks, min(setting.blocks))
        with self.facts_off(), self.patches.opened():
            self.patches.set({})
            learnt = [conversation for one in own for conversation in one.learnt]
            weights = [1 / sum(c.shared for c in one.learnt) for one in own for _ in one.learnt]
            lesson = Lesson(self.blocks, learnt, setting.blocks if setting.is_solved else (), weights)
            if setting.is_solved:
                lesson.fit(setting, self.general.moments(setting.blocks), self.patches)
                lesson.targets = {}
            if setting.steps:
                self.descend(setting, lesson)

    @torch.inference_mode(False)
    def descend(self, setting: Setting, lesson: Lesson) -> None:
        """Trains the weight deltas at work on, or new ones, by gradient, also where the caller is in inference mode.

        Raises:
            NPTError: a factor is not finite any more; nothing is at work then.
        """
        begin = {layer: balanced(one) for layer, one in self.factors.items()}
        if not setting.is_solved:
            begin = zero(self.blocks.shapes(setting.blocks), setting.rank)
        self.patches.set({})
        training = Training(setting.rate, beta=BETA, falling=setting.steps)
        text = self.general.pieces(min(PIECES, setting.steps))  # one for each step, then again
        trained = Trained(lesson, begin, training, text, self.patches.together)
        try:
            trained.train(setting.steps, self.progress)
        finally:
            trained.close()
        self.patches.set(trained.factors)

    @contextmanager
    def unchanged_unless_done(self) -> Iterator[None]:
        """Puts ledger and weight deltas back where a `with` block fails."""
        ledger, factors = dict(self.ledger), dict(self.factors)
        try:
            yield
        except BaseException:
            self.ledger = ledger
            self.patches.set(factors)
            raise

    def undo(self, ids: Collection[str]) -> None:
        """Takes those of some edits that are contexts back, as if they had never been absorbed."""
        left = {id: one for id, one in self.ledger.items() if id not in ids}
        if len(left) < len(self.ledger):
            with self.unchanged_unless_done():
                self.ledger = left
                self.resolve()

    def restore(
        self, ledger: Sequence[Absorbed], factors: Mapping[int, Factors], rows: Sequence[Sequence[int]]
    ) -> None:
        """Puts contexts to work that were absorbed before.

        Args:
            ledger: the contexts.
            factors: {block: its weight delta}.
            rows: token ids of the text that must not be disturbed.
        """
        self.ledger = {one.id: one for one in ledger}
        self.general.take(rows)
        self.patches.set(factors)

    def check_mergeable(self, other: Contexts) -> None:
        """Checks that the contexts of another store can be taken over.

        Raises:
            NPTError: the two were absorbed beside different text.
        """
        if self.ledger and other.ledger and self.general.known != other.general.known:
            raise NPTError(
                "the stores absorbed contexts beside different text that must not be disturbed; absorb one's contexts anew in "
                "the other"
            )

    def merge(self, other: Contexts) -> None:
        """Takes over the contexts of another store of the same base."""
        new = {id: one for id, one in other.ledger.items() if id not in self.ledger}
        if not new:
            return
        with self.unchanged_unless_done():
            self.general.take(other.general.rows())
            self.ledger = self.ledger | new
            self.resolve()

    # -- absorbing ---------------------------------------------------------------------------------------------------------

    def absorb(self, context: Any, questions: Any, answers: Any, blocks: Any, given: dict[str, Any]) -> Absorbed:
        """See `EditStore.absorb`."""
        start = time.monotonic()
        options = options_of(given)
        whole = context_from(context, "context")
        asked, replies = questions_from(questions, answers)
        named = blocks_of_choice(blocks, len(self.blocks))
        self._check_base()
        id = id_of(whole, asked, replies)
        if id in self.ledger:
            raise NPTError(f"context {one_line(shown(whole), 60)}: is absorbed already (id {id}); undo it first")
        if self.patches.closed:
            raise NPTError("absorb: the store's edits are off the model since close(); call reopen() first")
        if self.ledger:
            self.general.check()
        else:
            self.general.leave()
        teacher = Teacher(self.blocks, self.dialogue(options.style), options, self.progress)
        teacher.chunks(whole)  # before any long work
        teacher.check(asked or ())
        self._check_slopes(named, options)
        with self.facts_off(), self.patches.trying():
            taught = teacher.teach(whole, asked, replies)
            setting, tried = self._choose(taught, named, options)
        with self.unchanged_unless_done():
            self.ledger[id] = Absorbed(
                id, Request(shown(whole), ""), setting.blocks, "absorb", tried, "", "", False,
                context=whole, setting=setting, learnt=(*taught.learn, *taught.choose),
                reported=tuple(taught.report), left_out=tuple(taught.left_out), style=teacher.dialogue.style,
                new_tokens=options.new_tokens,
            )  # fmt: skip
            self.resolve()
            self._tell(id, options, start)
        return self.ledger[id]

    def _check_base(self) -> None:
        """Checks that the base is here as a whole, and that its blocks end with their MLP."""
        base = self.blocks.base
        check_whole(base)
        if self.blocks.family.tail is not None:
            raise ConversionError(
                f"absorb: blocks of {type(base).__name__} change the stream behind their MLP too, which absorbing does not "
                "know; facts can be written (write), contexts be absorbed by a model of another type"
            )

    def _check_slopes(self, named: tuple[int, ...] | None, options: Options) -> None:
        """Checks, where a joint solve with a new context takes steps, that any block of it can be trained."""
        own = [one.setting for one in self.ledger.values()]
        if options.steps or any(one.steps for one in own):
            new = [trained_blocks(len(self.blocks)), *block_sets(len(self.blocks))] if named is None else [named]
            check_trainable(self.blocks, min(min(blocks) for blocks in (*new, *(one.blocks for one in own))))

    def watched_rows(self) -> list[list[int]]:
        """Token ids of the base's own text, on which settings are chosen."""
        with self.facts_off(), self.patches.off():
            return self.general.watched_rows(CHOOSING, WATCHED_FOR_FACTS)

    def dialogue(self, style: str) -> Dialogue:
        """How the model is asked."""
        return Dialogue(self.tokenizer, self.blocks.base.config, vocabulary_size(self.blocks.base), style)

    def untried(self, named: tuple[int, ...] | None, options: Options) -> Setting:
        """The setting before anything is tried, which steps from zero keep: they have no mu and lambda.

        Args:
            named: the blocks; None for those of `blocks="auto"`.
            options: the context's.
        """
        blocks = trained_blocks(len(self.blocks)) if named is None else named
        return Setting(blocks, MU, LAM, options.rank, options.steps, options.rate, options.start)

    def _choose(self, taught: Taught, named: tuple[int, ...] | None, options: Options) -> tuple[Setting, int]:
        """(the setting of one context alone, settings that were tried). The base is alone."""
        setting = self.untried(named, options)
        if not setting.is_solved:
            return setting, 0
        sets = block_sets(len(self.blocks)) if named is None else [named]
        layers = sorted({block for one in sets for block in one})
        text = self.general.moments(layers)
        every = -(-len(taught.learn) // SOLVED)  # wordings stand side by side: of each source some
        lesson, held = Lesson(self.blocks, taught.learn[::every], layers), Lesson(self.blocks, taught.choose)
        choice = Choice(lesson, held, self.watched(CHOOSING), text, self.patches, options, self.progress)
        return choice.best(sets).setting, len(choice.trials)

    def watched(self, seed: int) -> Apart:
        """Text of the base on which damage is measured (see `GeneralText.watched`), made once. Facts have to be off then."""
        if seed not in self._watched:
            with self.patches.off():
                self._watched[seed] = self.general.watched(seed)
        return self._watched[seed]

    def _tell(self, id: str, options: Options, start: float) -> None:
        """Writes down what came out of a new context."""
        one = self.ledger[id]
        with self.facts_off():
            text_kl = self.text_kl()
            compared = self.compare(one)
        figures = _means(compared, text_kl, time.monotonic() - start)
        self.ledger[id] = replace(
            one, before=compared[0].before, after=compared[0].after, holds=figures.recovered >= HOLDS, figures=figures,
            compared=tuple(compared), note=self._note(figures, one, options),
        )  # fmt: skip

    def _note(self, figures: Figures, one: Absorbed, options: Options) -> str:
        notes = []
        if figures.kl_before < LEAST:
            notes.append(
                f"the context moves the model by {figures.kl_before:.2f} nats only, so there is little to absorb"
            )
        if figures.text_kl > options.limit:
            notes.append(
                f"general text moves by {figures.text_kl:.3f} nats a token, above the limit of {options.limit:g}"
            )
        if one.left_out:
            notes.append(f"{len(one.left_out)} questions without an answer are left out")
        return "; ".join(notes)

    def verified(self) -> list[Verification]:
        """The first reported question of every context, asked again with everything in the store at work."""
        found = []
        for one in self.ledger.values():
            rows = self.compare(one)
            held = _means(rows, 0.0, 0.0).recovered >= HOLDS
            found.append(Verification(one.id, rows[0].question, rows[0].taught, rows[0].before, rows[0].after, held))
        return found

    def text_kl(self) -> float:
        """Mean KL from the base on text that it writes itself, in nats a token, with what is at work.

        No setting was chosen by this text.
        """
        watched = self.watched(REPORTING)
        return float(watched.kl().sum() / watched.tokens.sum())

    def compare(self, one: Absorbed, questions: Sequence[str] | None = None) -> list[Compared]:
        """Compares what the model writes to questions without a context, with it, and with what is at work.

        Args:
            one: the context.
            questions: any; None for those that were reported.

        Raises:
            DataError: the model with the context answers none of the questions.
        """
        conversations = one.reported
        if questions is not None:
            teacher = Teacher(self.blocks, self.dialogue(one.style), Options(new_tokens=one.new_tokens), self.progress)
            teacher.check(questions)
            with self.facts_off(), self.patches.off():
                found, _ = teacher.answered(
                    teacher.chunks(one.context), [Asked(q, i) for i, q in enumerate(questions)], {}
                )
            conversations = tuple(conversation for _, conversation in found)
        if not conversations:
            raise DataError("questions: the model with the context answers none of them; give others")
        said = partial(self.said, conversations, one.style, one.new_tokens)
        with self.facts_off(), self.patches.off():
            lesson = Lesson(self.blocks, conversations)
            before, kl_before = said(), lesson.kl()
        after, kl_after, tokens = said(), lesson.kl(), lesson.tokens.clamp_min(1)
        rows = zip(conversations, before, after, kl_before / tokens, kl_after / tokens, tokens, strict=True)
        return [
            Compared(c.question, one, c.reply, other, float(kl_one), float(kl_other), int(n))
            for c, one, other, kl_one, kl_other, n in rows
        ]

    def said(self, conversations: Sequence[Conversation], style: str, new_tokens: int) -> list[str]:
        """The texts that the model writes to the questions without a context, with what is at work.

        Args:
            conversations: with the questions.
            style: how they are put.
            new_tokens: the longest answer.
        """
        dialogue = self.dialogue(style)
        prompts = [c.student[: len(c.student) - c.answer] for c in conversations]
        counts = [dialogue.room(len(prompt), new_tokens) for prompt in prompts]
        ids = continued(
            self.blocks.base, self.tokenizer, prompts, counts, dialogue.ends, label="Reading back", progress=self.progress
        )  # fmt: skip
        return [dialogue.text(row).strip() for row in ids]


def _means(rows: Sequence[Compared], text_kl: float, seconds: float) -> Figures:
    """The figures of compared questions, each weighted by the tokens of its answer."""
    tokens = sum(row.tokens for row in rows)
    before, after = (
        sum(getattr(row, name) * row.tokens for row in rows) / tokens for name in ("kl_before", "kl_after")
    )
    return Figures(before, after, text_kl, seconds)
