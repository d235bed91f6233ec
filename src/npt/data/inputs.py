"""Arguments of Python callers that stand for text: documents, blocks or batches, told apart by their first item.

given                                                 read as
a Path, or text that is the name of a text file       the documents of the file
other text                                            one document
a list of text, or of rows with text or a chat        documents; a list of file names, the files' documents
a list of messages, or of such lists                  a chat, or chats
a data set with a column of text or of chats          documents
a data set with input_ids, rows or batches of ids     blocks
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import Tensor

from npt.builtin import PREFIX
from npt.common.display import one_line
from npt.data.batches import batches_of
from npt.data.chats import CHAT_COLUMNS, chat_of, is_message
from npt.data.documents import TEXT, TEXT_TYPES, Document, document_of, kinds_of_row
from npt.data.packing import pack
from npt.data.readers import is_text_name
from npt.data.sources import TextFiles, load_documents
from npt.errors import DataError

#: Rows of a batch that is made here.
BATCH_ROWS = 16


def documents_or_blocks(source: Any, named: str) -> Iterable[Document] | datasets.Dataset:
    """Documents, or a data set of blocks with a column input_ids.

    Args:
        source: see the table above. named: the argument, for errors.

    Raises:
        DataError: neither text nor token ids, or text that might be meant as a file's name or folder.
    """
    if isinstance(source, str | Path):
        return _named_or_text(source, named)
    if isinstance(source, datasets.Dataset | datasets.IterableDataset):
        columns = source.column_names or list(next(iter(source), {}))
        if "input_ids" not in columns:
            return _documents(source, _text_column(columns, source.features, named), named)
        return (
            source if isinstance(source, datasets.Dataset) else datasets.Dataset.from_list(list(_rows(source, named)))
        )
    if isinstance(source, Mapping) and not source.keys().isdisjoint((TEXT, *CHAT_COLUMNS)):
        source = [source]
    if isinstance(source, Mapping | Tensor) or not isinstance(source, Iterable):
        return datasets.Dataset.from_list(list(_rows(source, named)))
    items = iter(source)
    first = next(items, None)
    if isinstance(first, Path) or (isinstance(first, str) and _is_file_name(first)):
        return TextFiles([_file_name(item, named) for item in chain([first], items)], named_by=named)
    if first is None or isinstance(first, str):
        return _texts(chain([] if first is None else [first], items), named)
    if is_message(first) and first.keys().isdisjoint((TEXT, *CHAT_COLUMNS)):
        return [found] if (found := chat_of([first, *items], named)) else []
    if isinstance(first, list | tuple) and first and isinstance(first[0], Mapping):
        chats = enumerate(chain([first], items), start=1)
        return (chat_of(chat, f"{named}, chat {number}") or "" for number, chat in chats)
    if isinstance(first, Mapping) and "input_ids" not in first:
        return _documents(chain([first], items), _text_column(list(first), None, named), named)
    return datasets.Dataset.from_list(list(_rows(chain([first], items), named)))


def as_batches(source: Any, tokenizer: Any, length: int, named: str) -> Iterable[Mapping[str, Any]]:
    """Batches {"input_ids": (rows, tokens), ...} of text, blocks or batches; batches are handed on as they are.

    Args:
        tokenizer: makes blocks of `length` tokens out of text; None: text is an error.

    Raises:
        DataError: text without a tokenizer, or nothing that is text or token ids.
    """
    if not isinstance(source, str | Path | Mapping | Tensor | datasets.Dataset | datasets.IterableDataset):
        if not isinstance(source, Iterable):
            raise _unfit(source, named)
        items = iter(source)
        first = next(items, None)
        if first is None:
            return []
        if isinstance(first, Mapping) and "input_ids" in first and torch.as_tensor(first["input_ids"]).ndim == 2:
            return source if items is not source else chain([first], items)
        source = chain([first], items)
    found = documents_or_blocks(source, named)
    if not isinstance(found, datasets.Dataset):
        if tokenizer is None:
            raise DataError(
                f"{named}: is text, and token ids are wanted; give tokenizer=TOKENIZER beside it, or batches such as "
                'tokenizer(text, return_tensors="pt")'
            )
        found = pack(found, tokenizer, length)
    return batches_of(found, BATCH_ROWS, torch.device("cpu"))


def _named_or_text(source: str | Path, named: str) -> Iterable[Document]:
    text = str(source)
    if text.startswith(PREFIX):
        return load_documents(text)
    if isinstance(source, Path) or _is_file_name(text):
        return TextFiles([source], named_by=named)
    if len(text.split()) < 2 and len(text) < 256 and text and Path(text).exists():
        raise DataError(
            f"{named}={one_line(repr(text), 60)}: is a text of one word and also the name of a file or folder; give "
            f"pathlib.Path({text!r}) for the file, or a list, [{text!r}], for the text"
        )
    return [text]


def _is_file_name(text: str) -> bool:
    """True for one line that ends as a text file's name does and begins with no sentence: a file there, or a bare name."""
    if len(text) > 4096 or "\n" in text or not is_text_name(text):
        return False
    return " " not in text or Path(text).is_file()


def _file_name(item: Any, named: str) -> str | Path:
    if isinstance(item, Path) or (isinstance(item, str) and _is_file_name(item)):
        return item
    raise DataError(f"{named}: holds both names of files and {one_line(repr(item), 60)}; give files or text, not both")


def _texts(items: Iterable[Any], named: str) -> Iterator[str]:
    for item in items:
        if item is not None and not isinstance(item, str):
            raise DataError(f"{named}: holds text and {one_line(repr(item), 60)}; give text alone")
        if item is not None and _is_file_name(item) and Path(item).is_file():
            _file_name(None, f"{named}: text beside the name {item!r}")
        yield item or ""


def _documents(rows: Iterable[Any], column: str, named: str) -> Iterator[Document]:
    for number, row in enumerate(rows, start=1):
        place = f"{named}, row {number}"
        if not isinstance(row, Mapping):
            raise DataError(f"{place}: is {one_line(repr(row), 60)} among rows of columns; give rows or text, not both")
        if row.keys().isdisjoint((column, *CHAT_COLUMNS)):
            raise _no_text(place, kinds_of_row(row))
        yield document_of(row, column, place)


def _text_column(columns: Iterable[str], features: Any, named: str) -> str:
    """The column of text: "text", which stands for those of chats too, or the only one that holds strings."""
    names = list(columns)
    if not {TEXT, *CHAT_COLUMNS}.isdisjoint(names):
        return TEXT
    strings = [name for name in names if getattr((features or {}).get(name), "dtype", None) in TEXT_TYPES]
    if len(strings) == 1:
        return strings[0]
    raise _no_text(named, names)


def _no_text(named: str, names: Iterable[str]) -> DataError:
    return DataError(
        f"{named}: rows have neither input_ids nor a column 'text' or 'messages' (there are: "
        f"{one_line(', '.join(map(str, names)), 120)}); rename the column of text to 'text', that of chats to 'messages', or "
        "give text alone"
    )


def _rows(source: Any, named: str) -> Iterator[dict[str, list[int]]]:
    """Blocks out of rows or batches of ids: {name: list of whole numbers} each."""
    for item in (
        [source] if isinstance(source, Mapping | Tensor) else source if isinstance(source, Iterable) else [source]
    ):
        batch = item if isinstance(item, Mapping) and "input_ids" in item else {"input_ids": item}
        try:
            columns = {n: torch.as_tensor(batch[n]) for n in ("input_ids", "attention_mask", "labels") if n in batch}
        except (TypeError, ValueError, RuntimeError) as error:
            raise _unfit(item, named) from error
        ids = columns["input_ids"]
        if ids.is_floating_point() or ids.ndim not in (1, 2):
            raise _unfit(item, named)
        lists = {name: (x[None] if ids.ndim == 1 else x).tolist() for name, x in columns.items()}
        yield from (dict(zip(lists, row, strict=True)) for row in zip(*lists.values(), strict=True))


def _unfit(item: Any, named: str) -> DataError:
    kind = (
        f"{type(item).__name__} {one_line(repr(item), 40)}" if not isinstance(item, Mapping) else f"keys {list(item)}"
    )
    return DataError(
        f"{named}: {kind} is neither text nor token ids; give text, a list of text, a data set with a column 'text' or "
        "'input_ids', or batches {\"input_ids\": (rows, tokens)}"
    )
