"""Chats: lists of messages, in the form of OpenAI or of ShareGPT, as token ids through a tokenizer's chat template.

A template is text of the tokenizer's folder. transformers renders it in Jinja's sandbox, where it can read the messages and
write text, and reach nothing else.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
from jinja2.exceptions import TemplateError

from npt.common.display import one_line
from npt.common.options import Score
from npt.errors import DataError

#: Columns that hold chats where there is no column of text.
CHAT_COLUMNS = ("messages", "conversations")
#: The keys of a message, (who, what): OpenAI's, and ShareGPT's.
FORMS = (("role", "content"), ("from", "value"))
#: Roles as templates know them, by the name of either form.
_ROLES = {name: name for name in ("system", "developer", "user", "assistant", "tool")} | {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
}
#: As transformers looks for it.
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_HALVES = re.compile("[\ud800-\udfff]")
#: Errors of a template and of what it calls.
_FAILURES = (TemplateError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError)
#: The form of a chat, for messages.
CHAT_FORM = 'a chat is a list of {"role": ..., "content": ...} or {"from": ..., "value": ...}'


@dataclass(frozen=True)
class Chat:
    """A chat as templates take it.

    messages: {"role", "content", ...} each. place: where it stands, for errors. tools: JSON schemas of functions, if any.
    """

    messages: Sequence[Mapping[str, Any]]
    place: str = "a chat"
    tools: Sequence[Mapping[str, Any]] | None = None

    def content(self) -> bytes:
        """The chat as bytes, the same wherever it stands."""
        return json.dumps([self.messages, self.tools], sort_keys=True).encode()


def is_message(value: Any) -> bool:
    """True for an object with the keys of a message."""
    return isinstance(value, Mapping) and any(who in value and what in value for who, what in FORMS)


def chat_of(value: Any, place: str, tools: Any = None) -> Chat | None:
    """The chat of a list of messages, None for an empty one.

    Args:
        value: the list, or the lists of who said something and of what was said: `datasets` reads some data sets so.
        tools: a list of JSON schemas, or the JSON text of one.

    Raises:
        DataError: no list of messages, an unknown role, or content that is no text.
    """
    if is_message(value) and all(isinstance(column, list | tuple) for column in value.values()):
        value = [dict(zip(value, row, strict=True)) for row in zip(*value.values(), strict=True)]
    if not isinstance(value, list | tuple):
        raise DataError(f"{place}: {type(value).__name__} is no chat; {CHAT_FORM}")
    messages = [_message(item, f"{place}, message {number}") for number, item in enumerate(value, start=1)]
    return Chat(messages, place, _tools(tools, place)) if messages else None


def _message(value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise DataError(f"{place}: {type(value).__name__} {one_line(repr(value), 40)} is no message; {CHAT_FORM}")
    form = next((form for form in FORMS if form[0] in value), None)
    if form is None:
        raise DataError(f"{place}: has the keys {one_line(', '.join(map(str, value)), 80)}; {CHAT_FORM}")
    # Tables hold a null in every key that another row has, and templates ask which keys there are.
    more = {name: _without_nulls(x) for name, x in value.items() if name not in form and x is not None}
    role, content = _ROLES.get(str(value[form[0]])), value.get(form[1])
    if role is None:
        named = one_line(repr(value[form[0]]), 40)
        raise DataError(f"{place}: unknown role {named}; rename it to one of {', '.join(_ROLES)}")
    if content is None and "tool_calls" in more:
        return {"role": role, **more}
    return {"role": role, "content": _text(content, form[1], place), **more}


def _text(content: Any, key: str, place: str) -> str:
    """The text of a message; the texts of one that comes in parts, a line each."""
    if isinstance(content, list | tuple):
        for part in content:
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            if kind != "text":
                raise DataError(
                    f"{place}: its {key} has a part of kind {one_line(repr(kind), 40)}, and text alone is read; take the "
                    "part or the chat out"
                )
        return "\n".join(_text(part.get("text"), "text", place) for part in content)
    if not isinstance(content, str):
        raise DataError(f"{place}: its {key} is {type(content).__name__}, not text; write it as text, or take it out")
    return without_halves(content, f"{place}: its {key}")


def without_halves(text: str, named: str) -> str:
    """The text, which can be written as UTF-8.

    Raises:
        DataError: it holds half a surrogate pair, which JSON can name and UTF-8 can't.
    """
    if _HALVES.search(text):
        raise DataError(f"{named} holds half a surrogate pair; write the text as UTF-8")
    return text


def _tools(tools: Any, place: str) -> list[Any] | None:
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except (ValueError, RecursionError) as error:
            raise DataError(f"{place}: 'tools' is not JSON ({one_line(error, 80)}); write a list of schemas") from error
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise DataError(f"{place}: 'tools' is no list of JSON schemas; write it so, or take the column out")
    return [_without_nulls(tool) for tool in tools]


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _without_nulls(x) for name, x in value.items() if x is not None}
    return [_without_nulls(x) for x in value] if isinstance(value, list | tuple) else value


def checked_score(score: str) -> str:
    """The value of `data.score`.

    Raises:
        DataError: there is no such value.
    """
    if score not in get_args(Score):
        raise DataError(f"score={one_line(repr(score), 40)}: use {' or '.join(get_args(Score))}")
    return score


def chat_ids(chat: Chat, tokenizer: Any, score: str = "all") -> tuple[list[int], np.ndarray]:
    """(token ids of the chat as the template writes it, bool of the tokens that are scored).

    With `replies` these are the assistant's: those that the template itself marks with {% generation %}, else those that it
    writes after the prompt of a reply, the end of the turn with them. A token that begins before a reply and ends in it is
    one of the reply's.

    Raises:
        DataError: there is no template, it does not take the chat, or it does not show which tokens are the assistant's.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            f"{chat.place}: is a chat, and the tokenizer has no chat template to write it with; put a chat_template.jinja "
            "into the model's folder, or write each chat as one text into a column and name that in data.text_column"
        )
    if score == "all":
        ids = tokenizer(rendered(chat, tokenizer), add_special_tokens=False, verbose=False)["input_ids"]
        return ids, np.ones(len(ids), dtype=bool)
    if not getattr(tokenizer, "is_fast", False):
        raise DataError(
            f"{chat.place}: data.score=replies needs the place of every token in the text, which only a fast tokenizer "
            "(tokenizer.json) tells; use data.score=all"
        )
    if _GENERATION.search(_called(chat, tokenizer.get_chat_template, None, chat.tools)):
        found = _called(
            chat, tokenizer.apply_chat_template, chat.messages, tools=chat.tools,
            return_assistant_tokens_mask=True, return_dict=True, tokenizer_kwargs={"verbose": False},
        )  # fmt: skip
        return found["input_ids"], np.array(found["assistant_masks"], dtype=bool)
    text = rendered(chat, tokenizer)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    begin, end = np.array(encoded["offset_mapping"], dtype=int).reshape(-1, 2).T
    scored = np.zeros(len(begin), dtype=bool)
    for first, last in _replies(chat, text, tokenizer):
        scored |= (begin < last) & (end > first) & (begin < end)
    return encoded["input_ids"], scored


def _replies(chat: Chat, text: str, tokenizer: Any) -> list[tuple[int, int]]:
    """The places of the assistant's messages in the text of a chat, from the text of its beginnings.

    The text has to begin with the prompt of every reply, and with the same and the reply: else other text than the reply's
    would be scored.
    """
    found = []
    for number, message in enumerate(chat.messages):
        if message["role"] != "assistant":
            continue
        before = Chat(chat.messages[:number], chat.place, chat.tools)
        upto = Chat(chat.messages[: number + 1], chat.place, chat.tools)
        prompt = rendered(before, tokenizer, prompt=True) if number else None
        reply = rendered(upto, tokenizer)
        if prompt is None or not (text.startswith(reply) and reply.startswith(prompt)):
            raise DataError(
                f"{chat.place}, message {number + 1}: data.score=replies can't tell the reply from its prompt, as the chat "
                "template neither marks replies with {% generation %} nor writes this one after the prompt of the messages "
                "before; use data.score=all, or a template with {% generation %}"
            )
        found.append((len(prompt), len(reply)))
    return found


def rendered(chat: Chat, tokenizer: Any, prompt: bool = False) -> str:
    """The text of a chat. prompt: with the beginning of the assistant's next message."""
    text: str = _called(
        chat, tokenizer.apply_chat_template, chat.messages, tools=chat.tools, tokenize=False, add_generation_prompt=prompt
    )  # fmt: skip
    return text


def _called(chat: Chat, function: Any, *arguments: Any, **options: Any) -> Any:
    try:
        return function(*arguments, **options)
    except _FAILURES as error:
        why = one_line(error, 160) or type(error).__name__
        raise DataError(
            f"{chat.place}: the tokenizer's chat template does not take this chat ({why}); change the chat or the template"
        ) from error
