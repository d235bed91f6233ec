"""Documents out of rows: text or a chat, in a column that may lie inside another."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import pyarrow

from npt.common.display import one_line
from npt.data.chats import CHAT_COLUMNS, CHAT_FORM, FORMS, Chat, chat_of, is_message, without_halves
from npt.errors import DataError

#: Text, blank where a row has none, or a chat.
Document = str | Chat
#: The column of text where none is named. Rows without it may hold a chat, in one of `CHAT_COLUMNS`.
TEXT = "text"
#: Kinds of column that hold text, by the names of pyarrow, and the kind of those that hold chats.
TEXT_TYPES, CHATS = ("string", "large_string"), "chats"
#: The kind of columns of values of several forms, of which `datasets` keeps the JSON; the rows say what they hold.
JSON = "arrow.json"
_MISSING = object()


def columns_to_read(names: Collection[str], column: str, kinds: Mapping[str, str] | None = None) -> list[str]:
    """The columns of a table in which a row's document lies; none where there is no document.

    Args:
        names: of the table. column: `data.text_column`. kinds: as `kinds_of_schema` gives them, None: not known.
    """
    found, tools = [], False
    for name in _candidates(column):
        top = next((top for top in _tops(name) if top in names), None)
        kind = JSON if kinds is None else kinds.get(name, "") if JSON not in kinds.get(top or "", "") else JSON
        if top is not None and (kind in (*TEXT_TYPES, CHATS) or JSON in kind):
            found.append(top)
            tools = tools or ("tools" in names and kind not in TEXT_TYPES)
    return list(dict.fromkeys([*found, *(["tools"] if tools else [])]))


def document_of(row: Mapping[str, Any], column: str, place: str, *, chats_only: bool = False) -> Document:
    """The document of a row; blank where the row has none.

    Args:
        column: its column, or a dotted name for one inside another; a column whose own name has the dot comes first.
            "text" stands for `CHAT_COLUMNS` too, in rows where it is not there or null.
        place: of the row, for errors. chats_only: text is an error.

    Raises:
        DataError: no such column, or it holds neither text nor a chat.
    """
    if isinstance(value := row.get(column), str):
        return without_plain(without_halves(value, f"{place}: column '{column}'"), place, chats_only)
    values = {name: looked_up(row, name) for name in _candidates(column)}
    there = {name: value for name, value in values.items() if value is not _MISSING and value is not None}
    chats = [name for name in there if name != column]
    if column not in there and len(chats) > 1:
        raise DataError(f"{place}: holds chats in {' and in '.join(chats)}; name one of them in data.text_column")
    if not there:
        if all(value is _MISSING for value in values.values()):
            raise DataError(f"{place}: {column_problem(column, kinds_of_row(row))}")
        return ""
    name = next(iter(there))
    value = there[name]
    if isinstance(value, str) and name == column:
        return without_plain(without_halves(value, f"{place}: column '{name}'"), place, chats_only)
    is_list = isinstance(value, list | tuple) and (not value or any(isinstance(item, Mapping) for item in value))
    if is_list or is_message(value):
        return chat_of(value, f"{place}, column '{name}'", row.get("tools")) or ""
    raise DataError(f"{place}: {column_problem(column, kinds_of_row(row))}")


def without_plain(document: Document, place: str, chats_only: bool) -> Document:
    """The document, unless it is text where chats are wanted.

    Raises:
        DataError: it is.
    """
    if chats_only and isinstance(document, str) and document.strip():
        raise DataError(
            f"{place}: is text, and data.score=replies is for chats (columns {' or '.join(CHAT_COLUMNS)}, or the one that "
            "data.text_column names); use data.score=all"
        )
    return document


def looked_up(row: Any, name: str) -> Any:
    """The value of a column or, by a dotted name, of one inside another; None inside a null; `_MISSING` if there is none."""
    for top in _tops(name):
        if isinstance(row, Mapping) and top in row:
            rest = name[len(top) + 1 :]
            value = row[top]
            found = value if not rest or value is None else looked_up(value, rest)
            if found is not _MISSING:
                return found
    return _MISSING


def kinds_of_row(row: Mapping[str, Any], inside: str = "") -> dict[str, str]:
    """{name, dotted for a column inside another: kind of its value} of a row."""
    found: dict[str, str] = {}
    for key, value in row.items():
        name = f"{inside}{key}"
        if isinstance(value, Mapping) and value and not is_message(value) and inside.count(".") < 8:
            found |= kinds_of_row(value, f"{name}.")
        elif isinstance(value, list) and value and all(map(is_message, value)):
            found[name] = CHATS
        else:
            found[name] = "string" if isinstance(value, str) else type(value).__name__
    return found


def kinds_of_schema(fields: Any, inside: str = "") -> dict[str, str]:
    """{name, dotted for a column inside another: kind of its values} of the columns of a pyarrow schema."""
    found: dict[str, str] = {}
    for field in fields:
        name = f"{inside}{field.name}"
        if _holds_chats(field.type):
            found[name] = CHATS
        elif pyarrow.types.is_struct(field.type):
            found |= kinds_of_schema(_children(field.type), f"{name}.")
        else:
            found[name] = str(field.type)
    return found


def column_problem(column: str, kinds: Mapping[str, str]) -> str:
    """The problem with a column that should hold text or a chat, and the remedy, from {column: kind of what it holds}."""
    there = one_line(f"there are: {', '.join(kinds)}", 200)
    wrong = f"column '{column}' holds {kinds[column]}, not text" if column in kinds else f"no column '{column}'"
    inside = [name for name in kinds if name.startswith(f"{column}.")]
    if column not in kinds and inside:
        wrong = f"column '{column}' holds other columns, not text"
    texts = [name for name, kind in kinds.items() if kind in TEXT_TYPES]
    chats = [name for name, kind in kinds.items() if kind == CHATS]
    if texts or chats:
        what = " or ".join(["text"] * bool(texts) + ["a chat"] * bool(chats))
        remedy = f"name one with {what} in data.text_column: {one_line(', '.join([*texts, *chats]), 200)}"
    elif any("list" in kind for kind in kinds.values()):
        remedy = (
            f"none holds text, and {CHAT_FORM}: write each row so, or as text, into a column, and name that in "
            "data.text_column"
        )
    else:
        remedy = "none holds text: write each row's text into a column, and name that in data.text_column"
    return f"{wrong} ({there}); {remedy}"


def _candidates(column: str) -> tuple[str, ...]:
    return (column, *CHAT_COLUMNS) if column == TEXT else (column,)


def _tops(name: str) -> Iterator[str]:
    """The beginnings of a dotted name that may be a column's own, the longest first."""
    parts = name.split(".")
    return (".".join(parts[:length]) for length in range(len(parts), 0, -1))


def _children(kind: Any) -> list[Any]:
    return [kind.field(i) for i in range(kind.num_fields)]


def _is_list(kind: Any) -> bool:
    return bool(pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind))


def _holds_chats(kind: Any) -> bool:
    """True for a list of objects with the keys of a message, or an object of lists by these names."""
    if _is_list(kind) and pyarrow.types.is_struct(kind.value_type):
        names = {field.name for field in _children(kind.value_type)}
    elif pyarrow.types.is_struct(kind):
        names = {field.name for field in _children(kind) if _is_list(field.type)}
    else:
        return False
    return any(names.issuperset(form) for form in FORMS)
