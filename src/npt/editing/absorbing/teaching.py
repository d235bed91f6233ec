"""From a context to conversations: its chunks, questions, the teacher's answers, and which of them are held out."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from npt.block.probing import logit_head
from npt.common.display import one_line
from npt.common.precision import wide
from npt.editing.absorbing.dialogue import Context, Conversation, Dialogue, checked
from npt.editing.absorbing.questions import Asked, Questions
from npt.editing.absorbing.settings import Options
from npt.editing.absorbing.stream import Blocks, outputs_of
from npt.editing.answers import continued
from npt.errors import DataError

logger = logging.getLogger(__name__)

#: Positions that stay free behind a chunk, for a question and its template.
QUESTION = 64


@dataclass(frozen=True)
class Taught:
    """Conversations by their use: to solve for, to choose the setting by, to report. left_out: questions with the reason."""

    learn: list[Conversation]
    choose: list[Conversation]
    report: list[Conversation]
    left_out: list[str]


def questions_from(questions: Any, answers: Any) -> tuple[list[str] | None, list[str] | None]:
    """Questions and answers of a person, checked.

    Raises:
        DataError: no list of texts, a blank or repeated one, answers without questions, or not as many.
    """
    found = []
    for name, value in (("questions", questions), ("answers", answers)):
        if value is not None and (isinstance(value, str) or not isinstance(value, Sequence)):
            raise DataError(f"{name}={one_line(repr(value), 60)}: use a list of texts")
        found.append(None if value is None else [checked(text, f"{name}, text {i}") for i, text in enumerate(value, 1)])
    given, own = found
    if given is not None and not given:
        raise DataError("questions: there are none; name some, or leave questions out to have the model write them")
    if own is not None and (given is None or len(own) != len(given)):
        count = "no" if given is None else f"{len(given):,}"
        raise DataError(f"answers: {len(own):,} for {count} questions; give one for each, or none")
    for i, text in enumerate(given or ()):
        if text.strip() in {other.strip() for other in (given or ())[:i]}:
            raise DataError(f"questions, text {i + 1}: {one_line(repr(text), 60)} stands there before; leave it out")
    return given, own


class Teacher:
    """A model with a context in front.

    Args:
        blocks: the model's, with nothing at work on it.
        dialogue: how it is asked.
        options: number of questions, length of answers.
        progress: show progress bars.
    """

    def __init__(self, blocks: Blocks, dialogue: Dialogue, options: Options, progress: bool):
        self.blocks, self.dialogue, self.options, self.progress = blocks, dialogue, options, progress

    def chunks(self, context: Context) -> list[Context]:
        """The context, or its parts where the model's window does not hold it with a question and an answer.

        Raises:
            DataError: a chat that the window does not hold, or no room for a sentence.
        """
        limit = self.dialogue.limit
        used = len(self.dialogue.prompt(context, "?"))
        room = None if limit is None else limit - QUESTION - self.options.new_tokens
        if room is None or used <= room:
            return [context]
        if not isinstance(context, str):
            raise DataError(
                f"context: its messages have {used:,} tokens, and the model's window of {limit:,} leaves {max(0, room):,} "
                f"beside a question and an answer of {self.options.new_tokens}; leave examples out, or lower new_tokens"
            )
        room -= len(self.dialogue.prompt("", "?"))
        found = pieces(context, room, lambda text: len(self.dialogue.ids(text, "context"))) if room > 0 else []
        if not found:
            raise DataError(
                f"context: the model's window of {limit:,} tokens leaves no room for it beside a question and an answer of "
                f"{self.options.new_tokens}; lower new_tokens"
            )
        logger.info("absorb: the context is longer than the model's window and is taught in %d chunks", len(found))
        return list(found)

    def check(self, questions: Sequence[str]) -> None:
        """Checks that questions have positions in the model.

        Raises:
            DataError: one has not.
        """
        for i, question in enumerate(questions, 1):
            tokens = len(self.dialogue.prompt(None, question))
            if self.dialogue.limit is not None and tokens + 1 > self.dialogue.limit:
                raise DataError(
                    f"questions, text {i}: has {tokens:,} tokens, and the model's window {self.dialogue.limit:,}; shorten it"
                )

    def teach(self, context: Context, questions: list[str] | None, answers: list[str] | None) -> Taught:
        """The conversations about a context.

        Args:
            context: what the teacher reads.
            questions: those to solve for; None has the model write them. Those that choose and report it writes in any case.
            answers: of the questions; None takes the teacher's own.

        Raises:
            DataError: the teacher answers fewer than three questions.
        """
        chunks = self.chunks(context)
        writer = Questions(self.blocks.base, self.dialogue, self.options, self.progress)
        if questions is None:
            asked = writer.about(chunks)
        else:
            self.check(questions)
            asked = writer.worded([Asked(text, i) for i, text in enumerate(questions)])
            asked += writer.anything(max(2, len(questions) // 2))
        given = dict(enumerate(answers or ()))
        found, left_out = self.answered(chunks, asked, given)
        learn, choose, report = split([question.source for question, _ in found])
        if not (learn and choose and report):
            raise DataError(
                f"absorb: {len(found)} of {len(asked)} questions have an answer of the model with the context, and three are "
                "needed, to solve for, to choose by and to report; give more questions, or raise number"
            )
        uses = [[found[i][1] for i in part] for part in (learn, choose, report)]
        return Taught(uses[0], uses[1], uses[2], left_out)

    def answered(
        self, chunks: Sequence[Context], asked: Sequence[Asked], given: dict[int, str]
    ) -> tuple[list[tuple[Asked, Conversation]], list[str]]:
        """(questions with their conversations, those without an answer and why).

        A question that was not written with a chunk gets the chunk behind which its answer is likeliest.

        Args:
            chunks: the context, or its parts.
            asked: the questions.
            given: answers by source.
        """
        tries = [(q, c) for q in asked for c in (range(len(chunks)) if q.context is None else [q.context])]
        prompts = [self.dialogue.prompt(chunks[c], q.text) for q, c in tries]
        counts = [self.dialogue.room(len(prompt), self.options.new_tokens) for prompt in prompts]
        own = [i for i, (q, _) in enumerate(tries) if q.source not in given and counts[i]]
        written = continued(
            self.blocks.base, self.dialogue.tokenizer, [prompts[i] for i in own], [counts[i] for i in own], self.dialogue.ends,
            label="Asking with the context", progress=self.progress,
        )  # fmt: skip
        replies = dict(zip(own, written, strict=True))
        options: dict[int, list[Conversation]] = {}
        why: dict[int, str] = {}
        for i, (q, c) in enumerate(tries):
            ids = self.dialogue.answer_ids(given[q.source]) if q.source in given else replies.get(i, [])
            place = asked.index(q)
            if not self.dialogue.text(ids).strip():
                why[place] = "no position is left for an answer" if not counts[i] else "the answer is empty"
                continue
            if self.dialogue.limit is not None and len(prompts[i]) + len(ids) > self.dialogue.limit:
                why[place] = "the model's window does not hold the answer"
                continue
            options.setdefault(place, []).append(self.dialogue.conversation(chunks[c], q.text, ids))
        left = [f"{one_line(asked[i].text, 80)} ({reason})" for i, reason in sorted(why.items()) if i not in options]
        for line in left:
            logger.warning("absorb: left out, as the model with the context can't answer it: %s", line)
        return [(asked[i], self._likeliest(options[i])) for i in sorted(options)], left

    def _likeliest(self, options: Sequence[Conversation]) -> Conversation:
        """The conversation whose answer is likeliest, by token."""
        if len(options) == 1:
            return options[0]
        scores = []
        for one in options:
            last = outputs_of(self.blocks, [one.teacher], [one.answer + 1], [])[1]
            said = torch.tensor(one.teacher[-one.answer :], device=last.device)
            with torch.no_grad():
                found = wide(logit_head(self.blocks.base)(last[:-1])).log_softmax(-1).gather(-1, said[:, None])
            scores.append(float(found.mean()))
        return options[scores.index(max(scores))]


def split(sources: Sequence[int]) -> tuple[list[int], list[int], list[int]]:
    """Indices to solve for, to choose by and to report, of questions given by their sources.

    The first wording of a source is solved for; of the further ones every third chooses and every third is reported. Where
    that gives one of these less than an eighth of all questions, the last ones are taken: those about anything come last.

    Args:
        sources: of every question, equal ones side by side.
    """
    parts: tuple[list[int], list[int], list[int]] = ([], [], [])
    further = 0
    for i, source in enumerate(sources):
        if i and sources[i - 1] == source:
            parts[(1, 2, 0)[further % 3]].append(i)
            further += 1
        else:
            parts[0].append(i)
    for part in parts[1:]:
        while len(part) < max(1, len(sources) // 8) and len(parts[0]) > 1:
            part.append(parts[0].pop())
    return parts


def pieces(text: str, room: int, length: Any) -> list[str]:
    """A text in parts of at most `room` tokens, cut between paragraphs, else between words.

    Args:
        text: the whole.
        room: tokens of a part, from 1.
        length: counts the tokens of a text.
    """
    found: list[str] = []
    for paragraph in text.split("\n\n"):
        joined = f"{found[-1]}\n\n{paragraph}" if found else paragraph
        if found and length(joined) <= room:
            found[-1] = joined
            continue
        part = ""
        for word in paragraph.split(" "):
            longer = f"{part} {word}" if part else word
            if part and length(longer) > room:
                found.append(part)
                longer = word
            part = longer
        found += [part] if part else []
    return [part for part in found if part.strip()]
