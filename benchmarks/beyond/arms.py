"""What a model still answers of a text when the text is gone: by nothing, the text itself, edits, absorbing, a LoRA."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from benchmarks.beyond.facts import Fact, text_of
from benchmarks.timing import timed
from npt import EditStore
from npt.editing.absorbing.dialogue import Dialogue
from npt.editing.answers import continued
from npt.editing.bench import chunks
from npt.editing.measure import follows
from npt.editing.statistics import padded
from npt.finetuning.other_methods import adapted, places_of
from npt.tuner.converted import device_of, vocabulary_size

#: Tokens of an answer, and sentences of a step of the LoRA's.
ANSWER, BATCH = 12, 8


@dataclass(frozen=True)
class Training:
    """The LoRA's: rank on gate, up and down of every block; AdamW's rate; how often every sentence is read."""

    rank: int
    rate: float
    epochs: int


class Room:
    """A model, its store with nothing in it, and the facts.

    Args:
        store: on the model.
        some: the facts.
    """

    def __init__(self, store: EditStore, some: Sequence[Fact]):
        self.store, self.facts, self.base = store, list(some), store.contexts.blocks.base
        self.dialogue = Dialogue(store.tokenizer, self.base.config, vocabulary_size(self.base), "text")

    def answers(self, wording: str, context: str | None = None) -> list[str]:
        """What the model writes behind each fact's sentence.

        Args:
            wording: "prompt", "learnt" or "asked".
            context: stands in front.
        """
        prompts = [self.dialogue.prompt(context, getattr(fact, wording)) for fact in self.facts]
        written = continued(self.base, self.store.tokenizer, prompts, [ANSWER] * len(prompts), self.dialogue.ends)
        return [self.dialogue.text(ids).strip() for ids in written]

    def mark(self, seconds: float, context: str | None = None) -> dict[str, Any]:
        """The figures of what is at work: for each wording, 1 for every fact that is answered; the KL on general text."""
        found = {
            wording: [right(text, fact) for text, fact in zip(self.answers(wording, context), self.facts, strict=True)]
            for wording in ("prompt", "asked")
        }
        return {**found, "text_kl": self.store.contexts.text_kl(), "seconds": seconds}

    def edited(self) -> dict[str, Any]:
        """Every fact is an edit, with one other wording as a paraphrase. The store holds the edits afterwards.

        Facts that it held before are not written again; seconds are those of the new ones, by number of facts.
        """
        held = {edit.request.prompt for edit in self.store.facts}
        records = [
            {"prompt": f.prompt, "subject": f.subject, "target": f.value, "paraphrases": [f.learnt]}
            for f in self.facts
            if f.prompt not in held
        ]
        seconds = timed(lambda: self.store.write_many(records))
        return self.mark(seconds * len(self.facts) / max(1, len(records)))

    def absorbed(self, number: int, *, told: bool) -> dict[str, Any]:
        """The text is absorbed, and undone after it was asked for.

        Args:
            number: the fewest questions that the model writes; it writes two for a fact at least.
            told: the questions are each fact's other wording and the answers its value; else the model writes both.
        """
        given: dict[str, Any] = {
            "style": "text",
            "number": max(number, 2 * len(self.facts)),
            "phrasings": 2,
            "steps": 0,
        }
        if told:
            given |= {"questions": [f.learnt for f in self.facts], "answers": [f.value for f in self.facts]}
        seconds = timed(lambda: self.store.absorb(text_of(self.facts), **given))
        (edit,) = (edit for edit in self.store.edits if edit not in self.store.facts)
        found = self.mark(seconds)
        self.store.undo(edit.id)
        return found

    def trained(self, training: Training, after: Sequence[int]) -> list[dict[str, Any]]:
        """A LoRA on the sentences of the text, each as one row, by cross-entropy; taken off again.

        Args:
            training: its rank, rate and most epochs.
            after: epochs after which it is measured.
        """
        blocks = range(len(self.store.contexts.blocks))
        places = places_of(self.base, blocks, ["gate", "up", "down"])
        torch.manual_seed(0)
        model = adapted(self.base, "lora", training.rank, places)
        rows = [self.dialogue.ids(fact.statement, "a statement") for fact in self.facts]
        optimizer = torch.optim.AdamW(
            [p for p in model.parameters() if p.requires_grad], lr=training.rate, weight_decay=0.0
        )
        chance, seconds, found = torch.Generator().manual_seed(0), 0.0, []
        try:
            for epoch in range(1, training.epochs + 1):
                order = torch.randperm(len(rows), generator=chance).tolist()
                seconds += timed(partial(_epoch, model, optimizer, [rows[i] for i in order]))
                if epoch in after:
                    found.append({"epochs": epoch, **self.mark(seconds)})
        finally:
            model.unload()
        return found


def right(text: str, fact: Fact) -> int:
    """1 where a text begins with the fact's value, in any case, and no word goes on behind it."""
    return int(follows(text.casefold(), fact.value.casefold()))


def _epoch(model: Any, optimizer: torch.optim.Optimizer, rows: Sequence[list[int]]) -> None:
    for part in chunks(rows, BATCH):
        batch = padded(part, device_of(model))
        labels = batch["input_ids"].clone()
        for i, row in enumerate(part):
            labels[i, len(row) :] = -100
        with torch.enable_grad():
            model(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
