"""Text documents from the hub or from local files, checked whole before anything is tokenised."""

from __future__ import annotations

import glob
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet

from npt import builtin
from npt.common.display import one_line
from npt.common.places import expanded, place
from npt.errors import DataError, NPTError

#: Kinds of column that hold text, by the names of pyarrow, and the kind of a column whose rows are lists or objects.
TEXT_TYPES, LISTS = ("string", "large_string"), "lists"
_LOCAL = "data.dataset_name=text with data.data_files"


class TextFiles:
    """The documents of local files, in order: one per .txt file, .jsonl or .json line, and .parquet row.

    The files are read from end to end here, so that every bad one is reported at the start and all in one message, and again
    whenever the documents are iterated, with one document (1024 rows of parquet) in memory at a
    time. Blank documents are left out; `len()` counts the others.

    Args:
        named_by: the key or option that named the files, for errors.

    Raises:
        DataError: a file is missing, unreadable, of an unknown kind, empty, not UTF-8, blank, or has a bad line or row.
    """

    def __init__(
        self, data_files: Sequence[str | Path], text_column: str = "text", named_by: str = "data.data_files"
    ) -> None:
        self.text_column = text_column
        if not data_files:
            raise DataError("data.data_files is empty, but data.dataset_name=text reads local files; name at least one")
        self.paths, problems = expand_files(data_files, named_by)
        self._length = 0
        for path in self.paths:
            try:
                self._length += sum(1 for _ in read_documents(path, text_column))
            except DataError as error:
                problems.append(str(error))
        if problems:
            raise DataError("; ".join(map(one_line, problems)))

    def __iter__(self) -> Iterator[str]:
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
) -> Iterable[str]:
    """The text documents of a hub data set, of local files or in the package; sized, and iterable any number of times.

    Args:
        dataset_name: a hub id (or a folder that `datasets.load_dataset` can read), "text" for local files, or
            "builtin:python-docs".
        dataset_config: the hub data set's configuration.
        data_files: with "text" only: .txt, .jsonl or .json (JSON lines) and .parquet paths or globs, freely mixed.
        split: the hub data set's split.
        text_column: the column or JSON key that holds the text.
        cache_dir: where hub data sets are kept; None is the library's own place.

    Raises:
        DataError: the hub can't be reached, the name or column is unknown, or a local file is unusable. One line that
            names every culprit; local files are all checked before this returns.
    """
    dataset_name = expanded(dataset_name)
    if dataset_name == "text":
        return TextFiles(data_files, text_column)
    if dataset_name == "self":
        raise DataError("data.dataset_name=self has no documents to load; the model writes it, see sample_blocks")
    if data_files:
        raise DataError(f"data.data_files needs data.dataset_name=text, not '{dataset_name}'; change one of the two")
    if dataset_name.startswith(builtin.PREFIX):
        return builtin.documents(dataset_name)
    return _hub_documents(dataset_name, dataset_config, split, text_column, cache_dir)


def _hub_documents(name: str, config: str | None, split: str, text_column: str, cache_dir: str | None) -> Iterable[str]:
    where = f"data.dataset_name='{name}'" + (f", data.dataset_config='{config}'" if config else "")
    try:
        dataset = datasets.load_dataset(name, config, split=split, cache_dir=cache_dir and expanded(cache_dir))
    # The library raises all of these for a wrong id, configuration or split, a script data set, and no network.
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        why = one_line(error, 300) or type(error).__name__
        raise DataError(f"{where}: can't be loaded, split '{split}' ({why}); {hub_remedy(error)}") from error
    kinds = {name: str(getattr(feature, "dtype", LISTS)) for name, feature in dataset.features.items()}
    if kinds.get(text_column) not in TEXT_TYPES:
        raise DataError(f"{where}: {column_problem(text_column, kinds)}")
    return dataset[text_column]


def hub_remedy(error: Exception) -> str:
    """The remedy where `datasets` can't load a data set."""
    text = str(error)
    if "Config name is missing" in text or ("BuilderConfig" in text and "not found" in text):
        return "name one of these in data.dataset_config"
    if "split" in text and ("Unknown" in text or "Bad" in text):
        return (
            "npt reads that split alone: write the one you want to a file, load_dataset(NAME, split=SPLIT).to_json(FILE), and "
            f"use {_LOCAL}"
        )
    return f"check the name and the network, or use {_LOCAL}"


def column_problem(column: str, kinds: Mapping[str, str]) -> str:
    """The problem with a column that should hold text, and the remedy, from {column: kind of what it holds}."""
    there = one_line(f"there are: {', '.join(kinds)}", 200)
    wrong = f"column '{column}' holds {kinds[column]}, not text" if column in kinds else f"no column '{column}'"
    texts = [name for name, kind in kinds.items() if kind in TEXT_TYPES]
    if texts:
        remedy = f"name one with text in data.text_column: {one_line(', '.join(texts), 200)}"
    elif any("list" in kind for kind in kinds.values()):
        remedy = (
            "chats and lists are not read yet: write each row as one text, of a chat with "
            "tokenizer.apply_chat_template(messages, tokenize=False), into a column, and name that in data.text_column"
        )
    else:
        remedy = "none holds text: write each row's text into a column, and name that in data.text_column"
    return f"{wrong} ({there}); {remedy}"


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


def read_documents(path: Path, text_column: str) -> Iterator[str]:
    """The documents of one file that aren't blank; a file without any is an error."""
    reader = _READERS.get(path.suffix.lower())
    empty = True
    try:
        if path.is_dir():
            raise DataError(f"{path}: is a folder; {_files_in(path)}")
        if reader is None:
            raise DataError(f"{path}: unknown kind of file '{path.suffix}'; use {', '.join(_READERS)}")
        if path.stat().st_size == 0:
            raise DataError(f"{path}: is empty; give a file with text")
        for document in reader(path, text_column):
            if document.strip():
                empty = False
                yield document
    except OSError as error:
        raise DataError(f"{path}: can't be read ({one_line(error.strerror or error, 200)}); check the file") from error
    if empty:
        raise DataError(f"{path}: holds only white space; give a file with text")


def _decode(data: bytes, place: str) -> str:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        bad = f"byte 0x{data[error.start]:02x} at offset {error.start}"
        raise DataError(f"{place}: not UTF-8 ({bad}); save it as UTF-8 text") from error
    if "\0" in text:
        raise DataError(f"{place}: binary, not text (a NUL at offset {text.index(chr(0))}); save it as UTF-8 text")
    return text


def _read_txt(path: Path, text_column: str) -> Iterator[str]:
    yield _decode(path.read_bytes(), str(path)).replace("\r\n", "\n")


def _read_jsonl(path: Path, text_column: str) -> Iterator[str]:
    with path.open("rb") as lines:
        for number, data in enumerate(lines, start=1):
            place = f"{path}, line {number}"
            line = _decode(data, place)
            if line.strip():
                yield _json_text(line, place, text_column)


def _json_text(line: str, place: str, text_column: str) -> str:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: not JSON ({error}); write one JSON object per line") from error
    if not isinstance(row, dict):
        raise DataError(f"{place}: {type(row).__name__}, not an object; write one JSON object per line")
    text = row.get(text_column)
    if text_column not in row or not isinstance(text, str | None):
        kinds = {name: "string" if isinstance(value, str) else type(value).__name__ for name, value in row.items()}
        raise DataError(f"{place}: {column_problem(text_column, kinds)}")
    if text and any("\ud800" <= character <= "\udfff" for character in text):
        raise DataError(f"{place}: column '{text_column}' holds half a surrogate pair; write the text as UTF-8")
    return text or ""


def _files_in(folder: Path) -> str:
    """The remedy where a folder is named for its files."""
    for pattern in ("", "**"):
        found = (path.suffix for path in folder.glob(f"{pattern}/*".strip("/")) if path.suffix.lower() in _READERS)
        if (suffix := next(found, None)) is not None:
            return f"name its files, for example {folder / pattern / f'*{suffix}'}"
    return f"it holds no file of a kind that is read ({', '.join(_READERS)}); name another"


def _read_parquet(path: Path, text_column: str) -> Iterator[str]:
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            schema = table.schema_arrow
            if schema.names.count(text_column) > 1:
                raise DataError(f"{path}: column '{text_column}' stands there twice; write it again with one")
            kinds = {field.name: str(field.type) for field in schema}
            if kinds.get(text_column) not in TEXT_TYPES:
                raise DataError(f"{path}: {column_problem(text_column, kinds)}")
            for batch in table.iter_batches(batch_size=1024, columns=[text_column]):
                yield from (text or "" for text in batch.column(0).to_pylist())
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        why = one_line(error, 200)
        raise DataError(f"{path}: not a readable parquet file ({why}); write it again") from error


_READERS: dict[str, Callable[[Path, str], Iterator[str]]] = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".json": _read_jsonl,
    ".parquet": _read_parquet,
}
