"""Questions with and without a context in front, as token ids: through the chat template, or as plain text."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from npt.common.display import one_line
from npt.common.limits import check_ids, context_of
from npt.data.chats import CHAT_FORM, Chat, chat_of, rendered
from npt.errors import DataError

#: How a question is put: through the chat template, as "Question: ... Answer:", or as text that the answer goes on with.
STYLES = ("chat", "question", "text")
#: Stands for the question where a template is taken apart. A template may strip white space around it.
_MARK = "QUESTIONMARK"

#: A text, or the messages of a chat (examples, say).
Context = str | tuple[Mapping[str, Any], ...]


@dataclass(frozen=True)
class Conversation:
    """A question and an answer, with the context in front and without it.

    student: token ids without the context. teacher: with it. shared: so many last tokens are the same in both, and not the
    student's first token, whose key is every text's. answer: so many last tokens are the answer's.
    """

    question: str
    reply: str
    student: tuple[int, ...]
    teacher: tuple[int, ...]
    shared: int
    answer: int


def context_from(value: Any, named: str) -> Context:
    """A context as it is kept.

    Args:
        value: text, or a list of messages.
        named: the place, for errors.

    Raises:
        DataError: neither, or nothing in it.
    """
    if isinstance(value, str):
        return checked(value, named).strip()
    chat = chat_of(value, named) if isinstance(value, list | tuple) else None
    if chat is None:
        what = "holds no message" if isinstance(value, list | tuple) else f"is {type(value).__name__}"
        raise DataError(f"{named}: {what}; give a text, or a chat: {CHAT_FORM}")
    if chat.messages[-1]["role"] == "user":
        raise DataError(
            f"{named}: ends with a user's message, which the question would follow; add the answer, or take it out"
        )
    return tuple(chat.messages)


def checked(value: Any, named: str) -> str:
    """A text with something in it.

    Raises:
        DataError: no text, a blank one, or half a character.
    """
    if not isinstance(value, str):
        raise DataError(f"{named}={one_line(repr(value), 60)}: use text")
    if not value.strip():
        raise DataError(f"{named}: is blank; write some text")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise DataError(f"{named}={one_line(repr(value), 60)}: is not Unicode text; write it in UTF-8")
    return value


def shown(context: Context) -> str:
    """A context as text."""
    return context if isinstance(context, str) else json.dumps(list(context), ensure_ascii=False)


class Dialogue:
    """Questions as a model reads them.

    Args:
        tokenizer: the model's.
        config: the model's, for its context length.
        vocabulary: rows of its embedding.
        style: see `STYLES`; "auto" is "chat" where the tokenizer has a template, else "question".

    Raises:
        DataError: an unknown style, or "chat" without a template.
    """

    def __init__(self, tokenizer: Any, config: Any, vocabulary: int, style: str = "auto"):
        template = bool(getattr(tokenizer, "chat_template", None))
        if style == "auto":
            style = "chat" if template else "question"
        if style not in STYLES:
            raise DataError(f"style={one_line(repr(style), 40)} is unknown; use auto, {', '.join(STYLES)}")
        if style == "chat" and not template:
            raise DataError("style='chat': the tokenizer has no chat template; use style='question' or 'text'")
        self.tokenizer, self.style, self.vocabulary = tokenizer, style, vocabulary
        self.limit = context_of(config)

    @cached_property
    def system(self) -> bool:
        """True where the chat template has a place for a system message; else a context stands in front of the question."""
        try:
            text = rendered(Chat(({"role": "system", "content": _MARK}, _user("a")), "a system prompt"), self.tokenizer)
        except DataError:
            return False
        return _MARK in text

    def around(self, context: Context | None) -> tuple[str, str]:
        """(the text before a question, the text between it and the answer).

        Raises:
            DataError: messages for a model without a chat template, or a template that does not take them.
        """
        if self.style != "chat":
            if context is not None and not isinstance(context, str):
                raise DataError(
                    "context: is a chat, and the model has no chat template; write the examples as text, in lines "
                    "'Question: ...' and 'Answer: ...'"
                )
            front = "" if context is None else f"{context}\n\n"
            return (front, "") if self.style == "text" else (f"{front}Question: ", "\nAnswer:")
        messages, question = list[Mapping[str, Any]](), _MARK
        if isinstance(context, str) and self.system:
            messages.append({"role": "system", "content": context})
        elif isinstance(context, str):
            question = f"{context}\n\n{_MARK}"
        elif context is not None:
            messages += context
        text = rendered(Chat((*messages, _user(question)), "the context"), self.tokenizer, prompt=True)
        before, mark, after = text.rpartition(_MARK)
        if not mark:
            raise DataError("the context: the chat template leaves the question out; use style='question' or 'text'")
        return before, after

    def after(self, examples: Sequence[tuple[str, str]], text: str, context: Context | None = None) -> str:
        """The prompt for a text, after examples of (a text, what is to be written for it) and behind a context.

        Args:
            examples: at least one.
            text: the text.
            context: what stands in front; None for nothing.
        """
        if self.style != "chat":
            lines = "".join(f"{one}\nQuestion: {other}\n\n" for one, other in examples)
            return f"{'' if context is None else f'{shown(context)}{chr(10) * 2}'}{lines}{text}\nQuestion: "
        messages = [] if context is None or isinstance(context, str) else list(context)
        front = f"{context}\n\n" if isinstance(context, str) and not self.system else ""
        if isinstance(context, str) and self.system:
            messages.append({"role": "system", "content": context})
        for one, other in examples:
            messages += [_user(f"{front}{one}"), {"role": "assistant", "content": other}]
            front = ""
        return rendered(Chat((*messages, _user(text)), "the context"), self.tokenizer, prompt=True)

    def ids(self, text: str, named: str) -> list[int]:
        """Token ids of a prompt.

        Raises:
            DataError: one has no row in the embedding.
        """
        special = {"add_special_tokens": False} if self.style == "chat" else {}
        found = list(self.tokenizer(text, verbose=False, **special)["input_ids"])
        if self.style != "chat" and len(found) > 1 and found[-1] == self.tokenizer.eos_token_id:
            found.pop()
        check_ids(found, self.vocabulary, named, self.tokenizer)
        return found

    def prompt(self, context: Context | None, question: str) -> list[int]:
        """Token ids up to the answer."""
        before, after = self.around(context)
        return self.ids(f"{before}{question}{after}", one_line(repr(question), 60))

    def answer_ids(self, answer: str) -> list[int]:
        """Token ids of a given answer, with what ends it behind it."""
        text = answer if self.style == "chat" else f" {answer}"
        found = list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        if not found:
            raise DataError(
                f"answer {one_line(repr(answer), 60)}: has no token of the model's vocabulary; write other text"
            )
        check_ids(found, self.vocabulary, one_line(repr(answer), 60), self.tokenizer)
        if self.style == "chat":
            end = self.tokenizer.eos_token_id
            return found if end is None else [*found, int(end)]
        line = list(self.tokenizer(f"{text}\n", add_special_tokens=False, verbose=False)["input_ids"])
        return line if line[: len(found)] == found else found

    def ends(self, ids: Sequence[int]) -> bool:
        """True for the ids of an answer that is over: as plain text, a line is."""
        return self.style != "chat" and "\n" in self.text(ids[-1:]) and bool(self.text(ids).strip())

    def text(self, ids: Sequence[int]) -> str:
        """Ids as text, without special tokens."""
        found: str = self.tokenizer.decode(list(ids), skip_special_tokens=True)
        return found

    def room(self, prompt: int, tokens: int) -> int:
        """So many of `tokens` tokens have positions in the model behind a prompt of so many."""
        return tokens if self.limit is None else max(0, min(tokens, self.limit - prompt))

    def conversation(self, context: Context, question: str, answer: Sequence[int]) -> Conversation:
        """A question and the ids of its answer, both ways."""
        student = (*self.prompt(None, question), *answer)
        teacher = (*self.prompt(context, question), *answer)
        most = min(len(student) - 1, len(teacher))
        shared = next((n for n in range(most) if student[-1 - n] != teacher[-1 - n]), most)
        return Conversation(question, self.text(answer).strip(), student, teacher, shared, min(len(answer), shared))


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}
