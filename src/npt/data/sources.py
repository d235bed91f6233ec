"""Text documents from the hub or from local files, checked whole before anything is tokenised."""

from __future__ import annotations

import glob
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets

from npt import builtin
from npt.common.display import one_line
from npt.common.places import expanded, place
from npt.data.documents import Document, column_problem, columns_to_read, document_of, kinds_of_schema
from npt.data.readers import read_documents
from npt.errors import DataError, NPTError

_LOCAL = "data.dataset_name=text with data.data_files"


class TextFiles:
    """The documents of local files, in order: one per .txt file, .jsonl or .json line, and .csv, .tsv or .parquet row.

    The files are read from end to end here, so that every bad one is reported at the start and all in one message, and again
    whenever the documents are iterated, with one document (1024 rows of parquet, all of a packed one) in memory at a
    time. Blank documents are left out; `len()` counts the others.

    Args:
        text_column: as of `npt.data.documents.document_of`. named_by: the key or option that named the files, for errors.
        chats_only: text that is no chat is an error.

    Raises:
        DataError: a file is missing, unreadable, of an unknown kind, empty, not UTF-8, blank, or has a bad line or row.
    """

    def __init__(
        self,
        data_files: Sequence[str | Path],
        text_column: str = "text",
        named_by: str = "data.data_files",
        *,
        chats_only: bool = False,
    ) -> None:
        self.text_column = text_column
        if not data_files:
            raise DataError("data.data_files is empty, but data.dataset_name=text reads local files; name at least one")
        self.paths, problems = expand_files(data_files, named_by)
        self._length = 0
        for path in self.paths:
            try:
                self._length += sum(1 for _ in read_documents(path, text_column, chats_only=chats_only))
            except DataError as error:
                problems.append(str(error))
        if problems:
            raise DataError("; ".join(map(one_line, problems)))

    def __iter__(self) -> Iterator[Document]:
        for path in self.paths:
            yield from read_documents(path, self.text_column)

    def __len__(self) -> int:
        return self._length


def load_documents(
    dataset_name: str,
    *,
    dataset_config: str | None = None,
    data_files: Sequence[str | Path] = (),
    split: str = "train",
    text_column: str = "text",
    cache_dir: str | None = None,
    chats_only: bool = False,
) -> Iterable[Document]:
    """The documents of a hub data set, of local files or in the package; sized, and iterable any number of times.

    Args:
        dataset_name: a hub id (or a folder that `datasets.load_dataset` can read), "text" for local files, or
            "builtin:python-docs".
        dataset_config: the hub data set's configuration.
        data_files: with "text" only: paths or globs of the kinds in `npt.data.readers`, freely mixed; .json is JSON lines.
        split: the hub data set's split.
        text_column: the column that holds text or chats, dotted for one inside another; see `npt.data.documents.document_of`.
        cache_dir: where hub data sets are kept; None is the library's own place.
        chats_only: text in files or a hub data set that is no chat is an error.

    Raises:
        DataError: the hub can't be reached, the name or column is unknown, or a local file is unusable. One line that
            names every culprit; local files are all checked before this returns.
    """
    dataset_name = expanded(dataset_name)
    if dataset_name == "text":
        return TextFiles(data_files, text_column, chats_only=chats_only)
    if dataset_name == "self":
        raise DataError("data.dataset_name=self has no documents to load; the model writes it, see sample_blocks")
    if data_files:
        raise DataError(f"data.data_files needs data.dataset_name=text, not '{dataset_name}'; change one of the two")
    if dataset_name.startswith(builtin.PREFIX):
        return builtin.documents(dataset_name)
    return _HubDocuments(dataset_name, dataset_config, split, text_column, cache_dir, chats_only)


class _HubDocuments:
    """The documents of a data set that `datasets` reads whole; blank ones are among them."""

    def __init__(
        self, name: str, config: str | None, split: str, text_column: str, cache_dir: str | None, chats_only: bool
    ):
        self.where = where_of(name, config)
        self.text_column, self.chats_only = text_column, chats_only
        try:
            found = datasets.load_dataset(name, config, split=split, cache_dir=cache_dir and expanded(cache_dir))
        except HUB_ERRORS as error:
            why = one_line(error, 300) or type(error).__name__
            raise DataError(f"{self.where}: can't be loaded, split '{split}' ({why}); {hub_remedy(error)}") from error
        kinds = kinds_of_schema(found.features.arrow_schema)
        columns = columns_to_read(found.column_names, text_column, kinds)
        if not columns:
            raise DataError(f"{self.where}: {column_problem(text_column, kinds)}")
        self._rows = found.select_columns(columns)
        next(iter(self), None)  # text where chats are wanted is named at once

    def __iter__(self) -> Iterator[Document]:
        for number, row in enumerate(self._rows, start=1):
            place = f"{self.where}, row {number}"
            yield document_of(row, self.text_column, place, chats_only=self.chats_only)

    def __len__(self) -> int:
        return len(self._rows)


#: Errors of `datasets` for a wrong id, configuration or split, a script data set, no network, and a kind of packed file that
#: needs a package more.
HUB_ERRORS: tuple[Any, ...] = (OSError, ValueError, RuntimeError, ImportError, datasets.exceptions.DatasetsError)


def where_of(name: str, config: str | None) -> str:
    """The keys that name a hub data set, with their values, for errors."""
    return f"data.dataset_name='{name}'" + (f", data.dataset_config='{config}'" if config else "")


def hub_remedy(error: Exception) -> str:
    """The remedy where `datasets` can't load a data set."""
    text = str(error)
    if isinstance(error, ImportError) or "Compression type" in text:
        return f"install what datasets needs for it (zstandard, for .zst), or use {_LOCAL}, which reads .gz and .zst as it is"
    if "Config name is missing" in text or ("BuilderConfig" in text and "not found" in text):
        return "name one of these in data.dataset_config"
    if "split" in text and ("Unknown" in text or "Bad" in text):
        return (
            "npt reads that split alone: write the one you want to a file, load_dataset(NAME, split=SPLIT).to_json(FILE), and "
            f"use {_LOCAL}"
        )
    return f"check the name and the network, or use {_LOCAL}"


def expand_files(data_files: Sequence[str | Path], named_by: str) -> tuple[list[Path], list[str]]:
    """The files that names and globs stand for, each once and in order, and the problems with the other names."""
    paths: dict[Path, None] = {}
    problems = []
    for name in data_files:
        try:
            path = place(name)
            # A name that exists is that file, even if it holds glob characters.
            found = [path] if path.exists() else [Path(p) for p in sorted(glob.glob(str(path), recursive=True))]
        except NPTError as error:
            problems.append(f"{error}; check {named_by}")
            continue
        except OSError as error:  # a name too long, or in a folder that can't be entered
            problems.append(f"{name}: can't be looked up ({error}); check {named_by}")
            continue
        if not found:
            problems.append(f"{name}: no such file; check {named_by}")
        paths.update(dict.fromkeys(found))
    return list(paths), problems
