"""Questions to a model before and after edits; what the base says is asked once."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from npt.block.families import blocks_of
from npt.editing.bench import chunks, written
from npt.editing.benchmark.methods import Method
from npt.editing.benchmark.records import Record
from npt.editing.keys import Prompts
from npt.editing.measure import apart, follows, likelihoods
from npt.editing.replay import Recording, record, run_again
from npt.editing.statistics import padded
from npt.evaluation.generation import continue_text
from npt.tuner.converted import base_of, device_of, eval_mode, vocabulary_size

#: Tokens that are written behind a neighbour's prompt, and behind others beside those of the target.
WRITTEN = 12
#: Rows of running text in a pass, and the most tokens whose logits of the base are kept.
_ROWS, _KEPT = 4, 2048
#: Records whose prompts are kept as the lowest edited block reads them: rows x tokens x width numbers each, in main memory.
_RECORDINGS = 512


@dataclass(frozen=True)
class Row:
    """A text's token ids, of which those from `start` on are the answer that is looked for."""

    ids: tuple[int, ...]
    start: int

    @property
    def answer(self) -> Tensor:
        """The answer's ids."""
        return torch.tensor(self.ids[self.start :])


class Asker:
    """Puts questions to a model before and after edits; remembers what the base says.

    Args:
        model: as a method has it, with nothing written.
        tokenizer: the model's.
        rows: token ids of running text.
        first: the lowest block that any method edits; the blocks below it are computed once a text.
    """

    def __init__(self, model: Any, tokenizer: Any, rows: Sequence[Sequence[int]], first: int = 0):
        self.base, self.tokenizer, self.text, self.first = base_of(model), tokenizer, list(rows), first
        self.prompts = Prompts(tokenizer, self.base.config, vocabulary_size(self.base))
        self.blocks = list(blocks_of(self.base))
        self._said: dict[str, tuple[int, ...]] = {}
        self._first_words: dict[str, str] = {}
        self._below: OrderedDict[tuple[tuple[int, ...], ...], Recording] = OrderedDict()

    # -- what is written ---------------------------------------------------------------------------------------------------

    def said(self, prompt: str) -> tuple[int, ...]:
        """The tokens that the base writes behind a prompt, to the end of its first sentence; asked with nothing at work."""
        if prompt not in self._said:
            with eval_mode(self.base):
                new = continue_text(self.base, self.tokenizer, prompt, WRITTEN)[1]
            self._said[prompt] = tuple(new[: self._sentence(new)])
        return self._said[prompt]

    def _sentence(self, ids: Sequence[int]) -> int:
        """The number of tokens that hold a text's first sentence."""
        whole = first_sentence(self._text(ids))
        return next(n for n in range(1, len(ids) + 1) if first_sentence(self._text(ids[:n])) == whole or n == len(ids))

    def _text(self, ids: Sequence[int]) -> str:
        found: str = self.tokenizer.decode(list(ids), skip_special_tokens=True)
        return found

    def says(self, text: str, target: str) -> bool:
        """True where the model writes the target behind a text; no more is written than it takes to know."""
        wanted = target.strip()

        def known(said: str) -> bool:
            said = said.lstrip().rstrip("\ufffd")  # half a character
            return len(said) > len(wanted) if said.startswith(wanted) else not wanted.startswith(said)

        tokens = WRITTEN + len(self.prompts.target(text, target, None).targets)
        return follows(written(self.base, self.tokenizer, text, tokens, known), target)

    def first_words(self, text: str) -> str:
        """The first sentence that the model writes behind a text, or its beginning."""

        def ended(said: str) -> bool:
            return len(first_sentence(said)) < len(said.strip())

        return first_sentence(written(self.base, self.tokenizer, text, WRITTEN, ended))

    def first_words_of_base(self, method: Method, prompt: str) -> str:
        """The same of the base, remembered."""
        if prompt not in self._first_words:
            with method.disabled():
                self._first_words[prompt] = self.first_words(prompt)
        return self._first_words[prompt]

    # -- what is the likeliest ---------------------------------------------------------------------------------------------

    def rows_of(self, method: Method, item: Record) -> list[Row]:
        """The prompt with its target; for each neighbour the base's own text, and what is right and the target if known."""
        target = item.request.target
        found = [self._with(method.text(item.request.prompt), target)]
        for near in item.neighbours:
            text = method.text(near.prompt)
            ids = self.prompts.ids(text)
            found.append(Row((*ids, *self.said(near.prompt)), len(ids)))
            if near.truth:
                found += [self._with(text, near.truth), self._with(text, target)]
        return found

    def _with(self, text: str, answer: str) -> Row:
        row = self.prompts.target(text, answer, None)
        return Row(row.ids, row.start)

    @torch.no_grad()
    def answers(self, method: Method, item: Record) -> tuple[float, float | None, float | None]:
        """(share of the target's tokens that are the likeliest, locality, ordering), the answers being given.

        locality: share of the neighbours behind which every token of the base's first sentence is still the likeliest, which
        is to say that the model writes the same sentence; None without neighbours.
        """
        rows = self.rows_of(method, item)
        start = min(row.start for row in rows) - 1
        asked = torch.arange(start, max(len(row.ids) for row in rows) - 1)
        again = method.text(item.request.prompt) == item.request.prompt  # prompts behind a context are asked once
        recording = self._recorded(method, tuple(row.ids for row in rows), again)
        with eval_mode(self.base):
            logits = run_again(self.base, self.blocks, recording, asked).cpu()
        told = [_told(logits[i, row.start - 1 - start : len(row.ids) - 1 - start], row) for i, row in enumerate(rows)]
        kept, ordered, at = list[float](), list[float](), 1
        for near in item.neighbours:
            kept.append(float(told[at][0] == 1))
            if near.truth:
                ordered.append(float(told[at + 1][1] > told[at + 2][1]))
            at += 3 if near.truth else 1
        return told[0][0], fmean(kept) if kept else None, fmean(ordered) if ordered else None

    def _recorded(self, method: Method, rows: tuple[tuple[int, ...], ...], again: bool) -> Recording:
        """The rows up to the first block that is edited; those that are asked `again` are kept in main memory for the next
        method and setting, the last `_RECORDINGS` that were used.
        """
        if rows in self._below:
            self._below.move_to_end(rows)
            return self._below[rows].to(device_of(self.base))
        batch = padded(rows, device_of(self.base))
        until = self.blocks[self.first - 1] if self.first else self.base.get_input_embeddings()
        with eval_mode(self.base), method.disabled():
            found = record(self.base, self.blocks, self.first, batch, until)
        if again:
            self._below[rows] = found.to("cpu")
            if len(self._below) > _RECORDINGS:
                self._below.popitem(last=False)
        return found

    # -- running text ------------------------------------------------------------------------------------------------------

    @cached_property
    def _recordings(self) -> list[tuple[Sequence[Sequence[int]], Recording]]:
        """Running text, recorded on the base: logits of the first tokens are kept, the others are made again each time."""
        found, tokens = [], 0
        for part in chunks(self.text, _ROWS):
            recording = record(self.base, self.blocks, self.first, padded(part, device_of(self.base)))
            tokens += sum(map(len, part))
            found.append((part, recording if tokens <= _KEPT else replace(recording, logits=None)))
        return found

    @torch.no_grad()
    def on_text(self, method: Method) -> tuple[float, float]:
        """(mean KL of the edited model from the base, rise of the text's own negative log-likelihood), both over the running
        text, in nats a token.
        """
        kl = rise = 0.0
        with eval_mode(self.base):
            with method.disabled():
                recordings = self._recordings
            for part, recording in recordings:
                edited, base = run_again(self.base, self.blocks, recording), recording.logits
                if base is None:
                    with method.disabled():
                        base = run_again(self.base, self.blocks, recording)
                for i, row in enumerate(part):
                    one, other = likelihoods(base[i, : len(row)]), likelihoods(edited[i, : len(row)])
                    kl += float(apart(one, other).sum())
                    following = torch.tensor(row[1:], dtype=torch.long, device=one.device)[:, None]
                    rise += float((one - other)[:-1].gather(-1, following).sum(dtype=torch.float64))
        return kl / sum(map(len, self.text)), rise / max(1, sum(len(row) - 1 for row in self.text))


def _told(logits: Tensor, row: Row) -> tuple[float, float]:
    """(share of an answer's tokens that are the likeliest, mean log-likelihood of one), of logits (tokens, vocabulary)."""
    answer = row.answer
    likely = logits.double().log_softmax(-1)
    return float((likely.argmax(-1) == answer).double().mean()), float(likely.gather(-1, answer[:, None]).mean())


def first_sentence(text: str) -> str:
    """A text up to the end of its first sentence or line."""
    return re.split(r"(?<=[.!?])(?:\s|$)|\n", text.strip(), maxsplit=1)[0]
